"""
Items that a user did not choose, to be told from the one that was chosen.

A sampler is a small frozen dataclass with one method, `sample`. Every one keeps the promises of `drawing`: never an item
that the user liked, in any split; never a title twice in a row; the same under the same seed.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from .drawing import Targets, from_lists, from_weights
from .events import Events, Ragged, slices


@dataclass(frozen=True)
class Uniform:
    """Every item alike."""

    def sample(self, targets: Targets, wanted: np.ndarray, taken: np.ndarray) -> np.ndarray:
        """
        Items for each row.

        Args:
            targets ([`Targets`]):
                The rows.
            wanted (`np.ndarray` of shape `(R,)`):
                How many items each row is to get.
            taken (`np.ndarray` of shape `(R, T)`):
                Items that each row has already; -1 where there is none, at the end.

        Returns:
            `np.ndarray` of shape `(R, T + max(wanted))`: `taken` and what was drawn, -1 where there is none, at the end.

        Example:

        ```python
        >>> import numpy as np
        >>> import polars as pl
        >>> from trl_dmpo.data.drawing import Targets
        >>> from trl_dmpo.data.events import make_events
        >>> from trl_dmpo.data.log import make_log
        >>> from trl_dmpo.data.negatives import Uniform

        >>> titles = pl.DataFrame({"item_id": range(4), "title": ["Alien", "Aliens", "Heat", "Big"]})
        >>> log = make_log(pl.DataFrame({"user_id": [7, 7], "item_id": [0, 2]}), titles, source="four films")
        >>> both = np.array([True, True])
        >>> targets = Targets(make_events(log, positive=3), np.array([0, 1]), both, both, seed=0)
        >>> np.sort(Uniform().sample(targets, np.array([2, 1]), np.empty((2, 0), np.int32))).tolist()
        [[1, 3], [-1, 1]]
        ```
        """
        weights = np.ones(targets.events.items.height)
        return from_weights(targets, wanted, taken, np.zeros(len(wanted), np.int64), lambda group: weights)


@dataclass(frozen=True)
class Popularity:
    """
    In proportion to how often an item was liked in training, to a power.

    Args:
        power (`float`, *optional*, defaults to `1.0`):
            0 makes all items alike, 0.75 is that of word2vec, 1 is popularity itself.
    """

    power: float = 1.0

    def __post_init__(self):
        if self.power < 0:
            raise ValueError(f"`negatives`: `power` is {self.power}, but it is at least 0.")

    def sample(self, targets: Targets, wanted: np.ndarray, taken: np.ndarray) -> np.ndarray:
        """As [`Uniform.sample`]."""
        weights = targets.popularity.astype(np.float64) ** self.power
        return from_weights(targets, wanted, taken, np.zeros(len(wanted), np.int64), lambda group: weights)


@dataclass(frozen=True)
class Disliked:
    """
    What the user rated and did not like: the DMPO paper's choice.

    What came before the user's last interaction of training belongs to training, what came later to validation and test: no
    row learns from, or is tested with, what the other knows.
    """

    def sample(self, targets: Targets, wanted: np.ndarray, taken: np.ndarray) -> np.ndarray:
        """As [`Uniform.sample`]. Raises `ValueError` if everything was liked."""
        events = targets.events
        if events.liked.all():
            raise ValueError(
                "`negatives`: there is nothing that a user did not like. `disliked` needs a log with ratings, some of them "
                "not above `positive`."
            )
        last = np.full(len(events.user_ids), -1)
        trained = np.flatnonzero(targets.trained)
        last[events.user[trained]] = trained  # in order: the last one stays
        mine = events.of_users(targets.user, ~events.liked)
        early = mine.values < last[targets.user][mine.owners]
        mine = mine.where(early == targets.in_training[mine.owners])
        return from_lists(targets, wanted, taken, mine._replace(values=events.item[mine.values]))


@dataclass(frozen=True)
class Shown:
    """What was shown to the user at the event and not taken: the log's column `impressions`."""

    def sample(self, targets: Targets, wanted: np.ndarray, taken: np.ndarray) -> np.ndarray:
        """As [`Uniform.sample`]. Raises `ValueError` if the log has no impressions."""
        events = targets.events
        if events.impressions is None:
            raise ValueError(
                "`negatives`: `shown` needs a column `impressions` in the log: what was shown at an event."
            )
        lists = events.impressions.gather(targets.event)
        shown = pl.DataFrame({"row": np.arange(len(lists)), "item_id": lists}).explode("item_id")
        known = events.items.select("item_id", item=pl.int_range(pl.len(), dtype=pl.Int32))
        shown = shown.join(known, on="item_id", how="inner", maintain_order="left")  # without what has no title
        offsets = np.searchsorted(shown["row"].to_numpy(), np.arange(len(lists) + 1))
        return from_lists(targets, wanted, taken, Ragged(shown["item"].to_numpy(), offsets))


@dataclass(frozen=True)
class SharedFeature:
    """
    Items that share a feature with the one that was chosen: in proportion to how many values they share.

    Args:
        feature (`str`):
            A text feature of the items, one value or a list of values each: a category, genres.
    """

    feature: str

    def sample(self, targets: Targets, wanted: np.ndarray, taken: np.ndarray) -> np.ndarray:
        """As [`Uniform.sample`]. Raises `ValueError` if there is no such feature."""
        values = _feature_values(targets.events.items, self.feature)
        holders = _inverted(values)
        sets = np.split(values.values, values.offsets[1:-1])
        # Items of the same values have the same weights. From 1, because numpy takes bytes of 0 at the end for none
        names = [(numbers + 1).tobytes() for numbers in sets]
        _, example, group = np.unique(names, return_index=True, return_inverse=True)

        def weights(group: int) -> np.ndarray:
            mine = sets[example[group]]
            shared = slices(holders.values, holders.offsets[mine], holders.offsets[mine + 1])
            return np.bincount(shared.values, minlength=targets.events.items.height)

        return from_weights(targets, wanted, taken, group[targets.item], weights)


def _feature_values(items: pl.DataFrame, feature: str) -> Ragged:
    """For each item the numbers of its values of a feature, ascending."""
    if feature not in items.columns:
        raise ValueError(f"`negatives`: items have no feature {feature!r}, only: {', '.join(items.columns)}.")
    long = pl.DataFrame({"item": np.arange(items.height), "value": items[feature]})
    long = (long.explode("value") if isinstance(items[feature].dtype, pl.List) else long).drop_nulls()
    long = long.with_columns(pl.col("value").rank("dense").cast(pl.Int64) - 1).unique().sort("item", "value")
    return Ragged(long["value"].to_numpy(), np.searchsorted(long["item"].to_numpy(), np.arange(items.height + 1)))


def _inverted(lists: Ragged) -> Ragged:
    """For each value the lists that hold it."""
    order = np.argsort(lists.values, kind="stable")
    numbers = np.arange(lists.values.max(initial=-1) + 2)
    return Ragged(lists.owners[order], np.searchsorted(lists.values[order], numbers))


@dataclass(frozen=True)
class Nearest:
    """
    Hard negatives: the items nearest to the one that was chosen, or those that a recommender scores highest for the user.

    Args:
        source (`str`, `Path`, `np.ndarray` or `pl.DataFrame`):
            A matrix (`.npy`) or table (`.parquet`). A table has the columns `item_id` and `embedding`, or `user_id`,
            `item_id` and `score`. A matrix has one row per item: embeddings, or one row per user and one column per item:
            scores; users and items in the order of their ids. Embeddings are compared by their cosine.
        top (`int`, *optional*):
            From how many of the nearest to draw. By default the nearest are taken, as many as are wanted.
    """

    source: Any
    top: int | None = None

    def __post_init__(self):
        if self.top is not None and self.top < 1:
            raise ValueError(f"`negatives`: `top` is {self.top}, but it is at least 1.")

    def sample(self, targets: Targets, wanted: np.ndarray, taken: np.ndarray) -> np.ndarray:
        """As [`Uniform.sample`]. Raises `ValueError` if the scores do not fit the log."""
        count = int(wanted.max(initial=0)) if self.top is None else self.top
        nearest = np.full((len(wanted), 0), -1, np.int32)
        if len(wanted) and count:
            lists = self._lists(targets, count + taken.shape[1])
            nearest = from_lists(targets, np.full(len(wanted), count), taken, lists, in_order=True)[
                :, taken.shape[1] :
            ]
        return from_lists(targets, wanted, taken, _as_lists(nearest), in_order=self.top is None)

    def _lists(self, targets: Targets, count: int) -> Ragged:
        """At least `count` eligible items of each row, the nearest first, if there are as many."""
        events = targets.events
        table = _read(self.source)
        if isinstance(table, pl.DataFrame) and {"user_id", "item_id", "score"} <= set(table.columns):
            return _ranked(targets, table)
        if isinstance(table, pl.DataFrame):
            table = _embeddings(events, table)
        elif table.shape == (len(events.user_ids), events.items.height):
            if table.shape[0] == table.shape[1]:
                raise ValueError(
                    "`negatives`: as many users as items: give a table of scores or embeddings, not a matrix."
                )
            return _best(targets, count, lambda rows: table[targets.user[rows]])
        if table.ndim != 2 or len(table) != events.items.height:
            raise ValueError(
                f"`negatives`: a matrix of shape {table.shape} fits neither the {events.items.height} items nor the "
                f"{len(events.user_ids)} users and {events.items.height} items of the log."
            )
        unit = (table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-12)).astype(np.float32)
        return _best(targets, count, lambda rows: unit[targets.item[rows]] @ unit.T)


def _read(source: Any) -> np.ndarray | pl.DataFrame:
    if isinstance(source, np.ndarray | pl.DataFrame):
        return source
    path = Path(source).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"`negatives`: there is no file {path}.")
    if path.suffix == ".npy":
        return np.load(path)
    if path.suffix == ".parquet":
        return pl.read_parquet(path, glob=False)
    raise ValueError(f"`negatives`: {path} is neither a `.npy` matrix nor a `.parquet` table.")


def _embeddings(events: Events, table: pl.DataFrame) -> np.ndarray:
    """The items' embeddings, of shape `(I, d)`; not a number where an item has none."""
    if not {"item_id", "embedding"} <= set(table.columns):
        raise ValueError(
            "`negatives`: a table has the columns item_id and embedding, or user_id, item_id and score; this one has: "
            f"{', '.join(table.columns)}."
        )
    table = table.select(pl.col("item_id").cast(events.items["item_id"].dtype, strict=False), "embedding").drop_nulls()
    twice = table.filter(pl.col("item_id").is_duplicated())["item_id"]
    if len(twice):
        raise ValueError(f"`negatives`: item {twice[0]!r} has more than one embedding. Keep one of each.")
    known = events.items.select("item_id").join(table, on="item_id", how="left", maintain_order="left")["embedding"]
    vectors = known.drop_nulls().to_list()
    if len({len(vector) for vector in vectors}) != 1:
        raise ValueError("`negatives`: the embeddings are not all of one length, or none is of an item of the log.")
    matrix = np.full((events.items.height, len(vectors[0])), np.nan, np.float32)
    matrix[known.is_not_null().to_numpy()] = np.asarray(vectors, np.float32)
    return matrix


def _ranked(targets: Targets, table: pl.DataFrame) -> Ragged:
    """The items that a table scores for each row's user, the highest first."""
    events = targets.events
    users = pl.DataFrame({"user_id": events.user_ids, "user": np.arange(len(events.user_ids))})
    items = events.items.select("item_id", item=pl.int_range(pl.len(), dtype=pl.Int32))
    table = table.with_columns(
        pl.col("user_id").cast(users["user_id"].dtype, strict=False),
        pl.col("item_id").cast(items["item_id"].dtype, strict=False),
        pl.col("score").cast(pl.Float64).fill_nan(None),
    ).drop_nulls("score")
    table = table.join(users, on="user_id").join(items, on="item_id").sort("user", -pl.col("score"), "item")
    bounds = np.searchsorted(table["user"].to_numpy(), np.arange(len(events.user_ids) + 1))
    return slices(table["item"].to_numpy(), bounds[targets.user], bounds[targets.user + 1])


def _best(targets: Targets, count: int, score: Any) -> Ragged:
    """The eligible items of the highest scores, for rows in chunks whose scores over all items fit into memory."""
    events = targets.events
    chosen = []
    repeated = events.same_title != np.arange(events.items.height)
    count = min(count, events.items.height)
    size = max(1, 2**25 // events.items.height)
    for start in range(0, len(targets.event), size):
        rows = np.arange(start, min(start + size, len(targets.event)))
        scores = np.array(score(rows), np.float32)
        scores[np.isnan(scores)] = -np.inf
        scores[:, repeated] = -np.inf
        scores[np.arange(len(rows)), events.same_title[targets.item[rows]]] = -np.inf
        liked = events.of_users(targets.user[rows], events.liked)
        scores[liked.owners, events.same_title[events.item[liked.values]]] = -np.inf
        best = np.sort(np.argpartition(-scores, count - 1, axis=1)[:, :count], axis=1)
        order = np.argsort(-np.take_along_axis(scores, best, axis=1), axis=1, kind="stable")
        best = np.take_along_axis(best, order, axis=1)
        chosen.append(np.where(np.isneginf(np.take_along_axis(scores, best, axis=1)), -1, best).astype(np.int32))
    width = max((part.shape[1] for part in chosen), default=0)
    return _as_lists(np.concatenate([np.empty((0, width), np.int32), *chosen]))


def _as_lists(items: np.ndarray) -> Ragged:
    """The rows of a matrix, of shape `(R, width)`, without their -1."""
    lengths = (items >= 0).sum(axis=1)
    return Ragged(items[items >= 0], np.concatenate([[0], np.cumsum(lengths)]))


@dataclass(frozen=True)
class Mixture:
    """
    Some from each of several samplers. What one cannot give the next gives.

    Args:
        parts (`tuple[tuple[float, Any], ...]`):
            Shares, above 0, and samplers.
    """

    parts: tuple[tuple[float, Any], ...]

    def __post_init__(self):
        if not self.parts or min(share for share, _ in self.parts) <= 0:
            raise ValueError("`negatives`: a mixture has at least one part, and each a share above 0.")

    def sample(self, targets: Targets, wanted: np.ndarray, taken: np.ndarray) -> np.ndarray:
        """As [`Uniform.sample`]."""
        shares = np.cumsum([share for share, _ in self.parts])
        had = (taken >= 0).sum(axis=1)
        found = taken
        for number, (share, (_, sampler)) in enumerate(zip(shares / shares[-1], self.parts, strict=True)):
            goal = had + np.rint(share * wanted).astype(np.int64)
            stream = targets.stream * len(self.parts) + number + 1
            missing = np.maximum(goal - (found >= 0).sum(axis=1), 0)
            found = sampler.sample(replace(targets, stream=stream), missing, found)
        return found[:, : taken.shape[1] + int(wanted.max(initial=0))]


NEGATIVES = {
    "uniform": Uniform,
    "popularity": Popularity,
    "disliked": Disliked,
    "shown": Shown,
    "shared_feature": SharedFeature,
    "nearest": Nearest,
}
