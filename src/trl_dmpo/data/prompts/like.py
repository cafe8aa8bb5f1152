"""Will the user like it? Yes or no."""

from dataclasses import dataclass
from typing import ClassVar

from .case import Case, Text
from .form import LINES, QUOTES, SEMICOLONS, Layout, WordedForm, Wording


CUE = "Answer:"


@dataclass(frozen=True, kw_only=True)
class Like(WordedForm):
    """
    Will the user like it? As in TALLRec: the prompt names what the user liked and did not like, the answers are "Yes." and
    "No.".

    Takes `domain`, `features` and `chat` too, as of [`Form`].

    Args:
        wording (`str`, *optional*, defaults to `"lines"`):
            `"lines"`, `"quotes"`, `"semicolons"` or `"any"`, as of [`WordedForm`], or `"tallrec"`, which with
            `domain="film"` is instruction and input of [TALLRec](https://huggingface.co/papers/2305.00447) to the letter.

    Raises:
        `ValueError`: there is no such domain or wording.

    Example:

    ```python
    >>> from random import Random
    >>> from trl_dmpo.data.prompts import Case, Like

    >>> case = Case([{"title": "Alien"}], [{"title": "Big"}], {"title": "Heat"}, True, [], Random(0))
    >>> text = Like(domain="film", wording="quotes").write(case)
    >>> print(text.prompt)
    A user liked: "Alien". The same user did not like: "Big". Will the user like the movie "Heat"? Answer "Yes." or "No."
    Answer:
    >>> text.chosen, text.rejected
    (' Yes.', [' No.'])
    ```
    """

    WORDINGS: ClassVar[dict[str, Wording]] = {
        "lines": Wording(
            "A user liked these {plural}:\n{history}\n\nThe same user did not like these:\n{disliked}\n\n"
            'Will the user like this one?\n{target}\n\nAnswer "Yes." or "No."',
            LINES,
            CUE,
        ),
        "quotes": Wording(
            "A user liked: {history}. The same user did not like: {disliked}. Will the user like the {singular} {target}? "
            'Answer "Yes." or "No."',
            QUOTES,
            CUE,
        ),
        "semicolons": Wording(
            "Predict whether a user will like the {singular} in question.\nLiked: {history}\nNot liked: {disliked}\n"
            'In question: {target}\nAnswer "Yes." or "No."',
            SEMICOLONS,
            CUE,
        ),
        "tallrec": Wording(
            "Given the user's preference and unpreference, identify whether the user will like the target {singular} by "
            'answering "Yes." or "No.".\nUser Preference: {history}\nUser Unpreference: {disliked}\n'
            "Whether the user will like the target {singular} {target}?",
            Layout('"', ", ", '"', empty=""),
        ),
    }
    disliked: ClassVar[bool] = True
    targets: ClassVar[str] = "all"
    negatives: ClassVar[bool] = False

    def write(self, case: Case) -> Text:
        wording = self._choose(case.random)
        question = self._fill(
            wording.prompt,
            history=self._list(case.history, wording.items),
            disliked=self._list(case.disliked, wording.items),
            target=wording.items.mark(self._label(case.target)),
        )
        yes, no = self._reply("Yes."), self._reply("No.")
        return Text(self._ask(question), yes, [no]) if case.liked else Text(self._ask(question), no, [yes])
