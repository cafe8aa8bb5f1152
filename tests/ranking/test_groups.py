import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_dmpo.ranking.groups import group_rows


def as_lists(groups: dict[str, np.ndarray]) -> dict[str, list[int]]:
    return {label: rows.tolist() for label, rows in groups.items()}


def test_few_values_as_they_are_in_their_order():
    assert as_lists(group_rows([10, 9, 10, None, float("nan")])) == {"9": [1], "10": [0, 2], "none": [3, 4]}
    assert list(group_rows([10, 9, 10])) == ["9", "10"]  # As numbers, not as text
    assert as_lists(group_rows(["m", "f", "m"])) == {"f": [1], "m": [0, 2]}
    assert as_lists(group_rows([True, False])) == {"False": [1], "True": [0]}
    # What is called none and what is missing are one group, and no row is lost
    assert as_lists(group_rows(["none", "f", None])) == {"f": [1], "none": [0, 2]}
    assert as_lists(group_rows([])) == {}


def test_lists_by_their_length():
    assert as_lists(group_rows([[1, 2, 3], [7], [4, 5, 6], []])) == {"0": [3], "1": [1], "3": [0, 2]}
    groups = group_rows([list(range(n)) for n in range(40, 0, -1)])
    assert {label: len(rows) for label, rows in groups.items()} == {
        "1 to 10": 10,
        "11 to 20": 10,
        "21 to 30": 10,
        "31 to 40": 10,
    }


def test_equal_numbers_are_never_parted():
    values = [1] * 70 + list(range(2, 32))
    assert {label: len(rows) for label, rows in group_rows(values).items()} == {"1": 70, "2 to 6": 5, "7 to 31": 25}


def test_labels_tell_groups_apart():
    times = np.arange(889_751_711, 889_751_811)  # Alike to six digits
    assert list(group_rows(times, quantiles=2)) == ["889751711 to 889751760", "889751761 to 889751810"]
    near = 1 + np.arange(40) * 1e-9
    assert sum(len(rows) for rows in group_rows(near).values()) == 40
    assert list(group_rows(np.arange(20) / 3, quantiles=2)) == ["0 to 3", "3.33333 to 6.33333"]


@given(st.lists(st.one_of(st.none(), st.integers(-50, 50), st.floats(allow_infinity=False)), max_size=60))
def test_every_row_is_in_one_group(values):
    groups = group_rows(values)
    assert sorted(row for rows in groups.values() for row in rows) == list(range(len(values)))


def test_what_cannot_be_grouped():
    with pytest.raises(ValueError, match="Column 'title' has 11 different values that are no numbers"):
        group_rows([f"film {i}" for i in range(11)], name="title")
    with pytest.raises(ValueError, match="Column 'shop' holds values of type dict"):
        group_rows([{}, None], name="shop")
