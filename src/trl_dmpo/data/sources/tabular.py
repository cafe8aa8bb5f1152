"""Any table: CSV, TSV, Parquet or JSON lines, or a frame, its columns named as here or mapped; or a folder of two of them."""

import gzip
import io
import itertools
import logging
import re
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from ..log import InteractionLog, make_log
from .delimited import column_names, read_delimited
from .json_lines import scan_json_lines


NAMES = ("tabular",)

logger = logging.getLogger(__name__)

# From the columns that mean something here to their types where the file gives none: `None` as of `read_delimited`
_TYPES: dict[str, Any] = {
    "user_id": None,
    "item_id": None,
    "timestamp": None,
    "rating": pl.Float64,
    "impressions": pl.String,
    "title": pl.String,
}

# What else people call them, in lower case and without what is no letter. For advice only: nothing is taken by guessing.
_SYNONYMS = {
    "user_id": {"user", "userid", "uid", "reviewer", "reviewerid", "customer", "customerid", "visitorid", "sessionid"},
    "item_id": {
        "item",
        "itemid",
        "iid",
        "movieid",
        "asin",
        "parentasin",
        "productid",
        "product",
        "bookid",
        "articleid",
    },
    "timestamp": {"time", "date", "when", "datetime", "unixreviewtime", "createdat", "eventtime", "ts"},
    "rating": {"stars", "score", "overall", "ratings"},
    "impressions": {"impression", "shown", "displayed", "candidates"},
    "title": {"name", "itemname", "movietitle", "itemtitle", "producttitle", "productname", "booktitle", "itemtext"},
}

_SEPARATORS = {".csv": ",", ".tsv": "\t"}
_JSON_LINES = (".jsonl", ".ndjson", ".json")


def find(path: Path) -> str | None:
    """
    What `path` is taken for, or `None` if its columns must be mapped first.

    Args:
        path (`Path`):
            A folder with `ratings` or `interactions`, and `items`, as `.csv` or `.parquet`; or one file. The columns are
            `user_id`, `item_id` and `title`, the last in `items` or, if there are none, in the one file.

    Returns:
        `str` or `None`

    Example:

    ```python
    >>> import tempfile
    >>> from pathlib import Path
    >>> from trl_dmpo.data.sources import tabular

    >>> path = Path(tempfile.mkdtemp(), "log.csv")
    >>> _ = path.write_text("user_id,item_id,title\\n")
    >>> tabular.find(path)
    'a table (log.csv)'
    ```
    """
    files = _files(path)
    if len(files) not in (1, 2) or _kind(files[0]) is None:
        return None
    try:
        tables = [_open(file) for file in files]
    except ValueError:
        # Not for sure a table: whoever says that it is one is told what is wrong
        return None
    known = {"user_id", "item_id"} <= set(tables[0].names) and {"item_id", "title"} <= set(tables[-1].names)
    return f"a table ({', '.join(file.name for file in files)})" if known else None


def is_table(path: Path) -> bool:
    """
    Whether `path` can be read as a table once its columns are known.

    Args:
        path (`Path`):
            A folder or file.

    Returns:
        `bool`

    Example:

    ```python
    >>> from pathlib import Path
    >>> from trl_dmpo.data.sources import tabular

    >>> tabular.is_table(Path("log.csv.gz")), tabular.is_table(Path("log.xlsx"))
    (True, False)
    ```
    """
    return any(_kind(file) is not None for file in _files(path))


def _kind(path: Path) -> str | None:
    """The ending that tells the format, without that of the compression."""
    kind = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    return kind if kind in (*_SEPARATORS, ".parquet", *_JSON_LINES) else None


def _files(path: Path) -> list[Path]:
    """The interactions and, in a folder, the items; more where it is not clear which they are, none where there are none."""
    if not path.is_dir():
        return [path]
    taken, items = (
        [path / f"{stem}{ending}" for stem in stems for ending in (".csv", ".parquet")]
        for stems in (("ratings", "interactions"), ("items",))
    )
    taken, items = [file for file in taken if file.is_file()], [file for file in items if file.is_file()]
    return [*taken, *items] if taken else []


def as_frame(table: Any) -> pl.LazyFrame:
    """
    A table of another library as one of polars.

    Args:
        table (`pl.DataFrame`, `pl.LazyFrame`, `pandas.DataFrame` or `datasets.Dataset`):
            The table.

    Returns:
        `pl.LazyFrame`

    Raises:
        `ValueError`: it is something else.

    Example:

    ```python
    >>> import polars as pl
    >>> from trl_dmpo.data.sources.tabular import as_frame

    >>> as_frame(pl.DataFrame({"user_id": [1]})).collect().height
    1
    ```
    """
    if isinstance(table, (pl.DataFrame, pl.LazyFrame)):
        return table.lazy()
    kind = f"{type(table).__module__.partition('.')[0]}.{type(table).__name__}"
    if kind == "pandas.DataFrame":
        return pl.from_pandas(table).lazy()
    if kind == "datasets.Dataset":
        return table.to_polars().lazy()
    hint = f" Give one split of it, such as dataset[{next(iter(table))!r}]." if kind == "datasets.DatasetDict" else ""
    raise ValueError(
        f"Cannot read interactions from a {kind}: give a path, a polars or pandas frame, or a datasets.Dataset.{hint}"
    )


@dataclass(frozen=True)
class _Table:
    """A table that is not read yet: `read` takes the columns that are wanted, with types for formats that have none."""

    name: str
    names: list[str]
    read: Callable[[Mapping[str, Any]], pl.LazyFrame]

    def column(self, ours: str, mapping: Mapping[str, str]) -> str | None:
        """What a column is called here: as mapped or, in the table that the mapping is not about, by its own name."""
        return next((name for name in (mapping.get(ours, ours), ours) if name in self.names), None)


def _open(source: Path | pl.LazyFrame) -> _Table:
    if not isinstance(source, Path):
        return _Table("the table", source.collect_schema().names(), lambda wanted: source.select(*wanted))
    kind = _kind(source)
    if kind in _SEPARATORS:
        separator = _SEPARATORS[kind]
        names = column_names(source, separator)
        return _Table(str(source), names, lambda wanted: read_delimited(source, separator, wanted).lazy())
    if kind in _JSON_LINES:
        schema = _schema_of_json_lines(source)
        return _Table(str(source), list(schema), lambda wanted: scan_json_lines(source, _as_wanted(schema, wanted)))
    if kind != ".parquet":
        raise ValueError(
            f"{source}: the ending is not one of .csv, .tsv, .parquet, .jsonl. Rename or convert the file."
        )
    return _open_parquet(source)


def _open_parquet(path: Path) -> _Table:
    frame = pl.scan_parquet(path, glob=False)
    try:
        names = frame.collect_schema().names()
    except (pl.exceptions.PolarsError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: not a Parquet file, or cut off ({reason}). Get or write it again.") from error
    return _Table(str(path), names, lambda wanted: frame.select(*wanted))


def _as_wanted(schema: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The types that a file has, but for ratings: 3 in all lines that were looked at does not forbid 4.5."""
    fraction = {name for name, dtype in wanted.items() if dtype == pl.Float64 and schema[name].is_integer()}
    return {name: pl.Float64 if name in fraction else schema[name] for name in wanted}


def _schema_of_json_lines(path: Path) -> dict[str, Any]:
    """By the first thousand lines. What is empty in all of them may become text."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            lines = [line.strip() for line in itertools.islice(file, 1000)]
        text = b"\n".join(line for line in lines if line)
        schema = pl.read_ndjson(io.BytesIO(text), infer_schema_length=None).schema
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, EOFError, OSError, zlib.error):
        # Only to have the line named
        scan_json_lines(path, {"user_id": pl.String})
        raise ValueError(f"{path}: not JSON lines. Write one JSON object a line.") from None
    return {name: pl.String if dtype == pl.Null else dtype for name, dtype in schema.items()}


def read(
    source: Path | pl.LazyFrame, items: Path | pl.LazyFrame | None = None, columns: Mapping[str, str] | None = None
) -> InteractionLog:
    """
    The interactions and items of one or two tables.

    Features of an item are the other columns of text of `items`. Where there is one table only, they are those that are the
    same in all rows of an item.

    Args:
        source (`Path` or `pl.LazyFrame`):
            The interactions: a CSV, TSV, Parquet or JSON lines file, a folder as [`find`] takes it, or a frame.
        items (`Path` or `pl.LazyFrame`, *optional*):
            The items, in any of these. Without them, `source` must have the titles.
        columns (`Mapping[str, str]`, *optional*):
            From `user_id`, `item_id`, `timestamp`, `rating`, `impressions` and `title` to what the tables call them.
            Impressions are lists, or ids in one string between spaces, commas or `|`.

    Returns:
        [`InteractionLog`]

    Raises:
        `ValueError`: a column is missing, is mapped and unknown, or a file is broken.

    Example:

    ```python
    >>> import polars as pl
    >>> from trl_dmpo.data.sources import tabular

    >>> table = pl.LazyFrame({"who": ["ann"], "asin": ["B7"], "name": ["Big"], "genre": ["Comedy"], "review": [None]})
    >>> tabular.read(table, columns={"user_id": "who", "item_id": "asin", "title": "name"}).items.rows()
    [('B7', 'Big', 'Comedy')]
    ```
    """
    mapping = dict(columns or {})
    _check_mapping(mapping)
    source, items = _two_tables(source, items)
    taken = _open(source)
    titled = taken if items is None else _open(items)
    _check_columns(taken, ("user_id", "item_id") if items is not None else ("user_id", "item_id", "title"), mapping)
    _check_columns(titled, ("item_id", "title"), mapping)
    if unknown := [theirs for theirs in mapping.values() if theirs not in (*taken.names, *titled.names)]:
        raise ValueError(
            f"{taken.name}: `columns` names {unknown[0]!r}, which is not among: {', '.join(taken.names)}."
        )
    interactions = _interactions(taken, mapping)
    catalogue = _items(titled, mapping, one_row_an_item=items is not None)
    return make_log(interactions, catalogue, _told(source, items))


def _told(source: Path | pl.LazyFrame, items: Path | pl.LazyFrame | None) -> str:
    names = [table.name if isinstance(table, Path) else "a frame" for table in (source, items) if table is not None]
    return f"a table ({', '.join(names)})"


def _check_mapping(mapping: Mapping[str, str]) -> None:
    for name in mapping:
        if name not in _TYPES:
            raise ValueError(
                f"`columns` maps {name!r}, which is none of {', '.join(_TYPES)}. Give it as {{'user_id': 'your column', ...}}; "
                f"other columns of text are read under their own names."
            )


def _two_tables(
    source: Path | pl.LazyFrame, items: Path | pl.LazyFrame | None
) -> tuple[Path | pl.LazyFrame, Path | pl.LazyFrame | None]:
    if not (isinstance(source, Path) and source.is_dir()):
        return source, items
    files = _files(source)
    taken = [file for file in files if file.stem != "items"]
    titled = [file for file in files if file.stem == "items"]
    if len(taken) != 1 or len(titled) > 1:
        found = ", ".join(sorted(file.name for file in source.iterdir())) or "nothing"
        raise ValueError(
            f"{source}: expected one of ratings and interactions, and items, as .csv or .parquet, but found {found}. "
            f"Give the file of interactions, and that of items as items=."
        )
    return taken[0], items if items is not None or not titled else titled[0]


def _check_columns(table: _Table, needed: Iterable[str], mapping: Mapping[str, str]) -> None:
    missing = [name for name in needed if table.column(name, mapping) is None]
    if missing:
        known = ", ".join(repr(mapping.get(name, name)) for name in missing)
        advice = {name: _alike(name, table.names) or "your column" for name in missing}
        flags = " ".join(f"{name}={theirs.replace(' ', '_')}" for name, theirs in advice.items())
        raise ValueError(
            f"{table.name}: there is no column {known}, only: {', '.join(table.names)}. Name it, for instance columns={advice} "
            f"(--columns {flags})" + (", or give the table with the titles as items=." if "title" in missing else ".")
        )


def _alike(ours: str, names: list[str]) -> str | None:
    wanted = _SYNONYMS[ours] | {re.sub("[^a-z]", "", ours)}
    return next((name for name in names if re.sub("[^a-z]", "", name.lower()) in wanted), None)


def _interactions(table: _Table, mapping: Mapping[str, str]) -> pl.LazyFrame:
    names = {ours: table.column(ours, mapping) for ours in _TYPES if ours != "title"}
    if names["timestamp"] is None and (alike := _alike("timestamp", table.names)):
        logger.warning(
            "%s: there is no column 'timestamp', so the order of the rows is the order of events. If %r is one, give "
            "columns={'timestamp': %r}.",
            table.name, alike, alike,
        )  # fmt: skip
    there = {ours: theirs for ours, theirs in names.items() if theirs is not None}
    frame = table.read({theirs: _TYPES[ours] for ours, theirs in there.items()})
    frame = frame.select(pl.col(theirs).alias(ours) for ours, theirs in there.items())
    return _with_impressions(frame)


def _with_impressions(frame: pl.LazyFrame) -> pl.LazyFrame:
    schema = frame.collect_schema()
    if schema.get("impressions") != pl.String:
        return frame
    frame = frame.with_columns(pl.col("impressions").str.extract_all(r"[^\s,|\[\]'\"]+"))
    if not schema["item_id"].is_integer():
        return frame
    # Ids of both are of one type: if one that was shown is no integer, none is
    table = frame.collect()
    shown = table["impressions"].explode().drop_nulls()
    plain = shown.cast(pl.Int64, strict=False).null_count() == 0
    return table.lazy() if plain else table.lazy().with_columns(pl.col("item_id").cast(pl.String))


def _items(table: _Table, mapping: Mapping[str, str], one_row_an_item: bool) -> pl.DataFrame:
    item, title = table.column("item_id", mapping), table.column("title", mapping)
    assert item is not None
    assert title is not None
    used = {table.column(ours, mapping) for ours in _TYPES}
    others = [name for name in table.names if name not in used]
    types = {title: pl.String, **dict.fromkeys(others, pl.String), item: None}
    frame = table.read(types).select(pl.col(item).alias("item_id"), pl.col(title).alias("title"), *others)
    items = frame.collect()
    features = [name for name in others if _is_text(items[name])]
    if one_row_an_item:
        return items.select("item_id", "title", *features)
    return _one_row_an_item(
        items.select("item_id", "title", *(name for name in features if items[name].dtype == pl.String))
    )


def _is_text(column: pl.Series) -> bool:
    """CSV has no types: a column of numbers is no text there either."""
    if column.dtype == pl.String:
        return column.cast(pl.Float64, strict=False).null_count() > column.null_count()
    return column.dtype == pl.List(pl.String)


def _one_row_an_item(rows: pl.DataFrame) -> pl.DataFrame:
    """The first title of each item, and the features that belong to it: a review's text, say, differs from row to row."""
    features = [name for name in rows.columns if name not in ("item_id", "title")]
    groups = rows.group_by("item_id", maintain_order=True)
    values = groups.agg(pl.col(features).drop_nulls().n_unique()).select(pl.col(features).max()) if features else None
    same = [name for name in features if values is not None and values[name].item() == 1]
    return groups.agg(pl.col("title", *same).drop_nulls().first())
