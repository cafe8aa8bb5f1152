"""Where titles stand in a text."""

import unicodedata
from collections.abc import Iterator, Sequence
from typing import NamedTuple


# How the names of characters begin of which words are written without spaces between them, or with particles at their ends
_WITHOUT_SPACES = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "HANGUL")


class Mention(NamedTuple):
    """
    A title in a text.

    Args:
        start (`int`):
            Where it begins, in characters.
        end (`int`):
            Where it ends.
        title (`int`):
            Which of the titles.
    """

    start: int
    end: int
    title: int


def find_mentions(text: str, titles: Sequence[str]) -> list[Mention]:
    """
    Every place where a title stands, also those within another title.

    A title is found as it is written, and as a whole: "Heat" is not in "Heather". It is in "Red Heat", so of mentions that
    overlap, take the longest where only one can be meant. Chinese, Japanese, Thai, Lao, Khmer and Burmese put no space
    between words, nor Korean between a word and its particles, and have no such borders.

    Args:
        text (`str`):
            The text.
        titles (`Sequence[str]`):
            What to look for.

    Returns:
        `list[Mention]`: from left to right, of those that begin together the longest first.

    Example:

    ```python
    >>> from trl_dmpo.ranking.mentions import find_mentions

    >>> find_mentions("Heather saw Red Heat.", ["Heat", "Red Heat"])
    [Mention(start=12, end=20, title=1), Mention(start=16, end=20, title=0)]
    ```
    """
    mentions = [
        Mention(start, start + len(title), number)
        for number, title in enumerate(titles)
        for start in _starts(text, title)
        if not _are_joined(text[start - 1 : start + 1])
        and not _are_joined(text[start + len(title) - 1 : start + len(title) + 1])
    ]
    return sorted(mentions, key=lambda mention: (mention.start, -mention.end, mention.title))


def longest_mentions(mentions: Sequence[Mention]) -> list[Mention]:
    """
    Mentions that do not overlap: of those that do, the longest, and of equally long ones the first.

    Args:
        mentions (`Sequence[Mention]`):
            Mentions in one text.

    Returns:
        `list[Mention]`: from left to right.

    Example:

    ```python
    >>> from trl_dmpo.ranking.mentions import find_mentions, longest_mentions

    >>> longest_mentions(find_mentions("He saw Red Heat.", ["Heat", "Red Heat"]))
    [Mention(start=7, end=15, title=1)]
    ```
    """
    kept: list[Mention] = []
    for mention in sorted(mentions, key=lambda each: (each.start - each.end, each.start, each.title)):
        if all(mention.end <= other.start or other.end <= mention.start for other in kept):
            kept.append(mention)
    return sorted(kept)


def _starts(text: str, title: str) -> Iterator[int]:
    start = text.find(title)
    while title and start >= 0:
        yield start
        start = text.find(title, start + 1)


def _are_joined(pair: str) -> bool:
    """Whether two characters belong to one word."""
    return len(pair) == 2 and all(
        character.isalnum() and not unicodedata.name(character, "").startswith(_WITHOUT_SPACES) for character in pair
    )
