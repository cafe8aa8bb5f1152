"""
Drawing items for rows: without replacement, from weights that rows share or from a list of each row's own.

What is drawn is never an item that the user liked, in any split, nor one of the same title, and never the same title twice
in a row. It depends on the seed, the user, the item to be predicted and nothing else: not on other rows, their order or the
number of threads. Where too few items are eligible a row gets fewer.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np

from .events import Events, Ragged, is_among
from .seeding import make_keys, uniforms


# How often what was drawn and is not eligible is drawn anew, before all eligible items of a row are looked at
_ROUNDS = 8
# How many more than it lacks a row draws in a round
_SPARE = 2
# Rows drawn for at a time
_CHUNK = 1 << 12
# Random numbers of a row that a round may use
_STRIDE = 1 << 24


@dataclass(frozen=True)
class Targets:
    """
    The rows that need negatives.

    Args:
        events ([`~trl_dmpo.data.events.Events`]):
            All events.
        event (`np.ndarray` of shape `(R,)`):
            The event that is to be predicted, of each row.
        in_training (`np.ndarray` of shape `(R,)`):
            Whether the row is one of training.
        trained (`np.ndarray` of shape `(N,)`):
            Whether an event is known in training: what popularity is counted over.
        seed (`int`):
            Seed.
        stream (`int`, *optional*, defaults to `0`):
            Tells draws for the same rows apart.
        forbidden (`np.ndarray`, *optional*):
            Pairs of user and title that are never drawn, ascending. Defaults to those that were liked.
    """

    events: Events
    event: np.ndarray
    in_training: np.ndarray
    trained: np.ndarray
    seed: int
    stream: int = 0
    forbidden: np.ndarray | None = None

    @cached_property
    def user(self) -> np.ndarray:
        """User of each row, of shape `(R,)`."""
        return self.events.user[self.event]

    @cached_property
    def item(self) -> np.ndarray:
        """Item to be predicted of each row, of shape `(R,)`."""
        return self.events.item[self.event]

    @cached_property
    def keys(self) -> np.ndarray:
        """Random key of each row, of shape `(R,)`."""
        return make_keys(self.seed, self.stream, self.user, self.item)

    @cached_property
    def popularity(self) -> np.ndarray:
        """How often each item was liked in training, of shape `(I,)`."""
        known = self.trained & self.events.liked
        return np.bincount(self.events.item[known], minlength=self.events.items.height)

    def may_draw(self, rows: np.ndarray, items: np.ndarray) -> np.ndarray:
        """Whether the items are eligible for the rows; both of shapes that broadcast."""
        forbidden = self.events.liked_pairs if self.forbidden is None else self.forbidden
        user = self.user[rows]
        if user.size:  # only what these users did: a short list is searched faster
            ends = np.array([user.min(), user.max() + 1]) * np.int64(self.events.items.height)
            forbidden = forbidden[slice(*np.searchsorted(forbidden, ends))]
        pairs = self.events.pairs(user, items)
        target = self.events.same_title[self.item[rows]] == self.events.same_title[items]
        return ~target & ~is_among(pairs, forbidden)


def _free_slots(taken: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """`taken` widened by as many columns as are needed, filled with -1."""
    width = int(wanted.max(initial=0))
    return np.concatenate([taken, np.full((len(taken), width), -1, np.int32)], axis=1)


def _put(found: np.ndarray, rows: np.ndarray, items: np.ndarray) -> None:
    """Write `items`, grouped by their `rows`, behind what each row has."""
    filled = (found[rows] >= 0).sum(axis=1)
    first = np.searchsorted(rows, rows)
    found[rows, filled + np.arange(len(rows)) - first] = items


def from_weights(
    targets: Targets,
    wanted: np.ndarray,
    taken: np.ndarray,
    group: np.ndarray,
    weights: Callable[[int], np.ndarray],
) -> np.ndarray:
    """
    Draw without replacement, in proportion to weights over all items that rows of one group share.

    Args:
        targets ([`Targets`]):
            The rows.
        wanted (`np.ndarray` of shape `(R,)`):
            How many items each row is to get.
        taken (`np.ndarray` of shape `(R, T)`):
            Items that each row has already; -1 where there is none, at the end.
        group (`np.ndarray` of shape `(R,)`):
            Group of each row.
        weights (`Callable[[int], np.ndarray]`):
            From a group to the weights of all items, of shape `(I,)`.

    Returns:
        `np.ndarray` of shape `(R, T + max(wanted))`: `taken` and what was drawn, -1 where there is none, at the end.
    """
    found = _free_slots(taken, wanted)
    goal = (taken >= 0).sum(axis=1) + wanted
    order = np.argsort(group, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(group[order])) + 1):
        if len(rows):
            _draw(targets, found, goal, rows, weights(int(group[rows[0]])))
    return found


def _draw(targets: Targets, found: np.ndarray, goal: np.ndarray, rows: np.ndarray, weights: np.ndarray) -> None:
    """Rows of one group. To reject what is not eligible gives the same distribution as to draw from the eligible."""
    heap = np.cumsum(weights, dtype=np.float64)
    if len(heap) == 0 or heap[-1] == 0:
        return
    bins = _Bins(heap)
    for turn in range(_ROUNDS):
        missing = goal[rows] - (found[rows] >= 0).sum(axis=1)
        rows, missing = rows[missing > 0], missing[missing > 0]
        if len(rows) == 0:
            return
        numbers = turn * _STRIDE + np.arange(int(missing.max()) + _SPARE)
        draw = partial(_draw_part, targets, found, bins, numbers)
        starts = range(_CHUNK, len(rows), _CHUNK)
        # Threads, because numpy leaves Python alone; each part of the rows is its own
        with ThreadPoolExecutor() as pool:
            list(pool.map(draw, np.split(rows, starts), np.split(missing, starts)))
    for lacking in rows[goal[rows] > (found[rows] >= 0).sum(axis=1)]:
        _draw_exactly(targets, found, goal, int(lacking), weights)


def _draw_part(
    targets: Targets, found: np.ndarray, bins: "_Bins", numbers: np.ndarray, rows: np.ndarray, missing: np.ndarray
) -> None:
    drawn = bins.find(uniforms(targets.keys[rows, None], numbers))
    _keep_eligible(targets, found, missing, rows, drawn)


class _Bins:
    """Which of ascending sums a share of the last one falls below, found by its leading bits where these are enough."""

    def __init__(self, sums: np.ndarray) -> None:
        self.sums = sums
        self.count = 1 << max(10, len(sums).bit_length() + 4)
        bounds = np.searchsorted(sums, np.arange(self.count + 1) / self.count * sums[-1], side="right").astype(
            np.int32
        )
        self.first, self.clear = bounds[:-1], bounds[:-1] == bounds[1:]

    def find(self, shares: np.ndarray) -> np.ndarray:
        """`np.searchsorted(sums, shares * sums[-1], side="right")`, as `int32`."""
        place = (shares * self.count).astype(np.int32)
        found = self.first[place]
        unclear = ~self.clear[place]
        found[unclear] = np.searchsorted(self.sums, shares[unclear] * self.sums[-1], side="right")
        return found


def _keep_eligible(
    targets: Targets, found: np.ndarray, missing: np.ndarray, rows: np.ndarray, drawn: np.ndarray
) -> None:
    """Write what is eligible and new of `drawn`, of shape `(len(rows), width)`, into `found`, as many as are missing."""
    filled = (found[rows] >= 0).sum(axis=1)
    have = found[rows, : int(filled.max(initial=0))]
    # As many as the row would draw by itself: what it gets must not depend on what others lack
    keep = targets.may_draw(rows[:, None], drawn) & (np.arange(drawn.shape[1]) < missing[:, None] + _SPARE)
    keep &= ~_is_repeated(targets.events.same_title, have, drawn)
    place = np.cumsum(keep, axis=1)
    keep &= place <= missing[:, None]
    line, column = np.nonzero(keep)
    found[rows[line], filled[line] + place[line, column] - 1] = drawn[line, column]


def _is_repeated(titles: np.ndarray, have: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """Whether the title of each of `drawn` stands further left in its row, or among what the row has."""
    items = np.concatenate([have, drawn], axis=1)
    width = items.shape[1]
    marked = np.where(items >= 0, titles[items], -1).astype(np.int64) * width + np.arange(width)
    marked.sort(axis=1)
    title, column = np.divmod(marked, width)
    repeated = np.zeros(items.shape, bool)
    line, place = np.nonzero(title[:, 1:] == title[:, :-1])
    repeated[line, column[line, place + 1]] = True
    return repeated[:, have.shape[1] :]


def _draw_exactly(targets: Targets, found: np.ndarray, goal: np.ndarray, row: int, weights: np.ndarray) -> None:
    """The same draw for one row from all its eligible items (Efraimidis and Spirakis, 2006)."""
    titles = targets.events.same_title
    have = found[row][found[row] >= 0]
    items = np.flatnonzero(weights > 0).astype(np.int32)
    items = items[targets.may_draw(np.asarray(row), items) & ~np.isin(titles[items], titles[have])]
    waiting = -np.log1p(-uniforms(targets.keys[row], _STRIDE * _ROUNDS + items)) / weights[items]
    items = items[np.argsort(waiting, kind="stable")]
    _, first = np.unique(titles[items], return_index=True)
    items = items[np.sort(first)][: goal[row] - len(have)]
    found[row, len(have) : len(have) + len(items)] = items


def from_lists(
    targets: Targets, wanted: np.ndarray, taken: np.ndarray, lists: Ragged, in_order: bool = False
) -> np.ndarray:
    """
    Draw without replacement, all alike, from a list of each row's own.

    Args:
        targets ([`Targets`]):
            The rows.
        wanted (`np.ndarray` of shape `(R,)`):
            How many items each row is to get.
        taken (`np.ndarray` of shape `(R, T)`):
            Items that each row has already; -1 where there is none, at the end.
        lists ([`~trl_dmpo.data.events.Ragged`]):
            `R` lists of items.
        in_order (`bool`, *optional*, defaults to `False`):
            Whether to take the first that are eligible instead of drawing.

    Returns:
        `np.ndarray` of shape `(R, T + max(wanted))`: `taken` and what was drawn, -1 where there is none, at the end.
    """
    found = _free_slots(taken, wanted)
    titles = targets.events.same_title
    rows, items = lists.owners, lists.values
    keep = targets.may_draw(rows, items)
    for column in range(taken.shape[1]):
        have = taken[rows, column]
        keep &= (have < 0) | (titles[have] != titles[items])
    rows, items = rows[keep], items[keep]
    # By item, not by place in the list, so that the order of the list does not matter
    rank = np.flatnonzero(keep) if in_order else uniforms(targets.keys[rows], _STRIDE * (_ROUNDS + 1) + items)
    order = np.lexsort((items, rank, rows))
    rows, items = rows[order], items[order]
    _, first = np.unique(rows.astype(np.int64) * len(titles) + titles[items], return_index=True)
    first.sort()
    rows, items = rows[first], items[first]
    enough = np.arange(len(rows)) - np.searchsorted(rows, rows) < wanted[rows]
    _put(found, rows[enough], items[enough])
    return found
