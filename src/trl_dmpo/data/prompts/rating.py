"""Which rating will the user give?"""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from .case import Case, Item, Text
from .form import LINES, QUOTES, SEMICOLONS, WordedForm, Wording


CUE = "Rating:"


@dataclass(frozen=True, kw_only=True)
class Rating(WordedForm):
    """
    Which rating will the user give? The prompt names earlier items with their ratings, the answers are the values of the
    scale.

    Takes `domain`, `features` and `chat` too, as of [`Form`].

    Args:
        wording (`str`, *optional*, defaults to `"lines"`):
            `"lines"`, `"quotes"`, `"semicolons"` or `"any"`, as of [`WordedForm`].
        scale (`tuple[float, ...]`, *optional*, defaults to `(1, 2, 3, 4, 5)`):
            All values that a rating can take. Written "3.5", and "4" where whole.

    Raises:
        `ValueError`: there is no such domain or wording, or the scale has a value twice or only one.

    Example:

    ```python
    >>> from random import Random
    >>> from trl_dmpo.data.prompts import Case, Rating

    >>> case = Case([{"title": "Alien", "rating": 5.0}], [], {"title": "Heat", "rating": 4.0}, True, [], Random(0))
    >>> text = Rating(domain="film", wording="semicolons").write(case)
    >>> print(text.prompt)
    Predict a user's rating of the movie in question, from 1 to 5.
    Ratings so far, oldest first: Alien: 5
    In question: Heat
    Answer with one of 1, 2, 3, 4, 5.
    Rating:
    >>> text.chosen, text.rejected
    (' 4', [' 1', ' 2', ' 3', ' 5'])
    ```
    """

    scale: tuple[float, ...] = (1, 2, 3, 4, 5)

    WORDINGS: ClassVar[dict[str, Wording]] = {
        "lines": Wording(
            "A user rated these {plural} from {low} to {high}, oldest first:\n{history}\n\n"
            "How will the user rate this one?\n{target}\n\nAnswer with one of {scale}.",
            LINES,
            CUE,
        ),
        "quotes": Wording(
            "From {low} to {high}, a user gave these ratings, in this order: {history}. What will the user give the {singular} "
            "{target}? Answer with one of {scale}.",
            QUOTES,
            CUE,
        ),
        "semicolons": Wording(
            "Predict a user's rating of the {singular} in question, from {low} to {high}.\n"
            "Ratings so far, oldest first: {history}\nIn question: {target}\nAnswer with one of {scale}.",
            SEMICOLONS,
            CUE,
        ),
    }
    history: ClassVar[str] = "rated"
    targets: ClassVar[str] = "all"
    negatives: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "scale", tuple(self.scale))
        if len(set(self._values.values())) < max(len(self.scale), 2):
            raise ValueError(
                f"`scale` is {self.scale}; give at least two values, each once and with at most 6 digits."
            )

    @cached_property
    def _values(self) -> dict[float, str]:
        return {value: f"{value:g}" for value in self.scale}

    def write(self, case: Case) -> Text:
        wording = self._choose(case.random)
        items = wording.items
        rated = [f"{items.mark(self._label(item))}: {self._rating_of(item)}" for item in case.history]
        question = self._fill(
            wording.prompt,
            history=items.between.join(rated) if rated else items.empty,
            target=items.mark(self._label(case.target)),
            low=self._values[min(self.scale)],
            high=self._values[max(self.scale)],
            scale=", ".join(self._values.values()),
        )
        right = self._rating_of(case.target)
        rejected = [self._reply(text) for text in self._values.values() if text != right]
        return Text(self._ask(question), self._reply(right), rejected)

    def _rating_of(self, item: Item) -> str:
        rating = item.get("rating")
        if rating in self._values:
            return self._values[rating]
        if rating is None:
            raise ValueError(f"{item['title']!r} has no rating, which the form rating needs. Use a log with ratings.")
        raise ValueError(
            f"the rating {rating} of {item['title']!r} is not on the scale {', '.join(self._values.values())}. Set `scale` to "
            "all values that ratings take, for instance rating(scale=(0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5))."
        )
