"""The figures of an evaluation as tables with plots, ready to be written: results, differences, groups."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from .charts import Axis, Mark, estimates_axis, marks
from .text import Model, family, is_quality, metric_label, verdict


if TYPE_CHECKING:
    from ..evaluate import Evaluation
    from ..intervals import Comparison, Estimate


class MetricRow(NamedTuple):
    """
    A line of the table of results.

    Args:
        metric (`str`):
            Key of the results.
        label (`str`):
            What it is called.
        also (`list[str]`):
            Metrics of the same kind or cutoff that are the same number for every model, as recall is the hit rate where one item
            is relevant, and as all cutoffs are from the number of candidates on.
        estimates (`list[Estimate | None]`):
            One a model; `None` where a model was not measured so.
        first_of_family (`bool`):
            Whether a new kind of metric begins.
    """

    metric: str
    label: str
    also: list[str]
    estimates: list["Estimate | None"]
    first_of_family: bool


def metric_rows(results: Mapping[str, Mapping[str, "Estimate"]], models: Sequence[Model]) -> list[MetricRow]:
    """All metrics of all models, those of one kind together, cutoffs rising."""
    names = list(dict.fromkeys(metric for model in models for metric in results[model.key]))
    kinds = list(dict.fromkeys(map(family, names)))
    names.sort(key=lambda metric: (kinds.index(family(metric)), _cutoff(metric)))
    rows: list[MetricRow] = []
    for metric in names:
        estimates = [results[model.key].get(metric) for model in models]
        same = next((row for row in rows if _is_same(row, metric, estimates)), None)
        if same is not None:
            same.also.append(metric_label(metric))
        else:
            new = not rows or family(rows[-1].metric) != family(metric)
            rows.append(MetricRow(metric, metric_label(metric), [], estimates, new))
    return rows


def _cutoff(metric: str) -> float:
    cutoff = metric.partition("@")[2]
    return int(cutoff) if cutoff.isdecimal() else math.inf


def _is_same(row: MetricRow, metric: str, estimates: list["Estimate | None"]) -> bool:
    same_cutoff = "@" in metric and _cutoff(row.metric) == _cutoff(metric)
    return (same_cutoff or family(row.metric) == family(metric)) and row.estimates == estimates


def leading_metric(rows: Sequence[MetricRow], evaluation: "Evaluation") -> MetricRow:
    """
    The metric that the page begins with: NDCG at the largest cutoff up to 10 that leaves out some candidates, or else at the
    largest up to 10, or else the first that there is.
    """
    most = max(map(len, evaluation.rows.candidates)) - 1
    ranked = [row for row in rows if "NDCG" in " ".join([row.label, *row.also]) and _cutoff(row.metric) <= 10]
    telling = [row for row in ranked if _cutoff(row.metric) <= most]
    return (telling or ranked or rows[:1])[-1]


class Panel(NamedTuple):
    """A plot of one metric, a mark a model, on an axis of its own."""

    label: str
    axis: Axis
    marks: list[Mark]


class Block(NamedTuple):
    """Metrics of one sort, and what there is to know about them. The sort that the page is about has no title."""

    title: str
    note: str
    rows: list[MetricRow]
    panels: list[Panel]


_ABOUT_GENERATED = (
    "What the model wrote when it was asked. An answer is valid if it is one of the candidates, and nothing more or less, but "
    "for case, blanks, quotation marks and full stops."
)
_ABOUT_OTHERS = "Of these, more is not better as such. Coverage has no interval."


def blocks(rows: Sequence[MetricRow]) -> list[Block]:
    """The metrics of how well items are ranked, those of generated answers, and the others."""
    generated = [row for row in rows if family(row.metric).startswith("generated")]
    others = [row for row in rows if not is_quality(row.metric)]
    ranked = [row for row in rows if row not in generated and row not in others]
    sorts = [("", "", ranked), ("Generated answers", _ABOUT_GENERATED, generated)]
    sorts.append(("What is recommended, right or not", _ABOUT_OTHERS, others))
    return [Block(title, note, these, _panels(these)) for title, note, these in sorts if these]


def _panels(rows: Sequence[MetricRow]) -> list[Panel]:
    axes = [estimates_axis(row.estimates, ticks=3) for row in rows]
    made = [Panel(row.label, axis, marks(row.estimates, axis)) for row, axis in zip(rows, axes, strict=True)]
    # Of one model, or where all are one number, a plot tells nothing
    return [
        each for each in made if len(each.marks) > 1 and len({end for mark in each.marks for end in mark[1:4]}) > 1
    ]


class Difference(NamedTuple):
    """A line of the table of differences."""

    label: str
    comparison: "Comparison"
    verdict: str
    marks: list[Mark]
    first_of_family: bool


class Differences(NamedTuple):
    """A model against the first one. Metrics between 0 and 1 share the axis, on which 0 is at `zero`; others have no plot."""

    model: Model
    axis: Axis
    zero: float
    lines: list[Difference]
    leading: Difference


def differences(evaluation: "Evaluation", models: Sequence[Model], rows: Sequence[MetricRow]) -> list[Differences]:
    """The paired comparisons of each model but the first."""
    made = []
    for at, model in enumerate(models):
        found = evaluation.comparisons.get(model.key, {})
        compared = [row for row in rows if row.metric in found]
        if not compared:
            continue
        axis = estimates_axis(
            [found[row.metric].difference for row in compared if is_quality(row.metric)], extra=[0.0]
        )
        lines = {row.metric: _difference(row, found[row.metric], axis, at) for row in compared}
        leading = lines[leading_metric(compared, evaluation).metric]
        made.append(Differences(model, axis, axis.place(0), list(lines.values()), leading))
    return made


def _difference(row: MetricRow, comparison: "Comparison", axis: Axis, model: int) -> Difference:
    drawn = marks([comparison.difference], axis) if is_quality(row.metric) else []
    placed = [mark._replace(model=model) for mark in drawn]
    return Difference(row.label, comparison, verdict(row.metric, comparison), placed, row.first_of_family)


class GroupLine(NamedTuple):
    """Results of one group of rows, and the number of its users."""

    label: str
    n: int | None
    estimates: list["Estimate | None"]
    marks: list[Mark]


class GroupTable(NamedTuple):
    """A metric by group: its lines and the axis of their plots."""

    metric: str
    label: str
    axis: Axis
    lines: list[GroupLine]


class Groups(NamedTuple):
    """Results by what is in one column: the leading metric, and the others."""

    column: str
    leading: GroupTable
    others: list[GroupTable]


def groups(evaluation: "Evaluation", models: Sequence[Model], rows: Sequence[MetricRow]) -> list[Groups]:
    """Results by group, for each column that the evaluation groups by."""
    made = []
    for column, by_label in evaluation.groups.items():
        measured = {metric for by_model in by_label.values() for found in by_model.values() for metric in found}
        shown = [row for row in rows if row.metric in measured]
        tables = {row.metric: _group_table(row, by_label, models) for row in shown}
        if tables:
            first = tables.pop(leading_metric(shown, evaluation).metric)
            made.append(Groups(column, first, list(tables.values())))
    return made


def _group_table(
    row: MetricRow, by_label: Mapping[str, Mapping[str, Mapping[str, "Estimate"]]], models: Sequence[Model]
) -> GroupTable:
    found = {
        label: [by_model.get(model.key, {}).get(row.metric) for model in models]
        for label, by_model in by_label.items()
    }
    axis = estimates_axis([estimate for estimates in found.values() for estimate in estimates])
    lines = [
        GroupLine(label, max((e.n for e in estimates if e), default=None), estimates, marks(estimates, axis))
        for label, estimates in found.items()
    ]
    return GroupTable(row.metric, row.label, axis, lines)
