"""InfoNCA, for answers of graded relevance."""

from typing import Any

import torch

from .scores import Answers, Scores


def infonca(scores: Scores, config: Any) -> torch.Tensor:
    r"""
    The loss of InfoNCA: all answers of a prompt are to share the probability as their relevance does.

    $$
    \mathcal{L} = -\sum_{i} \frac{e^{s_i / \alpha}}{\sum_{j} e^{s_j / \alpha}} \log \frac{e^{\beta r_i}}{\sum_{j} e^{\beta r_j}}
    $$

    over all answers i, j of the prompt, with s their relevance and r = log π_θ/π_ref. The objective of InfoNCA in
    [Noise Contrastive Alignment of Language Models with Explicit Rewards](https://huggingface.co/papers/2402.05369).

    With one chosen answer and α far below the difference in relevance it is `sdpo`; with one rejected answer as well,
    DPO. With several answers of the same highest relevance it is `mult_dpo` divided by their number.

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
    >>> from trl_dmpo.losses import Scores, infonca

    >>> scores = Scores(
    ...     chosen_logps=torch.tensor([-4.0]),
    ...     rejected_logps=torch.tensor([[-5.0, -6.0]]),
    ...     ref_chosen_logps=torch.tensor([-5.0]),
    ...     ref_rejected_logps=torch.tensor([[-5.0, -5.0]]),
    ...     chosen_lengths=torch.tensor([2]),
    ...     rejected_lengths=torch.tensor([[2, 3]]),
    ...     rejected_mask=torch.tensor([[True, True]]),
    ...     chosen_nll=torch.tensor(2.0),
    ...     relevance=torch.tensor([[2.0, 2.0, -100.0]]),
    ... )
    >>> # r = (1, 0, -1), shares (1/2, 1/2, 0): log(e + 1 + e^-1) - (1 + 0) / 2
    >>> infonca(scores, DMPOConfig(beta=1.0, nca_alpha=1.0, bf16=False))
    tensor([0.9076])
    ```
    """
    answers = scores.answers
    log_shares = (config.beta * answers.logratios).masked_fill(~answers.mask, -torch.inf).log_softmax(dim=1)
    return -(target_shares(answers, config) * log_shares.masked_fill(~answers.mask, 0)).sum(1)


def target_shares(answers: Answers, config: Any) -> torch.Tensor:
    """softmax(s / α) over the answers of each prompt, of shape (N, A), 0 where there is none."""
    relevance = answers.relevance.masked_fill(~answers.mask, -torch.inf)
    # The best first: a large number over a small α would have no representation
    return ((relevance - relevance.amax(1, keepdim=True)) / config.nca_alpha).softmax(dim=1)
