"""Files with one JSON object a line, and "loose" ones, whose lines are Python dicts as `print` writes them."""

import ast
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from json.encoder import encode_basestring_ascii
from pathlib import Path
from typing import Any

import polars as pl


_BLOCK = 1 << 24
_BOM = b"\xef\xbb\xbf"

# What differs between the text of a Python dict and JSON: strings, and the names of three constants
_PYTHON = re.compile(r"""u?('[^'\\\n]*(?:\\.[^'\\\n]*)*'|"[^"\\\n]*(?:\\.[^"\\\n]*)*")|True|False|None""")
_CONSTANTS = {"True": "true", "False": "false", "None": "null"}


def scan_json_lines(path: Path, columns: Mapping[str, Any]) -> pl.LazyFrame:
    """
    The named columns of a file of JSON lines.

    What a line does not have is null, what else it has is not read, and blank lines are left out. The file is read here and
    now, some megabytes at a time: what is wrong with it is told at once, and memory holds the named columns only.

    Args:
        path (`Path`):
            The file, plain or `.gz`.
        columns (`Mapping[str, Any]`):
            From name to polars type. Numbers, lists and objects in a column of strings are kept as text.

    Returns:
        `pl.LazyFrame`

    Raises:
        `ValueError`: the file is empty or cut off, a line is not a JSON object, or a value does not fit its column.

    Example:

    ```python
    >>> import tempfile
    >>> from pathlib import Path
    >>> import polars as pl
    >>> from trl_dmpo.data.sources.json_lines import scan_json_lines

    >>> path = Path(tempfile.mkdtemp(), "reviews.jsonl")
    >>> _ = path.write_text('{"user_id": "a", "rating": 4, "text": "Fine."}\\n{"user_id": "b"}\\n')
    >>> scan_json_lines(path, {"user_id": pl.String, "rating": pl.Float64}).collect().rows()
    [('a', 4.0), ('b', None)]
    ```
    """
    return pl.concat([_parse(block, line, path, columns) for line, block in _blocks(path)]).lazy()


def read_loose_json_lines(path: Path, columns: Mapping[str, Any]) -> pl.DataFrame:
    """
    The named columns of a file whose lines are Python dicts, JSON objects, or some of each.

    No program reads such lines as fast as JSON: it takes about half a minute a million lines.

    Args:
        path (`Path`):
            The file, plain or `.gz`.
        columns (`Mapping[str, Any]`):
            As of [`scan_json_lines`].

    Returns:
        `pl.DataFrame`

    Raises:
        `ValueError`: the file is empty or cut off, a line is neither a Python dict nor a JSON object, or a value does not fit
            its column.

    Example:

    ```python
    >>> import tempfile
    >>> from pathlib import Path
    >>> import polars as pl
    >>> from trl_dmpo.data.sources.json_lines import read_loose_json_lines

    >>> path = Path(tempfile.mkdtemp(), "games.json")
    >>> _ = path.write_text("{u'id': u'10', u'title': u\\"Garry's Mod\\", 'early_access': False}\\n")
    >>> read_loose_json_lines(path, {"id": pl.String, "title": pl.String}).rows()
    [('10', "Garry's Mod")]
    ```
    """
    return pl.concat([_parse_loosely(block, line, path, columns) for line, block in _blocks(path)])


def _blocks(path: Path) -> Iterator[tuple[int, bytes]]:
    """The file as blocks of whole lines, each with the number of its first line; a bar if that takes long."""
    from tqdm import tqdm

    line, rest = 1, b""
    size = path.stat().st_size
    with path.open("rb") as raw, tqdm(desc=path.name, total=size, delay=1, unit="B", unit_scale=True) as bar:
        file: Any = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
        try:
            while read := file.read(_BLOCK):
                bar.update(raw.tell() - bar.n)
                block, end, rest = (rest + read).rpartition(b"\n")
                if end:
                    yield line, block.removeprefix(_BOM) if line == 1 else block
                    line += block.count(b"\n") + 1
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(
                f"{path}: in line {line} or after it, the compressed data is cut off or broken ({error}). Get the file again."
            ) from error
    if rest:
        yield line, rest.removeprefix(_BOM) if line == 1 else rest
    elif line == 1:
        raise ValueError(f"{path}: the file is empty. Get it again.")


def _parse(block: bytes, line: int, path: Path, columns: Mapping[str, Any]) -> pl.DataFrame:
    # Blank lines are more than polars 1.31 bears
    text = re.sub(rb"\n\s*\n", b"\n", block).strip()
    if not text:
        return pl.DataFrame(schema=dict(columns))
    try:
        return pl.read_ndjson(io.BytesIO(text), schema=dict(columns))
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        for number, one in enumerate(block.split(b"\n"), line):
            if one.strip() and (fault := _fault(one, columns)):
                raise ValueError(f"{path}, line {number}: {fault}") from error
        raise ValueError(f"{path}, line {line} or after it: {error}. Mend or remove it.") from error


def _fault(line: bytes, columns: Mapping[str, Any]) -> str | None:
    """What is wrong with a line, if anything. Slow: for when reading has failed."""
    try:
        row = json.loads(line, parse_constant=int)  # NaN is not JSON, nor an integer
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        return _not_an_object(line, "a JSON object")
    for name, dtype in columns.items():
        try:
            pl.read_ndjson(io.BytesIO(json.dumps({name: row.get(name)}).encode()), schema={name: dtype})
        except (pl.exceptions.PolarsError, pl.exceptions.PanicException):
            return f"{name} {_show(row[name])} is not of type {dtype}. Mend or remove the line."
    return None


def _not_an_object(line: bytes, what: str) -> str:
    text = line.decode(errors="replace").strip()
    return f"{_show(text)} is not {what}. Mend or remove the line or, if the file is cut off, get it again."


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:50]}...{text[-27:]}"


def _parse_loosely(block: bytes, line: int, path: Path, columns: Mapping[str, Any]) -> pl.DataFrame:
    try:
        # Most of what Python prints is JSON but for its quotes: four times as fast as Python's own parser
        return _parse(_PYTHON.sub(_as_json, block.decode()).encode(), line, path, columns)
    except (ValueError, SyntaxError):
        lines = [_as_json_line(one, number, path, columns) for number, one in enumerate(block.split(b"\n"), line)]
        return _parse("\n".join(lines).encode(), line, path, columns)


def _as_json(match: re.Match[str]) -> str:
    quoted = match[1]
    if quoted is None:
        return _CONSTANTS[match[0]]
    text = quoted[1:-1]
    if "\\" not in text:
        return encode_basestring_ascii(text)
    if "\\\\" in text or (quoted[0] == "'" and '\\"' in text):
        return encode_basestring_ascii(_unquote(quoted))
    text = text.replace("\\'", "'").replace("\\x", "\\u00")
    return f'"{text}"' if quoted[0] == '"' else '"' + text.replace('"', '\\"') + '"'


def _unquote(quoted: str) -> str:
    try:
        return json.loads(quoted)
    except ValueError:
        return ast.literal_eval(quoted)


def _as_json_line(line: bytes, number: int, path: Path, columns: Mapping[str, Any]) -> str:
    """The slow way, which knows what is wrong with a line."""
    if not line.strip():
        return ""
    try:
        row = _read_object(line.decode().strip())
        return json.dumps({name: row.get(name) for name in columns}, allow_nan=False)
    except (ValueError, SyntaxError, TypeError, AttributeError, MemoryError, RecursionError) as error:
        fault = _not_an_object(line, "a Python dict or a JSON object")
        raise ValueError(f"{path}, line {number}: {fault}") from error


def _read_object(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_nothing)
    except ValueError:
        return ast.literal_eval(text)


def _nothing(constant: str) -> None:
    """NaN and the infinities stand for what is missing."""
