from datetime import UTC, datetime

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_dmpo.data.log import make_log
from trl_dmpo.data.splits import SPLITS, AtTime, ByUser, LeaveLastN, LeaveOneOut, check_leaks, draw_order, keep_core

from .test_log import taken


def targets(times):
    """Targets of users from their time stamps."""
    rows = [(user, item, time) for user, moments in times.items() for item, time in enumerate(moments)]
    return pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")


def assigned(split, times, seed=0):
    """For each user one letter per target: t(rain), v(alidation), T(est), - for nowhere."""
    frame = targets(times).with_columns(split=split.assign(targets(times), seed))
    letter = {"train": "t", "validation": "v", "test": "T", None: "-"}
    return {user: "".join(letter[name] for name in frame.filter(user_id=user)["split"]) for user in times}


USERS = {"ann": [1, 2, 3, 4, 5], "bob": [3, 9], "eve": [8]}


@pytest.mark.parametrize(
    ("split", "letters"),
    [
        (LeaveOneOut(), ["tttvT", "vT", "T"]),
        (LeaveLastN(2), ["tvvTT", "TT", "T"]),
        # Five of eight interactions are at 4 or before, seven at 8 or before
        (AtTime("1970-01-01T00:00:05", "1970-01-01T00:00:09"), ["ttttv", "tT", "v"]),
        (AtTime(3 / 7, 5 / 7), ["tttv-", "tT", "T"]),
        (AtTime(3 / 7, 5 / 7, per_user=2), ["tttvv", "tT", "T"]),
        (AtTime(1.0, 1.0), ["ttttt", "tt", "t"]),
    ],
)
def test_splits_by_hand(split, letters):
    assert list(assigned(split, USERS).values()) == letters


def test_what_shares_the_moment_of_the_cut_stays_together():
    users = {"ann": [1, 5, 5], "bob": [5, 5, 6, 7], "eve": [5, 7, 8]}
    assert list(assigned(AtTime(0.2, 0.7, per_user=9), users).values()) == ["ttt", "ttvT", "tTT"]


def test_a_moment_is_utc_unless_it_says_otherwise():
    noon = int(datetime(2003, 1, 31, 12, tzinfo=UTC).timestamp())
    users = {"ann": [noon - 1, noon, noon + 1]}
    for cut in ("2003-01-31T12:00", "2003-01-31T14:00+02:00"):
        assert assigned(AtTime(cut, "2003-02-01"), users) == {"ann": "tv-"}


def test_users_of_their_own():
    users = {f"user {n}": [1, 2, 3] for n in range(20)}
    letters = assigned(ByUser(validation=0.1, test=0.2, per_user=2), users)
    assert sorted(letters.values()) == ["-TT"] * 4 + ["-vv"] * 2 + ["ttt"] * 14
    assert letters == assigned(ByUser(0.1, 0.2, 2), users)
    assert letters != assigned(ByUser(0.1, 0.2, 2), users, seed=1)
    assert set(assigned(ByUser(0, 0), users).values()) == {"ttt"}


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from([LeaveOneOut(), LeaveLastN(2), AtTime(0.5, 0.75, 2), ByUser(0.3, 0.3, 2)]),
    st.dictionaries(st.integers(0, 9), st.lists(st.integers(0, 9), min_size=1, max_size=6).map(sorted), min_size=1),
    st.integers(0, 3),
)
def test_no_user_is_trained_on_after_being_tested(split, times, seed):
    users = assigned(split, dict(sorted(times.items())), seed)
    for user, letters in users.items():
        order = letters.replace("-", "")
        assert order == "".join(sorted(order, key="tvT".index))
        if isinstance(split, ByUser):
            assert len(set(order)) <= 1
        if isinstance(split, AtTime):
            for other, theirs in users.items():
                for mine, letter in zip(times[user], letters, strict=True):
                    later = [
                        time
                        for time, at in zip(times[other], theirs, strict=True)
                        if "-tvT".index(at) > "-tvT".index(letter)
                    ]
                    assert letter == "-" or all(mine < time for time in later)


@given(st.integers(1, 50), st.integers(0, 9))
def test_an_order_is_one_and_begins_alike_for_fewer(count, seed):
    place = draw_order(count, seed, purpose=1)
    assert sorted(place.tolist()) == list(range(count))
    fewer = draw_order((count + 1) // 2, seed, purpose=1)
    # Who comes before whom does not depend on how many there are
    assert fewer.argsort().tolist() == [number for number in place.argsort().tolist() if number < len(fewer)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LeaveLastN(0), "`split`: `n` is 0, but it is an integer of at least 1."),
        (lambda: LeaveLastN(1.5), "`split`: `n` is 1.5, but it is an integer of at least 1."),
        (lambda: AtTime(per_user=0), "`split`: `per_user` is 0, but it is an integer of at least 1."),
        (lambda: ByUser(per_user=0), "`split`: `per_user` is 0, but it is an integer of at least 1."),
        (lambda: ByUser(0.5, 0.5), "`split`: `validation` and `test` are shares of the users, together below 1."),
        (lambda: ByUser(-0.1), "`split`: `validation` and `test` are shares of the users, together below 1."),
        (
            lambda: AtTime(0.9, 0.1).assign(targets(USERS), 0),
            "`split`: the test (0.1) begins before validation (0.9).",
        ),
        (
            lambda: AtTime("31.1.2003").assign(targets(USERS), 0),
            "`split`: '31.1.2003' is not a date. Write it as '2003-01-31'.",
        ),
        (
            lambda: AtTime(1_000_000_000).assign(targets(USERS), 0),
            "`split`: 1000000000 is not a share. Give one above 0 and at most 1, or a date as text.",
        ),
    ],
)
def test_errors_of_splits(make, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        make()
    assert str(error.value) == message


def test_names_of_splits():
    assert {name: split() for name, split in SPLITS.items()} == {
        "leave_one_out": LeaveOneOut(),
        "leave_last_n": LeaveLastN(1),
        "time": AtTime(0.8, 0.9, 1),
        "user": ByUser(0.1, 0.1, 1),
    }


# Item 9 has one user; without it user 3 has one item, and without that item 2 has one user; the rest is a square
CHAIN = taken((1, 1, 1), (1, 0, 2), (2, 1, 1), (2, 0, 2), (2, 2, 3), (3, 2, 1), (3, 9, 2))
TITLES = pl.DataFrame({"item_id": range(10), "title": [f"film {n}" for n in range(10)]})


def test_core_by_hand():
    log = make_log(CHAIN, TITLES, "chain", "film", {"lost": 4})
    core = keep_core(log, 2)
    assert core.interactions.rows() == [(1, 1, 1), (1, 0, 2), (2, 1, 1), (2, 0, 2)]
    assert core.items.rows() == [(0, "film 0"), (1, "film 1")]
    assert core.notes == {"lost": 4, "interactions outside the 2-core": 3}
    assert (core.source, core.domain) == ("chain", "film")
    assert keep_core(log, 1).interactions.equals(log.interactions)
    assert keep_core(log, 1).notes == {"lost": 4}


def test_empty_core():
    with pytest.raises(
        ValueError, match=r"`k_core`: no interactions are left with 3 for every user and item. Lower it."
    ):
        keep_core(make_log(CHAIN, TITLES, "chain"), 3)


ROWS = {
    "split": ["train", "train", "validation", "test"],
    "user_id": [1, 2, 1, 1],
    "chosen_id": [10, 30, 20, 30],
    "timestamp": [1, 2, 3, 4],
    "history_ids": [[5], [20], [5, 10], [5, 10, 20]],
    "rejected_ids": [[40], [], [50, 60], [60]],
}


def changed(column, row, value):
    return {**ROWS, column: [*ROWS[column][:row], value, *ROWS[column][row + 1 :]]}


def test_rows_without_leaks_pass():
    assert check_leaks(pl.DataFrame(ROWS), one_moment=True) is None


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            changed("history_ids", 2, [5, 20]),
            "the validation row of user 1 with target 20 has its target in its own history (1 such).",
        ),
        (
            changed("rejected_ids", 3, [30]),
            "the test row of user 1 with target 30 has its target among its rejected items (1 such).",
        ),
        (
            changed("history_ids", 0, [5, 20, 30]),
            "the train row of user 1 with target 10 has in `history_ids` an item asked for later (2 such).",
        ),
        (
            changed("chosen_id", 0, 30),
            "the train row of user 1 with target 30 has in `chosen_id` an item asked for later (1 such).",
        ),
        (
            changed("rejected_ids", 0, [40, 20]),
            "the train row of user 1 with target 10 has in `rejected_ids` an item asked for later (1 such).",
        ),
        (changed("timestamp", 0, 3), "the split 'train' has a row later than the first of 'validation'."),
        (changed("timestamp", 2, 4), "the split 'validation' has a row later than the first of 'test'."),
        (
            {name: [values[0], values[3]] for name, values in changed("timestamp", 0, 4).items()},
            "the split 'train' has a row later than the first of 'test'.",
        ),
    ],
)
def test_leaks_are_named(rows, message):
    with pytest.raises(ValueError, match=r"^A leak: ") as error:
        check_leaks(pl.DataFrame(rows), one_moment=True)
    assert str(error.value) == f"A leak: {message}"


def test_time_matters_only_where_one_moment_was_promised():
    late = pl.DataFrame(changed("timestamp", 0, 9))
    assert check_leaks(late) is None
    with pytest.raises(ValueError, match="later than the first of"):
        check_leaks(late, one_moment=True)
