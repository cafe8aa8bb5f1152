"""Files with one record a line and a separator between fields: CSV, TSV, and what publishers make of them."""

import csv
import gzip
import io
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import polars as pl


# Python's text decoders know more than polars; this one drops the byte order mark that spreadsheets write
UTF8 = "utf-8-sig"

# What may stand for a separator of several characters: polars takes one byte only, and no title holds this one
_UNIT = "\x1f"

# Integers that come back as the same text: an id "007" is not the id 7
_PLAIN_INTEGER = r"^(0|-?[1-9][0-9]{0,17})$"


def read_delimited(
    path: Path,
    separator: str,
    columns: Mapping[str, Any],
    *,
    header: bool = True,
    encoding: str = "utf-8",
    quote: str | None = '"',
) -> pl.DataFrame:
    """
    The named columns of a file, with everything that is wrong with the file told by its name and line.

    Empty fields are null, and so are fields missing from the end of a line other than the last. Blank lines are left out.

    Args:
        path (`Path`):
            The file, plain or `.gz`.
        separator (`str`):
            What stands between fields, one character or more.
        columns (`Mapping[str, Any]`):
            From name to polars type. `None` is for ids: integers where all are (and none has leading zeros), else strings.
            With a header, the columns to read; without, all columns of the file in their order.
        header (`bool`, *optional*, defaults to `True`):
            Whether the first line names the columns.
        encoding (`str`, *optional*, defaults to `"utf-8"`):
            `"utf-8"` or `"latin-1"`. A file that is valid UTF-8 is never taken for Latin-1: copies are often converted.
        quote (`str`, *optional*, defaults to `'"'`):
            What quotes a field. `None` if nothing does.

    Returns:
        `pl.DataFrame`: in the order of `columns`.

    Raises:
        `ValueError`: the file is empty, cut off or in another encoding, a column is missing, a line has more fields than
            there are columns, or a value is not a number in a column of numbers.

    Example:

    ```python
    >>> import tempfile
    >>> from pathlib import Path
    >>> import polars as pl
    >>> from trl_dmpo.data.sources.delimited import read_delimited

    >>> path = Path(tempfile.mkdtemp(), "movies.dat")
    >>> _ = path.write_text("1::Alien: Director's Cut::Horror|Sci-Fi\\n")
    >>> names = {"item_id": pl.Int64, "title": pl.String, "genres": pl.String}
    >>> read_delimited(path, "::", names, header=False, quote=None)["title"].to_list()
    ["Alien: Director's Cut"]
    ```
    """
    file = _File(path, separator, encoding, quote, header, tuple(columns))
    for column in columns:
        if column not in file.names:
            raise ValueError(f"{path}: there is no column {column!r}, only: {', '.join(file.names)}.")
    try:
        types = {**columns, **_types_of_ids(file, [name for name, dtype in columns.items() if dtype is None])}
        return _read(file, types)
    except (pl.exceptions.PolarsError, OSError) as error:
        types = {name: columns.get(name) or pl.String for name in file.names}
        raise ValueError(_fault(file, types) or f"{path}: {str(error).splitlines()[0]}") from error


def column_names(path: Path, separator: str = ",", encoding: str = "utf-8", quote: str | None = '"') -> list[str]:
    """
    The names in the first line of a file.

    Args:
        path (`Path`):
            The file, plain or `.gz`.
        separator (`str`, *optional*, defaults to `","`):
            What stands between fields.
        encoding (`str`, *optional*, defaults to `"utf-8"`):
            Of the file.
        quote (`str`, *optional*, defaults to `'"'`):
            What quotes a field.

    Returns:
        `list[str]`

    Raises:
        `ValueError`: the file is empty, broken or in another encoding.

    Example:

    ```python
    >>> import tempfile
    >>> from pathlib import Path
    >>> from trl_dmpo.data.sources.delimited import column_names

    >>> path = Path(tempfile.mkdtemp(), "ratings.csv")
    >>> _ = path.write_text("userId,movieId,rating,timestamp\\n")
    >>> column_names(path)
    ['userId', 'movieId', 'rating', 'timestamp']
    ```
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            line = file.readline().decode(UTF8 if encoding == "utf-8" else encoding).rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise ValueError(_wrong_encoding(path, 1, error)) from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(_cut_off(path, error)) from error
    if not line:
        raise ValueError(f"{path}: the file is empty. Get it again.")
    try:
        return line.split(separator) if len(separator) > 1 else next(_parse([line], separator, quote))
    except csv.Error as error:
        raise ValueError(f"{path}, line 1: not the header of a table ({error}).") from error


class _File:
    """A file as polars and Python's `csv` both can read it: in UTF-8 and with a separator of one character."""

    def __init__(
        self, path: Path, separator: str, encoding: str, quote: str | None, header: bool, names: tuple[str, ...]
    ) -> None:
        self.path, self.quote, self.header = path, quote, header
        first = column_names(path, separator, encoding, quote)
        self.names = first if header else list(names)
        if repeated := sorted({name for name in self.names if self.names.count(name) > 1}):
            raise ValueError(f"{path}: the header names {', '.join(map(repr, repeated))} twice. Rename one of them.")
        self.separator = separator if len(separator) == 1 else _UNIT
        self.content: Path | bytes = path
        if path.suffix == ".gz" or encoding != "utf-8" or len(separator) > 1:
            content = _in_utf8(read_bytes(path), encoding)
            self.content = content.replace(separator.encode(), _UNIT.encode()) if len(separator) > 1 else content

    def scan(self, types: Mapping[str, Any]) -> pl.LazyFrame:
        schema = {name: types.get(name, pl.String) for name in self.names}
        return pl.scan_csv(
            self.content,
            separator=self.separator,
            has_header=self.header,
            quote_char=self.quote,
            schema=schema,
            glob=False,
        )

    def lines(self) -> Iterator[bytes]:
        with io.BytesIO(self.content) if isinstance(self.content, bytes) else self.content.open("rb") as file:
            yield from file


def read_bytes(path: Path) -> bytes:
    """
    What a file holds, plain or `.gz`.

    Args:
        path (`Path`):
            The file.

    Returns:
        `bytes`

    Raises:
        `ValueError`: the compressed data is cut off or broken.

    Example:

    ```python
    >>> import gzip, tempfile
    >>> from pathlib import Path
    >>> from trl_dmpo.data.sources.delimited import read_bytes

    >>> path = Path(tempfile.mkdtemp(), "ratings.csv.gz")
    >>> _ = path.write_bytes(gzip.compress(b"1,2,3"))
    >>> read_bytes(path)
    b'1,2,3'
    ```
    """
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(_cut_off(path, error)) from error


def _in_utf8(content: bytes, encoding: str) -> bytes:
    if encoding == "utf-8":
        return content
    try:
        content.decode(UTF8)
        return content
    except UnicodeDecodeError:
        return content.decode(encoding).encode()


def _types_of_ids(file: _File, names: list[str]) -> dict[str, Any]:
    """Looks at all of them: it is the last that may be no integer."""
    if not names:
        return {}
    plain = pl.col(names).str.contains(_PLAIN_INTEGER).all()
    found = file.scan({}).select(plain).collect(engine="streaming")
    return {name: pl.Int64 if found[name].item() else pl.String for name in names}


def _read(file: _File, types: Mapping[str, Any]) -> pl.DataFrame:
    last = pl.col(file.names[-1]).is_null().alias(_UNIT)
    # Asks for all columns, not only to see blank lines: polars counts fields only where it reads the last of them
    not_blank = pl.any_horizontal(pl.col(file.names).is_not_null())
    table = file.scan(types).filter(not_blank).select(*types, last).collect(engine="streaming")
    # A line that was cut off looks like one whose last fields are empty
    if table.height and table[_UNIT][-1] and (fault := _fault(file, dict.fromkeys(file.names, pl.String))):
        raise ValueError(fault)
    return table.drop(_UNIT)


def _parse(lines: Any, separator: str, quote: str | None) -> Any:
    style = {"quotechar": quote} if quote else {"quoting": csv.QUOTE_NONE}
    return csv.reader(lines, delimiter=separator, strict=True, **style)  # type: ignore[arg-type]


def _fault(file: _File, types: Mapping[str, Any]) -> str | None:
    """The first thing that is wrong with the file, by its line. Slow: for when reading has failed."""
    rows = _parse((line.decode() for line in file.lines()), file.separator, file.quote)
    line, row = 1, file.names
    try:
        for row in rows:
            if fault := _fault_of_row(row, types) if line > 1 or not file.header else None:
                return f"{file.path}, line {line}: {fault}"
            line = rows.line_num + 1
    except UnicodeDecodeError as error:
        return _wrong_encoding(file.path, rows.line_num + 1, error)
    except csv.Error as error:
        return f"{file.path}, line {line}: a quoted field does not end as it should ({error}). Mend the line or, if the file is cut off, get it again."
    if 0 < len(row) < len(file.names):
        return (
            f"{file.path}, line {rows.line_num}: the file is cut off: its last line has {len(row)} fields of "
            f"{len(file.names)}. Get it again, or remove the line."
        )
    return None


def _fault_of_row(row: list[str], types: Mapping[str, Any]) -> str | None:
    if len(row) > len(types):
        return f"{len(row)} fields for {len(types)} columns. Quote fields that hold the separator, or mend the line."
    for value, (name, dtype) in zip(row, types.items(), strict=False):
        if value and dtype != pl.String and not _is_number(value, dtype):
            what = "an integer" if dtype.is_integer() else "a number"
            return f"{name} {value!r} is not {what}. Mend or remove the line."
    return None


def _is_number(value: str, dtype: Any) -> bool:
    if dtype.is_integer():
        return re.fullmatch(r"[+-]?[0-9]{1,18}", value) is not None
    try:
        return value == value.strip() and float(value) is not None
    except ValueError:
        return False


def _wrong_encoding(path: Path, line: int, error: UnicodeDecodeError) -> str:
    byte = error.object[error.start]
    return (
        f"{path}, line {line}: byte 0x{byte:02X} is not UTF-8. Convert the file, for instance from Latin-1 with "
        f"`iconv -f ISO-8859-1 -t UTF-8`."
    )


def _cut_off(path: Path, error: Exception) -> str:
    return f"{path}: the compressed data is cut off or broken ({error}). Get the file again."
