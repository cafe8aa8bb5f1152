import numpy as np
import pytest

from trl_dmpo.ranking.beyond_accuracy import catalogue_coverage, mean_popularity, popularity_lift


def test_coverage():
    assert catalogue_coverage([["a", "b"], ["b", "c"], []], ["a", "b", "c", "d", "e"]) == 3 / 5
    assert catalogue_coverage([], ["a"]) == 0
    with pytest.raises(ValueError, match="Row 1: item 'x' is not in the catalogue"):
        catalogue_coverage([["a"], ["x"]], ["a"])
    with pytest.raises(ValueError, match="The catalogue is empty"):
        catalogue_coverage([], [])


def test_mean_popularity():
    popularity = {1: 10, 2: 20, 3: 60}
    np.testing.assert_array_equal(mean_popularity([[1, 2, 3], [3], []], popularity), [30, 60, np.nan])
    with pytest.raises(ValueError, match=r"Row 1: the popularity of item 9 \(history\) is not known"):
        mean_popularity([[1], [2, 9]], popularity, name="history")


def test_the_lift_is_of_group_means():
    # Means of 50 against 20: 1.5. The mean of the two users' own lifts would be (4 + 0.25) / 2
    value, low, high, n = popularity_lift([50.0, 50.0], [10.0, 40.0], users=["ann", "bob"])
    assert value == pytest.approx(1.0)
    assert (low, high, n) == (pytest.approx(0.25), pytest.approx(4.0), 2)
    # A user's rows stay together, and rows without a history do not count
    assert popularity_lift([30.0, 30.0, 99.0], [20.0, 10.0, np.nan], users=[1, 1, 2]) == (1.0, 1.0, 1.0, 1)


def test_lift_errors():
    with pytest.raises(ValueError, match="No history has an item of some popularity"):
        popularity_lift([1.0, 2.0], [0.0, np.nan])
    with pytest.raises(ValueError, match=r"\(2,\) recommended, \(1,\) histories"):
        popularity_lift([1.0, 2.0], [1.0])
