"""
What publishers ship, read into an [`InteractionLog`]. One source, one file: a module with `NAMES`, `find` and `read`.
"""

import difflib
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from ..log import InteractionLog
from . import amazon, goodbooks, goodreads, lastfm, movielens, recbole, steam, tabular


logger = logging.getLogger(__name__)

# In the order in which a path is shown to them
_MODULES = (movielens, amazon, lastfm, steam, goodreads, goodbooks, recbole, tabular)

SOURCES: dict[str, ModuleType] = {name: module for module in _MODULES for name in module.NAMES}

# Who reads items from elsewhere, or lets columns be named
_TAKES = {amazon: ("items",), tabular: ("items", "columns")}

_ARCHIVES = (".zip", ".tar", ".tgz", ".bz2", ".7z", ".rar")


def load_interactions(
    source: Any,
    format: str | None = None,
    *,
    items: Any = None,
    columns: Mapping[str, str] | None = None,
    domain: str | None = None,
) -> InteractionLog:
    """
    An interaction log, from what a publisher ships or from a table of one's own.

    Args:
        source (`str`, `Path`, `pl.DataFrame`, `pl.LazyFrame`, `pandas.DataFrame` or `datasets.Dataset`):
            A folder or file, known by its names and columns, or a table of interactions.
        format (`str`, *optional*):
            A key of `SOURCES`: what to take `source` for.
        items (the same types, *optional*):
            The items, if they lie elsewhere: of a table, or the metadata of Amazon Reviews.
        columns (`Mapping[str, str]`, *optional*):
            What a table calls `user_id`, `item_id`, `timestamp`, `rating`, `impressions` and `title`.
        domain (`str`, *optional*):
            What kind of thing an item is, such as `"film"` or `"book"`. Known for most sources.

    Returns:
        [`InteractionLog`]: its `source` says what it was taken for.

    Raises:
        `FileNotFoundError`: there is no such path.
        `ValueError`: it is not recognised, or taken for several things, or what it holds is broken.

    Example:

    ```python
    >>> import polars as pl
    >>> from trl_dmpo.data.sources import load_interactions

    >>> table = pl.DataFrame({"reviewer": ["ann", "ann"], "asin": ["B7", "B8"], "when": [2, 1], "name": ["Big", "Heat"]})
    >>> mapping = {"user_id": "reviewer", "item_id": "asin", "timestamp": "when", "title": "name"}
    >>> log = load_interactions(table, columns=mapping, domain="film")
    >>> print(log)
    a table (a frame): 2 interactions of 1 users with 2 items
    >>> log.interactions["item_id"].to_list()
    ['B8', 'B7']
    ```
    """
    module = _named(format)
    source, items = _as_path_or_frame(source), None if items is None else _as_path_or_frame(items)
    if module is None:
        module = _choose(source, items, columns)
    given = {"items": items, "columns": columns}
    options = {name: value for name, value in given.items() if value is not None}
    for name in options:
        if name not in _TAKES.get(module, ()):
            raise ValueError(
                f"{name}= has no meaning for {_name(module)}, which knows where things are. Leave it out."
            )
    if not isinstance(source, Path) and module not in _TAKES:
        raise ValueError(f"{_name(module)} is read from a folder or file, not from a frame. Give its path.")
    log = module.read(source, **options)
    logger.info("%s was taken for %s", source if isinstance(source, Path) else "The table", log.source)
    return log if domain is None else replace(log, domain=domain)


def _named(format: str | None) -> ModuleType | None:
    if format is not None and format not in SOURCES:
        raise ValueError(f"There is no format {format!r}. Give one of: {', '.join(SOURCES)}.")
    return None if format is None else SOURCES[format]


def _name(module: ModuleType) -> str:
    return module.NAMES[0]


def _as_path_or_frame(source: Any) -> Any:
    if not isinstance(source, (str, Path)):
        return tabular.as_frame(source)
    path = Path(source).expanduser()
    if path.exists():
        return path
    parent = next(folder for folder in path.absolute().parents if folder.is_dir())
    missing = path.absolute().relative_to(parent).parts[0]
    here = sorted(entry.name for entry in parent.iterdir())
    alike = difflib.get_close_matches(missing, here, n=3)
    hint = f"did you mean {' or '.join(map(repr, alike))}?" if alike else "there is nothing with such a name."
    raise FileNotFoundError(f"{path}: there is no such file or folder. In {parent}, {hint}")


def _choose(source: Any, items: Any, columns: Mapping[str, str] | None) -> ModuleType:
    if columns is not None:
        return tabular
    if not isinstance(source, Path):
        return amazon if amazon.is_hub_dataset(source.collect_schema().names()) else tabular
    found = {module: taken for module in _MODULES if (taken := module.find(source)) is not None}
    if len(found) == 1:
        return next(iter(found))
    if found:
        known = "; ".join(f"{taken} (format={_name(module)!r})" for module, taken in found.items())
        raise ValueError(f"{source}: may be taken for {known}. Say which by format=.")
    if items is not None or tabular.is_table(source):
        # It knows what is missing for a table
        return tabular
    raise ValueError(_unrecognised(source))


def _unrecognised(path: Path) -> str:
    if path.is_file() and path.suffix in _ARCHIVES:
        return f"{path}: this is an archive. Unpack it, and give the folder."
    here = sorted(entry.name + "/" * entry.is_dir() for entry in path.iterdir()) if path.is_dir() else [path.name]
    shown = ", ".join(here[:10]) + (f" and {len(here) - 10} more" if len(here) > 10 else "")
    looks = "\n".join(f"- {_name(module)}: {(module.__doc__ or '').strip().splitlines()[0]}" for module in _MODULES)
    return (
        f"{path}: not recognised. It holds {shown or 'nothing'}.\nThese are:\n{looks}\nGive the folder itself, or say what it is "
        f"by format=; a table with other columns is read with columns={{'user_id': '...', 'item_id': '...', 'title': '...'}}."
    )
