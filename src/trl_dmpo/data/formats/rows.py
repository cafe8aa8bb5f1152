"""Rows that are in the form of the trainer already."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..schema import as_list, is_message_list
from .records import Outcome


LOOKS = "rows of the trainer (prompt, chosen, rejected: a list)"


def recognise(record: Mapping[str, Any]) -> bool:
    rejected = record.get("rejected")
    return "chosen" in record and isinstance(rejected, list) and not is_message_list(rejected)


def read(records: Sequence[Mapping[str, Any]], notes: Counter[str]) -> Iterator[Outcome]:
    """Each record as it is, but that a bare rejected answer becomes a list of one."""
    for index, record in enumerate(records):
        rejected = {"rejected": as_list(record["rejected"])} if "rejected" in record else {}
        yield index, {**record, **rejected}
