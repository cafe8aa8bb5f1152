"""Batches in parts, so that one of long rows does not outgrow the memory."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from .layout import LAYOUT_KEYS


def take_prompts(
    batch: dict[str, torch.Tensor], prompts: Sequence[int], multiple_of: int = 1
) -> dict[str, torch.Tensor]:
    """
    The part of a batch that some of its prompts take.

    Args:
        batch (`dict[str, torch.Tensor]`):
            A batch of B prompts in either layout; tensors that are none of the layout's have B rows, or no dimension.
        prompts (`Sequence[int]`):
            Places of the prompts, at least one.
        multiple_of (`int`, *optional*, defaults to `1`):
            The width is a multiple of it.

    Returns:
        `dict[str, torch.Tensor]`: the same for these prompts, padded no wider than they need.

    Example:

    ```python
    >>> from trl_dmpo import DataCollatorForMultiPreference
    >>> from trl_dmpo.trainer.micro_batches import take_prompts

    >>> examples = [
    ...     {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [[6]]},
    ...     {"prompt_ids": [1], "chosen_ids": [4], "rejected_ids": [[7]]},
    ... ]
    >>> batch = DataCollatorForMultiPreference(pad_token_id=0)(examples)
    >>> take_prompts(batch, [1])["input_ids"]
    tensor([[1, 1]])
    ```
    """
    width = batch["targets"].size(1)
    prompts = torch.as_tensor(prompts, device=batch["targets"].device)
    of_prompts = {
        name: value[prompts] if isinstance(value, torch.Tensor) and value.dim() > 0 else value
        for name, value in batch.items()
        if name not in LAYOUT_KEYS
    }
    if width == 0:  # nothing is scored
        return batch | of_prompts
    positions = of_prompts["completion_positions"]
    rows, new_rows = torch.unique(positions // width, return_inverse=True)
    if rows[0] < 0 and len(rows) > 1:
        rows, new_rows = rows[1:], new_rows - 1
    rows = rows.clamp(min=0)
    longest = int(batch["attention_mask"][rows].sum(1).max())
    excess = batch["input_ids"].size(1) - -(-longest // multiple_of) * multiple_of
    new_width = width - max(excess, 0)

    of_rows = {
        name: value[rows, : value.size(1) - max(excess, 0)] for name, value in batch.items() if name in LAYOUT_KEYS
    }
    moved = new_rows * new_width + positions % width
    return of_prompts | of_rows | {"completion_positions": torch.where(positions < 0, -1, moved)}


def split_prompts(batch: dict[str, torch.Tensor], max_tokens: int) -> list[list[int]]:
    """
    Prompts of a batch in parts of at most `max_tokens` tokens, padding included.

    Prompts that share a row of tokens stay together, and what alone has more is a part of its own. Longer ones come first,
    beside others of about their length.

    Args:
        batch (`dict[str, torch.Tensor]`):
            A batch of B prompts in either layout.
        max_tokens (`int`):
            Budget of a part.

    Returns:
        `list[list[int]]`: places of the prompts of each part; every prompt once.
    """
    count, width = len(batch["completion_positions"]), batch["targets"].size(1)
    if batch["input_ids"].numel() <= max_tokens or width == 0:
        return [list(range(count))]
    last = batch["completion_positions"].amax(2).tolist()
    lengths = batch["attention_mask"].sum(1).tolist()
    units: dict[int, _Unit] = {}
    for prompt, positions in enumerate(last):
        rows = {position // width for position in positions if position >= 0} or {0}
        unit = units.setdefault(min(rows), _Unit([], set()))
        unit.prompts.append(prompt)
        unit.rows.update(rows)

    parts: list[list[int]] = []
    num_rows, longest = 0, 0
    for unit in sorted(units.values(), key=lambda unit: -max(lengths[row] for row in unit.rows)):
        if not parts or (num_rows + len(unit.rows)) * longest > max_tokens:
            parts.append([])
            num_rows, longest = 0, max(lengths[row] for row in unit.rows)
        parts[-1] += unit.prompts
        num_rows += len(unit.rows)
    return parts


class _Unit(NamedTuple):
    """Prompts that share rows of tokens, and these rows."""

    prompts: list[int]
    rows: set[int]


def split_batch(
    batch: dict[str, torch.Tensor], max_tokens: int | None, accelerator: Any, multiple_of: int | None = None
) -> list[dict[str, torch.Tensor]]:
    """
    Micro-batches of at most `max_tokens` tokens, as many on all processes.

    Args:
        batch (`dict[str, torch.Tensor]`):
            A batch with [`~step_counts.COUNT_KEYS`], which the micro-batches keep: the sum of their losses is its loss.
        max_tokens (`int`, *optional*):
            Budget of a micro-batch. If `None`, `batch` is the only one.
        accelerator ([`~accelerate.Accelerator`]):
            Knows the other processes.
        multiple_of (`int`, *optional*):
            As `pad_to_multiple_of` of the collator.

    Returns:
        `list[dict[str, torch.Tensor]]`. Where another process has more, the last ones repeat rows that do not count. If
        there are several, `place` says where in `batch` their prompts are.
    """
    if max_tokens is None:
        return [batch]
    parts = split_prompts(batch, max_tokens)
    needed = int(accelerator.gather(torch.tensor([len(parts)], device=accelerator.device)).max())
    if needed == 1:
        return [batch]
    count = len(batch["completion_positions"])
    batch = batch | {"place": torch.arange(count, device=batch["completion_positions"].device)}
    micro_batches = [take_prompts(batch, part, multiple_of or 1) for part in parts]
    idle = micro_batches[-1] | {"counts": torch.zeros_like(micro_batches[-1]["counts"])}
    return micro_batches + [idle] * (needed - len(parts))


def join_parts(parts: Sequence[dict[str, torch.Tensor]], results: Sequence[tuple[torch.Tensor, ...]]) -> tuple:
    """What was computed for each of [`split_batch`], as if for the batch: values of its prompts in order, scalars summed."""
    if len(parts) == 1:
        return results[0]
    places = torch.cat([part["place"] for part in parts])
    joined = []
    for values in zip(*results, strict=True):
        if values[0].dim() == 0:
            joined.append(sum(values))
        else:
            of_parts = torch.cat(values)
            joined.append(
                of_parts.new_empty(int(places.max()) + 1, *of_parts.shape[1:]).index_copy(0, places, of_parts)
            )
    return tuple(joined)
