"""Which rejected completions count in a step, and by how much: decided from the log-probabilities of that step."""

import math
from dataclasses import replace
from typing import Any

import torch

from .scores import Scores


# Splits that `top_cluster` compares at once, over the batch: 64 MiB in double precision
MAX_SPLITS = 2**23


def select_negatives(scores: Scores, config: Any) -> Scores:
    r"""
    Keep the rejected completions that `negative_selection` asks for, and set their β under `dynamic_beta`.

    The choice is by the log-probability of the policy, not by its ratio to the reference: it is about what the policy
    would rank where. No gradient flows through it.

    - `"all"`: every rejected completion that there is. The scores are returned as they are.
    - `"hardest"`: the `num_hard_negatives` that are the most likely, in a tie the first ones.
    - `"boundary"`: those at least as likely as the chosen completion. A prompt without any uses its [`top_cluster`]. This
      is the selection of [DynamicPO](https://huggingface.co/papers/2605.00327).

    Under `dynamic_beta`, β of the pair of the chosen completion w and a selected one i is multiplied with

    $$
    1 + \frac{1}{2} \tanh \frac{a_i - b_i - m}{|a_i| + |b_i|}, \qquad
    a_i = \log \pi_\theta(y_w|x) - \log \pi_\theta(y_i|x), \qquad
    b_i = \log \pi_\theta(y_i|x) - \frac{1}{|E|} \sum_{j \in E} \log \pi_\theta(y_j|x)
    $$

    where E are the rejected completions that were not selected, or the selected ones if that leaves none, and m is
    `dynamic_beta_margin`, 2.0 by default. The code released with the paper has 6.0.

    Args:
        scores ([`Scores`]):
            Log-probabilities of B prompts with up to K rejected completions.
        config ([`DMPOConfig`]):
            `negative_selection`, `num_hard_negatives`, `dynamic_beta` and `dynamic_beta_margin` are used.

    Returns:
        [`Scores`] with another `rejected_mask`, of which at least one is left in each row, and `beta_factors` under
        `dynamic_beta`: 1 where nothing is selected.

    Example:

    ```python
    >>> import torch
    >>> from trl_dmpo import DMPOConfig
    >>> from trl_dmpo.losses import Scores
    >>> from trl_dmpo.losses.selection import select_negatives

    >>> scores = Scores(
    ...     chosen_logps=torch.tensor([-4.0]),
    ...     rejected_logps=torch.tensor([[-3.0, -6.0, -9.0]]),
    ...     ref_chosen_logps=torch.tensor([-5.0]),
    ...     ref_rejected_logps=torch.tensor([[-5.0, -5.0, -5.0]]),
    ...     chosen_lengths=torch.tensor([2]),
    ...     rejected_lengths=torch.tensor([[2, 3, 3]]),
    ...     rejected_mask=torch.tensor([[True, True, True]]),
    ...     chosen_nll=torch.tensor(2.0),
    ... )
    >>> select_negatives(scores, DMPOConfig(negative_selection="boundary", bf16=False)).rejected_mask
    tensor([[ True, False, False]])
    ```
    """
    if config.negative_selection == "all":
        return scores
    rejected, chosen, mask = scores.rejected_logps.detach(), scores.chosen_logps.detach(), scores.rejected_mask
    chosen = chosen if chosen.dim() == 2 else chosen.unsqueeze(1)
    if config.negative_selection == "hardest":
        selected = _hardest(rejected, mask, config.num_hard_negatives)
    else:
        violations = mask & (rejected >= chosen)
        selected = torch.where(violations.any(1, keepdim=True), violations, top_cluster(rejected, mask))
    factors = None
    if config.dynamic_beta:
        factors = _beta_factors(chosen, rejected, mask, selected, config.dynamic_beta_margin)
    return replace(scores, rejected_mask=selected, beta_factors=factors)


def _hardest(values: torch.Tensor, mask: torch.Tensor, count: int) -> torch.Tensor:
    order = values.masked_fill(~mask, -math.inf).argsort(dim=1, descending=True, stable=True)
    return mask & (order.argsort(dim=1) < count)


def _beta_factors(
    chosen: torch.Tensor, rejected: torch.Tensor, mask: torch.Tensor, selected: torch.Tensor, margin: float
) -> torch.Tensor:
    others = mask & ~selected
    easy = torch.where(others.any(1, keepdim=True), others, selected)
    level = rejected.masked_fill(~easy, 0).sum(1, keepdim=True) / easy.sum(1, keepdim=True)
    a, b = chosen - rejected, rejected - level
    # Where a = b = 0: the limit, or 1 if the margin is 0 as well
    scale = (a.abs() + b.abs()).clamp(min=torch.finfo(a.dtype).tiny)
    return (1 + torch.tanh((a - b - margin) / scale) / 2).masked_fill(~selected, 1)


def top_cluster(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    The highest of the three clusters of each row: the optimum of k-means, found by comparing all clusterings.

    In one dimension the clusters of the optimum are runs of the sorted values, so that there are no more than K² / 2
    clusterings. Equal values stay together. With fewer values than clusters, each value is one. Of several optima, the
    one with the smallest highest cluster is taken.

    Args:
        values (`torch.Tensor`):
            Values of B sets, of shape (B, K).
        mask (`torch.Tensor`):
            Which of them there are, bool of shape (B, K), at least one in each row.

    Returns:
        `torch.Tensor` of shape (B, K), bool: which values are in the highest cluster.

    Example:

    ```python
    >>> import torch
    >>> from trl_dmpo.losses.selection import top_cluster

    >>> top_cluster(torch.tensor([[-9.0, -2.0, -5.5, -2.5, -5.0]]), torch.ones(1, 5, dtype=torch.bool))
    tensor([[False,  True, False,  True, False]])
    ```
    """
    ordered = values.masked_fill(~mask, -math.inf).sort(dim=1, descending=True).values
    places = torch.arange(1, values.size(1) + 1, device=values.device)
    counts = mask.sum(1, keepdim=True)
    absent = places > counts
    # The sums of squares cancel, which single precision does not survive; MPS has no other
    exact = ordered.masked_fill(absent, 0).to(torch.float32 if values.device.type == "mps" else torch.float64)
    sums = (exact - exact.sum(1, keepdim=True) / counts).masked_fill(absent, 0).cumsum(1)

    # The least sum of squares within clusters is the largest sum of S² / n over them, S the sum of a cluster of n values
    lowest = (sums[:, -1:] - sums) ** 2 / (counts - places).clamp(min=1)
    chunk = max(1, MAX_SPLITS // values.numel())
    gains = torch.cat(
        [
            _best_middle(top, sums, lowest, tops, places)
            for top, tops in zip(sums.split(chunk, dim=1), places.split(chunk), strict=True)
        ],
        dim=1,
    )
    gains = sums**2 / places + gains
    # Without the tolerance rounding would decide between equally good clusterings, and with it the padding of the batch
    best = gains >= gains.amax(1, keepdim=True) * (1 - 1e-13)
    return mask & (values >= ordered.masked_fill(~best, -math.inf).amax(1, keepdim=True))


def _best_middle(
    top: torch.Tensor, sums: torch.Tensor, lowest: torch.Tensor, tops: torch.Tensor, places: torch.Tensor
) -> torch.Tensor:
    """Gain of the middle and the lowest cluster for each end of the highest one, at the best end of the middle one."""
    sizes = places - tops.unsqueeze(1)
    gains = (sums.unsqueeze(1) - top.unsqueeze(2)).square_().div_(sizes.clamp(min=1)).add_(lowest.unsqueeze(1))
    return gains.masked_fill_(sizes < 0, -math.inf).amax(2)
