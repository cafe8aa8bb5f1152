"""
Classical recommenders to set beside a language model: each scores the candidates of the same rows, leave-one-out.

They know what the language model knows: they are fitted to training alone, and where a user is described by items, not
by learnt factors (item-KNN, EASE, SASRec), these are the row's `history_ids`. So in the test they see the target of
validation, as a prompt does; popularity, BPR, mean ratings and MF do not. The last two are for ratings, of which they
need what was disliked, too. The models are those of cornac, but one.

The item-KNN of cornac is for ratings: it normalises a similarity over the users whom two items share, and a score over
the neighbours, so that where all is liked both are 1. Item-KNN here is that of Deshpande and Karypis, "Item-based top-N
recommendation algorithms", TOIS 2004 (https://doi.org/10.1145/963770.963776), with the neighbours of scikit-learn.
"""

from collections.abc import Callable, Mapping
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from trl_dmpo.data.events import make_events
from trl_dmpo.data.log import InteractionLog
from trl_dmpo.data.splits import TRAIN, LeaveOneOut
from trl_dmpo.ranking.metrics import pad_candidates, ranking_metrics
from trl_dmpo.ranking.rows import RankingRows


# Of all metrics
CUTOFFS = (1, 5, 10, 20)
# What to choose from, by the names that cornac has for it; the first of each is the default
GRIDS: dict[str, dict[str, list]] = {
    "popularity": {},
    "item-knn": {"neighbours": [100, 20, 50, 200]},
    "ease": {"lamb": [500, 100, 250, 1000]},
    "bpr": {"k": [50, 20], "learning_rate": [0.02, 0.05], "lambda_reg": [0.01, 0.02], "max_iter": [200]},
    # Two blocks take half as long again and rank no better. Negatives are drawn evenly: those of the batch are popular
    "sasrec": {
        "learning_rate": [0.002, 0.001],
        "n_epochs": [6],
        "embedding_dim": [64],
        "num_blocks": [1],
        "n_sample": [1024],
        "sample_alpha": [0.0],
        "max_len": [20],
    },
    "mean rating": {"lambda_reg": [0.02, 0.005, 0.1], "max_iter": [50]},
    "mf": {"k": [20, 10], "lambda_reg": [0.05, 0.02, 0.1], "max_iter": [50]},
}
# Those that learn from `user_id`, `item_id` and `rating` of all that users rated, not from what they liked
OF_RATINGS = ("mean rating", "mf")


class _Fitted(NamedTuple):
    """What has been learnt: the number of each item, and from a user and items by number to scores of shape (I,)."""

    items: Mapping[Any, int]
    score: Callable[[Any, list[int]], np.ndarray]


def liked_before(log: InteractionLog, *rows: RankingRows, positive: float = 3.0) -> pl.DataFrame:
    """
    What may be learnt from: the liked interactions that are training in the split `"leave_one_out"`.

    Args:
        log ([`~trl_dmpo.data.log.InteractionLog`]):
            What [`~trl_dmpo.data.build_dataset`] made the rows of; filtered, if it was filtered.
        rows ([`~trl_dmpo.ranking.rows.RankingRows`]):
            Of validation and test. It is checked that none of their targets is left; they may be a sample.
        positive (`float`, *optional*, defaults to `3.0`):
            As of `build_dataset`.

    Returns:
        `pl.DataFrame`: `user_id`, `item_id` and `timestamp`, by user, then in the order of time.

    Raises:
        `ValueError`: a target of `rows` is left.
    """
    events = make_events(log, positive)
    asked = log.interactions.select("user_id", "item_id", "timestamp").filter(events.liked & events.is_new)
    liked = asked.filter(LeaveOneOut().assign(asked, seed=0) == TRAIN)
    for each in rows:
        refuse_leaks(liked, each)
    return liked


def refuse_leaks(liked: pl.DataFrame, rows: RankingRows) -> None:
    """A `ValueError` if a target of the rows is among `user_id` and `item_id` of what may be learnt from."""
    targets = {
        (user, candidates[label])
        for user, candidates, label in zip(
            rows.columns["user_id"], rows.columns["candidate_ids"], rows.labels.tolist(), strict=True
        )
    }
    leaks = targets.intersection(liked.select("user_id", "item_id").iter_rows())
    if leaks:
        user, item = min(leaks)
        raise ValueError(
            f"A leak: what may be learnt from has item {item!r} of user {user!r}, a target of {rows.name} "
            f"({len(leaks)} such). Make the rows with `split='leave_one_out'`, and learn from what is before them alone."
        )


def fit_baseline(
    name: str, liked: pl.DataFrame, seed: int, options: Mapping[str, Any] | None = None
) -> Callable[[RankingRows], list[np.ndarray]]:
    """
    A baseline, fitted once, to score several sets of rows: [`score_baseline`] says how, and what goes in and comes out.

    Example:

    ```python
    score = fit_baseline("sasrec", liked_before(log, validation, test), seed=0)
    evaluate_scores(test, {"SASRec": score(test)})
    ```
    """
    _refuse_unknown(name)
    unknown = sorted(set(options or {}) - set(GRIDS[name]))
    if unknown:
        raise ValueError(f"`options`: {name!r} has no {unknown[0]!r}, only: {', '.join(GRIDS[name]) or 'none'}.")
    chosen = {option: values[0] for option, values in GRIDS[name].items()} | dict(options or {})
    # What is of one moment stays in the order of the log, which is that of histories
    fitted = _FITS[name](liked.sort("user_id", "timestamp", maintain_order=True), seed, **chosen)
    label = f"{name!r} with {chosen}"

    def score(rows: RankingRows) -> list[np.ndarray]:
        for column in ("user_id", "history_ids", "candidate_ids"):
            if column not in rows.columns:
                raise ValueError(f"{rows.name}: there is no column {column!r}. Make the rows with `build_dataset`.")
        refuse_leaks(liked, rows)
        columns = (rows.columns[column] for column in ("user_id", "history_ids", "candidate_ids"))
        return [
            _score_row(fitted, user, history, candidates, f"{rows.name_of(row)}, {label}")
            for row, (user, history, candidates) in enumerate(zip(*columns, strict=True))
        ]

    return score


def score_baseline(
    name: str, liked: pl.DataFrame, rows: RankingRows, seed: int, options: Mapping[str, Any] | None = None
) -> list[np.ndarray]:
    """
    Fit a baseline, and let it score the candidates of each row.

    An item that no one liked in training comes after all others, level with its like: no model has learnt of it, and
    what each would say is an accident of its form. `"bpr"` and `"mf"` have factors for the user, from training; `"item-knn"`,
    `"ease"` and `"sasrec"` score from `history_ids`, less the items that no one liked in training. With none left, all
    known items are level.

    Args:
        name (`str`):
            `"popularity"`, `"item-knn"`, `"ease"`, `"bpr"`, `"sasrec"`, `"mean rating"` or `"mf"`.
        liked (`pl.DataFrame`):
            `user_id`, `item_id` and `timestamp` of what may be learnt from, of [`liked_before`]; for the last two, all
            that was rated, with `rating`.
        rows ([`~trl_dmpo.ranking.rows.RankingRows`]):
            N rows with `user_id`, `history_ids`, oldest first, and `candidate_ids`.
        seed (`int`):
            Of BPR, SASRec and MF; the others have nothing to draw.
        options (`Mapping`, *optional*):
            Of the model, for instance from [`tune_baseline`]. Defaults to the first of each in `GRIDS`.

    Returns:
        `list[np.ndarray]`: N arrays, float32, in the order of the candidates.

    Raises:
        `ValueError`: there is no such baseline or option, a column is missing, `liked` has the target of a row or, for
            BPR and MF, not its user, or scores are not finite.
    """
    return fit_baseline(name, liked, seed, options)(rows)


def tune_baseline(
    name: str, liked: pl.DataFrame, validation: RankingRows, seed: int, metric: str = "ndcg@10"
) -> dict[str, Any]:
    """
    The options of a baseline, of all in `GRIDS`, with the highest mean on validation rows; of equal ones the first.

    Args:
        name, liked, seed:
            As of [`score_baseline`].
        validation ([`~trl_dmpo.ranking.rows.RankingRows`]):
            Rows to choose on.
        metric (`str`, *optional*, defaults to `"ndcg@10"`):
            Of what.

    Returns:
        `dict[str, Any]`: for [`score_baseline`].
    """
    _refuse_unknown(name)
    settings = [dict(zip(GRIDS[name], values, strict=True)) for values in product(*GRIDS[name].values())]
    if len(settings) == 1:
        return settings[0]

    def value(options: Mapping[str, Any]) -> float:
        scores = score_baseline(name, liked, validation, seed, options)
        return float(ranking_metrics(*pad_candidates(scores, validation.labels), CUTOFFS)[metric].mean())

    return max(settings, key=value)


def _refuse_unknown(name: str) -> None:
    if name not in GRIDS:
        raise ValueError(f"`name` is {name!r}, but it is one of: {', '.join(GRIDS)}.")


def _score_row(fitted: _Fitted, user: Any, history: list, candidates: list, where: str) -> np.ndarray:
    """Scores of the candidates, float32 of shape (C,)."""
    items = fitted.items
    scores = np.asarray(fitted.score(user, [items[item] for item in history if item in items]), np.float32)
    if not np.isfinite(scores).all():
        raise ValueError(f"{where}: scores are not finite. The training diverged; lower its learning rate.")
    last = scores.min() - 1
    return np.array([scores[items[item]] if item in items else last for item in candidates], np.float32)


def _matrix(liked: pl.DataFrame):
    """Users and items, where all that was liked has a 1."""
    from cornac.data import Dataset

    return Dataset.from_uir([(user, item, 1.0) for user, item in liked.select("user_id", "item_id").iter_rows()])


def _fit_popularity(liked: pl.DataFrame, seed: int) -> _Fitted:
    from cornac.models import MostPop

    data = _matrix(liked)
    model = MostPop().fit(data)
    return _Fitted(data.iid_map, lambda user, history: model.score(0))


def _fit_item_knn(liked: pl.DataFrame, seed: int, neighbours: int) -> _Fitted:
    """Of each candidate the cosine to those of its `neighbours` nearest items that are in the history, summed."""
    from sklearn.neighbors import NearestNeighbors

    data = _matrix(liked)
    search = NearestNeighbors(n_neighbors=min(neighbours, data.num_items - 1), metric="cosine")
    similarity = search.fit(data.matrix.T.tocsr()).kneighbors_graph(mode="distance")
    similarity.data = 1 - similarity.data
    similarity = similarity.tocsc()
    return _Fitted(data.iid_map, lambda user, history: np.asarray(similarity[:, history].sum(axis=1)).ravel())


def _fit_ease(liked: pl.DataFrame, seed: int, **options: Any) -> _Fitted:
    from cornac.models import EASE

    data = _matrix(liked)
    model = EASE(posB=False, verbose=False, **options).fit(data)
    return _Fitted(data.iid_map, lambda user, history: model.B[history].sum(axis=0))


def _fit_bpr(liked: pl.DataFrame, seed: int, **options: Any) -> _Fitted:
    from cornac.models import BPR

    data = _matrix(liked)
    return _of_users("bpr", BPR(seed=seed, verbose=False, **options).fit(data), data)


def _fit_mean_rating(rated: pl.DataFrame, seed: int, **options: Any) -> _Fitted:
    """Of each item by how much it is rated above the mean of its users, less for few ratings."""
    from cornac.models import BaselineOnly

    data = _ratings(rated)
    model = BaselineOnly(seed=seed, num_threads=1, verbose=False, **options).fit(data)
    return _Fitted(data.iid_map, lambda user, history: model.i_biases)


def _fit_mf(rated: pl.DataFrame, seed: int, **options: Any) -> _Fitted:
    from cornac.models import MF

    data = _ratings(rated)
    return _of_users("mf", MF(seed=seed, num_threads=1, verbose=False, **options).fit(data), data)


def _ratings(rated: pl.DataFrame):
    """Users and items with what was rated."""
    from cornac.data import Dataset

    return Dataset.from_uir(rated.select("user_id", "item_id", pl.col("rating").cast(pl.Float64)).rows())


def _of_users(name: str, model: Any, data: Any) -> _Fitted:
    """A model that has learnt factors of users."""

    def score(user: Any, history: list[int]) -> np.ndarray:
        if user not in data.uid_map:
            raise ValueError(
                f"{name!r}: user {user!r} has nothing in training, so there are no factors. Leave the user's rows out, "
                "or choose a baseline that scores from histories: 'item-knn', 'ease' or 'sasrec'."
            )
        return model.score(data.uid_map[user])

    return _Fitted(data.iid_map, score)


def _fit_sasrec(liked: pl.DataFrame, seed: int, **options: Any) -> _Fitted:
    import torch
    from cornac.data import SequentialDataset
    from cornac.models import SASRec

    # A user is one session, in the order of the rows
    events = liked.select("user_id", session="user_id", item="item_id", time="timestamp").rows()
    data = SequentialDataset.from_usit(events)
    with torch.random.fork_rng(devices=[]):  # it sets the seed of all of torch
        model = SASRec(device="cpu", seed=seed, verbose=False, **options).fit(data)
    return _Fitted(data.iid_map, lambda user, history: model.score(None, history))


_FITS: dict[str, Callable[..., _Fitted]] = {
    "popularity": _fit_popularity,
    "item-knn": _fit_item_knn,
    "ease": _fit_ease,
    "bpr": _fit_bpr,
    "sasrec": _fit_sasrec,
    "mean rating": _fit_mean_rating,
    "mf": _fit_mf,
}
