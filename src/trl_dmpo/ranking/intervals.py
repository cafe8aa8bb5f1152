"""How far a figure may be off: bootstrap intervals over users, and paired tests of two models."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


# Of the bootstrap: the ends of an interval are then off by about 6% of a standard error
DRAWS = 2_000
# Of signs, where there are too many to take each once: a p-value of 0.05 is then off by 0.002
FLIPS = 9_999
LEVEL = 0.95
# Numbers in memory at a time: 32 MB
_CHUNK = 2**22


class Estimate(NamedTuple):
    """
    A figure and its 95% confidence interval.

    Args:
        value (`float`):
            The figure, over all rows.
        low (`float`):
            Lower end of the interval.
        high (`float`):
            Upper end of the interval.
        n (`int`):
            Number of users that the figure rests on. With 0 there is no figure, and the other three are NaN.
    """

    value: float
    low: float
    high: float
    n: int


class Comparison(NamedTuple):
    """
    How much better a model is than another on the same rows.

    Args:
        difference ([`Estimate`]):
            Mean difference, positive where the model is above the baseline.
        p_value (`float`):
            How often a difference at least this large, in either direction, comes about if it is chance which of the two
            models is which. Of this test alone: see [`holm`] for several.
    """

    difference: Estimate
    p_value: float


def bootstrap_means(
    values: Mapping[str, ArrayLike], users: ArrayLike | None = None, seed: int = 0
) -> dict[str, Estimate]:
    r"""
    Means of several metrics over rows, with intervals from one set of resampled users.

    The interval is that of the percentile bootstrap: the 2.5% and 97.5% quantiles of the mean over the rows of as many users as
    there are, drawn with replacement, 2,000 times. Users are drawn, not rows: the rows of one user are alike, and as many
    rows of other users would tell more (Field and Welsh, "Bootstrapping clustered data", 2007, https://doi.org/10.1111/j.1467-9868.2007.00593.x).
    Every row counts the same, so a user with more rows counts more.

    Args:
        values (`Mapping[str, ArrayLike]`):
            For each metric its value in each row, of shape (N,). NaN where a row has none, which leaves the row out of this
            metric.
        users (`ArrayLike`, *optional*):
            Whose row it is, of shape (N,): numbers or text. By default each row is a user's own.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draws. The same seed and users give the same draws, whatever the metrics.

    Returns:
        `dict[str, Estimate]`: an [`Estimate`] for each metric. For a metric without a value in any row, NaN with `n` 0. A
        draw in which no row has a value is left out.

    Raises:
        `ValueError`: if there is no row, an array is not of shape (N,), or a value is infinite.

    Example:

    ```python
    >>> from trl_dmpo.ranking.intervals import bootstrap_means

    >>> estimate = bootstrap_means({"hit_rate@1": [1, 0, 1, 1]}, users=["ann", "ann", "bob", "eve"])["hit_rate@1"]
    >>> estimate.value, estimate.low, estimate.high, estimate.n
    (0.75, 0.5, 1.0, 3)
    ```
    """
    table, names = _as_table(values), list(values)
    member, n_users = _number_users(users, len(table))
    has = ~np.isnan(table)
    # Around a value of each, so that what does not vary does not vary in the last digit either
    base = table[has.argmax(0), np.arange(len(names))]
    sums = _sum_by_user(np.where(has, table - base, 0), member, n_users)
    counts = _sum_by_user(has, member, n_users)
    width = n_users + 2 * len(names)
    with np.errstate(invalid="ignore"):  # 0 / 0: no row of the draw has a value
        means = base + sums.sum(0) / counts.sum(0)
        draws = base + np.concatenate([(w @ sums) / (w @ counts) for w in _draw_weights(n_users, width, seed)])
    # A mean lies between the smallest and the largest value; its rounding may not
    draws = np.clip(draws, np.where(has, table, np.inf).min(0), np.where(has, table, -np.inf).max(0))
    return {name: _estimate(means[i], draws[:, i], int((counts[:, i] > 0).sum())) for i, name in enumerate(names)}


def bootstrap_mean(values: ArrayLike, users: ArrayLike | None = None, seed: int = 0) -> Estimate:
    """
    [`bootstrap_means`] of a single metric.

    Args:
        values (`ArrayLike`):
            Its value in each row, of shape (N,), NaN where a row has none.
        users (`ArrayLike`, *optional*):
            Whose row it is, of shape (N,). By default each row is a user's own.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draws.

    Returns:
        [`Estimate`]: mean over rows, interval over users.
    """
    return bootstrap_means({"metric": values}, users, seed)["metric"]


def bootstrap(statistic: Callable[[np.ndarray], np.ndarray], users: ArrayLike, seed: int = 0) -> Estimate:
    """
    A figure that is no mean over rows, with its interval: the percentile bootstrap of [`bootstrap_means`].

    Args:
        statistic (`Callable[[np.ndarray], np.ndarray]`):
            From the weights of rows in D draws, `float64` of shape (D, N), to the figure of each, of shape (D,). A weight is how
            often the row's user was drawn; all ones are the data as they are. NaN where a draw has no such figure, which
            leaves the draw out. See [`auc_statistic`].
        users (`ArrayLike`):
            Whose row it is, of shape (N,). `range(N)` if each row is a user's own.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draws, the same as those of [`bootstrap_means`] for these users.

    Returns:
        [`Estimate`]: the figure, and its interval over users.

    Raises:
        `ValueError`: if there is no row.

    Example:

    ```python
    >>> import numpy as np
    >>> from trl_dmpo.ranking.intervals import bootstrap

    >>> values = np.array([1.0, 2.0, 4.0, 8.0])
    >>> bootstrap(lambda weights: (weights @ values**2) / (weights @ values), users=range(4)).value
    5.666666666666667
    ```
    """
    users = np.asarray(users)
    member, n_users = _number_users(users, len(users))
    # A statistic keeps a few numbers for each row and draw
    chunks = _draw_weights(n_users, n_users + 4 * len(users), seed)
    draws = np.concatenate([statistic(weights[:, member]) for weights in chunks])
    return _estimate(statistic(np.ones((1, len(users))))[0], draws, n_users)


def paired_tests(
    values: Mapping[str, ArrayLike], baseline: Mapping[str, ArrayLike], users: ArrayLike | None = None, seed: int = 0
) -> dict[str, Comparison]:
    r"""
    Whether a model is better than another, by several metrics of the same rows.

    The interval is that of [`bootstrap_means`] for the difference, row by row. The p-value is that of the sign-flip test
    (Fisher's randomisation test; Smucker, Allan and Carterette, CIKM 2007, https://doi.org/10.1145/1321440.1321528): if the
    models are alike, a user's total difference $d_u$ might as well be $-d_u$, and

    $$p = P\Big(\big|\textstyle\sum_u \pm d_u\big| \ge \big|\sum_u d_u\big|\Big).$$

    Over all ways to choose the signs where there are at most 9,999 of them, that is up to 13 users with a difference.
    Else over that many drawn at random, and the one at hand: $p = (1 + \text{as large}) / (1 + 9999)$, which is never 0
    (Phipson and Smyth, 2010, https://doi.org/10.2202/1544-6115.1585).

    Args:
        values (`Mapping[str, ArrayLike]`):
            For each metric the model's value in each row, of shape (N,). NaN where a row has none.
        baseline (`Mapping[str, ArrayLike]`):
            The same metrics of the model to compare with, in the same rows. Rows without a value in either are left out.
        users (`ArrayLike`, *optional*):
            Whose row it is, of shape (N,). By default each row is a user's own.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draws.

    Returns:
        `dict[str, Comparison]`: a [`Comparison`] for each metric. Without a row that has both values, the difference is NaN
        and the p-value 1.

    Raises:
        `ValueError`: if the metrics differ, there is no row, an array is not of shape (N,), or a value is infinite.
    """
    if values.keys() != baseline.keys():
        only = ", ".join(sorted(values.keys() ^ baseline.keys()))
        raise ValueError(f"Only one of the two models has these metrics: {only}. Compare metrics that both have.")
    ours, theirs = _as_table(values), _as_table({name: baseline[name] for name in values})
    if len(ours) != len(theirs):
        raise ValueError(f"The baseline has {len(theirs)} rows, the model {len(ours)}. Compare them on the same rows.")
    differences = ours - theirs
    estimates = bootstrap_means(dict(zip(values, differences.T, strict=True)), users, seed)
    totals = _sum_by_user(np.nan_to_num(differences), *_number_users(users, len(differences)))
    p_values = _sign_flip_p_values(totals, seed)
    return {name: Comparison(estimates[name], float(p)) for name, p in zip(values, p_values, strict=True)}


def paired_test(values: ArrayLike, baseline: ArrayLike, users: ArrayLike | None = None, seed: int = 0) -> Comparison:
    """
    [`paired_tests`] of a single metric.

    Args:
        values (`ArrayLike`):
            The model's value in each row, of shape (N,), NaN where a row has none.
        baseline (`ArrayLike`):
            That of the model to compare with, in the same rows.
        users (`ArrayLike`, *optional*):
            Whose row it is, of shape (N,). By default each row is a user's own.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draws.

    Returns:
        [`Comparison`]: `values` minus `baseline`.

    Example:

    ```python
    >>> from trl_dmpo.ranking.intervals import paired_test

    >>> paired_test([1, 1, 1, 1, 1], [0, 0, 0, 0, 1]).p_value
    0.125
    ```
    """
    return paired_tests({"metric": values}, {"metric": baseline}, users, seed)["metric"]


def holm(p_values: Sequence[float] | np.ndarray) -> np.ndarray:
    r"""
    p-values of several tests, made so large that the chance of even one false alarm among them stays below the level.

    Of the p-values in rising order, the i-th of m becomes $\max_{j \le i} \min(1, (m - j + 1) \, p_j)$ (Holm, "A simple
    sequentially rejective multiple test procedure", 1979, https://www.jstor.org/stable/4615733). It holds however the tests
    depend on one another.

    Args:
        p_values (`Sequence[float]`):
            p-values, of shape (M,).

    Returns:
        `np.ndarray`: adjusted p-values, `float64` of shape (M,), in the order given.

    Example:

    ```python
    >>> from trl_dmpo.ranking.intervals import holm

    >>> holm([0.04, 0.01, 0.03]).tolist()
    [0.06, 0.03, 0.06]
    ```
    """
    p = np.asarray(p_values, np.float64)
    order = np.argsort(p)
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted


def _as_table(values: Mapping[str, ArrayLike]) -> np.ndarray:
    """Metrics as columns, `float64` of shape (N, M)."""
    columns = {name: np.asarray(column, np.float64) for name, column in values.items()}
    n_rows = max((column.size for column in columns.values()), default=0)
    if n_rows == 0:
        raise ValueError("There are no rows to take a mean of.")
    for name, column in columns.items():
        if column.shape != (n_rows,):
            raise ValueError(f"'{name}' has shape {column.shape}, expected ({n_rows},): one value a row.")
        if np.isinf(column).any():
            row = int(np.argmax(np.isinf(column)))
            raise ValueError(f"'{name}' of row {row} is infinite; a mean needs finite values.")
    return np.stack(list(columns.values()), axis=1)


def _number_users(users: ArrayLike | None, n_rows: int) -> tuple[np.ndarray, int]:
    """Numbers from 0 of the users of rows, and how many users there are."""
    if users is None:
        return np.arange(n_rows), n_rows
    users = np.asarray(users)
    if users.shape != (n_rows,):
        raise ValueError(f"`users` has shape {users.shape}, expected ({n_rows},): one user a row.")
    if n_rows == 0:
        raise ValueError("There are no rows to draw users from.")
    names, member = np.unique(users, return_inverse=True)
    return member, len(names)


def _sum_by_user(table: np.ndarray, member: np.ndarray, n_users: int) -> np.ndarray:
    """Sums over the rows of a user, of shape (U, M), of `table` (N, M)."""
    sums = np.zeros((n_users, table.shape[1]))
    np.add.at(sums, member, table)
    return sums


def _draw_weights(n_users: int, width: int, seed: int) -> Iterator[np.ndarray]:
    """How often each user is drawn, `float64` of shape (d, U), in chunks of d draws for which `width` numbers each are kept."""
    rng = np.random.default_rng(seed)
    size = max(1, _CHUNK // width)
    for start in range(0, DRAWS, size):
        n = min(size, DRAWS - start)
        # The line of a draw is counted from where it begins, so that one count does for all
        drawn = rng.integers(n_users, size=(n, n_users)) + n_users * np.arange(n)[:, None]
        yield np.bincount(drawn.ravel(), minlength=n * n_users).reshape(n, n_users).astype(np.float64)


def _estimate(value: float, draws: np.ndarray, n: int) -> Estimate:
    draws = draws[~np.isnan(draws)]
    if n == 0 or len(draws) == 0:
        return Estimate(float("nan"), float("nan"), float("nan"), 0)
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(value), float(low), float(high), n)


def _sign_flip_p_values(totals: np.ndarray, seed: int) -> np.ndarray:
    """Two-sided p-values, of shape (M,), of the users' total differences (U, M)."""
    # What is equal but for the order of a sum is equal
    limit = np.abs(totals.sum(0)) - 1e-12 * np.abs(totals).sum(0)
    differ = (totals != 0).sum(0)
    few = differ <= np.log2(FLIPS)
    p_values = np.empty(totals.shape[1])
    for metric in np.flatnonzero(few):
        own = totals[totals[:, metric] != 0, metric]
        signs = 1 - 2.0 * (np.arange(2 ** len(own))[:, None] >> np.arange(len(own)) & 1)
        p_values[metric] = (np.abs(signs @ own) >= limit[metric]).mean()
    if not few.all():
        p_values[~few] = (1 + _count_as_large(totals[:, ~few], limit[~few], seed)) / (1 + FLIPS)
    return p_values


def _count_as_large(totals: np.ndarray, limit: np.ndarray, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    count = np.zeros(len(limit), np.int64)
    size = max(1, _CHUNK // sum(totals.shape))
    for start in range(0, FLIPS, size):
        n = min(size, FLIPS - start)
        bits = np.frombuffer(rng.bytes(-(-n * len(totals) // 8)), np.uint8)
        signs = 1 - 2.0 * np.unpackbits(bits, count=n * len(totals)).reshape(n, -1)
        count += (np.abs(signs @ totals) >= limit).sum(0)
    return count
