"""
Which interactions are to be predicted in training, which in validation, which in the test.

A split is a small frozen dataclass with one method, `assign`. Whatever it says, a row's history is what came before it.
"""

from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import polars as pl

from .log import InteractionLog
from .seeding import make_keys


TRAIN, VALIDATION, TEST = "train", "validation", "test"
SPLITS_IN_ORDER = (TRAIN, VALIDATION, TEST)
SPLIT_NAMES = pl.Enum(SPLITS_IN_ORDER)


def _named(test: pl.Expr, validation: pl.Expr, train: pl.Expr | bool = True) -> pl.Expr:
    names = pl.when(test).then(pl.lit(TEST)).when(validation).then(pl.lit(VALIDATION)).when(train).then(pl.lit(TRAIN))
    return names.cast(SPLIT_NAMES).alias("split")


def _is_late(n: int) -> pl.Expr:
    """Whether an interaction is one of its user's last `n`: the one `n` rows on is another user's, or there is none."""
    return (pl.col("user_id") != pl.col("user_id").shift(-n)).fill_null(True)


@dataclass(frozen=True)
class LeaveLastN:
    """
    The last `n` interactions of each user are the test, the `n` before them validation, the rest training.

    Args:
        n (`int`, *optional*, defaults to `1`):
            How many, at least 1.
    """

    n: int = 1

    def __post_init__(self):
        _at_least(self.n, 1, "n")

    def assign(self, targets: pl.DataFrame, seed: int) -> pl.Series:
        """
        The split of each interaction.

        Args:
            targets (`pl.DataFrame`):
                `user_id`, `item_id` and `timestamp`, by user, then in the order of time.
            seed (`int`):
                Seed, where there is something to draw.

        Returns:
            `pl.Series`: `"train"`, `"validation"`, `"test"`, or null for what is to be predicted nowhere.

        Example:

        ```python
        >>> import polars as pl
        >>> from trl_dmpo.data.splits import LeaveLastN

        >>> targets = pl.DataFrame({"user_id": [7] * 4, "item_id": [3, 1, 4, 2], "timestamp": [10, 20, 30, 40]})
        >>> LeaveLastN(1).assign(targets, seed=0).to_list()
        ['train', 'train', 'validation', 'test']
        ```
        """
        return targets.select(_named(_is_late(self.n), _is_late(2 * self.n))).to_series()


@dataclass(frozen=True)
class LeaveOneOut:
    """The last interaction of each user is the test, the one before it validation, the rest training."""

    def assign(self, targets: pl.DataFrame, seed: int) -> pl.Series:
        """As [`LeaveLastN.assign`], with `n=1`."""
        return LeaveLastN(1).assign(targets, seed)


@dataclass(frozen=True)
class AtTime:
    """
    One moment for all users: training before it; validation and test are each user's first interactions after it.

    Args:
        validation (`float` or `str`, *optional*, defaults to `0.8`):
            When validation begins: after this share of all interactions that may be asked for, or at a date such as
            `"2003-01-31"` (UTC).
        test (`float` or `str`, *optional*, defaults to `0.9`):
            When the test begins, likewise.
        per_user (`int`, *optional*, defaults to `1`):
            How many interactions of a user validation and test have at most.
    """

    validation: float | str = 0.8
    test: float | str = 0.9
    per_user: int = 1

    def __post_init__(self):
        _at_least(self.per_user, 1, "per_user")

    def assign(self, targets: pl.DataFrame, seed: int) -> pl.Series:
        """As [`LeaveLastN.assign`]. Raises `ValueError` if the test begins before validation."""
        if targets.is_empty():
            return pl.Series("split", [], SPLIT_NAMES)
        first, second = (self._moment(when, targets["timestamp"]) for when in (self.validation, self.test))
        if first > second:
            raise ValueError(f"`split`: the test ({self.test}) begins before validation ({self.validation}).")
        time = pl.col("timestamp")
        period = (time >= first).cast(pl.Int8) + (time >= second).cast(pl.Int8)
        place = pl.int_range(pl.len()).over("user_id", period)
        early = place < self.per_user
        return targets.select(_named((period == 2) & early, (period == 1) & early, period == 0)).to_series()

    @staticmethod
    def _moment(when: float | str, times: pl.Series) -> int:
        if isinstance(when, str):
            try:
                moment = datetime.fromisoformat(when)
            except ValueError as error:
                raise ValueError(f"`split`: {when!r} is not a date. Write it as '2003-01-31'.") from error
            return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())
        if not 0 < when <= 1:
            raise ValueError(f"`split`: {when} is not a share. Give one above 0 and at most 1, or a date as text.")
        # Strictly after: what shares the moment of the last one belongs to the time before with it
        return int(times.quantile(when, "lower")) + 1  # type: ignore[arg-type]


@dataclass(frozen=True)
class ByUser:
    """
    Users of their own for validation and for the test, of whom the last interactions are to be predicted.

    Args:
        validation (`float`, *optional*, defaults to `0.1`):
            Share of the users, drawn by the seed.
        test (`float`, *optional*, defaults to `0.1`):
            Share of the users, drawn by the seed.
        per_user (`int`, *optional*, defaults to `1`):
            How many interactions of a user validation and test have.
    """

    validation: float = 0.1
    test: float = 0.1
    per_user: int = 1

    def __post_init__(self):
        _at_least(self.per_user, 1, "per_user")
        if not (self.validation >= 0 and self.test >= 0 and self.validation + self.test < 1):
            raise ValueError("`split`: `validation` and `test` are shares of the users, together below 1.")

    def assign(self, targets: pl.DataFrame, seed: int) -> pl.Series:
        """As [`LeaveLastN.assign`]."""
        users = targets["user_id"].unique(maintain_order=True)
        drawn = pl.DataFrame({"user_id": users, "place": draw_order(len(users), seed, purpose=1)})
        joined = targets.select("user_id").join(drawn, on="user_id", how="left", maintain_order="left")
        # Less a little, because 0.1 + 0.2 is more than 0.3
        tests, all_held_out = (share * len(users) - 1e-9 for share in (self.test, self.test + self.validation))
        is_test, held_out = pl.col("place") < tests, pl.col("place") < all_held_out
        late = _is_late(self.per_user)
        return joined.select(_named(is_test & late, held_out & ~is_test & late, ~held_out)).to_series()


SPLITS = {"leave_one_out": LeaveOneOut, "leave_last_n": LeaveLastN, "time": AtTime, "user": ByUser}


def _at_least(value: int, least: int, name: str) -> None:
    if not isinstance(value, int) or value < least:
        raise ValueError(f"`split`: `{name}` is {value!r}, but it is an integer of at least {least}.")


def draw_order(count: int, seed: int, purpose: int) -> np.ndarray:
    """
    A random order of `count` things, in which the place of each depends on the seed and on their number alone.

    Args:
        count (`int`):
            How many things.
        seed (`int`):
            Seed.
        purpose (`int`):
            Tells orders under one seed apart.

    Returns:
        `np.ndarray` of shape `(count,)`: the place of each thing, from 0.
    """
    place = np.empty(count, np.int64)
    place[np.argsort(make_keys(seed, purpose, np.arange(count)), kind="stable")] = np.arange(count)
    return place


def keep_core(log: InteractionLog, k: int) -> InteractionLog:
    """
    The log without users and items of fewer than `k` interactions, repeated until there are none.

    Args:
        log ([`~trl_dmpo.data.log.InteractionLog`]):
            The log.
        k (`int`):
            How many interactions every user and every item keeps at least.

    Returns:
        [`~trl_dmpo.data.log.InteractionLog`]: its `items` are those that are left in its interactions.

    Raises:
        `ValueError`: nothing is left.

    Example:

    ```python
    >>> import polars as pl
    >>> from trl_dmpo.data.log import make_log
    >>> from trl_dmpo.data.splits import keep_core

    >>> taken = pl.DataFrame({"user_id": [1, 1, 2, 2, 3], "item_id": [5, 6, 5, 6, 6]})
    >>> log = make_log(taken, pl.DataFrame({"item_id": [5, 6], "title": ["Alien", "Heat"]}), source="two films")
    >>> keep_core(log, 2).notes
    {'interactions outside the 2-core': 1}
    ```
    """
    frame = log.interactions
    while True:
        kept = frame.filter((pl.len().over("user_id") >= k) & (pl.len().over("item_id") >= k))
        if kept.height == frame.height:
            break
        frame = kept
    if frame.is_empty():
        raise ValueError(f"`k_core`: no interactions are left with {k} for every user and item. Lower it.")
    notes = log.notes
    if frame.height < log.interactions.height:
        notes = notes | {f"interactions outside the {k}-core": log.interactions.height - frame.height}
    items = log.items.filter(pl.col("item_id").is_in(frame["item_id"].unique().implode()))
    return InteractionLog(frame, items, log.source, log.domain, log.has_time, notes)


def check_leaks(rows: pl.DataFrame, one_moment: bool = False) -> None:
    """
    Raise if training rows tell what is to be predicted.

    Args:
        rows (`pl.DataFrame`):
            `split`, `user_id`, `chosen_id`, `timestamp` of the chosen item, and the lists `history_ids`, `rejected_ids`.
        one_moment (`bool`, *optional*, defaults to `False`):
            Whether all of training has to lie before all of validation, and that before all of the test.

    Raises:
        `ValueError`: a target is in its own history or among its rejected items, a training row has in its prompt, as its
            answer or among its rejected items what validation or test ask its user, or lies after the moment of the split.

    Example:

    ```python
    >>> import polars as pl
    >>> from trl_dmpo.data.splits import check_leaks

    >>> rows = {"split": ["train", "test"], "user_id": [1, 1], "chosen_id": [10, 20], "timestamp": [1, 2]}
    >>> rows |= {"history_ids": [[5], [5, 10]], "rejected_ids": [[20], [30]]}
    >>> check_leaks(pl.DataFrame(rows))
    Traceback (most recent call last):
    ...
    ValueError: A leak: the train row of user 1 with target 10 has in `rejected_ids` an item asked for later (1 such).
    ```
    """
    own = rows.filter(pl.col("history_ids").list.contains(pl.col("chosen_id")))
    _refuse(own, "has its target in its own history")
    own = rows.filter(pl.col("rejected_ids").list.contains(pl.col("chosen_id")))
    _refuse(own, "has its target among its rejected items")
    asked = rows.filter(pl.col("split") != TRAIN).select("user_id", item_id="chosen_id")
    train = rows.filter(pl.col("split") == TRAIN)
    for column in ("history_ids", "chosen_id", "rejected_ids"):
        said = train.select("user_id", "split", "chosen_id", item_id=column)
        said = said.explode("item_id").drop_nulls("item_id") if column != "chosen_id" else said
        _refuse(said.join(asked, on=["user_id", "item_id"], how="semi"), f"has in `{column}` an item asked for later")
    if one_moment:
        ends = {name: rows.filter(pl.col("split") == name)["timestamp"] for name in (TRAIN, VALIDATION, TEST)}
        for name, later in ((TRAIN, VALIDATION), (TRAIN, TEST), (VALIDATION, TEST)):
            if len(ends[name]) and len(ends[later]) and ends[name].max() >= ends[later].min():  # type: ignore[operator]
                raise ValueError(f"A leak: the split {name!r} has a row later than the first of {later!r}.")


def _refuse(rows: pl.DataFrame, what: str) -> None:
    if rows.height:
        first = rows.row(0, named=True)
        raise ValueError(
            f"A leak: the {first['split']} row of user {first['user_id']!r} with target {first['chosen_id']!r} {what}"
            f" ({rows.height} such)."
        )
