"""Why an item is recommended rather than another."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import TYPE_CHECKING, Any

import numpy as np

from ..catalogue import Catalogue, make_catalogue
from .attribution import Value, attribute
from .counterfactual import Counterfactual, find_counterfactual
from .grounding import Sentence, check_can_chat, write_sentence
from .rendering import render


if TYPE_CHECKING:
    from rich.console import Group

    from ..recommender import Recommendations, Recommender


# The counterfactual is searched for among so many of the best items: each set that is tried would otherwise cost a ranking of
# the whole catalogue, and what comes first when an item or two are left out was not far behind before
SHORTLIST = 100


@dataclass(frozen=True, eq=False)
class Explanation:
    """
    Why an item is recommended rather than the runner-up. `rich.print(explanation)` shows it.

    Args:
        history (`list[str]`):
            Titles of the n items of the history that are in the prompt, oldest first.
        history_ids (`list`):
            Their ids, `None` for a title that the catalogue lacks.
        item (`str`):
            Title of the item.
        item_id (`int` or `str`):
            Its id.
        runner_up (`str`):
            Title of what it is compared with.
        runner_up_id (`int` or `str`):
            Its id.
        log_odds (`float`):
            Score of the item less score of the runner-up, in nats. Below 0 if the runner-up is ahead.
        log_odds_without_history (`float`):
            The same for a user without a history.
        attributions (`np.ndarray`):
            By how much each item of the history moves `log_odds`, float64 of shape (n,). Above 0: it speaks for the item;
            below 0: for the runner-up.
        method (`str`):
            `"ablation"` or `"shapley"`.
        counterfactual ([`Counterfactual`], *optional*):
            The smallest set of history items whose removal changes the first recommendation. `None` if it was not searched
            for.
        sentence ([`Sentence`], *optional*):
            What the model itself says. `None` if it was not asked.
    """

    history: list[str]
    history_ids: list
    item: str
    item_id: Any
    runner_up: str
    runner_up_id: Any
    log_odds: float
    log_odds_without_history: float
    attributions: np.ndarray
    method: str
    counterfactual: Counterfactual | None = None
    sentence: Sentence | None = None

    def __rich__(self) -> "Group":
        return render(self)


def explain(
    recommender: "Recommender",
    history: Sequence[Any],
    item: Any = None,
    against: Any = None,
    candidates: Sequence[Any] | None = None,
    method: str = "ablation",
    samples: int = 25,
    seed: int = 0,
    budget: int = 100,
    sentence: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Explanation:
    """
    Explain why an item is recommended to a user, by the items of the user's history.

    An item is left out by writing the prompt anew without it. All these prompts are scored together.

    Args:
        recommender ([`Recommender`]):
            What recommends.
        history (`list`):
            Items of one user, oldest first, by id or title. Of more than the recommender's `max_history` the latest are
            explained, and older ones do not take the place of those that are left out.
        item (`int` or `str`, *optional*):
            What to explain, by id or title. Will default to the first recommendation.
        against (`int` or `str`, *optional*):
            What to compare it with. Will default to the best recommendation of another title.
        candidates (`list`, *optional*):
            What there is to recommend. Will default to the catalogue without the history. Needed for a form that lists its
            candidates.
        method (`str`, *optional*, defaults to `"ablation"`):
            `"ablation"`, which needs n + 2 prompts for n items; or `"shapley"`, which needs up to 2^n of them for short
            histories and `samples` (n - 1) for longer ones. See [`~trl_dmpo.ranking.explain.attribution.attribute`].
        samples (`int`, *optional*, defaults to `25`):
            Random orders for `"shapley"`.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the random orders.
        budget (`int`, *optional*, defaults to `100`):
            How many sets of items to remove, at most, in search of the counterfactual. Each costs a ranking of the 100 best
            items. Nothing of the history becomes a recommendation by being removed. 0 for no search.
        sentence (`bool`, *optional*, defaults to `False`):
            Whether to ask the model itself for a sentence, and to check which titles it names.
        progress (`Callable[[int], None]`, *optional*):
            Called with the number of sets of the budget that were tried since the last call.

    Returns:
        [`Explanation`]

    Raises:
        `ImportError`: captum is not installed.
        `ValueError`: the history is empty or not one list, an item is not in the catalogue or not among the candidates, there is
            nothing to compare with, the tokenizer has no chat template for a sentence, or an option is out of its range.

    Example:

    ```python
    >>> from trl_dmpo.ranking.explain import explain

    >>> explanation = explain(recommender, ["Alien", "Notting Hill"])  # doctest: +SKIP
    >>> explanation.item, explanation.runner_up, explanation.attributions  # doctest: +SKIP
    ('Aliens', 'Heat', array([ 2.1, -0.3]))
    ```
    """
    _check_options(history, method, samples, budget)
    history = list(history)
    if sentence:
        check_can_chat(recommender.scorer.tokenizer)
    if recommender.form.listed and candidates is None:
        raise ValueError(
            f"the form {type(recommender.form).__name__} lists candidates in its prompt. Give `candidates` to explain a "
            "choice among them."
        )
    catalogue = make_catalogue(recommender.catalogue)
    rank = _Ranking(recommender, catalogue, history, candidates)
    best = rank.best()
    if not best.ids:
        raise ValueError(
            "all items of the catalogue are in `history`, so that none is left to recommend. Give `candidates`."
        )
    first, second = _find_pair(catalogue, best, item, against, candidates is not None)
    count = len(rank.shown)
    attributions, log_odds, without = attribute(rank.log_odds(first, second), count, method, samples, seed)
    found = None
    if budget:
        found = find_counterfactual(rank.first_without(best.ids, progress), best.titles[0], attributions, budget)
        if candidates is None and len(best.ids) < rank.left():
            found = found._replace(among=len(best.ids))
            if found.removed is not None:
                found = _of_all(found, best, rank.best(found.removed))
    titles = [each["title"] for each in catalogue.read(rank.shown, [])]
    names = [catalogue.titles[place] for place in (first, second)]
    return Explanation(
        history=titles,
        history_ids=[catalogue.ids[places[0]] if (places := catalogue.places(each)) else None for each in rank.shown],
        item=names[0],
        item_id=catalogue.ids[first],
        runner_up=names[1],
        runner_up_id=catalogue.ids[second],
        log_odds=log_odds,
        log_odds_without_history=without,
        attributions=attributions,
        method=method,
        counterfactual=found,
        sentence=write_sentence(recommender, titles, names[0], catalogue.titles) if sentence else None,
    )


def _of_all(found: Counterfactual, best: "Recommendations", changed: "Recommendations") -> Counterfactual:
    """What comes first in the whole catalogue, which may be no item of the shortlist. Where two are as good as equal, noise may
    bring the first one back, which is no change."""
    return found if changed.titles[0] == best.titles[0] else found._replace(title=changed.titles[0])


class _Ranking:
    """What a recommender makes of one user when items of the history are left out."""

    def __init__(
        self, recommender: "Recommender", catalogue: Catalogue, history: list, candidates: Sequence[Any] | None
    ) -> None:
        self._recommender, self._catalogue, self._candidates = recommender, catalogue, candidates
        self.shown = history[-recommender.max_history :] if recommender.max_history else history
        self._own = [catalogue.ids[place] for each in history for place in catalogue.places(each)]

    def best(self, removed: Collection[int] = ()) -> "Recommendations":
        """The first recommendations, and so many that there are two titles, if there are two."""
        history = self._without(removed)
        if self._candidates is not None:
            return self._recommender.rank([history], self._candidates)[0]
        most_alike: Any = self._catalogue.frame["title"].value_counts()["count"].max()
        return self._recommender.recommend([history], max(SHORTLIST, most_alike + 1), exclude=self._own)[0]

    def left(self) -> int:
        """How many items there are to recommend."""
        return len(self._catalogue.ids) - len(set(self._own))

    def _without(self, removed: Collection[int]) -> list:
        return [each for place, each in enumerate(self.shown) if place not in removed]

    def log_odds(self, first: int, second: int) -> Value:
        """From which items are kept, bool of shape (S, n), to the score of one item of the catalogue less that of another."""
        pair = [self._catalogue.ids[first], self._catalogue.ids[second]]
        # A list of candidates in the prompt stays as it is
        among = self._candidates if self._candidates is not None and self._recommender.form.listed else pair

        def value(kept: np.ndarray) -> np.ndarray:
            ranked = self._recommender.rank([list(compress(self.shown, row)) for row in kept], among)
            scores = [dict(zip(each.ids, each.scores, strict=True)) for each in ranked]
            return np.array([each[pair[0]] - each[pair[1]] for each in scores])

        return value

    def first_without(
        self, shortlist: list, progress: Callable[[int], None] | None
    ) -> Callable[[list[list[int]]], list[str]]:
        """
        From sets of places in the history to the title that comes first without what is there: of the candidates, or else of
        a shortlist of the catalogue.
        """

        def first(sets: list[list[int]]) -> list[str]:
            histories = [self._without(removed) for removed in sets]
            among = shortlist if self._candidates is None else self._candidates
            ranked = self._recommender.rank(histories, among)
            if progress is not None:
                progress(len(sets))
            return [each.titles[0] for each in ranked]

        return first


def _check_options(history: Sequence[Any], method: str, samples: int, budget: int) -> None:
    if not len(history):
        raise ValueError("`history` is empty, so there is nothing that could explain a recommendation.")
    if isinstance(history, str) or not isinstance(history[0], (str, int, np.integer)):
        raise ValueError("`history` is not a list of items; give those of one user, by id or title.")
    if method not in ("ablation", "shapley"):
        raise ValueError(f"`method` is {method!r}, but it is 'ablation' or 'shapley'.")
    if samples < 1:
        raise ValueError(f"`samples` is {samples}, but it is at least 1.")
    if budget < 0:
        raise ValueError(f"`budget` is {budget}, but it is at least 0.")


def _find_pair(
    catalogue: Catalogue, best: "Recommendations", item: Any, against: Any, among_candidates: bool
) -> tuple[int, int]:
    """Where the item and the runner-up are in the catalogue."""
    ranked = [catalogue.place(each) for each in best.ids]
    first, second = (None if each is None else catalogue.place(each) for each in (item, against))
    for name, place in (("item", first), ("against", second)):
        if among_candidates and place is not None and place not in ranked:
            raise ValueError(f"`{name}`: {catalogue.titles[place]!r} is not among the candidates.")
    if first is None:
        first = _best_but(catalogue, ranked, second)
    if second is None:
        second = _best_but(catalogue, ranked, first)
    if first is None or second is None:
        raise ValueError("there is no second item to recommend, so nothing to compare with. Give `against`.")
    if catalogue.titles[first] == catalogue.titles[second]:
        raise ValueError(
            f"`item` and `against` are both titled {catalogue.titles[first]!r}, so they always have the same score. Give "
            "items of different titles."
        )
    return first, second


def _best_but(catalogue: Catalogue, ranked: list[int], other: int | None) -> int | None:
    """The first item of another title."""
    title = None if other is None else catalogue.titles[other]
    return next((place for place in ranked if catalogue.titles[place] != title), None)
