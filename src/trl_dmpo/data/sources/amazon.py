"""Amazon Reviews 2014, 2018 and 2023: a file of reviews (`Books_5.json.gz`, `Books.jsonl`, `Books.csv`) and `meta_Books...`."""

import ast
import gzip
import html
import json
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl

from ..log import InteractionLog, make_log
from .delimited import column_names, read_delimited
from .json_lines import read_loose_json_lines, scan_json_lines


NAMES = ("amazon",)

_FILE = re.compile(r"(?:reviews_)?(.+?)(?:_\d+)?(?:\.(?:train|valid|test))?\.(?:jsonl?|csv)(?:\.gz)?")
_ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".json.gz")

_UNTIL_2018 = {"user_id": "reviewerID", "item_id": "asin", "rating": "overall", "timestamp": "unixReviewTime"}
_SINCE_2023 = {"user_id": "user_id", "item_id": "parent_asin", "rating": "rating", "timestamp": "timestamp"}
_TYPES = {"user_id": pl.String, "item_id": pl.String, "rating": pl.Float64, "timestamp": pl.Int64}

_METADATA: dict[str, dict[str, Any]] = {
    "2014": {"asin": pl.String, "title": pl.String, "brand": pl.String, "categories": pl.List(pl.List(pl.String))},
    "2018": {"asin": pl.String, "title": pl.String, "brand": pl.String, "category": pl.List(pl.String)},
    "2023": {
        "parent_asin": pl.String,
        "title": pl.String,
        "store": pl.String,
        "main_category": pl.String,
        "categories": pl.List(pl.String),
    },
}

# What the crawl of 2018 took for titles and brands where a page was not as it expected
_GARBAGE = r"(?i)</|<(span|script|style|div|img|br|a)\b|\bgetTime\b|\bvar aPageStart\b"

_DOMAINS = {"books": "book", "kindle_store": "book", "video_games": "game", "movies_and_tv": "film", "movies": "film"}


def find(path: Path) -> str | None:
    """
    What `path` is taken for, or `None` if it holds no reviews of Amazon.

    Args:
        path (`Path`):
            The folder, or the file of reviews. Files are known by the keys of their first line.

    Returns:
        `str` or `None`

    Example:

    ```python
    >>> import tempfile
    >>> from pathlib import Path
    >>> from trl_dmpo.data.sources import amazon

    >>> path = Path(tempfile.mkdtemp(), "Video_Games.csv")
    >>> _ = path.write_text("user_id,parent_asin,rating,timestamp\\n")
    >>> amazon.find(path)
    'Amazon Reviews 2023 (Video_Games.csv)'
    ```
    """
    files = _review_files(path)
    if not files:
        return None
    return f"Amazon Reviews {_edition(_keys(files[0]))} ({', '.join(file.name for file in files)})"


def is_hub_dataset(columns: list[str]) -> bool:
    """
    Whether a table of reviews is that of the hub, by the names of its columns.

    Args:
        columns (`list[str]`):
            The names.

    Returns:
        `bool`

    Example:

    ```python
    >>> from trl_dmpo.data.sources.amazon import is_hub_dataset

    >>> is_hub_dataset(["rating", "title", "text", "asin", "parent_asin", "user_id", "timestamp"])
    True
    ```
    """
    return _edition(set(columns)) == "2023"


def _edition(keys: set[str]) -> str | None:
    if {"reviewerID", "asin"} <= keys:
        return "2018" if "verified" in keys else "2014"
    return "2023" if {"user_id", "parent_asin"} <= keys else None


def _review_files(path: Path) -> list[Path]:
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    named = [file for file in files if file.is_file() and _FILE.fullmatch(file.name)]
    return [file for file in named if not file.name.startswith("meta_") and _edition(_keys(file))]


def _keys(path: Path) -> set[str]:
    """The names of the columns in the first line of a file, empty where that is not a line of a table."""
    if ".csv" in path.suffixes:
        try:
            return set(column_names(path))
        except ValueError:
            return set()
    return set(_first_line(path)[0])


def _first_line(path: Path) -> tuple[dict, bool]:
    """The first line as a dict, and whether it is JSON, or else the text of a Python dict."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            # A file that is one long line is none of Amazon's
            line = file.readline(1 << 22).decode().strip()
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error):
        return {}, True
    parsers: dict[bool, Any] = {True: json.loads, False: ast.literal_eval}
    for strict, parse in parsers.items():
        try:
            row = parse(line)
            return (row, strict) if isinstance(row, dict) else ({}, strict)
        except (ValueError, SyntaxError):
            continue
    return {}, True


def read(source: Path | pl.LazyFrame, items: Path | pl.LazyFrame | None = None) -> InteractionLog:
    """
    The ratings of one category, and of its metadata the items that were rated.

    HTML entities in texts are resolved. Titles that hold HTML or a script, as some of 2018 do, count as missing.

    Args:
        source (`Path` or `pl.LazyFrame`):
            The folder, the file of reviews, or the reviews of 2023 as a table.
        items (`Path` or `pl.LazyFrame`, *optional*):
            The metadata, if they do not lie beside the reviews as `meta_CATEGORY...`.

    Returns:
        [`InteractionLog`]: with the features `brand` and `category`, a list from the general to the special.

    Raises:
        `ValueError`: there are no reviews, those of several categories, no metadata, or a file is broken.

    Example:

    ```python
    >>> import tempfile
    >>> from pathlib import Path
    >>> from trl_dmpo.data.sources import amazon

    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "Video_Games.csv").write_text("user_id,parent_asin,rating,timestamp\\nA1,B7,5.0,1609459200123\\n")
    >>> _ = (folder / "meta_Video_Games.jsonl").write_text('{"parent_asin": "B7", "title": "Ratchet &amp; Clank"}\\n')
    >>> log = amazon.read(folder)
    >>> log.items["title"].to_list(), log.domain, log.interactions["timestamp"].to_list()
    (['Ratchet & Clank'], 'game', [1609459200])
    ```
    """
    if isinstance(source, Path):
        reviews = _review_file(source)
        category = _category(reviews)
        taken = _read_reviews(reviews)
        items = items if items is not None else _metadata_file(reviews, category)
        name = f"{reviews.name}, {items.name}" if isinstance(items, Path) else reviews.name
        found, domain = (
            f"Amazon Reviews {_edition(_keys(reviews))} ({name})",
            _DOMAINS.get(category.lower(), "product"),
        )
    else:
        taken, found, domain = source.select(*_SINCE_2023.values()), "Amazon Reviews 2023 (tables)", "product"
        if items is None:
            raise ValueError(f"{found}: there are no titles among reviews. Give the metadata as items=.")
        taken = taken.rename({theirs: ours for ours, theirs in _SINCE_2023.items()})
    metadata = _read_metadata(items) if isinstance(items, Path) else items
    interactions = taken.collect()
    return make_log(interactions, _catalogue(metadata, interactions["item_id"]), found, domain)


def _review_file(path: Path) -> Path:
    files = _review_files(path)
    if len(files) != 1:
        names = f"the reviews {', '.join(file.name for file in files)}" if files else "no reviews of Amazon"
        raise ValueError(
            f"{path}: there are {names}. Give the file of one category, such as {path if path.is_dir() else path.parent}/"
            f"{files[0].name if files else 'Books_5.json.gz'}."
        )
    return files[0]


def _category(reviews: Path) -> str:
    match = _FILE.fullmatch(reviews.name)
    return match[1] if match else ""


def _metadata_file(reviews: Path, category: str) -> Path:
    files = [reviews.with_name(f"meta_{category}{ending}") for ending in _ENDINGS]
    for file in files:
        if file.is_file():
            return file
    raise ValueError(
        f"{reviews}: titles are in the metadata, and there is no meta_{category} with the ending "
        f"{', '.join(_ENDINGS)} beside it. Put it there, or give it as items=."
    )


def _read_reviews(path: Path) -> pl.LazyFrame:
    names = _SINCE_2023 if _edition(_keys(path)) == "2023" else _UNTIL_2018
    columns = {names[ours]: dtype for ours, dtype in _TYPES.items()}
    table = read_delimited(path, ",", columns).lazy() if ".csv" in path.suffixes else scan_json_lines(path, columns)
    return table.select(pl.col(theirs).alias(ours) for ours, theirs in names.items())


def _read_metadata(path: Path) -> pl.LazyFrame:
    row, strict = _first_line(path)
    edition = "2023" if "parent_asin" in row else "2014" if "categories" in row or not strict else "2018"
    columns: Mapping[str, Any] = _METADATA[edition]
    return scan_json_lines(path, columns) if strict else read_loose_json_lines(path, columns).lazy()


def _catalogue(metadata: pl.LazyFrame, rated: pl.Series) -> pl.DataFrame:
    """The items that were rated, with texts that people can read."""
    schema = metadata.collect_schema()
    item = "parent_asin" if "parent_asin" in schema else "asin"
    if item not in schema or "title" not in schema:
        raise ValueError(f"Amazon metadata: there is no 'parent_asin' or no 'title', only: {', '.join(schema)}.")
    metadata = metadata.with_columns(pl.col(item).alias("item_id").cast(pl.String))
    asked = rated.cast(pl.String).unique().alias("item_id").to_frame().lazy()
    table = metadata.join(asked, on="item_id", how="semi").collect()
    brand = next((name for name in ("brand", "store") if name in schema), None)
    return table.select(
        "item_id",
        _text(pl.col("title")).alias("title"),
        *([_brand(_text(pl.col(brand))).alias("brand")] if brand else []),
        *([_path(schema).alias("category")] if {"category", "categories"} & set(schema) else []),
    )


def _text(text: pl.Expr) -> pl.Expr:
    """Without HTML entities, and null where it is a piece of a page."""
    text = text.map_elements(html.unescape, return_dtype=pl.String)
    return pl.when(~text.str.contains(_GARBAGE)).then(text)


def _brand(text: pl.Expr) -> pl.Expr:
    name = text.str.replace(r"^\s*by\s+", "").str.replace(r"^Visit Amazon's (.+) Page$", "${1}")
    return name.str.strip_chars().replace("", None)


def _path(schema: Mapping[str, Any]) -> pl.Expr:
    """The categories from the general to the special: of several paths the first, and without pieces of a page."""
    path = pl.col("category" if "category" in schema else "categories")
    if schema["category" if "category" in schema else "categories"] == pl.List(pl.List(pl.String)):
        path = path.list.first()
    # One text a list: entities of all its parts are resolved at once
    names = path.list.join("\n").map_elements(html.unescape, return_dtype=pl.String).str.split("\n")
    names = names.list.eval(pl.element().filter((pl.element() != "") & ~pl.element().str.contains(_GARBAGE)))
    if "main_category" not in schema:
        return names
    return (
        pl.when(names.list.len() > 0)
        .then(names)
        .when(pl.col("main_category").is_not_null())
        .then(pl.concat_list("main_category"))
    )
