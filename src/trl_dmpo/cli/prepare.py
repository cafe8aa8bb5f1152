"""`trl-dmpo prepare`: from an interaction log to a dataset of rows with K rejected answers."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_dmpo.cli.errors import one_line_errors, unwound_by_sigterm
from trl_dmpo.data.build_config import BuildConfig


if TYPE_CHECKING:
    from rich.console import Console

    from trl_dmpo.data import InteractionLog
    from trl_dmpo.data.plan import Plan
    from trl_dmpo.data.save import Saved


@dataclass
class PrepareArguments:
    """
    Where `trl-dmpo prepare` reads from and writes to.

    Parameters:
        source (`str`, *optional*):
            Folder or file with the interactions.
        output_dir (`str`, *optional*):
            Where to write the dataset.
        format (`str`, *optional*):
            What to take the source for, where that is not clear.
        items (`str`, *optional*):
            File with the items' titles, if they are not where the interactions are.
        columns (`list[str]`, *optional*):
            For a table of your own: what it calls `user_id`, `item_id`, `timestamp`, `rating`, `title` or `impressions`.
        domain (`str`, *optional*):
            What kind of thing an item is, for the prompt's words.
        train_domain, test_domain (`str`, *optional*):
            Instead of `source`: what to train and validate on, and what to test on.
        tokenizer (`str`, *optional*):
            Name or folder of the tokenizer that counts tokens for `max_prompt_tokens`.
        overwrite_output_dir (`bool`, *optional*, defaults to `False`):
            Whether to replace a prepared dataset in `output_dir`.
        push_to_hub (`bool`, *optional*, defaults to `False`):
            Whether to push the dataset to the Hub.
        hub_dataset_id (`str`, *optional*):
            Name of the dataset on the Hub. Defaults to the name of `output_dir`.
        hub_private_repo (`bool`, *optional*):
            Whether the dataset is to be private. Defaults to what your organisation has set.
    """

    source: str | None = field(default=None, metadata={"help": "Folder or file with the interactions."})
    output_dir: str | None = field(default=None, metadata={"help": "Where to write the dataset."})
    format: str | None = field(
        default=None,
        metadata={"help": "What to take the source for, where that is not clear: 'movielens', 'tabular', ..."},
    )
    items: str | None = field(
        default=None, metadata={"help": "File with the items' titles, if they are not where the interactions are."}
    )
    columns: list[str] | None = field(
        default=None,
        metadata={"help": "What a table of your own calls its columns: user_id=reviewer item_id=asin title=name."},
    )
    domain: str | None = field(
        default=None,
        metadata={"help": "What kind of thing an item is: 'film', 'book', 'game', 'artist', 'product', 'item'."},
    )
    train_domain: str | None = field(
        default=None, metadata={"help": "Instead of `source`, with `test_domain`: what to train and validate on."}
    )
    test_domain: str | None = field(default=None, metadata={"help": "With `train_domain`: what to test on."})
    tokenizer: str | None = field(
        default=None, metadata={"help": "Name or folder of the tokenizer that counts tokens for `max_prompt_tokens`."}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Whether to replace a prepared dataset in `output_dir`."}
    )
    push_to_hub: bool = field(default=False, metadata={"help": "Whether to push the dataset to the Hub."})
    hub_dataset_id: str | None = field(
        default=None, metadata={"help": "Name of the dataset on the Hub. Defaults to the name of `output_dir`."}
    )
    hub_private_repo: bool | None = field(
        default=None,
        metadata={"help": "Whether the dataset is to be private. Defaults to your organisation's choice."},
    )

    def __post_init__(self):
        if self.output_dir is None:
            raise ValueError("Say where to write the dataset: `--output_dir`.")
        if (self.source is None) == (self.train_domain is None and self.test_domain is None):
            raise ValueError("Give either `--source`, or `--train_domain` and `--test_domain`.")
        if (self.train_domain is None) != (self.test_domain is None):
            raise ValueError("`--train_domain` and `--test_domain` go together.")
        if self.hub_dataset_id is not None and not self.push_to_hub:
            raise ValueError("`--hub_dataset_id` is for `--push_to_hub`. Set it, or leave this out.")

    def column_mapping(self) -> dict[str, str] | None:
        """`columns` as a mapping, which a configuration file may give as it is."""
        if self.columns is None or isinstance(self.columns, dict):
            return self.columns
        for column in self.columns:
            if not re.fullmatch("[^=]+=.+", column):
                raise ValueError(f"`--columns`: {column!r} is not of the form user_id=reviewer.")
        return dict(column.split("=", 1) for column in self.columns)


def run(argv: list[str]) -> int:
    """Run the sub-command; returns the exit code."""
    with one_line_errors(), unwound_by_sigterm():
        prepare(*parse(argv))
    return 0


def parse(argv: list[str]) -> tuple[PrepareArguments, BuildConfig]:
    """The options, from the command line and a configuration file."""
    from trl import TrlParser

    from .options import separate_config, unknown_option

    usage = "%(prog)s --source SOURCE --output_dir DIR [--config FILE.yaml] [options]"
    parser = TrlParser((PrepareArguments, BuildConfig), prog="trl-dmpo prepare", usage=usage, allow_abbrev=False)
    arguments, config, unknown = parser.parse_args_and_config(separate_config(argv), return_remaining_strings=True)
    if unknown:
        raise unknown_option(parser, unknown[0])
    return arguments, config


def prepare(arguments: PrepareArguments, config: BuildConfig) -> None:
    """Read, choose rows, write the dataset, and show what it has become."""

    from trl_dmpo.cli.screen import Screen
    from trl_dmpo.data.save import check_folder

    console = Screen()
    folder = Path(arguments.output_dir).expanduser()  # type: ignore[arg-type]
    check_folder(folder, arguments.overwrite_output_dir)
    tokenizer = _load_tokenizer(arguments, config)
    with console.status("Reading") as status:
        logs = _read_logs(arguments, console)
        status.update("Choosing rows and negatives")
        plans = _make_plans(logs, config)
    saved = _save(plans, folder, arguments, config, tokenizer, console)
    _show(plans, saved, console)
    console.print(f"Saved to {folder}. Content hash {saved.content_hash}", soft_wrap=True)
    if arguments.push_to_hub:
        _push(folder, arguments, console)


def _load_tokenizer(arguments: PrepareArguments, config: BuildConfig) -> Any:
    if (arguments.tokenizer is None) != (config.max_prompt_tokens is None):
        raise ValueError("`--tokenizer` and `--max_prompt_tokens` go together.")
    if arguments.tokenizer is None:
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(arguments.tokenizer)


def _read_logs(arguments: PrepareArguments, console: "Console") -> list["InteractionLog"]:
    """One log, or that to train on and that to test on, with ids of the same kind."""
    from trl_dmpo.data import load_interactions

    sources = [arguments.source] if arguments.source else [arguments.train_domain, arguments.test_domain]
    logs = [
        load_interactions(
            source,
            arguments.format,
            items=arguments.items,
            columns=arguments.column_mapping(),
            domain=arguments.domain,
        )
        for source in sources
    ]
    for log in logs:
        console.print(str(log), highlight=False, soft_wrap=True)
        if not log.has_time:
            console.print("It has no time stamps: the order of its rows is taken for the order of events.")
    return logs


def _make_plans(logs: list["InteractionLog"], config: BuildConfig) -> list["Plan"]:
    """The rows; of two logs those for training and validation from the first, and those for the test from the second."""
    from trl_dmpo.data.log import with_text_ids
    from trl_dmpo.data.plan import make_plan

    if len(logs) == 1:
        return [make_plan(logs[0], config)]
    train_log, test_log = map(with_text_ids, logs)
    train, test = make_plan(train_log, config, ("train", "validation")), make_plan(test_log, config, ("test",))
    for name, plan, number in (("train_domain", train, 0), ("test_domain", test, 2)):
        if not (plan.split == number).any():
            raise ValueError(
                f"`{name}`: {plan.log.source} has no rows to {name.removesuffix('_domain')} on. Lower `min_history`, or "
                "choose another `split`."
            )
    return [train, test]


def _save(
    plans: list["Plan"],
    folder: Path,
    arguments: PrepareArguments,
    config: BuildConfig,
    tokenizer: Any,
    console: "Console",
) -> "Saved":
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from trl_dmpo.data.save import save_dataset

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("Writing rows", total=sum(len(plan.event) for plan in plans))
        return save_dataset(
            plans,
            folder,
            options=_as_options(arguments, config),
            tokenizer=tokenizer,
            progress=lambda rows: progress.advance(task, rows),
            overwrite=arguments.overwrite_output_dir,
        )


def _as_options(arguments: PrepareArguments, config: BuildConfig) -> dict[str, Any]:
    """What another run needs to make the same dataset."""
    where = ("output_dir", "overwrite_output_dir", "push_to_hub", "hub_dataset_id", "hub_private_repo")
    options = asdict(arguments) | asdict(config)
    return {name: value for name, value in options.items() if name not in where and value is not None}


def _show(plans: list["Plan"], saved: "Saved", console: "Console") -> None:
    """A table of the splits, what was left out, and three rows as a person would read them."""
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    from trl_dmpo.data.card import count_rows

    counts = count_rows(plans)
    table = Table(title="Rows")
    for column in counts[0]:
        table.add_column(column, justify="left" if column == "split" else "right")
    for row in counts:
        table.add_row(*(f"{value:,}" if isinstance(value, int) else value for value in row.values()))
    console.print(table)
    for reason, count in saved.notes.items():
        console.print(f"{count:>9,} {reason}", highlight=False, soft_wrap=True)
    for number, example in enumerate(saved.examples, 1):
        console.print(Panel(Text(_as_read(example)), title=Text(f"Row {number}, of user {example['user_id']}")))


def _as_read(example: Mapping[str, Any]) -> str:
    """A row, with three of its rejected answers."""
    prompt, chosen, *rejected = (_plain(text) for text in (example["prompt"], example["chosen"], *example["rejected"]))
    lines = [prompt, f"  chosen:   {chosen.strip()}"]
    lines += [f"  rejected: {answer.strip()}" for answer in rejected[:3]]
    if len(rejected) > 3:
        lines.append(f"            and {len(rejected) - 3} more")
    return "\n".join(lines)


def _plain(text: str | list[dict[str, str]]) -> str:
    if isinstance(text, str):
        return text
    return "\n".join(f"[{message['role']}] {message['content']}" for message in text)


def _push(folder: Path, arguments: PrepareArguments, console: "Console") -> None:
    from huggingface_hub import HfApi

    api = HfApi()
    name = arguments.hub_dataset_id or folder.name
    repo = api.create_repo(name, repo_type="dataset", private=arguments.hub_private_repo, exist_ok=True)
    api.upload_folder(repo_id=repo.repo_id, repo_type="dataset", folder_path=folder)
    console.print(f"Pushed to {repo}")
