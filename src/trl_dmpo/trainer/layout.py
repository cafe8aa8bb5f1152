"""
How K+1 completions of one prompt become tensors, and which token may see which.

A batch comes in one of two layouts, and what scores it does not know which one ran: it reads the per-token outputs of
the model at `completion_positions`; everything else in the batch is for the model alone.

- *shared*: a row of tokens is a tree of [`Segment`]s, of one prompt or of several. What the completions have in common is
  computed once.
- *repeated*: one row of tokens per completion, ordinary causal attention.

N is the number of completions in the batch, B of prompts, C of places for candidates (the chosen and the rejected ones) of
a prompt, of which some may be empty, L of tokens of the longest completion, R and T of rows and columns of `input_ids`.
"""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch


IGNORE_INDEX = -100

# What is in a batch for the model, and differs between the layouts; `completion_positions` points into it
LAYOUT_KEYS = ("input_ids", "attention_mask", "position_ids", "subtree_end", "targets")


class Candidate(NamedTuple):
    """
    One completion and the prompt it is scored after, as token ids, truncated.

    Args:
        prompt (`Sequence[int]`):
            The prompt. May be empty: then nothing predicts the first token of the completion, and it is not scored.
        completion (`Sequence[int]`):
            The completion.
    """

    prompt: Sequence[int]
    completion: Sequence[int]


class Segment(NamedTuple):
    """
    A node of a tree of tokens.

    A position sees its own segment up to itself, and all segments on the path to the root. Every position predicts
    exactly one next token, so where a path forks, the token before the fork heads each branch instead of ending the
    trunk: for one prompt, `prompt[:-1]` is the trunk and `prompt[-1:] + completion[:-1]` the branches.

    Args:
        ids (`Sequence[int]`):
            Token ids of the segment.
        parent (`int`):
            Index of the parent in the list of segments, which must come before it; -1 for a root.
        targets (`Sequence[int]`, *optional*):
            For each of `ids`, the token that it predicts. `None` if nothing in this segment is scored.
        candidate (`int`, *optional*):
            Which candidate of the prompt `targets` belongs to.
        first_target (`int`, *optional*, defaults to `0`):
            Index of `targets[0]` in the completion of that candidate.
        prompt (`int`, *optional*, defaults to `0`):
            Which prompt of the tree `candidate` is one of.
    """

    ids: Sequence[int]
    parent: int
    targets: Sequence[int] | None = None
    candidate: int = -1
    first_target: int = 0
    prompt: int = 0


def star(candidates: Sequence[Candidate | None]) -> list[Segment]:
    """
    Segments of the candidates of one prompt, in depth-first order: a trunk, then a branch for each candidate that is not
    `None`.

    Candidates whose prompts differ (truncation from the left cuts more of the prompt in front of a longer completion)
    get a trunk for each prompt.

    Example:

    ```python
    >>> from trl_dmpo.trainer.layout import Candidate, star

    >>> for segment in star([Candidate([1, 2, 3], [4, 5]), Candidate([1, 2, 3], [6])]):
    ...     print(segment)
    Segment(ids=[1, 2], parent=-1, targets=None, candidate=-1, first_target=0, prompt=0)
    Segment(ids=[3, 4], parent=0, targets=[4, 5], candidate=0, first_target=0, prompt=0)
    Segment(ids=[3], parent=0, targets=[6], candidate=1, first_target=0, prompt=0)
    ```
    """
    segments: list[Segment] = []
    for prompt, given in _by_prompt(candidates):
        parent = -1
        if len(prompt) > 1:
            parent = len(segments)
            segments.append(Segment(prompt[:-1], -1))
        segments += _branches(prompt, given, parent)
    return segments


def radix_tree(prompts: Sequence[Sequence[Candidate | None]]) -> list[Segment]:
    """
    Segments of the candidates of several prompts, in depth-first order: the prompts share what they have in common from
    their start.

    Nothing is scored inside a prompt, so a trunk may fork there without a copy of a token.

    Args:
        prompts (`Sequence[Sequence[Candidate]]`):
            For each prompt, its candidates; `None` where a place is empty.

    Returns:
        `list[Segment]`, a tree for each way to start.

    Example:

    ```python
    >>> from trl_dmpo.trainer.layout import Candidate, radix_tree

    >>> for segment in radix_tree([[Candidate([1, 2, 9], [4, 5])], [Candidate([1, 2, 3, 9], [6])]]):
    ...     print(segment)
    Segment(ids=[1, 2], parent=-1, targets=None, candidate=-1, first_target=0, prompt=0)
    Segment(ids=[9, 4], parent=0, targets=[4, 5], candidate=0, first_target=0, prompt=0)
    Segment(ids=[3], parent=0, targets=None, candidate=-1, first_target=0, prompt=0)
    Segment(ids=[9], parent=2, targets=[6], candidate=0, first_target=0, prompt=1)
    ```
    """
    given = [(*each, number) for number, candidates in enumerate(prompts) for each in _by_prompt(candidates)]
    given.sort(key=lambda each: list(each[0][:-1]))
    segments: list[Segment] = []
    # Prompts whose trunks are alike up to a depth, where a segment ends; a stack, since a chain of prefixes is deep
    waiting = [(given, 0, -1)]
    while waiting:
        alike, depth, parent = waiting.pop()
        first, last = alike[0][0][:-1], alike[-1][0][:-1]
        end = common_prefix_length(first, last)  # of all, since they are sorted
        if end > depth:
            segments.append(Segment(first[depth:end], parent))
            parent = len(segments) - 1
        forks: dict[int, list] = {}
        for prompt, candidates, number in alike:
            if len(prompt) - 1 > end:
                forks.setdefault(prompt[end], []).append((prompt, candidates, number))
            else:
                segments += _branches(prompt, candidates, parent, number)
        waiting += [(fork, end, parent) for fork in reversed(forks.values())]
    return segments


def common_prefix_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Number of tokens that two sequences have in common from their start."""
    length = min(len(first), len(second))
    if first[:length] == second[:length]:
        return length
    # Slices are compared in C, tokens one by one are not
    return bisect_left(range(1, length), True, key=lambda end: first[:end] != second[:end])


def _by_prompt(candidates: Sequence[Candidate | None]) -> list[tuple[Sequence[int], list[tuple[int, Sequence[int]]]]]:
    """The prompts, mostly one, from the shortest on, each with the place and the completion of its candidates."""
    given = [(index, candidate) for index, candidate in enumerate(candidates) if candidate is not None]
    given.sort(key=lambda pair: len(pair[1].prompt))
    return [
        (prompt, [(index, candidate.completion) for index, candidate in group])
        for prompt, group in groupby(given, key=lambda pair: pair[1].prompt)
    ]


def _branches(
    prompt: Sequence[int], given: Sequence[tuple[int, Sequence[int]]], parent: int, number: int = 0
) -> list[Segment]:
    """A branch for each completion, which the last token of the prompt heads."""
    unscored = 0 if prompt else 1
    return [
        Segment([*prompt[-1:], *completion[:-1]], parent, completion[unscored:], index, unscored, number)
        for index, completion in given
    ]


def _padded(rows: Sequence[Sequence[int]], fill: int, multiple_of: int | None = None) -> np.ndarray:
    width = max((len(row) for row in rows), default=0)
    if multiple_of is not None:
        width = -(-width // multiple_of) * multiple_of
    out = np.full((len(rows), width), fill, dtype=np.int64)
    for index, row in enumerate(rows):
        out[index, : len(row)] = row
    return out


class _Span(NamedTuple):
    """Where the scored tokens of a completion are predicted: `length` positions of a row of `targets`, from `start`."""

    prompt: int
    candidate: int
    first_target: int
    row: int
    start: int
    length: int


def _completions(
    rows: Sequence[Sequence[Candidate | None]], spans: Sequence[_Span], width: int
) -> dict[str, torch.Tensor]:
    """The part of a batch that losses and metrics read, whatever the layout."""
    lengths = _padded([[len(candidate.completion) if candidate else 0 for candidate in row] for row in rows], 0)
    positions = np.full((*lengths.shape, int(lengths.max(initial=0))), -1, dtype=np.int64)
    for prompt, candidate, first, row, start, length in spans:
        positions[prompt, candidate, first : first + length] = np.arange(length) + row * width + start
    return {"completion_lengths": torch.from_numpy(lengths), "completion_positions": torch.from_numpy(positions)}


def shared_layout(
    rows: Sequence[Sequence[Candidate | None]],
    pad_token_id: int,
    pad_to_multiple_of: int | None = None,
    trees: Sequence[Sequence[int]] | None = None,
) -> dict[str, torch.Tensor]:
    """
    Lay out the candidates of each prompt, or of several prompts, as one row of tokens, a tree of segments.

    Args:
        rows (`Sequence[Sequence[Candidate]]`):
            For each prompt, its candidates, the chosen one first; `None` where a place is empty.
        pad_token_id (`int`):
            Token id of the padding. It is never seen and never scored, so it may be any token.
        pad_to_multiple_of (`int`, *optional*):
            If set, the rows are padded to a multiple of this length.
        trees (`Sequence[Sequence[int]]`, *optional*):
            For each row of tokens, the places in `rows` of the prompts that share it, every prompt in one of them. By
            default, each prompt has a row of its own.

    Returns:
        `dict[str, torch.Tensor]` of int64 tensors:
        - `completion_lengths` (B, C): tokens of each completion; 0 where there is none.
        - `completion_positions` (B, C, L): where each token of a completion is predicted, an index into the flattened
          `targets`; -1 where there is none.
        - `input_ids`, `attention_mask` (1 for a token, 0 for padding), `position_ids` (R, T), with R the number of trees.
        - `targets` (R, T): the token that each position predicts, -100 where nothing is scored.
        - `subtree_end` (R, T): a position sees an earlier one j if it lies before `subtree_end[j]`.
    """
    if trees is None:
        trees = [[prompt] for prompt in range(len(rows))]
    input_ids, position_ids, targets, subtree_end, spans = [], [], [], [], []
    for row, prompts in enumerate(trees):
        segments = star(rows[prompts[0]]) if len(prompts) == 1 else radix_tree([rows[prompt] for prompt in prompts])
        starts, depths, ends = _flatten(segments)
        input_ids.append([token for segment in segments for token in segment.ids])
        position_ids.append(
            [
                position
                for segment, depth in zip(segments, depths, strict=True)
                for position in range(depth, depth + len(segment.ids))
            ]
        )
        subtree_end.append([end for segment, end in zip(segments, ends, strict=True) for _ in segment.ids])
        targets.append(
            [target for segment in segments for target in segment.targets or [IGNORE_INDEX] * len(segment.ids)]
        )
        spans += [
            _Span(prompts[segment.prompt], segment.candidate, segment.first_target, row, start, len(segment.ids))
            for segment, start in zip(segments, starts, strict=True)
            if segment.targets is not None
        ]

    ids = _padded(input_ids, pad_token_id, pad_to_multiple_of)
    width = ids.shape[1]
    # A padding position is a tree of its own: it sees itself alone, so that no softmax runs over nothing
    ends_padded = np.tile(np.arange(1, width + 1), (len(trees), 1))
    for row, end in enumerate(subtree_end):
        ends_padded[row, : len(end)] = end
    return {
        **_completions(rows, spans, width),
        "input_ids": torch.from_numpy(ids),
        "attention_mask": torch.from_numpy(_padded([[1] * len(row) for row in input_ids], 0, pad_to_multiple_of)),
        "position_ids": torch.from_numpy(_padded(position_ids, 0, pad_to_multiple_of)),
        "targets": torch.from_numpy(_padded(targets, IGNORE_INDEX, pad_to_multiple_of)),
        "subtree_end": torch.from_numpy(ends_padded),
    }


def _flatten(segments: Sequence[Segment]) -> tuple[list[int], list[int], list[int]]:
    """Of each segment: index of its first token, position id of its first token, index past its subtree."""
    starts: list[int] = []
    depths: list[int] = []
    ends: list[int] = []
    cursor = 0
    for segment in segments:
        parent = segment.parent
        starts.append(cursor)
        depths.append(0 if parent < 0 else depths[parent] + len(segments[parent].ids))
        cursor += len(segment.ids)
        ends.append(cursor)
    for index in reversed(range(len(segments))):
        parent = segments[index].parent
        if parent >= 0:
            ends[parent] = max(ends[parent], ends[index])
    return starts, depths, ends


def repeated_layout(
    rows: Sequence[Sequence[Candidate | None]], pad_token_id: int, pad_to_multiple_of: int | None = None
) -> dict[str, torch.Tensor]:
    """
    Lay out every completion as one row of tokens after its prompt, those in the first places first, as TRL does for pairs.

    Takes and returns what [`shared_layout`] does, but for: R = N, `targets` (R, T - 1), and neither `position_ids` nor
    `subtree_end`, since attention is causal.
    """
    given = [
        (row, index, candidate)
        for row, candidates in enumerate(rows)
        for index, candidate in enumerate(candidates)
        if candidate is not None
    ]
    given.sort(key=lambda each: each[1] > 0)
    ids = [[*prompt, *completion] for _, _, (prompt, completion) in given]
    padded = _padded(ids, pad_token_id, pad_to_multiple_of)
    targets = np.full((len(ids), max(padded.shape[1] - 1, 0)), IGNORE_INDEX, dtype=np.int64)
    spans = []
    for sequence, (row, index, (prompt, completion)) in enumerate(given):
        start = max(len(prompt) - 1, 0)
        unscored = 0 if prompt else 1
        length = len(completion) - unscored
        targets[sequence, start : start + length] = completion[unscored:]
        spans.append(_Span(row, index, unscored, sequence, start, length))
    return {
        **_completions(rows, spans, targets.shape[1]),
        "input_ids": torch.from_numpy(padded),
        "attention_mask": torch.from_numpy(_padded([[1] * len(row) for row in ids], 0, pad_to_multiple_of)),
        "targets": torch.from_numpy(targets),
    }


def is_shared(batch: dict[str, Any]) -> bool:
    """Whether `batch` is in the shared layout."""
    return "subtree_end" in batch


def unpack(batch: dict[str, Any], selection: Sequence[Sequence[int]] | None = None) -> list[list[Candidate | None]]:
    """
    The candidates that a shared batch was laid out from.

    Args:
        batch (`dict[str, Any]`):
            What [`shared_layout`] returned.
        selection (`Sequence[Sequence[int]]`, *optional*):
            For each prompt, which of its candidates; prompts past the end of the list are left out. All by default.

    Returns:
        `list[list[Candidate]]`: per prompt, its candidates, `None` where a place is empty.
    """
    names = ("completion_lengths", "completion_positions", "input_ids", "targets", "subtree_end")
    lengths, positions, input_ids, targets, ends = (batch[name].cpu().numpy() for name in names)
    width = input_ids.shape[1]
    if selection is None:
        selection = [range(np.flatnonzero(row)[-1] + 1) for row in lengths]

    def candidate(prompt: int, index: int) -> Candidate | None:
        length = int(lengths[prompt, index])
        if length == 0:
            return None
        where = positions[prompt, index, :length]
        if where[-1] < 0:  # a single token after an empty prompt: it has no place in the tree, any token stands for it
            return Candidate([], [0])
        row, last = divmod(where[-1], width)
        path = np.flatnonzero((np.arange(width) <= last) & (last < ends[row]))
        sequence = [*input_ids[row, path].tolist(), int(targets[row, last])]
        return Candidate(sequence[:-length], sequence[-length:])

    return [[candidate(prompt, index) for index in wanted] for prompt, wanted in enumerate(selection)]


def gather_completions(per_token: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """
    Per-token outputs of the model, sorted by completion.

    Args:
        per_token (`torch.Tensor`):
            Tensor of shape (R, at least S), where S is the number of columns of `targets`. Columns in front of the last
            S, those of a prompt-learning adapter's virtual tokens, are ignored.
        batch (`dict[str, torch.Tensor]`):
            The batch that the model was given.

    Returns:
        `torch.Tensor` of shape (B, C, L) and the dtype of `per_token`, 0 where there is no token.
    """
    positions = batch["completion_positions"]
    width = batch["targets"].size(1)
    if width == 0:
        return per_token.new_zeros(positions.shape)
    flat = per_token[:, per_token.size(1) - width :].reshape(-1)
    return flat[positions.clamp(min=0)].masked_fill(positions < 0, 0)
