"""RecBole's atomic files: `NAME.inter` and `NAME.item`, tables between tabs whose header gives types (`user_id:token`)."""

from pathlib import Path

import polars as pl

from ..log import InteractionLog, make_log
from .delimited import column_names, read_delimited
from .movielens import turn_articles


NAMES = ("recbole",)

_TITLES = (
    "title",
    "movie_title",
    "item_title",
    "product_title",
    "book_title",
    "name",
    "item_name",
    "app_name",
    "artist_name",
)


def find(path: Path) -> str | None:
    """
    What `path` is taken for, or `None` if it holds no `.inter` file.

    Args:
        path (`Path`):
            The folder, or the `.inter` file.

    Returns:
        `str` or `None`

    Example:

    ```python
    >>> import tempfile
    >>> from pathlib import Path
    >>> from trl_dmpo.data.sources import recbole

    >>> folder = Path(tempfile.mkdtemp())
    >>> (folder / "ml-100k.inter").touch()
    >>> recbole.find(folder)
    'RecBole atomic files (ml-100k.inter)'
    ```
    """
    files = _interaction_files(path)
    return f"RecBole atomic files ({', '.join(file.name for file in files)})" if files else None


def _interaction_files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(path.glob("*.inter"))
    return [path] if path.suffix == ".inter" else []


def read(path: Path) -> InteractionLog:
    """
    The interactions and items of a data set in RecBole's form.

    The item is the column of tokens that both files have. Its title is text; other columns of tokens become features, and
    those of several tokens (`token_seq`) lists.

    Args:
        path (`Path`):
            The folder, or the `.inter` file. The `.item` file of the same name lies beside it.

    Returns:
        [`InteractionLog`]

    Raises:
        `ValueError`: there are several `.inter` files, there is no `.item` file or no title in it, or a file is broken.

    Example:

    ```python
    >>> import tempfile
    >>> from pathlib import Path
    >>> from trl_dmpo.data.sources import recbole

    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "ml.inter").write_text("user_id:token\\titem_id:token\\trating:float\\n196\\t1\\t3\\n")
    >>> _ = (folder / "ml.item").write_text("item_id:token\\tmovie_title:token_seq\\tclass:token_seq\\n1\\tBig\\tDrama War\\n")
    >>> recbole.read(folder).items.rows()
    [(1, 'Big', ['Drama', 'War'])]
    ```
    """
    files = _interaction_files(path)
    if len(files) != 1:
        names = f"the .inter files {', '.join(file.name for file in files)}" if files else "no .inter file"
        raise ValueError(f"{path}: there are {names}. Give the one to read.")
    texts = files[0].with_suffix(".item")
    if not texts.is_file():
        raise ValueError(f"{texts}: there is no such file, and so there are no titles. Put it beside {files[0].name}.")
    kinds, item_kinds = _kinds(files[0]), _kinds(texts)
    item = _item_column(files[0], kinds, item_kinds)
    interactions = _read_interactions(files[0], kinds, item)
    items, title = _read_items(texts, item_kinds, item)
    film = texts.stem.startswith("ml-") or texts.parent.name.startswith("ml-") or not _FILM.isdisjoint(item_kinds)
    if film:
        items = items.with_columns(turn_articles(pl.col("title")))
    source = f"RecBole atomic files ({files[0].name}, {texts.name}; titles from {title})"
    return make_log(interactions, items, source, "film" if film else "item")


_FILM = {"class", "genre", "genres"}


def _kinds(path: Path) -> dict[str, str]:
    """From the name of a column to its type in the header."""
    header = [name.partition(":") for name in column_names(path, "\t", quote=None)]
    untyped = [name for name, _, kind in header if not kind]
    if untyped:
        raise ValueError(
            f"{path}, line 1: the columns {', '.join(map(repr, untyped))} have no type. RecBole's headers read "
            f"`user_id:token`, with tabs between them; other tables are read with `columns=`."
        )
    return {name: kind for name, _, kind in header}


def _item_column(path: Path, kinds: dict[str, str], item_kinds: dict[str, str]) -> str:
    for name, kind in kinds.items():
        if kind == "token" and name in item_kinds and name != "user_id":
            return name
    raise ValueError(
        f"{path}: none of its columns of tokens ({', '.join(kinds)}) is in the .item file ({', '.join(item_kinds)}). "
        f"Name the column of items alike in both."
    )


def _read_interactions(path: Path, kinds: dict[str, str], item: str) -> pl.DataFrame:
    users = [name for name, kind in kinds.items() if kind == "token" and name != item]
    if not users:
        raise ValueError(f"{path}: there is no column of users, only: {', '.join(kinds)}. Add `user_id:token`.")
    user = "user_id" if "user_id" in users else users[0]
    numbers = [name for name in ("timestamp", "rating") if name in kinds]
    columns = {user: None, item: None} | dict.fromkeys(numbers, pl.Float64)
    table = read_delimited(path, "\t", {f"{name}:{kinds[name]}": dtype for name, dtype in columns.items()}, quote=None)
    return table.select(
        pl.col(f"{user}:{kinds[user]}").alias("user_id"),
        pl.col(f"{item}:{kinds[item]}").alias("item_id"),
        *(pl.col(f"{name}:{kinds[name]}").alias(name) for name in numbers),
    )


def _read_items(path: Path, kinds: dict[str, str], item: str) -> tuple[pl.DataFrame, str]:
    """The items, and the name of the column that the titles are from."""
    title = next((name for name in _TITLES if name in kinds), None)
    if title is None:
        raise ValueError(
            f"{path}: there is no column of titles, only: {', '.join(kinds)}. Rename the one that holds them to 'title'."
        )
    texts = [name for name, kind in kinds.items() if kind in ("token", "token_seq") and name not in (item, title)]
    types = {f"{name}:{kinds[name]}": pl.String for name in (title, *texts)}
    table = read_delimited(path, "\t", {f"{item}:{kinds[item]}": None, **types}, quote=None)
    table = table.rename({name: name.partition(":")[0] for name in table.columns})
    table = table.rename({item: "item_id", title: "title"})
    return table.with_columns(_tokens(table[name]) for name in texts if kinds[name] == "token_seq"), title


def _tokens(texts: pl.Series) -> pl.Series:
    # RecBole splits at spaces; a few of its data sets are written with commas, which tell apart "Slice of Life, Drama"
    separator = ", " if texts.str.contains(", ", literal=True).any() else " "
    return texts.fill_null("").str.split(separator).list.eval(pl.element().filter(pl.element() != ""))
