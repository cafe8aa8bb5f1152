"""How long rows are as the model gets them, and batches of rows of about equal length, which leave little padding."""

from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers.trainer_pt_utils import LengthGroupedSampler

from .collator import DataCollatorForMultiPreference
from .layout import Candidate, star


def needs_lengths(args: Any) -> bool:
    """Whether a sampler of transformers asks for the lengths of rows; transformers 5.0 has an option of its own for it."""
    return getattr(args, "group_by_length", False) or getattr(args, "train_sampling_strategy", None) in (
        "group_by_length",
        "batch_rebalance",
    )


def row_lengths(dataset: Dataset, collator: DataCollatorForMultiPreference) -> list[int]:
    """
    How wide a batch of each row alone would be.

    With shared prompts that is what the row costs: the prompt without its last token and all of its completions. With
    repeated ones it is the prompt and the longest completion. Both after truncation, and of drawn completions those of the
    first epoch.

    Args:
        dataset ([`~datasets.Dataset`]):
            Tokenized rows.
        collator ([`DataCollatorForMultiPreference`]):
            What makes batches of them.

    Returns:
        `list[int]`: the length of each row.
    """
    names = [
        name for name in ("row_index", "prompt_ids", "chosen_ids", "rejected_ids") if name in dataset.column_names
    ]
    return [_width(collator.candidates(row), collator.prefix_sharing) for row in dataset.select_columns(names)]


def _width(candidates: list[Candidate | None], prefix_sharing: bool) -> int:
    if prefix_sharing:
        return sum(len(segment.ids) for segment in star(candidates))
    return max(len(prompt) + len(completion) for prompt, completion in filter(None, candidates))


class LengthSampler(LengthGroupedSampler):
    """
    Transformers' sampler of rows of about equal length, in an order that seed and epoch determine.

    Theirs goes on from where the random state of the process is, which is another one in a resumed run, and may be another
    one in each of several processes, so that they would not deal out the same order.

    Args:
        batch_size (`int`):
            Rows of an optimizer step on one process.
        lengths (`list[int]`):
            Length of each row.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the order, together with the epoch.

    Example:

    ```python
    >>> from trl_dmpo.trainer.lengths import LengthSampler

    >>> sampler = LengthSampler(2, [9, 1, 8, 2, 1, 9, 2, 8] * 4)
    >>> order = list(sampler)
    >>> order == list(sampler), sorted(order) == list(range(32))
    (True, True)
    ```
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int = 0):
        super().__init__(batch_size, lengths=lengths)
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Have the next iteration be that of this epoch."""
        self.epoch = epoch

    def __iter__(self):
        (state,) = np.random.SeedSequence([self.seed, self.epoch]).generate_state(1)
        self.generator = torch.Generator().manual_seed(int(state))
        return super().__iter__()
