"""A sentence from the model itself, and which of the titles that it names there are."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ...data.prompts.domains import find_domain
from ..generation import generate_answers
from ..mentions import Mention, find_mentions, longest_mentions


if TYPE_CHECKING:
    from ..recommender import Recommender


_MAX_NEW_TOKENS = 80
_QUESTION = """I have {past} these {plural}, the latest last:
{history}

You recommend "{item}" to me. Say in one sentence why, and name those of my {plural} that it follows from. \
Put every {name} in double quotes."""

# Single quotes are also apostrophes, so they count where no word goes on. Asterisks are Markdown's
_QUOTES = re.compile(
    r"""\"([^"\n]+)\"|“([^”\n]+)”|„([^“”\n]+)[“”]|«([^»\n]+)»|「([^」\n]+)」|『([^』\n]+)』|《([^》\n]+)》"""
    r"""|(?<!\w)'([^\n]+?)'(?!\w)|‘([^\n]+?)’(?!\w)|\*+([^*\n]+)\*+"""
)
_YEAR = re.compile(r"\s*\(\d{4}\)$")
# What may stand beside a title within its quotes: "Heat," and, in Markdown, **"Heat"**
_AROUND = ' "“”.,;:!?'


class Named(NamedTuple):
    """
    A title that a sentence names.

    Args:
        title (`str`):
            The title, as the history or the catalogue has it; or what is named, if neither has it.
        where (`str`):
            `"history"`, `"catalogue"` or `"unknown"`.
    """

    title: str
    where: str


class Sentence(NamedTuple):
    """
    What a model says about its recommendation.

    Args:
        text (`str`):
            Its words, as they are.
        named (`list[Named]`):
            The titles that they name, each once, in this order.
    """

    text: str
    named: list[Named]

    @property
    def unknown(self) -> list[str]:
        """Titles that are in neither the history nor the catalogue."""
        return [each.title for each in self.named if each.where == "unknown"]


def check_can_chat(tokenizer: Any) -> None:
    """Raise `ValueError` if a model cannot be asked for a sentence."""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "`sentence`: the tokenizer has no chat template, so the model cannot be asked why. Leave the sentence out."
        )


def write_sentence(
    recommender: "Recommender", history: Sequence[str], item: str, catalogue: Sequence[str]
) -> Sentence:
    """
    Ask a chat model why it recommends an item, and check the titles in its answer.

    It is the likeliest answer, of 80 tokens at most. It is no look into the model: a sentence that is grounded need not be
    the reason, see the attributions for that.

    Args:
        recommender ([`Recommender`]):
            What recommends.
        history (`Sequence[str]`):
            Titles of the user's items.
        item (`str`):
            Title of the recommended item.
        catalogue (`Sequence[str]`):
            Titles of all items.

    Returns:
        [`Sentence`]
    """
    words = vars(find_domain(recommender.form.domain))
    listed = "\n".join(f'- "{title}"' for title in history)
    question = _QUESTION.format_map({**words, "history": listed, "item": item})
    model, tokenizer = recommender.scorer.model, recommender.scorer.tokenizer
    (text,) = generate_answers(model, tokenizer, [[{"role": "user", "content": question}]], _MAX_NEW_TOKENS)
    return check_grounding(text.strip(), history, catalogue)


def check_grounding(text: str, history: Sequence[str], catalogue: Sequence[str]) -> Sentence:
    """
    Find the titles that a text names.

    - A title of the history or the catalogue, as a whole and as it is written; of titles that overlap, the longest. A year in
      parentheses at its end may be missing, but not be another one.
    - What stands in quotes or between asterisks. There, case does not matter. What has a capital letter, a digit or a letter
      of a script without capitals besides the titles in it is an unknown title.

    So a made-up title that is not in quotes is not seen, and a word that is also a title ("Big" at the start of a sentence)
    is taken for one.

    Args:
        text (`str`):
            The text.
        history (`Sequence[str]`):
            Titles of the user's items.
        catalogue (`Sequence[str]`):
            Titles of all items.

    Returns:
        [`Sentence`]

    Example:

    ```python
    >>> from trl_dmpo.ranking.explain.grounding import check_grounding

    >>> said = 'As you liked "red heat" and "Heat 2", try Big, a "fun" one.'
    >>> check_grounding(said, ["Red Heat"], ["Red Heat", "Heat", "Big"]).named
    [Named(title='Red Heat', where='history'), Named(title='Heat 2', where='unknown'), Named(title='Big', where='catalogue')]
    ```
    """
    known = _names(history, catalogue)
    names = list(known)
    numbers = {_key(name): number for number, name in reversed(list(enumerate(names)))}
    quotes = [match.span(match.lastindex or 0) for match in _QUOTES.finditer(text)]
    quoted = [(span, _find(text[slice(*span)], known, numbers)) for span in quotes]
    whole = [Mention(*span, number) for span, number in quoted if number is not None]
    mentions = longest_mentions([*whole, *find_mentions(text, names)])
    unknown = [span for span in quotes if _holds_more(text, span, mentions)]
    found = {span: Named(text[slice(*span)].strip(_AROUND), "unknown") for span in unknown}
    for mention in mentions:
        if all(mention.end <= start or end <= mention.start for start, end in unknown):
            found[mention.start, mention.end] = known[names[mention.title]]
    return Sentence(text, list(dict.fromkeys(found[span] for span in sorted(found))))


def _names(history: Sequence[str], catalogue: Sequence[str]) -> dict[str, Named]:
    """What the titles may be called. Those that are called so in full come before those that are but for the year."""
    titles = {title: Named(title, "history") for title in history}
    titles |= {title: Named(title, "catalogue") for title in catalogue if title not in titles}
    names = dict(titles)
    for title, named in titles.items():
        names.setdefault(_YEAR.sub("", title), named)
    return names


def _find(quoted: str, known: dict[str, Named], numbers: dict[str, int]) -> int | None:
    """Which of the names is quoted. One with a year may also be that of a title without, but not of one with another year."""
    key = _key(quoted)
    if key in numbers:
        return numbers[key]
    number = numbers.get(_YEAR.sub("", key))
    return None if number is None or _YEAR.search(list(known.values())[number].title) else number


def _key(title: str) -> str:
    return title.strip(_AROUND).casefold()


def _holds_more(text: str, span: tuple[int, int], mentions: Sequence[Mention]) -> bool:
    """Whether something that reads like a title is left of what is quoted, the titles and a year taken out."""
    start, end = span
    left, place = "", start
    for mention in mentions:
        if mention.start < end and start < mention.end:
            left += text[place : max(place, mention.start)]
            place = max(place, mention.end)
    left += text[place:end]
    return any(character.isalnum() and not character.islower() for character in left)
