"""What `trl-dmpo evaluate` asks of one model: scores, also in several orders, and answers of its own."""

from typing import TYPE_CHECKING, Any, NamedTuple

from .progress import progress_bar


if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console

    from trl_dmpo.ranking.position_bias import PositionBias
    from trl_dmpo.ranking.rows import RankingRows
    from trl_dmpo.ranking.scorer import Scorer

    from .evaluate import EvaluateArguments


class Measured(NamedTuple):
    """
    What one model gave for N rows.

    Args:
        scores (`dict[str, list[np.ndarray]]`):
            N arrays under the name of the model, and under further names what was made of its scores.
        answers (`list[str]`, *optional*):
            N answers that it generated.
        settings (`dict[str, Any]`):
            How it was loaded and scored.
        bias (`PositionBias`, *optional*):
            Its scores in several orders.
    """

    scores: dict[str, list["np.ndarray"]]
    answers: list[str] | None
    settings: dict[str, Any]
    bias: "PositionBias | None"


def measure(
    name: str, label: str, rows: "RankingRows", arguments: "EvaluateArguments", console: "Console"
) -> Measured:
    """Load a model, let it score the rows and perhaps answer, and let go of it. `label` is its name on the screen."""
    from trl_dmpo.ranking.scorer import Scorer

    model, tokenizer = load(name, label, arguments, console)
    scorer = Scorer(model, tokenizer)
    settings = {
        "model_name_or_path": name,
        "model_revision": arguments.model_revision,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "attn_implementation": model.config._attn_implementation,
        "normalize": arguments.normalize,
        **({"max_new_tokens": _max_new_tokens(arguments)} if arguments.generate else {}),
    }
    scores, bias = _score(name, label, scorer, rows, arguments, console)
    answers = _generate(label, scorer, rows, arguments, console) if arguments.generate else None
    return Measured(scores, answers, settings, bias)


def load(name: str, label: str, arguments: "EvaluateArguments", console: "Console") -> tuple[Any, Any]:
    """A model and its tokenizer, as the options say."""
    from rich.text import Text

    from trl_dmpo.ranking.models import load_model, unify_lora

    with console.status(Text(f"Loading {label}")):
        model, tokenizer = load_model(name, revision=arguments.model_revision, **arguments.loading())
        return unify_lora(model), tokenizer


def _score(
    name: str, label: str, scorer: "Scorer", rows: "RankingRows", arguments: "EvaluateArguments", console: "Console"
) -> tuple[dict[str, list["np.ndarray"]], "PositionBias | None"]:
    from trl_dmpo.ranking.evaluate import score_rows
    from trl_dmpo.ranking.position_bias import position_bias

    orders = arguments.num_orders
    if orders is None:
        with progress_bar(f"Scoring with {label}", len(rows), console) as advance:
            return {name: score_rows(scorer, rows, arguments.normalize, advance)}, None
    with progress_bar(f"Scoring with {label} in {orders} orders", len(rows) * orders, console) as advance:
        bias = position_bias(scorer, rows, orders, arguments.seed, arguments.normalize, advance)
    return _calibrated(name, bias, rows, arguments, console), bias


def _calibrated(
    name: str, bias: "PositionBias", rows: "RankingRows", arguments: "EvaluateArguments", console: "Console"
) -> dict[str, list["np.ndarray"]]:
    """The scores of the rows as they stand, and those with the bias of the place taken out, as if of further models."""
    from trl_dmpo.ranking.position_bias import cross_fitted_stella

    lengths = [len(row) for row in rows.candidates]
    padded = {name: bias.scores[:, 0], f"{name}, mean of {arguments.num_orders}": bias.calibrated}
    if len(set(lengths)) == 1 and len(set(rows.users.tolist())) > 1:
        corrected = cross_fitted_stella(bias, rows.users, arguments.seed)
        padded[f"{name}, STELLA of {arguments.num_orders}"] = corrected
    else:
        console.print(
            "No correction by STELLA: it needs rows of several users, with equally many candidates.", soft_wrap=True
        )
    return {key: [row[:length] for row, length in zip(each, lengths, strict=True)] for key, each in padded.items()}


def _generate(
    label: str, scorer: "Scorer", rows: "RankingRows", arguments: "EvaluateArguments", console: "Console"
) -> list[str]:
    from trl_dmpo.ranking.generation import generate_answers

    with progress_bar(f"Generating with {label}", len(rows), console) as advance:
        return generate_answers(
            scorer.model, scorer.tokenizer, rows.prompts, _max_new_tokens(arguments), advance, rows.name_of
        )


def _max_new_tokens(arguments: "EvaluateArguments") -> int:
    return arguments.max_new_tokens or 32


def tell_bias(bias: "PositionBias") -> dict[str, Any]:
    """What `results.json` says of a bias."""
    return {
        "num_orders": bias.orders.shape[1],
        "mean_variance_of_scores": float(bias.variance[bias.orders[:, 0] >= 0].mean()),
        "mean_variance_of_rank": float(bias.rank_variance.mean()),
        "place_shares": bias.place_shares.tolist(),
        "expected_shares": bias.expected_shares.tolist(),
    }


def bias_columns(bias: "PositionBias") -> dict[str, list]:
    """What `per_user.parquet` has of a bias: of each row the scores in all orders, and the orders."""
    lengths = (bias.orders[:, 0] >= 0).sum(axis=1).tolist()
    return {
        name: [[order[:length] for order in row] for row, length in zip(values.tolist(), lengths, strict=True)]
        for name, values in (("order_scores", bias.scores), ("orders", bias.orders))
    }
