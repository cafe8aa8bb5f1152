import math
from itertools import pairwise, permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, ndcg_score, roc_auc_score
from torchmetrics.functional import retrieval as torchmetrics

from trl_dmpo.ranking import metrics as module
from trl_dmpo.ranking.metrics import pad_candidates, ranking_metrics


NAN, INF = math.nan, math.inf


def of_row(scores, relevant, cutoffs=(1, 2, 3)) -> dict[str, float]:
    mask = np.isin(np.arange(len(scores)), relevant)
    return {name: value.item() for name, value in ranking_metrics(np.array([scores]), mask[None], cutoffs).items()}


LOG3 = math.log2(3)

# Scores, places of the relevant ones, and what must come out
BY_HAND = {
    "second of four": (
        [-3.0, -1.0, -2.0, -9.0],
        [2],
        {"hit_rate@1": 0, "hit_rate@2": 1, "recall@2": 1, "ndcg@1": 0, "ndcg@2": 1 / LOG3, "ndcg@3": 1 / LOG3}
        | {"mrr@1": 0, "mrr@2": 1 / 2, "map@3": 1 / 2, "mrr": 1 / 2, "paired_accuracy": 2 / 3},
    ),
    "all four equal": (
        [-2.0] * 4,
        [1],
        {"hit_rate@1": 1 / 4, "hit_rate@3": 3 / 4, "recall@3": 3 / 4, "ndcg@1": 1 / 4, "ndcg@2": (1 + 1 / LOG3) / 4}
        | {"mrr": (1 + 1 / 2 + 1 / 3 + 1 / 4) / 4, "mrr@2": 3 / 8, "map@2": 3 / 8, "paired_accuracy": 1 / 2},
    ),
    "one candidate": (
        [-5.0],
        [0],
        {"hit_rate@1": 1, "hit_rate@3": 1, "ndcg@3": 1, "mrr": 1, "map@3": 1, "recall@1": 1, "paired_accuracy": NAN},
    ),
    "tied at second and third of three": (
        [-1.0, -2.0, -2.0],
        [1],
        {"hit_rate@1": 0, "hit_rate@2": 1 / 2, "hit_rate@3": 1, "ndcg@2": 1 / LOG3 / 2, "mrr@2": 1 / 4}
        | {"mrr": (1 / 2 + 1 / 3) / 2, "paired_accuracy": 1 / 4},
    ),
    "first and third of four": (
        [4.0, 3.0, 2.0, 1.0],
        [0, 2],
        {"hit_rate@1": 1, "recall@1": 1 / 2, "recall@3": 1, "ndcg@1": 1, "ndcg@2": 1 / (1 + 1 / LOG3)}
        | {"map@1": 1, "map@2": 1 / 2, "map@3": (1 + 2 / 3) / 2, "mrr": 1, "paired_accuracy": 3 / 4},
    ),
    # Of the orders RRX, RXR, XRR, each a third: first relevant at 1, 1, 2
    "two relevant of three equal": (
        [0.0, 0.0, 0.0],
        [0, 1],
        {"hit_rate@1": 2 / 3, "hit_rate@2": 1, "recall@2": 2 / 3, "mrr": (1 + 1 + 1 / 2) / 3}
        | {"map@3": (1 + (1 + 2 / 3) / 2 + (1 / 2 + 2 / 3) / 2) / 3, "map@2": (1 + 1 / 2 + 1 / 4) / 3}
        | {"paired_accuracy": 1 / 2},
    ),
    "minus infinity ties with itself, below all else": (
        [-INF, -1.0, -INF],
        [0],
        {"hit_rate@1": 0, "hit_rate@2": 1 / 2, "hit_rate@3": 1, "paired_accuracy": 1 / 4},
    ),
    "the absent rank nowhere": (
        [-2.0, NAN, -1.0, NAN],
        [0],
        {"hit_rate@1": 0, "hit_rate@2": 1, "mrr": 1 / 2, "paired_accuracy": 0},
    ),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_by_hand(case):
    scores, relevant, expected = BY_HAND[case]
    metrics = of_row(scores, relevant)
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, abs=1e-12, nan_ok=True)


def in_order(relevance: list[bool], k: int) -> dict[str, float]:
    """The metrics of one order without ties, from their definitions."""
    total, top = sum(relevance), relevance[:k]
    precisions = [sum(top[: p + 1]) / (p + 1) for p, hit in enumerate(top) if hit]
    first = relevance.index(True) + 1
    wins = [(p, q) for p, a in enumerate(relevance) for q, b in enumerate(relevance) if a and not b and p < q]
    return {
        f"hit_rate@{k}": float(any(top)),
        f"recall@{k}": sum(top) / total,
        f"ndcg@{k}": sum(hit / math.log2(p + 2) for p, hit in enumerate(top))
        / sum(1 / math.log2(p + 2) for p in range(min(k, total))),
        f"mrr@{k}": 1 / first if first <= k else 0.0,
        f"map@{k}": sum(precisions) / min(k, total),
        "mrr": 1 / first,
        "paired_accuracy": len(wins) / (total * (len(relevance) - total)) if total < len(relevance) else NAN,
    }


@st.composite
def rows(draw):
    scores = draw(st.lists(st.sampled_from([-INF, -1.0, 0.0, 1.0]), min_size=1, max_size=5))
    relevant = draw(st.sets(st.integers(0, len(scores) - 1), min_size=1))
    return scores, sorted(relevant), draw(st.integers(1, 6))


@settings(max_examples=100, deadline=None)
@given(rows())
def test_a_tie_is_the_mean_over_all_its_orders(row):
    scores, relevant, k = row
    orders = [order for order in permutations(range(len(scores))) if is_descending([scores[i] for i in order])]
    each = [in_order([i in relevant for i in order], k) for order in orders]
    expected = {name: np.mean([metrics[name] for metrics in each]) for name in each[0]}
    assert of_row(scores, relevant, [k]) == pytest.approx(expected, abs=1e-12, nan_ok=True)


def is_descending(scores: list[float]) -> bool:
    return all(a >= b for a, b in pairwise(scores))


@pytest.fixture
def many():
    """100 rows of 30 candidates with one to five relevant ones, scores with and without ties."""
    rng = np.random.default_rng(0)
    relevant = np.argsort(rng.random((100, 30)), axis=1) < rng.integers(1, 6, size=(100, 1))
    return rng.permuted(np.arange(3000.0)).reshape(100, 30), rng.integers(0, 8, size=(100, 30)) * 1.0, relevant


def test_equals_scikit_learn(many):
    distinct, tied, relevant = many
    metrics = ranking_metrics(tied, relevant, [1, 5, 30])
    for k in (1, 5, 30):  # scikit-learn averages over ties, too
        assert metrics[f"ndcg@{k}"].mean() == pytest.approx(ndcg_score(relevant, tied, k=k), abs=1e-12)
    aucs = [roc_auc_score(truth, row) for truth, row in zip(relevant, tied, strict=True)]
    np.testing.assert_allclose(metrics["paired_accuracy"], aucs, atol=1e-12)
    precisions = [average_precision_score(truth, row) for truth, row in zip(relevant, distinct, strict=True)]
    np.testing.assert_allclose(ranking_metrics(distinct, relevant, [30])["map@30"], precisions, atol=1e-12)


def test_equals_torchmetrics(many):
    distinct, _, relevant = many
    metrics = ranking_metrics(distinct, relevant, [1, 5, 30])
    theirs = {
        "hit_rate": torchmetrics.retrieval_hit_rate,
        "recall": torchmetrics.retrieval_recall,
        "ndcg": torchmetrics.retrieval_normalized_dcg,
        "mrr": torchmetrics.retrieval_reciprocal_rank,
    }
    pairs = [(torch.tensor(a), torch.tensor(b)) for a, b in zip(distinct, relevant, strict=True)]
    for name, function in theirs.items():
        for k in (1, 5, 30):
            expected = [function(scores, truth, top_k=k).item() for scores, truth in pairs]
            np.testing.assert_allclose(metrics[f"{name}@{k}"], expected, atol=1e-6, err_msg=f"{name}@{k}")
    # With a cutoff theirs divides by the relevant ones found, ours by the most that could be
    expected = [torchmetrics.retrieval_average_precision(scores, truth).item() for scores, truth in pairs]
    np.testing.assert_allclose(metrics["map@30"], expected, atol=1e-6)


def test_of_one_relevant_recall_is_the_hit_rate_and_map_is_mrr(many):
    _, tied, _ = many
    metrics = ranking_metrics(tied, np.arange(30) == np.full((100, 1), 7), [1, 5, 30])
    for k in (1, 5, 30):
        np.testing.assert_allclose(metrics[f"recall@{k}"], metrics[f"hit_rate@{k}"], atol=1e-12)
        np.testing.assert_allclose(metrics[f"map@{k}"], metrics[f"mrr@{k}"], atol=1e-12)


def test_neither_order_nor_padding_nor_blocks_matter(many, monkeypatch):
    _, scores, relevant = many
    expected = ranking_metrics(scores, relevant)
    order = np.argsort(np.random.default_rng(1).random((100, 35)), axis=1)
    padded = np.pad(scores, ((0, 0), (0, 5)), constant_values=NAN)
    marked = np.pad(relevant, ((0, 0), (0, 5)))
    monkeypatch.setattr(module, "_BLOCK", 7 * 35)
    shuffled = ranking_metrics(np.take_along_axis(padded, order, 1), np.take_along_axis(marked, order, 1))
    assert shuffled.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(shuffled[name], values, atol=1e-12, err_msg=name)


def test_exact_over_a_whole_catalogue_of_ties():
    scores = np.zeros((1, 100_000))
    metrics = ranking_metrics(scores, np.arange(100_000)[None] == 5, [10])
    assert metrics["hit_rate@10"].item() == pytest.approx(1e-4, rel=1e-9)
    assert metrics["mrr"].item() == pytest.approx((1 / np.arange(1, 100_001)).sum() / 100_000, rel=1e-9)


FIRST = [[True, False], [True, False]]


@pytest.mark.parametrize(
    ("scores", "relevant", "cutoffs", "message"),
    [
        ([[1.0, 2.0], [1.0, 2.0]], [[True, False], [False, False]], [1], "Row 1: no candidate is relevant"),
        ([[1.0, 2.0], [NAN, 2.0]], FIRST, [1], r"Row 1: a relevant candidate has no score \(NaN\)"),
        ([[1.0, INF], [1.0, 2.0]], FIRST, [1], "Row 0: a score is plus infinity"),
        ([[1.0, 2.0, 3.0]] * 2, FIRST, [1], r"scores of shape \(2, 3\) and bool of shape \(2, 2\)"),
        ([[1.0, 2.0]] * 2, [[1, 0]] * 2, [1], r"int64 of shape \(2, 2\)"),
        ([[1.0, 2.0]] * 2, FIRST, [1, 0], r"`cutoffs` must be whole numbers of at least 1, got \[1, 0\]"),
    ],
)
def test_errors_name_the_row(scores, relevant, cutoffs, message):
    with pytest.raises(ValueError, match=message):
        ranking_metrics(np.array(scores), np.array(relevant), cutoffs)


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([[1.0], [1.0, NAN]], [0, 0], "Row 1: the score of candidate 1 is NaN"),
        ([[1.0], [1.0, 2.0]], [0, 2], "Row 1: label 2 is no place among its 2 candidates"),
        ([[1.0], []], [0, 0], "Row 1: label 0 is no place among its 0 candidates"),
        ([[1.0]], [0, 1], r"got 1 rows and int64 labels of shape \(2,\)"),
        ([[1.0]], [0.5], r"got 1 rows and float64 labels"),
    ],
)
def test_padding_checks_rows(scores, labels, message):
    with pytest.raises(ValueError, match=message):
        pad_candidates(scores, labels)
