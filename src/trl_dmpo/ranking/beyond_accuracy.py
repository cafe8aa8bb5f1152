"""What is recommended, whatever is right: how much of the catalogue, and how popular."""

from collections.abc import Collection, Hashable, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from .intervals import Estimate, bootstrap


def catalogue_coverage(recommended: Sequence[Sequence[Hashable]], catalogue: Collection[Hashable]) -> float:
    r"""
    Share of the catalogue that is recommended to anyone, $\big|\bigcup_u L_u\big| \big/ |I|$ (Ge, Delgado-Battenfeld and
    Jannach, "Beyond accuracy: evaluating recommender systems by coverage and serendipity", RecSys 2010,
    https://doi.org/10.1145/1864708.1864761).

    It grows with the number of users and of items each, so compare it over the same users and k only. It has no bootstrap
    interval: fewer different users are drawn than there are, so the coverage of a draw is always too low.

    Args:
        recommended (`Sequence[Sequence]`):
            Ids of the items that are recommended in each row.
        catalogue (`Collection`):
            Ids of all items.

    Returns:
        `float`: between 0 and 1.

    Raises:
        `ValueError`: if the catalogue is empty, or a recommended item is not in it.

    Example:

    ```python
    >>> from trl_dmpo.ranking.beyond_accuracy import catalogue_coverage

    >>> catalogue_coverage([[1, 2], [2, 3]], catalogue=[1, 2, 3, 4])
    0.75
    ```
    """
    items = set(catalogue)
    if not items:
        raise ValueError("The catalogue is empty.")
    for row, ids in enumerate(recommended):
        if unknown := set(ids) - items:
            raise ValueError(f"Row {row}: item {next(iter(unknown))!r} is not in the catalogue.")
    return len(set().union(*recommended)) / len(items)


def mean_popularity(
    lists: Sequence[Sequence[Hashable]], popularity: Mapping[Hashable, float], name: str = "recommended"
) -> np.ndarray:
    r"""
    Mean popularity of the items of each list, $\frac{1}{|L_u|} \sum_{i \in L_u} \phi(i)$.

    Of recommended items, its mean over rows is the *average recommendation popularity* (Yin et al., "Challenging the long
    tail recommendation", VLDB 2012, https://arxiv.org/abs/1205.6700). Of users' histories it is what they came with.

    Args:
        lists (`Sequence[Sequence]`):
            Ids of the items of each row: of the top k, or of the history.
        popularity (`Mapping[Hashable, float]`):
            From an item's id to how popular it is: the number of users who took it in training, or their share.
        name (`str`, *optional*, defaults to `"recommended"`):
            What the lists are, for errors.

    Returns:
        `np.ndarray`: `float64` of shape (N,), in the unit of `popularity`; NaN where a list is empty.

    Raises:
        `ValueError`: naming the row, if the popularity of an item is not known.

    Example:

    ```python
    >>> from trl_dmpo.ranking.beyond_accuracy import mean_popularity

    >>> mean_popularity([["Heat", "Alien"], ["Alien"]], {"Heat": 10, "Alien": 40}).tolist()
    [25.0, 40.0]
    ```
    """
    means = np.full(len(lists), np.nan)
    for row, ids in enumerate(lists):
        if unknown := [item for item in ids if item not in popularity]:
            raise ValueError(f"Row {row}: the popularity of item {unknown[0]!r} ({name}) is not known; add it.")
        if len(ids) > 0:
            means[row] = np.mean([popularity[item] for item in ids])
    return means


def popularity_lift(
    recommended: ArrayLike, history: ArrayLike, users: ArrayLike | None = None, seed: int = 0
) -> Estimate:
    r"""
    How much more popular the recommended items are than those of the history (Abdollahpouri, Mansoury, Burke and Mobasher,
    "The connection between popularity bias, calibration, and fairness in recommendation", RecSys 2020,
    https://arxiv.org/abs/2008.09273):

    $$\text{PL} = \frac{\text{GAP}_q - \text{GAP}_p}{\text{GAP}_p}$$

    with GAP the group average popularity, the mean over rows of [`mean_popularity`], of what is recommended (q) and of the
    histories (p). 0: as popular as what these users take of themselves; 1: twice as popular; below 0: less popular.

    Args:
        recommended (`ArrayLike`):
            Mean popularity of what is recommended in each row, of shape (N,).
        history (`ArrayLike`):
            That of each row's history, of shape (N,). Rows where either is NaN are left out.
        users (`ArrayLike`, *optional*):
            Whose row it is, of shape (N,). By default each row is a user's own.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the bootstrap.

    Returns:
        [`Estimate`]: the lift, and its interval over users.

    Raises:
        `ValueError`: if the shapes differ, or no row has both with a history of some popularity.

    Example:

    ```python
    >>> from trl_dmpo.ranking.beyond_accuracy import popularity_lift

    >>> popularity_lift(recommended=[30.0, 60.0, 30.0], history=[20.0, 40.0, 20.0])
    Estimate(value=0.5, low=0.5, high=0.5, n=3)
    ```
    """
    q, p = np.asarray(recommended, np.float64), np.asarray(history, np.float64)
    users = np.arange(len(q)) if users is None else np.asarray(users)
    if not q.shape == p.shape == users.shape:
        raise ValueError(
            f"Expected one value a row, got {q.shape} recommended, {p.shape} histories, {users.shape} users."
        )
    both = ~np.isnan(q) & ~np.isnan(p)
    q, p = q[both], p[both]
    if not p.sum() > 0:
        raise ValueError("No history has an item of some popularity; there is nothing to compare with.")

    def lift(weights: np.ndarray) -> np.ndarray:
        before = weights @ p
        return (weights @ q) / np.where(before > 0, before, np.nan) - 1

    return bootstrap(lift, users[both], seed)
