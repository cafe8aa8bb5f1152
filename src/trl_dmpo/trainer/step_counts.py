"""
Every row of an optimizer step counts equally, whatever process and micro-batch it is in, and none counts twice.

The loss of a micro-batch is the sum over its rows, divided by the rows that a micro-batch of the step has on average. What
gradient accumulation and several processes make of these, their mean, is then the mean over all rows of the step.
"""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate.data_loader import IterableDatasetShard, SkipBatchSampler
from accelerate.utils import gather_object
from torch.utils.data import IterableDataset


# Of a batch: which rows count, (B,), what to divide their sum by, and chosen tokens per row in the step, scalars
COUNT_KEYS = ("counts", "rows", "chosen_tokens_per_row")


def rows_that_count(
    batch: dict[str, torch.Tensor], accelerator: Any, is_last: bool, loader: Any = None
) -> torch.Tensor:
    """
    Which rows of a batch count: not those from the start of the dataset with which accelerate fills up the last one.

    Args:
        batch (`dict[str, torch.Tensor]`):
            What [`DataCollatorForMultiPreference`] returned for B rows.
        accelerator ([`~accelerate.Accelerator`]):
            Knows how many rows the last batch has, over all processes, where the dataset has a length.
        is_last (`bool`):
            Whether it is the last batch that the active data loader has given.
        loader ([`~torch.utils.data.DataLoader`], *optional*):
            The data loader, prepared by accelerate.

    Returns:
        `torch.Tensor` of shape (B,), bool.
    """
    lengths, state = batch["completion_lengths"], accelerator.gradient_state
    count, first = len(lengths), accelerator.process_index * len(lengths)
    if isinstance(getattr(loader, "dataset", None), IterableDatasetShard) and "row_index" in batch:
        # Nobody knows where a stream ends, but its rows come in order, unless processes have files of their own
        rows = accelerator.gather(batch["row_index"])
        before = torch.cat([rows.new_full((1,), -1), rows.cummax(0).values[:-1]])
        return (rows > before)[first : first + count]
    remainder = _rows_of_last_batch(accelerator) if is_last and state.end_of_dataloader else 0
    if remainder <= 0:
        return torch.ones(count, dtype=torch.bool, device=lengths.device)
    return torch.arange(first, first + count, device=lengths.device) < remainder


def _rows_of_last_batch(accelerator: Any) -> int:
    """Rows of the last batch over all processes, 0 or -1 if it is a full one."""
    state = accelerator.gradient_state
    sampler = getattr(state.active_dataloader, "batch_sampler", None)
    if not isinstance(sampler, SkipBatchSampler):
        return state.remainder
    # A resumed training skips batches, and accelerate loses count of the rows
    every = sampler.batch_sampler
    if every.drop_last or getattr(every, "batch_size", None) is None:  # batches of any size are not filled up
        return 0
    together = 1 if getattr(every, "split_batches", False) else getattr(every, "num_processes", 1)
    return len(state.active_dataloader.dataset) % (every.batch_size * together)


def count_step(batches: Sequence[dict[str, torch.Tensor]], accelerator: Any, loader: Any = None) -> None:
    """
    Write into the micro-batches that this process has of an optimizer step what each of their rows weighs.

    Raises:
        `ValueError`: other processes have more or fewer micro-batches, for which they would wait in vain.
    """
    numbers = gather_object([len(batches)])
    if len(set(numbers)) > 1:
        raise ValueError(
            f"Of a step, the processes have {numbers} micro-batches: of a stream of several files each reads files of its own, "
            "which here end in the middle of a step. Set `gradient_accumulation_steps=1`, or stream fewer files than there "
            "are processes: they then share the rows."
        )
    for index, batch in enumerate(batches):
        batch["counts"] = rows_that_count(batch, accelerator, index == len(batches) - 1, loader)
    rows, tokens = _totals(batches, accelerator)
    rows_on_average = rows / (len(batches) * accelerator.num_processes)
    for batch in batches:
        batch |= {"rows": rows_on_average, "chosen_tokens_per_row": tokens / rows}


def counted(batch: dict[str, torch.Tensor], accelerator: Any) -> dict[str, torch.Tensor]:
    """`batch` with [`COUNT_KEYS`]. Unless it has them it is one of evaluation, or a step of its own."""
    if "rows" in batch:
        return batch
    batch = batch | {"counts": rows_that_count(batch, accelerator, True, accelerator.gradient_state.active_dataloader)}
    rows, tokens = _totals([batch], accelerator)
    # `Trainer` weights the losses of processes by their rows in evaluation, unless it is of a stream
    divisor = rows / accelerator.num_processes if _is_stream(accelerator) else batch["counts"].sum().clamp(min=1)
    return batch | {"rows": divisor, "chosen_tokens_per_row": tokens / rows}


def _is_stream(accelerator: Any) -> bool:
    loader = accelerator.gradient_state.active_dataloader
    return loader is not None and isinstance(loader.dataset, IterableDataset)


def _totals(batches: Sequence[dict[str, torch.Tensor]], accelerator: Any) -> torch.Tensor:
    """Rows and scored tokens of chosen completions that count, over all processes, float32 of shape (2,)."""
    counts = torch.stack([torch.stack([batch["counts"].sum(), _chosen_tokens(batch)]) for batch in batches])
    return accelerator.gather(counts).sum(0).clamp(min=1).float()


def _chosen_tokens(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    positions = batch["completion_positions"][:, : batch["chosen_lengths"].size(1)]
    return ((positions >= 0) & batch["counts"][:, None, None]).sum()


def count_tokens(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Number of tokens in the rows of tokens of the prompts that count."""
    per_row, width = batch["attention_mask"].sum(1), batch["targets"].size(1)
    if width == 0:
        return per_row.sum()
    rows = batch["completion_positions"].masked_fill(~batch["counts"][:, None, None], -1) // width
    counts = torch.zeros(len(per_row) + 1, dtype=torch.bool, device=per_row.device)
    counts[rows.flatten()] = True  # the last place stands for what is not scored
    return per_row.masked_fill(~counts[:-1], 0).sum()


def mean_over_step(values: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The part of this batch, a scalar, in the mean of `values`, (B,), over the rows of the step."""
    return values.masked_fill(~batch["counts"], 0).sum() / batch["rows"].to(values)


def chosen_nll(token_logps: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """
    Mean of -log π_θ over the tokens of all chosen completions of the step, as far as they are in this batch.

    A scalar of which [`mean_over_step`], with the same value for each row, gives the part of this batch.

    Args:
        token_logps (`torch.Tensor`):
            Log-probabilities of the tokens of the completions, of shape (B, C, L), 0 where there is none.
        batch (`dict[str, torch.Tensor]`):
            The batch, with [`COUNT_KEYS`].
    """
    chosen = token_logps[:, : batch["chosen_lengths"].size(1)].sum((1, 2))
    rows = batch["counts"].sum().clamp(min=1)
    return -chosen.masked_fill(~batch["counts"], 0).sum() / (rows * batch["chosen_tokens_per_row"]).to(chosen)
