import random
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_dmpo.data.build_config import BuildConfig
from trl_dmpo.data.log import make_log
from trl_dmpo.data.negatives import Disliked, Mixture, Uniform
from trl_dmpo.data.plan import make_plan, rows_of
from trl_dmpo.data.splits import AtTime

from .test_log import logs, taken


def catalogue(count):
    return pl.DataFrame({"item_id": range(count), "title": [f"film {n}" for n in range(count)]})


def plan_of(log, **options):
    return make_plan(
        log, BuildConfig(**({"num_negatives": 2, "ranking_negatives": 3, "negatives": "uniform"} | options))
    )


def lines(plan, split=None):
    """`user: history > target` of each row."""
    rows = [row for row in rows_of(plan).to_dicts() if split in (None, row["split"])]
    return [f"{row['user_id']}: {' '.join(map(str, row['history_ids']))} > {row['chosen_id']}" for row in rows]


@pytest.fixture(scope="module")
def many():
    """60 users of whom each met 5 to 14 of 40 items."""
    generator = np.random.default_rng(0)
    rows = [
        (user, int(item), int(time), int(generator.integers(1, 6)))
        for user in range(60)
        for time, item in enumerate(generator.choice(40, generator.integers(5, 15), replace=False))
    ]
    return make_log(taken(*rows), catalogue(40), "many")


SPLITS = [
    "leave_one_out",
    "leave_last_n(n=2)",
    "time(validation=0.4, test=0.7)",
    "time(validation=0.3, test=0.6, per_user=3)",
    "user(validation=0.3, test=0.3, per_user=2)",
]

# One user: likes 0 to 4 in this order, and dislikes 10 to 13 between them
ONE = [(1, 0, 0, 5), (1, 10, 1, 1), (1, 1, 2, 4), (1, 11, 3, 3), (1, 2, 4, 5), (1, 12, 5, 2), (1, 3, 6, 4)]
ONE += [(1, 13, 7, 1), (1, 4, 8, 5)]


@pytest.mark.parametrize(
    ("options", "train", "validation", "test"),
    [
        ({}, ["1: 0 1 > 2"], ["1: 0 1 2 > 3"], ["1: 0 1 2 3 > 4"]),
        ({"max_history": 2}, ["1: 0 1 > 2"], ["1: 1 2 > 3"], ["1: 2 3 > 4"]),
        (
            {"max_history": 3, "history_step": 2, "train_targets": -1, "split": "user(validation=0, test=0)"},
            ["1: 0 > 1", "1: 0 1 > 2", "1: 0 1 2 > 3", "1: 2 3 > 4"],
            [],
            [],
        ),
        ({"max_history": 2, "history_step": 2}, ["1: 0 1 > 2"], ["1: 1 2 > 3"], ["1: 2 3 > 4"]),
        ({"train_targets": 2}, ["1: 0 > 1", "1: 0 1 > 2"], ["1: 0 1 2 > 3"], ["1: 0 1 2 3 > 4"]),
        (
            {"train_targets": -1, "min_history": 0},
            ["1:  > 0", "1: 0 > 1", "1: 0 1 > 2"],
            ["1: 0 1 2 > 3"],
            ["1: 0 1 2 3 > 4"],
        ),
        ({"min_history": 3}, [], ["1: 0 1 2 > 3"], ["1: 0 1 2 3 > 4"]),
        ({"split": "leave_last_n(n=2)"}, [], ["1: 0 > 1", "1: 0 1 > 2"], ["1: 0 1 2 > 3", "1: 0 1 2 3 > 4"]),
        ({"split": "user(validation=0, test=0)"}, ["1: 0 1 2 3 > 4"], [], []),
        ({"split": AtTime(0.5, 0.75)}, ["1: 0 1 > 2"], ["1: 0 1 2 > 3"], ["1: 0 1 2 3 > 4"]),
        (
            {"positive": float("-inf")},
            ["1: 0 10 1 11 2 12 > 3"],
            ["1: 0 10 1 11 2 12 3 > 13"],
            ["1: 0 10 1 11 2 12 3 13 > 4"],
        ),
        ({"positive": 4.0, "min_history": 0}, ["1:  > 0"], ["1: 0 > 2"], ["1: 0 2 > 4"]),
        (
            {"prompt": "rating", "max_history": 4},
            ["1: 1 11 2 12 > 3"],
            ["1: 11 2 12 3 > 13"],
            ["1: 2 12 3 13 > 4"],
        ),
    ],
)
def test_rows_by_hand(options, train, validation, test):
    plan = plan_of(make_log(taken(*ONE), catalogue(20), "one"), **options)
    assert [lines(plan, split) for split in ("train", "validation", "test")] == [train, validation, test]


def test_dislikes_of_training_and_of_evaluation():
    log = make_log(taken(*ONE), catalogue(20), "one")
    rows = rows_of(plan_of(log, negatives="disliked", num_negatives=9))
    assert {row["split"]: sorted(row["rejected_ids"]) for row in rows.to_dicts()} == {
        "train": [10, 11],
        "validation": [12, 13],
        "test": [12, 13],
    }


def test_a_title_is_asked_for_once():
    titles = catalogue(9).with_columns(title=pl.when(pl.col("item_id") == 7).then(pl.lit("film 0")).otherwise("title"))
    log = make_log(taken((1, 0, 0), (1, 1, 1), (1, 2, 2), (1, 3, 3), (1, 7, 4)), titles, "films")
    plan = plan_of(log)
    assert lines(plan) == ["1: 0 > 1", "1: 0 1 > 2", "1: 0 1 2 > 3"]
    assert plan.notes == {"interactions with a title that the user had met before, not to be predicted": 1}


@pytest.mark.parametrize("split", SPLITS)
def test_a_title_that_was_met_but_not_liked_is_not_asked_for(split):
    titles = pl.DataFrame({"item_id": [0, 1, 2], "title": ["Alien", "Alien", "Heat"]})
    log = make_log(taken((1, 0, 0, 1), (1, 1, 1, 5)), titles, "films")
    with pytest.raises(ValueError, match="No rows are left: no user has 1 interactions before one"):
        plan_of(log, split=split)


def test_what_was_left_out_is_counted():
    rows = [*ONE, (2, 0, 0, 5), (3, 0, 0, 5), (3, 1, 1, 5), (4, 0, 0, 1)]
    log = make_log(taken(*rows), catalogue(20), "some", notes={"by the reader": 3})
    assert plan_of(log).notes == {"by the reader": 3, "users without a target after 1 others": 2}
    few = plan_of(log, negatives="disliked", num_negatives=3, train_targets=-1)
    assert few.notes == {
        "by the reader": 3,
        "users without a target after 1 others": 2,
        "rows without an eligible negative, left out": 1,
        "rows with fewer than 3 negatives": 4,
    }
    assert lines(few) == ["1: 0 > 1", "1: 0 1 > 2", "1: 0 1 2 > 3", "1: 0 1 2 3 > 4"]
    assert few.ranking_negatives.shape == (2, 3)


options = st.fixed_dictionaries(
    {
        "split": st.sampled_from(SPLITS),
        "negatives": st.sampled_from(["uniform", "popularity", "disliked", "0.5 * disliked + 0.5 * uniform"]),
        "prompt": st.sampled_from(["next_item", "next_item_from_list", "rank_list", "like", "rating"]),
        "train_targets": st.sampled_from([1, 2, -1]),
        "min_history": st.integers(0, 2),
        "max_history": st.integers(2, 4),
        "seed": st.integers(0, 3),
        "k_core": st.none() | st.integers(1, 2),
    }
)
NOTHING = r"^(No rows are left|`positive`|`k_core`|`negatives`: (no row has|there is nothing))"


@settings(max_examples=100, deadline=None)
@given(logs(), options, st.integers(0, 99))
def test_no_plan_leaks_and_none_depends_on_the_order_of_the_log(log, options, shuffle):
    order = list(range(log.interactions.height))
    random.Random(shuffle).shuffle(order)
    other = make_log(log.interactions[order], log.items[::-1], "shuffled")
    try:
        plan = plan_of(log, **options)
    except ValueError as error:
        assert not str(error).startswith("A leak")  # noqa: PT017
        with pytest.raises(ValueError, match=NOTHING):
            plan_of(other, **options)
        return
    rows = rows_of(plan)
    assert rows.equals(rows_of(plan_of(other, **options)))
    title = dict(plan.log.items.rows())
    events = plan.events
    ids = events.items["item_id"].to_list()
    met = [(events.user_ids[int(u)], title[ids[i]]) for u, i in zip(events.user, events.item, strict=True)]
    liked = {pair for pair, is_liked in zip(met, events.liked, strict=True) if is_liked}
    assert rows.select("user_id", "chosen_id").is_unique().all()
    asked = [(row["user_id"], title[row["chosen_id"]]) for row in rows.to_dicts()]
    assert len(set(asked)) == len(asked)
    for (user, target), row in zip(asked, rows.to_dicts(), strict=True):
        rejected = [title[item] for item in row["rejected_ids"]]
        assert target not in [title[item] for item in row["history_ids"]]
        assert target not in rejected
        assert len(set(rejected)) == len(rejected)
        assert not {(user, other) for other in rejected} & liked
        assert options["min_history"] <= len(row["history_ids"]) <= options["max_history"]
    held_out = rows.filter(pl.col("split") != "train")["user_id"].to_list()
    for user, numbers in zip(held_out, plan.ranking_negatives, strict=True):
        assert not {(user, title[ids[number]]) for number in numbers[numbers >= 0]} & set(met)
    if "time" in options["split"]:
        ends = [rows.filter(split=name)["timestamp"].to_list() for name in ("train", "validation", "test")]
        assert all(a < b for early, late in [(0, 1), (0, 2), (1, 2)] for a in ends[early] for b in ends[late])


@pytest.mark.parametrize("negatives", ["popularity", "disliked", "0.4 * disliked + 0.6 * popularity"])
def test_shots_are_nested_and_all_else_stays(many, negatives):
    def shots(count):
        return rows_of(plan_of(many, few_shot=count, negatives=negatives, num_negatives=5))

    everyone = shots(None)
    for fewer, more in [(shots(5), shots(20)), (shots(20), everyone)]:
        assert fewer.join(more, on=fewer.columns, how="anti").is_empty()
    assert shots(20).filter(split="train").height == 20 < everyone.filter(split="train").height
    held_out = pl.col("split") != "train"
    assert shots(5).filter(held_out).equals(everyone.filter(held_out))


@pytest.mark.parametrize("negatives", ["popularity", "disliked"])
def test_more_targets_of_a_user_change_no_row(many, negatives):
    fewer, more = (rows_of(plan_of(many, train_targets=count, negatives=negatives)) for count in (1, -1))
    assert fewer.height < more.height
    assert fewer.join(more, on=fewer.columns, how="anti").is_empty()


def test_all_shots_are_there(many):
    drawn = [
        set(rows_of(plan_of(many, few_shot=20, seed=seed)).filter(split="train")["user_id"]) for seed in (0, 0, 1)
    ]
    assert [len(users) for users in drawn] == [20, 20, 20]
    assert drawn[0] == drawn[1] != drawn[2]


def test_ranking_is_drawn_apart(many):
    plan = plan_of(many, negatives="uniform", num_negatives=5, ranking_negatives=5)
    held_out = plan.negatives[plan.split > 0]
    assert plan.ranking_negatives.shape == held_out.shape
    assert (plan.ranking_negatives != held_out).any(axis=1).mean() > 0.9
    met = set(many.interactions.select("user_id", "item_id").rows())
    users = rows_of(plan).filter(pl.col("split") != "train")["user_id"].to_list()
    drawn = zip(users, plan.ranking_negatives.tolist(), strict=True)
    assert not met & {(user, item) for user, items in drawn for item in items}  # ids here are numbers from 0
    assert plan_of(many, prompt="next_item_from_list").ranking_negatives.shape == (len(held_out), 0)


def test_objects_are_taken_like_their_names(many):
    named = plan_of(many, negatives="0.5 * disliked + 0.5 * uniform", split="time(validation=0.5)")
    for parts in (Mixture(((0.5, Disliked()), (0.5, Uniform()))), [(0.5, Disliked()), (0.5, Uniform())]):
        assert rows_of(plan_of(many, negatives=parts, split=AtTime(0.5))).equals(rows_of(named))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positive": 5.0}, "`positive`: no rating is above 5; they go from 1 to 5. Lower it."),
        ({"few_shot": 2}, "`few_shot`: there are 1 users to train on, not 2. Lower it."),
        (
            {"min_history": 5},
            "No rows are left: no user has 5 interactions before one that is to be predicted. Lower `min_history` or "
            "`k_core`, or choose another `split`.",
        ),
        (
            {"num_negatives": 16, "fewer_negatives": False},
            "`negatives`: 3 rows have fewer than 16 eligible items, such as that of user 1 with target 'film 2', which "
            "has 15. Lower `num_negatives`, mix in 'uniform', or set `fewer_negatives=True`.",
        ),
        (
            {"negatives": Disliked(), "positive": float("-inf")},
            "`negatives`: there is nothing that a user did not like. `disliked` needs a log with ratings, some of them "
            "not above `positive`.",
        ),
        ({"k_core": 3}, "`k_core`: no interactions are left with 3 for every user and item. Lower it."),
    ],
)
def test_errors_of_plans(options, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        plan_of(make_log(taken(*ONE), catalogue(20), "one"), **options)
    assert str(error.value) == message


def test_errors_of_logs_without_time_or_ratings():
    log = make_log(taken((1, 0), (1, 1), (1, 2)), catalogue(20), "plain")
    with pytest.raises(ValueError, match="a moment in time needs time stamps, and this log has none"):
        plan_of(log, split="time")
    with pytest.raises(ValueError, match="`prompt`: 'rating' asks about ratings, and this log has none"):
        plan_of(log, prompt="rating")
    everything = replace(log, items=log.items[:3])
    with pytest.raises(ValueError, match=r"`negatives`: no row has an eligible item by 'uniform'. Choose others."):
        plan_of(everything)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_negatives": 0}, "`num_negatives` is 0, but it is at least 1."),
        ({"seed": -1}, "`seed` is -1, but it is at least 0."),
        ({"train_targets": 0}, "`train_targets` is 0, but it is at least 1, or -1 for all."),
        ({"min_history": 3, "max_history": 2}, "`min_history` (3) is more than `max_history` (2)."),
        (
            {"split": "leave_two_out"},
            "`split`: there is no 'leave_two_out', only: leave_one_out, leave_last_n, time, user.",
        ),
    ],
)
def test_options_are_checked_at_once(options, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        BuildConfig(**options)
    assert str(error.value).startswith(message)


def test_shots_are_drawn_from_users_that_have_negatives():
    # Ann disliked nothing: the one shot is always bob
    films = [(user, item, item, 5.0) for user in ("ann", "bob") for item in range(4)] + [("bob", 9, 0, 1.0)]
    interactions = pl.DataFrame(films, schema=["user_id", "item_id", "timestamp", "rating"], orient="row")
    log = make_log(
        interactions, pl.DataFrame({"item_id": range(10), "title": [f"film {i}" for i in range(10)]}), "films"
    )
    for seed in range(5):
        rows = rows_of(make_plan(log, BuildConfig(negatives="disliked", few_shot=1, seed=seed), ("train",)))
        assert rows.select("split", "user_id").rows() == [("train", "bob")]
