"""Why a model ranks as it does, for the rows that a report shows in full."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .progress import progress_bar


if TYPE_CHECKING:
    from rich.console import Console

    from trl_dmpo.ranking.evaluate import Evaluation
    from trl_dmpo.ranking.explain import Explanation
    from trl_dmpo.ranking.recommender import Recommender
    from trl_dmpo.ranking.rows import RankingRows

    from .evaluate import EvaluateArguments


def check_explainable(rows: "RankingRows", arguments: "EvaluateArguments") -> None:
    """Raise `ValueError` or `FileNotFoundError` for what would fail after hours of scoring."""
    from trl_dmpo.ranking.recommender_files import read_prepared

    if find_spec("captum") is None:
        raise ValueError("`explain` needs captum. Install it by: pip install 'trl-dmpo[explain]'")
    if "history_ids" not in rows.columns or "candidate_ids" not in rows.columns:
        raise ValueError(
            f"`explain` is for a dataset made by `trl-dmpo prepare`, and {rows.name} does not say which items are in a history."
        )
    options = read_prepared(Path(arguments.dataset_name).expanduser())  # type: ignore[arg-type]
    form = options["prompt"]
    if form.answer(options["catalogue"].row(0, named=True)) is None:
        raise ValueError(
            f"`explain`: an answer of the form {type(form).__name__} names no single item, so there is none to explain. Use data "
            "prepared with a form such as 'next_item'."
        )


def explain_examples(
    evaluation: "Evaluation", label: str, arguments: "EvaluateArguments", console: "Console"
) -> dict[int, "Explanation"]:
    """Explain the rankings of the first model, whose name on the screen is `label`, of the rows that the report shows."""
    from trl_dmpo.ranking.explain import explain
    from trl_dmpo.ranking.recommender import Recommender
    from trl_dmpo.ranking.report import example_rows

    from .measure import load

    model, tokenizer = load(arguments.model_name_or_path[0], label, arguments, console)
    dataset: Any = arguments.dataset_name
    recommender = Recommender.from_prepared(model, tokenizer, dataset, arguments.normalize)
    rows, shown = evaluation.rows, example_rows(evaluation)
    explained = [
        row for row in shown if len(rows.columns["history_ids"][row]) and _asks_the_same(recommender, rows, row)
    ]
    found = {}
    with progress_bar(f"Explaining {label}", len(explained), console) as advance:
        for row in explained:
            # A whole catalogue needs not be given
            candidates = _candidates(recommender, rows, row) if rows.catalogue is None else None
            found[row] = explain(recommender, rows.columns["history_ids"][row], candidates=candidates)
            advance(1)
    if len(explained) < len(shown):
        console.print(
            f"{len(shown) - len(explained)} of {len(shown)} rows are not explained: their history is empty, or their prompt "
            "cannot be written again from the dataset."
        )
    return found


def _candidates(recommender: "Recommender", rows: "RankingRows", row: int) -> list:
    """Ids of the candidates, in the order in which the prompt lists them if it does."""
    from trl_dmpo.ranking.listing import Listing

    ids = rows.columns["candidate_ids"][row]
    if not recommender.form.listed:
        return ids
    return [ids[place] for place in Listing(rows.prompts[row], rows.candidates[row]).order]


def _asks_the_same(recommender: "Recommender", rows: "RankingRows", row: int) -> bool:
    """Whether what would be explained is the ranking of this row."""
    try:
        candidates = [_candidates(recommender, rows, row)]
    except ValueError:  # the prompt does not list its candidates as they are
        return False
    return recommender.prompts([rows.columns["history_ids"][row]], candidates)[0] == rows.prompts[row]
