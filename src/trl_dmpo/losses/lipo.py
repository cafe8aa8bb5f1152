"""LiPO-λ, for answers of graded relevance."""

from typing import Any

import torch
import torch.nn.functional as F

from .scores import Scores


def lipo(scores: Scores, config: Any) -> torch.Tensor:
    r"""
    The loss of LiPO-λ: all pairs of different relevance, each weighed by what swapping the two would do to the DCG.

    $$
    \mathcal{L} = -\sum_{s_i > s_j} \big| 2^{s_i} - 2^{s_j} \big| \, \Big| \frac{1}{\log(1 + \tau_i)} - \frac{1}{\log(1 + \tau_j)} \Big|
    \log \sigma\big( \beta (r_i - r_j) \big)
    $$

    over all answers of the prompt, with s their relevance, r = log π_θ/π_ref, and τ the rank of each by r, 1 for the
    highest. The objective of LiPO-λ in
    [LiPO: Listwise Preference Optimization through Learning-to-Rank](https://huggingface.co/papers/2402.01878).

    The ranks are constants to the gradient. Answers of equal r are ranked in the order of the row, so that at the start of
    training, when all r are 0, the pairs have weights. With one rejected answer and relevance (1, 0) it is DPO times
    1/log 2 - 1/log 3.

    Args:
        scores ([`Scores`]):
            Log-probabilities, and the relevance, of all answers of N prompts.
        config ([`DMPOConfig`]):
            `beta` is used.

    Returns:
        `torch.Tensor` of shape (N,), 0 where all answers of a prompt have the same relevance.

    Example:

    ```python
    >>> import torch
    >>> from trl_dmpo import DMPOConfig
    >>> from trl_dmpo.losses import Scores, lipo

    >>> scores = Scores(
    ...     chosen_logps=torch.tensor([-4.0]),
    ...     rejected_logps=torch.tensor([[-5.0]]),
    ...     ref_chosen_logps=torch.tensor([-5.0]),
    ...     ref_rejected_logps=torch.tensor([[-5.0]]),
    ...     chosen_lengths=torch.tensor([2]),
    ...     rejected_lengths=torch.tensor([[2]]),
    ...     rejected_mask=torch.tensor([[True]]),
    ...     chosen_nll=torch.tensor(2.0),
    ...     relevance=torch.tensor([[2.0, 1.0]]),
    ... )
    >>> lipo(scores, DMPOConfig(beta=1.0, bf16=False))  # (4 - 2) * (1 / log 2 - 1 / log 3) * log(1 + e^-1)
    tensor([0.3336])
    ```
    """
    answers = scores.answers
    current = answers.logratios.detach().masked_fill(~answers.mask, -torch.inf)
    order = current.argsort(dim=1, descending=True, stable=True)
    # What stands where there is no answer may be large, and 0 times infinity would reach the gradient
    relevance = answers.relevance.masked_fill(~answers.mask, 0)
    discounts = 1 / torch.log1p(1 + order.argsort(1).to(relevance))
    preferred = (_differences(relevance) > 0) & answers.mask.unsqueeze(2) & answers.mask.unsqueeze(1)
    weights = (_differences(torch.exp2(relevance)) * _differences(discounts)).abs()
    losses = -F.logsigmoid(config.beta * _differences(answers.logratios))
    return (weights * losses).masked_fill(~preferred, 0).sum((1, 2))


def _differences(values: torch.Tensor) -> torch.Tensor:
    """values_i - values_j, from (N, A) to (N, A, A)."""
    return values.unsqueeze(2) - values.unsqueeze(1)
