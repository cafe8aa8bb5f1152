"""Goodreads, as the UCSD Book Graph has it: `goodreads_interactions*` or `goodreads_reviews*`, and `goodreads_books*`."""

import re
from pathlib import Path

import polars as pl

from ..log import Counted, InteractionLog, make_log
from .delimited import read_delimited
from .json_lines import scan_json_lines


NAMES = ("goodreads",)

_CSV = "goodreads_interactions.csv"
_BOOK_IDS = "book_id_map.csv"
# The file of one genre, or of all ("_dedup"). Those made for finding spoilers are something else.
_EVENTS = re.compile(r"goodreads_(?:interactions|reviews)(?:_dedup|((?:_(?!spoiler)\w+)?))\.(?:json|csv)(?:\.gz)?")
_DATE = "%a %b %d %H:%M:%S %z %Y"


def find(path: Path) -> str | None:
    """
    What `path` is taken for, or `None` if it is not Goodreads.

    Args:
        path (`Path`):
            The folder, or the file of interactions or reviews.

    Returns:
        `str` or `None`

    Example:

    ```python
    >>> import tempfile
    >>> from pathlib import Path
    >>> from trl_dmpo.data.sources import goodreads

    >>> folder = Path(tempfile.mkdtemp())
    >>> for name in ("goodreads_interactions_poetry.json.gz", "goodreads_books_poetry.json.gz"):
    ...     (folder / name).touch()
    >>> goodreads.find(folder)
    'Goodreads (goodreads_interactions_poetry.json.gz, goodreads_books_poetry.json.gz)'
    ```
    """
    events = _find_events(path)
    if not events:
        return None
    names = [file.name for file in events]
    return f"Goodreads ({', '.join(names if len(events) > 1 else [*names, _find_books(events[0]).name])})"


def _find_events(path: Path) -> list[Path]:
    """The files with interactions; if there are none, those with reviews."""
    if path.is_file():
        return [path] if _EVENTS.fullmatch(path.name) else []
    files = [file for file in sorted(path.glob("goodreads_*")) if _EVENTS.fullmatch(file.name)]
    files = [file for file in files if file.suffix != ".gz" or file.with_suffix("") not in files]
    interactions = [file for file in files if file.name.startswith("goodreads_interactions")]
    return interactions or files


def _find_books(events: Path) -> Path:
    """Those of the same genre, or those of all. If neither is there, the file that should be."""
    match = _EVENTS.fullmatch(events.name)
    genre = match[1] if match else ""
    names = [f"goodreads_books{one}.json{end}" for one in (genre, "") for end in (".gz", "")]
    return next(
        (events.with_name(name) for name in names if events.with_name(name).is_file()), events.with_name(names[0])
    )


def read(path: Path) -> InteractionLog:
    """
    Who read and rated which book, by the day on which it came onto the user's shelves.

    Books that a user has shelved and not read are left out, and so are those read and not rated (Goodreads writes that as 0).
    The CSV file of all interactions has no times; users keep its numbers, and books get the ids that they have elsewhere.
    With `goodreads_book_authors` beside the books, their authors become a feature.

    Args:
        path (`Path`):
            The folder, or the file of interactions or reviews. A folder of several genres is an error that lists them.

    Returns:
        [`InteractionLog`]

    Raises:
        `ValueError`: the files are not there, there are those of several genres, or one of them is broken.

    Example:

    ```python
    >>> import json, tempfile
    >>> from pathlib import Path
    >>> from trl_dmpo.data.sources import goodreads

    >>> folder = Path(tempfile.mkdtemp())
    >>> book = {"book_id": "402128", "title": "Old Possum's Book of Practical Cats", "publication_year": "1982"}
    >>> _ = (folder / "goodreads_books_poetry.json").write_text(json.dumps(book))
    >>> row = {"user_id": "8a", "book_id": "402128", "is_read": True, "rating": 4, "date_added": "Fri Apr 19 08:15:15 -0700 2013"}
    >>> _ = (folder / "goodreads_interactions_poetry.json").write_text(json.dumps(row))
    >>> goodreads.read(folder).interactions.rows()
    [('8a', 402128, 4.0, 1366384515)]
    ```
    """
    found = _find_events(path)
    if not found:
        raise ValueError(
            f"{path}: not Goodreads. Give the folder with goodreads_interactions_GENRE.json.gz (or {_CSV} and {_BOOK_IDS}) "
            f"and goodreads_books_GENRE.json.gz."
        )
    if len(found) > 1:
        raise ValueError(
            f"{path}: there are {', '.join(file.name for file in found)}. Give one of these files, not the folder."
        )
    events, books = found[0], _find_books(found[0])
    for file in (books, *([events.with_name(_BOOK_IDS)] if ".csv" in events.name else [])):
        if not file.is_file():
            raise ValueError(f"{events}: {file.name} is missing. Put it beside it.")
    counted = _read_csv(events) if ".csv" in events.name else _read_json(events)
    return make_log(counted.frame, _read_books(books), str(find(path)), "book", counted.notes)


def _read_json(path: Path) -> Counted:
    columns = {
        "user_id": pl.String,
        "book_id": pl.String,
        "is_read": pl.Boolean,
        "rating": pl.Float64,
        "date_added": pl.String,
    }
    frame = scan_json_lines(path, columns).rename({"book_id": "item_id"})
    time = pl.col("date_added").str.to_datetime(_DATE, strict=False).dt.epoch("s").alias("timestamp")
    # Reviews do not tell whether the book was read
    frame = frame.with_columns(_number("item_id"), time, pl.col("is_read").fill_null(True)).drop("date_added")
    counted = _only_rated(frame.collect())
    return counted.without(pl.col("timestamp").is_null(), "interactions without a date that can be read")


def _read_csv(path: Path) -> Counted:
    # Of 229 million rows: the smallest types
    columns = {"user_id": pl.Int32, "book_id": pl.Int32, "is_read": pl.Int8, "rating": pl.Int8}
    frame = read_delimited(path, ",", columns).with_columns(pl.col("is_read") == 1)
    ids = read_delimited(path.with_name(_BOOK_IDS), ",", {"book_id_csv": pl.Int32, "book_id": pl.Int64})
    counted = _only_rated(frame)
    joined = counted.frame.join(
        ids.rename({"book_id": "item_id"}),
        left_on="book_id",
        right_on="book_id_csv",
        how="left",
        maintain_order="left",
    )
    return counted._replace(frame=joined.drop("book_id"))


def _only_rated(frame: pl.DataFrame) -> Counted:
    read = Counted(frame, {}).without(~pl.col("is_read"), "books shelved and not read")
    rated = read.without(pl.col("rating") == 0, "books read and not rated")
    return rated._replace(frame=rated.frame.drop("is_read"))


def _read_books(path: Path) -> pl.DataFrame:
    authors = pl.List(pl.Struct({"author_id": pl.String, "role": pl.String}))
    columns = {"book_id": pl.String, "title": pl.String, "publication_year": pl.String, "authors": authors}
    year = pl.col("publication_year").replace("", None).alias("year")
    books = (
        scan_json_lines(path, columns).select(_number("book_id").alias("item_id"), "title", year, "authors").collect()
    )
    files = [path.with_name(f"goodreads_book_authors.json{end}") for end in ("", ".gz")]
    names = next((file for file in files if file.is_file()), None)
    return books.drop("authors") if names is None else _with_authors(books, names)


def _with_authors(books: pl.DataFrame, path: Path) -> pl.DataFrame:
    """`authors` as names: of those who wrote the book, not of those who translated or illustrated it."""
    names = scan_json_lines(path, {"author_id": pl.String, "name": pl.String}).collect()
    listed = books.select("item_id", "authors").explode("authors").unnest("authors").filter(pl.col("role") == "")
    listed = listed.join(names, on="author_id", how="inner", maintain_order="left")
    authors = listed.group_by("item_id").agg(pl.col("name").unique(maintain_order=True).alias("authors"))
    return books.drop("authors").join(authors, on="item_id", how="left")


def _number(column: str) -> pl.Expr:
    # All ids are numbers in quotes; what is not becomes a row without an id, and is counted as such
    return pl.col(column).cast(pl.Int64, strict=False)
