"""That baselines learn from training alone, score as worked out by hand, and follow the row's user and history."""

import numpy as np
import polars as pl
import pytest
import torch
from benchmarks.quality import baselines

from trl_dmpo.data import BuildConfig, build_dataset
from trl_dmpo.data.log import make_log
from trl_dmpo.data.plan import make_plan
from trl_dmpo.ranking.rows import RankingRows, load_ranking_rows


SMALL = {
    "popularity": {},
    "item-knn": {"neighbours": 3},
    "ease": {"lamb": 2.0},
    "bpr": {"k": 4, "max_iter": 20},
    "sasrec": {"n_epochs": 2, "embedding_dim": 8, "n_sample": 16},
    "mean rating": {"max_iter": 20},
    "mf": {"k": 4, "max_iter": 20},
}
OPTIONS = {"split": "leave_one_out", "negatives": "uniform", "ranking_negatives": 4, "num_negatives": 1}
RING = 12
# What five users liked: 0 and 1 go together, and 2 and 3
PAIRS = [("ann", [0, 1]), ("bob", [0, 1, 2]), ("cat", [2, 3]), ("dan", [0]), ("eve", [2, 3, 1])]


def frame(taken):
    liked = [(user, item, time, 3.0 + item % 3) for user, items in taken for time, item in enumerate(items)]
    return pl.DataFrame(liked, schema=["user_id", "item_id", "timestamp", "rating"], orient="row")


def rows_of(*rows):
    """Rows of (user, history, candidates); the last candidate is the right one."""
    users, histories, candidates = zip(*rows, strict=True)
    return RankingRows(
        name="test",
        prompts=["Next:"] * len(rows),
        candidates=[[f" {item}" for item in each] for each in candidates],
        labels=np.array([len(each) - 1 for each in candidates]),
        columns={"user_id": list(users), "history_ids": list(histories), "candidate_ids": list(candidates)},
    )


def rated_log():
    """Forty users, some films of one title, some not liked."""
    generator = np.random.default_rng(0)
    taken = frame([(user, generator.permutation(30)[: 2 + user % 9].tolist()) for user in range(40)])
    rated = taken.with_columns(rating=pl.Series(generator.integers(2, 6, taken.height)))
    return make_log(
        rated, pl.DataFrame({"item_id": range(30), "title": [f"Film {n % 27}" for n in range(30)]}), "films"
    )


def ranking_rows(log, **options):
    data = build_dataset(log, configuration="ranking", seed=0, **OPTIONS | options)
    return [load_ranking_rows(list(data[split])) for split in ("validation", "test")]


def test_what_is_learnt_from_is_the_training_of_a_dataset():
    log = rated_log()
    liked = baselines.liked_before(log, *ranking_rows(log))
    plan = make_plan(log, BuildConfig(**OPTIONS))
    assert np.bincount(liked["item_id"], minlength=30).tolist() == plan.popularity.tolist()
    assert 0 < liked.height < log.interactions.filter(pl.col("rating") > 3).height
    loved = baselines.liked_before(log, *ranking_rows(log, positive=4.0), positive=4.0)
    assert loved.join(log.interactions, on=["user_id", "item_id"])["rating"].unique().to_list() == [5]


def test_targets_among_what_is_learnt_from_are_refused():
    log = rated_log()
    _, rows = ranking_rows(log)
    whole = log.interactions.select("user_id", "item_id", "timestamp")
    with pytest.raises(ValueError, match=rf"A leak: .* a target of {rows.name} \({len(rows)} such\)"):
        baselines.score_baseline("popularity", whole, rows, seed=0)
    _, rows = ranking_rows(log, split="user(validation=0.2, test=0.6, per_user=3)")
    with pytest.raises(ValueError, match=r"A leak: .* `split='leave_one_out'"):
        baselines.liked_before(log, rows)


def test_popularity_counts_users():
    (scores,) = baselines.score_baseline("popularity", frame(PAIRS), rows_of(("dan", [0], [3, 2, 1])), seed=0)
    assert scores.tolist() == [2, 3, 3]


def test_item_knn_adds_the_cosines_of_near_items():
    rows = rows_of(("dan", [0, 3], [3, 2, 1]), ("dan", [2, 3], [0, 1]))
    first, second = baselines.score_baseline("item-knn", frame(PAIRS), rows, 0, {"neighbours": 2})
    # Users of 0: ann, bob, dan; of 1: ann, bob, eve; of 2: bob, cat, eve; of 3: cat, eve
    cosine = {(0, 1): 2 / 3, (0, 2): 1 / 3, (1, 2): 2 / 3, (1, 3): 1 / 6**0.5, (2, 3): 2 / 6**0.5}
    # The nearest two of 3 are 2 and 1, of 2 they are 3 and 1, of 1 they are 0 and 2, of 0 they are 1 and 2
    np.testing.assert_allclose(first, [0, cosine[2, 3], cosine[0, 1]], rtol=1e-6)
    np.testing.assert_allclose(second, [cosine[0, 2], cosine[1, 2]], rtol=1e-6)


def test_ease_is_ridge_regression_of_items_on_items():
    rows = rows_of(("dan", [0], [1, 2, 3]), ("dan", [0, 3], [2, 1]))
    scores = baselines.score_baseline("ease", frame(PAIRS), rows, 0, {"lamb": 2.0})
    taken = np.array([[item in items for item in range(4)] for _, items in PAIRS], float)
    weights = np.zeros((4, 4))
    for item in range(4):
        rest = np.delete(np.arange(4), item)
        others = taken[:, rest]
        weights[rest, item] = np.linalg.solve(others.T @ others + 2 * np.eye(3), others.T @ taken[:, item])
    assert weights[0, 3] < 0  # who likes 0 likes 3 less
    np.testing.assert_allclose(scores[0], weights[0, [1, 2, 3]], rtol=1e-5)
    np.testing.assert_allclose(scores[1], weights[[0, 3]][:, [2, 1]].sum(axis=0), rtol=1e-5)


def test_bpr_tells_users_of_different_taste_apart():
    taken = [(user, [(n + user) % 8 + 10 * (user % 2) for n in range(6)]) for user in range(20)]
    rows = rows_of(*[(user, [0], [*range(8), *range(10, 18), 99]) for user in range(20)])
    options = {"k": 8, "max_iter": 300, "learning_rate": 0.05}
    scores = baselines.score_baseline("bpr", frame(taken), rows, 0, options)
    for user, each in enumerate(scores):
        own, other = (each[:8], each[8:16]) if user % 2 == 0 else (each[8:16], each[:8])
        assert own.min() > other.max()
    again = baselines.score_baseline("bpr", frame(taken), rows, 0, options)
    assert np.array_equal(scores, again)
    assert not np.array_equal(scores, baselines.score_baseline("bpr", frame(taken), rows, 1, options))


def test_mf_learns_what_is_rated_high():
    """Of films that all have seen, by users of whom half like the one kind and half the other."""
    kinds = pl.DataFrame({"user_id": range(20)}).join(pl.DataFrame({"item_id": range(12)}), how="cross")
    high = pl.col("user_id") % 2 == pl.col("item_id") % 2
    rated = kinds.with_columns(timestamp=pl.col("item_id"), rating=pl.when(high).then(5).otherwise(1))
    rated = rated.filter((pl.col("user_id") + pl.col("item_id")) % 7 > 1)
    unseen = [(user, [item for item in range(12) if (user + item) % 7 <= 1]) for user in range(20)]
    rows = rows_of(*[(user, [], [*items, 99]) for user, items in unseen])
    scores = baselines.score_baseline("mf", rated, rows, 0, {"k": 4, "max_iter": 300})
    for (user, items), each in zip(unseen, scores, strict=True):
        predicted = dict(zip(items, each[:-1], strict=True))
        own = [value for item, value in predicted.items() if item % 2 == user % 2]
        assert min(own) > max(value for item, value in predicted.items() if item % 2 != user % 2)
    assert np.array_equal(scores[0], baselines.score_baseline("mf", rated, rows, 0, {"k": 4, "max_iter": 300})[0])


def test_mean_rating_is_less_the_mean_of_the_users():
    """Of users who rate high, and of users who rate low, the ratings of what they do not share say nothing."""
    of_users = {0: [(0, 5), (1, 4), (2, 3)], 1: [(0, 3), (1, 2), (2, 1), (3, 3)], 2: [(4, 5), (1, 5), (2, 4)]}
    taken = [(user, item, item, rating) for user, each in of_users.items() for item, rating in each]
    rated = pl.DataFrame(taken, schema=["user_id", "item_id", "timestamp", "rating"], orient="row")
    (scores,) = baselines.score_baseline(
        "mean rating", rated, rows_of((9, [], [0, 1, 2, 3, 99])), 0, {"max_iter": 2000, "lambda_reg": 0.0}
    )
    # By least squares: item 1 is one below item 0, item 2 another one below it, and item 3 is level with item 0
    np.testing.assert_allclose(scores[:4] - scores[0], [0, -1, -2, 0], atol=0.1)


def test_sasrec_learns_what_follows_what(capfd):
    liked = frame([(user, [(user + step) % RING for step in range(9)]) for user in range(60)])
    # Of users whom the rows do not tell: only histories say what comes next
    histories = [[(start + step) % RING for step in range(4)] for start in range(RING)]
    rows = rows_of(*[(-1, history, [*range(RING), 99]) for history in histories])
    options = {"n_epochs": 30, "embedding_dim": 16, "n_sample": 32, "learning_rate": 0.02, "max_len": 5}
    state = torch.random.get_rng_state()
    scores = baselines.score_baseline("sasrec", liked.sample(fraction=1, shuffle=True, seed=0), rows, 0, options)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [int(np.argmax(each)) for each in scores] == [(history[-1] + 1) % RING for history in histories]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", baselines.GRIDS)
def test_scores_are_of_candidates_in_their_order(name):
    liked = frame(PAIRS)
    rows = rows_of(("bob", [0, 77], [3, 99, 1, 98]), ("bob", [0], [98, 1, 3, 99]), ("bob", [77], [3, 1, 0, 98]))
    first, second, nothing = baselines.score_baseline(name, liked, rows, 0, SMALL[name])
    assert first.dtype == np.float32
    assert first[[3, 2, 0, 1]].tolist() == second.tolist()  # 77, which nobody liked, says nothing
    assert first[1] == first[3] < min(first[0], first[2])
    assert np.isfinite(first).all()
    known_alike = len(set(nothing[:3].tolist())) == 1
    assert known_alike == (name in ("item-knn", "ease", "sasrec"))
    assert nothing[3] < nothing[:3].min()


@pytest.mark.parametrize("name", baselines.GRIDS)
def test_users_are_known_by_factors_or_by_histories(name):
    rows = rows_of(
        ("ann", [0], [3, 2, 99]), ("ann", [1], [3, 2, 99]), ("cat", [0], [0, 1, 99]), ("ann", [0], [0, 1, 99])
    )
    one, other_history, one_user, other_user = baselines.score_baseline(name, frame(PAIRS), rows, 0, SMALL[name])
    assert np.array_equal(one, other_history) == (name in ("popularity", "bpr", "mean rating", "mf"))
    assert np.array_equal(one_user, other_user) == (name not in ("bpr", "mf"))


def test_the_best_on_validation_rows_is_chosen(monkeypatch):
    def fit(liked, seed, good, wide):
        return baselines._Fitted({0: 0, 1: 1}, lambda user, history: np.array([1.0, 2.0 if good else 0.0]))

    monkeypatch.setitem(baselines._FITS, "bpr", fit)
    monkeypatch.setitem(baselines.GRIDS, "bpr", {"good": [False, True], "wide": [3, 5]})
    # Among more than ten, a right one that comes last counts nothing
    rows = rows_of(("dan", [2], [*[0] * 10, 1]))
    assert baselines.tune_baseline("bpr", frame(PAIRS), rows, seed=0) == {"good": True, "wide": 3}
    assert baselines.tune_baseline("popularity", frame(PAIRS), rows, seed=0) == {}


def test_errors_name_what_is_wrong():
    liked, rows = frame(PAIRS), rows_of(("zoe", [0], [2, 1]))
    with pytest.raises(ValueError, match="'svd', but it is one of: popularity, item-knn"):
        baselines.score_baseline("svd", liked, rows, 0)
    with pytest.raises(ValueError, match="'svd', but it is one of: popularity, item-knn"):
        baselines.tune_baseline("svd", liked, rows, 0)
    with pytest.raises(ValueError, match="'item-knn' has no 'k', only: neighbours"):
        baselines.score_baseline("item-knn", liked, rows, 0, {"k": 5})
    with pytest.raises(ValueError, match="'bpr': user 'zoe' has nothing in training"):
        baselines.score_baseline("bpr", liked, rows, 0, SMALL["bpr"])
    del rows.columns["history_ids"]
    with pytest.raises(ValueError, match="test: there is no column 'history_ids'"):
        baselines.score_baseline("popularity", liked, rows, 0)


def test_a_training_that_diverged_is_no_result():
    options = SMALL["bpr"] | {"learning_rate": 1e30}
    with pytest.raises(ValueError, match=r"test\[0\], 'bpr' with .*: scores are not finite"):
        baselines.score_baseline("bpr", frame(PAIRS), rows_of(("ann", [0], [3, 2])), 0, options)
