"""An evaluation as files: `results.json`, `per_user.parquet` and the report; and what an earlier one holds."""

import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import polars as pl

from ..data.folders import FolderKind
from .evaluate import Evaluation, group_columns, history_popularity
from .groups import group_rows
from .intervals import Comparison, Estimate
from .metrics import expected_ranks
from .report import write_report
from .rows import RankingRows, as_text


if TYPE_CHECKING:
    from .explain import Explanation

RESULTS, PER_USER, REPORT = "results.json", "per_user.parquet", "report.html"
EVALUATION = FolderKind("an evaluation", RESULTS, only=(RESULTS, PER_USER, REPORT))


def write_evaluation(
    evaluation: Evaluation,
    folder: Path,
    more: Mapping[str, Mapping[str, list]] | None = None,
    explanations: Mapping[int, "Explanation"] | None = None,
) -> None:
    """
    Write an evaluation to a folder that is there.

    Args:
        evaluation ([`Evaluation`]):
            What to write.
        folder (`Path`):
            Where to: `results.json`, `per_user.parquet` and `report.html`.
        more (`Mapping[str, Mapping[str, list]]`, *optional*):
            From the name of a model to more columns of its rows in `per_user.parquet`, N values each.
        explanations (`Mapping[int, Explanation]`, *optional*):
            As of [`~trl_dmpo.ranking.report.write_report`].
    """
    text = json.dumps(_as_json(evaluation), indent=2, ensure_ascii=False, allow_nan=False)
    (folder / RESULTS).write_text(f"{text}\n", encoding="utf-8")
    per_user_table(evaluation, more).write_parquet(folder / PER_USER, compression="zstd")
    write_report(evaluation, folder / REPORT, explanations)


def _as_json(evaluation: Evaluation) -> dict[str, Any]:
    return {
        "settings": _plain(evaluation.settings),
        "results": _plain(evaluation.results),
        "groups": _plain(evaluation.groups),
        "comparisons": _plain(evaluation.comparisons),
    }


def _plain(value: Any) -> Any:
    """Estimates and comparisons by the names of their parts; `null` where there is no number."""
    if isinstance(value, (Estimate, Comparison)):
        return {name: _plain(part) for name, part in value._asdict().items()}
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def per_user_table(evaluation: Evaluation, more: Mapping[str, Mapping[str, list]] | None = None) -> pl.DataFrame:
    """
    A row for each evaluated row and model, from which every number of `results.json` can be computed again.

    Args:
        evaluation ([`Evaluation`]):
            N rows, M models.
        more (`Mapping[str, Mapping[str, list]]`, *optional*):
            As of [`write_evaluation`].

    Returns:
        `pl.DataFrame`: N times M rows. `model`; `row_index`, the place of the row in what it was read from; `user`, a number,
        and `user_id`; `label`; `candidates`, as text, `candidate_ids` and `scores`, in one order; `rank` of the chosen one
        (of ties the mean); `generated`; `group_*` and `history_popularity`; and each metric of a row.
    """
    frames = [_model_table(evaluation, model, (more or {}).get(model, {})) for model in evaluation.scores]
    return pl.concat(frames, how="diagonal_relaxed")


def _model_table(evaluation: Evaluation, model: str, more: Mapping[str, list]) -> pl.DataFrame:
    rows, scores = evaluation.rows, evaluation.scores[model]
    columns: dict[str, Any] = {
        "model": [model] * len(rows),
        "row_index": rows.places,
        "user": rows.users,
        "label": rows.labels,
        "candidates": [[as_text(candidate) for candidate in row] for row in rows.candidates],
        "scores": pl.Series([row.tolist() for row in scores], dtype=pl.List(pl.Float32)),
        "rank": [expected_ranks(row)[label] for row, label in zip(scores, rows.labels, strict=True)],
    }
    columns |= {name: rows.columns[name] for name in ("user_id", "candidate_ids") if name in rows.columns}
    if evaluation.generated is not None:
        columns["generated"] = pl.Series(evaluation.generated.get(model, [None] * len(rows)), dtype=pl.String)
    columns |= {f"group_{name}": _labels(rows, name) for name in evaluation.groups}
    if (before := history_popularity(rows)) is not None:
        columns["history_popularity"] = before
    return pl.DataFrame(columns | dict(more) | evaluation.per_row[model], strict=False)


def _labels(rows: RankingRows, name: str) -> list[str]:
    labels = [""] * len(rows)
    for label, part in group_rows(group_columns(rows, [name])[name], name).items():
        for row in part.tolist():
            labels[row] = label
    return labels


class Earlier(NamedTuple):
    """
    What an earlier evaluation of the same rows has.

    Args:
        scores (`dict[str, list[np.ndarray]]`):
            From the name of a model to N arrays, float32.
        generated (`dict[str, list[str]]`):
            From the name of a model to N answers, for those that were asked to generate some.
        models (`dict[str, dict]`):
            From the name of a model to how it was loaded and scored.
        position_bias (`dict[str, dict]`):
            From the name of a model to what its place in the list does to a candidate, for those of which this was asked.
    """

    scores: dict[str, list[np.ndarray]]
    generated: dict[str, list[str]]
    models: dict[str, Any]
    position_bias: dict[str, Any]

    def renamed(self, taken: Collection[str], where: str) -> "Earlier":
        """The same, with `where` added to the names that are in `taken`, until it is a name that nothing has."""
        used = {*taken, *self.scores}
        names = {}
        for name in self.scores:
            new = name
            while name in taken and new in used:
                new = f"{new} ({where})"
            used.add(new)
            names[name] = new
        parts: Any = ({names[name]: value for name, value in part.items()} for part in self)
        return Earlier(*parts)


def read_earlier(folder: str | Path, rows: RankingRows) -> Earlier:
    """
    The scores of an earlier evaluation, if it was of the same rows.

    Args:
        folder (`str` or `Path`):
            What `trl-dmpo evaluate` has written.
        rows ([`RankingRows`]):
            The rows to compare on.

    Returns:
        [`Earlier`]

    Raises:
        `FileNotFoundError`: the folder is not there, or holds no evaluation.
        `ValueError`: its files cannot be read, or it was made on other rows; the message says what differs.
    """
    folder = Path(folder).expanduser()
    for name in (RESULTS, PER_USER):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"`compare_to`: {folder} holds no evaluation: there is no {name}.")
    try:
        settings = json.loads((folder / RESULTS).read_text(encoding="utf-8"))["settings"]
        table = pl.read_parquet(folder / PER_USER)
        parts = {
            model: part for (model,), part in table.partition_by("model", as_dict=True, maintain_order=True).items()
        }
        _require_same_rows(folder, settings, next(iter(parts.values()))["row_index"].to_numpy(), rows)
        scores = {model: [np.array(row, dtype=np.float32) for row in part["scores"]] for model, part in parts.items()}
        has_answers = [
            model for model, part in parts.items() if "generated" in part.columns and part["generated"][0] is not None
        ]
        answers = {model: parts[model]["generated"].to_list() for model in has_answers}
        return Earlier(scores, answers, settings["models"], settings.get("position_bias", {}))
    except (json.JSONDecodeError, KeyError, pl.exceptions.PolarsError) as error:
        raise ValueError(
            f"`compare_to`: the evaluation in {folder} cannot be read ({error}). Make it again."
        ) from error


def _require_same_rows(folder: Path, settings: Mapping[str, Any], places: np.ndarray, rows: RankingRows) -> None:
    before, now = f"{settings['dataset']} ({len(places):,} rows)", f"{rows.name} ({len(rows):,} rows)"
    if not np.array_equal(places, rows.places):
        differ = np.setxor1d(places, rows.places)
        raise ValueError(
            f"`compare_to`: {folder} is an evaluation on other rows: {before}, and here {now}. Row {differ[0]}, for one, is in "
            "one of them only. Give the same `--dataset_name`, `--max_rows` and `--seed`."
        )
    if settings["content_hash"] != rows.content_hash:
        raise ValueError(
            f"`compare_to`: {folder} is an evaluation of other data: {before}, and here {now}. The rows have the same places, "
            "but other prompts, candidates or right answers. Give the same `--dataset_name` and options of reading it."
        )
