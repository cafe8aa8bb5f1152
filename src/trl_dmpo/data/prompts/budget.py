"""Prompts that keep within a number of tokens, by their history."""

from collections.abc import Callable
from typing import Any

from .case import Case, Draws, Text, Written
from .form import Form


class _Tape:
    """Random numbers that can be drawn again, so that all attempts at a row read alike."""

    def __init__(self, draws: Draws) -> None:
        self.draws = draws
        self.drawn: list[float] = []
        self.position = 0

    def random(self) -> float:
        if self.position == len(self.drawn):
            self.drawn.append(self.draws.random())
        self.position += 1
        return self.drawn[self.position - 1]


def fit_history(form: Form, case: Case, count_tokens: Callable[[Written], int], max_tokens: int) -> tuple[Text, int]:
    """
    The text with as much of the history as fits, and how many items were left out for it.

    The oldest are left out first, and a title is never cut. Of a form that names liked and disliked items, it is the oldest
    of whichever list is longer.

    Args:
        form ([`Form`]):
            What writes the text.
        case ([`Case`]):
            What it is written about.
        count_tokens (`Callable`):
            From a prompt to its number of tokens, see [`token_counter`]. Called about log2 of the history's length times.
        max_tokens (`int`):
            How many tokens the prompt may have.

    Returns:
        `tuple[Text, int]`

    Raises:
        `ValueError`: the prompt is too long even without a history.

    Example:

    ```python
    >>> from random import Random
    >>> from trl_dmpo.data.prompts import Case, Template, fit_history

    >>> case = Case([{"title": "Alien"}, {"title": "Big"}], [], {"title": "Heat"}, True, [{"title": "Babe"}], Random(0))
    >>> fit_history(Template(prompt="Seen: {history}. Next:"), case, count_tokens=len, max_tokens=20)
    (Text(prompt='Seen: Big. Next:', chosen=' Heat', rejected=[' Babe']), 1)
    ```
    """
    tape = _Tape(case.random)
    total = len(case.history) + (len(case.disliked) if form.disliked else 0)

    def write(kept: int) -> tuple[Text, int]:
        tape.position = 0
        text = form.write(_keep_newest(case, kept, form.disliked)._replace(random=tape))
        return text, count_tokens(text.prompt)

    text, length = write(total)
    if length <= max_tokens:
        return text, 0
    text, length = write(0)
    if length > max_tokens:
        raise ValueError(
            f"the prompt about {case.target['title']!r} has {length} tokens even without a history, and {max_tokens} are "
            "allowed. Allow more, or use fewer negatives, fewer features or a form that does not list candidates."
        )
    kept, too_many = 0, total
    while too_many - kept > 1:
        middle = (kept + too_many) // 2
        attempt, length = write(middle)
        if length <= max_tokens:
            text, kept = attempt, middle
        else:
            too_many = middle
    return text, total - kept


def _keep_newest(case: Case, kept: int, disliked: bool) -> Case:
    """The case with the newest items, `kept` of them; of two lists the shorter one stays whole as long as it can."""
    if not disliked:
        return case._replace(history=case.history[len(case.history) - kept :])
    shorter = min(len(case.history), len(case.disliked), kept // 2)
    if len(case.disliked) <= len(case.history):
        unliked, liked = shorter, kept - shorter
    else:
        liked, unliked = shorter, kept - shorter
    return case._replace(
        history=case.history[len(case.history) - liked :], disliked=case.disliked[len(case.disliked) - unliked :]
    )


def token_counter(tokenizer: Any) -> Callable[[Written], int]:
    """
    What counts the tokens of a prompt as a trainer does.

    Args:
        tokenizer (`PreTrainedTokenizerBase` or alike):
            Called with a text; messages go through its `apply_chat_template` with `add_generation_prompt=True`.

    Returns:
        `Callable`: from a prompt, a text or messages, to its number of tokens.

    Example:

    ```python
    >>> from trl_dmpo.data.prompts import token_counter

    >>> def words(text):
    ...     return {"input_ids": text.split()}
    >>> token_counter(words)("Seen: Red Heat. Next:")
    4
    ```
    """

    def count(prompt: Written) -> int:
        if isinstance(prompt, str):
            return len(tokenizer(prompt)["input_ids"])
        encoded = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)
        return len(encoded["input_ids"])

    return count
