"""The prompt that asks about one user, from a form of prompt."""

from collections.abc import Sequence

from ..data.prompts import Case, Form
from ..data.prompts.case import Item, Written


class _InOrder:
    """Stands in for random numbers: the first wording is used, and candidates are listed as they were given."""

    def __init__(self) -> None:
        self.drawn = 0

    def random(self) -> float:
        self.drawn += 1
        return 1 - 1 / self.drawn


def ask(form: Form, history: Sequence[Item], candidates: Sequence[Item]) -> Written:
    """
    What a form asks about a user. It is the same every time, where training draws at random: of `wording="any"` it is the
    first, and candidates are listed in the order given.

    Args:
        form ([`~trl_dmpo.data.prompts.Form`]):
            The form.
        history (`Sequence[Mapping]`):
            The user's items, oldest first.
        candidates (`Sequence[Mapping]`):
            Items of the catalogue. Unless the form lists them, one is enough, whichever it is.

    Returns:
        `str` or `list[dict]`: the prompt.

    Raises:
        `ValueError`: candidates cannot be told apart, or an item lacks a feature that the form names.

    Example:

    ```python
    >>> from trl_dmpo.data.prompts import Template
    >>> from trl_dmpo.ranking.asking import ask

    >>> form = Template(prompt="Seen: {history}. Next of {candidates}:")
    >>> ask(form, [{"title": "Alien"}], [{"title": "Heat"}, {"title": "Big"}])
    'Seen: Alien. Next of Heat, Big:'
    ```
    """
    target, *others = candidates if form.listed else candidates[:1]
    return form.write(Case(list(history), [], target, True, others, _InOrder())).prompt
