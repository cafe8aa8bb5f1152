"""What the readers of formats share: values of a record, and answers as text or as messages."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from ..schema import Problem


class Unusable(Exception):
    """A record that no row can be made of."""

    def __init__(self, reason: str, column: str, detail: str):
        super().__init__(detail)
        self.problem = Problem(reason, column, detail)


Outcome = tuple[int, dict[str, Any] | Problem]
"""The place of a record, and its row, or why there is none."""


def convert_each(records: Sequence[Mapping[str, Any]], convert: Callable[[Any], dict[str, Any]]) -> Iterator[Outcome]:
    """Each record's outcome, for a format that makes one row of each record."""
    for index, record in enumerate(records):
        try:
            yield index, convert(record)
        except Unusable as error:
            yield index, error.problem


def get(record: Mapping[str, Any], column: str, kind: type | tuple[type, ...] = str) -> Any:
    """A value that must be there, be of `kind`, and not be blank."""
    if column not in record:
        have = ", ".join(sorted(map(str, record)))
        raise Unusable("missing column", column, f"there is no such column, only: {have}; rename or add it")
    value = record[column]
    if value is None or (isinstance(value, str) and not value.strip()):
        raise Unusable("no value", column, "the value is missing; fill it in or remove the row")
    if not isinstance(value, kind):
        names = " or ".join(each.__name__ for each in (kind if isinstance(kind, tuple) else (kind,)))
        raise Unusable("wrong type", column, f"expected {names}, got {type(value).__name__}; mend it")
    return value


def get_titles(record: Mapping[str, Any], column: str, parse: Callable[[str], Any]) -> list[str]:
    """A list of titles, none blank, that may also be one string, which `parse` takes apart."""
    value = get(record, column, (list, str))
    titles = parse(value) if isinstance(value, str) else value
    if not isinstance(titles, list) or not all(isinstance(title, str) and title.strip() for title in titles):
        raise Unusable("wrong type", column, "expected a list of titles, none of them blank; mend it")
    if not titles:
        raise Unusable("no value", column, "the list is empty; fill it in or remove the row")
    return [one_line(title) for title in titles]


def as_items(titles: Iterable[str]) -> list[Mapping[str, Any]]:
    """Titles as the items that a form writes about."""
    return [{"title": title} for title in titles]


def one_line(title: str) -> str:
    """`title` without line breaks, which would end it where titles are listed one a line."""
    return " ".join(title.split())


def others(record: Mapping[str, Any], *used: str) -> dict[str, Any]:
    """The columns that a format does not use, which are kept."""
    return {column: value for column, value in record.items() if column not in used}


def as_prompt(text: str, chat: bool) -> Any:
    """`text` as a message, or as text without space at its end."""
    return [{"role": "user", "content": text}] if chat else text.rstrip()


def as_answer(text: str, chat: bool) -> Any:
    """`text` as a message, or as text with the space that sets it off from the prompt."""
    text = text.strip()
    return [{"role": "assistant", "content": text}] if chat else f" {text}"
