"""
Rows of one user share one history: which rows go into a batch, and which of these into one row of tokens.

The prompts of a user start alike, with a history that grows. What they have in common is a trunk; the rest of a history, a
question, an answer are branches.
"""

from collections.abc import Hashable, Iterable, Iterator, Sequence
from heapq import heapreplace
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from datasets import Dataset, IterableDataset, Value
from torch.utils.data import Sampler

from .layout import Candidate, common_prefix_length


# Length of a row at which attention costs about as much as everything else: six times the hidden size of a small model
_ATTENTION = 4096


def check_trunk_column(dataset: Dataset | IterableDataset, column: str) -> None:
    """
    Check that a training dataset says whose its rows are.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            The training dataset.
        column (`str`):
            The option `trunk_column`.

    Raises:
        `ValueError`: the dataset is a stream, or the column is missing, not of plain values, or has none in a row.
    """
    if isinstance(dataset, IterableDataset):
        raise ValueError(
            f"`trunk_column={column!r}` puts the rows of a user into the same batches, and a streaming dataset comes in an order "
            "of its own. Load it without streaming, or leave `trunk_column` out."
        )
    if column not in dataset.column_names:
        raise ValueError(
            f"The train dataset has no column {column!r}, which `trunk_column` names. It has: "
            f"{', '.join(dataset.column_names)}. Name the one that says whose a row is, or leave `trunk_column` out."
        )
    if not isinstance(dataset.features[column], Value):
        raise ValueError(
            f"train, column {column!r}: `trunk_column` must name a column of numbers or text, such as users' ids, not of "
            f"{dataset.features[column]}."
        )
    users = dataset.select_columns(column)[column][:]
    if None in users:
        raise ValueError(
            f"train[{users.index(None)}], column {column!r}: the row does not say whose it is, as `trunk_column` needs. "
            "Give it a value, or leave out the row or `trunk_column`."
        )


class TrunkSampler(Sampler[int]):
    """
    Samples rows such that those of one user fall into the same batches, users in random order. Every row comes once an epoch.

    The rows of a user are cut into chunks of a batch, in the order of the dataset: neighbours have most in common. Smaller
    chunks are put together to batches; one is split where nothing fits.

    What it samples is to be cut into batches of `batch_size`, as [`~torch.utils.data.DataLoader`] does, which accelerate deals
    out to processes.

    Args:
        users (`Iterable[Hashable]`):
            Of each row, whose it is.
        batch_size (`int`):
            Rows of a batch on one process.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the order, together with the epoch.

    Example:

    ```python
    >>> from trl_dmpo.trainer.trunks import TrunkSampler

    >>> sampler = TrunkSampler(["ann", "bob", "ann", "cleo", "bob", "ann"], batch_size=3)
    >>> list(sampler)
    [1, 4, 3, 0, 2, 5]
    ```
    """

    def __init__(self, users: Iterable[Hashable], batch_size: int, seed: int = 0):
        rows: dict[Hashable, list[int]] = {}
        for row, user in enumerate(users):
            rows.setdefault(user, []).append(row)
        self._rows = list(rows.values())
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Have the next pass be that of `epoch`, counted from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(map(len, self._rows))

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng([self.seed, self.epoch])
        batches: list[list[int]] = []
        smaller: list[list[int]] = []
        for user in generator.permutation(len(self._rows)).tolist():
            rows = self._rows[user]
            # What is left over comes first or last, by chance, so that chunks are not the same in all epochs
            first = len(rows) % self.batch_size if generator.random() < 0.5 else 0
            cuts = [0, *range(first or self.batch_size, len(rows), self.batch_size), len(rows)]
            for start, stop in pairwise(cuts):
                (batches if stop - start == self.batch_size else smaller).append(rows[start:stop])
        packed = _fill(smaller, self.batch_size)
        last = packed.pop() if packed and len(packed[-1]) < self.batch_size else []
        batches += packed
        for batch in generator.permutation(len(batches)).tolist():
            yield from batches[batch]
        yield from last  # it alone is short


def _fill(chunks: list[list[int]], size: int) -> list[list[int]]:
    """Chunks of fewer than `size` rows as lists of `size`, the last of which may be short; few chunks are split."""
    by_size: list[list[list[int]]] = [[] for _ in range(size)]
    for chunk in chunks:
        by_size[len(chunk)].append(chunk)
    filled, largest, remaining = [], size - 1, len(chunks)
    while remaining:
        while not by_size[largest]:
            largest -= 1
        batch, fitting = by_size[largest].pop(), largest
        remaining -= 1
        while remaining and len(batch) < size:
            gap = size - len(batch)
            fitting = min(fitting, gap)
            while fitting and not by_size[fitting]:
                fitting -= 1
            if fitting:
                batch = batch + by_size[fitting].pop()
                remaining -= 1
                continue
            split = next(length for length in range(gap + 1, size) if by_size[length])
            chunk = by_size[split].pop()
            batch = batch + chunk[:gap]
            by_size[split - gap].append(chunk[gap:])
        filled.append(batch)
    return filled


def share_trunks(
    rows: Sequence[Sequence[Candidate | None]], users: Sequence[Hashable], max_tokens: int | None = None
) -> list[list[int]]:
    """
    Which prompts of a batch share a row of tokens.

    Those of one user do if most of the shorter one is also how the longer one starts, as histories do that are prefixes of
    one another: what prompts of which less is alike save does not pay for the attention over a longer row. Rows that would be
    mostly padding are then put one after the other, where that costs less.

    Args:
        rows (`Sequence[Sequence[Candidate]]`):
            For each prompt, its candidates; `None` where a place is empty.
        users (`Sequence[Hashable]`):
            For each prompt, whose it is.
        max_tokens (`int`, *optional*):
            Length that a row of several prompts may have. If `None`, any.

    Returns:
        `list[list[int]]`: for each row of tokens, the places of its prompts, as [`shared_layout`] takes them.
    """
    by_user: dict[Hashable, list[tuple[int, list[int], int]]] = {}
    trees: list[_Tree] = []
    for place, (user, candidates) in enumerate(zip(users, rows, strict=True)):
        given = [candidate for candidate in candidates if candidate is not None]
        prompt, unscored = given[0].prompt, 0 if given[0].prompt else 1
        branches = sum(len(candidate.completion) - unscored for candidate in given)
        if all(candidate.prompt == prompt for candidate in given):
            by_user.setdefault(user, []).append((place, list(prompt[:-1]), branches))
        else:  # cut off from the left, each completion has a trunk of its own
            trunks = {len(candidate.prompt): max(len(candidate.prompt) - 1, 0) for candidate in given}
            trees.append(_Tree([place], sum(trunks.values()) + branches))
    for prompts in by_user.values():
        trees += _trees_of_user(prompts, max_tokens)
    return _pack(trees, max_tokens)


class _Tree(NamedTuple):
    """Prompts that share a trunk, and the number of tokens that they take."""

    prompts: list[int]
    length: int


def _trees_of_user(prompts: list[tuple[int, list[int], int]], max_tokens: int | None) -> list[_Tree]:
    """From the place, the trunk and the number of tokens behind it of each prompt of a user to trees."""
    trees: list[_Tree] = []
    previous: Sequence[int] = []
    # Sorted, a prompt has most in common with those beside it
    for place, trunk, branches in sorted(prompts, key=lambda prompt: prompt[1]):
        common = common_prefix_length(previous, trunk)
        if 2 * common > min(len(previous), len(trunk)):
            longer = trees[-1].length + len(trunk) - common + branches
            if max_tokens is None or longer <= max_tokens:
                trees[-1] = _Tree([*trees[-1].prompts, place], longer)
                previous = trunk
                continue
        trees.append(_Tree([place], len(trunk) + branches))
        previous = trunk
    return trees


def _pack(trees: list[_Tree], max_tokens: int | None) -> list[list[int]]:
    """The prompts of trees, in as many rows as make the batch cheapest."""
    trees = sorted(trees, key=lambda tree: -tree.length)
    best, lowest = [tree.prompts for tree in trees], float("inf")
    for count in sorted({-(-len(trees) // share) for share in range(1, len(trees) + 1)}, reverse=True):
        rows: list[tuple[int, int, list[int]]] = [(0, row, []) for row in range(count)]
        for tree in trees:  # each into the row that is shortest so far
            length, row, prompts = rows[0]
            heapreplace(rows, (length + tree.length, row, prompts + tree.prompts))
        if max_tokens is not None and any(length > max_tokens and len(prompts) > 1 for length, _, prompts in rows):
            break
        longest = max(length for length, _, _ in rows)
        cost = count * longest * (longest + _ATTENTION)
        if cost < lowest:
            best, lowest = [prompts for _, _, prompts in rows if prompts], cost
    return sorted(map(sorted, best))
