"""What a user need not have done for the first recommendation to be another."""

import math
from collections.abc import Callable, Iterable
from itertools import combinations, islice
from typing import NamedTuple

import numpy as np


class Counterfactual(NamedTuple):
    """
    The smallest set of history items whose removal changes the first recommendation.

    Args:
        removed (`list[int]`, *optional*):
            Their places in the history, ascending. `None` if no set was found.
        title (`str`, *optional*):
            What is recommended first without them.
        proven (`bool`):
            Whether it is certain that no smaller set does it, or, if none was found, that no set does. If not, the budget
            was spent before all smaller sets were tried.
        tried (`int`):
            How many sets were tried.
        among (`int`, *optional*):
            How many of the best items were ranked anew for each set; a change to another item does not count. `None` if all
            were.
    """

    removed: list[int] | None
    title: str | None
    proven: bool
    tried: int
    among: int | None = None


def find_counterfactual(
    first: Callable[[list[list[int]]], list[str]], title: str, attributions: np.ndarray, budget: int
) -> Counterfactual:
    """
    Search for the smallest set of history items whose removal changes the first recommendation.

    First the items that speak for it most are removed one after the other, which bounds the size from above. Then all sets
    are tried by size, those that speak for it most first, up to that bound or until the budget is spent.

    Args:
        first (`Callable`):
            From sets of removed items, each a list of places, to the title of the first recommendation without them.
        title (`str`):
            The first recommendation with all items.
        attributions (`np.ndarray`):
            How much each item speaks for it, of shape (n,).
        budget (`int`):
            Sets to try at most.

    Returns:
        [`Counterfactual`]

    Example:

    Each of two items suffices for a recommendation, and a third item does not matter:

    ```python
    >>> import numpy as np
    >>> from trl_dmpo.ranking.explain.counterfactual import find_counterfactual

    >>> def first(sets):
    ...     return ["Big" if {0, 1} <= set(removed) else "Aliens" for removed in sets]
    >>> find_counterfactual(first, "Aliens", np.array([0.0, 0.1, 0.0]), budget=10)
    Counterfactual(removed=[0, 1], title='Big', proven=True, tried=5, among=None)
    ```
    """
    count = len(attributions)
    order: list[int] = np.argsort(-attributions, kind="stable").tolist()
    tried: dict[tuple[int, ...], str] = {}

    def attempt(sets: Iterable[tuple[int, ...]]) -> tuple[int, ...] | None:
        """The first of the sets that changes the recommendation, as far as the budget goes."""
        new = list(islice((each for each in sets if each not in tried), budget - len(tried)))
        if new:
            tried.update(zip(new, first([list(each) for each in new]), strict=True))
        return next((each for each in new if tried[each] != title), None)

    best = attempt(tuple(sorted(order[:size])) for size in range(1, count + 1))
    for size in range(1, len(best) if best else count + 1):
        found = attempt(tuple(sorted(each)) for each in combinations(order, size))
        if found:
            return Counterfactual(list(found), tried[found], True, len(tried))
        if sum(len(each) == size for each in tried) < math.comb(count, size):
            return _result(best, tried, False)
    return _result(best, tried, True)


def _result(best: tuple[int, ...] | None, tried: dict[tuple[int, ...], str], proven: bool) -> Counterfactual:
    if best is None:
        return Counterfactual(None, None, proven, len(tried))
    return Counterfactual(list(best), tried[best], proven, len(tried))
