"""From the scores of one or several models to metrics with intervals, by group, and compared on the same rows."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .auc import auc_statistic, coin_flip_auc
from .beyond_accuracy import catalogue_coverage, mean_popularity, popularity_lift
from .generated import generated_metrics
from .groups import group_rows
from .intervals import Comparison, Estimate, bootstrap, bootstrap_means, paired_tests
from .metrics import pad_candidates, ranking_metrics
from .rows import RankingRows


if TYPE_CHECKING:
    from .scorer import Scorer

CUTOFFS = (1, 5, 10, 20)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """
    One or several models on the same N rows, made by [`evaluate_scores`].

    Args:
        rows ([`RankingRows`]):
            What they were evaluated on.
        scores (`dict[str, list[np.ndarray]]`):
            From the name of a model to N arrays, float32: the scores of each row's candidates, in their order.
        per_row (`dict[str, dict[str, np.ndarray]]`):
            From model and metric to its values, float64 of shape (N,), NaN where a row has none.
        results (`dict[str, dict[str, Estimate]]`):
            From model and metric to the figure and its 95% interval over users. `coverage@k` has no interval; that of
            `coin_flip_auc` is over flips of the coin, and so is its `n`.
        groups (`dict[str, dict[str, dict[str, dict[str, Estimate]]]]`):
            The same for parts of the rows: from column, label of the group, model and metric.
        comparisons (`dict[str, dict[str, Comparison]]`):
            From each model but the first, and metric, to the difference from the first. Empty for one model.
        generated (`dict[str, list[str]]`, *optional*):
            From the name of a model to N answers that it generated, if it was asked to.
        settings (`dict`):
            How it was made: `seed`, `cutoffs`, the data set and its content hash, and what else was given. Plain values only.
    """

    rows: RankingRows
    scores: dict[str, list[np.ndarray]]
    per_row: dict[str, dict[str, np.ndarray]]
    results: dict[str, dict[str, Estimate]]
    groups: dict[str, dict[str, dict[str, dict[str, Estimate]]]]
    comparisons: dict[str, dict[str, Comparison]]
    generated: dict[str, list[str]] | None
    settings: dict[str, Any]


def score_rows(
    scorer: "Scorer", rows: RankingRows, normalize: str = "sum", progress: Callable[[int], None] | None = None
) -> list[np.ndarray]:
    """
    The scores of each row's candidates.

    Args:
        scorer ([`Scorer`]):
            What scores.
        rows ([`RankingRows`]):
            N rows.
        normalize (`str`, *optional*, defaults to `"sum"`):
            `"sum"` or `"mean"` over tokens.
        progress (`Callable[[int], None]`, *optional*):
            Called with the number of rows done since the last call.

    Returns:
        `list[np.ndarray]`: N arrays, float32, in the order of the candidates.

    Raises:
        `ValueError`: as [`Scorer.score`]; the message names the row.
    """
    if rows.catalogue is None:
        scores = scorer.score(rows.prompts, rows.candidates, normalize, progress, rows.name_of)
        return [each.numpy() for each in scores]
    found: list[np.ndarray] = [np.empty(0)] * len(rows)
    # Not all scores at once: a history leaves most of a catalogue, but rows may be many
    for row, each in scorer.stream(rows.prompts, rows.catalogue.answers, normalize, rows.name_of):
        found[row] = each.numpy()[rows.catalogue.kept[row]]
        if progress is not None:
            progress(1)
    return found


def evaluate_scores(
    rows: RankingRows,
    scores: Mapping[str, Sequence[Any]],
    cutoffs: Sequence[int] = CUTOFFS,
    seed: int = 0,
    group_by: Sequence[str] | None = None,
    generated: Mapping[str, list[str]] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Evaluation:
    """
    Metrics of models from the scores that they gave to the candidates of the same rows.

    Args:
        rows ([`RankingRows`]):
            N rows.
        scores (`Mapping[str, Sequence]`):
            From the name of a model to N arrays or tensors, a score for each candidate. All others are compared with the first.
        cutoffs (`Sequence[int]`, *optional*, defaults to `(1, 5, 10, 20)`):
            The k of the metrics at k.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the intervals, tests and coin flips.
        group_by (`Sequence[str]`, *optional*):
            Columns to give results by: of the rows, or `"activity"`, the length of the history, and `"popularity"`, that of
            the chosen item. By default these two, where the rows have `history_ids` and a catalogue with `popularity`.
        generated (`Mapping[str, list[str]]`, *optional*):
            From the name of a model to N answers that it generated.
        settings (`Mapping[str, Any]`, *optional*):
            More to keep in `settings`.

    Returns:
        [`Evaluation`]

    Raises:
        `ValueError`: there are no scores, there is not one for each candidate, one is NaN, or a column to group by is not
            there; the message names the row or the column.

    Example:

    ```python
    >>> from trl_dmpo.ranking.evaluate import evaluate_scores
    >>> from trl_dmpo.ranking.rows import load_ranking_rows

    >>> rows = load_ranking_rows(
    ...     [
    ...         {"prompt": "Seen: Alien. Next:", "candidates": [" Heat", " Aliens"], "label": 1},
    ...         {"prompt": "Seen: Big. Next:", "candidates": [" Babe", " Jaws"], "label": 0},
    ...     ]
    ... )
    >>> evaluation = evaluate_scores(rows, {"old": [[-3.0, -4.0], [-2.0, -5.0]], "new": [[-3.0, -2.0], [-2.0, -5.0]]})
    >>> evaluation.results["new"]["hit_rate@1"].value, evaluation.comparisons["new"]["hit_rate@1"].difference.value
    (1.0, 0.5)
    ```
    """
    if not scores:
        raise ValueError("There are no scores to evaluate. Give those of one model or more.")
    generated = dict(generated or {})
    for model in generated.keys() - scores.keys():
        raise ValueError(f"`generated` has answers of {model!r}, of which there are no scores. Give both.")
    # As they are kept: what is computed from them again must come out the same
    kept = {model: [np.asarray(row, dtype=np.float32) for row in values] for model, values in scores.items()}
    padded = {model: _pad(rows, values, model) for model, values in kept.items()}
    per_row = {model: _per_row(rows, *padded[model], cutoffs, generated.get(model)) for model in scores}
    results = {
        model: bootstrap_means(values, rows.users, seed) | _of_all_rows(rows, *padded[model], cutoffs, seed)
        for model, values in per_row.items()
    }
    found = {name: group_rows(values, name) for name, values in group_columns(rows, group_by).items()}
    return Evaluation(
        rows=rows,
        scores=kept,
        per_row=per_row,
        results=results,
        groups={name: _by_group(rows, per_row, parts, seed) for name, parts in found.items()},
        comparisons=_compare(rows, per_row, seed),
        generated=generated or None,
        settings={**_settings(rows, cutoffs, seed), **(settings or {})},
    )


def distinct_metrics(evaluation: Evaluation) -> list[str]:
    """
    The metrics to show, without those that repeat others: with one right answer recall is the hit rate, MAP is MRR, NDCG@1 is
    the hit rate at 1, and MRR at k is MRR but for low ranks; and a k beyond the candidates is as good as their number.

    Args:
        evaluation ([`Evaluation`]):
            One or several models.

    Returns:
        `list[str]`: names of metrics, which at least one model has.
    """
    most = max(map(len, evaluation.rows.candidates))
    shown: dict[tuple[str, int], str] = {}
    for name in dict.fromkeys(metric for metrics in evaluation.results.values() for metric in metrics):
        family, _, cutoff = name.partition("@")
        k = min(int(cutoff), most) if cutoff else 0
        certain = (family, k) == ("hit_rate", most)
        if not certain and (family, k) != ("ndcg", 1) and (not k or family not in ("recall", "map", "mrr")):
            shown.setdefault((family, k), name)
    return list(shown.values())


def _settings(rows: RankingRows, cutoffs: Sequence[int], seed: int) -> dict[str, Any]:
    return {
        "dataset": rows.name,
        "description": rows.description,
        "content_hash": rows.content_hash,
        "rows": len(rows),
        "users": len(np.unique(rows.users)),
        "catalogue_size": len(_catalogue_ids(rows)) or None,
        "cutoffs": list(cutoffs),
        "seed": seed,
    }


def _pad(rows: RankingRows, scores: Sequence[Any], model: str) -> tuple[np.ndarray, np.ndarray]:
    lengths = [len(row) for row in scores]
    for place, (found, candidates) in enumerate(zip(lengths, rows.candidates, strict=False)):
        if found != len(candidates):
            raise ValueError(f"{model}: row {place} has {found} scores for {len(candidates)} candidates.")
    if len(lengths) != len(rows):
        raise ValueError(f"{model}: there are scores of {len(lengths)} rows, but {len(rows)} rows.")
    return pad_candidates(scores, rows.labels)


def _per_row(
    rows: RankingRows, scores: np.ndarray, relevant: np.ndarray, cutoffs: Sequence[int], answers: list[str] | None
) -> dict[str, np.ndarray]:
    metrics = ranking_metrics(scores, relevant, cutoffs)
    metrics |= {
        f"average_popularity@{k}": mean_popularity(items, rows.popularity)
        for k, items in _recommended(rows, scores, cutoffs).items()
        if rows.popularity
    }
    if answers is None:
        return metrics
    chosen = [row[label] for row, label in zip(rows.candidates, rows.labels, strict=True)]
    return metrics | generated_metrics(answers, chosen, rows.candidates)


def _of_all_rows(
    rows: RankingRows, scores: np.ndarray, relevant: np.ndarray, cutoffs: Sequence[int], seed: int
) -> dict[str, Estimate]:
    """Figures that are no means over rows."""
    results = {"pooled_auc": bootstrap(auc_statistic(scores, relevant), rows.users, seed)}
    if len(rows) > 1:
        flips = coin_flip_auc(scores, relevant, seed=seed)
        low, high = np.quantile(flips, (0.025, 0.975)).tolist()
        results["coin_flip_auc"] = Estimate(float(flips.mean()), low, high, len(flips))
    recommended = _recommended(rows, scores, cutoffs)
    before = history_popularity(rows)
    catalogue = _catalogue_ids(rows)
    for k, items in recommended.items():
        coverage = catalogue_coverage(items, catalogue)
        results[f"coverage@{k}"] = Estimate(coverage, float("nan"), float("nan"), len(np.unique(rows.users)))
        if before is not None and np.nansum(before) > 0:
            popularity = mean_popularity(items, rows.popularity)
            results[f"popularity_lift@{k}"] = popularity_lift(popularity, before, rows.users, seed)
    return results


def _recommended(rows: RankingRows, scores: np.ndarray, cutoffs: Sequence[int]) -> dict[int, list[list]]:
    """For each cutoff that leaves something out of every row, the ids of the candidates up to it, of equal ones the first."""
    if "candidate_ids" not in rows.columns or any(ids is None for ids in rows.columns["candidate_ids"]):
        return {}
    fewest = min(map(len, rows.candidates))
    below = [k for k in cutoffs if k < fewest]
    order = np.argsort(-scores, axis=1, kind="stable")[:, : max(below, default=0)].tolist()
    ids = rows.columns["candidate_ids"]
    return {k: [[row[place] for place in best[:k]] for row, best in zip(ids, order, strict=True)] for k in below}


def _catalogue_ids(rows: RankingRows) -> set:
    """Ids of all items, or where there is no catalogue, of all that are a candidate of some row."""
    if rows.items is not None:
        return set(rows.items["item_id"].to_list())
    return set().union(*(ids or [] for ids in rows.columns.get("candidate_ids", [])))


def history_popularity(rows: RankingRows) -> np.ndarray | None:
    """Mean popularity of the items of each row's history, float64 of shape (N,); `None` if it is not known."""
    popularity, histories = rows.popularity, rows.columns.get("history_ids")
    if not popularity or histories is None:
        return None
    return mean_popularity([history or [] for history in histories], popularity, "history")


def group_columns(rows: RankingRows, group_by: Sequence[str] | None = None) -> dict[str, Sequence[Any]]:
    """
    The values to group rows by.

    Args:
        rows ([`RankingRows`]):
            N rows.
        group_by (`Sequence[str]`, *optional*):
            As of [`evaluate_scores`].

    Returns:
        `dict[str, Sequence]`: N values for each column, as [`~trl_dmpo.ranking.groups.group_rows`] takes them.

    Raises:
        `ValueError`: the rows have no such column.
    """
    known: dict[str, Sequence[Any]] = {}
    if "history_ids" in rows.columns:
        known["activity"] = rows.columns["history_ids"]
    popularity = rows.popularity
    if popularity and "candidate_ids" in rows.columns:
        pairs = zip(rows.columns["candidate_ids"], rows.labels, strict=True)
        known["popularity"] = [None if ids is None else popularity.get(ids[label]) for ids, label in pairs]
    if group_by is None:
        return known
    known = {**rows.columns, **known}
    for name in group_by:
        if name not in known:
            have = ", ".join(known) or "nothing to group by"
            raise ValueError(f"`group_by`: {rows.name} has no column {name!r}, only: {have}.")
    return {name: known[name] for name in group_by}


def _by_group(
    rows: RankingRows, per_row: Mapping[str, Mapping[str, np.ndarray]], parts: Mapping[str, np.ndarray], seed: int
) -> dict[str, dict[str, dict[str, Estimate]]]:
    return {
        label: {
            model: bootstrap_means({name: each[part] for name, each in metrics.items()}, rows.users[part], seed)
            for model, metrics in per_row.items()
        }
        for label, part in parts.items()
    }


def _compare(
    rows: RankingRows, per_row: Mapping[str, Mapping[str, np.ndarray]], seed: int
) -> dict[str, dict[str, Comparison]]:
    (_, first), *others = per_row.items()
    compared = {}
    for model, metrics in others:
        both = [name for name in metrics if name in first]
        model_values, first_values = ({name: each[name] for name in both} for each in (metrics, first))
        compared[model] = paired_tests(model_values, first_values, rows.users, seed)
    return compared
