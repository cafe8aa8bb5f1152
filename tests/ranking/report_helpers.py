"""Evaluations to report on, with made-up scores."""

import numpy as np
import polars as pl

from trl_dmpo.ranking.evaluate import evaluate_scores
from trl_dmpo.ranking.rows import RankingRows


NASTY = "</script><script>document.title='ran'</script><img src=x onerror=\"document.title='ran'\">"


def make_rows(count=40, candidates=20, history=True, titles=None, name="films (ranking, test)", seed=0):
    """Rows with `candidates` candidates each, two rows a user. `titles` names the first items."""
    rng = np.random.default_rng(seed)
    titles = [*(titles or []), *(f"Film {number}" for number in range(candidates + 12))]
    numbers = range(len(titles))
    drawn = [rng.permutation(len(titles)) for _ in range(count)]
    labels = rng.integers(candidates, size=count)
    columns = {
        "user_id": [row // 2 for row in range(count)],
        "history_ids": [order[candidates : candidates + 6].tolist() for order in drawn],
        "candidate_ids": [order[:candidates].tolist() for order in drawn],
    }
    return RankingRows(
        name=name,
        prompts=[
            f"Seen: {', '.join(titles[i] for i in order[candidates : candidates + 6])}. Next:" for order in drawn
        ],
        candidates=[[f" {titles[i]}" for i in order[:candidates]] for order in drawn],
        labels=labels.astype(np.int64),
        columns=columns if history else {},
        items=pl.DataFrame({"item_id": numbers, "title": titles, "popularity": numbers}) if history else None,
    )


def make_scores(rows, lift, seed=1):
    """Noise, and for what was chosen `lift` more."""
    rng = np.random.default_rng(seed)
    scores = [rng.normal(-20, 3, len(row)).astype(np.float32) for row in rows.candidates]
    for row, label in zip(scores, rows.labels, strict=True):
        row[label] += lift
    return scores


def make_evaluation(rows=None, models=None, scores=None, **options):
    """An evaluation of models with the given lifts, or with the given scores."""
    rows = make_rows() if rows is None else rows
    models = {"sft": 1.0, "dmpo": 4.0} if models is None else models
    made = {name: make_scores(rows, lift, seed) for seed, (name, lift) in enumerate(models.items())}
    return evaluate_scores(rows, scores or made, **options)
