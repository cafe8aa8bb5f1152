"""How well models rank, with confidence intervals over users, and how that looks on the screen."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from rich.table import Table

from trl_dmpo.trainer.metrics import ranking_metrics


METRICS = {"ranking/hit_rate@1": "hit rate@1", "ranking/ndcg@10": "NDCG@10", "ranking/mrr": "MRR"}
RESAMPLES = 2000


class Estimate(NamedTuple):
    """
    A mean over users.

    Args:
        mean (`float`):
            The mean.
        low (`float`):
            Lower end of its 95% confidence interval.
        high (`float`):
            Upper end.
    """

    mean: float
    low: float
    high: float


def metrics_per_user(logps: np.ndarray) -> dict[str, np.ndarray]:
    """Each metric for each row of `logps`, (users, C), the chosen completion first."""
    scores = torch.from_numpy(np.asarray(logps))
    metrics = ranking_metrics(scores, torch.ones_like(scores, dtype=torch.bool), [1, 10])
    return {title: metrics[name].numpy() for name, title in METRICS.items()}


def bootstrap(values: np.ndarray, seed: int) -> Estimate:
    """The mean of `values`, one a user, with the interval that resampling the users gives."""
    users = np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile(values[users].mean(axis=1), [0.025, 0.975])
    return Estimate(float(values.mean()), float(low), float(high))


def summarize(logps: dict[str, np.ndarray], seed: int) -> dict[str, dict[str, Estimate]]:
    """
    Estimates by model and metric.

    Args:
        logps (`dict[str, np.ndarray]`):
            For each model, log-probabilities of shape (users, C), the chosen completion first.
        seed (`int`):
            Seed of the resampling.

    Returns:
        `dict[str, dict[str, Estimate]]`: a row for each model, and `DMPO - SFT` of the same users.
    """
    values = {model: metrics_per_user(scores) for model, scores in logps.items()}
    values["DMPO - SFT"] = {name: values["DMPO"][name] - values["SFT"][name] for name in METRICS.values()}
    return {
        model: {name: bootstrap(column, seed) for name, column in columns.items()} for model, columns in values.items()
    }


def results_table(results: dict[str, dict[str, Estimate]], users: int, candidates: int) -> Table:
    """The estimates as a table."""
    table = Table(
        title=f"{users} users never trained on, {candidates} candidates each",
        caption="percent [95% confidence interval, bootstrap over users]",
    )
    table.add_column("", style="bold")
    for name in METRICS.values():
        table.add_column(name, justify="right", no_wrap=True)
    *models, difference = results
    for model in models:
        table.add_row(model, *(_show(estimate) for estimate in results[model].values()))
    table.add_section()
    table.add_row(difference, *(_show(estimate, "+") for estimate in results[difference].values()))
    return table


def _show(estimate: Estimate, sign: str = "") -> str:
    mean, low, high = (f"{100 * value:{sign}.1f}" for value in estimate)
    return f"{mean} \\[{low}, {high}]"


def recommendations_table(rows: Sequence[dict], logps: np.ndarray) -> Table:
    """For each row, what the user has watched, the three titles ranked first, and what the user chose."""
    table = Table(title="What DMPO recommends to three of them", show_lines=True)
    for name in ("watched, latest last", "recommended, best first", "chosen"):
        table.add_column(name)
    for row, scores in zip(rows, logps, strict=True):
        titles = [title.strip() for title in (row["chosen"], *row["rejected"])]
        best = [int(index) for index in np.argsort(-scores, kind="stable")[:3]]
        recommended = [f"[bold green]{titles[index]} ✔[/]" if index == 0 else titles[index] for index in best]
        rank = 1 + int((scores[1:] >= scores[0]).sum())
        watched = row["prompt"].removeprefix("Watched: ").removesuffix(". Next:").replace("; ", "\n")
        table.add_row(watched, "\n".join(recommended), f"{titles[0]}\n[dim]ranked {rank} of {len(titles)}[/]")
    return table
