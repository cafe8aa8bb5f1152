from itertools import product

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from trl_dmpo.ranking.auc import auc_statistic, coin_flip_auc, pooled_auc


@pytest.fixture(params=[(200, 6), (20, 60)], ids=["short lists", "long lists"])
def ragged(request):
    """Rows of a few or many candidates with many ties, one to three of them relevant."""
    n_rows, n_candidates = request.param
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 20, size=request.param) * 1.0
    relevant = np.arange(n_candidates) < rng.integers(1, 4, size=(n_rows, 1))
    scores[~relevant & (np.arange(n_candidates) >= rng.integers(1, n_candidates + 1, size=(n_rows, 1)))] = np.nan
    return scores + 2 * relevant, relevant


def test_pooled_equals_scikit_learn(ragged):
    scores, relevant = ragged
    present = ~np.isnan(scores)
    expected = roc_auc_score(relevant[present], scores[present])
    assert 0.5 < expected < 0.9
    assert pooled_auc(scores, relevant) == pytest.approx(expected, abs=1e-12)


def test_weighted_equals_scikit_learn(ragged):
    scores, relevant = ragged
    present = ~np.isnan(scores)
    statistic = auc_statistic(scores, relevant)
    weights = np.random.default_rng(1).integers(0, 3, size=(5, len(scores))) * 1.0
    for row_weights, auc in zip(weights, statistic(weights), strict=True):
        of_candidates = np.broadcast_to(row_weights[:, None], scores.shape)[present]
        expected = roc_auc_score(relevant[present], scores[present], sample_weight=of_candidates)
        assert auc == pytest.approx(expected, abs=1e-12)


def test_without_weight_on_one_side_there_is_none():
    scores, relevant = np.array([[1.0, 0.0], [1.0, np.nan]]), np.array([[True, False], [True, False]])
    statistic = auc_statistic(scores, relevant)
    np.testing.assert_array_equal(statistic(np.array([[1.0, 0.0], [0.0, 2.0]])), [1, np.nan])


SCORES = np.array([[3.0, 1.0, 3.0], [2.0, 4.0, 0.0], [1.0, 0.5, 2.0]])
FIRST = np.arange(3) == np.zeros((3, 1))


def all_flips(scores: np.ndarray) -> list[float]:
    """The AUC of every way that the coins of three rows may fall, and of every rejected candidate that may be kept."""
    aucs = []
    for heads, *picks in product(product([True, False], repeat=3), *[[1, 2]] * 3):
        if any(heads) and not all(heads):
            kept = [row[0] if head else row[pick] for row, head, pick in zip(scores, heads, picks, strict=True)]
            aucs.append(roc_auc_score(heads, kept))
    return aucs


def test_coin_flips_fall_as_the_notebook_has_them():
    flips = coin_flip_auc(SCORES, FIRST, flips=4000, seed=1)
    expected = all_flips(SCORES)
    values, counts = np.unique(flips, return_counts=True)
    chances = [np.isclose(expected, value).mean() for value in values]
    assert sum(chances) == pytest.approx(1)  # Nothing else can fall, and all of it did
    assert counts / 4000 == pytest.approx(chances, abs=4 * np.sqrt(0.25 / 4000))


def test_their_mean_is_over_pairs_of_different_rows():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(60, 2)).round(1)
    scores[:, 1] -= 0.3
    relevant = np.array([[True, False]] * 60)
    difference = scores[:, :1] - scores[:, 1]
    won = (difference > 0) + 0.5 * (difference == 0)
    expected = won[~np.eye(60, dtype=bool)].mean()
    flips = coin_flip_auc(scores, relevant, flips=2000)
    assert flips.mean() == pytest.approx(expected, abs=4 * flips.std() / np.sqrt(2000))
    assert 0.02 < flips.std() < 0.15


def test_coin_flips_are_seeded():
    assert coin_flip_auc(SCORES, FIRST, seed=3).tolist() == coin_flip_auc(SCORES, FIRST, seed=3).tolist()
    assert coin_flip_auc(SCORES, FIRST, seed=3).tolist() != coin_flip_auc(SCORES, FIRST, seed=4).tolist()


def test_errors():
    with pytest.raises(ValueError, match="No row has a rejected candidate"):
        pooled_auc(np.array([[1.0], [2.0]]), np.array([[True], [True]]))
    alone = np.array([[1.0, 2.0], [1.0, np.nan]])
    with pytest.raises(ValueError, match="Row 1: no rejected candidate"):
        coin_flip_auc(alone, np.array([[True, False], [True, False]]))
    with pytest.raises(ValueError, match="There is one row"):
        coin_flip_auc(alone[:1], np.array([[True, False]]))
