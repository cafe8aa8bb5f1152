"""`trl-dmpo recommend`: the best items for a user, or for a file of users."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_dmpo.cli.errors import one_line_errors, unwound_by_sigterm
from trl_dmpo.cli.model_options import ModelOptions
from trl_dmpo.cli.progress import progress_bar
from trl_dmpo.cli.users import check_output, read_users, write_recommendations


if TYPE_CHECKING:
    from rich.console import Console

    from trl_dmpo.cli.users import Users
    from trl_dmpo.ranking.recommender import Recommendations, Recommender

# Of a file of users, so many are shown, with so many items
_USERS_SHOWN, _ITEMS_SHOWN = 5, 3
# In search of the counterfactual, at most
_SETS_TRIED = 100


@dataclass
class RecommendArguments(ModelOptions):
    """
    What `trl-dmpo recommend` recommends, to whom, and how.

    Parameters:
        recommender (`str`, *optional*):
            A folder of `Recommender.save_pretrained`, or of `save_recommender`.
        model_name_or_path (`str`, *optional*):
            Instead: a model or PEFT adapter, a folder or a name on the Hub, with `dataset_name`.
        dataset_name (`str`, *optional*):
            A folder made by `trl-dmpo prepare`, which gives the catalogue and the form of prompt.
        save_recommender (`str`, *optional*):
            Where to save model, tokenizer, catalogue and form of prompt as one folder.
        history (`list[str]`, *optional*):
            Items of one user, oldest first: titles, or ids of the catalogue.
        users (`str`, *optional*):
            A file of users: JSON lines, CSV or parquet, with a column `history` and perhaps `user_id`.
        output (`str`, *optional*):
            For `users`: the `.jsonl`, `.csv` or `.parquet` file to write.
        overwrite_output (`bool`, *optional*, defaults to `False`):
            Whether to replace `output`.
        k (`int`, *optional*, defaults to `10`):
            How many items.
        exclude (`list[str]`, *optional*, defaults to `["history"]`):
            What not to recommend: `history`, `none`, or titles or ids.
        method (`str`, *optional*, defaults to `"exact"`):
            `"exact"`, or `"beam"`, a search that scores fewer items.
        num_beams (`int`, *optional*):
            How wide that search is.
        explain (`bool`, *optional*, defaults to `False`):
            For `history`: whether to say why the first item is recommended.

    How models are loaded is said by [`ModelOptions`].
    """

    recommender: str | None = field(
        default=None, metadata={"help": "A folder of `Recommender.save_pretrained`, or of `--save_recommender`."}
    )
    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Instead: a model or PEFT adapter, a folder or a name on the Hub, with `--dataset_name`."},
    )
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "A folder made by `trl-dmpo prepare`, which gives the catalogue and the form of prompt."},
    )
    save_recommender: str | None = field(
        default=None,
        metadata={"help": "Where to save model, tokenizer, catalogue and form of prompt as one folder."},
    )
    history: list[str] | None = field(
        default=None, metadata={"help": "Items of one user, oldest first: titles, or ids of the catalogue."}
    )
    users: str | None = field(
        default=None,
        metadata={
            "help": "A file of users: JSON lines, CSV or parquet, with a column `history` (lists of titles or ids; in CSV as "
            "JSON) and perhaps `user_id`."
        },
    )
    output: str | None = field(
        default=None, metadata={"help": "For `--users`: the .jsonl, .csv or .parquet file to write."}
    )
    overwrite_output: bool = field(default=False, metadata={"help": "Whether to replace `--output`."})
    k: int = field(default=10, metadata={"help": "How many items. Fewer are given where fewer are left."})
    exclude: list[str] = field(
        default_factory=lambda: ["history"],
        metadata={"help": "What not to recommend: 'history' (of the user), 'none', or titles or ids."},
    )
    method: str = field(
        default="exact",
        metadata={
            "help": "To score all items, or to search for good ones and score those.",
            "choices": ["exact", "beam"],
        },
    )
    num_beams: int | None = field(
        default=None, metadata={"help": "For `--method beam`: how wide the search is. Defaults to 2 k, at least 20."}
    )
    explain: bool = field(
        default=False, metadata={"help": "For `--history`: whether to say why the first item is recommended."}
    )

    def __post_init__(self):
        for name in ("history", "exclude"):  # one of a list, or numbers, in a configuration file
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, [str(each) for each in (value if isinstance(value, list) else [value])])

    def check(self) -> None:
        """Raise `ValueError` if what is given does not go together."""
        if bool(self.recommender) == bool(self.model_name_or_path):
            raise ValueError("Give either `--recommender`, or `--model_name_or_path` and `--dataset_name`.")
        for name in ("dataset_name", "save_recommender", "model_revision"):
            if self.recommender and getattr(self, name):
                raise ValueError(
                    f"`{name}` goes with `--model_name_or_path`. Leave it out, or leave out `--recommender`."
                )
        if self.model_name_or_path and not self.dataset_name:
            raise ValueError("Give the folder of `trl-dmpo prepare` that has the catalogue: `--dataset_name`.")
        self._check_work()

    def _check_work(self) -> None:
        if self.history and self.users:
            raise ValueError("Give either `--history` or `--users`.")
        if not (self.history or self.users or self.save_recommender):
            raise ValueError("Give whom to recommend to: `--history`, or `--users` and `--output`.")
        if bool(self.users) != bool(self.output):
            raise ValueError("`--users` and `--output` go together: histories to read, and a file to write.")
        if self.overwrite_output and not self.output:
            raise ValueError("`overwrite_output` is for `--output`. Leave it out.")
        if self.k < 1:
            raise ValueError(f"`k` is {self.k}, but it is at least 1.")
        if self.num_beams is not None and self.method != "beam":
            raise ValueError("`num_beams` is for `--method beam`. Set it, or leave this out.")
        if not (self.history or self.users):
            self._check_nothing_but_saving()
        if self.explain and not self.history:
            raise ValueError("`explain` is for one user: give `--history`.")
        if self.explain and (self.exclude != ["history"] or self.method != "exact"):
            raise ValueError(
                "`explain` is for exact recommendations beside the history: leave out `exclude` and `method`."
            )

    def _check_nothing_but_saving(self) -> None:
        defaults = RecommendArguments()
        for name in ("k", "exclude", "method", "num_beams"):
            if getattr(self, name) != getattr(defaults, name):
                raise ValueError(f"`{name}` is for recommending: give `--history` or `--users`, or leave it out.")


def run(argv: list[str]) -> int:
    """Run the sub-command; returns the exit code."""
    with one_line_errors(), unwound_by_sigterm():
        recommend(parse(argv))
    return 0


def parse(argv: list[str]) -> RecommendArguments:
    """The options, from the command line and a configuration file."""
    from trl import TrlParser

    from .options import separate_config, unknown_option

    usage = "%(prog)s --recommender FOLDER --history TITLE [TITLE ...] [--config FILE.yaml] [options]"
    parser = TrlParser((RecommendArguments,), prog="trl-dmpo recommend", usage=usage, allow_abbrev=False)
    arguments, unknown = parser.parse_args_and_config(separate_config(argv), return_remaining_strings=True)
    if unknown:
        raise unknown_option(parser, unknown[0])
    # Not before, or a misspelt option would be called a missing one
    arguments.check()
    return arguments


def recommend(arguments: RecommendArguments) -> None:
    """Load or make the recommender, and recommend."""

    from trl_dmpo.cli.screen import Screen

    console = Screen()
    # What is wrong with a file is better said before a model is loaded
    users = None
    if arguments.users:
        users = read_users(Path(arguments.users).expanduser())
        check_output(_output(arguments), arguments.overwrite_output)
    recommender = _make_recommender(arguments, console)
    if users is not None:
        _recommend_to_users(recommender, users, arguments, console)
    elif arguments.history:
        _recommend_to_one(recommender, arguments, console)


def _output(arguments: RecommendArguments) -> Path:
    return Path(arguments.output).expanduser()  # type: ignore[arg-type]


def _make_recommender(arguments: RecommendArguments, console: "Console") -> "Recommender":
    from rich.text import Text

    from trl_dmpo.data.folders import check_folder
    from trl_dmpo.ranking.models import load_model
    from trl_dmpo.ranking.recommender import Recommender
    from trl_dmpo.ranking.recommender_files import RECOMMENDER, read_prepared

    if arguments.recommender:
        with console.status(Text(f"Loading {arguments.recommender}")):
            return Recommender.from_pretrained(arguments.recommender, **arguments.loading())
    folder = Path(arguments.save_recommender).expanduser() if arguments.save_recommender else None
    if folder is not None:
        check_folder(folder, RECOMMENDER._replace(option="save_recommender"), overwrite=True)
    name: str = arguments.model_name_or_path  # type: ignore[assignment]
    with console.status(Text(f"Loading {name}")):
        options = read_prepared(Path(arguments.dataset_name).expanduser())  # type: ignore[arg-type]
        recommender = Recommender(
            *load_model(name, revision=arguments.model_revision, **arguments.loading()), **options
        )
        if folder is not None:
            recommender.save_pretrained(folder)
    if folder is not None:
        console.print(f"Saved the recommender to {folder}", highlight=False, soft_wrap=True)
    return recommender


def _recommend_to_one(recommender: "Recommender", arguments: RecommendArguments, console: "Console") -> None:
    history = _as_items(arguments.history, recommender)  # type: ignore[arg-type]
    with console.status("Recommending"):
        found = recommender.recommend([history], **_options(recommender, arguments))[0]
    _show_items(found, recommender, console)
    if len(found.ids) < arguments.k:
        console.print(f"Only {len(found.ids)} items are left to recommend.")
    if arguments.explain:
        _explain(recommender, history, console)


def _explain(recommender: "Recommender", history: list, console: "Console") -> None:
    from trl_dmpo.ranking.explain import explain

    with progress_bar("Explaining, sets of items tried", _SETS_TRIED, console) as advance:
        try:
            explanation = explain(
                recommender,
                history,
                budget=_SETS_TRIED,
                sentence=recommender.scorer.tokenizer.chat_template is not None,
                progress=advance,
            )
        except ImportError as error:
            raise ValueError(f"`explain`: {error}") from error
    console.print(explanation)


def _recommend_to_users(
    recommender: "Recommender", users: "Users", arguments: RecommendArguments, console: "Console"
) -> None:
    with progress_bar("Recommending", len(users.histories), console) as advance:
        found = recommender.recommend(users.histories, **_options(recommender, arguments), progress=advance)
    write_recommendations(_output(arguments), users, found, arguments.overwrite_output)
    _show_users(users, found, console)
    few = sum(len(each.ids) < arguments.k for each in found)
    if few:
        console.print(f"{few:,} users got fewer than {arguments.k} items: no more were left.")
    console.print(f"Saved to {arguments.output}: {len(found):,} users", highlight=False, soft_wrap=True)


def _options(recommender: "Recommender", arguments: RecommendArguments) -> dict[str, Any]:
    exclude: Any = _as_items(arguments.exclude, recommender)
    if arguments.exclude in (["history"], ["none"]):
        exclude = "history" if arguments.exclude == ["history"] else None
    return {
        "k": arguments.k,
        "exclude": exclude,
        "method": arguments.method,
        "num_beams": arguments.num_beams,
    }


def _as_items(texts: Sequence[str], recommender: "Recommender") -> list:
    """On the command line a number is text; it is an id where ids are numbers, unless it is a title."""
    catalogue = recommender.catalogue
    titles = set(catalogue["title"]) if catalogue["item_id"].dtype.is_integer() else set(texts)
    return [int(text) if text not in titles and text.lstrip("-").isdecimal() else text for text in texts]


def _show_items(found: "Recommendations", recommender: "Recommender", console: "Console") -> None:
    from rich.table import Table

    table = Table(caption=f"Score: log-probability of the answer, {recommender.normalize} over its tokens, in nats")
    table.add_column("", justify="right")
    table.add_column("title", overflow="fold")
    table.add_column("id", overflow="fold")
    table.add_column("score", justify="right")
    for place, (item, title, score) in enumerate(zip(*found, strict=True), 1):
        table.add_row(str(place), title, str(item), f"{score:.3f}")
    console.print(table)


def _show_users(users: "Users", found: Sequence["Recommendations"], console: "Console") -> None:
    from rich.table import Table

    table = Table(title=f"The first {min(_USERS_SHOWN, len(found))} users")
    for column in ("user", "latest in the history", "recommended first"):
        table.add_column(column, overflow="fold")
    names = users.ids or range(len(found))
    for name, history, each in list(zip(names, users.histories, found, strict=True))[:_USERS_SHOWN]:
        latest = "\n".join(map(str, history[-_ITEMS_SHOWN:]))
        table.add_row(str(name), latest, "\n".join(each.titles[:_ITEMS_SHOWN]))
    console.print(table)
