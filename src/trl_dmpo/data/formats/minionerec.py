"""MiniOneRec: a history and the next item, lists written as strings. It has no negatives, so they are drawn here."""

import ast
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from numbers import Real
from random import Random
from typing import Any

from ..prompts import Case, Domain, NextItem
from ..seeding import make_keys, uniforms
from .records import Outcome, Unusable, as_items, get, get_titles, one_line, others


LOOKS = "MiniOneRec (history_item_title, item_title)"


def recognise(record: Mapping[str, Any]) -> bool:
    return {"history_item_title", "item_title"} <= record.keys()


def read(
    records: Sequence[Mapping[str, Any]],
    notes: Counter[str],
    chat: bool = False,
    domain: str | Domain = "item",
    negatives: int | None = None,
    seed: int = 0,
) -> Iterator[Outcome]:
    """One row a record, with titles of the file that its user has in none of the records."""
    if negatives is None:
        raise ValueError(
            f"{LOOKS} has no rejected answers. Set `negatives` to how many of its titles a row is to draw."
        )
    form = NextItem(domain=domain, chat=chat)
    parsed: dict[int, list[str]] = {}
    for index, record in enumerate(records):
        try:
            _require_name_of_user(record)
            titles = get_titles(record, "history_item_title", _parse_list)
            parsed[index] = [*titles, one_line(get(record, "item_title"))]
        except Unusable as error:
            yield index, error.problem
    taken = _find_taken(records, parsed)
    catalogue = sorted(set().union(*parsed.values()))
    for index, (*history, title) in parsed.items():
        rejected = _draw(catalogue, taken[_user(records[index], index)], negatives, seed, index)
        if not rejected:
            yield index, Unusable("no title to draw", "item_title", "the user has all titles; remove the row").problem
            continue
        if len(rejected) < negatives:
            notes[f"rows with fewer than {negatives} negatives, as the user has most titles"] += 1
        (target,) = as_items([title])
        # With one wording and nothing listed the form draws nothing
        text = form.write(Case(as_items(history), [], target, True, as_items(rejected), Random(0)))
        yield index, {**text._asdict(), **others(records[index], "history_item_title", "item_title")}


def _parse_list(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise Unusable(
            "not a list", "history_item_title", f"{text[:60]!r} is not a list of strings as Python writes it; mend it"
        ) from error


def _require_name_of_user(record: Mapping[str, Any]) -> None:
    user = record.get("user_id")
    if not isinstance(user, str | Real | None):
        detail = f"expected a string or a number, got {type(user).__name__}; mend it"
        raise Unusable("wrong type", "user_id", detail)


def _user(record: Mapping[str, Any], index: int) -> Any:
    """Whose record it is; without a user it stands for itself."""
    user = record.get("user_id")
    return ("record", index) if user is None else user


def _find_taken(records: Sequence[Mapping[str, Any]], parsed: Mapping[int, list[str]]) -> Mapping[Any, set[str]]:
    taken: defaultdict[Any, set[str]] = defaultdict(set)
    for index, titles in parsed.items():
        taken[_user(records[index], index)].update(titles)
    return taken


def _draw(catalogue: list[str], taken: set[str], count: int, seed: int, index: int) -> list[str]:
    """`count` titles that are not in `taken`, all equally likely, or all there are."""
    key = make_keys(seed, index)
    if len(catalogue) - len(taken) <= 2 * count:
        eligible = [title for title in catalogue if title not in taken]
        order = uniforms(key, range(len(eligible))).argsort()
        return [eligible[place] for place in order[:count]]
    drawn: dict[str, None] = {}
    start = 0
    while len(drawn) < count:
        numbers = uniforms(key, range(start, start + 2 * count))
        drawn.update(
            dict.fromkeys(title for u in numbers if (title := catalogue[int(u * len(catalogue))]) not in taken)
        )
        start += 2 * count
    return list(drawn)[:count]
