import gzip
import logging
import tempfile
from pathlib import Path

import datasets
import pandas
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_dmpo.data.sources import load_interactions


TABLE = pl.DataFrame(
    {
        "reviewer": ["ann", "bob", "ann"],
        "asin": [7, 7, 8],
        "when": [30, 20, 10],
        "stars": [4.5, 3.0, 1.0],
        "name": ["Big", None, 'Heat, or: "It"'],
        "genre": ["Comedy", "Comedy", "Crime"],
        "review": ["good", "bad", "ugly"],
        "price": ["1.5", "1.5", "2"],
    }
)
MAPPING = {"user_id": "reviewer", "item_id": "asin", "timestamp": "when", "rating": "stars", "title": "name"}


def written(folder, form):
    path = folder / f"log.{form}"
    if form == "parquet":
        TABLE.write_parquet(path)
    elif form == "jsonl":
        TABLE.write_ndjson(path)
    elif form == "csv.gz":
        path.write_bytes(gzip.compress(TABLE.write_csv().encode()))
    else:
        TABLE.write_csv(path, separator="\t" if form == "tsv" else ",")
    return path


def frame(kind):
    if kind == "polars":
        return TABLE
    if kind == "lazy":
        return TABLE.lazy()
    if kind == "pandas":
        return TABLE.to_pandas()
    return datasets.Dataset.from_polars(TABLE).select(range(3))


@pytest.mark.parametrize("form", ["csv", "csv.gz", "tsv", "parquet", "jsonl", "polars", "lazy", "pandas", "datasets"])
def test_one_table_of_any_kind(tmp_path, form):
    source = frame(form) if form in ("polars", "lazy", "pandas", "datasets") else written(tmp_path, form)
    log = load_interactions(source, columns=MAPPING, domain="film")
    assert log.domain == "film"
    assert log.source == f"a table ({'log.' + form if (tmp_path / ('log.' + form)).exists() else 'a frame'})"
    assert log.interactions.select("user_id", "item_id", "timestamp", "rating").rows() == [
        ("ann", 8, 10, 1.0), ("ann", 7, 30, 4.5), ("bob", 7, 20, 3.0),
    ]  # fmt: skip
    # `review` is not of the item, `price` is no text
    assert log.items.rows() == [(7, "Big", "Comedy"), (8, 'Heat, or: "It"', "Crime")]


@pytest.mark.parametrize("stem", ["ratings", "interactions"])
@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_a_folder_needs_no_mapping(tmp_path, stem, ending):
    taken = pl.DataFrame({"user_id": [1, 2], "item_id": ["007", "7"], "shown": ["x", "y"]})
    items = pl.DataFrame(
        {"item_id": ["007", "7"], "title": ["Bond", "Seven"], "mood": ["dry", None], "year": [1962, 1995]}
    )
    getattr(taken, f"write_{ending}")(tmp_path / f"{stem}.{ending}")
    getattr(items, f"write_{ending}")(tmp_path / f"items.{ending}")
    log = load_interactions(tmp_path)
    assert log.source == f"a table ({stem}.{ending}, items.{ending})"
    assert not log.has_time
    assert log.interactions.rows() == [(1, "007", 0), (2, "7", 1)]
    assert log.items.rows() == [("007", "Bond", "dry"), ("7", "Seven", None)]


def test_a_mapping_applies_to_both_tables(tmp_path):
    taken = TABLE.drop("name")
    items = pl.DataFrame({"item_id": [7, 8], "name": ["Big", "Heat"], "tags": [["a", "b"], []]})
    log = load_interactions(taken, items=items, columns=MAPPING)
    assert log.items.rows() == [(7, "Big", ["a", "b"]), (8, "Heat", [])]


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (["7 8", "8,9", "[7, '9']", None], [[7, 8], [8, 9], [7, 9], None]),
        (["7|8", "8", "", "x"], [["7", "8"], ["8"], [], ["x"]]),
        ([[7, 8], [9], [], None], [[7, 8], [9], [], None]),
    ],
)
def test_impressions(shown, expected):
    table = pl.DataFrame({"user_id": [1, 2, 3, 4], "item_id": [7] * 4, "title": ["Big"] * 4, "impressions": shown})
    log = load_interactions(table)
    assert log.interactions["impressions"].to_list() == expected
    assert log.interactions["item_id"].dtype == log.items["item_id"].dtype == (pl.String if expected[3] else pl.Int64)


ids = st.integers().map(str) | st.from_regex(r"[0-9a-c+-]{1,4}", fullmatch=True) | st.text("é,\"' ;|", min_size=1)


@settings(max_examples=100, deadline=None)
@given(st.lists(ids.filter(str.strip), min_size=1, unique=True))
def test_ids_of_a_file_are_the_same_text_here(items):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "log.csv")
        pl.DataFrame({"user_id": items, "item_id": items, "title": ["Big"] * len(items)}).write_csv(path)
        log = load_interactions(path)
    assert sorted(map(str, log.interactions["item_id"])) == sorted(map(str, log.items["item_id"])) == sorted(items)


def test_ids_that_pandas_made_fractions():
    table = pandas.DataFrame({"user_id": [1, 2, None], "item_id": [7.0, 8.0, 9.0], "title": ["Big", None, "Heat"]})
    log = load_interactions(table)
    assert log.interactions["user_id"].to_list() == [1]
    assert log.items["item_id"].to_list() == [7, 9]
    assert log.notes == {
        "items without a title": 1,
        "interactions without user_id": 1,
        "interactions with an item without a title": 1,
    }


def test_a_time_that_nobody_named_is_pointed_out(caplog):
    table = TABLE.rename({"reviewer": "user_id", "asin": "item_id", "name": "title"})
    with caplog.at_level(logging.WARNING):
        assert not load_interactions(table).has_time
    assert "If 'when' is one, give columns={'timestamp': 'when'}" in caplog.text


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (None, "there is no column 'user_id', 'item_id', 'title', only: reviewer, asin, when"),
        (None, "columns={'user_id': 'reviewer', 'item_id': 'asin', 'title': 'name'} (--columns user_id=reviewer item_id=asin title=name), or give the table with the titles"),
        ({**MAPPING, "rating": "score"}, "`columns` names 'score', which is not among: reviewer, asin"),
        ({**MAPPING, "genres": "genre"}, "`columns` maps 'genres', which is none of user_id, item_id"),
        ({**MAPPING, "rating": "review"}, "log.csv, line 2: review 'good' is not a number. Mend or remove"),
    ],
)  # fmt: skip
def test_wrong_columns(tmp_path, columns, message):
    with pytest.raises(ValueError, match="column") as error:
        load_interactions(written(tmp_path, "csv"), columns=columns)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("log.parquet", b"PAR1 and then nothing", "not a Parquet file, or cut off"),
        ("log.jsonl", b'{"user_id": 1, "item_id": 2, "title": "Big"}\n{"user_id": 1, "it', "log.jsonl, line 2: "),
        ("log.csv", b'user_id,item_id,title\n1,2,"Big\n', "log.csv, line 2: a quoted field does not end"),
        ("log.csv", b"user_id,item_id,title\n1,2,Big\n1,3", "log.csv, line 3: the file is cut off"),
        ("log.csv", b"user_id,item_id,title\n1,2,Caf\xe9\n", "log.csv, line 2: byte 0xE9 is not UTF-8"),
        ("log.csv", b"user_id,item_id,title\n1,2,Big, Bad\n", "log.csv, line 2: 4 fields for 3 columns"),
        ("log.csv", b"user_id,item_id,title,title\n", "the header names 'title' twice"),
        ("log.csv.gz", gzip.compress(b"user_id,item_id,title\n1,2,Big\n" * 9, mtime=0)[:-9], "the compressed data is cut off"),
        ("log.csv", b"", "the file is empty. Get it again"),
        ("log.xlsx", b"", "the ending is not one of .csv, .tsv, .parquet, .jsonl"),
    ],
)  # fmt: skip
def test_broken_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name) as error:
        load_interactions(tmp_path / name, format="tabular")
    assert message in str(error.value)


def test_what_is_no_table():
    with pytest.raises(ValueError, match=r"from a builtins.list: give a path"):
        load_interactions([1, 2])
    with pytest.raises(ValueError, match=r"Give one split of it, such as dataset\['train'\]"):
        load_interactions(datasets.DatasetDict({"train": datasets.Dataset.from_polars(TABLE)}))


def test_a_name_with_brackets_is_a_name(tmp_path):
    path = tmp_path / "[b]r.csv"
    path.write_text("user_id,item_id,title\n1,7,Alien\n")
    assert load_interactions(path).interactions.height == 1
