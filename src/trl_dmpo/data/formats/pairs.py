"""TRL's preference pairs, which become one row for each prompt and chosen answer."""

import ast
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..schema import as_list, find_problem, is_message_list
from .records import Outcome


LOOKS = "TRL preference pairs (prompt, chosen, rejected: one answer)"

# What the chat template sees beside the messages: where it differs, so does the prompt
_CONTEXT = ("prompt", "chosen", "tools", "chat_template_kwargs")


def recognise(record: Mapping[str, Any]) -> bool:
    rejected = record.get("rejected")
    return "chosen" in record and (isinstance(rejected, str) or is_message_list(rejected))


def read(records: Sequence[Mapping[str, Any]], notes: Counter[str]) -> Iterator[Outcome]:
    """One row for all pairs that share prompt and chosen answer, in the order in which they first appear."""
    if all(_is_list_as_text(record.get("rejected")) for record in records):
        raise ValueError(
            "`rejected` holds lists written as text, which is what a CSV file makes of them. Save the rows as JSON lines or "
            "parquet."
        )
    groups: dict[str, tuple[int, dict[str, Any]]] = {}
    seen: set[tuple[str, str]] = set()
    differing: set[str] = set()
    for index, record in enumerate(records):
        pair = _without_repeated_prompt(record)
        problem = find_problem(pair)
        if problem is not None:
            yield index, problem
            continue
        key = _key([pair.get(column) for column in _CONTEXT])
        _, row = groups.setdefault(key, (index, {**pair, "rejected": []}))
        for rejected in as_list(pair["rejected"]):
            if (key, _key(rejected)) in seen:
                notes["pairs given twice, kept once"] += 1
            else:
                seen.add((key, _key(rejected)))
                row["rejected"].append(rejected)
        differing |= {
            column
            for column in pair.keys() | row.keys()
            if column != "rejected" and pair.get(column) != row.get(column)
        }
    for column in sorted(differing):
        notes[f"column {column!r}, left out as it differs between the pairs of a row"] += 1
    for index, row in groups.values():
        yield index, {column: value for column, value in row.items() if column not in differing}


def _is_list_as_text(rejected: Any) -> bool:
    try:
        return isinstance(rejected, str) and isinstance(ast.literal_eval(rejected), list)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return False


def _without_repeated_prompt(pair: Mapping[str, Any]) -> dict[str, Any]:
    """Without `prompt` where it is only the text of the message that the conversations begin with."""
    prompt, chosen = pair.get("prompt"), pair.get("chosen")
    turns: list[dict] = chosen if isinstance(chosen, list) and is_message_list(chosen) else []
    if any(turn["role"] == "user" and turn.get("content") == prompt for turn in turns):
        return {column: value for column, value in pair.items() if column != "prompt"}
    return dict(pair)


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
