"""LLaRA and S-DPO: a history, listed candidates, and the one that was taken."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..prompts import Case, Domain, Form, NextItemFromList
from .records import Outcome, Unusable, as_items, convert_each, get, get_titles, one_line, others


LOOKS = "LLaRA or S-DPO (historyList, itemList, trueSelection)"


def recognise(record: Mapping[str, Any]) -> bool:
    return {"historyList", "itemList", "trueSelection"} <= record.keys()


def read(
    records: Sequence[Mapping[str, Any]], notes: Counter[str], chat: bool = False, domain: str | Domain = "item"
) -> Iterator[Outcome]:
    """One row a record: the listed candidates but the one taken are rejected."""
    form = NextItemFromList(domain=domain, wording="sdpo", chat=chat)
    return convert_each(records, lambda record: _convert(record, notes, form))


class _AsListed:
    """Stands for the random numbers that a form sorts the candidates by, so that it keeps the order of the file."""

    def __init__(self, places: list[int]):
        self.places = iter(places)

    def random(self) -> float:
        return next(self.places)


def _convert(record: Mapping[str, Any], notes: Counter[str], form: Form) -> dict[str, Any]:
    history = get_titles(record, "historyList", _split)
    listed = get_titles(record, "itemList", _split)
    chosen = one_line(get(record, "trueSelection"))
    distinct = list(dict.fromkeys(listed))
    if chosen not in distinct:
        raise Unusable(
            "chosen not among the candidates",
            "trueSelection",
            f"{chosen!r} is not in `itemList`; add it there or remove the row",
        )
    if len(distinct) == 1:
        raise Unusable("no rejected", "itemList", "it lists nothing but the chosen one; add others or remove the row")
    if len(distinct) < len(listed):
        notes["rows that list a candidate twice, kept once"] += 1
    place = distinct.index(chosen)
    places = [place, *(number for number in range(len(distinct)) if number != place)]
    target, *negatives = as_items(distinct[number] for number in places)
    text = form.write(Case(as_items(history), [], target, True, negatives, _AsListed(places)))
    candidates = [*text.rejected[:place], text.chosen, *text.rejected[place:]]
    kept = others(record, "historyList", "itemList", "trueSelection")
    return {**text._asdict(), "candidates": candidates, **kept}


def _split(joined: str) -> list[str]:
    return joined.split("::")
