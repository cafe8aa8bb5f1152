"""What a step logs, as sums and counts, so that one collective and one copy to the host serve all of it."""

from collections.abc import Iterable
from typing import Any

import torch

from ..losses import Scores


class MeanMetrics:
    """
    Means over all processes of values that arrive as sums and counts.

    Example:

    ```python
    >>> import torch
    >>> from accelerate import Accelerator
    >>> from trl_dmpo.trainer.metrics import MeanMetrics

    >>> metrics = MeanMetrics()
    >>> metrics.add("logps/chosen", torch.tensor([-1.0, -3.0]))
    >>> metrics.add("entropy", torch.tensor([[2.0, 9.0]]), torch.tensor([[True, False]]))
    >>> metrics.reduce(Accelerator(cpu=True))
    {'logps/chosen': -2.0, 'entropy': 2.0}
    ```
    """

    def __init__(self):
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, torch.Tensor] = {}
        self._totals: set[str] = set()

    def add(self, name: str, values: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        """Add `values`, those where `mask` is `True`."""
        values = values.detach().float()
        if mask is None:
            self.add_sum(name, values.sum(), torch.full((), float(values.numel()), device=values.device))
        else:
            self.add_sum(name, values.masked_fill(~mask, 0).sum(), mask.sum())

    def add_sum(self, name: str, total: torch.Tensor, count: torch.Tensor) -> None:
        """Add a sum of values and their number, both scalars."""
        self._sums[name] = self._sums.get(name, 0) + total.detach().float()
        self._counts[name] = self._counts.get(name, 0) + count.detach().float()

    def add_total(self, name: str, total: torch.Tensor) -> None:
        """Add to what is a sum and not a mean."""
        self._totals.add(name)
        self.add_sum(name, total, torch.zeros_like(total))

    def reduce(self, accelerator: Any) -> dict[str, float]:
        """The means, or totals, over all processes; 0 where nothing was counted."""
        if not self._sums:
            return {}
        table = torch.stack([torch.stack([self._sums[name], self._counts[name]]) for name in self._sums])
        sums, counts = accelerator.gather(table[None]).sum(0).T.tolist()
        found = zip(self._sums, sums, counts, strict=True)
        return {
            name: total if name in self._totals else total / count if count else 0.0 for name, total, count in found
        }


def preference_metrics(scores: Scores, beta: float) -> dict[str, torch.Tensor]:
    """
    How the policy has come to prefer the chosen completions, and what their likelihood has become.

    Args:
        scores ([`Scores`]):
            Log-probabilities of R chosen completions, each with up to K rejected ones.
        beta (`float`):
            Scale of the rewards.

    Returns:
        `dict[str, torch.Tensor]`, each of shape (R,):
        - `rewards/chosen`, `rewards/rejected`, `rewards/margins`: β r_w, and means over the K of β r_i and of β (r_w - r_i).
        - `rewards/accuracies`: share of the K with r_w > r_i.
        - `rewards/hardest_margin`: the least of the K margins.
        - `logps/chosen`, `logps/rejected`: log-probabilities, the latter as a mean over the K.
        - `logps/chosen_change`: log π_θ - log π_ref of the chosen one. Below zero, it has lost likelihood.
        - `negatives/active`: share of the K that still carry gradient: σ(-β (r_w - r_i)) > 1%.
    """
    chosen, rejected = beta * scores.chosen_logratios, beta * scores.rejected_logratios
    margins = chosen - rejected
    return {
        "rewards/chosen": scores.mean(chosen),
        "rewards/rejected": scores.mean(rejected),
        "rewards/accuracies": scores.mean((chosen > rejected).float()),
        "rewards/margins": scores.mean(margins),
        "rewards/hardest_margin": margins.masked_fill(~scores.rejected_mask, torch.inf).amin(1),
        "logps/chosen": scores.per_chosen(scores.chosen_logps),
        "logps/rejected": scores.mean(scores.rejected_logps),
        "logps/chosen_change": scores.mean(scores.chosen_logratios),
        "negatives/active": scores.mean((torch.sigmoid(-margins) > 0.01).float()),
    }


def ranking_metrics(logps: torch.Tensor, mask: torch.Tensor, cutoffs: Iterable[int]) -> dict[str, torch.Tensor]:
    """
    How high the chosen completion ranks among all completions of its prompt. Ties count against it.

    Args:
        logps (`torch.Tensor`):
            Log-probabilities of shape (R, C), the chosen completion first.
        mask (`torch.Tensor`):
            Which completions there are, bool of shape (R, C).
        cutoffs (`Iterable[int]`):
            The k of hit rate and NDCG.

    Returns:
        `dict[str, torch.Tensor]`: `ranking/hit_rate@k`, `ranking/ndcg@k` (with one relevant item, 1 / log2(1 + rank) up
        to rank k), `ranking/mrr`, and `negatives/violations`, the share of the rejected completions that rank at or above the
        chosen one; each of shape (R,).

    Example:

    ```python
    >>> import torch
    >>> from trl_dmpo.trainer.metrics import ranking_metrics

    >>> ranking_metrics(torch.tensor([[-2.0, -3.0, -1.0]]), torch.ones(1, 3, dtype=torch.bool), [1, 2])
    {'ranking/hit_rate@1': tensor([0.]), 'ranking/ndcg@1': tensor([0.]), 'ranking/hit_rate@2': tensor([1.]), 'ranking/ndcg@2': tensor([0.6309]), 'ranking/mrr': tensor([0.5000]), 'negatives/violations': tensor([0.5000])}
    ```
    """
    above = ((logps[:, 1:] >= logps[:, :1]) & mask[:, 1:]).sum(1)
    rank = 1 + above
    gain = 1 / torch.log2(1 + rank.float())
    metrics = {}
    for k in cutoffs:
        hit = (rank <= k).float()
        metrics[f"ranking/hit_rate@{k}"] = hit
        metrics[f"ranking/ndcg@{k}"] = hit * gain
    metrics["ranking/mrr"] = 1 / rank.float()
    metrics["negatives/violations"] = above / mask[:, 1:].sum(1).clamp(min=1)
    return metrics
