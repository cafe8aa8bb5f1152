"""Files of users: whose histories to recommend for, and what was recommended. Whole, or not there."""

import json
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple


if TYPE_CHECKING:
    import polars as pl

    from trl_dmpo.ranking.recommender import Recommendations


OUTPUTS = (".jsonl", ".csv", ".parquet")


class Users(NamedTuple):
    """
    Users of a file.

    Args:
        histories (`list[list]`):
            Of each user the items, oldest first, by id or title.
        ids (`list`, *optional*):
            Their `user_id`, if the file has one.
    """

    histories: list[list]
    ids: list | None


def read_users(path: Path) -> Users:
    """
    The users of a file: JSON lines, JSON, CSV or parquet, with a column `history` and perhaps `user_id`.

    Args:
        path (`Path`):
            The file. In CSV, which has no lists, a history is a JSON list: `"[""Heat"", ""Big""]"`.

    Returns:
        [`Users`]

    Raises:
        `FileNotFoundError`: there is no such file.
        `ValueError`: it cannot be read, or a row is not of this form, which the message names.
    """
    from trl_dmpo.data.formats.files import read_records

    records = read_records(path)
    if not records:
        raise ValueError(f"`users`: {path} has no rows.")
    histories = [_read_history(record, f"{path.name}[{index}]") for index, record in enumerate(records)]
    if not any("user_id" in record for record in records):
        return Users(histories, None)
    ids = [record.get("user_id") for record in records]
    for index, user in enumerate(ids):
        if type(user) is not type(ids[0]) or not isinstance(user, (str, int)):
            raise ValueError(
                f"`users`: the `user_id` of {path.name}[{index}] is {user!r}. Make them all numbers, or all texts."
            )
    return Users(histories, ids)


def _read_history(record: Any, row: str) -> list:
    if not isinstance(record, dict) or "history" not in record:
        have = ", ".join(record) if isinstance(record, dict) else "no columns"
        raise ValueError(f"`users`: {row} has no `history`, only: {have}. Give a list of ids or titles there.")
    history = record["history"]
    if isinstance(history, str):
        with suppress(json.JSONDecodeError):  # then it is no list, as the check finds
            history = json.loads(history)
    if not isinstance(history, list) or any(type(item) not in (str, int) for item in history):
        raise ValueError(
            f"`users`: the `history` of {row} is {record['history']!r}, but it is a list of ids or titles."
        )
    return history


def check_output(path: Path, overwrite: bool) -> None:
    """
    Raise if recommendations cannot be written to `path`.

    Raises:
        `ValueError`: it is no kind of file that is written.
        `FileExistsError`: it is there, and is not to be replaced.
    """
    if path.suffix not in OUTPUTS:
        raise ValueError(f"`output`: {path} is not of a kind that is written. It is one of: {', '.join(OUTPUTS)}.")
    if path.is_dir() or (path.exists() and not overwrite):
        raise FileExistsError(f"`output`: {path} is there. Choose another file, or set `overwrite_output`.")


def write_recommendations(path: Path, users: Users, found: Sequence["Recommendations"], overwrite: bool) -> None:
    """
    Write a row for each user: `user_id` if there is one, and the lists `item_ids`, `titles` and `scores`, best first.

    Args:
        path (`Path`):
            A `.jsonl`, `.csv` or `.parquet` file. In CSV a list is a JSON list.
        users ([`Users`]):
            N users.
        found (`Sequence[Recommendations]`):
            What is recommended to each.
        overwrite (`bool`):
            Whether to replace a file that is there.

    Raises:
        `FileExistsError`: it is there, and is not to be replaced.
    """
    columns: dict[str, list] = {} if users.ids is None else {"user_id": users.ids}
    columns |= {
        "item_ids": [each.ids for each in found],
        "titles": [each.titles for each in found],
        "scores": [each.scores for each in found],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        aside = Path(folder) / path.name
        _WRITERS[path.suffix](columns, aside)
        check_output(path, overwrite)
        aside.replace(path)


def _write_json_lines(columns: dict[str, list], path: Path) -> None:
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    path.write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows), encoding="utf-8")


def _write_csv(columns: dict[str, list], path: Path) -> None:
    lists = {name: values for name, values in columns.items() if name != "user_id"}
    as_text = {name: [json.dumps(each, ensure_ascii=False) for each in values] for name, values in lists.items()}
    _frame(columns | as_text).write_csv(path)


def _write_parquet(columns: dict[str, list], path: Path) -> None:
    _frame(columns).write_parquet(path)


def _frame(columns: dict[str, list]) -> "pl.DataFrame":
    import polars as pl

    return pl.DataFrame(columns)


_WRITERS: dict[str, Callable[[dict[str, list], Path], None]] = {
    ".jsonl": _write_json_lines,
    ".csv": _write_csv,
    ".parquet": _write_parquet,
}
