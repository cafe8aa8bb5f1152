"""How well scores rank the relevant candidates of each row; what is tied is counted at its expectation."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


# Numbers of a block of rows: each of a dozen intermediate arrays is then 8 MB, whatever the number of rows
_BLOCK = 2**20


def ranking_metrics(
    scores: np.ndarray, relevant: np.ndarray, cutoffs: Sequence[int] = (1, 5, 10, 20)
) -> dict[str, np.ndarray]:
    r"""
    Metrics of each row. Candidates are ranked by score; those of one score are in random order, and each metric is its exact
    expectation over that order.

    For a row with R relevant candidates of n, and $\text{rel}_p$ = 1 where the candidate at rank p is relevant, 0 elsewhere:

    | key | formula |
    |---|---|
    | `hit_rate@k` | 1 if $\sum_{p \le k} \text{rel}_p > 0$, else 0 |
    | `recall@k` | $\frac{1}{R} \sum_{p \le k} \text{rel}_p$ |
    | `ndcg@k` | $\sum_{p \le k} \frac{\text{rel}_p}{\log_2(p + 1)} \Big/ \sum_{p \le \min(R, k)} \frac{1}{\log_2(p + 1)}$ (Järvelin and Kekäläinen, 2002) |
    | `mrr@k`, `mrr` | $1 / p$ of the first relevant one; 0 if it is beyond k |
    | `map@k` | $\frac{1}{\min(R, k)} \sum_{p \le k} \text{rel}_p \, \frac{1}{p} \sum_{q \le p} \text{rel}_q$ |
    | `paired_accuracy` | share of the R (n - R) pairs in which the relevant one has the higher score, ties half |

    With one relevant candidate `recall@k` is `hit_rate@k`, and `map@k` is `mrr@k`. That ties are counted at their
    expectation follows McSherry and Najork, "Computing information retrieval performance measures efficiently in the
    presence of tied scores", ECIR 2008 (https://doi.org/10.1007/978-3-540-78646-7_38).

    Args:
        scores (`np.ndarray`):
            Scores, higher is better, floating point of shape (N, C). NaN where a row has fewer than C candidates. Minus
            infinity is a score below all others, and a tie with another one.
        relevant (`np.ndarray`):
            Which candidates are relevant, bool of shape (N, C), at least one in each row.
        cutoffs (`Sequence[int]`, *optional*, defaults to `(1, 5, 10, 20)`):
            The k, at least 1. Beyond the number of candidates all of them count.

    Returns:
        `dict[str, np.ndarray]`: `float64` of shape (N,) for each key, between 0 and 1. `paired_accuracy` is NaN in rows
        without a pair, where all candidates are relevant.

    Raises:
        `ValueError`: naming the row, if it has no relevant candidate, a relevant one has no score, or a score is plus
        infinity; if the shapes differ or a cutoff is below 1.

    Example:

    ```python
    >>> import numpy as np
    >>> from trl_dmpo.ranking.metrics import ranking_metrics

    >>> scores = np.array([[-1.0, -2.0, -3.0], [-2.0, -2.0, np.nan]])  # the relevant one is second; one of two, tied
    >>> metrics = ranking_metrics(scores, np.array([[False, True, False], [True, False, False]]), cutoffs=[1])
    >>> metrics["hit_rate@1"].tolist(), metrics["mrr"].tolist(), metrics["paired_accuracy"].tolist()
    ([0.0, 0.5], [0.5, 0.75], [0.5, 0.5])
    ```
    """
    scores, relevant = check_scores(scores, relevant)
    if not all(isinstance(k, (int, np.integer)) and k >= 1 for k in cutoffs):
        raise ValueError(f"`cutoffs` must be whole numbers of at least 1, got {list(cutoffs)}.")
    size = max(1, _BLOCK // scores.shape[1])
    starts = range(0, len(scores), size)
    blocks = [_metrics_of_block(scores[i : i + size], relevant[i : i + size], cutoffs) for i in starts]
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


def pad_candidates(scores: Sequence[ArrayLike], labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """
    Scores of rows with one relevant candidate each, in the form that the metrics take.

    Args:
        scores (`Sequence[ArrayLike]`):
            For each of N rows the scores of its candidates, one-dimensional, of any lengths.
        labels (`ArrayLike`):
            Place of the relevant one among the candidates of each row, integers of shape (N,).

    Returns:
        `tuple[np.ndarray, np.ndarray]`: scores, `float64` of shape (N, C) with NaN where a row has fewer than C candidates;
        and which are relevant, bool of shape (N, C).

    Raises:
        `ValueError`: naming the row, if it has no candidates, a score is NaN, or its label is no place among them.

    Example:

    ```python
    >>> from trl_dmpo.ranking.metrics import pad_candidates

    >>> scores, relevant = pad_candidates([[-1.0, -2.0], [-3.0]], labels=[1, 0])
    >>> scores.tolist(), relevant.tolist()
    ([[-1.0, -2.0], [-3.0, nan]], [[False, True], [True, False]])
    ```
    """
    rows = [np.asarray(row, np.float64) for row in scores]
    labels = np.asarray(labels)
    if len(rows) == 0 or labels.shape != (len(rows),) or labels.dtype.kind not in "iu":
        got = f"{len(rows)} rows and {labels.dtype} labels of shape {labels.shape}"
        raise ValueError(f"Expected a whole number for each row as its label, got {got}.")
    for number, (row, label) in enumerate(zip(rows, labels, strict=True)):
        if np.isnan(row).any():
            place = int(np.argmax(np.isnan(row)))
            raise ValueError(
                f"Row {number}: the score of candidate {place} is NaN; look for what the model made of it."
            )
        if not 0 <= label < len(row):
            raise ValueError(f"Row {number}: label {label} is no place among its {len(row)} candidates.")
    lengths = np.array([len(row) for row in rows])
    present = np.arange(lengths.max()) < lengths[:, None]
    padded = np.full(present.shape, np.nan)
    padded[present] = np.concatenate(rows)
    return padded, np.arange(lengths.max()) == labels[:, None]


def check_scores(scores: np.ndarray, relevant: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    `scores` as `float64` and `relevant` as bool, both of shape (N, C), if metrics can be computed from them.

    Args:
        scores (`np.ndarray`):
            Scores, NaN where there is no candidate.
        relevant (`np.ndarray`):
            Which candidates are relevant.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: the two.

    Raises:
        `ValueError`: as in [`ranking_metrics`].
    """
    scores, relevant = np.asarray(scores, np.float64), np.asarray(relevant)
    if scores.ndim != 2 or scores.size == 0 or scores.shape != relevant.shape or relevant.dtype != bool:
        raise ValueError(
            f"Expected scores and a bool mask, both of shape (rows, candidates), got scores of shape {scores.shape} and "
            f"{relevant.dtype} of shape {relevant.shape}."
        )
    problems = {
        "no candidate is relevant; mark at least one": ~relevant.any(1),
        "a relevant candidate has no score (NaN); score it or leave the row out": (relevant & np.isnan(scores)).any(1),
        "a score is plus infinity; scores must be finite or minus infinity": np.isposinf(scores).any(1),
    }
    for problem, rows in problems.items():
        if rows.any():
            raise ValueError(f"Row {int(np.argmax(rows))}: {problem}.")
    return scores, relevant


def expected_ranks(scores: np.ndarray) -> np.ndarray:
    """
    The rank of each score.

    Args:
        scores (`np.ndarray`):
            Scores of the candidates of one row, of shape (C,).

    Returns:
        `np.ndarray`: `float64` of shape (C,), 1 for the highest; equal ones have the mean of their ranks.

    Example:

    ```python
    >>> import numpy as np
    >>> from trl_dmpo.ranking.metrics import expected_ranks

    >>> expected_ranks(np.array([-2.0, -1.0, -2.0])).tolist()
    [2.5, 1.0, 2.5]
    ```
    """
    _, group, sizes = np.unique(-scores, return_inverse=True, return_counts=True)
    return (np.cumsum(sizes) - (sizes - 1) / 2)[group]


class _Ranks(NamedTuple):
    """What is at each rank, arrays of shape (n, C): ranks of one score are a tie, and have one value but in `offset`."""

    relevance: np.ndarray  # chance that the candidate at this rank is relevant
    offset: np.ndarray  # place within the tie, from 0
    size: np.ndarray  # candidates of the tie
    own: np.ndarray  # relevant ones among them
    above: np.ndarray  # relevant ones above the tie


def _rank(scores: np.ndarray, relevant: np.ndarray) -> _Ranks:
    order = np.argsort(-scores, axis=1)  # NaN last: the tie of those that are not there has no relevant one
    scores, relevant = np.take_along_axis(scores, order, 1), np.take_along_axis(relevant, order, 1)
    place = np.arange(scores.shape[1])
    is_first = np.ones(scores.shape, bool)
    is_first[:, 1:] = scores[:, 1:] != scores[:, :-1]
    is_last = np.ones(scores.shape, bool)
    is_last[:, :-1] = is_first[:, 1:]
    first = np.maximum.accumulate(np.where(is_first, place, 0), axis=1)
    last = np.minimum.accumulate(np.where(is_last, place, len(place))[:, ::-1], axis=1)[:, ::-1]
    total = np.cumsum(relevant, axis=1)
    above = np.take_along_axis(total - relevant, first, 1)
    own = np.take_along_axis(total, last, 1) - above
    size = last - first + 1
    return _Ranks(own / size, place - first, size, own, above)


def _metrics_of_block(scores: np.ndarray, relevant: np.ndarray, cutoffs: Sequence[int]) -> dict[str, np.ndarray]:
    ranks = _rank(scores, relevant)
    n_relevant, n_candidates = relevant.sum(1), (~np.isnan(scores)).sum(1)
    rank = np.arange(1, scores.shape[1] + 1)
    found = ranks.relevance.cumsum(1)
    gain = (ranks.relevance / np.log2(rank + 1)).cumsum(1)
    best_gain = (1 / np.log2(rank + 1)).cumsum()
    missed = _miss_probability(ranks)
    reciprocal = (-np.diff(missed, prepend=1) / rank).cumsum(1)
    precision = (_expected_precision(ranks, rank)).cumsum(1)
    metrics = {}
    for k in cutoffs:
        last = min(k, scores.shape[1]) - 1
        most = np.minimum(n_relevant, k)
        metrics[f"hit_rate@{k}"] = 1 - missed[:, last]
        metrics[f"recall@{k}"] = found[:, last] / n_relevant
        metrics[f"ndcg@{k}"] = gain[:, last] / best_gain[most - 1]
        metrics[f"mrr@{k}"] = reciprocal[:, last]
        metrics[f"map@{k}"] = precision[:, last] / most
    return metrics | {"mrr": reciprocal[:, -1], "paired_accuracy": _paired_accuracy(ranks, n_relevant, n_candidates)}


def _miss_probability(ranks: _Ranks) -> np.ndarray:
    """
    Chance that no relevant candidate is at this rank or above. In the first tie with r relevant ones among e, a rank at
    which j candidates of the tie have been seen, none of them relevant, holds a relevant one with chance r / (e - j). That is 1
    before the tie ends, so what comes after it does not count.
    """
    chance = np.minimum(1, ranks.own / (ranks.size - ranks.offset))
    return np.cumprod(1 - chance, axis=1)


def _expected_precision(ranks: _Ranks, rank: np.ndarray) -> np.ndarray:
    """
    Expectation of rel_p / p times the relevant candidates up to p: the one at p itself, those above its tie, and those of its
    tie before p, of which each is relevant with chance (r - 1) / (e - 1) if the one at p is.
    """
    before = ranks.offset * (ranks.own - 1) / np.maximum(ranks.size - 1, 1)
    return ranks.relevance / rank * (1 + ranks.above + before)


def _paired_accuracy(ranks: _Ranks, n_relevant: np.ndarray, n_candidates: np.ndarray) -> np.ndarray:
    n_rejected = (n_candidates - n_relevant)[:, None]
    first = np.arange(ranks.size.shape[1]) - ranks.offset
    below = n_rejected - (first - ranks.above) - (ranks.size - ranks.own) / 2
    won = (ranks.relevance * below).sum(1)
    pairs = n_relevant * n_rejected[:, 0]
    return won / np.where(pairs > 0, pairs, np.nan)
