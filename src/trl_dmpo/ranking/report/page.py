"""The page itself: everything in one file, nothing fetched, nothing run."""

import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from . import figures, tables, text
from .examples import SHORT_LIST, TOP, example_rows, make_example


if TYPE_CHECKING:
    from ..evaluate import Evaluation
    from ..explain import Explanation


def write_report(
    evaluation: "Evaluation", path: str | Path, explanations: Mapping[int, "Explanation"] | None = None
) -> None:
    """
    Write an evaluation as one HTML file.

    It needs no network and runs no script. Text from the data is text everywhere. What it shows are the numbers of `evaluation`;
    only the curves against k are computed here, by the same functions from the same scores and seed, so that they pass through
    the results. The file is written aside and renamed, so it is whole or not there.

    Args:
        evaluation ([`~trl_dmpo.ranking.evaluate.Evaluation`]):
            What was evaluated. Where its `settings` have `position_bias`, as `trl-dmpo evaluate --num_orders` writes it, it is
            shown.
        path (`str` or `Path`):
            Where to write. A file that is there is replaced.
        explanations (`Mapping[int, Explanation]`, *optional*):
            From the number of a row to why an item is recommended to its user, from [`~trl_dmpo.ranking.explain.explain`]. These
            rows are shown beside the [`example_rows`], and their history is coloured.

    Raises:
        `ValueError`: an explanation is of a row that there is not.
    """
    explanations = explanations or {}
    missing = [row for row in explanations if not 0 <= row < len(evaluation.rows)]
    if missing:
        raise ValueError(
            f"`explanations` has row {missing[0]}, but rows are numbered from 0 to {len(evaluation.rows) - 1}."
        )
    _replace(Path(path), _render(evaluation, explanations))


def _replace(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_text(content, encoding="utf-8")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _render(evaluation: "Evaluation", explanations: Mapping[int, "Explanation"]) -> str:
    models = text.name_models(list(evaluation.results))
    rows = tables.metric_rows(evaluation.results, models)
    drawn = example_rows(evaluation)
    shown = [*drawn, *sorted(explanations.keys() - set(drawn))]
    return (
        _environment()
        .get_template("report.html.jinja")
        .render(
            evaluation=evaluation,
            models=models,
            facts=_facts(evaluation),
            settings=_flatten({name: value for name, value in evaluation.settings.items() if name != "position_bias"}),
            leading=tables.leading_metric(rows, evaluation),
            blocks=tables.blocks(rows),
            differences=tables.differences(evaluation, models, rows),
            curves=figures.cutoff_curves(evaluation, models),
            distributions=figures.distributions(evaluation, models),
            places=figures.places(evaluation, models),
            groups=tables.groups(evaluation, models, rows),
            examples=[make_example(evaluation, models, row, explanations.get(row)) for row in shown],
            drawn=len(drawn),
            short_list=SHORT_LIST,
            top=TOP,
        )
    )


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("trl_dmpo.ranking.report"),
        autoescape=True,
        finalize=text.clean,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    names = ("number", "signed", "interval", "p_value")
    environment.globals |= {name: getattr(text, name) for name in names}
    return environment


def _facts(evaluation: "Evaluation") -> dict[str, str]:
    """What stands at the top, from the rows themselves."""
    rows = evaluation.rows
    sizes = np.array([len(candidates) for candidates in rows.candidates])
    low, high = int(sizes.min()), int(sizes.max())
    return {
        "Rows": f"{len(rows):,}",
        "Users": f"{len(np.unique(rows.users)):,}" if "user_id" in rows.columns else "not named",
        "Candidates a row": f"{low:,}" if low == high else f"{low:,} to {high:,}",
        "Seed": str(evaluation.settings["seed"]),
    }


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Settings as lines, those within settings with the names of both."""
    lines: list[tuple[str, str]] = []
    for name, value in settings.items():
        label = f"{prefix}{name}"
        if isinstance(value, Mapping):
            lines += _flatten(value, f"{label}: ")
        else:
            lines.append((label, _plain(value)))
    return lines


def _plain(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(str, value))
    return str(value)
