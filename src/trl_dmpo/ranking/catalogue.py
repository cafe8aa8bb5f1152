"""The items that can be recommended: checked once, found by id or by title."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from numbers import Integral
from typing import Any

import polars as pl


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Catalogue:
    """
    Items, in order. Made by [`make_catalogue`], which sees to all that is promised here.

    Args:
        frame (`pl.DataFrame`):
            One row per item: `item_id` (integers or strings, each once), `title` (not blank), and any features.
    """

    frame: pl.DataFrame

    @cached_property
    def ids(self) -> list:
        return self.frame["item_id"].to_list()

    @cached_property
    def titles(self) -> list[str]:
        return self.frame["title"].to_list()

    @cached_property
    def items(self) -> list[dict]:
        """The rows, as prompts are written from them."""
        return self.frame.to_dicts()

    @cached_property
    def _place(self) -> dict[Any, int]:
        return {item_id: place for place, item_id in enumerate(self.ids)}

    @cached_property
    def _places(self) -> dict[str, list[int]]:
        places: dict[str, list[int]] = {}
        for place, title in enumerate(self.titles):
            places.setdefault(title, []).append(place)
        return places

    def places(self, item: Any) -> list[int]:
        """
        Where the item is that `item` names, an id or else a title. Several places if several items have this title, none if
        there is no such title.

        Raises:
            `ValueError`: `item` is an integer and no id, or neither a text nor an integer.
        """
        if isinstance(item, Integral):
            item = int(item)
        if isinstance(item, (str, int)) and item in self._place:
            return [self._place[item]]
        if isinstance(item, str):
            return self._places.get(item, [])
        raise ValueError(f"the catalogue has no item of the id {item!r}. Give an id of the catalogue, or a title.")

    def known_places(self, item: Any) -> list[int]:
        """As [`~Catalogue.places`], for what must be in the catalogue."""
        places = self.places(item)
        if not places:
            raise ValueError(f"the catalogue has no item {item!r}.{self.hint(item)}")
        return places

    def place(self, item: Any) -> int:
        """As [`~Catalogue.known_places`], for what must be one item."""
        places = self.known_places(item)
        if len(places) == 1:
            return places[0]
        ids = ", ".join(repr(self.ids[place]) for place in places)
        raise ValueError(f"several items of the catalogue are titled {item!r}. Give the id of one, of: {ids}.")

    def distinct_places(self, items: Sequence[Any]) -> list[int]:
        """
        Where each of some items is.

        Raises:
            `ValueError`: there are none, one is there twice, or as of [`~Catalogue.place`].
        """
        if not len(items):
            raise ValueError("there are none. Give at least one item.")
        places = [self.place(item) for item in items]
        if len(set(places)) < len(places):
            twice = next(item for index, item in enumerate(items) if places[index] in places[:index])
            raise ValueError(f"{twice!r} is there twice. Leave one out.")
        return places

    def hint(self, title: str) -> str:
        """A title that was perhaps meant."""
        close = get_close_matches(title, self._places, n=1)
        return f" Did you mean {close[0]!r}?" if close else ""

    def read(self, history: Iterable[Any], unknown: list[str]) -> list[dict]:
        """The items of a history. Titles that are not in the catalogue are items without features, and go to `unknown`."""
        items = []
        for item in history:
            places = self.places(item)
            if not places:
                unknown.append(item)
            items.append(self.items[places[0]] if places else {**self._without_features, "title": item})
        return items

    @cached_property
    def _without_features(self) -> dict[str, None]:
        return dict.fromkeys(self.frame.columns)

    @cached_property
    def _warned(self) -> set[str]:
        return set()

    def warn_of(self, unknown: Iterable[str]) -> None:
        """One warning, whatever the number of titles that are not in the catalogue, and once of each title."""
        unknown = [title for title in dict.fromkeys(unknown) if title not in self._warned]
        self._warned.update(unknown)
        if unknown:
            others = len(unknown) - 1
            more = f" Nor has it {others} other titles of histories." if others else ""
            logger.warning(
                f"The catalogue has no {unknown[0]!r}, which is in a history: it is in the prompt as it stands."
                f"{self.hint(unknown[0])}{more}"
            )


def make_catalogue(catalogue: Any) -> Catalogue:
    """
    A checked catalogue.

    Args:
        catalogue (`pl.DataFrame`, [`~datasets.Dataset`] or `list[str]`):
            Items with `item_id`, `title` and any features; or titles, which are then the ids.

    Returns:
        [`Catalogue`]

    Raises:
        `ValueError`: a column is missing, an id or title is missing or an id repeated, or there are fewer than two items.

    Example:

    ```python
    >>> from trl_dmpo.ranking.catalogue import make_catalogue

    >>> films = make_catalogue(["Heat", "Red Heat", "Big"])
    >>> films.place("Red Heat")
    1
    >>> films.place("Red Haet")
    Traceback (most recent call last):
    ValueError: the catalogue has no item 'Red Haet'. Did you mean 'Red Heat'?
    ```
    """
    frame = _as_frame(catalogue)
    missing = [column for column in ("item_id", "title") if column not in frame.columns]
    if missing:
        raise ValueError(
            f"`catalogue`: there is no column {missing[0]!r}, only: {', '.join(frame.columns)}. Rename or add it."
        )
    if frame.height < 2:
        raise ValueError(
            f"`catalogue`: it has {frame.height} rows, which leave nothing to choose. Give at least two items."
        )
    _check_values(frame)
    return Catalogue(frame)


def _as_frame(catalogue: Any) -> pl.DataFrame:
    if isinstance(catalogue, pl.DataFrame):
        return catalogue
    if hasattr(catalogue, "with_format"):  # a `datasets.Dataset`
        return pl.from_arrow(catalogue.with_format("arrow")[:])  # type: ignore[return-value]
    if isinstance(catalogue, Sequence) and all(isinstance(title, str) for title in catalogue):
        return pl.DataFrame({"item_id": list(catalogue), "title": list(catalogue)}, schema_overrides=_TEXTS)
    kind = "mapping" if isinstance(catalogue, Mapping) else type(catalogue).__name__
    raise ValueError(
        f"`catalogue` is a {kind}; give a polars frame or a `datasets.Dataset` with `item_id` and `title`, or a list of "
        "titles."
    )


_TEXTS = {"item_id": pl.String, "title": pl.String}


def _check_values(frame: pl.DataFrame) -> None:
    ids, titles = frame["item_id"], frame["title"]
    if not (ids.dtype.is_integer() or ids.dtype == pl.String):
        raise ValueError(f"`catalogue`: `item_id` is {ids.dtype}; make it integers or strings.")
    if titles.dtype != pl.String:
        raise ValueError(f"`catalogue`: `title` is {titles.dtype}; make it strings.")
    bad = {
        "has no `item_id`": ids.is_null(),
        "has no title": titles.is_null() | (titles.str.strip_chars() == ""),
        "repeats an earlier `item_id`": ~ids.is_first_distinct(),
    }
    for what, mask in bad.items():
        places = mask.fill_null(False).arg_true()
        if len(places):
            row = frame.row(places[0], named=True)
            others = f"; {len(places) - 1} others, too" if len(places) > 1 else ""
            raise ValueError(
                f"`catalogue`: row {places[0]} (item_id {row['item_id']!r}, title {row['title']!r}) {what}{others}. Mend it, or "
                "leave the row out."
            )
