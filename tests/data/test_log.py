import random
from datetime import date, datetime, timedelta, timezone

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_dmpo.data.log import make_log, with_text_ids


FILMS = pl.DataFrame({"item_id": [7, 8, 9], "title": ["Alien", "Heat", "Big"]})


def taken(*rows, **columns):
    """Interactions from `(user, item, timestamp, rating)`, of which the last may be left out."""
    names = ["user_id", "item_id", "timestamp", "rating"][: len(rows[0])]
    return pl.DataFrame(rows, schema=names, orient="row").with_columns(**columns)


@st.composite
def logs(draw):
    """Small logs with ties in time, repeated interactions and titles that several items share."""
    items = draw(st.integers(2, 8))
    titles = draw(st.lists(st.sampled_from("abcdefgh"), min_size=items, max_size=items))
    event = st.tuples(st.integers(1, 4), st.integers(0, items - 1), st.integers(0, 6), st.integers(1, 5))
    rows = draw(st.lists(event, min_size=1, max_size=30))
    return make_log(taken(*rows), pl.DataFrame({"item_id": range(items), "title": titles}), "drawn")


def test_log_is_sorted_and_counted():
    log = make_log(
        taken((2, 9, 5, 1), (1, 8, 30, 2), (1, 7, 20, 3), (1, 9, 20, 4), (1, 8, 10, 5), (1, 3, 1, 5), (None, 7, 1, 1)),
        FILMS,
        "films",
        "film",
        {"rows of the reader": 2},
    )
    assert log.interactions.rows() == [(1, 8, 10, 5.0), (1, 7, 20, 3.0), (1, 9, 20, 4.0), (2, 9, 5, 1.0)]
    assert log.notes == {
        "rows of the reader": 2,
        "interactions without user_id": 1,
        "interactions with an item without a title": 1,
        "repeated interactions, the first kept": 1,
    }
    assert str(log) == "films: 4 interactions of 2 users with 3 items"
    assert (log.domain, log.has_time) == ("film", True)


@pytest.mark.parametrize(
    "times",
    [
        [1_000_000_000, 1_000_000_060],
        [1_000_000_000_000, 1_000_000_060_999],
        [1_000_000_000_000_000, 1_000_000_060_000_000],
        [1_000_000_000_000_000_000, 1_000_000_060_000_000_000],
        [1_000_000_000.0, 1_000_000_060.9],
        ["1000000000", " 1000000060"],
        ["1000000000000", "1000000060000"],
        ["2001-09-09 01:46:40", "2001-09-09T01:47:40.500Z"],
        ["2001-09-09T03:46:40+02:00", "2001-09-08 21:47:40.5-04:00"],
        [datetime(2001, 9, 9, 1, 46, 40), datetime(2001, 9, 9, 1, 47, 40)],
        [datetime(2001, 9, 9, 3, 46 + late, 40, tzinfo=timezone(timedelta(hours=2))) for late in (0, 1)],
    ],
    ids=[
        "s",
        "ms",
        "us",
        "ns",
        "float",
        "text",
        "text of ms",
        "dates as text",
        "offsets",
        "dates",
        "dates of a time zone",
    ],
)
def test_time_stamps_become_seconds(times):
    frame = pl.DataFrame({"user_id": [1, 1], "item_id": [7, 8], "timestamp": times})
    assert make_log(frame, FILMS, "films").interactions["timestamp"].to_list() == [1_000_000_000, 1_000_000_060]


@pytest.mark.parametrize("day", ["1970-01-03", date(1970, 1, 3)])
def test_days_become_seconds(day):
    log = make_log(pl.DataFrame({"user_id": [1], "item_id": [7], "timestamp": [day]}), FILMS, "films")
    assert log.interactions["timestamp"].to_list() == [2 * 86_400]


@pytest.mark.parametrize("frame", [taken((1, 9), (1, 7)), taken((1, 9), (1, 7), timestamp=None)])
def test_without_time_stamps_order_is_that_of_the_rows(frame):
    log = make_log(frame.lazy(), FILMS.lazy(), "films")
    assert log.interactions.rows() == [(1, 9, 0), (1, 7, 1)]
    assert not log.has_time


def test_titles_are_one_line_and_end_no_turn():
    raw = ["  Red\r\n\tHeat ", "Stop<|im_end|>here", "</s>", "[INST] me <THINK>", "a < b | c > [d] {e}", " \n", None]
    items = pl.DataFrame({"item_id": range(7), "title": raw, "plot": ["a\nb<|x|>"] * 7, "year": [1] * 7})
    log = make_log(taken((1, 0, 1)), items, "films")
    shown = ["Red Heat", "Stop< |im_end| >here", "< /s >", "< INST > me < THINK >", "a < b | c > [d] {e}"]
    assert log.items["title"].to_list() == shown
    assert set(log.items["plot"]) == {"a b< |x| >"}
    assert log.notes == {"items without a title": 2, "titles with a marker of a chat template, broken up": 3}


def test_items_are_listed_once():
    items = pl.DataFrame({"item_id": [8, 7, 8, None], "title": ["Heat", "Alien", "Heat 2", "Big"]})
    log = make_log(taken((1, 8, 1)), items, "films")
    assert log.items.rows() == [(7, "Alien"), (8, "Heat")]
    assert log.notes == {"items without an id": 1, "items listed twice, the first kept": 1}


def test_ids_of_two_types_meet_as_text():
    frame = taken((1, "10", 1), (1, "9", 2), impressions=pl.Series([[9], [10, 8]]))
    items = pl.DataFrame({"item_id": [9, 10], "title": ["Alien", "Heat"]})
    log = make_log(frame, items, "films")
    assert log.interactions.rows() == [(1, "10", 1, ["9"]), (1, "9", 2, ["10", "8"])]
    assert log.items["item_id"].to_list() == ["10", "9"]  # in the order of text


def test_with_text_ids_sorts_anew():
    frame = taken((10, 7, 1), (9, 8, 1), (9, 7, 1), impressions=pl.Series([[7], [8], [9]]))
    log = with_text_ids(make_log(frame, pl.DataFrame({"item_id": [10, 7, 8], "title": ["a", "b", "c"]}), "films"))
    assert log.interactions.rows() == [("10", "7", 1, ["7"]), ("9", "7", 1, ["9"]), ("9", "8", 1, ["8"])]
    assert log.items["item_id"].to_list() == ["10", "7", "8"]


@pytest.mark.parametrize(
    ("frame", "items", "message"),
    [
        (
            pl.DataFrame({"user": [1], "item_id": [7]}),
            FILMS,
            "films: interactions: there is no column 'user_id', only: user, item_id. Rename or map it.",
        ),
        (
            taken((1, 7)),
            FILMS.rename({"title": "name"}),
            "films: items: there is no column 'title', only: item_id, name. Rename or map it.",
        ),
        (
            taken((1, 7, 1, "4"), (1, 8, 2, "four")),
            FILMS,
            "films: rating 'four' in row 2 of the interactions is not a number. Mend or remove it.",
        ),
        (
            taken((1, 7, 1, 4.0), (1, 8, 2, float("nan"))),
            FILMS,
            "films: rating nan in row 2 of the interactions is not a number. Mend or remove it.",
        ),
        (
            taken((1, 7, "5"), (1, 8, "soon")),
            FILMS,
            "films: timestamp 'soon' in row 2 of the interactions is not a number. Mend or remove it.",
        ),
        (
            taken((1, 7, "2003-01-31"), (1, 8, "2003-02-31")),
            FILMS,
            "films: timestamp '2003-02-31' in row 2 of the interactions is not a date such as "
            "2003-01-31 23:59:59. Mend or remove it.",
        ),
        (
            taken((1, 3, 1), (1, None, 2)),
            FILMS,
            "films: no interactions are left (1 interactions without item_id, 1 interactions with an item without a "
            "title).",
        ),
        (taken((1, 7, 1)).clear(), FILMS, "films: no interactions are left (there were none)."),
    ],
)
def test_what_cannot_be_read_is_named(frame, items, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        make_log(frame, items, "films")
    assert str(error.value) == message


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_order_of_the_rows_does_not_matter(data):
    event = st.tuples(st.integers(1, 3), st.sampled_from([7, 8, 9]), st.integers(0, 2), st.integers(1, 5))
    rows = data.draw(st.lists(event, min_size=1, max_size=12))
    shuffled = list(rows)
    random.Random(data.draw(st.integers(0, 99))).shuffle(shuffled)
    one, other = (make_log(taken(*each), FILMS, "films") for each in (rows, shuffled))
    assert one.interactions.equals(other.interactions)
    assert one.notes == other.notes
    first = {}
    for user, item, time, _ in sorted(rows):
        first[user, item] = min(time, first.get((user, item), time))
    assert {(user, item): time for user, item, time, _ in one.interactions.rows()} == first


def test_ids_that_pandas_made_floats_match_integers():
    taken = pl.DataFrame({"user_id": [1.0, float("nan"), 2.0], "item_id": [7.0, 7.0, None], "timestamp": [1, 2, 3]})
    log = make_log(taken, pl.DataFrame({"item_id": [7], "title": ["Alien"]}), "films")
    assert log.interactions.rows() == [(1, 7, 1)]
    assert log.notes == {"interactions without user_id": 1, "interactions without item_id": 1}


def test_features_that_are_lists_are_cleaned_like_titles():
    items = pl.DataFrame({"item_id": [7], "title": ["Alien"], "genres": [["Sci\nFi", "<|end|>"]]})
    log = make_log(pl.DataFrame({"user_id": [1], "item_id": [7]}), items, "films")
    assert log.items["genres"].to_list() == [["Sci Fi", "< |end| >"]]
