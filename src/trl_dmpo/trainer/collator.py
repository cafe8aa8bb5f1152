"""From tokenized rows to a batch in one of the two layouts."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers.data.data_collator import DataCollatorMixin

from .layout import Candidate, repeated_layout, shared_layout
from .trunks import share_trunks


@dataclass
class DataCollatorForMultiPreference(DataCollatorMixin):
    """
    Data collator for prompts with one or several chosen and several rejected completions.

    This collator expects each example to be a dictionary with the keys `"prompt_ids"`, `"chosen_ids"`, the ids of the
    chosen completion or a list of P lists of ids, and `"rejected_ids"`, a list of K lists of ids, where P and K may differ
    from example to example. With B examples, C = the largest P + the largest K, L tokens in the longest completion and T in
    the longest row, it returns int64 tensors:
    - `"completion_lengths"` (B, C): tokens of each completion, the chosen ones first; 0 where there is none.
    - `"chosen_lengths"` (B, P): those of the chosen ones.
    - `"completion_positions"` (B, C, L): where each of these tokens is predicted, an index into the flattened
        `"targets"`; -1 where there is none.
    - `"input_ids"`, `"attention_mask"`: of shape (B, T) if prefixes are shared, or with fewer rows if several prompts share
        one; else one row for each completion, the first chosen one of each prompt first.
    - `"targets"`: the token that each position predicts, -100 where it does not count; of the shape of `"input_ids"` if
        prefixes are shared, else without its last column.
    - `"position_ids"`, `"subtree_end"`, of the shape of `"input_ids"`, only if prefixes are shared: the place of a token on
        its path, and the first place in the row from which it is no longer seen.
    - `"row_index"` (B,): the row's place in the dataset, if the examples have it.

    Optionally, the examples can contain `"ref_chosen_logps"` and `"ref_rejected_logps"`, in which case the returned
    dictionary contains them as tensors of shapes (B,), or (B, P) where chosen completions are lists, or (B, K) under
    `ld_alpha`, and (B, K). They can contain `"relevance"`, a number for each of the chosen and then of the rejected
    completions, or `None`, which stands for 1 and 0; the returned one is a float32 tensor of shape (B, C).

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
        trunk_column (`str`, *optional*):
            Key of the examples, such as `"user_id"`, of which equal values mark those whose prompts may share a row. They do
            if one prompt is, for the most part, how the other starts. If `None`, each prompt has a row of its own.
        max_trunk_length (`int`, *optional*):
            Maximum length of a row that several prompts share. If `None`, any.

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
    >>> examples += [{"prompt_ids": [1, 2, 4, 5, 3], "chosen_ids": [6], "rejected_ids": [[7]]}]
    >>> examples = [{**example, "user_id": "ann"} for example in examples]
    >>> DataCollatorForMultiPreference(pad_token_id=0, trunk_column="user_id")(examples)["input_ids"]
    tensor([[1, 2, 3, 4, 3, 3, 7, 4, 5, 3, 3]])
    ```
    """

    pad_token_id: int
    max_length: int | None = None
    truncation_mode: str = "keep_start"
    pad_to_multiple_of: int | None = None
    prefix_sharing: bool = True
    num_negatives: int | None = None
    seed: int = 0
    trunk_column: str | None = None
    max_trunk_length: int | None = None
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
        chosen = [ids if is_nested(ids) else [ids] for ids in (example["chosen_ids"] for example in examples)]
        most = max(map(len, chosen))
        parts = list(zip(examples, chosen, drawn, strict=True))
        rows = [self._candidates(*part, most) for part in parts]
        batch = self.lay_out(rows, self._trees(examples, rows))
        batch["chosen_lengths"] = batch["completion_lengths"][:, :most]
        if any(example.get("relevance") is not None for example in examples):
            batch["relevance"] = _stack([_relevance(*part, most) for part in parts])
        if "row_index" in examples[0]:
            batch["row_index"] = torch.tensor([example["row_index"] for example in examples])
        for name in ("ref_chosen_logps", "ref_rejected_logps"):
            if name in examples[0]:
                by_chosen = name == "ref_chosen_logps" and is_nested(examples[0]["chosen_ids"])
                kept = [range(most)] * len(examples) if by_chosen else drawn
                batch[name] = _stack(
                    [_take(example[name], each) for example, each in zip(examples, kept, strict=True)]
                )
        return batch

    def lay_out(self, rows: list[list[Candidate | None]], trees: list[list[int]] | None = None) -> dict[str, Any]:
        """Tensors of the candidates of each prompt, in the layout that `prefix_sharing` says; `trees` as it takes them."""
        if self.prefix_sharing:
            return shared_layout(rows, self.pad_token_id, self.pad_to_multiple_of, trees)
        return repeated_layout(rows, self.pad_token_id, self.pad_to_multiple_of)

    def _trees(self, examples: list[dict[str, Any]], rows: list[list[Candidate | None]]) -> list[list[int]] | None:
        if self.trunk_column is None or not self.prefix_sharing:
            return None
        # Not all have it where only the training rows do
        users = [example.get(self.trunk_column, (place,)) for place, example in enumerate(examples)]
        return share_trunks(rows, users, self.max_trunk_length)

    def candidates(self, example: dict[str, Any]) -> list[Candidate | None]:
        """The completions of an example that a batch of it alone has, each with its prompt, truncated."""
        chosen = example["chosen_ids"] if is_nested(example["chosen_ids"]) else [example["chosen_ids"]]
        return self._candidates(example, chosen, self._draw(example), len(chosen))

    def _draw(self, example: dict[str, Any]) -> list[int]:
        """Indices of the rejected completions to use, in order."""
        count = len(example["rejected_ids"])
        if self.num_negatives is None or count <= self.num_negatives:
            return list(range(count))
        generator = np.random.default_rng([self.seed, max(int(self.epoch), 0), example["row_index"]])
        return sorted(generator.choice(count, self.num_negatives, replace=False).tolist())

    def _candidates(
        self, example: dict[str, Any], chosen: list[list[int]], drawn: list[int], most: int
    ) -> list[Candidate | None]:
        """The chosen completions in the first `most` places, then the rejected ones that are drawn."""
        prompt, rejected = example["prompt_ids"], [example["rejected_ids"][index] for index in drawn]
        empty = [None] * (most - len(chosen))
        truncate = partial(self._truncate, prompt)
        return [*map(truncate, chosen), *empty, *map(truncate, rejected)]

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


def is_nested(chosen_ids: list) -> bool:
    """Whether these are the ids of a list of chosen completions, and not of one."""
    return isinstance(chosen_ids[0], list)


def _relevance(example: dict[str, Any], chosen: list[list[int]], drawn: list[int], most: int) -> torch.Tensor:
    """Relevance of the chosen completions in the first `most` places, then of the rejected ones that are drawn."""
    count = len(chosen)
    relevance = example.get("relevance") or [1.0] * count + [0.0] * len(example["rejected_ids"])
    spread = [*relevance[:count], *[0.0] * (most - count), *(relevance[count + index] for index in drawn)]
    return torch.tensor(spread, dtype=torch.float32)


def _take(values: float | list[float], kept: Sequence[int]) -> torch.Tensor:
    """Of the values of all completions of a row, those of the ones kept; a single value as it is."""
    return torch.tensor([values[index] for index in kept] if isinstance(values, list) else values)


def _stack(rows: list[torch.Tensor]) -> torch.Tensor:
    """Values (B,), or rows of unequal length as (B, K), padded with zeros."""
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True) if rows[0].dim() else torch.stack(rows)
