"""MovieLens: `u.data` and `u.item` (100K), `ratings.dat` and `movies.dat` (1M, 10M) or `ratings.csv` and `movies.csv` (later)."""

from pathlib import Path

import polars as pl

from ..log import InteractionLog, make_log
from .delimited import column_names, read_delimited


NAMES = ("movielens",)

_RATINGS = {"user_id": pl.Int64, "item_id": pl.Int64, "rating": pl.Float64, "timestamp": pl.Int64}
_CSV = {"user_id": "userId", "item_id": "movieId", "rating": "rating", "timestamp": "timestamp"}

# The columns of flags at the end of u.item
_GENRES = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip

# With what titles go on after a comma, in the languages of MovieLens. "L'" is written without a space after it.
_ARTICLES = (
    "The|A|An|Le|La|Les|L'|Un|Une|Des|Der|Die|Das|Den|Det|Ein|Eine|El|Los|Las|Una|Lo|Il|Gli|I|Uno|O|Os|As|Um|Uma"
    "|De|Het|Een|En|Ett|Et"
)


def find(path: Path) -> str | None:
    """
    What `path` is taken for, or `None` if it is not MovieLens.

    Args:
        path (`Path`):
            The folder, or the file with the ratings.

    Returns:
        `str` or `None`

    Example:

    ```python
    >>> import tempfile
    >>> from pathlib import Path
    >>> from trl_dmpo.data.sources import movielens

    >>> folder = Path(tempfile.mkdtemp())
    >>> for name in ("u.data", "u.item"):
    ...     (folder / name).touch()
    >>> movielens.find(folder)
    'MovieLens 100K (u.data, u.item)'
    ```
    """
    folder = path if path.is_dir() else path.parent
    for ratings, movies in (("u.data", "u.item"), ("ratings.dat", "movies.dat"), ("ratings.csv", "movies.csv")):
        here = (folder / ratings).is_file() and (folder / movies).is_file()
        if here and path in (folder, folder / ratings) and _has_its_columns(folder / ratings):
            return f"MovieLens {_edition(folder, ratings)} ({ratings}, {movies})"
    return None


def _has_its_columns(ratings: Path) -> bool:
    return ratings.suffix != ".csv" or set(_CSV.values()) <= set(column_names(ratings))


def _edition(folder: Path, ratings: str) -> str:
    if ratings == "u.data":
        return "100K"
    if ratings == "ratings.dat":
        # Only 1M tells about its users
        return "1M" if (folder / "users.dat").is_file() else "10M"
    return "20M or later"


def read(path: Path) -> InteractionLog:
    """
    The ratings and films of MovieLens, of any size.

    "Matrix, The (1999)" becomes "The Matrix (1999)", and the year and the genres become features. Film 267 of 100K, which is
    called "unknown", counts as one without a title.

    Args:
        path (`Path`):
            The folder, or the file with the ratings.

    Returns:
        [`InteractionLog`]

    Raises:
        `ValueError`: the files are not there, or one of them is broken.

    Example:

    ```python
    >>> import tempfile
    >>> from pathlib import Path
    >>> from trl_dmpo.data.sources import movielens

    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "ratings.csv").write_text("userId,movieId,rating,timestamp\\n1,2571,4.5,944918901\\n")
    >>> _ = (folder / "movies.csv").write_text('movieId,title,genres\\n2571,"Matrix, The (1999)",Action|Sci-Fi\\n')
    >>> movielens.read(folder).items.rows()
    [(2571, 'The Matrix (1999)', '1999', ['Action', 'Sci-Fi'])]
    ```
    """
    found = find(path)
    if found is None:
        raise ValueError(
            f"{path}: not MovieLens. Give the folder with u.data and u.item, ratings.dat and movies.dat, or ratings.csv "
            f"and movies.csv."
        )
    folder = path if path.is_dir() else path.parent
    if "100K" in found:
        ratings, movies = _read_100k(folder)
    elif ".dat" in found:
        ratings, movies = _read_dat(folder)
    else:
        ratings, movies = _read_csv(folder)
    year = pl.col("title").str.extract(r"\((\d{4})[^()]*\)\s*$").alias("year")
    return make_log(ratings, movies.select("item_id", turn_articles(pl.col("title")), year, "genres"), found, "film")


def _read_100k(folder: Path) -> tuple[pl.DataFrame, pl.DataFrame]:
    texts = {"item_id": pl.Int64, "title": pl.String, "released": pl.String, "on_video": pl.String, "url": pl.String}
    flags = dict.fromkeys(_GENRES, pl.Int64)
    movies = read_delimited(
        folder / "u.item", "|", texts | flags, header=False, encoding="latin-1", quote=None
    )  # fmt: skip
    named = [pl.when(pl.col(genre) == 1).then(pl.lit(genre)) for genre in _GENRES if genre != "unknown"]
    genres = pl.concat_list(named).list.drop_nulls().alias("genres")
    title = pl.when(pl.col("title") != "unknown").then("title").alias("title")
    ratings = read_delimited(folder / "u.data", "\t", _RATINGS, header=False, quote=None)
    return ratings, movies.select("item_id", title, genres)


def _read_dat(folder: Path) -> tuple[pl.DataFrame, pl.DataFrame]:
    columns = {"item_id": pl.Int64, "title": pl.String, "genres": pl.String}
    movies = read_delimited(folder / "movies.dat", "::", columns, header=False, encoding="latin-1", quote=None)
    ratings = read_delimited(folder / "ratings.dat", "::", _RATINGS, header=False, quote=None)
    return ratings, movies.with_columns(_listed(pl.col("genres")))


def _read_csv(folder: Path) -> tuple[pl.DataFrame, pl.DataFrame]:
    ratings = read_delimited(folder / "ratings.csv", ",", {_CSV[name]: dtype for name, dtype in _RATINGS.items()})
    columns = {"movieId": pl.Int64, "title": pl.String, "genres": pl.String}
    movies = read_delimited(folder / "movies.csv", ",", columns).rename({"movieId": "item_id"})
    return ratings.rename({theirs: ours for ours, theirs in _CSV.items()}), movies.with_columns(
        _listed(pl.col("genres"))
    )


def _listed(genres: pl.Expr) -> pl.Expr:
    return genres.fill_null("").replace("(no genres listed)", "").str.extract_all(r"[^|]+")


def turn_articles(title: pl.Expr) -> pl.Expr:
    """
    `title` as a person would write it: "Matrix, The (1999)" as "The Matrix (1999)", and so for titles in parentheses.

    Args:
        title (`pl.Expr`):
            Of strings.

    Returns:
        `pl.Expr`

    Example:

    ```python
    >>> import polars as pl
    >>> from trl_dmpo.data.sources.movielens import turn_articles

    >>> title = "City of Lost Children, The (Cité des enfants perdus, La) (1995)"
    >>> pl.select(turn_articles(pl.lit(title))).item()
    'The City of Lost Children (La Cité des enfants perdus) (1995)'
    ```
    """
    outside = title.str.strip_chars().str.replace(rf"^([^()]+), ({_ARTICLES})(\s*\(|$)", "${2} ${1}${3}")
    inside = outside.str.replace_all(rf"\((a\.k\.a\. )?([^()]+), ({_ARTICLES})\s*\)", "(${1}${3} ${2})")
    return inside.str.replace_all(r"(^|\(|a\.k\.a\. )L' ", "${1}L'").str.replace_all(r"\s+\)", ")")
