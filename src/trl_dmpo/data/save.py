"""A prepared dataset as a folder: parquet files, the catalogue, the options and a card. Whole, or not there."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from . import folders
from .build import write_texts
from .card import write_card
from .plan import Plan
from .splits import SPLIT_NAMES


OPTIONS_FILE = "prepare.yaml"
PREPARED = folders.FolderKind("a prepared dataset", OPTIONS_FILE)


class Saved(NamedTuple):
    """
    What was saved.

    Args:
        content_hash (`str`):
            SHA-256 of all rows: the same for the same data, options and version of this package.
        rows (`dict[str, dict[str, int]]`):
            Number of rows by configuration and split.
        notes (`dict[str, int]`):
            What was left out, changed or found short, with the number of rows.
        examples (`list[dict]`):
            The first rows of `preference`.
    """

    content_hash: str
    rows: dict[str, dict[str, int]]
    notes: dict[str, int]
    examples: list[dict]


def save_dataset(
    plans: Sequence[Plan],
    folder: Path,
    options: Mapping[str, Any],
    tokenizer: Any = None,
    progress: Callable[[int], None] = lambda rows: None,
    overwrite: bool = False,
) -> Saved:
    """
    Write the configurations `preference`, `sft`, `ranking` and `items` of a dataset, with its card.

    All is written beside `folder` and renamed at the end.

    Args:
        plans (`Sequence[Plan]`):
            The rows: one plan, or several with different splits.
        folder (`Path`):
            Where to write. It must not be there, or be empty, or with `overwrite` be a prepared dataset.
        options (`Mapping[str, Any]`):
            What the dataset was prepared with, for the card and for `prepare.yaml`.
        tokenizer (*optional*):
            Counts tokens for `max_prompt_tokens`.
        progress (`Callable[[int], None]`, *optional*):
            Called with the number of rows that have been written since the last call.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether to replace a prepared dataset that is there.

    Returns:
        [`Saved`]

    Raises:
        `FileExistsError`: there is something else in `folder`.
        `ValueError`: a row cannot be written, which the message names.
    """
    with folders.written_aside(folder, PREPARED, overwrite) as aside:
        saved = _write_configurations(plans, aside, tokenizer, progress)
        (aside / OPTIONS_FILE).write_text(yaml.safe_dump(dict(options), sort_keys=False, allow_unicode=True))
        write_card(aside, plans, options, saved)
    return saved


def check_folder(folder: Path, overwrite: bool) -> None:
    """Raise `FileExistsError` if writing to `folder` would destroy what is there."""
    folders.check_folder(folder, PREPARED, overwrite)


class _HashingFile:
    """A file of which only the hash is kept."""

    closed = False

    def __init__(self) -> None:
        self.hash = hashlib.sha256()

    def write(self, data: Any) -> int:
        self.hash.update(data)
        return len(data)

    def flush(self) -> None:
        pass


class _Split:
    """A split of a configuration while it is being written: a parquet file and a hash of its rows."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        path.parent.mkdir(exist_ok=True)
        self.rows = 0
        self.content = _HashingFile()
        self._stream = pa.ipc.new_stream(self.content, schema)
        self._file = pq.ParquetWriter(path, schema, compression="zstd")

    def write(self, table: pa.Table) -> None:
        self.rows += len(table)
        self._stream.write_table(table.combine_chunks())
        self._file.write_table(table)

    def close(self) -> None:
        self._stream.close()
        self._file.close()


class _Files:
    """
    The files of all configurations and splits.

    They are written in a thread of their own, since compression leaves Python alone while the next rows are composed. It is
    one thread, and it is never more than one step behind.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.splits: dict[tuple[str, str], _Split] = {}
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._last: Future = self._thread.submit(lambda: None)

    def __enter__(self) -> "_Files":
        return self

    def __exit__(self, *error: Any) -> None:
        self._thread.shutdown()
        for split in self.splits.values():
            split.close()
        if error[0] is None:
            self._last.result()

    def write(self, split: str, tables: Mapping[str, pa.Table]) -> None:
        self._last.result()  # raises what went wrong, such as a full disk
        self._last = self._thread.submit(self._write, split, tables)

    def _write(self, split: str, tables: Mapping[str, pa.Table]) -> None:
        for configuration, table in tables.items():
            key = configuration, split
            if key not in self.splits:
                path = self.folder / configuration / f"{split}-00000-of-00001.parquet"
                self.splits[key] = _Split(path, table.schema)
            self.splits[key].write(table)

    @property
    def content_hash(self) -> str:
        lines = [f"{'/'.join(key)} {split.content.hash.hexdigest()}\n" for key, split in sorted(self.splits.items())]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    @property
    def rows(self) -> dict[str, dict[str, int]]:
        rows: dict[str, dict[str, int]] = {}
        for (configuration, name), split in self.splits.items():
            rows.setdefault(configuration, {})[name] = split.rows
        return rows


def _write_configurations(
    plans: Sequence[Plan], folder: Path, tokenizer: Any, progress: Callable[[int], None]
) -> Saved:
    shortened: list[int] = []
    examples: list[dict] = []
    with _Files(folder) as files:
        for plan, catalogue in zip(plans, _catalogues(plans), strict=True):
            for split, tables in write_texts(plan, tokenizer, shortened):
                files.write(split, tables)
                examples += tables["preference"].slice(0, 3 - len(examples)).to_pylist()
                progress(len(tables["preference"]))
            files.write(SPLIT_NAMES.categories[int(plan.split.min())], {"items": catalogue})
    notes: dict[str, int] = {}
    for plan in plans:
        notes |= {reason: notes.get(reason, 0) + count for reason, count in plan.notes.items()}
    if shortened:
        notes["prompts with a history cut for `max_prompt_tokens`"] = len(shortened)
    return Saved(files.content_hash, files.rows, notes, examples)


def _catalogues(plans: Sequence[Plan]) -> list[pa.Table]:
    """The items of each plan, with how often each was liked in training."""
    frames = [plan.events.items.with_columns(popularity=plan.popularity) for plan in plans]
    # What only the other catalogue has is missing here: the splits of a configuration have the same columns
    columns = pl.concat([frame.clear() for frame in frames], how="diagonal_relaxed")
    return [pl.concat([columns, frame], how="diagonal_relaxed").to_arrow() for frame in frames]
