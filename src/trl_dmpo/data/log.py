"""
An interaction log: who took which item when. What every source is read into and everything else starts from.

| frame | columns |
|---|---|
| `interactions` | `user_id`, `item_id`, `timestamp`, and where there are any `rating`, `impressions`, others |
| `items` | `item_id`, `title`, and any text features |
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import polars as pl


# Seconds since 1970 of today have ten digits: beyond these a number counts parts of a second
_PARTS_OF_A_SECOND = {10**17: 10**9, 10**14: 10**6, 10**11: 10**3}

# Markers that tokenizers of chat models take for the end of a turn or of the text
_MARKERS = r"(?i)<(\|[^|<>]*\||｜[^｜<>]*｜|/?s|bos|eos|pad|unk|/?think|(?:start|end)_of_turn|<?/?SYS>?)>|\[(/?INST)\]"


@dataclass(frozen=True)
class InteractionLog:
    """
    Interactions of users with items, and the items' texts. Made by [`make_log`], which sees to all that is promised here.

    Args:
        interactions (`pl.DataFrame`):
            One row per user and item: `user_id` and `item_id` (integers or strings, none missing), `timestamp` (`Int64`,
            seconds since 1970), `rating` (`Float64`) and `impressions` (lists of item ids that were shown) where the
            source has them. Sorted by user, time stamp and item.
        items (`pl.DataFrame`):
            One row per item of `interactions`, and others of the catalogue: `item_id`, `title` (not blank, one line), and
            text features. Sorted by item.
        source (`str`):
            What the log was taken for, for people to read.
        domain (`str`, *optional*, defaults to `"item"`):
            What kind of thing an item is: names the words that prompts use.
        has_time (`bool`, *optional*, defaults to `True`):
            Whether `timestamp` is a time. If not, it is the number of the row in the source.
        notes (`dict[str, int]`, *optional*):
            What was left out or changed while reading, with the number of rows.
    """

    interactions: pl.DataFrame
    items: pl.DataFrame
    source: str
    domain: str = "item"
    has_time: bool = True
    notes: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        users = self.interactions["user_id"].n_unique()
        items = self.interactions["item_id"].n_unique()
        return f"{self.source}: {self.interactions.height:,} interactions of {users:,} users with {items:,} items"


class Counted(NamedTuple):
    frame: pl.DataFrame
    notes: dict[str, int]

    def without(self, bad: pl.Expr, reason: str) -> "Counted":
        """The frame without the rows that are `bad`, and how many they were."""
        kept = self.frame.filter(~bad)
        dropped = self.frame.height - kept.height
        return Counted(kept, self.notes | ({reason: dropped} if dropped else {}))


def make_log(
    interactions: pl.DataFrame | pl.LazyFrame,
    items: pl.DataFrame | pl.LazyFrame,
    source: str,
    domain: str = "item",
    notes: Mapping[str, int] | None = None,
) -> InteractionLog:
    """
    The log of two frames as a publisher ships them: checked, cleaned, sorted.

    Rows without user, item or time stamp, items without title, and all but the first interaction of a user with an item
    are left out and counted in `notes`. Time stamps become seconds. Titles become one line, and markers of chat templates
    in them are broken up (`<|end|>` to `< |end| >`), so that a title cannot end a turn.

    Args:
        interactions (`pl.DataFrame` or `pl.LazyFrame`):
            `user_id`, `item_id`, and, where the source has them, `timestamp` (seconds, milliseconds, microseconds or
            nanoseconds since 1970, or a date), `rating` (a number) and `impressions` (lists of item ids). Without
            `timestamp`, or where none is given, the order of the rows is the order of events.
        items (`pl.DataFrame` or `pl.LazyFrame`):
            `item_id`, `title`, and text features (strings or lists of strings).
        source (`str`):
            What the log was taken for, for people to read.
        domain (`str`, *optional*, defaults to `"item"`):
            What kind of thing an item is: a key of `trl_dmpo.data.prompts.DOMAINS`.
        notes (`Mapping[str, int]`, *optional*):
            What the reader has left out already.

    Returns:
        [`InteractionLog`]

    Raises:
        `ValueError`: a column is missing, a rating or time stamp is not a number, or nothing is left.

    Example:

    ```python
    >>> import polars as pl
    >>> from trl_dmpo.data.log import make_log

    >>> taken = pl.DataFrame({"user_id": [1, 1, 2], "item_id": [7, 8, 9], "timestamp": [20, 10, 30]})
    >>> titles = pl.DataFrame({"item_id": [7, 8, 9], "title": ["Alien", " Red\\nHeat", None]})
    >>> log = make_log(taken, titles, source="three films")
    >>> log.interactions["item_id"].to_list(), log.items["title"].to_list(), log.notes
    ([8, 7], ['Alien', 'Red Heat'], {'items without a title': 1, 'interactions with an item without a title': 1})
    ```
    """
    _require(interactions, ("user_id", "item_id"), f"{source}: interactions")
    _require(items, ("item_id", "title"), f"{source}: items")
    frame, has_time = _with_numbers(interactions, source)
    catalogue = Counted(items.lazy().collect(), dict(notes or {}))
    frame, titles = _same_ids(frame, catalogue.frame)
    catalogue = _clean_items(Counted(titles, catalogue.notes))
    events = _clean_interactions(Counted(frame, catalogue.notes), catalogue.frame["item_id"])
    if events.frame.is_empty():
        why = ", ".join(f"{count:,} {reason}" for reason, count in events.notes.items()) or "there were none"
        raise ValueError(f"{source}: no interactions are left ({why}).")
    return InteractionLog(events.frame, catalogue.frame, source, domain, has_time, events.notes)


def _require(frame: pl.DataFrame | pl.LazyFrame, columns: Iterable[str], what: str) -> None:
    have = frame.lazy().collect_schema().names()
    for column in columns:
        if column not in have:
            raise ValueError(f"{what}: there is no column {column!r}, only: {', '.join(have)}. Rename or map it.")


def _with_numbers(interactions: pl.DataFrame | pl.LazyFrame, source: str) -> tuple[pl.DataFrame, bool]:
    """The interactions with `timestamp` in seconds and `rating` as a float; and whether there are time stamps."""
    frame = interactions.lazy().collect(engine="streaming")
    if "rating" in frame.columns:
        frame = frame.with_columns(_as_number(frame["rating"], pl.Float64, source))
    if "timestamp" not in frame.columns or frame["timestamp"].null_count() == frame.height:
        return frame.with_columns(pl.int_range(pl.len(), dtype=pl.Int64).alias("timestamp")), False
    return frame.with_columns(_as_seconds(frame["timestamp"], source)), True


def _as_number(column: pl.Series, dtype: Any, source: str) -> pl.Series:
    if column.dtype == pl.String:
        column = column.str.strip_chars().replace("", None)
    number = column.cast(dtype, strict=False)
    bad = number.is_null() & column.is_not_null()
    if dtype == pl.Float64:
        bad |= number.is_nan().fill_null(False) | number.is_infinite().fill_null(False)
    _refuse_unread(column, bad, "a number", source)
    return number


def _refuse_unread(column: pl.Series, bad: pl.Series, what: str, source: str) -> None:
    if bad.any():
        row = bad.arg_true()[0]
        raise ValueError(
            f"{source}: {column.name} {column[row]!r} in row {row + 1} of the interactions is not {what}. Mend or remove it."
        )


def _as_seconds(column: pl.Series, source: str) -> pl.Series:
    if column.dtype == pl.String and column.drop_nulls().str.contains(r"^\d{4}-\d\d-\d\d").all():
        moments = _as_moments(column)
        _refuse_unread(column, moments.is_null() & column.is_not_null(), "a date such as 2003-01-31 23:59:59", source)
        column = moments
    if column.dtype.is_temporal():
        return column.cast(pl.Datetime("us")).dt.epoch("s")
    number = _as_number(column, pl.Float64 if column.dtype in (pl.String, pl.Float32) else column.dtype, source)
    # A float holds more than an integer of 64 bits
    _refuse_unread(column, number.cast(pl.Int64, strict=False).is_null() & number.is_not_null(), "a time", source)
    largest = number.abs().median() or 0
    parts = next((parts for beyond, parts in _PARTS_OF_A_SECOND.items() if largest >= beyond), 1)  # type: ignore[operator]
    number = number.cast(pl.Int64)
    return number if parts == 1 else number // parts


def _as_moments(column: pl.Series) -> pl.Series:
    """Dates as text, in UTC unless they say otherwise."""
    text = column.str.strip_chars().str.replace("T", " ").str.replace(r"Z$", "+00:00").alias("text")
    formats = ("%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%d %H:%M", "%Y-%m-%d")
    naive = [pl.col("text").str.to_datetime(form, strict=False, time_unit="us") for form in formats[:2]]
    day = pl.col("text").str.to_date(formats[2], strict=False).cast(pl.Datetime("us"))
    aware = pl.col("text").str.to_datetime("%Y-%m-%d %H:%M:%S%.f%:z", strict=False, time_unit="us")
    aware = aware.dt.convert_time_zone("UTC").dt.replace_time_zone(None)
    return text.to_frame().select(pl.coalesce(*naive, day, aware).alias(column.name)).to_series()


def _same_ids(interactions: pl.DataFrame, items: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Both frames with item ids of one type, and ids that are integers or strings."""
    interactions, items = _with_whole_ids(interactions), _with_whole_ids(items)
    dtype = pl.Int64 if _are_integers(interactions["item_id"]) and _are_integers(items["item_id"]) else pl.String
    users = pl.Int64 if _are_integers(interactions["user_id"]) else pl.String
    shown = [pl.col("impressions").cast(pl.List(dtype))] if "impressions" in interactions.columns else []
    return (
        interactions.with_columns(pl.col("user_id").cast(users), pl.col("item_id").cast(dtype), *shown),
        items.with_columns(pl.col("item_id").cast(dtype)),
    )


def _are_integers(ids: pl.Series) -> bool:
    """Whether they are, and of 64 bits with a sign: hashes may need one bit more."""
    return ids.dtype.is_integer() and bool((ids.max() or 0) < 2**63)  # type: ignore[operator]


def _with_whole_ids(frame: pl.DataFrame) -> pl.DataFrame:
    """Ids that are floats as integers, where all are whole: pandas makes them so where one is missing."""
    floats = [name for name in ("user_id", "item_id") if name in frame.columns and frame[name].dtype.is_float()]
    filled = frame.with_columns(pl.col(floats).fill_nan(None))
    whole = [
        name for name in floats if ((ids := filled[name].drop_nulls()) % 1 == 0).all() and (ids.abs() < 2**63).all()
    ]
    return filled.with_columns(pl.col(whole).cast(pl.Int64))


def _clean_items(items: Counted) -> Counted:
    texts = [name for name, dtype in items.frame.schema.items() if dtype == pl.String and name != "item_id"]
    raw = items.frame["title"].cast(pl.String)
    lists = [name for name, dtype in items.frame.schema.items() if dtype == pl.List(pl.String)]
    cleaned = [
        clean_text(pl.col(*{*texts, "title"})),
        *(pl.col(name).list.eval(clean_text(pl.element())) for name in lists),
    ]
    items = items._replace(frame=items.frame.with_columns(raw).with_columns(cleaned))
    marked = int(items.frame.select((pl.col("title") != raw) & raw.str.contains(_MARKERS)).to_series().sum())
    items = items.without(pl.col("item_id").is_null(), "items without an id")
    items = items.without(pl.col("title").fill_null("") == "", "items without a title")
    items = items.without(~pl.col("item_id").is_first_distinct(), "items listed twice, the first kept")
    notes = items.notes | ({"titles with a marker of a chat template, broken up": marked} if marked else {})
    return Counted(items.frame.sort("item_id"), notes)


def clean_text(text: pl.Expr) -> pl.Expr:
    """`text` as one line without markers of chat templates."""
    one_line = text.str.replace_all(r"[\s\p{Cc}]+", " ").str.strip_chars()
    return one_line.str.replace_all(_MARKERS, "< ${1}${2} >")


def _clean_interactions(events: Counted, known: pl.Series) -> Counted:
    for column in ("user_id", "item_id", "timestamp", "rating"):
        if column in events.frame.columns and events.frame[column].null_count():
            events = events.without(pl.col(column).is_null(), f"interactions without {column}")
    if not _covers(known, events.frame["item_id"]):
        events = events.without(~pl.col("item_id").is_in(known.implode()), "interactions with an item without a title")
    # By item last: what is equal in time must not depend on the order of the rows
    order = ["user_id", "timestamp", "item_id"]
    if not _has_repeated(events.frame):
        return events._replace(frame=_sorted(events.frame, order))
    rating = ["rating"] if "rating" in events.frame.columns else []  # nor on which of two of one moment came first
    events = events._replace(frame=events.frame.sort(*order, *rating))
    return events.without(
        ~pl.struct("user_id", "item_id").is_first_distinct(), "repeated interactions, the first kept"
    )


def _has_repeated(frame: pl.DataFrame) -> bool:
    """Whether a user has an item more than once."""
    pairs = _packed(frame, ["user_id", "item_id"])
    if pairs is None:
        return frame.select(pl.struct("user_id", "item_id").n_unique()).item() < frame.height
    pairs.numbers.sort()
    return bool((pairs.numbers[1:] == pairs.numbers[:-1]).any())


def _sorted(frame: pl.DataFrame, columns: list[str]) -> pl.DataFrame:
    """`frame` by `columns`, no two rows of which are the same. To sort one number for each row takes a tenth of the time."""
    packed = _packed(frame, columns)
    if packed is None:
        return frame.sort(columns)
    others = frame.drop(columns)
    if others.width:
        others = others.select(pl.all().gather(pl.Series(packed.numbers).arg_sort()))
    packed.numbers.sort()
    return packed.unpack(columns).hstack(others).select(frame.columns)


class _Packed(NamedTuple):
    """Columns of integers as one, in the order of their rows."""

    numbers: np.ndarray
    lows: list[int]
    spans: list[int]

    def unpack(self, columns: list[str]) -> pl.DataFrame:
        unpacked, rest = {}, self.numbers
        for column, low, span in zip(columns[::-1], self.lows[::-1], self.spans[::-1], strict=True):
            rest, number = np.divmod(rest, span)
            number += low
            unpacked[column] = number
        return pl.DataFrame(unpacked)


def _packed(frame: pl.DataFrame, columns: list[str]) -> _Packed | None:
    """`columns` as one number for each row; `None` if they are not integers, or 63 bits do not hold them."""
    if frame.is_empty() or not all(frame[column].dtype == pl.Int64 for column in columns):
        return None
    arrays = [frame[column].to_numpy() for column in columns]
    lows = [int(array.min()) for array in arrays]
    spans = [int(array.max()) - low + 1 for array, low in zip(arrays, lows, strict=True)]
    if math.prod(spans) >= 2**63:
        return None
    numbers = np.zeros(frame.height, np.int64)
    for array, low, span in zip(arrays, lows, spans, strict=True):
        numbers *= span
        numbers += array
        numbers -= low
    return _Packed(numbers, lows, spans)


def _covers(known: pl.Series, asked: pl.Series) -> bool:
    return asked.unique().is_in(known.implode()).all()


def with_text_ids(log: InteractionLog) -> InteractionLog:
    """
    The log with strings for ids, so that its rows can stand beside those of another.

    Args:
        log ([`InteractionLog`]):
            The log.

    Returns:
        [`InteractionLog`]: sorted by the new ids.
    """
    ids = pl.col("user_id", "item_id").cast(pl.String)
    interactions = log.interactions.with_columns(ids).sort("user_id", "timestamp", "item_id")
    if "impressions" in interactions.columns:
        interactions = interactions.with_columns(pl.col("impressions").cast(pl.List(pl.String)))
    items = log.items.with_columns(pl.col("item_id").cast(pl.String)).sort("item_id")
    return replace(log, interactions=interactions, items=items)
