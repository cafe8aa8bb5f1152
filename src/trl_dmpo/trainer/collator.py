"""From tokenized rows to a batch in one of the two layouts."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers.data.data_collator import DataCollatorMixin

from .layout import Candidate, repeated_layout, shared_layout


@dataclass
class DataCollatorForMultiPreference(DataCollatorMixin):
    """
    Data collator for prompts with one chosen and several rejected completions.

    This collator expects each example to be a dictionary with the keys `"prompt_ids"`, `"chosen_ids"` and
    `"rejected_ids"`, a list of K lists of ids, where K may differ from example to example. With B examples, C = 1 + the
    largest K, L tokens in the longest completion and T in the longest row, it returns int64 tensors:
    - `"completion_lengths"` (B, C): tokens of each completion, the chosen one first; 0 where there is none.
    - `"completion_positions"` (B, C, L): where each of these tokens is predicted, an index into the flattened
        `"targets"`; -1 where there is none.
    - `"input_ids"`, `"attention_mask"`: of shape (B, T) if prefixes are shared, else one row for each completion, all
        chosen ones first.
    - `"targets"`: the token that each position predicts, -100 where it does not count; of the shape of `"input_ids"` if
        prefixes are shared, else without its last column.
    - `"position_ids"`, `"subtree_end"` (B, T), only if prefixes are shared: the place of a token on its path, and the
        first place in the row from which it is no longer seen.
    - `"row_index"` (B,): the row's place in the dataset, if the examples have it.

    Optionally, the examples can contain `"ref_chosen_logps"` and `"ref_rejected_logps"`, in which case the returned
    dictionary contains them as tensors of shapes (B,), or (B, K) under `ld_alpha`, and (B, K).

    Args:
        pad_token_id (`int`):
            Token ID to use for padding.
        max_length (`int`, *optional*):
            Maximum length of prompt and completion. What is longer is truncated, each completion on its own.
        truncation_mode (`str`, *optional*, defaults to `"keep_start"`):
            Truncation mode to use when a sequence exceeds `max_length`. Possible values are `"keep_end"` and
            `"keep_start"`.
        pad_to_multiple_of (`int`, *optional*):
            If set, the rows will be padded to a multiple of this value.
        prefix_sharing (`bool`, *optional*, defaults to `True`):
            Whether to lay out the completions of a prompt in one row, in which the prompt appears once.
        num_negatives (`int`, *optional*):
            Number of rejected completions to draw from those of an example, which must have `"row_index"`. If `None`, all
            are used.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draw, together with the epoch and the example's `"row_index"`.

    Examples:
    ```python
    >>> from trl_dmpo import DataCollatorForMultiPreference

    >>> examples = [{"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [[6], [7, 8]]}]
    >>> batch = DataCollatorForMultiPreference(pad_token_id=0)(examples)
    >>> batch["input_ids"]  # the prompt without its last token, which heads each of the three branches
    tensor([[1, 2, 3, 4, 3, 3, 7]])
    >>> batch["position_ids"]
    tensor([[0, 1, 2, 3, 2, 2, 3]])
    >>> batch["targets"]
    tensor([[-100, -100,    4,    5,    6,    7,    8]])
    >>> batch["completion_positions"]
    tensor([[[ 2,  3],
             [ 4, -1],
             [ 5,  6]]])
    >>> DataCollatorForMultiPreference(pad_token_id=0, prefix_sharing=False)(examples)["input_ids"]
    tensor([[1, 2, 3, 4, 5],
            [1, 2, 3, 6, 0],
            [1, 2, 3, 7, 8]])
    ```
    """

    pad_token_id: int
    max_length: int | None = None
    truncation_mode: str = "keep_start"
    pad_to_multiple_of: int | None = None
    prefix_sharing: bool = True
    num_negatives: int | None = None
    seed: int = 0
    return_tensors: str = "pt"
    # In shared memory, so that persistent workers of a data loader see it change
    epoch: torch.Tensor = field(
        default_factory=lambda: torch.zeros((), dtype=torch.int64).share_memory_(), repr=False, compare=False
    )

    def __post_init__(self):
        if self.truncation_mode not in ("keep_start", "keep_end"):
            raise ValueError(
                f"Unsupported truncation mode: {self.truncation_mode}, expected 'keep_start' or 'keep_end'"
            )

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        drawn = [self._draw(example) for example in examples]
        batch = self.lay_out(
            [self._candidates(example, indices) for example, indices in zip(examples, drawn, strict=True)]
        )
        if "row_index" in examples[0]:
            batch["row_index"] = torch.tensor([example["row_index"] for example in examples])
        for name in ("ref_chosen_logps", "ref_rejected_logps"):
            if name in examples[0]:
                batch[name] = _stack(
                    [_take(example[name], kept) for example, kept in zip(examples, drawn, strict=True)]
                )
        return batch

    def lay_out(self, rows: list[list[Candidate]]) -> dict[str, Any]:
        """Tensors of the candidates of each prompt, in the layout that `prefix_sharing` says."""
        layout = shared_layout if self.prefix_sharing else repeated_layout
        return layout(rows, self.pad_token_id, self.pad_to_multiple_of)

    def _draw(self, example: dict[str, Any]) -> list[int]:
        """Indices of the rejected completions to use, in order."""
        count = len(example["rejected_ids"])
        if self.num_negatives is None or count <= self.num_negatives:
            return list(range(count))
        generator = np.random.default_rng([self.seed, max(int(self.epoch), 0), example["row_index"]])
        return sorted(generator.choice(count, self.num_negatives, replace=False).tolist())

    def _candidates(self, example: dict[str, Any], drawn: list[int]) -> list[Candidate]:
        prompt, rejected = example["prompt_ids"], example["rejected_ids"]
        return [self._truncate(prompt, ids) for ids in (example["chosen_ids"], *(rejected[index] for index in drawn))]

    def _truncate(self, prompt: list[int], completion: list[int]) -> Candidate:
        excess = 0 if self.max_length is None else max(len(prompt) + len(completion) - self.max_length, 0)
        if excess == 0:
            return Candidate(prompt, completion)
        if self.truncation_mode == "keep_end":
            return Candidate(prompt[excess:], completion[max(excess - len(prompt), 0) :])
        if excess >= len(completion):
            raise ValueError(
                f"A prompt of {len(prompt)} tokens leaves nothing of a completion of {len(completion)} within "
                f"`max_length={self.max_length}`. Raise `max_length`, shorten the prompt, or drop the row."
            )
        return Candidate(prompt, completion[:-excess])


def _take(values: float | list[float], kept: list[int]) -> torch.Tensor:
    """Of the values of all rejected completions of a row, those of the ones kept; a single value as it is."""
    return torch.tensor([values[index] for index in kept] if isinstance(values, list) else values)


def _stack(rows: list[torch.Tensor]) -> torch.Tensor:
    """Values (B,), or rows of unequal length as (B, K), padded with zeros."""
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True) if rows[0].dim() else torch.stack(rows)
