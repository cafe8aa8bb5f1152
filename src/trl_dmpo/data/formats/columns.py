"""Rows whose rejected answers are columns of their own: rejected_1, rejected_2, ..."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .records import Outcome, convert_each, others


LOOKS = "columns of rejected answers (prompt, chosen, rejected_1, rejected_2, ...)"

_NUMBERED = re.compile(r"rejected_?(\d+)")


def recognise(record: Mapping[str, Any]) -> bool:
    return "chosen" in record and any(_NUMBERED.fullmatch(column) for column in record)


def read(records: Sequence[Mapping[str, Any]], notes: Counter[str]) -> Iterator[Outcome]:
    """One row a record. Columns without a value are how a record says that it has fewer answers."""
    return convert_each(records, _convert)


def _convert(record: Mapping[str, Any]) -> dict[str, Any]:
    numbers = {column: int(found[1]) for column in record if (found := _NUMBERED.fullmatch(column))}
    if "rejected" in record:
        numbers["rejected"] = -1
    columns = sorted(numbers, key=numbers.__getitem__)
    values = [record[column] for column in columns]
    return {
        **others(record, *columns),
        "rejected": [value for value in values if value and not (isinstance(value, str) and not value.strip())],
    }
