from collections import Counter
from dataclasses import dataclass, replace
from itertools import permutations

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_dmpo.data import drawing
from trl_dmpo.data.drawing import Targets, from_lists
from trl_dmpo.data.events import make_events, slices
from trl_dmpo.data.log import make_log
from trl_dmpo.data.negatives import Disliked, Mixture, Nearest, Popularity, SharedFeature, Shown, Uniform

from .test_log import logs, taken


@dataclass(frozen=True)
class Among:
    """A sampler of one's own: from a list of items."""

    items: tuple

    def sample(self, targets, wanted, taken):
        count = len(targets.event)
        lists = slices(np.array(self.items), np.zeros(count, int), np.full(count, len(self.items)))
        return from_lists(targets, wanted, taken, lists)


def asking(log, event=None, **options):
    """Rows that ask for events of a log, by default for all that were liked, in training."""
    events = make_events(log, 3)
    event = np.flatnonzero(events.liked) if event is None else np.asarray(event)
    all_trained = {"in_training": np.ones(len(event), bool), "trained": np.ones(len(events.user), bool), "seed": 0}
    return Targets(events, event, **(all_trained | options))


def rows_only(targets, rows):
    return replace(targets, event=targets.event[rows], in_training=targets.in_training[rows])


def draw(sampler, targets, count):
    """Ids of the items that each row gets."""
    none = np.empty((len(targets.event), 0), np.int32)
    drawn = sampler.sample(targets, np.full(len(targets.event), count), none)
    assert drawn.shape == (len(targets.event), count)
    assert (np.diff((drawn >= 0).astype(int), axis=1) <= 0).all()  # -1 only at the end
    return [targets.events.items["item_id"].gather(row[row >= 0]).to_list() for row in drawn]


def catalogue(count, **features):
    return pl.DataFrame({"item_id": range(count), "title": [f"film {n}" for n in range(count)], **features})


# The promises, for every sampler


@st.composite
def questions(draw):
    """Rows over logs with features and impressions, of which some are of training."""
    log = draw(logs())
    ids = st.sampled_from([*log.items["item_id"], 99, None])
    log = replace(
        log,
        items=log.items.with_columns(
            genres=pl.Series(
                [draw(st.none() | st.lists(st.sampled_from("xyz"), max_size=3)) for _ in range(log.items.height)],
                dtype=pl.List(pl.String),
            )
        ),
        interactions=log.interactions.with_columns(
            impressions=pl.Series(
                [draw(st.none() | st.lists(ids, max_size=4)) for _ in range(log.interactions.height)],
                dtype=pl.List(pl.Int64),
            )
        ),
    )
    liked = np.flatnonzero(log.interactions["rating"].to_numpy() > 3)
    if len(liked) == 0:
        log = replace(log, interactions=log.interactions.with_columns(rating=pl.lit(5.0)))
        liked = np.arange(log.interactions.height)
    flags = st.integers(0, 2**30).map(lambda bits: np.array([bits >> n & 1 for n in range(30)], bool))
    in_training, trained = draw(flags)[: len(liked)], draw(flags)[: log.interactions.height]
    return asking(log, liked, in_training=in_training, trained=trained, seed=draw(st.integers(0, 9)))


def scores_of(targets):
    """Scores of each user for each item, some of them missing."""
    users, items = len(targets.events.user_ids), targets.events.items
    numbers = np.random.default_rng(users).permutation(users * items.height)
    table = pl.DataFrame(
        {
            "user_id": np.repeat(targets.events.user_ids.to_numpy(), items.height),
            "item_id": items["item_id"].to_list() * users,
            "score": [None if n % 5 == 0 else float("nan") if n % 7 == 0 else float(n) for n in numbers],
        }
    )
    known = table.filter(pl.col("score").is_not_null() & pl.col("score").is_not_nan())
    return table, {(user, item): score for user, item, score in known.rows()}


def pool(sampler, targets, row):
    """Ids that the sampler may draw for a row, but for what is eligible for none: by plain loops."""
    events, event = targets.events, int(targets.event[row])
    ids = events.items["item_id"].to_list()
    user, mine = events.user[event], range(len(events.user))
    if isinstance(sampler, Popularity):
        return {ids[events.item[n]] for n in mine if events.liked[n] and targets.trained[n]}
    if isinstance(sampler, Disliked):
        last = max((n for n in mine if events.user[n] == user and targets.trained[n]), default=-1)
        unliked = [n for n in mine if events.user[n] == user and not events.liked[n]]
        return {ids[events.item[n]] for n in unliked if (n < last) == targets.in_training[row]}
    if isinstance(sampler, Shown):
        return set(events.impressions[event] if events.impressions[event] is not None else []) & set(ids)
    if isinstance(sampler, SharedFeature):
        genres = [set(values) if values is not None else set() for values in events.items["genres"]]
        return {ids[n] for n in range(len(ids)) if genres[n] & genres[events.item[event]]}
    return set(ids)


SAMPLERS = [
    Uniform(),
    Popularity(0.5),
    Disliked(),
    Shown(),
    SharedFeature("genres"),
    Among(tuple(range(2))),
    Mixture(((1, Popularity()), (2, Shown()), (1, Uniform()))),
]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: type(sampler).__name__)
@settings(max_examples=40, deadline=None)
@given(questions(), st.integers(1, 5), st.integers(0, 99))
def test_promises(sampler, targets, count, shuffle):
    events = targets.events
    if isinstance(sampler, Disliked) and events.liked.all():
        return
    title = dict(events.items.select("item_id", "title").rows())
    ids = events.items["item_id"]
    drawn = draw(sampler, targets, count)
    for row, items in enumerate(drawn):
        user = events.user[targets.event[row]]
        liked = {title[ids[int(n)]] for n in events.item[(events.user == user) & events.liked]}
        titles = [title[item] for item in items]
        assert not liked & set(titles)
        assert len(titles) == len(set(titles))
        if not isinstance(sampler, Among):
            eligible = {title[item] for item in pool(sampler, targets, row)} - liked
            assert len(titles) == min(count, len(eligible))
            assert set(items) <= pool(sampler, targets, row)
    # A row's negatives depend neither on the other rows nor on their order
    order = np.random.default_rng(shuffle).permutation(len(drawn))[: 1 + shuffle % len(drawn)]
    assert draw(sampler, rows_only(targets, order), count) == [drawn[row] for row in order]


def test_rows_that_lack_much_do_not_matter_to_others():
    generator = np.random.default_rng(0)
    users, items = generator.integers(0, 200, 1500), generator.zipf(1.3, 1500) % 12
    targets = asking(make_log(pl.DataFrame({"user_id": users, "item_id": items}), catalogue(12), "crowded"))
    together = draw(Popularity(), targets, 4)
    for row in range(0, len(together), 7):
        assert draw(Popularity(), rows_only(targets, np.array([row])), 4) == [together[row]]


def test_seed_and_stream_change_what_is_drawn():
    log = make_log(taken(*[(user, 0, user) for user in range(50)]), catalogue(30), "films")
    drawn = [
        draw(sampler, asking(log, **options), 3)
        for sampler in (Uniform(), Among(tuple(range(30))))
        for options in ({}, {"seed": 1}, {"stream": 1})
    ]
    same = [sum(a == b for a, b in zip(drawn[0], other, strict=True)) for other in drawn[1:]]
    assert max(same) < 3
    assert drawn[0] == draw(Uniform(), asking(log), 3)


def test_rows_of_one_user_are_drawn_apart():
    log = make_log(taken(*[(1, item, item) for item in range(10)]), catalogue(99), "films")
    assert len({tuple(row) for row in draw(Uniform(), asking(log), 3)}) == 10


# The distributions. 4,000 users ask for item 0 and like item 1; others make items 2 to 6 popular, 5 and 6 of one title

ASKING = 4000


@pytest.fixture(scope="module")
def crowd():
    rows = [(user, item, item, 5) for user in range(ASKING) for item in (0, 1)]
    rows += [(user, item, 10 + item, 1) for user in range(ASKING) for item in (2, 3, 4, 7)]
    rows += [(10_000 + user, item, 0, 5) for item in range(2, 7) for user in range(300 * (item - 1))]
    genres = [["a", "b", "c"], ["a"], ["a", "b", "c", "d"], ["d"], ["a", "c"], ["b"], ["c"], None, []]
    titles = [*"tuvwxyyzz"]
    items = pl.DataFrame({"item_id": range(9), "title": titles, "genres": genres})
    return asking(make_log(taken(*rows), items, "crowd"), np.arange(ASKING) * 6)


def assert_pairs(drawn, weights):
    """That pairs of titles come as often as if drawn one by one in proportion to their weights."""
    counts = Counter("".join(pair) for pair in drawn)
    total = sum(weights.values())
    cells = [a + b for a, b in permutations(weights, 2)]
    expected = [len(drawn) * weights[a] / total * weights[b] / (total - weights[a]) for a, b in cells]
    assert sum(counts.values()) == sum(counts[cell] for cell in cells) == len(drawn)
    degrees = len(cells) - 1
    chi_square = sum((counts[cell] - mean) ** 2 / mean for cell, mean in zip(cells, expected, strict=True))
    # Wilson and Hilferty: above this once in a thousand times
    assert chi_square < degrees * (1 - 2 / (9 * degrees) + 3.09 * (2 / (9 * degrees)) ** 0.5) ** 3


def titles_of(drawn, targets):
    title = dict(targets.events.items.select("item_id", "title").rows())
    return [[title[item] for item in row] for row in drawn]


@pytest.mark.parametrize("rounds", [0, 1, 8, 60], ids=["exact", "mostly exact", "as it is", "by rejection"])
@pytest.mark.parametrize(
    ("sampler", "weights"),
    [
        (Uniform(), {"v": 1, "w": 1, "x": 1, "y": 2, "z": 2}),
        (Popularity(), {"v": 1, "w": 2, "x": 3, "y": 4 + 5}),
        (Popularity(0.5), {"v": 1, "w": 2**0.5, "x": 3**0.5, "y": 2 + 5**0.5}),
        (SharedFeature("genres"), {"v": 3, "x": 2, "y": 1 + 1}),
    ],
)
def test_weights(crowd, monkeypatch, rounds, sampler, weights):
    monkeypatch.setattr(drawing, "_ROUNDS", rounds)
    assert_pairs(titles_of(draw(sampler, crowd, 2), crowd), weights)


@pytest.mark.parametrize("sampler", [Disliked(), Nearest(np.ones((9, 2)), top=4)])
def test_lists_are_drawn_from_all_alike(crowd, sampler):
    # With all embeddings equal the first four titles are the nearest: of items 2, 3, 4 and 5
    last = "z" if isinstance(sampler, Disliked) else "y"
    crowd = replace(crowd, in_training=np.zeros(ASKING, bool), trained=np.zeros(len(crowd.trained), bool))
    assert_pairs(titles_of(draw(sampler, crowd, 2), crowd), dict.fromkeys("vwx" + last, 1))


def test_popularity_is_that_of_training():
    rows = [(1, 0, 1, 5), (1, 1, 2, 5), (2, 2, 1, 5), (2, 3, 2, 1), (3, 4, 1, 5)]
    log = make_log(taken(*rows), catalogue(6), "films")
    targets = asking(log, [0], trained=np.array([True, True, True, True, False]))
    assert targets.popularity.tolist() == [1, 1, 1, 0, 0, 0]
    assert draw(Popularity(), targets, 5) == [[2]]
    assert sorted(*draw(Popularity(power=0), targets, 5)) == [2, 3, 4, 5]


# Each by hand


def test_what_is_asked_for_is_no_negative_even_if_it_was_not_liked():
    log = make_log(taken((1, 0, 1, 5), (1, 1, 2, 1)), catalogue(4), "films")
    assert [sorted(row) for row in draw(Uniform(), asking(log, [0, 1]), 4)] == [[1, 2, 3], [2, 3]]


def test_a_feature_of_one_value():
    # The first value in order, which is number 0, beside items without any
    items = catalogue(5, genre=[None, "action", "action", "action", "drama"])
    log = make_log(taken((1, 1, 1), (2, 0, 1), (3, 4, 1)), items, "films")
    assert [sorted(row) for row in draw(SharedFeature("genre"), asking(log), 3)] == [[2, 3], [], []]


def test_shown_and_not_taken():
    shown = pl.Series([[1, 2, 3, 77], [0, 2], None, [4, 4, 5]])
    log = make_log(taken((1, 1, 1), (1, 2, 2), (2, 0, 1), (2, 3, 2), impressions=shown), catalogue(6), "films")
    assert [sorted(row) for row in draw(Shown(), asking(log), 3)] == [[3], [0], [], [4, 5]]


def test_shares_of_a_mixture():
    log = make_log(taken(*[(user, 0, 1) for user in range(20)]), catalogue(31), "films")
    thirds = [Among(tuple(range(start, start + 10))) for start in (1, 11, 21)]
    mixture = Mixture(tuple((1, each) for each in thirds))
    for row in draw(mixture, asking(log), 7):
        assert [(item - 1) // 10 for item in row] == [0, 0, 1, 1, 1, 2, 2]
    few = Among((1, 2))
    for parts, places in [
        (((0.75, few), (0.25, thirds[1])), [0, 0, 1, 1, 1, 1, 1, 1]),
        (((0.25, thirds[1]), (0.75, few)), [1, 1, 0, 0]),  # nothing comes after it to give the rest
        (((0.5, few), (0.5, Among((2, 3, 4)))), [0, 0, 0, 0]),  # 2 only once
        (((0.5, thirds[0]), (0.5, Mixture(((1, thirds[1]), (1, thirds[2]))))), [0, 0, 0, 0, 1, 1, 2, 2]),
    ]:
        for row in draw(Mixture(parts), asking(log), 8):
            assert [(item - 1) // 10 for item in row] == places
            assert len(set(row)) == len(row)


def plain_nearest(targets, row, score, count):
    """The items of the highest scores, the first of each title, but for what was liked."""
    events = targets.events
    titles = events.items["title"].to_list()
    user = events.user[targets.event[row]]
    refused = {titles[n] for n in events.item[(events.user == user) & events.liked]}
    known = [item for item in range(len(titles)) if titles.index(titles[item]) == item and not np.isnan(score(item))]
    best = sorted(known, key=lambda item: (-score(item), item))
    return [item for item in best if titles[item] not in refused][:count]


@pytest.fixture
def three_users():
    generator = np.random.default_rng(1)
    rows = [(user, int(item), time) for user in "abc" for time, item in enumerate(generator.permutation(20)[:4])]
    items = pl.DataFrame({"item_id": range(20), "title": [f"film {n % 17}" for n in range(20)]})
    return asking(make_log(taken(*rows), items, "films"))


def test_nearest_by_cosine(three_users, tmp_path):
    vectors = np.random.default_rng(2).normal(size=(20, 5)) * np.arange(1, 21)[:, None]
    items = three_users.events.item[three_users.event]
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    expected = [plain_nearest(three_users, row, lambda i, t=t: unit[i] @ unit[t], 4) for row, t in enumerate(items)]
    np.save(tmp_path / "items.npy", vectors)
    table = pl.DataFrame({"item_id": [f"{n}" for n in range(20)][::-1], "embedding": vectors[::-1].tolist()})
    table = pl.concat([table, pl.DataFrame({"item_id": ["not a film"], "embedding": [[0.0] * 5]})])
    table.write_parquet(tmp_path / "items.parquet")
    for source in (vectors, table, tmp_path / "items.npy", str(tmp_path / "items.parquet")):
        assert draw(Nearest(source), three_users, 4) == expected
    partly = [set(row) for row in draw(Nearest(vectors, top=6), three_users, 4)]
    assert partly != [set(row) for row in expected]
    assert all(len(row & set(best)) >= 2 for row, best in zip(partly, expected, strict=True))


def test_items_without_an_embedding_are_near_to_nothing(three_users):
    target = int(three_users.events.item[three_users.event[0]])
    table = pl.DataFrame(
        {"item_id": range(20), "embedding": [None if n == target else [1.0, float(n)] for n in range(20)]}
    )
    drawn = draw(Nearest(table), three_users, 19)
    assert drawn[0] == []
    assert drawn[1]
    assert all(target not in row for row in drawn)


def test_nearest_by_scores_of_users(three_users, tmp_path):
    matrix = np.random.default_rng(3).normal(size=(3, 20))
    matrix[0, 5] = np.nan
    users = three_users.events.user[three_users.event]
    expected = [plain_nearest(three_users, row, lambda i, u=u: matrix[u, i], 4) for row, u in enumerate(users)]
    np.save(tmp_path / "scores.npy", matrix)
    assert draw(Nearest(matrix), three_users, 4) == draw(Nearest(tmp_path / "scores.npy"), three_users, 4) == expected


@settings(max_examples=40, deadline=None)
@given(questions(), st.integers(1, 5))
def test_nearest_by_a_table_of_scores(targets, count):
    table, known = scores_of(targets)
    events = targets.events
    ids, title = events.items["item_id"], dict(events.items.select("item_id", "title").rows())
    for row, items in enumerate(draw(Nearest(table), targets, count)):
        user = events.user[targets.event[row]]
        met = {title[ids[int(n)]] for n in events.item[(events.user == user) & events.liked]}
        expected = []
        for item in sorted(ids, key=lambda item: -known.get((events.user_ids[int(user)], item), 0)):
            if title[item] not in met and (events.user_ids[int(user)], item) in known:
                met.add(title[item])
                expected.append(item)
        assert items == expected[:count]


def test_nearest_in_a_mixture_goes_on_where_others_stopped(three_users):
    vectors = np.random.default_rng(2).normal(size=(20, 5))
    best = draw(Nearest(vectors), three_users, 6)
    mixture = Mixture(((1, Nearest(vectors)), (1, Nearest(vectors))))
    assert draw(mixture, three_users, 6) == best


# What does not fit


ITEM_TABLE = pl.DataFrame({"item_id": range(20), "embedding": [[1.0, 2.0]] * 20})


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        (
            Disliked(),
            "there is nothing that a user did not like. `disliked` needs a log with ratings, some of them not above "
            "`positive`.",
        ),
        (Shown(), "`shown` needs a column `impressions` in the log: what was shown at an event."),
        (SharedFeature("genre"), "items have no feature 'genre', only: item_id, title."),
        (
            Nearest(np.zeros((19, 3))),
            "a matrix of shape (19, 3) fits neither the 20 items nor the 3 users and 20 items of the log.",
        ),
        (
            Nearest(ITEM_TABLE.rename({"embedding": "vector"})),
            "a table has the columns item_id and embedding, or user_id, item_id and score; this one has: item_id, "
            "vector.",
        ),
        (
            Nearest(ITEM_TABLE.with_columns(embedding=pl.Series([[1.0]] * 19 + [[1.0, 2.0]]))),
            "the embeddings are not all of one length, or none is of an item of the log.",
        ),
        (
            Nearest(ITEM_TABLE.with_columns(item_id=pl.lit("film"))[:1]),
            "the embeddings are not all of one length, or none is of an item of the log.",
        ),
        (Nearest(pl.concat([ITEM_TABLE, ITEM_TABLE[3:]])), "item 3 has more than one embedding. Keep one of each."),
    ],
)
def test_what_a_log_does_not_have(three_users, sampler, message):
    with pytest.raises(ValueError, match=r"^`negatives`: ") as error:
        draw(sampler, three_users, 2)
    assert str(error.value) == f"`negatives`: {message}"


def test_a_square_matrix_could_be_either():
    log = make_log(taken((1, 0, 1), (2, 1, 1)), catalogue(2), "films")
    with pytest.raises(ValueError, match="as many users as items: give a table of scores or embeddings, not a matrix"):
        draw(Nearest(np.eye(2)), asking(log), 1)


def test_files_that_are_not_there(three_users, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"`negatives`: there is no file .*scores\.npy\."):
        draw(Nearest(tmp_path / "scores.npy"), three_users, 2)
    (tmp_path / "scores.txt").touch()
    with pytest.raises(ValueError, match=r"scores\.txt is neither a `\.npy` matrix nor a `\.parquet` table\."):
        draw(Nearest(tmp_path / "scores.txt"), three_users, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Popularity(-1), "`power` is -1, but it is at least 0."),
        (lambda: Nearest("scores.npy", top=0), "`top` is 0, but it is at least 1."),
        (lambda: Mixture(()), "a mixture has at least one part, and each a share above 0."),
        (lambda: Mixture(((0, Uniform()),)), "a mixture has at least one part, and each a share above 0."),
    ],
)
def test_options_out_of_range(make, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        make()
    assert str(error.value) == f"`negatives`: {message}"
