"""
The DMPO paper's files: a history and two titles to rank.

    You are an assistant working on movie recommendations. Here is the user's history of movies they have watched:
    <Title:Babe>  <Title:Big> . Rank the likelihood of the user watching the two movies  <Title:Heat>  and  <Title:Antz> .

(on one line). The answer is an order of the two, ` <Title:Antz> ,  <Title:Heat> `: the right one alone, or a list of the
right one and the wrong one.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from .records import Outcome, Unusable, as_answer, as_prompt, convert_each, get, others


LOOKS = "DMPO paper (instruction, input, output: orders of two titles)"

_FORM = re.compile(
    r"(?P<opening>.*?:) (?P<history> <Title:.*> )\. "
    r"Rank the likelihood of the user (?P<doing>[^<>]+?) the two (?P<things>[^<>]+?) (?P<first> <Title:.*> ) and "
    r"(?P<second> <Title:.*> )\.",
    re.DOTALL,
)


class Ranking(NamedTuple):
    """The parts of an instruction. Titles are as they stand there, with the space around them."""

    opening: str
    history: list[str]
    doing: str
    things: str
    pair: tuple[str, str]

    @property
    def text(self) -> str:
        """The instruction."""
        first, second = map(_mark, self.pair)
        return f"{self.told} Rank the likelihood of the user {self.doing} the two {self.things} {first} and {second}."

    @property
    def told(self) -> str:
        """Its beginning, which tells the history."""
        return f"{self.opening} {''.join(map(_mark, self.history))}."

    @property
    def orders(self) -> tuple[str, str]:
        """The two answers, first the order in which the instruction names the titles."""
        first, second = map(_mark, self.pair)
        return f"{first}, {second}", f"{second}, {first}"


def _mark(title: str) -> str:
    return f" <Title:{title}> "


def parse(instruction: str) -> Ranking | None:
    """The parts of an instruction, `None` if it is not of this form."""
    found = _FORM.fullmatch(instruction)
    if found is None:
        return None
    titles = found["history"][len(" <Title:") : -len("> ")].split(">  <Title:")
    pair = found["first"][len(" <Title:") : -len("> ")], found["second"][len(" <Title:") : -len("> ")]
    return Ranking(found["opening"], titles, found["doing"], found["things"], pair)


def recognise(record: Mapping[str, Any]) -> bool:
    return {"instruction", "output"} <= record.keys() and parse(str(record["instruction"])) is not None


def read(
    records: Sequence[Mapping[str, Any]], notes: Counter[str], chat: bool = False, grouped: bool = False
) -> Iterator[Outcome]:
    """One row a record; or, `grouped`, one row for all that share history and chosen title."""
    return _read_grouped(records, notes, chat) if grouped else convert_each(records, lambda each: _convert(each, chat))


def _convert(record: Mapping[str, Any], chat: bool) -> dict[str, Any]:
    ranking, place = _understand(record)
    # As text they begin with a space already, and are kept to the letter
    orders = [as_answer(order, chat) if chat else order for order in ranking.orders]
    return {
        "prompt": as_prompt(ranking.text, chat),
        "chosen": orders[place],
        "rejected": [orders[1 - place]],
        "candidates": orders,
        **others(record, "instruction", "input", "output"),
    }


def _understand(record: Mapping[str, Any]) -> tuple[Ranking, int]:
    """The parts of the instruction, and which of its two titles is the chosen one."""
    ranking = parse(get(record, "instruction"))
    if ranking is None or record.get("input"):
        column = "input" if ranking else "instruction"
        raise Unusable("not of the paper's form", column, f"the text is not of the form of {LOOKS}; mend it")
    output = get(record, "output", (str, list))
    orders = [output] if isinstance(output, str) else output
    if ranking.pair[0].strip() == ranking.pair[1].strip():
        raise Unusable("two equal titles", "instruction", f"both titles are {ranking.pair[0]!r}; remove the row")
    known = orders in ([each] for each in ranking.orders) or sorted(map(str, orders)) == sorted(ranking.orders)
    if not known:
        raise Unusable(
            "not an order of the two titles",
            "output",
            "expected the two titles of the instruction in one order, or a list of their two orders; mend it",
        )
    return ranking, ranking.orders.index(orders[0])


def _read_grouped(records: Sequence[Mapping[str, Any]], notes: Counter[str], chat: bool) -> Iterator[Outcome]:
    groups: dict[tuple, tuple[int, Ranking, list[str]]] = {}
    for index, record in enumerate(records):
        try:
            ranking, place = _understand(record)
        except Unusable as error:
            yield index, error.problem
            continue
        chosen, rejected = ranking.pair[place].strip(), ranking.pair[1 - place].strip()
        _, _, titles = groups.setdefault((ranking.told, ranking.things, chosen), (index, ranking, [chosen]))
        if rejected in titles:
            notes["titles rejected twice in a group, kept once"] += 1
        else:
            titles.append(rejected)
    for index, ranking, titles in groups.values():
        yield index, _make_row(ranking, titles, chat)


def _make_row(ranking: Ranking, titles: list[str], chat: bool) -> dict[str, Any]:
    # In alphabetical order the place of a title says nothing about which is the chosen one
    listed = sorted(titles)
    text = (
        f"{ranking.told} Which of these {ranking.things} has the highest likelihood of the user {ranking.doing} it? "
        f"{''.join(map(_mark, listed))} Answer with its title."
    )
    chosen, *rejected = (as_answer(title, chat) for title in titles)
    return {
        "prompt": as_prompt(text if chat else f"{text} Answer:", chat),
        "chosen": chosen,
        "rejected": rejected,
        "candidates": [as_answer(title, chat) for title in listed],
    }
