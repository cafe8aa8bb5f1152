"""Records of a file: JSON arrays, JSON lines, CSV and parquet; text also compressed with gzip."""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import polars as pl


def read_records(path: Path) -> list[dict[str, Any]]:
    """
    The records of a file, as dictionaries.

    Args:
        path (`Path`):
            A `.json` (an array, or one record a line), `.jsonl`, `.ndjson`, `.csv`, `.tsv` or `.parquet` file; all but the
            last may end in `.gz`. Values of a CSV file are strings, empty ones `None`.

    Raises:
        `FileNotFoundError`: there is no such file.
        `ValueError`: it is none of these, or it is cut off or malformed.
    """
    _require_file(path)
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    reader = _READERS.get(suffix.lower())
    if reader is None:
        raise ValueError(f"{path}: files of this kind cannot be read. It is one of: {', '.join(_READERS)}.")
    return reader(path)


def _require_file(path: Path) -> None:
    if path.is_dir():
        files = ", ".join(sorted(child.name for child in path.iterdir())[:8]) or "nothing"
        raise ValueError(f"{path} is a folder; give a file. It holds: {files}.")
    if not path.is_file():
        beside = [child.name for child in path.parent.iterdir()] if path.parent.is_dir() else []
        similar = get_close_matches(path.name, beside)
        hint = f" Did you mean {similar[0]}?" if similar else ""
        raise FileNotFoundError(f"There is no file {path}.{hint}")


def _read_text(path: Path) -> str:
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return raw.decode("utf-8-sig")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: the compressed file is cut off or damaged ({error}). Get it again.") from error
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        cut = error.reason == "unexpected end of data"
        what = "cut off within a character. Get the file again" if cut else "not UTF-8. Convert the file to UTF-8"
        raise ValueError(f"{path}, line {line}: {what}.") from error


def _read_json(path: Path) -> list[Any]:
    text = _read_text(path)
    if not text.lstrip().startswith("["):
        return _read_json_lines(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        whole = _count_whole(text)
        where = f" at line {error.lineno}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        raise ValueError(
            f"{path}: cut off or malformed{where} ({_reason(error)}). The first {whole} rows "
            f"are whole, {path.name}[{whole}] is not. Mend it, or get the file again."
        ) from error


def _count_whole(text: str) -> int:
    """How many values of a JSON array come before the first that is broken."""
    decoder = json.JSONDecoder()
    position, count = text.index("[") + 1, 0
    while True:
        while text[position : position + 1] in {",", " ", "\t", "\r", "\n"}:
            position += 1
        try:
            _, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            return count
        count += 1


def _reason(error: Exception) -> str:
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)


def _read_json_lines(path: Path) -> list[Any]:
    records = []
    # Not `splitlines`: a JSON string may hold other line separators than these
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            records.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            where = f", column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
            raise ValueError(
                f"{path}, line {number} (row {path.name}[{len(records)}]): cut off or malformed JSON ({_reason(error)}{where}). "
                f"Mend it, or get the file again."
            ) from error
    return records


def _read_delimited(path: Path) -> list[dict[str, Any]]:
    separator = "\t" if ".tsv" in path.suffixes else ","
    # Line ends stay as they are: a quoted value may hold some
    reader = csv.reader(io.StringIO(_read_text(path), newline=""), delimiter=separator, strict=True)
    records: list[dict[str, Any]] = []
    try:
        header = next(reader, [])
        for values in reader:
            if not values:
                continue
            if len(values) != len(header):
                raise ValueError(
                    f"{path}, line {reader.line_num} (row {path.name}[{len(records)}]): {len(values)} values for "
                    f"{len(header)} columns. Mend it; the file may be cut off there."
                )
            records.append({name: value or None for name, value in zip(header, values, strict=True)})
    except csv.Error as error:
        raise ValueError(
            f"{path}, line {reader.line_num} (row {path.name}[{len(records)}]): {error}. Mend it; the file may be cut off there."
        ) from error
    return records


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    try:
        return pl.read_parquet(path, glob=False).to_dicts()
    except (pl.exceptions.PolarsError, OSError) as error:
        raise ValueError(f"{path}: not a whole parquet file ({error}). Get it again.") from error


_READERS: dict[str, Callable[[Path], list[Any]]] = {
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".csv": _read_delimited,
    ".tsv": _read_delimited,
    ".parquet": _read_parquet,
}
