"""What the page draws from the scores themselves: curves against k, distributions of scores, and places in the list."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..intervals import bootstrap_means
from ..metrics import pad_candidates, ranking_metrics
from .charts import Axis, Curve, Histogram, curve, cutoff_axis, estimates_axis, histogram, linear_axis, path
from .text import Model, metric_label, number


if TYPE_CHECKING:
    from ..evaluate import Evaluation
    from ..intervals import Estimate

# Of longer lists of candidates a curve has about so many points, equally far apart on its axis
MOST_CUTOFFS = 120


class Curves(NamedTuple):
    """
    A metric against its cutoff k.

    Args:
        label (`str`):
            What the metric is called.
        cutoffs (`list[int]`):
            Values of k.
        estimates (`list[list[Estimate]]`):
            For each model, one a cutoff.
        x, y ([`Axis`]):
            Of k, and of the metric.
        curves (`list[Curve]`):
            One a model.
        random (`str`):
            SVG path of what a random order would give.
        texts (`list[str]`):
            Of each model, where its curve begins and ends, in words.
    """

    label: str
    cutoffs: list[int]
    estimates: list[list["Estimate"]]
    x: Axis
    y: Axis
    curves: list[Curve]
    random: str
    texts: list[str]


def cutoff_curves(evaluation: "Evaluation", models: Sequence[Model]) -> list[Curves]:
    """Hit rate and NDCG for every k from 1 to the number of candidates, with the intervals of the results."""
    rows, settings = evaluation.rows, evaluation.settings
    sizes = np.array([len(candidates) for candidates in rows.candidates])
    cutoffs = curve_cutoffs(int(sizes.max()), settings["cutoffs"])
    wanted = [f"{name}@{k}" for name in ("hit_rate", "ndcg") for k in cutoffs]
    estimates = []
    for model in models:
        values = ranking_metrics(*pad_candidates(evaluation.scores[model.key], rows.labels), cutoffs)
        estimates.append(bootstrap_means({name: values[name] for name in wanted}, rows.users, settings["seed"]))
    # Ties count with their expectation, so all equal is a random order
    chance = ranking_metrics(*pad_candidates([np.zeros(size) for size in sizes], rows.labels), cutoffs)
    return [
        _curves(name, cutoffs, estimates, [float(chance[f"{name}@{k}"].mean()) for k in cutoffs])
        for name in ("hit_rate", "ndcg")
    ]


def curve_cutoffs(last: int, also: Iterable[int] = ()) -> list[int]:
    """Every k from 1 to `last`; if they are many, about `MOST_CUTOFFS` of them, and those of the results."""
    if last <= MOST_CUTOFFS:
        return list(range(1, last + 1))
    spread = np.geomspace(1, last, MOST_CUTOFFS).round().astype(int).tolist()
    return sorted({*spread, *(k for k in also if k <= last)})


def _curves(
    metric: str, cutoffs: list[int], found: Sequence[Mapping[str, "Estimate"]], chance: Sequence[float]
) -> Curves:
    estimates = [[of_model[f"{metric}@{k}"] for k in cutoffs] for of_model in found]
    x = cutoff_axis(cutoffs[-1])
    y = estimates_axis([each for of_model in estimates for each in of_model], extra=[0.0, *chance], ticks=5)
    drawn = [curve(model, cutoffs, of_model, x, y) for model, of_model in enumerate(estimates)]
    random = path((x.place(k), y.place(share)) for k, share in zip(cutoffs, chance, strict=True))
    texts = [f"{number(each[0].value)} at 1 to {number(each[-1].value)} at {cutoffs[-1]:,}" for each in estimates]
    return Curves(metric_label(metric), cutoffs, estimates, x, y, drawn, random, texts)


class Distribution(NamedTuple):
    """Scores of the chosen and of the rejected candidates of one model, and where 0 is, in percent."""

    histogram: Histogram
    zero: float
    text: str


def distributions(evaluation: "Evaluation", models: Sequence[Model]) -> list[Distribution]:
    """For each model, scores less the mean score of the row's rejected candidates."""
    return [_distribution(*centred_scores(evaluation, model.key)) for model in models]


def centred_scores(evaluation: "Evaluation", model: str) -> tuple[np.ndarray, np.ndarray]:
    """
    Scores of the chosen and of the rejected candidates, less the mean of the row's rejected ones.

    Log-probabilities of different prompts are on different levels, which say nothing about the order within a row. Seen from
    the mean of the rejected ones, the chosen one's is the margin that DMPO widens, but for the reference model.

    Args:
        evaluation ([`~trl_dmpo.ranking.evaluate.Evaluation`]):
            What was evaluated.
        model (`str`):
            Its name.

    Returns:
        `tuple` of two `np.ndarray`: (N,) of the chosen ones, and of all rejected ones row after row. The mean is over finite
        scores, so a score of -inf stays -inf.
    """
    chosen, rejected = [], []
    for scores, label in zip(evaluation.scores[model], evaluation.rows.labels.tolist(), strict=True):
        others = np.delete(np.asarray(scores, dtype=np.float64), label)
        finite = others[np.isfinite(others)]
        level = finite.mean() if len(finite) else 0.0
        chosen.append(scores[label] - level)
        rejected.append(others - level)
    return np.array(chosen), np.concatenate(rejected)


def _distribution(chosen: np.ndarray, rejected: np.ndarray) -> Distribution:
    made = histogram([chosen, rejected])
    # No interpolation, which has no meaning between -inf and a number
    middle = [number(float(np.quantile(group, 0.5, method="lower"))) for group in (chosen, rejected)]
    text = f"Median of the chosen {middle[0]}, of the rejected {middle[1]}."
    if made.beyond:
        text += f" {made.beyond:,} beyond the axis, counted at its ends."
    return Distribution(made, made.axis.place(0), text)


class Places(NamedTuple):
    """
    How often a model ranks first what is listed in each place.

    Args:
        model ([`Model`]):
            The model.
        bias (`dict`):
            Of the settings, with `place_shares` and `expected_shares`.
        y ([`Axis`]):
            Of the shares.
        bars (`list[tuple[float, float, float]]`):
            For each place left end, width and height in percent.
        line (`str`):
            SVG path of what is expected.
    """

    model: Model
    bias: Mapping[str, Any]
    y: Axis
    bars: list[tuple[float, float, float]]
    line: str


def places(evaluation: "Evaluation", models: Sequence[Model]) -> list[Places]:
    """Position bias of the models for which the evaluation has it."""
    found = evaluation.settings.get("position_bias", {})
    shown = {model: found[model.key] for model in models if model.key in found}
    shares = [share for bias in shown.values() for name in ("place_shares", "expected_shares") for share in bias[name]]
    y = linear_axis([0.0, *shares], bounds=(0.0, 1.0))
    return [_places(model, bias, y) for model, bias in shown.items()]


def _places(model: Model, bias: Mapping[str, Any], y: Axis) -> Places:
    width = 100 / len(bias["place_shares"])
    heights = map(y.place, bias["place_shares"])
    bars = [(round((at + 0.1) * width, 2), round(0.8 * width, 2), height) for at, height in enumerate(heights)]
    steps = [(at * width, y.place(share)) for at, share in enumerate(bias["expected_shares"])]
    return Places(model, bias, y, bars, path((x + end, height) for x, height in steps for end in (0, width)))
