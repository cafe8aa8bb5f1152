"""goodbooks-10k: `ratings.csv` and `books.csv`."""

from pathlib import Path

import polars as pl

from ..log import InteractionLog, make_log
from .delimited import column_names, read_delimited


NAMES = ("goodbooks",)

_RATINGS = {"user_id": pl.Int64, "book_id": pl.Int64, "rating": pl.Float64}
_BOOKS = {
    "book_id": pl.Int64,
    "goodreads_book_id": pl.Int64,
    "title": pl.String,
    "authors": pl.String,
    "original_publication_year": pl.Float64,
}


def find(path: Path) -> str | None:
    """
    What `path` is taken for, or `None` if it is not goodbooks-10k.

    Args:
        path (`Path`):
            The folder, or its file of ratings.

    Returns:
        `str` or `None`

    Example:

    ```python
    >>> import tempfile
    >>> from pathlib import Path
    >>> from trl_dmpo.data.sources import goodbooks

    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "ratings.csv").write_text("user_id,book_id,rating\\n")
    >>> _ = (folder / "books.csv").write_text("book_id,goodreads_book_id,authors,original_publication_year,title\\n")
    >>> goodbooks.find(folder)
    'goodbooks-10k (ratings.csv, books.csv)'
    ```
    """
    folder = path if path.is_dir() else path.parent
    here = path in (folder, folder / "ratings.csv")
    if here and _has(folder / "ratings.csv", _RATINGS) and _has(folder / "books.csv", _BOOKS):
        return "goodbooks-10k (ratings.csv, books.csv)"
    return None


def _has(file: Path, columns: dict) -> bool:
    try:
        return file.is_file() and set(columns) <= set(column_names(file))
    except ValueError:
        return False


def read(path: Path) -> InteractionLog:
    """
    The ratings and books of goodbooks-10k, in the order of the file, which is that of time.

    Titles keep the series that they end with: "The Hunger Games (The Hunger Games, #1)".

    Args:
        path (`Path`):
            The folder, or its file of ratings.

    Returns:
        [`InteractionLog`]

    Raises:
        `ValueError`: the files are not there, or one of them is broken.

    Example:

    ```python
    >>> import tempfile
    >>> from pathlib import Path
    >>> from trl_dmpo.data.sources import goodbooks

    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "ratings.csv").write_text("user_id,book_id,rating\\n7,3,5\\n")
    >>> header = "book_id,goodreads_book_id,authors,original_publication_year,title"
    >>> _ = (folder / "books.csv").write_text(f"{header}\\n3,41865,Stephenie Meyer,2005.0,Twilight\\n")
    >>> goodbooks.read(folder).items.rows()
    [(3, 'Twilight', '2005', ['Stephenie Meyer'])]
    ```
    """
    found = find(path)
    if found is None:
        raise ValueError(
            f"{path}: not goodbooks-10k. Give the folder with ratings.csv (columns {', '.join(_RATINGS)}) and books.csv "
            f"(columns {', '.join(_BOOKS)}, and others)."
        )
    folder = path if path.is_dir() else path.parent
    ratings = read_delimited(folder / "ratings.csv", ",", _RATINGS).rename({"book_id": "item_id"})
    books = read_delimited(folder / "books.csv", ",", _BOOKS)
    year = pl.col("original_publication_year").cast(pl.Int64).cast(pl.String).alias("year")
    authors = pl.col("authors").str.split(", ")
    return make_log(ratings, books.select(pl.col("book_id").alias("item_id"), "title", year, authors), found, "book")
