"""
Files of any content against their readers: each is refused by its name, or read with every record accounted for.

    python -m tests.fuzz.fuzz_files 40000 CORPUS    # so many records, by atheris, which looks for branches it has not seen
"""

import csv
import gzip
import io
import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.conftest import TITLES
from tests.fuzz.engine import quiet, run
from tests.fuzz.generate import make_junk, make_text, one_in
from trl_dmpo.data.formats import load_rows
from trl_dmpo.data.schema import find_problem
from trl_dmpo.data.sources import load_interactions


# One record of each format
RECORDS: dict[str, dict[str, Any]] = {
    "llara": {"historyList": ["Boris"], "itemList": ["Angra", "Hope"], "trueSelection": "Hope"},
    "dmpo": {
        "instruction": "Here is the history:  <Title:Babe> . Rank the likelihood of the user watching the two movies "
        " <Title:Heat>  and  <Title:Big> .",
        "input": "",
        "output": " <Title:Heat> ,  <Title:Big> ",
    },
    "tallrec": {"instruction": "Answer.", "input": "Liked: Babe", "output": "Yes."},
    "minionerec": {"user_id": "A1", "history_item_title": "['Fame', 'Babe']", "item_title": "Heat"},
    "rejected_columns": {"prompt": "Next:", "chosen": " Aliens", "rejected_1": " Big", "rejected_2": " Heat"},
    "scored": {"prompt": "Next:", "completions": [" Big", " Aliens", " Heat"], "scores": [3, 5.0, 1]},
    "rows": {"prompt": "Next:", "chosen": " Aliens", "rejected": [" Heat", " Big"]},
    "pairs": {"prompt": "Next:", "chosen": " Aliens", "rejected": " Heat"},
}
# Those of which each record makes a row of its own, whatever the others are
ALONE = ("llara", "dmpo", "tallrec")
OPTIONS = {"minionerec": {"negatives": 1}}


def try_records(counts: Counter[str], draw: Random, folder: Path) -> None:
    """Some records of one format, some of them broken, as a list and as a file."""
    format = draw.choice(list(RECORDS))
    records = [_make_record(draw, format) for _ in range(draw.randrange(1, 8))]
    counts["records"] += len(records)
    options = {"format": draw.choice([None, format]), **OPTIONS.get(format, {})}
    if format in ("llara", "dmpo", "tallrec", "scored"):
        options["chat"] = one_in(draw, 3)
    rows = _load(counts, records, options)
    if rows is not None and format in ALONE and options["format"] is not None:
        alone = [row for record in records for row in _load(counts, [record], options) or []]
        assert [_told(row) for row in rows] == [_told(row) for row in alone]
    path = folder / draw.choice(["a.jsonl", "a.json", "a.jsonl.gz", "a.csv", "a.tsv", "a.parquet"])
    if (content := _write(path.name, records)) is not None:
        content = _damage(content, draw)
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" and draw.randrange(4) else content)
        counts["files"] += 1
        _load(counts, path, options)


def _make_record(draw: Random, format: str) -> dict[str, Any]:
    record = json.loads(json.dumps(RECORDS[format]))
    for column, value in record.items():
        if isinstance(value, list) and one_in(draw, 2):
            record[column] = [make_text(draw) if isinstance(each, str) else each for each in value]
    for _ in range(draw.choice([0, 0, 1, 1, 2])):
        column = draw.choice([*record, "extra"])
        kind = draw.randrange(4)
        if kind == 0:
            record.pop(column, None)
        elif kind == 1:
            record[column] = make_text(draw)
        elif kind == 2 or not isinstance(record.get(column), list) or not record[column]:
            record[column] = make_junk(draw)
        else:
            record[column][draw.randrange(len(record[column]))] = make_junk(draw)
    return record


def _load(counts: Counter[str], source: Any, options: dict[str, Any]) -> list[dict] | None:
    """The rows that are not dropped, twice the same; `None` if there are none, for which an error gives the reason."""
    name = source.name if isinstance(source, Path) else "list"
    found: list[list[dict] | str] = []
    for _ in range(2):
        try:
            rows = load_rows(source, on_invalid_row="drop", **options)
            found.append(list(rows))
        except ValueError as error:
            found.append(_message(error, name, "`"))
    assert str(found[0]) == str(found[1])
    if isinstance(found[0], str):
        counts["refused"] += 1
        return None
    counts["read"] += 1
    assert all(
        find_problem({k: v for k, v in row.items() if k != "prompt" or v is not None}) is None for row in found[0]
    )
    told = rows.info.description
    made, given, format = re.search(r": ([\d,]+) rows? from ([\d,]+) records?, read as (\w+):", told).groups()
    listed = told.partition(" Dropped: ")[2]
    dropped = sum(int(count.replace(",", "")) for count in re.findall(r"(?:^|, )([\d,]*\d) ", listed))
    if format != "pairs":
        assert int(made) + dropped == int(given), told
    return found[0]


def _message(error: ValueError, *names: str) -> str:
    """Of an error of ours: one that comes from elsewhere does not say what it is about."""
    assert type(error) is ValueError
    assert any(name in str(error) for name in names), error
    return str(error)


def _told(row: dict[str, Any]) -> str:
    return str([row[column] for column in ("prompt", "chosen", "rejected")])


def _write(name: str, records: list[dict[str, Any]]) -> bytes | None:
    """The records as a file of this kind, if it can hold them."""
    try:
        lines = [json.dumps(record, default=str) for record in records]
        if ".json" in name:
            return ("[" + ",\n".join(lines) + "]" if name.endswith(".json") else "\n".join(lines)).encode()
        names = list(dict.fromkeys(column for record in records for column in record))
        if name.endswith(".parquet"):
            table = pa.table({column: [record.get(column) for record in records] for column in names})
            pq.write_table(table, buffer := io.BytesIO())
            return buffer.getvalue()
        text = io.StringIO(newline="")
        writer = csv.writer(text, delimiter="\t" if name.endswith(".tsv") else ",")
        writer.writerows([names, *([record.get(column) for column in names] for record in records)])
        return text.getvalue().encode(errors="surrogatepass")
    except Exception:  # it cannot
        return None


def _damage(content: bytes, draw: Random) -> bytes:
    """Cut off, or with some bytes changed; two of three are left alone."""
    if draw.randrange(3):
        return content
    damaged = bytearray(content)
    for _ in range(draw.randrange(1, 4)):
        place = draw.randrange(len(damaged) + 1)
        kind = draw.randrange(4)
        if kind == 0:
            del damaged[place:]
        elif kind == 1:
            del damaged[place : place + draw.randrange(4)]
        else:
            odd = draw.choice(
                [
                    b"\n",
                    b'"',
                    b",",
                    b"\xff",
                    b"\x00",
                    b"{",
                    b"\r",
                    b"\xed\xa0\x80",
                    b"[" * 9999,
                    bytes([draw.randrange(256)]),
                ]
            )
            damaged[place : place + (kind == 2)] = odd
    return bytes(damaged)


def _line(separator: str, *values: str) -> str:
    return separator.join(values)


def _csv_line(*values: str) -> str:
    csv.writer(text := io.StringIO(newline="")).writerow(values)
    return text.getvalue().rstrip("\r\n")


def _json_line(**values: Any) -> str:
    return json.dumps(values)


def _loose_line(**values: Any) -> str:
    return repr(values)


Writer = Callable[..., str]

# Of each layout of a source its two files: name, header, and a line of (user, item, rating, time) or of (item, title)
LAYOUTS: dict[str, tuple[tuple[str, str | None, Writer], tuple[str, str | None, Writer]]] = {
    "movielens 100K": (
        ("u.data", None, lambda *e: _line("\t", *e)),
        ("u.item", None, lambda i, t: _line("|", i, t, "", "", "", *"0100000000000000000")),
    ),
    "movielens 1M": (
        ("ratings.dat", None, lambda *e: _line("::", *e)),
        ("movies.dat", None, lambda i, t: _line("::", i, t, "Drama|War")),
    ),
    "movielens 20M": (
        ("ratings.csv", "userId,movieId,rating,timestamp", _csv_line),
        ("movies.csv", "movieId,title,genres", lambda i, t: _csv_line(i, t, "Drama")),
    ),
    "amazon": (
        ("Books.jsonl", None, lambda u, i, r, t: _json_line(user_id=u, parent_asin=i, rating=_number(r), timestamp=_number(t))),
        ("meta_Books.jsonl", None, lambda i, t: _json_line(parent_asin=i, title=t, categories=["a"])),
    ),
    "amazon 2014": (
        ("Books_5.json", None, lambda u, i, r, t: _json_line(reviewerID=u, asin=i, overall=_number(r), unixReviewTime=_number(t))),
        ("meta_Books.json", None, lambda i, t: _loose_line(asin=i, title=t, categories=[["a"]])),
    ),
    "lastfm": (
        ("user_artists.dat", "userID\tartistID\tweight", lambda u, i, r, t: _line("\t", u, i, t)),
        ("artists.dat", "id\tname\turl", lambda i, t: _line("\t", i, t, "")),
    ),
    "steam": (
        ("steam_reviews.json", None, lambda u, i, r, t: _loose_line(username=u, product_id=i, date="2017-12-17", hours=_number(r))),
        ("steam_games.json", None, lambda i, t: _loose_line(id=i, app_name=t, genres=["a"])),
    ),
    "goodreads": (
        ("goodreads_interactions_poetry.json", None,
         lambda u, i, r, t: _json_line(user_id=u, book_id=i, is_read=True, rating=_number(r), date_added="Fri Apr 19 08:15:15 -0700 2013")),
        ("goodreads_books_poetry.json", None, lambda i, t: _json_line(book_id=i, title=t, publication_year="1982")),
    ),
    "goodbooks": (
        ("ratings.csv", "user_id,book_id,rating", lambda u, i, r, t: _csv_line(u, i, r)),
        ("books.csv", "book_id,goodreads_book_id,authors,original_publication_year,title", lambda i, t: _csv_line(i, i, "A, B", "2005.0", t)),
    ),
    "recbole": (
        ("ml.inter", "user_id:token\titem_id:token\trating:float\ttimestamp:float", lambda *e: _line("\t", *e)),
        ("ml.item", "item_id:token\ttitle:token_seq", lambda i, t: _line("\t", i, t)),
    ),
    "table csv": (
        ("interactions.csv", "user_id,item_id,rating,timestamp", _csv_line),
        ("items.csv", "item_id,title,genre", lambda i, t: _csv_line(i, t, "Drama")),
    ),
}  # fmt: skip
READERS = ("amazon", "goodbooks", "goodreads", "lastfm", "movielens", "recbole", "steam")
# What a log says of interactions that it has left out
LEFT_OUT = re.compile(r"^(interactions|repeated interactions|listens|books|reviews)\b")


def _number(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def try_source(counts: Counter[str], draw: Random, folder: Path) -> None:
    """A folder of one source, with values as they should not be, or bytes."""
    events_file, items_file = LAYOUTS[layout := draw.choice(list(LAYOUTS))]
    events = [_make_event(draw) for _ in range(draw.randrange(1, 9))]
    items = [(str(number), TITLES[number] if draw.randrange(5) else make_text(draw)) for number in range(1, 6)]
    counts["records"] += len(events) + len(items)
    whole = one_in(draw, 2)
    for (name, header, write), lines in ((events_file, events), (items_file, items)):
        text = "\n".join([*([header] if header else []), *(write(*values) for values in lines)]) + "\n"
        content = text.encode(errors="surrogatepass")
        (folder / name).write_bytes(content if whole else _damage(content, draw))
    counts["folders"] += 1
    found = [_read(folder), _read(folder)]
    assert found[0] == found[1]
    if isinstance(found[0], str):
        counts["refused"] += 1
        return
    counts["read"] += 1
    interactions, titles, left_out = found[0]
    assert interactions
    assert {row[1] for row in interactions} <= {item for item, _ in titles}
    assert all(title.strip() and "\n" not in title for _, title in titles)
    # A line break in a value, where nothing quotes it, makes lines of its own
    if whole and not any(set(value) & set("\r\n\x00\ufeff") for values in (*events, *items) for value in values):
        assert len(interactions) + left_out == len(events), layout


def _make_event(draw: Random) -> tuple[str, str, str, str]:
    event = [
        str(draw.randrange(4)),
        str(draw.randrange(1, 7)),
        str(draw.randrange(1, 6)),
        str(944918901 + draw.randrange(99)),
    ]
    if one_in(draw, 6):
        event[draw.randrange(4)] = (
            make_text(draw) if one_in(draw, 2) else draw.choice(["", "-1", "1e5", "NaN", "9" * 20, "0.5", "x", "null"])
        )
    return tuple(event)


def _read(folder: Path) -> str | tuple[list, list, int]:
    try:
        log = load_interactions(folder)
    except ValueError as error:
        return _message(error, str(folder), *(path.name for path in folder.iterdir()))
    for frame in (log.interactions, log.items):
        assert not frame.select("item_id").null_count().item()
    left_out = sum(count for note, count in log.notes.items() if LEFT_OUT.match(note))
    return (
        log.interactions.select("user_id", "item_id", "timestamp").rows(),
        log.items.select("item_id", "title").rows(),
        left_out,
    )


def try_files(counts: Counter[str], draw: Random) -> None:
    with tempfile.TemporaryDirectory() as folder:
        draw.choice([try_records, try_source])(counts, draw, Path(folder))


def main() -> None:
    quiet()
    counts: Counter[str] = Counter()

    def tell() -> str:
        return ", ".join(f"{count:,} {what}" for what, count in counts.items())

    names = ("llara", "dmpo", "tallrec", "minionerec", "columns", "scored", "rows", "pairs", "files", "records")
    modules = [f"trl_dmpo.data.formats{name}" for name in ("", *(f".{each}" for each in names))]
    names = ("", ".delimited", ".json_lines", ".tabular", *(f".{each}" for each in READERS))
    modules += [f"trl_dmpo.data.sources{name}" for name in names] + ["trl_dmpo.data.log", "trl_dmpo.data.schema"]
    run(lambda draw: try_files(counts, draw), lambda: counts["records"], tell, modules)


if __name__ == "__main__":
    main()
