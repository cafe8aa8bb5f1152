"""
From completions by prompt to rows of one chosen completion and its rejected ones, and back.

B prompts have R >= B chosen completions in all: a loss of one chosen completion takes each of them in turn.
"""

import torch


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


def any_per_prompt(mask: torch.Tensor, chosen_lengths: torch.Tensor) -> torch.Tensor:
    """`mask`, (R, K), where it is `True` for any of the chosen completions of a prompt, (B, K)."""
    if chosen_lengths.size(1) == 1:
        return mask
    prompts = chosen_lengths.nonzero()[:, 0]
    counts = torch.zeros(len(chosen_lengths), mask.size(1), device=mask.device)
    return counts.index_add_(0, prompts, mask.float()) > 0
