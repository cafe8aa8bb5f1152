"""Last.fm HetRec 2011 2K: `artists.dat`, `user_artists.dat`, `user_taggedartists-timestamps.dat` and `tags.dat`."""

from pathlib import Path

import polars as pl

from ..log import Counted, InteractionLog, make_log
from .delimited import read_delimited


NAMES = ("lastfm",)

_LISTENS = "user_artists.dat"
_TAGGINGS = "user_taggedartists-timestamps.dat"

# Last.fm began in 2002; a few taggings are dated 1956 or 1979
_BEGINNING = 1_009_843_200_000

_MOST_TAGS = 5


def find(path: Path) -> str | None:
    """
    What `path` is taken for, or `None` if it is not Last.fm HetRec 2011 2K.

    Args:
        path (`Path`):
            The folder, or one of its two files of interactions.

    Returns:
        `str` or `None`

    Example:

    ```python
    >>> import tempfile
    >>> from pathlib import Path
    >>> from trl_dmpo.data.sources import lastfm

    >>> folder = Path(tempfile.mkdtemp())
    >>> for name in ("artists.dat", "user_artists.dat"):
    ...     (folder / name).touch()
    >>> lastfm.find(folder)
    'Last.fm HetRec 2011 2K (user_artists.dat, artists.dat)'
    ```
    """
    folder = path if path.is_dir() else path.parent
    if path not in (folder, folder / _LISTENS, folder / _TAGGINGS):
        return None
    if not all((folder / name).is_file() for name in ("artists.dat", _LISTENS)):
        return None
    events = _TAGGINGS if (folder / _TAGGINGS).is_file() else _LISTENS
    return f"Last.fm HetRec 2011 2K ({events}, artists.dat)"


def read(path: Path) -> InteractionLog:
    """
    Who listened to which artist, from the time of the first tag that the user gave the artist.

    Listens are counted but not dated, so only tagged artists have a time; the others are left out. Without the file of
    taggings, all listens are read, in the order of the file. `weight` is how often the user listened, where that is known;
    `tags` are the commonest tags of an artist, at most five.

    Args:
        path (`Path`):
            The folder, or one of its two files of interactions.

    Returns:
        [`InteractionLog`]

    Raises:
        `ValueError`: the files are not there, or one of them is broken.

    Example:

    ```python
    >>> import tempfile
    >>> from pathlib import Path
    >>> from trl_dmpo.data.sources import lastfm

    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "artists.dat").write_text("id\\tname\\turl\\tpictureURL\\n51\\tDuran Duran\\thttp://\\thttp://\\n")
    >>> _ = (folder / "user_artists.dat").write_text("userID\\tartistID\\tweight\\n2\\t51\\t13883\\n")
    >>> log = lastfm.read(folder)
    >>> log.interactions.rows(), log.has_time
    ([(2, 51, 13883, 0)], False)
    ```
    """
    found = find(path)
    if found is None:
        raise ValueError(f"{path}: not Last.fm HetRec 2011 2K. Give the folder with artists.dat and {_LISTENS}.")
    folder = path if path.is_dir() else path.parent
    artists = _read(folder / "artists.dat", {"id": pl.Int64, "name": pl.String})
    artists = artists.rename({"id": "item_id", "name": "title"})
    listens = _read(folder / _LISTENS, {"userID": pl.Int64, "artistID": pl.Int64, "weight": pl.Int64})
    listens = listens.rename({"userID": "user_id", "artistID": "item_id"})
    if not (folder / _TAGGINGS).is_file():
        return make_log(listens, artists, found, "artist")
    columns = dict.fromkeys(("userID", "artistID", "tagID", "timestamp"), pl.Int64)
    taggings = _read(folder / _TAGGINGS, columns).rename({"userID": "user_id", "artistID": "item_id"})
    if (folder / "tags.dat").is_file():
        artists = artists.join(_commonest_tags(folder, taggings), on="item_id", how="left")
    dated = Counted(taggings, {}).without(pl.col("timestamp") < _BEGINNING, "taggings dated before Last.fm began")
    events = dated.frame.group_by("user_id", "item_id").agg(pl.col("timestamp").min())
    undated = listens.join(events, on=("user_id", "item_id"), how="anti").height
    notes = dated.notes | ({"listens without a tag, which have no time": undated} if undated else {})
    return make_log(events.join(listens, on=("user_id", "item_id"), how="left"), artists, found, "artist", notes)


def _read(path: Path, columns: dict) -> pl.DataFrame:
    return read_delimited(path, "\t", columns, quote=None)


def _commonest_tags(folder: Path, taggings: pl.DataFrame) -> pl.DataFrame:
    columns = {"tagID": pl.Int64, "tagValue": pl.String}
    tags = read_delimited(folder / "tags.dat", "\t", columns, encoding="latin-1", quote=None).drop_nulls()
    counts = taggings.join(tags, on="tagID").group_by("item_id", "tagValue").len()
    # By name last: artists of few tags have many ties
    commonest = counts.sort("item_id", "len", "tagValue", descending=[False, True, False])
    return commonest.group_by("item_id").agg(pl.col("tagValue").head(_MOST_TAGS).alias("tags"))
