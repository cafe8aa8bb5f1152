"""Steam, as the McAuley lab has it: reviews of all users, or reviews and games owned of Australian users."""

from pathlib import Path

import polars as pl

from ..log import Counted, InteractionLog, make_log
from .json_lines import read_loose_json_lines


NAMES = ("steam",)

_REVIEWS, _GAMES = "steam_reviews", "steam_games"
_AUSTRALIAN_REVIEWS, _AUSTRALIAN_ITEMS = "australian_user_reviews", "australian_users_items"


def find(path: Path) -> str | None:
    """
    What `path` is taken for, or `None` if it is not Steam.

    Args:
        path (`Path`):
            The folder, or the file with the interactions. Of a folder with several, the first of `steam_reviews`,
            `australian_user_reviews` and `australian_users_items` counts.

    Returns:
        `str` or `None`

    Example:

    ```python
    >>> import tempfile
    >>> from pathlib import Path
    >>> from trl_dmpo.data.sources import steam

    >>> folder = Path(tempfile.mkdtemp())
    >>> for name in ("steam_reviews.json.gz", "steam_games.json.gz"):
    ...     (folder / name).touch()
    >>> steam.find(folder)
    'Steam (steam_reviews.json.gz, steam_games.json.gz)'
    ```
    """
    files = _find_files(path)
    return f"Steam ({', '.join(dict.fromkeys(file.name for file in files))})" if files else None


def _find_files(path: Path) -> tuple[Path, Path] | None:
    """The file with the interactions and the one with the titles."""
    folder = path if path.is_dir() else path.parent
    for stem in (_REVIEWS, _AUSTRALIAN_REVIEWS, _AUSTRALIAN_ITEMS):
        events = _file(folder, stem) if path == folder else _file(folder, stem, path.name)
        if events:
            owned = _file(folder, _AUSTRALIAN_ITEMS)
            games = _file(folder, _GAMES) or (None if stem == _REVIEWS else owned)
            # Where there are no titles, the name of the missing file says so when it is read
            return events, games or folder / f"{_GAMES}.json.gz"
    return None


def _file(folder: Path, stem: str, name: str | None = None) -> Path | None:
    names = (f"{stem}.json", f"{stem}.json.gz")
    return next((folder / one for one in names if name in (None, one) and (folder / one).is_file()), None)


def read(path: Path) -> InteractionLog:
    """
    Who reviewed or owns which game.

    `steam_reviews` is by user name and day, without a rating, and has the hours played. `australian_user_reviews` has a
    `rating` of 1 where the user recommends the game and 0 where not: what is positive is above 0.5. Its reviews of the last
    year are dated without a year and left out. `australian_users_items` has the minutes played and no time; games never played
    are left out. Titles, genres and tags are those of `steam_games`, for lack of it titles those of `australian_users_items`.

    Args:
        path (`Path`):
            The folder, or the file with the interactions.

    Returns:
        [`InteractionLog`]

    Raises:
        `ValueError`: the files are not there, or one of them is broken.

    Example:

    ```python
    >>> import tempfile
    >>> from pathlib import Path
    >>> from trl_dmpo.data.sources import steam

    >>> folder = Path(tempfile.mkdtemp())
    >>> review = {"username": "Chaos Syren", "hours": 0.1, "product_id": "10", "date": "2017-12-17", "early_access": False}
    >>> _ = (folder / "steam_reviews.json").write_text(f"{review}\\n")
    >>> _ = (folder / "steam_games.json").write_text("{u'id': u'10', u'app_name': u'Counter-Strike', u'genres': [u'Action']}")
    >>> steam.read(folder).items.rows()
    [(10, 'Counter-Strike', ['Action'], None)]
    ```
    """
    files = _find_files(path)
    if files is None:
        raise ValueError(
            f"{path}: not Steam. Give the folder with {_REVIEWS}.json.gz and {_GAMES}.json.gz, with "
            f"{_AUSTRALIAN_REVIEWS}.json.gz and {_GAMES}.json.gz, or with {_AUSTRALIAN_ITEMS}.json.gz."
        )
    events, games = files
    if not games.is_file():
        raise ValueError(f"{events}: the titles are missing. Put {games.name} beside it.")
    stem = events.name.split(".")[0]
    readers = {
        _REVIEWS: _read_reviews,
        _AUSTRALIAN_REVIEWS: _read_australian_reviews,
        _AUSTRALIAN_ITEMS: _read_australian_items,
    }
    counted = readers[stem](events)
    titles = _read_games(games) if games.name.startswith(_GAMES) else _read_titles(games)
    return make_log(counted.frame, titles, str(find(path)), "game", counted.notes)


def _read_reviews(path: Path) -> Counted:
    columns = {"username": pl.String, "product_id": pl.String, "date": pl.String, "hours": pl.Float64}
    names = {"username": "user_id", "product_id": "item_id", "date": "timestamp"}
    return Counted(read_loose_json_lines(path, columns).rename(names).with_columns(_number("item_id")), {})


def _read_australian_reviews(path: Path) -> Counted:
    fields = {"item_id": pl.String, "recommend": pl.Boolean, "posted": pl.String}
    reviews = _read_lists(path, "reviews", fields)
    day = pl.col("posted").str.extract(r"Posted (\w+ \d+, \d{4})").str.to_date("%B %d, %Y", strict=False)
    reviews = reviews.select(
        "user_id", _number("item_id"), day.alias("timestamp"), pl.col("recommend").cast(pl.Float64).alias("rating")
    )
    return Counted(reviews, {}).without(pl.col("timestamp").is_null(), "reviews dated without a year")


def _read_australian_items(path: Path) -> Counted:
    owned = _read_lists(path, "items", {"item_id": pl.String, "playtime_forever": pl.Int64})
    owned = owned.select("user_id", _number("item_id"), pl.col("playtime_forever").alias("minutes"))
    return Counted(owned, {}).without(pl.col("minutes") == 0, "games owned and never played")


def _read_lists(path: Path, name: str, fields: dict) -> pl.DataFrame:
    """Lines of a user with a list, as one row an entry."""
    users = read_loose_json_lines(path, {"user_id": pl.String, name: pl.List(pl.Struct(fields))})
    return users.explode(name).drop_nulls(name).unnest(name)


def _read_games(path: Path) -> pl.DataFrame:
    lists = dict.fromkeys(("genres", "tags"), pl.List(pl.String))
    games = read_loose_json_lines(path, {"id": pl.String, "app_name": pl.String, "title": pl.String} | lists)
    title = pl.coalesce("app_name", "title").alias("title")
    return games.select(_number("id").alias("item_id"), title, "genres", "tags")


def _read_titles(path: Path) -> pl.DataFrame:
    owned = _read_lists(path, "items", {"item_id": pl.String, "item_name": pl.String})
    titles = owned.select(_number("item_id"), pl.col("item_name").alias("title"))
    return titles.unique("item_id", keep="first", maintain_order=True)


def _number(column: str) -> pl.Expr:
    # All ids are numbers in quotes; what is not becomes a row without an id, and is counted as such
    return pl.col(column).cast(pl.Int64, strict=False)
