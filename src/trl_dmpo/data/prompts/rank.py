"""Rank these for the user: two, as in the DMPO paper, or a list."""

from dataclasses import dataclass
from typing import ClassVar

from .case import Case, Text
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


CUE = "Ranking:"


@dataclass(frozen=True, kw_only=True)
class RankList(WordedForm):
    """
    Rank these for the user. The prompt lists the candidates in random order, an answer is an order of all of them.

    The chosen answer has the target first and the others as they are listed. The i-th rejected answer is the same with the
    target and the i-th negative swapped.

    Takes `domain`, `features` and `chat` too, as of [`Form`].

    Args:
        wording (`str`, *optional*, defaults to `"lines"`):
            `"lines"`, `"quotes"`, `"semicolons"` or `"any"`, as of [`WordedForm`], or `"dmpo"`, that of
            [DMPO](https://huggingface.co/papers/2405.16127) for any number of candidates.

    Raises:
        `ValueError`: there is no such domain or wording.

    Example:

    ```python
    >>> from random import Random
    >>> from trl_dmpo.data.prompts import Case, RankList

    >>> case = Case([{"title": "Alien"}], [], {"title": "Heat"}, True, [{"title": "Big"}, {"title": "Babe"}], Random(0))
    >>> text = RankList(domain="film", wording="semicolons").write(case)
    >>> print(text.prompt)
    Rank these movies for a user.
    History, oldest first: Alien
    Candidates: Babe; Big; Heat
    Write their titles in one line, best first, with " > " between them.
    Ranking:
    >>> text.chosen, text.rejected
    (' Heat > Babe > Big', [' Big > Babe > Heat', ' Babe > Heat > Big'])
    ```
    """

    WORDINGS: ClassVar[dict[str, Wording]] = {
        "lines": Wording(
            "A user has {past} these {plural}, oldest first:\n{history}\n\n"
            "Rank the following by how likely the user is to {verb} them next, likeliest first:\n{candidates}\n\n"
            'Write their {name}s in one line, with " > " between them.',
            LINES,
            CUE,
        ),
        "quotes": Wording(
            "Here is what a user has {past} so far, in this order: {history}. Rank the likelihood of the user {gerund} these: "
            '{candidates}. Write their {name}s in one line, likeliest first, with " > " between them.',
            QUOTES,
            CUE,
        ),
        "semicolons": Wording(
            "Rank these {plural} for a user.\nHistory, oldest first: {history}\nCandidates: {candidates}\n"
            'Write their {name}s in one line, best first, with " > " between them.',
            SEMICOLONS,
            CUE,
        ),
        # Spaces are the paper's. An answer ends with one, and the first stands before every answer
        "dmpo": Wording(
            "You are an assistant working on {singular} recommendations. Here is the user's history of {plural} they have "
            "{past}: {history}. Rank the likelihood of the user {gerund} the {number} {plural} {candidates}.",
            Layout(" <Title:", "", "> ", empty=""),
            candidates=Layout(" <Title:", " and ", "> "),
            order=Layout("<Title:", ",  ", "> "),
        ),
    }
    listed: ClassVar[bool] = True

    def write(self, case: Case) -> Text:
        wording = self._choose(case.random)
        items = candidates_of(case)
        titles = distinct_titles(items)
        listed = shuffled(len(items), case.random)
        orders = _orders(titles, [0, *(i for i in listed if i != 0)], wording.order)
        if len(set(orders)) < len(orders):
            raise ValueError(f"two orders of the titles {titles} read the same. Leave the row out.")
        question = self._fill(
            wording.prompt,
            history=self._list(case.history, wording.items),
            candidates=self._list([items[i] for i in listed], wording.candidates or wording.items),
            number=number_word(len(items)),
        )
        chosen, *rejected = map(self._reply, orders)
        return Text(self._ask(question), chosen, rejected)


def _orders(titles: list[str], best: list[int], layout: Layout) -> list[str]:
    """The best order as text, and for each negative that with the target, which is first, in its place."""
    order = [titles[i] for i in best]
    place = {i: position for position, i in enumerate(best)}
    texts = [layout.join(order)]
    for negative in range(1, len(titles)):
        swapped = order.copy()
        swapped[0], swapped[place[negative]] = titles[negative], titles[0]
        texts.append(layout.join(swapped))
    return texts


@dataclass(frozen=True, kw_only=True)
class RankTwo(RankList):
    """
    Which of two first? As in the DMPO paper: the answers are the two orders of the titles. [`RankList`] with one negative.

    Takes `domain`, `features` and `chat` too, as of [`Form`].

    Args:
        wording (`str`, *optional*, defaults to `"lines"`):
            `"lines"`, `"quotes"`, `"semicolons"` or `"any"`, as of [`WordedForm`], or `"dmpo"`, which with
            `domain="film"` is that of [DMPO](https://huggingface.co/papers/2405.16127) to the letter.

    Raises:
        `ValueError`: there is no such domain or wording.

    Example:

    ```python
    >>> from random import Random
    >>> from trl_dmpo.data.prompts import Case, RankTwo

    >>> case = Case([{"title": "Alien"}], [], {"title": "Heat"}, True, [{"title": "Big"}], Random(0))
    >>> text = RankTwo(domain="film", wording="dmpo").write(case)
    >>> text.chosen, text.rejected
    (' <Title:Heat> ,  <Title:Big> ', [' <Title:Big> ,  <Title:Heat> '])
    ```
    """

    def write(self, case: Case) -> Text:
        if len(case.negatives) != 1:
            raise ValueError(
                f"rank_two takes one negative, and there are {len(case.negatives)}. Set `num_negatives=1`, or use the form "
                "rank_list."
            )
        return super().write(case)
