"""`trl-dmpo evaluate`: how well one or several models rank, with intervals, on the same rows."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from trl_dmpo.cli.errors import one_line_errors, unwound_by_sigterm

from .explanations import check_explainable, explain_examples
from .measure import Measured, bias_columns, measure, tell_bias
from .model_options import ModelOptions


if TYPE_CHECKING:
    from rich.console import Console

    from trl_dmpo.ranking.evaluate import Evaluation
    from trl_dmpo.ranking.intervals import Estimate
    from trl_dmpo.ranking.results import Earlier
    from trl_dmpo.ranking.rows import RankingRows


@dataclass
class EvaluateArguments(ModelOptions):
    """
    What `trl-dmpo evaluate` evaluates, on which rows, and how.

    Parameters:
        model_name_or_path (`list[str]`):
            Models or PEFT adapters, folders or names on the Hub. All others are compared with the first.
        dataset_name (`str`):
            A folder made by `trl-dmpo prepare`, its name on the Hub, or a file that `trl_dmpo.data.formats.load_rows` reads.
        output_dir (`str`):
            Where to write `results.json`, `per_user.parquet` and `report.html`.
        compare_to (`str`, *optional*):
            Output of another run on the same rows, whose models then come first.
        overwrite_output_dir (`bool`, *optional*, defaults to `False`):
            Whether to replace an evaluation in `output_dir`.
        dataset_config (`str`, *optional*):
            Configuration of a prepared dataset. Defaults to `"ranking"`.
        dataset_split (`str`, *optional*):
            Split of a prepared dataset. Defaults to `"test"`.
        max_rows (`int`, *optional*):
            Take a random sample of so many rows.
        on_invalid_row (`str`, *optional*, defaults to `"raise"`):
            Whether to `"raise"` an error for a row that cannot be evaluated, or to `"drop"` and count it.
        format, chat, domain (*optional*):
            For a file: what to take it for, whether to write messages, and words for the items.
        full_catalogue (`bool`, *optional*, defaults to `False`):
            Whether to rank all items of a prepared dataset instead of the sampled candidates.
        normalize (`str`, *optional*, defaults to `"sum"`):
            `"sum"` or `"mean"` of a candidate's log-probability over its tokens.
        cutoffs (`list[int]`, *optional*, defaults to `[1, 5, 10, 20]`):
            The k of the metrics at k.
        group_by (`list[str]`, *optional*):
            Columns to give results by. By default activity and popularity, where they are known.
        num_orders (`int`, *optional*):
            For prompts that list their candidates: score them in so many orders.
        generate (`bool`, *optional*, defaults to `False`):
            Whether to let the models generate an answer, too, and match it.
        max_new_tokens (`int`, *optional*):
            For `generate`: where an answer is cut off. Defaults to 32.
        explain (`bool`, *optional*, defaults to `False`):
            For a prepared dataset: whether to say in the report why the first of the models ranks as it does.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the sample, the intervals and tests, and the orders.

    How models are loaded is said by [`ModelOptions`].
    """

    model_name_or_path: list[str] = field(
        default_factory=list,
        metadata={"help": "Models or PEFT adapters, folders or names on the Hub. Others are compared with the first."},
    )
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "A folder made by `trl-dmpo prepare`, its name on the Hub, or a file: that of LLaRA, S-DPO, TALLRec or "
            "the DMPO paper as it is, or rows with `prompt`, `chosen` and `rejected`, or `candidates` and `label`."
        },
    )
    output_dir: str | None = field(
        default=None, metadata={"help": "Where to write results.json, per_user.parquet and report.html."}
    )
    compare_to: str | None = field(
        default=None, metadata={"help": "Output of another run on the same rows, whose models then come first."}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Whether to replace an evaluation in `output_dir`."}
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of a prepared dataset. Defaults to 'ranking'."}
    )
    dataset_split: str | None = field(
        default=None, metadata={"help": "Split of a prepared dataset. Defaults to 'test'."}
    )
    max_rows: int | None = field(default=None, metadata={"help": "Take a random sample of so many rows."})
    on_invalid_row: str = field(
        default="raise",
        metadata={
            "help": "What to do with a row that cannot be evaluated: an error, or drop and count it.",
            "choices": ["raise", "drop"],
        },
    )
    format: str | None = field(
        default=None,
        metadata={"help": "What to take a file for, where that is not clear: 'llara', 'dmpo', 'rows', ..."},
    )
    chat: bool = field(default=False, metadata={"help": "Whether to make messages of a file, for a chat model."})
    domain: str | None = field(
        default=None,
        metadata={
            "help": "What kind of thing an item of a file is: 'film', 'book', 'game', 'artist', 'product', 'item'."
        },
    )
    full_catalogue: bool = field(
        default=False,
        metadata={"help": "Whether to rank all items of a prepared dataset instead of the sampled candidates."},
    )
    normalize: str = field(
        default="sum",
        metadata={"help": "How to take a candidate's log-probability over its tokens.", "choices": ["sum", "mean"]},
    )
    cutoffs: list[int] = field(default_factory=lambda: [1, 5, 10, 20], metadata={"help": "The k of the metrics at k."})
    group_by: list[str] | None = field(
        default=None,
        metadata={
            "help": "Columns to give results by. By default 'activity' (length of the history) and 'popularity' (of the "
            "chosen item), where they are known."
        },
    )
    num_orders: int | None = field(
        default=None,
        metadata={
            "help": "For prompts that list their candidates: score them in so many orders, to see and correct what the place "
            "in the list does."
        },
    )
    generate: bool = field(
        default=False, metadata={"help": "Whether to let the models generate an answer, too, and match it."}
    )
    max_new_tokens: int | None = field(
        default=None, metadata={"help": "For `generate`: where an answer is cut off. Defaults to 32."}
    )
    explain: bool = field(
        default=False,
        metadata={
            "help": "For a prepared dataset: whether to say in the report why the first of the models ranks as it does, "
            "for the rows that it shows in full. Needs the extra `explain`."
        },
    )
    seed: int = field(default=0, metadata={"help": "Seed of the sample, the intervals and tests, and the orders."})

    def __post_init__(self):
        for name in ("model_name_or_path", "cutoffs", "group_by"):  # one of a list, in a configuration file
            if isinstance(getattr(self, name), (str, int)):
                setattr(self, name, [getattr(self, name)])

    def check(self) -> None:
        """Raise `ValueError` if something is missing or out of its range."""
        for name, what in (
            ("model_name_or_path", "a model"),
            ("dataset_name", "rows"),
            ("output_dir", "a folder to write to"),
        ):
            if not getattr(self, name):
                raise ValueError(f"Give {what}: `--{name}`.")
        repeated = [
            name for place, name in enumerate(self.model_name_or_path) if name in self.model_name_or_path[:place]
        ]
        if repeated:
            raise ValueError(f"`model_name_or_path`: {repeated[0]} is there twice. Leave one out.")
        for name, least in (("max_rows", 1), ("num_orders", 2), ("max_new_tokens", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"`{name}` is {value}, but it is at least {least}.")
        if not self.cutoffs or min(self.cutoffs) < 1:
            raise ValueError(f"`cutoffs` is {self.cutoffs}, but they are at least 1.")
        if self.max_new_tokens is not None and not self.generate:
            raise ValueError("`max_new_tokens` is for generated answers. Set `generate`, or leave it out.")
        if self.num_orders is not None and self.full_catalogue:
            raise ValueError(
                "`num_orders` is for prompts that list their candidates, which a whole catalogue is not. Leave out one."
            )


def run(argv: list[str]) -> int:
    """Run the sub-command; returns the exit code."""
    with one_line_errors(), unwound_by_sigterm():
        evaluate(parse(argv))
    return 0


def parse(argv: list[str]) -> EvaluateArguments:
    """The options, from the command line and a configuration file."""
    from trl import TrlParser

    from .options import separate_config, unknown_option

    usage = (
        "%(prog)s --model_name_or_path MODEL [MODEL ...] --dataset_name DATASET --output_dir DIR [--config FILE.yaml] "
        "[options]"
    )
    parser = TrlParser((EvaluateArguments,), prog="trl-dmpo evaluate", usage=usage, allow_abbrev=False)
    arguments, unknown = parser.parse_args_and_config(separate_config(argv), return_remaining_strings=True)
    if unknown:
        raise unknown_option(parser, unknown[0])
    # Not before, or a misspelt option would be called a missing one
    arguments.check()
    return arguments


def evaluate(arguments: EvaluateArguments) -> None:
    """Read the rows, score them with each model, write the evaluation, and show what came out."""

    from trl_dmpo.cli.screen import Screen
    from trl_dmpo.data.folders import written_aside
    from trl_dmpo.ranking.results import EVALUATION

    console = Screen()
    folder = Path(arguments.output_dir).expanduser()  # type: ignore[arg-type]
    # What is wrong with the folder is better known before hours of scoring
    with written_aside(folder, EVALUATION, arguments.overwrite_output_dir) as aside:
        evaluation = _evaluate_into(aside, arguments, console)
    _show(evaluation, console)
    console.print(f"Saved to {folder}: results.json, per_user.parquet, report.html", highlight=False, soft_wrap=True)


def _evaluate_into(folder: Path, arguments: EvaluateArguments, console: "Console") -> "Evaluation":
    from trl_dmpo.ranking.models import check_model
    from trl_dmpo.ranking.report.text import name_models
    from trl_dmpo.ranking.results import read_earlier, write_evaluation

    with console.status("Reading"):
        for name in arguments.model_name_or_path:
            check_model(name, arguments.model_revision, arguments.trust_remote_code)
        rows = _read_rows(arguments)
        earlier = read_earlier(arguments.compare_to, rows) if arguments.compare_to else None
    console.print(rows.description, highlight=False, soft_wrap=True)
    labels = {model.key: model.name for model in name_models(arguments.model_name_or_path)}
    measured = {name: measure(name, label, rows, arguments, console) for name, label in labels.items()}
    if earlier is not None:
        _tell_other_settings(earlier, measured, console)
    with console.status("Computing intervals"):
        evaluation = _evaluate(rows, measured, earlier, arguments)
    explanations = {}
    if arguments.explain:
        explanations = explain_examples(evaluation, next(iter(labels.values())), arguments, console)
    with console.status("Writing"):
        more = {name: bias_columns(each.bias) for name, each in measured.items() if each.bias is not None}
        write_evaluation(evaluation, folder, more, explanations)
    return evaluation


def _tell_other_settings(earlier: "Earlier", measured: dict[str, Measured], console: "Console") -> None:
    """A difference that comes from how models were scored should not pass for one between models."""
    now = next(iter(measured.values())).settings
    for name in ("normalize", "dtype", "max_new_tokens"):
        before = sorted(
            {str(settings[name]) for settings in earlier.models.values() if name in settings} - {str(now.get(name))}
        )
        if before and name in now:
            console.print(f"Mind that `{name}` was {' or '.join(before)} in the earlier run, and is {now[name]} here.")


def _read_rows(arguments: EvaluateArguments) -> "RankingRows":
    from trl_dmpo.ranking.evaluate import group_columns
    from trl_dmpo.ranking.full_catalogue import with_full_catalogue
    from trl_dmpo.ranking.groups import group_rows
    from trl_dmpo.ranking.rows import load_ranking_rows

    dataset = arguments.dataset_name
    rows = load_ranking_rows(
        dataset,  # type: ignore[arg-type]
        config=arguments.dataset_config,
        split=arguments.dataset_split,
        max_rows=arguments.max_rows,
        seed=arguments.seed,
        on_invalid_row=arguments.on_invalid_row,
        format=arguments.format,
        chat=arguments.chat,
        domain=arguments.domain,
    )
    if arguments.full_catalogue:
        rows = with_full_catalogue(rows, dataset)  # type: ignore[arg-type]
    if arguments.explain:
        check_explainable(rows, arguments)
    # What cannot be grouped by is better said before hours of scoring
    for name, values in group_columns(rows, arguments.group_by).items():
        group_rows(values, name)
    return rows


def _evaluate(
    rows: "RankingRows", measured: dict[str, Measured], earlier: "Earlier | None", arguments: EvaluateArguments
) -> "Evaluation":
    """All models, those of the earlier run first."""
    from trl_dmpo.ranking.evaluate import evaluate_scores

    scores = {model: values for each in measured.values() for model, values in each.scores.items()}
    generated = {name: each.answers for name, each in measured.items() if each.answers is not None}
    models = {model: each.settings for each in measured.values() for model in each.scores}
    biases = {name: tell_bias(each.bias) for name, each in measured.items() if each.bias is not None}
    if earlier is not None:
        before = earlier.renamed(set(scores), Path(arguments.compare_to).expanduser().resolve().name)  # type: ignore[arg-type]
        scores, generated = before.scores | scores, before.generated | generated
        models, biases = before.models | models, before.position_bias | biases
    return evaluate_scores(
        rows,
        scores,
        cutoffs=arguments.cutoffs,
        seed=arguments.seed,
        group_by=arguments.group_by,
        generated=generated,
        settings={
            "models": models,
            "versions": _versions(),
            **({"position_bias": biases} if biases else {}),
            **({"explained": arguments.model_name_or_path[0]} if arguments.explain else {}),
        },
    )


def _versions() -> dict[str, str]:
    import torch
    import transformers
    import trl

    import trl_dmpo

    packages = {"trl_dmpo": trl_dmpo, "trl": trl, "transformers": transformers, "torch": torch}
    return {name: str(package.__version__) for name, package in packages.items()}


def _show(evaluation: "Evaluation", console: "Console") -> None:
    """A table of the results, and for each further model one of its differences from the first."""
    from rich.table import Table

    from trl_dmpo.ranking.evaluate import distinct_metrics
    from trl_dmpo.ranking.report.text import name_models

    names = {model.key: model.name for model in name_models(list(evaluation.results))}
    metrics = distinct_metrics(evaluation)
    table = Table(title=f"{evaluation.rows.name}: 95% intervals over {evaluation.settings['users']:,} users")
    table.add_column("metric")
    for name in names.values():
        table.add_column(name, justify="right", overflow="fold")
    for metric in metrics:
        table.add_row(metric, *(_tell(evaluation.results[model].get(metric)) for model in names))
    console.print(table)
    first = next(iter(names.values()))
    for model, compared in evaluation.comparisons.items():
        table = Table(title=f"{names[model]} against {first}, on the same rows")
        for column in ("metric", "difference", "p"):
            table.add_column(column, justify="left" if column == "metric" else "right")
        for metric in metrics:
            if metric in compared:
                table.add_row(metric, _tell(compared[metric].difference), f"{compared[metric].p_value:.4f}")
        console.print(table)


def _tell(estimate: "Estimate | None") -> str:
    """Value and interval; what is not known is left out."""
    if estimate is None or estimate.n == 0:
        return ""
    # Adding 0 makes a rounded -0.0 a 0.0
    rounded = (round(number, 4) + 0.0 for number in estimate[:3])
    value, *interval = (f"{number:.4g}" if abs(number) >= 10 else f"{number:.4f}" for number in rounded)
    return value if math.isnan(estimate.low) else f"{value} [{', '.join(interval)}]"
