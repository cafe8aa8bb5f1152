"""
From completions by prompt to rows of one chosen completion and its rejected ones, and back.

B prompts have R >= B chosen completions in all: a loss of one chosen completion takes each of them in turn.
"""

from dataclasses import replace
from typing import Any, TypeAlias

import torch

from ..losses import Scores
from ..losses.scores import make_answers
from ..losses.selection import select_negatives


# Of chosen and of rejected completions
Logps: TypeAlias = tuple[torch.Tensor, torch.Tensor]


def split_chosen(values: torch.Tensor, chosen_lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    A row for each chosen completion.

    Args:
        values (`torch.Tensor`):
            Of each completion, of shape (B, P + K, ...): first up to P chosen ones, then up to K rejected ones.
        chosen_lengths (`torch.Tensor`):
            Tokens of the chosen completions, of shape (B, P); 0 where there is none.

    Returns:
        `tuple`: of the chosen, of shape (R, ...), and of the rejected, of shape (R, K, ...).

    Example:

    ```python
    >>> import torch
    >>> from trl_dmpo.trainer.pairs import split_chosen

    >>> split_chosen(torch.tensor([[1, 2, 8, 9], [3, 0, 7, 6]]), chosen_lengths=torch.tensor([[4, 5], [4, 0]]))
    (tensor([1, 2, 3]), tensor([[8, 9],
            [8, 9],
            [7, 6]]))
    ```
    """
    count = chosen_lengths.size(1)
    if count == 1:
        return values[:, 0], values[:, 1:]
    prompts, places = chosen_lengths.nonzero(as_tuple=True)
    return values[prompts, places], values[prompts, count:]


def per_prompt(values: torch.Tensor, chosen_lengths: torch.Tensor) -> torch.Tensor:
    """The mean of `values`, (R,), over the chosen completions of each prompt, (B,)."""
    if chosen_lengths.size(1) == 1:
        return values
    is_chosen = chosen_lengths > 0
    spread = values.new_zeros(is_chosen.shape).masked_scatter(is_chosen, values)
    return spread.sum(1) / is_chosen.sum(1)


def make_scores(
    logps: Logps,
    ref_logps: Logps,
    batch: dict[str, torch.Tensor],
    chosen_nll: torch.Tensor,
    weights: torch.Tensor | None = None,
) -> Scores:
    """
    What the losses see of a batch, a row for each chosen completion.

    Args:
        logps (`tuple[torch.Tensor, torch.Tensor]`):
            Log-probabilities of the chosen completions, of shape (B,), or (B, P) if a prompt has several, or (B, K) under
            `ld_alpha`; and of the rejected ones, of shape (B, K).
        ref_logps (`tuple[torch.Tensor, torch.Tensor]`):
            Those of the reference, of the same shapes.
        batch (`dict[str, torch.Tensor]`):
            `completion_lengths`, `chosen_lengths` and, if there is any, `relevance` are used.
        chosen_nll (`torch.Tensor`):
            Mean of -log π_θ over the tokens of all chosen completions, a scalar.
        weights (`torch.Tensor`, *optional*):
            Weight of each completion under `use_weighting`, of shape (B, P + K).

    Returns:
        [`Scores`].
    """
    chosen_lengths, relevance, several = batch["chosen_lengths"], batch.get("relevance"), None
    if chosen_lengths.size(1) > 1:
        policy, reference = torch.cat(logps, dim=1), torch.cat(ref_logps, dim=1)
        mask = batch["completion_lengths"] > 0
        several = make_answers(policy - reference, mask, chosen_lengths.size(1), relevance)
        relevance = None
        logps, ref_logps = split_chosen(policy, chosen_lengths), split_chosen(reference, chosen_lengths)
    of_chosen, of_rejected = split_chosen(batch["completion_lengths"], chosen_lengths)
    if weights is not None:
        weight_of_chosen, weights = split_chosen(weights, chosen_lengths)
        weights = weight_of_chosen.unsqueeze(1) * weights
    return Scores(
        chosen_logps=logps[0],
        rejected_logps=logps[1],
        ref_chosen_logps=ref_logps[0],
        ref_rejected_logps=ref_logps[1],
        chosen_lengths=of_chosen,
        rejected_lengths=of_rejected,
        rejected_mask=of_rejected > 0,
        chosen_nll=chosen_nll,
        weights=weights,
        relevance=relevance,
        several=several,
    )


def select_for_each(scores: Scores, config: Any, chosen_lengths: torch.Tensor) -> Scores:
    """
    [`~losses.selection.select_negatives`] for each chosen completion.

    Where all completions of a prompt are in one list, those count that are selected for any of its chosen ones.
    """
    selected = select_negatives(scores, config)
    if scores.several is None or config.negative_selection == "all":
        return selected
    is_chosen = (chosen_lengths > 0).unsqueeze(2)
    by_chosen = is_chosen.expand(-1, -1, selected.rejected_mask.size(1))
    by_chosen = torch.zeros_like(by_chosen).masked_scatter(by_chosen, selected.rejected_mask)
    mask = torch.cat([scores.several.mask[:, : chosen_lengths.size(1)], by_chosen.any(1)], dim=1)
    return replace(selected, several=scores.several._replace(mask=mask))
