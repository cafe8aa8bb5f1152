"""What a prompt is written about, and what is written."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, TypeAlias


Item: TypeAlias = Mapping[str, Any]
Written: TypeAlias = str | list[dict]


class Draws(Protocol):
    """A source of random numbers, such as `random.Random`, of which only `random()` is used: no other method is promised
    to draw the same in every version of Python."""

    def random(self) -> float: ...


class Case(NamedTuple):
    """
    What a prompt is written about: one user at one moment, and the items to be told apart.

    An item is its row of the catalogue: `title`, text features, and `rating` where this user's is known.

    Args:
        history (`list[Mapping]`):
            Items that were taken before, oldest first.
        disliked (`list[Mapping]`):
            Items that were taken before and not liked, oldest first. Empty if the log has no ratings.
        target (`Mapping`):
            The item that was taken.
        liked (`bool`):
            Whether the user liked the target.
        negatives (`list[Mapping]`):
            Items to tell the target from. Empty for forms that take none.
        random (`random.Random`):
            Seeded for this row: the same draws give the same text.
    """

    history: list[Item]
    disliked: list[Item]
    target: Item
    liked: bool
    negatives: list[Item]
    random: Draws


class Text(NamedTuple):
    """
    A row as text.

    Args:
        prompt (`str` or `list[dict]`):
            The prompt, messages if the form's `chat` is set.
        chosen (`str` or `list[dict]`):
            The right answer.
        rejected (`list[str]` or `list[list[dict]]`):
            The other answers. Of a form that takes negatives, the i-th belongs to the i-th negative.
    """

    prompt: Written
    chosen: Written
    rejected: list[Written]
