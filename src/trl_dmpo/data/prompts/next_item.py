"""What will the user take next? Free, or one of a list."""

from dataclasses import dataclass
from typing import ClassVar

from .case import Case, Item, Text, Written
from .form import (
    LINES,
    QUOTES,
    SEMICOLONS,
    Layout,
    WordedForm,
    Wording,
    candidates_of,
    distinct_titles,
    number_word,
    shuffled,
)


CUE = "Next {singular}:"


@dataclass(frozen=True, kw_only=True)
class NextItem(WordedForm):
    """
    What will the user take next? The answers are titles.

    All of a user's answers share one prompt, which names no candidate: the cheapest form to train, and the one that can
    score a whole catalogue.

    Takes `domain`, `features` and `chat` too, as of [`Form`].

    Args:
        wording (`str`, *optional*, defaults to `"lines"`):
            `"lines"`, `"quotes"`, `"semicolons"` or `"any"`, as of [`WordedForm`].

    Raises:
        `ValueError`: there is no such domain or wording.

    Example:

    ```python
    >>> from random import Random
    >>> from trl_dmpo.data.prompts import Case, NextItem

    >>> history = [{"title": "Alien"}, {"title": "Lion King, The"}]
    >>> case = Case(history, [], {"title": "Heat"}, True, [{"title": "Big"}, {"title": "Babe"}], Random(0))
    >>> text = NextItem(domain="film", wording="quotes").write(case)
    >>> print(text.prompt)
    Here is what a user has watched so far, in this order: "Alien", "Lion King, The". What will the user watch next? Answer with one title only.
    Next movie:
    >>> text.chosen, text.rejected
    (' Heat', [' Big', ' Babe'])
    ```
    """

    WORDINGS: ClassVar[dict[str, Wording]] = {
        "lines": Wording(
            "A user has {past} these {plural}, oldest first:\n{history}\n\n"
            "Which {singular} will the user {verb} next? Answer with its {name} only.",
            LINES,
            CUE,
        ),
        "quotes": Wording(
            "Here is what a user has {past} so far, in this order: {history}. What will the user {verb} next? "
            "Answer with one {name} only.",
            QUOTES,
            CUE,
        ),
        "semicolons": Wording(
            "Recommend the next {singular} to a user.\nHistory, oldest first: {history}\nAnswer with one {name} only.",
            SEMICOLONS,
            CUE,
        ),
    }

    def write(self, case: Case) -> Text:
        wording = self._choose(case.random)
        chosen, *rejected = map(self._reply, distinct_titles([case.target, *case.negatives]))
        question = self._fill(wording.prompt, history=self._list(case.history, wording.items))
        return Text(self._ask(question), chosen, rejected)

    def answer(self, item: Item) -> Written:
        return self._reply(item["title"])


@dataclass(frozen=True, kw_only=True)
class NextItemFromList(WordedForm):
    """
    Which of these will the user take next? The prompt lists the candidates in random order, the answers are titles.

    Takes `domain`, `features` and `chat` too, as of [`Form`].

    Args:
        wording (`str`, *optional*, defaults to `"lines"`):
            `"lines"`, `"quotes"`, `"semicolons"` or `"any"`, as of [`WordedForm`], or `"sdpo"`, one of those of
            [S-DPO](https://huggingface.co/papers/2406.09215).

    Raises:
        `ValueError`: there is no such domain or wording.

    Example:

    ```python
    >>> from random import Random
    >>> from trl_dmpo.data.prompts import Case, NextItemFromList

    >>> case = Case([{"title": "Alien"}], [], {"title": "Heat"}, True, [{"title": "Big"}, {"title": "Babe"}], Random(0))
    >>> text = NextItemFromList(domain="film", wording="sdpo").write(case)
    >>> print(text.prompt)
    This person has watched Alien in the previous. Please predict the next movie this person will watch. Choose the answer from the following three movie titles: Babe, Big, Heat. Answer:
    >>> text.chosen, text.rejected
    (' Heat', [' Big', ' Babe'])
    ```
    """

    WORDINGS: ClassVar[dict[str, Wording]] = {
        "lines": Wording(
            "A user has {past} these {plural}, oldest first:\n{history}\n\n"
            "Which one of the following will the user {verb} next?\n{candidates}\n\nAnswer with its {name} only.",
            LINES,
            CUE,
        ),
        "quotes": Wording(
            "Here is what a user has {past} so far, in this order: {history}. Choose what the user will {verb} next: "
            "{candidates}. Answer with one {name} only.",
            QUOTES,
            CUE,
        ),
        "semicolons": Wording(
            "Recommend the next {singular} to a user.\nHistory, oldest first: {history}\nCandidates: {candidates}\n"
            "Answer with one {name} only.",
            SEMICOLONS,
            CUE,
        ),
        "sdpo": Wording(
            "This person has {past} {history} in the previous. Please predict the next {singular} this person will {verb}. "
            "Choose the answer from the following {number} {singular} {name}s: {candidates}. Answer:",
            Layout("", ", "),
        ),
    }
    listed: ClassVar[bool] = True

    def write(self, case: Case) -> Text:
        wording = self._choose(case.random)
        items = candidates_of(case)
        chosen, *rejected = map(self._reply, distinct_titles(items))
        question = self._fill(
            wording.prompt,
            history=self._list(case.history, wording.items),
            candidates=self._list([items[i] for i in shuffled(len(items), case.random)], wording.items),
            number=number_word(len(items)),
        )
        return Text(self._ask(question), chosen, rejected)

    def answer(self, item: Item) -> Written:
        return self._reply(item["title"])
