import gzip
import json

import polars as pl
import pytest

from trl_dmpo.data.sources import load_interactions


def lines(*rows):
    return "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows).encode()


def review(user, item, stars, time, **more):
    return {"reviewerID": user, "asin": item, "overall": stars, "unixReviewTime": time, "summary": "ok", **more}


def rating(user, item, stars, time):
    return {"user_id": user, "parent_asin": item, "rating": stars, "timestamp": time, "title": "of the review"}


LOOSE = (
    "{'asin': '0001', 'title': \"Logan's Run &amp; more\", 'categories': [['Movies & TV', 'Sci-Fi'], ['DVD']], 'price': 3.5}",
    "{'asin': '0002', 'categories': [['Movies & TV']], 'imUrl': 'x'}",
    "{'asin': '0003', 'title': 'Never rated'}",
)  # fmt: skip


def test_2014(tmp_path):
    reviews = lines(review("A", "0001", 5.0, 1400000000), review("B", "0002", 2.0, 1300000000))
    (tmp_path / "reviews_Movies_and_TV_5.json.gz").write_bytes(gzip.compress(reviews))
    (tmp_path / "meta_Movies_and_TV.json.gz").write_bytes(gzip.compress(lines(*LOOSE)))
    log = load_interactions(tmp_path)
    assert log.source == "Amazon Reviews 2014 (reviews_Movies_and_TV_5.json.gz, meta_Movies_and_TV.json.gz)"
    assert log.domain == "film"
    assert log.interactions.rows() == [("A", "0001", 5.0, 1400000000)]
    assert log.items.rows() == [("0001", "Logan's Run & more", None, ["Movies & TV", "Sci-Fi"])]
    assert log.notes == {"items without a title": 1, "interactions with an item without a title": 1}


def test_2018(tmp_path):
    reviews = [review("A", item, 4.0, time, verified=True) for time, item in enumerate("abca", 1500000000)]
    (tmp_path / "Books.json").write_bytes(lines(*reviews))
    metadata = [
        {"asin": "a", "title": "I &lt;3 You", "brand": "by\n    \n    Ann Lee", "category": ["Books", "Love &amp; Co", "</span></span>"]},
        {"asin": "b", "title": '<span id="t"> getTime()', "brand": "B", "category": []},
        {"asin": "c", "title": "Dune", "brand": "Visit Amazon's Frank Herbert Page", "category": []},
    ]  # fmt: skip
    (tmp_path / "meta_Books.json").write_bytes(lines(*metadata))
    log = load_interactions(tmp_path / "Books.json")
    assert log.source == "Amazon Reviews 2018 (Books.json, meta_Books.json)"
    assert log.domain == "book"
    assert log.interactions["item_id"].to_list() == ["a", "c"]
    assert log.items.rows() == [
        ("a", "I <3 You", "Ann Lee", ["Books", "Love & Co"]),
        ("c", "Dune", "Frank Herbert", []),
    ]
    assert log.notes == {
        "items without a title": 1,
        "interactions with an item without a title": 1,
        "repeated interactions, the first kept": 1,
    }


RATINGS_2023 = [rating("A", "B1", 5.0, 1609459200123), rating("A", "B2", 1.0, 1609459100999)]
METADATA_2023 = [
    {"parent_asin": "B1", "title": "Portal", "main_category": "Video Games", "categories": ["Video Games", "PC"], "store": "Valve"},
    {"parent_asin": "B2", "title": "Tetris", "main_category": "Video Games", "categories": [], "store": None},
]  # fmt: skip
ITEMS_2023 = [("B1", "Portal", "Valve", ["Video Games", "PC"]), ("B2", "Tetris", None, ["Video Games"])]


@pytest.mark.parametrize("name", ["Video_Games.jsonl.gz", "Video_Games.csv", "Video_Games.train.csv.gz"])
def test_2023(tmp_path, name):
    table = b"user_id,parent_asin,rating,timestamp,history\nA,B1,5.0,1609459200123,B2 B9\nA,B2,1.0,1609459100999,\n"
    content = table if ".csv" in name else lines(*RATINGS_2023)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    (tmp_path / "meta_Video_Games.jsonl").write_bytes(lines(*METADATA_2023))
    log = load_interactions(tmp_path)
    assert log.source == f"Amazon Reviews 2023 ({name}, meta_Video_Games.jsonl)"
    assert log.domain == "game"
    assert log.interactions.rows() == [("A", "B2", 1.0, 1609459100), ("A", "B1", 5.0, 1609459200)]
    assert log.items.rows() == ITEMS_2023


def test_hub_dataset():
    datasets = pytest.importorskip("datasets")
    reviews, metadata = datasets.Dataset.from_list(RATINGS_2023), datasets.Dataset.from_list(METADATA_2023)
    log = load_interactions(reviews, items=metadata, domain="game")
    assert (log.source, log.domain) == ("Amazon Reviews 2023 (tables)", "game")
    assert log.interactions["timestamp"].to_list() == [1609459100, 1609459200]
    assert log.items.rows() == ITEMS_2023
    with pytest.raises(ValueError, match="Give the metadata as items="):
        load_interactions(reviews)


def test_metadata_elsewhere(tmp_path):
    (tmp_path / "Video_Games.jsonl").write_bytes(lines(*RATINGS_2023))
    with pytest.raises(ValueError, match=r"there is no meta_Video_Games with the ending .*or give it as items="):
        load_interactions(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/meta.jsonl").write_bytes(lines(*METADATA_2023))
    assert load_interactions(tmp_path, items=tmp_path / "elsewhere/meta.jsonl").items.rows() == ITEMS_2023
    frame = pl.DataFrame({"parent_asin": ["B1"], "title": ["Portal"]})
    assert load_interactions(tmp_path, items=frame).items.rows() == [("B1", "Portal")]


def test_several_categories(tmp_path):
    for name in ("Books_5.json", "Office_5.json"):
        (tmp_path / name).write_bytes(lines(review("A", "a", 4.0, 1500000000)))
    with pytest.raises(
        ValueError, match=r"there are the reviews Books_5.json, Office_5.json. Give the file of one category"
    ):
        load_interactions(tmp_path)


def test_cut_off(tmp_path):
    (tmp_path / "meta_Books.json").write_bytes(lines({"asin": "a", "title": "Dune"}))
    path = tmp_path / "Books_5.json"
    path.write_bytes(lines(*[review("A", "a", 4.0, 1500000000)] * 3)[:-30])
    with pytest.raises(ValueError, match=r"Books_5.json, line 3: .*cut off"):
        load_interactions(path)
