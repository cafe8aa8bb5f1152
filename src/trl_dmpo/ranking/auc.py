"""AUC over the candidates of all rows in one pool, and as the DMPO paper's notebook computes it."""

from collections.abc import Callable

import numpy as np

from .metrics import check_scores


def pooled_auc(scores: np.ndarray, relevant: np.ndarray) -> float:
    r"""
    Chance that a relevant candidate of any row has a higher score than a rejected candidate of any row, ties half:

    $$\text{AUC} = \frac{1}{|P| \, |Q|} \sum_{i \in P} \sum_{j \in Q} \mathbb{1}[s_i > s_j] + \tfrac{1}{2} \mathbb{1}[s_i = s_j]$$

    with P the relevant and Q the rejected candidates of all rows. It is scikit-learn's `roc_auc_score` of the pool. Unlike
    the metrics of a row it asks that scores be comparable between prompts.

    Args:
        scores (`np.ndarray`):
            Scores of shape (N, C), NaN where a row has fewer than C candidates; see [`ranking_metrics`].
        relevant (`np.ndarray`):
            Which candidates are relevant, bool of shape (N, C).

    Returns:
        `float`: between 0 and 1.

    Raises:
        `ValueError`: as [`ranking_metrics`], and if no row has a rejected candidate.

    Example:

    ```python
    >>> import numpy as np
    >>> from trl_dmpo.ranking.auc import pooled_auc

    >>> pooled_auc(np.array([[-1.0, -4.0], [-5.0, -6.0]]), np.array([[True, False], [True, False]]))
    0.75
    ```
    """
    return float(auc_statistic(scores, relevant)(np.ones((1, len(scores))))[0])


def auc_statistic(scores: np.ndarray, relevant: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """
    [`pooled_auc`] as a function of the weights of rows, for [`bootstrap`].

    Args:
        scores (`np.ndarray`):
            Scores of shape (N, C), NaN where a row has fewer than C candidates.
        relevant (`np.ndarray`):
            Which candidates are relevant, bool of shape (N, C).

    Returns:
        `Callable[[np.ndarray], np.ndarray]`: from weights of shape (D, N) to AUCs of shape (D,), NaN where no relevant or no
        rejected candidate has a weight. What can be sorted and counted beforehand is.

    Raises:
        `ValueError`: as [`pooled_auc`].

    Example:

    ```python
    >>> import numpy as np
    >>> from trl_dmpo.ranking.auc import auc_statistic
    >>> from trl_dmpo.ranking.intervals import bootstrap

    >>> scores, relevant = np.array([[-1.0, -4.0], [-5.0, -6.0]]), np.array([[True, False], [True, False]])
    >>> bootstrap(auc_statistic(scores, relevant), users=["ann", "bob"])
    Estimate(value=0.75, low=0.75, high=1.0, n=2)
    ```
    """
    scores, relevant = check_scores(scores, relevant)
    rejected = ~relevant & ~np.isnan(scores)
    if not rejected.any():
        raise ValueError("No row has a rejected candidate; an AUC needs some of both.")
    levels, level = np.unique(scores[relevant], return_inverse=True)
    # Place 2i + 1 is that of a tie with level i, 2i lies between it and the level below
    place = np.searchsorted(levels, scores[rejected], "left") + np.searchsorted(levels, scores[rejected], "right")
    weigh_places = _place_counter(np.nonzero(rejected)[0], place, len(scores), 2 * len(levels) + 1)
    positive_row = np.nonzero(relevant)[0]

    def weighted_auc(weights: np.ndarray) -> np.ndarray:
        up_to = weigh_places(weights).cumsum(1)
        positives = weights[:, positive_row]
        won = (positives * (up_to[:, 2 * level] + up_to[:, 2 * level + 1])).sum(1) / 2
        pairs = positives.sum(1) * up_to[:, -1]
        return won / np.where(pairs > 0, pairs, np.nan)

    return weighted_auc


def _place_counter(
    row: np.ndarray, place: np.ndarray, n_rows: int, n_places: int
) -> Callable[[np.ndarray], np.ndarray]:
    """From weights of rows (D, N) to those of places (D, n_places): of each candidate the row's, at the candidate's place."""
    if n_rows * n_places > 8 * len(row):
        return lambda weights: np.stack([np.bincount(place, each[row], n_places) for each in weights])
    # Of many candidates, as those of a whole catalogue, a table is no larger than they are, and a product much faster
    counts = np.bincount(row * n_places + place, minlength=n_rows * n_places)
    table = counts.reshape(n_rows, n_places).astype(np.float64)
    return lambda weights: weights @ table


def coin_flip_auc(scores: np.ndarray, relevant: np.ndarray, flips: int = 100, seed: int = 0) -> np.ndarray:
    """
    The AUC of the DMPO paper's notebook, many times: a coin decides for each row whether its relevant candidate is kept or a
    rejected one, and the AUC is that of the kept scores of all rows.

    The notebook flips once, with one rejected candidate a row. Where there are several, one of them is taken at random. The
    spread over flips is what the coin alone does to the figure; its mean is about [`pooled_auc`] where all rows have equally
    many candidates.

    Args:
        scores (`np.ndarray`):
            Scores of shape (N, C), NaN where a row has fewer than C candidates. The paper's are log-probabilities summed over
            tokens.
        relevant (`np.ndarray`):
            Which candidates are relevant, bool of shape (N, C).
        flips (`int`, *optional*, defaults to `100`):
            How many times, each with coins of its own.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the coins.

    Returns:
        `np.ndarray`: `float64` of shape (flips,). Coins that all fall alike leave no AUC and are thrown again.

    Raises:
        `ValueError`: as [`ranking_metrics`], if a row has no rejected candidate, or there is only one row.

    Example:

    ```python
    >>> import numpy as np
    >>> from trl_dmpo.ranking.auc import coin_flip_auc

    >>> scores = np.array([[-1.0, -4.0], [-5.0, -6.0], [-2.0, -3.0]])
    >>> aucs = coin_flip_auc(scores, np.array([[True, False]] * 3), flips=1000)
    >>> aucs.shape, sorted(set(aucs.tolist()))
    ((1000,), [0.0, 0.5, 1.0])
    ```
    """
    scores, relevant = check_scores(scores, relevant)
    rejected = ~relevant & ~np.isnan(scores)
    if not rejected.any(1).all():
        raise ValueError(
            f"Row {int(np.argmin(rejected.any(1)))}: no rejected candidate for the other side of the coin."
        )
    if len(scores) < 2:
        raise ValueError("There is one row; an AUC by coin flips needs at least two.")
    draw_relevant, draw_rejected = _drawer(scores, relevant), _drawer(scores, rejected)
    rng = np.random.default_rng(seed)
    aucs = np.empty(flips)
    for flip in range(flips):
        heads = rng.random(len(scores)) < 0.5
        while heads.all() or not heads.any():
            heads = rng.random(len(scores)) < 0.5
        positive, negative = draw_relevant(rng)[heads], np.sort(draw_rejected(rng)[~heads])
        won = np.searchsorted(negative, positive, "left") + np.searchsorted(negative, positive, "right")
        aucs[flip] = won.mean() / 2 / len(negative)
    return aucs


def _drawer(scores: np.ndarray, mask: np.ndarray) -> Callable[[np.random.Generator], np.ndarray]:
    """Draws the score of one candidate of each row where `mask` (N, C) is `True`, each as likely as the others."""
    values, count = scores[mask], mask.sum(1)
    first = np.cumsum(count) - count
    return lambda rng: values[first + np.floor(rng.random(len(count)) * count).astype(np.int64)]
