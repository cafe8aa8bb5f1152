"""A log as arrays: users and items numbered, events in the order of time. What rows are looked up in by the million."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import polars as pl

from .log import InteractionLog


class Ragged(NamedTuple):
    """
    Lists of different lengths, one after the other.

    Args:
        values (`np.ndarray` of shape `(total,)`):
            The lists' entries.
        offsets (`np.ndarray` of shape `(n + 1,)`):
            List `i` is `values[offsets[i]:offsets[i + 1]]`.
    """

    values: np.ndarray
    offsets: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """Length of each list, of shape `(n,)`."""
        return np.diff(self.offsets)

    @property
    def owners(self) -> np.ndarray:
        """For each entry, the number of its list: of shape `(total,)`."""
        return np.repeat(np.arange(len(self.offsets) - 1), self.lengths)

    def where(self, keep: np.ndarray) -> "Ragged":
        """The lists with only those entries for which `keep`, of shape `(total,)`, is true."""
        kept = np.concatenate([[0], np.cumsum(keep)])
        return Ragged(self.values[keep], kept[self.offsets])

    def select(self, keep: np.ndarray) -> "Ragged":
        """Those lists for which `keep`, of shape `(n,)`, is true."""
        return slices(self.values, self.offsets[:-1][keep], self.offsets[1:][keep])


def slices(values: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> Ragged:
    """
    The lists `values[start:stop]`, one for each pair of `starts` and `stops`.

    Example:

    ```python
    >>> import numpy as np
    >>> from trl_dmpo.data.events import slices

    >>> lists = slices(np.array([5, 6, 7, 8]), np.array([1, 0]), np.array([4, 1]))
    >>> lists.values.tolist(), lists.offsets.tolist()
    ([6, 7, 8, 5], [0, 3, 4])
    ```
    """
    offsets = np.concatenate([[0], np.cumsum(stops - starts)])
    index = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], stops - starts)
    return Ragged(values[index], offsets)


@dataclass(frozen=True)
class Events:
    """
    The interactions of a log, by user, then by time. Users and items are numbered in the order of their ids.

    Args:
        user_ids (`pl.Series` of length `U`):
            The users' ids.
        items (`pl.DataFrame` of height `I`):
            The items, as in the log.
        user, item (`np.ndarray` of shape `(N,)`):
            Numbers of user and item, `int32`.
        time (`np.ndarray` of shape `(N,)`):
            Time stamps, `int64`.
        liked (`np.ndarray` of shape `(N,)`):
            Whether the user liked the item.
        rating (`np.ndarray` of shape `(N,)`, *optional*):
            Ratings, `float64`, if the log has any.
        impressions (`pl.Series` of length `N`, *optional*):
            Item ids that were shown at the event, if the log has any.
    """

    user_ids: pl.Series
    items: pl.DataFrame
    user: np.ndarray
    item: np.ndarray
    time: np.ndarray
    liked: np.ndarray
    rating: np.ndarray | None = None
    impressions: pl.Series | None = None

    @cached_property
    def first_of_user(self) -> np.ndarray:
        """The first event of each user, and at the end `N`: of shape `(U + 1,)`."""
        return np.searchsorted(self.user, np.arange(len(self.user_ids) + 1))

    @cached_property
    def same_title(self) -> np.ndarray:
        """For each item the first that has the same title: a reader cannot tell them apart. Of shape `(I,)`."""
        numbered = self.items.select("title").with_row_index()
        return numbered.select(pl.col("index").first().over("title").cast(pl.Int32)).to_series().to_numpy()

    @cached_property
    def is_new(self) -> np.ndarray:
        """Whether the user had met no item of this title before. Of shape `(N,)`."""
        new = np.ones(len(self.user), bool)
        repeated = np.unique(self.same_title[self.same_title != np.arange(len(self.same_title))])
        doubtful = np.flatnonzero(np.isin(self.same_title, repeated)[self.item])
        _, first = np.unique(self.pairs(self.user[doubtful], self.item[doubtful]), return_index=True)
        new[np.delete(doubtful, first)] = False
        return new

    def before(
        self, events: np.ndarray, among: np.ndarray, limit: int | None = None, step: int | np.ndarray = 1
    ) -> Ragged:
        """
        What each event's user did before it, oldest first.

        Args:
            events (`np.ndarray` of shape `(R,)`):
                Events.
            among (`np.ndarray` of shape `(N,)`):
                Which events count.
            limit (`int`, *optional*):
                How many of the latest to keep at most.
            step (`int` or `np.ndarray` of shape `(R,)`, *optional*, defaults to `1`):
                Leave out the oldest so many at a time.

        Returns:
            [`Ragged`]: `R` lists of events.
        """
        counts = np.concatenate([[0], np.cumsum(among, dtype=np.int32)])
        stops = counts[events]
        starts = counts[self.first_of_user[self.user[events]]]
        if limit is not None:
            excess = np.maximum(stops - starts - limit, 0)
            starts = starts + -(-excess // step) * step
        return slices(np.flatnonzero(among).astype(np.int32), starts, stops)

    def of_users(self, users: np.ndarray, among: np.ndarray) -> Ragged:
        """
        What users did, oldest first.

        Args:
            users (`np.ndarray` of shape `(R,)`):
                Users.
            among (`np.ndarray` of shape `(N,)`):
                Which events count.

        Returns:
            [`Ragged`]: `R` lists of events.
        """
        counts = np.concatenate([[0], np.cumsum(among, dtype=np.int32)])
        starts, stops = counts[self.first_of_user[users]], counts[self.first_of_user[users + 1]]
        return slices(np.flatnonzero(among).astype(np.int32), starts, stops)

    def pairs(self, user: np.ndarray, item: np.ndarray) -> np.ndarray:
        """One number, `int64`, for each user and title."""
        return user.astype(np.int64) * self.items.height + self.same_title[item]

    @cached_property
    def liked_pairs(self) -> np.ndarray:
        """The pairs of user and title that were liked, ascending."""
        return np.sort(self.pairs(self.user[self.liked], self.item[self.liked]))

    @cached_property
    def seen_pairs(self) -> np.ndarray:
        """The pairs of user and title that occur at all, ascending."""
        return self.liked_pairs if self.liked.all() else np.sort(self.pairs(self.user, self.item))


def is_among(values: np.ndarray, ascending: np.ndarray) -> np.ndarray:
    """Whether each of `values` is one of `ascending`, which is sorted."""
    if len(ascending) == 0:
        return np.zeros(values.shape, bool)
    place = np.searchsorted(ascending, values)
    return ascending[np.minimum(place, len(ascending) - 1)] == values


def make_events(log: InteractionLog, positive: float) -> Events:
    """
    The events of a log.

    Args:
        log ([`~trl_dmpo.data.log.InteractionLog`]):
            The log.
        positive (`float`):
            An item was liked if it was rated higher. If the log has no ratings, all were.

    Returns:
        [`Events`]
    """
    frame = log.interactions
    user_ids = frame["user_id"].unique(maintain_order=True)  # the log is sorted
    rating = frame["rating"].to_numpy() if "rating" in frame.columns else None
    liked = np.ones(frame.height, bool) if rating is None else rating > positive
    return Events(
        user_ids=user_ids,
        items=log.items,
        user=_numbers(frame["user_id"], user_ids),
        item=_numbers(frame["item_id"], log.items["item_id"]),
        time=frame["timestamp"].to_numpy(),
        liked=liked,
        rating=rating,
        impressions=frame["impressions"] if "impressions" in frame.columns else None,
    )


def _numbers(ids: pl.Series, known: pl.Series) -> np.ndarray:
    """The place of each of `ids` in `known`, which is sorted and holds them all."""
    numbers = pl.DataFrame({"id": known, "number": np.arange(len(known), dtype=np.int32)})
    joined = pl.DataFrame({"id": ids}).join(numbers, on="id", how="left", maintain_order="left")
    return joined["number"].to_numpy()
