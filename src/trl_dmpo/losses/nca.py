"""Noise contrastive alignment, for answers of graded relevance."""

from typing import Any

import torch
import torch.nn.functional as F

from .infonca import target_shares
from .scores import Scores


def nca(scores: Scores, config: Any) -> torch.Tensor:
    r"""
    The loss of NCA: each answer's reward by itself, drawn up by its relevance and down by a share that all have.

    $$
    \mathcal{L} = -\sum_{i=1}^{A} \Big[ \frac{e^{s_i / \alpha}}{\sum_{j} e^{s_j / \alpha}} \log \sigma(\beta r_i)
    + \frac{1}{A} \log \sigma(-\beta r_i) \Big]
    $$

    over all A answers of the prompt, with s their relevance and r = log π_θ/π_ref. The objective of NCA in
    [Noise Contrastive Alignment of Language Models with Explicit Rewards](https://huggingface.co/papers/2402.05369).

    `infonca` only compares the answers, so that the likelihood of all may fall; here each has a level of its own to reach.
    With one chosen and one rejected answer and α far below the difference in relevance it is `nca_pair`.

    Args:
        scores ([`Scores`]):
            Log-probabilities, and the relevance, of all answers of N prompts.
        config ([`DMPOConfig`]):
            `beta` and `nca_alpha` are used.

    Returns:
        `torch.Tensor` of shape (N,).

    Example:

    ```python
    >>> import torch
    >>> from trl_dmpo import DMPOConfig
    >>> from trl_dmpo.losses import Scores, nca

    >>> scores = Scores(
    ...     chosen_logps=torch.tensor([-4.0]),
    ...     rejected_logps=torch.tensor([[-5.0, -6.0]]),
    ...     ref_chosen_logps=torch.tensor([-5.0]),
    ...     ref_rejected_logps=torch.tensor([[-5.0, -5.0]]),
    ...     chosen_lengths=torch.tensor([2]),
    ...     rejected_lengths=torch.tensor([[2, 3]]),
    ...     rejected_mask=torch.tensor([[True, True]]),
    ...     chosen_nll=torch.tensor(2.0),
    ... )
    >>> # r = (1, 0, -1): log(1 + e^-1) + [log(1 + e) + log 2 + log(1 + e^-1)] / 3
    >>> nca(scores, DMPOConfig(beta=1.0, bf16=False))
    tensor([1.0865])
    ```
    """
    answers = scores.answers
    rewards = config.beta * answers.logratios
    drawn_down = F.logsigmoid(-rewards) / answers.mask.sum(1, keepdim=True)
    terms = target_shares(answers, config) * F.logsigmoid(rewards) + drawn_down
    return -terms.masked_fill(~answers.mask, 0).sum(1)
