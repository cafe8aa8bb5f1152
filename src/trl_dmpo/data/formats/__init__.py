"""Rows that exist already, in the forms in which they are published. One format, one file; `FORMATS` names them."""

import inspect
import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..prompts import Domain
from ..schema import Problem, as_list, find_fault, find_problem, is_message_list, is_several
from . import columns, dmpo, llara, minionerec, pairs, rows, scored, tallrec
from .files import read_records


if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

# In the order in which they are tried. A format has `LOOKS`, for people to read, `recognise(record)`, asked about the first
# record, and `read(records, notes, ...)`, whose other parameters are the options that it takes
FORMATS: dict[str, ModuleType] = {
    "llara": llara,
    "dmpo": dmpo,
    "tallrec": tallrec,
    "minionerec": minionerec,
    "rejected_columns": columns,
    "scored": scored,
    "rows": rows,
    "pairs": pairs,
}

_DOMAINS_OF_FILES = {"lastfm": "artist", "movielens": "film", "steam": "game", "goodreads": "book"}


def load_rows(
    source: "str | Path | list[dict] | Dataset",
    format: str | None = None,
    *,
    chat: bool = False,
    domain: str | Domain | None = None,
    grouped: bool = False,
    negatives: int | None = None,
    seed: int = 0,
    ties: str = "drop",
    on_invalid_row: str = "raise",
) -> "Dataset":
    """
    Rows that exist already, as rows of the trainer.

    What the source was taken for, how many rows it gave, and what was left out or changed, by reason, is logged and stands in
    `info.description` of the result.

    Args:
        source (`str`, `Path`, `list[dict]` or [`~datasets.Dataset`]):
            A file (JSON array, JSON lines or CSV, also as `.gz`, or parquet), or records.
        format (`str`, *optional*):
            A key of `FORMATS`: `"llara"`, `"dmpo"`, `"tallrec"`, `"minionerec"`, `"rejected_columns"`, `"scored"`, `"rows"`
            or `"pairs"`. By default the first that recognises the first record.
        chat (`bool`, *optional*, defaults to `False`):
            Whether to write messages instead of text. For `llara`, `dmpo`, `tallrec`, `minionerec` and `scored`; the others
            are kept as they are.
        domain (`str` or [`Domain`], *optional*):
            Words for the items, a key of `DOMAINS`. For `llara` and `minionerec`. By default from the name of the file
            (`lastfm`, `movielens`, `steam`, `goodreads`), or else `"item"`.
        grouped (`bool`, *optional*, defaults to `False`):
            Whether to make one row of all that share a history and a chosen title, asking for a title instead of an order.
            For `dmpo`.
        negatives (`int`, *optional*):
            How many titles to draw for a row. For `minionerec`, which needs it.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draws. For `minionerec`.
        ties (`str`, *optional*, defaults to `"drop"`):
            Whether to `"drop"` answers with the same score as the chosen one, or to `"keep"` them as rejected ones. For
            `scored`.
        on_invalid_row (`str`, *optional*, defaults to `"raise"`):
            What to do with a record that no row can be made of: `"raise"` an error, or `"drop"` and count it.

    Returns:
        [`~datasets.Dataset`]: `prompt`, `chosen`, `rejected` (a list), for a prompt that lists its answers `candidates` (all of
        them, in the order of the prompt), and the columns that the format does not use.

    Raises:
        `FileNotFoundError`: there is no such file.
        `ValueError`: a file is cut off, malformed or of an unknown kind, no format recognises the records, an option is not
        for this format, a record cannot be used and `on_invalid_row="raise"`, or no row is left.

    Example:

    ```python
    >>> from trl_dmpo.data.formats import load_rows

    >>> rows = load_rows(
    ...     [
    ...         {"prompt": "Seen: Alien. Next:", "chosen": " Aliens", "rejected": " Heat"},
    ...         {"prompt": "Seen: Alien. Next:", "chosen": " Aliens", "rejected": " Big"},
    ...     ]
    ... )
    >>> rows[0]
    {'prompt': 'Seen: Alien. Next:', 'chosen': ' Aliens', 'rejected': [' Heat', ' Big']}
    >>> rows.info.description
    'list: 1 row from 2 records, read as pairs: TRL preference pairs (prompt, chosen, rejected: one answer).'
    ```
    """
    _require_one_of("on_invalid_row", on_invalid_row, ("raise", "drop"))
    _require_one_of("ties", ties, ("drop", "keep"))
    if negatives is not None and negatives < 1:
        raise ValueError(f"`negatives` must be at least 1, got {negatives}.")
    name, records = _open(source)
    problems = _find_faults(records)
    places = [index for index in range(len(records)) if index not in problems]
    if not places:
        raise ValueError(_complain(name, problems, len(records)))
    readable = [records[place] for place in places]
    found = format or _recognise(readable[0], f"{name}[{places[0]}]")
    _require_one_of("format", found, FORMATS)
    given = {"chat": chat, "domain": domain, "grouped": grouped, "negatives": negatives, "seed": seed, "ties": ties}
    options = _options_for(found, given, name)
    notes: Counter[str] = Counter()
    kept, unusable = _sort_out(FORMATS[found].read(readable, notes, **options))
    problems |= {places[index]: problem for index, problem in unusable.items()}
    told = _tell(name, found, len(kept), len(records), notes, problems)
    if problems and on_invalid_row == "raise":
        raise ValueError(f"{_complain(name, problems, len(records))} To leave them out, set `on_invalid_row='drop'`.")
    if not kept:
        raise ValueError(f"{told} No row is left.")
    logger.log(logging.WARNING if problems else logging.INFO, told)
    return _make_dataset(kept, name, told)


def _require_one_of(option: str, value: str, known: Iterable[str]) -> None:
    if value not in known:
        raise ValueError(f"`{option}` must be one of {', '.join(map(repr, known))}, got {value!r}.")


def _open(source: Any) -> tuple[str, list[Any]]:
    """A name for messages, and the records."""
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        name, records = path.name, read_records(path)
    elif isinstance(source, Mapping):
        raise ValueError(f"This holds several datasets; give one of them: {', '.join(map(str, source))}.")
    elif isinstance(source, list) or (hasattr(source, "column_names") and hasattr(source, "__len__")):
        plain = source if isinstance(source, list) else source.with_format(None)
        name, records = type(source).__name__.lower(), list(plain)
    else:
        raise ValueError(f"Rows come from a file, a list or a `datasets.Dataset`, not from {type(source).__name__}.")
    if not records:
        raise ValueError(f"{name}: there are no rows.")
    for index, record in enumerate(records):
        if not isinstance(record, Mapping):
            raise ValueError(f"{name}[{index}] has no named values, it is of type {type(record).__name__}. Mend it.")
    return name, records


def _find_faults(records: list[Any]) -> dict[int, Problem]:
    """By place, the records with a value that no table holds, whatever their format."""
    faults: dict[int, Problem] = {}
    for index, record in enumerate(records):
        for column, value in record.items():
            if (fault := find_fault({column: value})) is not None:
                faults[index] = Problem("unreadable", str(column), f"it {fault}")
                break
    return faults


def _recognise(record: Mapping[str, Any], name: str) -> str:
    for format, module in FORMATS.items():
        if module.recognise(record):
            return format
    looks = "\n".join(f"- {format}: {module.LOOKS}" for format, module in FORMATS.items())
    have = ", ".join(record)
    raise ValueError(
        f"{name} is of no known format, it has: {have}. Rename its columns, or set `format` to one of these:\n{looks}"
    )


def _options_for(format: str, given: dict[str, Any], name: str) -> dict[str, Any]:
    """The options that are given, all of which the format must take."""
    defaults = inspect.signature(load_rows).parameters
    takes = inspect.signature(FORMATS[format].read).parameters
    options = {option: value for option, value in given.items() if value != defaults[option].default}
    for option in options:
        if option not in takes:
            have = ", ".join(f"`{each}`" for each in given if each in takes) or "none"
            raise ValueError(
                f"`{option}` is not for the format {format!r}, which {name} is read as. It takes: {have}."
            )
    if "domain" in takes and "domain" not in options:
        guessed = next((domain for part, domain in _DOMAINS_OF_FILES.items() if part in name.lower()), None)
        options |= {"domain": guessed} if guessed else {}
    return options


def _sort_out(outcomes: Iterable[tuple[int, dict[str, Any] | Problem]]) -> tuple[list[dict], dict[int, Problem]]:
    """The rows that keep the contract and are alike, and why there is none for the other records."""
    found = list(outcomes)
    prompted = any(isinstance(row, dict) and "prompt" in row for _, row in found)
    kept: list[dict[str, Any]] = []
    problems: dict[int, Problem] = {}
    for index, row in found:
        problem = row if isinstance(row, Problem) else _find_odd(row, prompted, (kept or [row])[0])
        if problem is not None:
            problems[index] = problem
        elif isinstance(row, dict):
            kept.append(row)
    return kept, problems


def _find_odd(row: dict[str, Any], prompted: bool, first: dict[str, Any]) -> Problem | None:
    """Why a row breaks the contract, or is not like the others."""
    if (problem := find_problem(row)) is not None:
        return problem
    if prompted and "prompt" not in row:
        return Problem("no value", "prompt", "other rows have one; fill it in, or leave it out of all rows")
    if is_several(row["chosen"]) != is_several(first["chosen"]):
        return Problem(
            "one and several chosen mixed", "chosen", "it is not as in the first row; make all of them lists"
        )
    if is_message_list(as_list(row["chosen"])[0]) != is_message_list(as_list(first["chosen"])[0]):
        return Problem("text and messages mixed", "chosen", "it is not as in the first row; use one of the two")
    return None


def _complain(name: str, problems: Mapping[int, Problem], records: int) -> str:
    first = min(problems)
    return (
        f"{name}[{first}], column {problems[first].column!r}: {problems[first].detail}. In all, {len(problems)} of {records} "
        f"records cannot be used: {_counts(problems)}."
    )


def _counts(problems: Mapping[int, Problem]) -> str:
    counts = Counter(problem.reason for problem in problems.values())
    return ", ".join(f"{count:,} {reason}" for reason, count in counts.most_common())


def _tell(
    name: str, format: str, kept: int, records: int, notes: Mapping[str, int], problems: Mapping[int, Problem]
) -> str:
    """One line on what was read."""
    rows = f"{kept:,} row{'s' * (kept != 1)} from {records:,} record{'s' * (records != 1)}"
    told = f"{name}: {rows}, read as {format}: {FORMATS[format].LOOKS}."
    if notes:
        told += f" Noted: {'; '.join(f'{count:,} {note}' for note, count in notes.items())}."
    if problems:
        told += f" Dropped: {_counts(problems)}."
    return told


def _make_dataset(kept: list[dict[str, Any]], name: str, told: str) -> "Dataset":
    from datasets import Dataset, DatasetInfo

    # Not only the columns of the first row
    names = list(dict.fromkeys(column for row in kept for column in row))
    table = {column: [row.get(column) for row in kept] for column in names}
    try:
        return Dataset.from_dict(table, info=DatasetInfo(description=told))
    except Exception as error:  # of any type: of Arrow, of Python, or of what the user's values are
        columns = (column for column, values in table.items() if not _is_of_one_type(column, values))
        column = next(columns, "all")
        raise ValueError(f"{name}, column {column!r}: its values are not of one type ({error}). Mend it.") from error


def _is_of_one_type(column: str, values: list[Any]) -> bool:
    from datasets import Dataset

    try:
        Dataset.from_dict({column: values})
    except Exception:
        return False
    return True
