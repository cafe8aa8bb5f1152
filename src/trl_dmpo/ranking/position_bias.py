r"""
What a ranker makes of the place where a prompt lists a candidate: the same candidates in several orders.

[`position_bias`] scores every row in several orders, in which each candidate stands in each place about equally often.
The [`PositionBias`] that it returns says how much the scores move, which places gain, and has two calibrated scores:

- `calibrated`: the mean over the orders. It needs nothing else.
- [`stella`]: the Bayesian correction of STELLA, which needs a probing set of other rows; [`cross_fitted_stella`] takes it from
  the rows of other users.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from ..data.seeding import make_keys, uniforms
from .listing import Listing


if TYPE_CHECKING:
    from .rows import RankingRows
    from .scorer import Scorer


_FOLDS = 5


def balanced_orders(count: int, num_orders: int, seed: int = 0, row: int = 0) -> np.ndarray:
    """
    Orders in which every candidate stands in every place about equally often.

    Rows of Latin squares with rows and columns shuffled. The first order is 0, 1, 2, ...

    Args:
        count (`int`):
            Number C of candidates.
        num_orders (`int`):
            Number M of orders.
        seed (`int`, *optional*, defaults to `0`):
            Seed.
        row (`int`, *optional*, defaults to `0`):
            Tells rows apart, whose orders are drawn independently.

    Returns:
        `np.ndarray`: the candidate in each place, int64 of shape (M, C). How often a candidate stands in a place differs by at
        most one, and not at all if M is a multiple of C.

    Example:

    ```python
    >>> from trl_dmpo.ranking.position_bias import balanced_orders

    >>> balanced_orders(3, 3, seed=1)
    array([[0, 1, 2],
           [1, 2, 0],
           [2, 0, 1]])
    ```
    """
    blocks = -(-num_orders // count)
    numbers = uniforms(make_keys(seed, row, np.arange(blocks))[:, None, None], np.arange(3 * count).reshape(3, count))
    shifts, columns, names = numbers.argsort(axis=-1, kind="stable").swapaxes(0, 1)
    # The first order is the one that there was: a shift of none, with the columns' shuffle undone by the names
    shifts[0] = np.concatenate([[0], shifts[0][shifts[0] > 0]])
    names[0] = columns[0].argsort()
    places = (shifts[:, :, None] + columns[:, None, :]) % count
    return np.take_along_axis(names[:, None, :], places, axis=2).reshape(-1, count)[:num_orders]


def list_orders(rows: "RankingRows", num_orders: int, seed: int = 0) -> tuple[list[list], np.ndarray]:
    """
    The prompts of rows with their candidates listed in several orders, the first of which is that of the row.

    Args:
        rows ([`~trl_dmpo.ranking.rows.RankingRows`]):
            N rows whose prompts list their candidates.
        num_orders (`int`):
            Number M of orders.
        seed (`int`, *optional*, defaults to `0`):
            Seed. The orders of a row depend on it, the row's place in what it was read from, and nothing else.

    Returns:
        `tuple[list[list], np.ndarray]`: M prompts of each row; and which candidate is listed in each place, int64 of shape
        (N, M, C), -1 where a row has fewer than C candidates.

    Raises:
        `ValueError`: a prompt does not list its candidates, see [`~trl_dmpo.ranking.listing.Listing`]. The message names the
        row.
    """
    orders = np.full((len(rows), num_orders, max(map(len, rows.candidates), default=0)), -1)
    prompts = []
    for row, (prompt, candidates) in enumerate(zip(rows.prompts, rows.candidates, strict=True)):
        try:
            listing = Listing(prompt, candidates)
        except ValueError as error:
            raise ValueError(f"{rows.name}, row {_place(rows, row)}: {error}.") from error
        shuffles = balanced_orders(len(candidates), num_orders, seed, _place(rows, row))
        orders[row, :, : len(candidates)] = np.array(listing.order)[shuffles]
        prompts.append([listing.write(order) for order in orders[row, :, : len(candidates)].tolist()])
    return prompts, orders


def _place(rows: "RankingRows", row: int) -> int:
    return int(np.asarray(rows.places)[row])


def position_bias(
    scorer: "Scorer",
    rows: "RankingRows",
    num_orders: int,
    seed: int = 0,
    normalize: str = "sum",
    progress: Callable[[int], None] | None = None,
) -> "PositionBias":
    """
    Score every row with its candidates listed in several orders.

    Args:
        scorer ([`Scorer`]):
            What scores.
        rows ([`~trl_dmpo.ranking.rows.RankingRows`]):
            N rows whose prompts list their candidates.
        num_orders (`int`):
            Number M of orders, at least 2. It costs M times what it costs to score the rows. With as many orders as
            candidates, every candidate stands in every place once.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the orders.
        normalize (`str`, *optional*, defaults to `"sum"`):
            `"sum"` or `"mean"` over tokens, as of [`Scorer`].
        progress (`Callable`, *optional*):
            Called with the number of prompts that were scored, of N M in all.

    Returns:
        [`PositionBias`]

    Raises:
        `ValueError`: `num_orders` is below 2, or a prompt does not list its candidates; the message names the row.
    """
    if num_orders < 2:
        raise ValueError(f"`num_orders` is {num_orders}, but a bias shows in 2 orders or more.")
    prompts, orders = list_orders(rows, num_orders, seed)
    candidates = [row for row in rows.candidates for _ in range(num_orders)]
    asked = [prompt for row in prompts for prompt in row]
    scored = scorer.score(asked, candidates, normalize, progress, lambda number: rows.name_of(number // num_orders))
    scores = np.full(orders.shape, np.nan)
    for index, values in enumerate(scored):
        scores[(*divmod(index, num_orders), slice(len(values)))] = values.numpy()
    return PositionBias(scores, orders, np.asarray(rows.labels))


@dataclass(frozen=True, eq=False)
class PositionBias:
    r"""
    Scores of the candidates of N rows in M orders.

    In what follows, s_nmc is the score of candidate c of row n in order m, and p_nmc the place where it is listed, from 0.

    Args:
        scores (`np.ndarray`):
            s, in nats, float64 of shape (N, M, C), in the order of the rows' candidates, whatever the order in the prompt. NaN
            where a row has fewer than C candidates. The first order is that of the row: `scores[:, 0]` is what an evaluation
            without orders scores.
        orders (`np.ndarray`):
            The candidate in each place, int64 of shape (N, M, C), -1 where there is none.
        labels (`np.ndarray`):
            The chosen candidates, int64 of shape (N,).

    Example:

    Candidate 1 is the better one by a nat; to be listed first is worth two.

    ```python
    >>> import numpy as np
    >>> from trl_dmpo.ranking.position_bias import PositionBias

    >>> bias = PositionBias(
    ...     scores=np.array([[[-2.0, -3.0], [-4.0, -1.0]]]),
    ...     orders=np.array([[[0, 1], [1, 0]]]),
    ...     labels=np.array([1]),
    ... )
    >>> bias.calibrated, bias.ranks, bias.place_scores
    (array([[-3., -2.]]), array([[2., 1.]]), array([ 1., -1.]))
    ```
    """

    scores: np.ndarray
    orders: np.ndarray
    labels: np.ndarray

    @cached_property
    def places(self) -> np.ndarray:
        """p: where each candidate is listed, int64 of shape (N, M, C), -1 where there is none."""
        absent = self.orders < 0
        # Candidates and places that are not there come last in both, and so stay where they are
        places = np.where(absent, self.orders.shape[2], self.orders).argsort(axis=2, kind="stable")
        return np.where(absent, -1, places)

    @cached_property
    def calibrated(self) -> np.ndarray:
        r"""The mean over the orders, $(1/M) \sum_m s_{nmc}$, of shape (N, C), NaN where there is no candidate."""
        return self.scores.mean(axis=1)

    @cached_property
    def variance(self) -> np.ndarray:
        """The variance over the orders of each candidate's score (with M - 1), of shape (N, C), NaN where there is none."""
        return self.scores.var(axis=1, ddof=1)

    @cached_property
    def ranks(self) -> np.ndarray:
        """The rank of the chosen candidate, from 1, of shape (N, M). Of ties, the mean rank."""
        chosen = np.take_along_axis(self.scores, self.labels[:, None, None], axis=2)
        return 0.5 + (self.scores > chosen).sum(axis=2) + (self.scores == chosen).sum(axis=2) / 2

    @cached_property
    def rank_variance(self) -> np.ndarray:
        """The variance over the orders of the chosen candidate's rank (with M - 1), of shape (N,)."""
        return self.ranks.var(axis=1, ddof=1)

    @cached_property
    def first_places(self) -> np.ndarray:
        """How much of the first rank falls to each place, of shape (N, M, C): 1 to one place, or shared by ties."""
        best = self.scores == np.nanmax(self.scores, axis=2, keepdims=True)
        return self._by_place(best / best.sum(axis=2, keepdims=True), 0.0)

    @cached_property
    def place_scores(self) -> np.ndarray:
        r"""
        By how much a place raises a score: the mean of $s_{nmc} - \bar s_{nc}$ over all that stand in it, with
        $\bar s$ the mean over the orders. In nats, of shape (C,).
        """
        return np.nanmean(self._by_place(self.scores - self.calibrated[:, None], np.nan), axis=(0, 1))

    @cached_property
    def place_shares(self) -> np.ndarray:
        """How often the candidate in a place is ranked first, of shape (C,), over the rows that have the place."""
        return self._mean_by_place(self.first_places)

    @cached_property
    def expected_shares(self) -> np.ndarray:
        """`place_shares` if places made no difference: 1/C, or its mean over rows of different C. Of shape (C,)."""
        there = self.orders >= 0
        return self._mean_by_place(there / there.sum(axis=2, keepdims=True))

    def _by_place(self, values: np.ndarray, absent: float) -> np.ndarray:
        """Values of candidates, of shape (N, M, C), in the order of the places."""
        there = self.orders >= 0
        return np.where(there, np.take_along_axis(values, np.where(there, self.orders, 0), axis=2), absent)

    def _mean_by_place(self, values: np.ndarray) -> np.ndarray:
        return values.sum(axis=(0, 1)) / (self.orders >= 0).sum(axis=(0, 1))


def transition_matrix(probing: PositionBias) -> np.ndarray:
    r"""
    How a ranker confuses places, the probing stage of STELLA (https://huggingface.co/papers/2312.15746):

    T_ij = P(the candidate in place j is ranked first | the chosen one stands in place i)

    estimated by counting, with one observation spread evenly over each row of T added to what was counted, as a place that was
    never seen first could otherwise rule a candidate out for good.

    Args:
        probing ([`PositionBias`]):
            Rows with known answers, other than those to be corrected, all with the same number of candidates.

    Returns:
        `np.ndarray`: T, float64 of shape (C, C). Each row sums to 1.

    Raises:
        `ValueError`: rows differ in their number of candidates.

    Example:

    ```python
    >>> import numpy as np
    >>> from trl_dmpo.ranking.position_bias import PositionBias, transition_matrix

    >>> always_first = PositionBias(
    ...     scores=np.array([[[-2.0, -3.0], [-4.0, -1.0]]]), orders=np.array([[[0, 1], [1, 0]]]), labels=np.array([1])
    ... )
    >>> transition_matrix(always_first)
    array([[0.75, 0.25],
           [0.75, 0.25]])
    ```
    """
    _check_equal_counts(probing)
    count = probing.orders.shape[2]
    chosen = np.take_along_axis(probing.places, probing.labels[:, None, None], axis=2)[..., 0]
    counted = np.full((count, count), 1 / count)
    np.add.at(counted, chosen.ravel(), probing.first_places.reshape(-1, count))
    return counted / counted.sum(axis=1, keepdims=True)


def stella(bias: PositionBias, transition: np.ndarray) -> np.ndarray:
    r"""
    Scores with the position bias taken out, the recommendation stage of STELLA (https://huggingface.co/papers/2312.15746).

    What the ranker puts first in order m is evidence of which candidate is the right one. From an even prior, with y_m the
    place that it ranks first and p_mc the place of candidate c,

    P_m(c) ∝ P_{m-1}(c) T[p_mc, y_m]        H_m = - sum_c P_m(c) log P_m(c)

    and the result is P_m of the m with the smallest entropy H_m. Where candidates tie for the first rank, T[p_mc, y_m] is the
    mean over them.

    Args:
        bias ([`PositionBias`]):
            Rows to be corrected, with C candidates each.
        transition (`np.ndarray`):
            T, of shape (C, C), from [`transition_matrix`] on other rows.

    Returns:
        `np.ndarray`: log P, float64 of shape (N, C), in the order of the rows' candidates.

    Raises:
        `ValueError`: a row has another number of candidates than T.

    Example:

    The ranker below puts the second place first, but for half of the rows where the right candidate stands in the first. So
    when it does put the first place first, that is nearly proof.

    ```python
    >>> import numpy as np
    >>> from trl_dmpo.ranking.position_bias import PositionBias, stella

    >>> bias = PositionBias(
    ...     scores=np.array([[[-3.0, -2.0], [-3.0, -2.0]]]), orders=np.array([[[0, 1], [1, 0]]]), labels=np.array([1])
    ... )
    >>> np.exp(stella(bias, transition=np.array([[0.5, 0.5], [0.01, 0.99]]))).round(2)
    array([[0.01, 0.99]])
    ```
    """
    _check_equal_counts(bias)
    if transition.shape != (bias.orders.shape[2],) * 2:
        raise ValueError(
            f"the transition matrix is of shape {transition.shape}, but rows have {bias.orders.shape[2]} candidates. Take it "
            "from rows with as many."
        )
    evidence = np.einsum("ij,nmj->nmi", transition, bias.first_places)
    logits = np.log(np.take_along_axis(evidence, bias.places, axis=2)).cumsum(axis=1)
    logp = logits - np.logaddexp.reduce(logits, axis=2, keepdims=True)
    entropy = -(np.exp(logp) * logp).sum(axis=2)
    # Sums of the same logarithms in another order differ by rounding, which must not break a tie
    return logp[np.arange(len(logp)), entropy.round(9).argmin(axis=1)].round(9)


def cross_fitted_stella(bias: PositionBias, users: np.ndarray, seed: int = 0) -> np.ndarray:
    """
    [`stella`] without a probing set of its own: users are dealt into five groups, and the rows of each are corrected with the
    transition matrix of the others, so that no row is corrected with its own answer.

    Args:
        bias ([`PositionBias`]):
            Rows, with C candidates each.
        users (`np.ndarray`):
            The user of each row, int64 of shape (N,), from 0.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the groups.

    Returns:
        `np.ndarray`: log P, float64 of shape (N, C), in the order of the rows' candidates.

    Raises:
        `ValueError`: rows differ in their number of candidates, or are of one user.
    """
    _, users = np.unique(users, return_inverse=True)
    count = int(users.max(initial=-1)) + 1
    if count < 2:
        raise ValueError(
            "all rows are of one user, so there is nobody else's to learn the bias from. Give a probing set."
        )
    shuffled = uniforms(make_keys(seed), np.arange(count)).argsort(kind="stable")
    fold = shuffled.argsort()[users] % _FOLDS
    result = np.empty(bias.labels.shape + bias.orders.shape[2:])
    for number in range(min(_FOLDS, count)):
        rows = fold == number
        result[rows] = stella(_take(bias, rows), transition_matrix(_take(bias, ~rows)))
    return result


def _take(bias: PositionBias, rows: np.ndarray) -> PositionBias:
    return PositionBias(bias.scores[rows], bias.orders[rows], bias.labels[rows])


def _check_equal_counts(bias: PositionBias) -> None:
    counts = (bias.orders[:, 0] >= 0).sum(axis=1)
    if (counts != bias.orders.shape[2]).any():
        row = int((counts != bias.orders.shape[2]).argmax())
        raise ValueError(
            f"row {row} has {counts[row]} candidates and another has {bias.orders.shape[2]}: places can be compared among rows "
            "with equally many only. Use the mean over the orders, or rows with equally many."
        )
