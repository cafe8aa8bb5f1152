"""The rows that rankers are evaluated on: prompts, candidates, and which of them was chosen."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import polars as pl

from ..data.formats import load_rows
from ..data.formats.files import read_records
from ..data.formats.records import Unusable
from ..data.save import OPTIONS_FILE
from ..data.schema import Problem
from .row_checks import convert_row


if TYPE_CHECKING:
    from datasets import Dataset

_USED = ("prompt", "candidates", "label", "chosen", "rejected")


class FullCatalogue(NamedTuple):
    """
    A catalogue that is ranked as a whole.

    Args:
        answers (`list`):
            The completions of all its items, all different.
        kept (`list[np.ndarray]`):
            Of each row the places in `answers` of its candidates, int64.
    """

    answers: list
    kept: list[np.ndarray]


@dataclass(frozen=True, eq=False)
class RankingRows:
    """
    Rows to evaluate rankers on.

    Args:
        name (`str`):
            What they are, for people: `"lastfm_val.json"`, `"rows (ranking, test)"`.
        prompts (`list`):
            N prompts, `str` or lists of messages.
        candidates (`list[list]`):
            Of each row its candidates, at least two, `str` or lists of messages, all different.
        labels (`np.ndarray`):
            The place of the chosen one among the candidates, int64 of shape (N,).
        columns (`dict[str, list]`):
            The other columns of the rows, N values each. `user_id`, `history_ids` and `candidate_ids` have a meaning.
        items (`pl.DataFrame`, *optional*):
            The catalogue: `item_id`, `title`, `popularity` (how often the item was liked in training) and features.
        places (`np.ndarray`, *optional*):
            The place of each row in what it was read from, int64 of shape (N,). By default 0 to N - 1. What
            [`~trl_dmpo.data.formats.load_rows`] drops does not count.
        description (`str`, *optional*):
            One line on what was read, sampled and dropped.
        catalogue ([`FullCatalogue`], *optional*):
            What the candidates are from, if they are all of a catalogue: it is then scored as one list.

    Example:

    ```python
    >>> from trl_dmpo.ranking.rows import load_ranking_rows

    >>> rows = load_ranking_rows([{"prompt": "Seen: Alien. Next:", "chosen": " Aliens", "rejected": [" Heat", " Big"]}])
    >>> rows.candidates, rows.labels
    ([[' Aliens', ' Heat', ' Big']], array([0]))
    ```
    """

    name: str
    prompts: list
    candidates: list[list]
    labels: np.ndarray
    columns: dict[str, list] = field(default_factory=dict)
    items: pl.DataFrame | None = None
    places: np.ndarray = None  # type: ignore[assignment]
    description: str = ""
    catalogue: FullCatalogue | None = None

    def __post_init__(self) -> None:
        if self.places is None:
            object.__setattr__(self, "places", np.arange(len(self.prompts)))

    def __len__(self) -> int:
        return len(self.prompts)

    def name_of(self, row: int) -> str:
        """What errors call a row: by its place in what it was read from."""
        return f"{self.name}[{self.places[row]}]"

    @cached_property
    def users(self) -> np.ndarray:
        """The number of each row's user, int64 of shape (N,). A row without `user_id` is a user of its own."""
        ids = self.columns.get("user_id", [None] * len(self))
        numbers: dict[Any, int] = {}
        keys = [(row, None) if user is None else user for row, user in enumerate(ids)]
        return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)

    @cached_property
    def popularity(self) -> dict[Any, float]:
        """From an item's id to its popularity; empty if it is not known."""
        if self.items is None or "popularity" not in self.items.columns:
            return {}
        return dict(self.items.select("item_id", "popularity").iter_rows())

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 of prompts, candidates and labels: two evaluations can be compared if theirs are the same."""
        content = hashlib.sha256()
        for row in zip(self.prompts, self.candidates, self.labels.tolist(), strict=True):
            content.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
        return content.hexdigest()


def as_text(written: Any) -> str:
    """A prompt or a candidate as one string, for files and for people: what a list of messages says, a line each."""
    return written if isinstance(written, str) else "\n".join(str(message.get("content") or "") for message in written)


def load_ranking_rows(
    source: "str | Path | list[dict] | Dataset",
    config: str | None = None,
    split: str | None = None,
    max_rows: int | None = None,
    seed: int = 0,
    on_invalid_row: str = "raise",
    format: str | None = None,
    chat: bool = False,
    domain: str | None = None,
) -> RankingRows:
    """
    Rows to evaluate rankers on, from a prepared dataset or from a file as it was published.

    Args:
        source (`str`, `Path`, `list[dict]` or [`~datasets.Dataset`]):
            A folder made by `trl-dmpo prepare`, or its name on the Hub; a file that [`~trl_dmpo.data.formats.load_rows`]
            reads; or rows. They have `candidates` and `label`, or `chosen` and `rejected` (and `candidates`, for their order).
        config (`str`, *optional*):
            Configuration of a prepared dataset: `"ranking"`, which is the default, or `"preference"`.
        split (`str`, *optional*):
            Split of a prepared dataset. Defaults to `"test"`.
        max_rows (`int`, *optional*):
            Take a random sample of so many rows, in the order of the source.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the sample.
        on_invalid_row (`str`, *optional*, defaults to `"raise"`):
            What to do with a row that cannot be evaluated: `"raise"` an error, or `"drop"` it and count it in `description`.
        format, chat, domain (*optional*):
            As of [`~trl_dmpo.data.formats.load_rows`], for what it reads.

    Returns:
        [`RankingRows`]

    Raises:
        `FileNotFoundError`: there is no such file, folder or dataset.
        `ValueError`: an option is out of its range or not for this source; or, if `on_invalid_row="raise"`, a row has no
            prompt, no candidates, one that is blank or repeated, or not the chosen one. The message names the row.
    """
    if on_invalid_row not in ("raise", "drop"):
        raise ValueError(f"`on_invalid_row` is {on_invalid_row!r}, but it is 'raise' or 'drop'.")
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"`max_rows` is {max_rows}, but it is at least 1.")
    if _is_prepared(source):
        if format or chat or domain:
            raise ValueError(
                "`format`, `chat` and `domain` are for files; a prepared dataset has its prompts already. Leave them out, or "
                "prepare it again, for instance with `--prompt 'next_item(chat=True)'`."
            )
        read = _read_prepared(str(source), config or "ranking", split or "test", on_invalid_row)
    elif config or split:
        raise ValueError(
            f"`config` and `split` are for a prepared dataset, and {_name(source)} is none. Leave them out."
        )
    else:
        read = _read_rows(source, format=format, chat=chat, domain=domain, on_invalid_row=on_invalid_row)
    places = np.arange(len(read.rows))
    if max_rows is not None and max_rows < len(places):
        places = np.sort(np.random.default_rng(seed).choice(len(places), max_rows, replace=False))
        told = f"{read.told} A random sample of {_count(max_rows, 'row')} (seed {seed}), in their order."
        read = read._replace(told=told)
    return _make_rows(read, places, on_invalid_row)


class _Read(NamedTuple):
    """What was read: the rows as records, what to call them, and a sentence on them."""

    name: str
    rows: Any
    told: str
    items: pl.DataFrame | None = None


def _name(source: Any) -> str:
    return Path(source).name if isinstance(source, (str, Path)) else type(source).__name__.lower()


def _is_prepared(source: Any) -> bool:
    """Whether `source` is a folder, or else looks like a name on the Hub."""
    if not isinstance(source, (str, Path)):
        return False
    path = Path(source).expanduser()
    is_file_name = path.suffix.lower() in (".json", ".jsonl", ".csv", ".tsv", ".parquet")
    on_hub = isinstance(source, str) and source.count("/") == 1 and not is_file_name and not path.is_absolute()
    return path.is_dir() or (on_hub and not path.exists())


def _read_prepared(source: str, config: str, split: str, on_invalid_row: str) -> _Read:
    from datasets import get_dataset_config_names, load_dataset

    path = Path(source).expanduser()
    if path.is_dir() and not (path / OPTIONS_FILE).is_file():
        raise ValueError(
            f"{path} is a folder, but not one made by `trl-dmpo prepare`: it has no {OPTIONS_FILE}. Give that, or a file."
        )
    where = str(path) if path.is_dir() else source
    configs = get_dataset_config_names(where)
    if config not in configs:
        raise ValueError(f"`config`: {source} has no {config!r}, only: {', '.join(configs)}.")
    splits = load_dataset(where, config)
    if split not in splits:
        raise ValueError(f"`split`: {source} has no {split!r} in {config!r}, only: {', '.join(splits)}.")
    rows, name = splits[split], f"{path.name} ({config}, {split})"
    told = f"{name}: {_count(len(rows), 'row')}."
    if not {"candidates", "label"} <= set(rows.column_names):
        rows = load_rows(rows, on_invalid_row=on_invalid_row)
        told = f"{name}, {rows.info.description}"
    return _Read(name, rows, told, _catalogue(load_dataset(where, "items"), split) if "items" in configs else None)


def _catalogue(items: Mapping[str, Any], split: str) -> pl.DataFrame:
    """The items to be predicted in `split`: of a dataset of two domains, those of the domain that it asks about."""
    return pl.DataFrame(items[split if split in items else next(iter(items))].data.table)


def _read_rows(source: Any, **options: Any) -> _Read:
    """Rows that have candidates and a label already, or those that [`load_rows`] makes."""
    if isinstance(source, (str, Path)):
        records = read_records(Path(source).expanduser())
    else:
        records = list(source.with_format(None) if hasattr(source, "with_format") else source)
    first = records[0] if records else None
    if isinstance(first, Mapping) and "candidates" in first and "label" in first:
        given = [name for name in ("format", "chat", "domain") if options[name]]
        if given:
            raise ValueError(f"`{given[0]}` is not for rows that have `candidates` and `label` already. Leave it out.")
        return _Read(_name(source), records, f"{_name(source)}: {_count(len(records), 'row')}.")
    dataset = load_rows(source, **options)
    return _Read(_name(source), dataset, dataset.info.description)


def _make_rows(read: _Read, places: np.ndarray, on_invalid_row: str) -> RankingRows:
    selected = read.rows.select(places) if hasattr(read.rows, "select") else [read.rows[place] for place in places]
    kept: dict[int, dict[str, Any]] = {}
    problems: dict[int, Problem] = {}
    for place, row in zip(places.tolist(), selected, strict=True):
        try:
            kept[place] = convert_row(row)
        except Unusable as error:
            problems[place] = error.problem
    if problems and (on_invalid_row == "raise" or not kept):
        first = min(problems)
        raise ValueError(
            f"{read.name}[{first}], column {problems[first].column!r}: {problems[first].detail}. In all, {len(problems)} of "
            f"{_count(len(places), 'row')} cannot be evaluated: {_reasons(problems)}. "
            + ("To leave them out, set `on_invalid_row='drop'`." if kept else "No row is left.")
        )
    dropped = f" Dropped: {_reasons(problems)}." if problems else ""
    return _as_rows(read, kept, read.told + dropped)


def _as_rows(read: _Read, kept: dict[int, dict[str, Any]], description: str) -> RankingRows:
    rows = list(kept.values())
    names = dict.fromkeys(name for row in rows for name in row if name not in _USED)
    return RankingRows(
        name=read.name,
        prompts=[row["prompt"] for row in rows],
        candidates=[row["candidates"] for row in rows],
        labels=np.array([row["label"] for row in rows], dtype=np.int64),
        columns={name: [row.get(name) for row in rows] for name in names},
        items=read.items,
        places=np.array(list(kept), dtype=np.int64),
        description=description,
    )


def _count(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"


def _reasons(problems: Mapping[int, Problem]) -> str:
    counts = Counter(problem.reason for problem in problems.values())
    return ", ".join(f"{count:,} {reason}" for reason, count in counts.most_common())
