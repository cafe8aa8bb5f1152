import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_dmpo.data.events import Ragged, is_among, make_events, slices
from trl_dmpo.data.log import make_log

from .test_log import logs, taken


def as_lists(ragged):
    return [
        ragged.values[start:stop].tolist() for start, stop in zip(ragged.offsets, ragged.offsets[1:], strict=False)
    ]


def test_lists_of_different_lengths():
    lists = slices(np.array([5, 6, 7, 8]), np.array([1, 3, 0]), np.array([3, 3, 1]))
    assert as_lists(lists) == [[6, 7], [], [5]]
    assert lists.lengths.tolist() == [2, 0, 1]
    assert lists.owners.tolist() == [0, 0, 2]
    assert as_lists(lists.where(lists.values != 6)) == [[7], [], [5]]
    assert as_lists(lists.select(np.array([False, True, True]))) == [[], [5]]
    assert as_lists(Ragged(np.array([]), np.array([0, 0])).where(np.array([], bool))) == [[]]


def test_is_among():
    assert is_among(np.array([[0, 1], [9, 3]]), np.array([1, 3, 3])).tolist() == [[False, True], [False, True]]


@pytest.mark.parametrize(
    ("positive", "liked"), [(3, [False, True]), (4, [False, False]), (float("-inf"), [True, True])]
)
def test_liked_is_rated_higher(positive, liked):
    log = make_log(
        taken((1, 7, 1, 3.0), (1, 8, 2, 4.0)), pl.DataFrame({"item_id": [7, 8], "title": ["a", "b"]}), "two"
    )
    assert make_events(log, positive).liked.tolist() == liked


def test_without_ratings_all_is_liked():
    log = make_log(taken((1, 7, 1)), pl.DataFrame({"item_id": [7], "title": ["a"]}), "one")
    events = make_events(log, 3)
    assert events.liked.all()
    assert events.rating is None


@settings(max_examples=200, deadline=None)
@given(logs(), st.integers(0, 4))
def test_events_say_what_the_log_says(log, limit):
    events = make_events(log, 3)
    rows = log.interactions.rows()
    titles = dict(log.items.rows())
    ids = log.items["item_id"]
    assert [(events.user_ids[int(u)], ids[int(i)]) for u, i in zip(events.user, events.item, strict=True)] == [
        row[:2] for row in rows
    ]
    earlier = [[n for n in range(end) if rows[n][0] == rows[end][0] and rows[n][3] > 3] for end in range(len(rows))]
    everything = np.arange(len(rows))
    assert as_lists(events.before(everything, events.liked)) == earlier
    assert as_lists(events.before(everything[::-1], events.liked, limit))[::-1] == [
        before[len(before) - min(limit, len(before)) :] for before in earlier
    ]
    users = np.arange(len(events.user_ids))
    assert as_lists(events.of_users(users, events.liked)) == [
        [n for n, row in enumerate(rows) if row[0] == user and row[3] > 3] for user in events.user_ids
    ]
    assert [titles[ids[int(first)]] for first in events.same_title] == log.items["title"].to_list()
    met = [(row[0], titles[row[1]]) for row in rows]
    assert events.is_new.tolist() == [pair not in met[:place] for place, pair in enumerate(met)]
    liked = {met[n] for n in range(len(rows)) if rows[n][3] > 3}
    for asked, known in ((events.liked_pairs, liked), (events.seen_pairs, set(met))):
        if known:
            user, item = np.divmod(asked, log.items.height)
            assert {(events.user_ids[int(u)], titles[ids[int(i)]]) for u, i in zip(user, item, strict=True)} == known
