import numpy as np
import pytest

from trl_dmpo.ranking import intervals as module
from trl_dmpo.ranking.auc import auc_statistic
from trl_dmpo.ranking.intervals import (
    Estimate,
    bootstrap,
    bootstrap_mean,
    bootstrap_means,
    holm,
    paired_test,
    paired_tests,
)


def share_covering(estimates: dict[str, Estimate], truth: float) -> float:
    return np.mean([estimate.low <= truth <= estimate.high for estimate in estimates.values()])


def as_metrics(table: np.ndarray) -> dict[str, np.ndarray]:
    """Columns as metrics: simulations that share the draws."""
    return {str(i): column for i, column in enumerate(table.T)}


# 95% of 1,000 simulations is 950 with a standard deviation of 7; the percentile bootstrap itself is a little narrow
def test_covers_the_truth_at_the_rate_that_it_claims():
    rng = np.random.default_rng(0)
    hits = bootstrap_means(as_metrics((rng.random((200, 1000)) < 0.3).astype(float)))
    assert 0.925 < share_covering(hits, 0.3) < 0.97
    skewed = bootstrap_means(as_metrics(rng.exponential(size=(200, 1000))))
    assert 0.92 < share_covering(skewed, 1.0) < 0.97


def test_rows_of_a_user_stay_together():
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(100), 5)
    rows = rng.normal(size=(100, 500))[users] + 0.3 * rng.normal(size=(500, 500))
    assert 0.91 < share_covering(bootstrap_means(as_metrics(rows), users), 0.0) < 0.975
    # As if each row were a user, the interval is about half as wide as it must be
    assert share_covering(bootstrap_means(as_metrics(rows)), 0.0) < 0.7


def test_who_has_more_rows_counts_more():
    # The mean over rows of what grows with their number s is 2 E[s^2] / E[s], for s of 1 to 8 alike 2 * 25.5 / 4.5
    covered = []
    for seed in range(100):
        sizes = np.random.default_rng(seed).integers(1, 9, size=150)
        covered.append(bootstrap_mean(2.0 * np.repeat(sizes, sizes), np.repeat(np.arange(150), sizes), seed))
    assert np.mean([value for value, *_ in covered]) == pytest.approx(2 * 25.5 / 4.5, abs=0.1)
    assert 0.87 < np.mean([low <= 2 * 25.5 / 4.5 <= high for _, low, high, _ in covered]) < 0.995
    assert {n for *_, n in covered} == {150}


def test_an_interval_by_hand():
    # The mean of a draw is 0, 1/2 or 1 with chance 1/4, 1/2, 1/4; of three users, 0 with chance 8/27
    assert bootstrap_mean([0.0, 1.0]) == (0.5, 0.0, 1.0, 2)
    assert bootstrap_mean([0.0, 0.0, 1.0], users=["a", "b", "c"]) == (pytest.approx(1 / 3), 0.0, 1.0, 3)
    assert bootstrap_mean([0.0, 1.0, 1.0], users=[7, 7, 7]) == (2 / 3, 2 / 3, 2 / 3, 1)
    # Of 400 fair coins: 0.5 +- 1.96 / sqrt(4 * 400)
    _, low, high, n = bootstrap_mean(np.arange(400) % 2)
    assert (low, high, n) == (pytest.approx(0.451, abs=0.006), pytest.approx(0.549, abs=0.006), 400)


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, 1e6])
def test_what_does_not_vary_has_no_width(value):
    estimate = bootstrap_mean([value] * 7, users=[1, 1, 1, 2, 2, 3, 4])
    assert estimate == (pytest.approx(value, rel=1e-15), estimate.value, estimate.value, 4)


def test_rows_without_a_value_are_left_out():
    values = np.array([1.0, np.nan, 0.0, np.nan, np.nan])
    users = np.array([1, 1, 2, 3, 3])
    assert bootstrap_mean(values, users) == (0.5, 0.0, 1.0, 2)
    drawn = bootstrap_means({"some": values, "none": np.full(5, np.nan), "all": np.arange(5.0)}, users)
    assert drawn["some"] == bootstrap_mean(values, users)
    assert np.isnan(drawn["none"][:3]).all()
    assert drawn["none"].n == 0
    assert drawn["all"].n == 3


def test_metrics_share_their_draws_whatever_the_chunks(monkeypatch):
    rng = np.random.default_rng(0)
    values, users = rng.random((90, 3)), rng.integers(40, size=90)
    together = bootstrap_means(as_metrics(values), users, seed=5)
    monkeypatch.setattr(module, "_CHUNK", 1000)
    for i in range(3):
        mean = bootstrap(lambda weights, i=i: weights @ values[:, i] / weights.sum(1), users, seed=5)
        assert together[str(i)] == pytest.approx(mean, abs=1e-12)
        assert together[str(i)] == pytest.approx(bootstrap_mean(values[:, i], users, seed=5), abs=1e-12)
    assert together["0"] != bootstrap_mean(values[:, 0], users, seed=6)


def test_the_interval_of_an_auc_covers_the_truth():
    rng = np.random.default_rng(0)
    relevant = np.array([[True, False, False]] * 50)
    covered = 0
    for _ in range(60):
        # A user's scores share a level: over all rows, chosen minus rejected is normal with mean 1 and variance 4
        scores = rng.normal(size=(50, 1)) + rng.normal(size=(50, 3)) + relevant
        _, low, high, n = bootstrap(auc_statistic(scores, relevant), range(50))
        covered += low <= 0.6914624612740131 <= high  # The standard normal up to 1 / 2
        assert n == 50
    assert covered >= 51  # 57 with a standard deviation of 1.7


def test_draws_without_the_figure_are_left_out():
    # One of two users has rejected candidates: without her, a draw has no AUC
    scores, relevant = np.array([[1.0, 0.0], [1.0, np.nan]]), np.array([[True, False], [True, False]])
    assert bootstrap(auc_statistic(scores, relevant), [1, 2]) == (1.0, 1.0, 1.0, 2)


def test_p_values_are_uniform_if_the_models_are_alike():
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(60), 3)
    model, baseline = (rng.normal(size=(60, 500))[users] + rng.normal(size=(180, 500)) for _ in range(2))
    tests = paired_tests(as_metrics(model), as_metrics(baseline), users)
    p_values = np.array([test.p_value for test in tests.values()])
    for level in (0.01, 0.05, 0.2, 0.5, 0.9):
        assert (p_values <= level).mean() == pytest.approx(level, abs=4 * np.sqrt(level * (1 - level) / 500))
    # As if rows were users, chance looks like a difference
    naive = paired_tests(as_metrics(model), as_metrics(baseline))
    assert np.mean([test.p_value <= 0.05 for test in naive.values()]) > 0.12


def test_a_difference_is_found():
    rng = np.random.default_rng(0)
    baseline = rng.normal(size=300)
    difference, p_value = paired_test(baseline + 0.2 + 0.5 * rng.normal(size=300), baseline)
    assert p_value == 1 / 10_000  # As small as it gets
    assert 0 < difference.low < 0.2 < difference.high
    assert difference.value == pytest.approx(0.2, abs=0.1)


def test_few_users_are_enumerated():
    # Of the 16 signs of 1, 2, 4, -1 the sum is at least 6 in size for 4 + 2 +- 1 -+ 1 (8, 6, 6) and their negatives
    assert paired_test([1, 2, 4, 0], [0, 0, 0, 1]).p_value == 6 / 16
    # Rows of one user flip together, and who has no difference does not count
    assert paired_test([1, 1, 1, 0, 0], [0, 0, 0, 0, 0], users=[1, 1, 2, 3, 4]).p_value == 2 / 4
    assert paired_test([1, 0], [1, 0]) == (Estimate(0.0, 0.0, 0.0, 2), 1.0)
    # Sums that are equal but for what floating point makes of tenths are as large: 0.1 + 0.2 is not 0.3 there
    differences = np.array([6.0, 2.0, -4.0, 5.0, 4.0])
    assert paired_test(differences, [0] * 5).p_value == paired_test(differences * 0.1, [0] * 5).p_value == 8 / 32


def test_drawn_signs_agree_with_all_signs(monkeypatch):
    rng = np.random.default_rng(0)
    values = rng.normal(0.3, size=(12, 4))
    zeros = as_metrics(np.zeros((12, 4)))
    exact = paired_tests(as_metrics(values), zeros)
    monkeypatch.setattr(module, "_CHUNK", 3000)
    monkeypatch.setattr(module, "FLIPS", 4000)  # Fewer than the 4,096 ways
    for name, (difference, p_value) in paired_tests(as_metrics(values), zeros).items():
        assert p_value == pytest.approx(exact[name].p_value, abs=4 * np.sqrt(0.25 / 4000))
        assert p_value * 4001 == pytest.approx(round(p_value * 4001))
        assert difference == exact[name].difference


def test_pairs_where_one_has_no_value_are_left_out():
    difference, p_value = paired_test([1, np.nan, 1, 1], [0, 0, np.nan, 1])
    assert difference[0] == 0.5
    assert difference.n == 2
    assert p_value == 1


def test_holm_by_hand():
    # Rising: 0.01 * 4, 0.02 * 3, 0.022 * 2 but no less than the one before, 0.8
    assert holm([0.02, 0.8, 0.01, 0.022]) == pytest.approx([0.06, 0.8, 0.04, 0.06])
    assert holm([0.6, 0.7]).tolist() == [1.0, 1.0]
    assert holm([]).tolist() == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bootstrap_means({}), "no rows"),
        (lambda: bootstrap_mean([]), "no rows"),
        (lambda: bootstrap_means({"a": [1, 2], "b": [1]}), r"'b' has shape \(1,\), expected \(2,\)"),
        (lambda: bootstrap_means({"a": [1, 2, np.inf]}), "'a' of row 2 is infinite"),
        (lambda: bootstrap_mean([1, 2], users=[1]), r"`users` has shape \(1,\), expected \(2,\)"),
        (lambda: bootstrap(lambda weights: weights[:, 0], users=[]), "no rows to draw users from"),
        (lambda: paired_tests({"a": [1], "b": [1]}, {"a": [1], "c": [1]}), "has these metrics: b, c"),
        (lambda: paired_test([1, 2], [1]), r"baseline.*1 rows.*2"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_an_interval_stays_within_the_values():
    gains = np.zeros((9, 40))
    gains[0] = 1 / np.log2(np.arange(2, 42))  # NDCG at each rank, in one row of nine
    estimates = bootstrap_means({f"ndcg of rank {rank}": column for rank, column in enumerate(gains.T)}).values()
    assert [estimate.low for estimate in estimates] == [0.0] * 40
