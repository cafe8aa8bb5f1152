"""What all forms of prompts have in common: options, layouts of lists, and the checks that keep answers apart."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

from .case import Case, Draws, Item, Text, Written
from .domains import Domain, find_domain


class Layout(NamedTuple):
    """How a list is written: what stands before, between and after its entries, and what stands for an empty one."""

    before: str
    between: str
    after: str = ""
    empty: str = "(none)"

    def mark(self, label: str) -> str:
        return f"{self.before}{label}{self.after}"

    def join(self, labels: list[str]) -> str:
        if not labels:
            return self.empty
        return self.mark(f"{self.after}{self.between}{self.before}".join(labels))


LINES = Layout("- ", "\n")
QUOTES = Layout('"', ", ", '"')
SEMICOLONS = Layout("", "; ")
ORDER = Layout("", " > ")


class Wording(NamedTuple):
    """
    One way to put a form's question.

    Args:
        prompt (`str`):
            The question, with the fields that the form fills in and the words of [`Domain`].
        items (`Layout`):
            How items are listed.
        cue (`str`, *optional*):
            Last line of a prompt of plain text, which the answer goes on from. A chat needs none.
        candidates (`Layout`, *optional*):
            How candidates are listed, if not as `items`.
        order (`Layout`, *optional*):
            How an answer that is an order of items is written.
    """

    prompt: str
    items: Layout
    cue: str = ""
    candidates: Layout | None = None
    order: Layout = ORDER


@dataclass(frozen=True, kw_only=True)
class Form:
    """
    A form of prompt. What it is written from is said by class attributes, which `build_dataset` reads:

    - `history`: `"liked"`, or `"rated"` if it takes all earlier items with their ratings;
    - `disliked`: whether it names items that were not liked;
    - `targets`: `"liked"`, or `"all"` if anything that was taken can be asked about;
    - `negatives`: whether it tells the target from negatives;
    - `listed`: whether the prompt names the candidates.

    A subclass adds `write(case)`.

    Args:
        domain (`str` or [`Domain`], *optional*, defaults to `"item"`):
            Words for the items: a key of `DOMAINS`, or words of your own.
        features (`tuple[str, ...]`, *optional*, defaults to `()`):
            Columns of the items to show beside a title in the prompt: `"Heat (1995; Action, Crime)"`. Answers are bare
            titles.
        chat (`bool`, *optional*, defaults to `False`):
            Whether to write messages. If not, the prompt ends without a space, and answers begin with one.

    Raises:
        `ValueError`: there is no such domain.
    """

    domain: str | Domain = "item"
    features: tuple[str, ...] = ()
    chat: bool = False

    history: ClassVar[str] = "liked"
    disliked: ClassVar[bool] = False
    targets: ClassVar[str] = "liked"
    negatives: ClassVar[bool] = True
    listed: ClassVar[bool] = False

    def __post_init__(self) -> None:
        find_domain(self.domain)
        if isinstance(self.features, str):
            raise ValueError(f"`features` is {self.features!r}; give a list of columns, such as [{self.features!r}].")
        object.__setattr__(self, "features", tuple(self.features))

    def write(self, case: Case) -> Text:
        """
        The text of a row.

        Args:
            case ([`Case`]):
                What to write about.

        Returns:
            [`Text`]

        Raises:
            `ValueError`: a feature is not there, or the answers cannot be told apart.
        """
        raise NotImplementedError

    def answer(self, item: Item) -> Written | None:
        """
        The answer that names an item.

        Args:
            item (`Mapping`):
                The item.

        Returns:
            `str` or `list[dict]`: what `write` has for it in `chosen` or `rejected`. `None` if answers do not name one item.
        """
        return None

    @cached_property
    def _words(self) -> dict[str, str]:
        return asdict(find_domain(self.domain))

    def _fill(self, template: str, **texts: str) -> str:
        # The only time that anything is formatted: what stands in `texts` is data, braces and all
        return template.format_map({**self._words, **texts})

    def _ask(self, question: str) -> Written:
        return [{"role": "user", "content": question}] if self.chat else question

    def _reply(self, answer: str) -> Written:
        return [{"role": "assistant", "content": answer}] if self.chat else f" {answer}"

    def _label(self, item: Item) -> str:
        if not self.features:
            return item["title"]
        shown = [text for name in self.features if (text := _feature_text(item, name))]
        return f"{item['title']} ({'; '.join(shown)})" if shown else item["title"]

    def _list(self, items: Iterable[Item], layout: Layout) -> str:
        if self.features:
            return layout.join([self._label(item) for item in items])
        return layout.join([item["title"] for item in items])


@dataclass(frozen=True, kw_only=True)
class WordedForm(Form):
    """
    A form that brings its own wordings: three of the house, and that of a paper where there is one.

    Args:
        wording (`str`, *optional*, defaults to `"lines"`):
            Which: `"lines"` (one item a line), `"quotes"`, `"semicolons"`, or `"any"` of these three, drawn for each row;
            or that of a paper, see the form.

    Raises:
        `ValueError`: there is no such wording.
    """

    wording: str = "lines"

    WORDINGS: ClassVar[dict[str, Wording]]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.wording != "any" and self.wording not in self.WORDINGS:
            names = ", ".join([*self.WORDINGS, "any"])
            raise ValueError(
                f"`wording`: there is no {self.wording!r}, only: {names}. For words of your own, see `Template`."
            )

    @cached_property
    def _wordings(self) -> list[Wording]:
        names = ("lines", "quotes", "semicolons") if self.wording == "any" else (self.wording,)
        wordings = [self.WORDINGS[name] for name in names]
        if self.chat:
            return wordings
        return [each._replace(prompt=f"{each.prompt}\n{each.cue}") if each.cue else each for each in wordings]

    def _choose(self, draws: Draws) -> Wording:
        wordings = self._wordings
        return wordings[0] if len(wordings) == 1 else wordings[int(draws.random() * len(wordings))]


def _feature_text(item: Item, name: str) -> str:
    if name not in item:
        have = [key for key in item if key not in ("item_id", "title", "rating")]
        raise ValueError(f"`features`: items have no {name!r}, only: {', '.join(map(str, have)) or 'titles'}.")
    value: Any = item[name]
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)


def distinct_titles(items: list[Item]) -> list[str]:
    """The titles of candidates, which must differ: an answer names an item by its title."""
    titles = [item["title"] for item in items]
    if len(set(titles)) < len(titles):
        repeated = next(title for index, title in enumerate(titles) if title in titles[:index])
        raise ValueError(
            f"two of the candidates are titled {repeated!r}, so no answer can tell them apart. Give items distinct titles, "
            "for instance with the year, or leave one of them out."
        )
    return titles


def shuffled(count: int, draws: Draws) -> list[int]:
    """The numbers below `count` in random order."""
    return sorted(range(count), key=lambda _: draws.random())


def candidates_of(case: Case) -> list[Item]:
    """Target and negatives, for a prompt that lists them."""
    if not case.negatives:
        raise ValueError(f"there is no negative to list beside {case.target['title']!r}. Leave the row out.")
    return [case.target, *case.negatives]


NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def number_word(count: int) -> str:
    """`count` as running text has it: "two", "20"."""
    return NUMBERS[count] if count < len(NUMBERS) else str(count)
