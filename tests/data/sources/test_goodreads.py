import gzip
import json

import pytest

from trl_dmpo.data.sources import goodreads


def event(user, book, read, rating, added, **more):
    row = {"user_id": user, "book_id": book, "review_id": "5cd4", "is_read": read, "rating": rating}
    return row | {"review_text_incomplete": "", "date_added": added, "date_updated": added, "read_at": ""} | more


# As published: ids, years and counts are strings, an unknown year is an empty one, a rating of 0 is none
BOOKS = [
    {"book_id": "402128", "title": "Old Possum's Book of Practical Cats", "publication_year": "1982", "isbn": "0151686564",
     "authors": [{"author_id": "18540", "role": ""}, {"author_id": "21578", "role": "Illustrator"}], "series": []},
    {"book_id": "9", "title": "Harry Potter and the Sorcerer's Stone (Harry Potter, #1)", "publication_year": "",
     "title_without_series": "Harry Potter", "authors": [{"author_id": "1", "role": ""}, {"author_id": "2", "role": ""}]},
    {"book_id": "11", "title": "", "publication_year": "2001", "authors": []},
]  # fmt: skip
AUTHORS = [
    {"author_id": "18540", "name": "T.S. Eliot", "ratings_count": "1"},
    {"author_id": "1", "name": "J.K. Rowling"},
    {"author_id": "21578", "name": "Edward Gorey"},
]
EVENTS = [
    event("8a", "402128", True, 4, "Fri Apr 19 08:15:15 -0700 2013", read_at="Sat Jan 01 00:00:00 -0800 2000"),
    event("8a", "9", True, 5, "Tue Jan 01 00:00:00 -0800 2013"),
    event("3c", "402128", True, 0, "Fri Apr 19 08:15:15 -0700 2013"),
    event("3c", "9", False, 0, "Fri Apr 19 08:15:15 -0700 2013"),
    event("3c", "9", True, 2, ""),
    event("77", "9", True, 1, "Fri Mar 31 12:30:59 +0000 2017"),
    event("77", "11", True, 3, "Fri Mar 31 12:30:59 +0000 2017"),
]
ROWS = [("77", 9, 1490963459, 1.0), ("8a", 9, 1357027200, 5.0), ("8a", 402128, 1366384515, 4.0)]
CSV = "user_id,book_id,is_read,rating,is_reviewed\n0,948,1,5,0\n0,947,1,4,1\n0,946,0,0,0\n1,947,1,0,0\n1,948,1,3,0\n1,1,1,2,0\n1,5,1,2,0\n"
BOOK_IDS = "book_id_csv,book_id\n947,402128\n948,9\n1,11\n946,9\n"


def write(file, rows):
    content = "".join(f"{json.dumps(row)}\n" for row in rows).encode()
    file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)


def rows_of(log):
    return log.interactions.select("user_id", "item_id", "timestamp", "rating").rows()


@pytest.mark.parametrize("end", ["json", "json.gz"])
@pytest.mark.parametrize(
    ("events", "books"),
    [
        ("goodreads_interactions_poetry", "goodreads_books_poetry"),
        ("goodreads_interactions_young_adult", "goodreads_books"),
        ("goodreads_interactions_dedup", "goodreads_books"),
    ],
)
def test_interactions(tmp_path, end, events, books):
    write(tmp_path / f"{events}.{end}", EVENTS)
    write(tmp_path / f"{books}.{end}", BOOKS)
    log = goodreads.read(tmp_path)
    assert rows_of(log) == ROWS
    assert log.items.rows() == [
        (9, "Harry Potter and the Sorcerer's Stone (Harry Potter, #1)", None),
        (402128, "Old Possum's Book of Practical Cats", "1982"),
    ]
    assert log.notes == {
        "books shelved and not read": 1,
        "books read and not rated": 1,
        "interactions without a date that can be read": 1,
        "items without a title": 1,
        "interactions with an item without a title": 1,
    }
    assert log.interactions.columns == ["user_id", "item_id", "rating", "timestamp"]
    assert (log.source, log.domain, log.has_time) == (f"Goodreads ({events}.{end}, {books}.{end})", "book", True)


def test_reviews_do_not_tell_whether_the_book_was_read(tmp_path):
    write(tmp_path / "goodreads_reviews_poetry.json.gz", [{**row, "is_read": None} for row in EVENTS])
    write(tmp_path / "goodreads_reviews_spoiler.json.gz", [])
    write(tmp_path / "goodreads_books_poetry.json.gz", BOOKS)
    log = goodreads.read(tmp_path)
    assert rows_of(log) == ROWS
    assert log.notes["books read and not rated"] == 2


def test_authors_are_those_who_wrote_the_book(tmp_path):
    write(tmp_path / "goodreads_interactions_poetry.json.gz", EVENTS)
    write(tmp_path / "goodreads_books_poetry.json.gz", [*BOOKS, BOOKS[1]])
    write(tmp_path / "goodreads_book_authors.json.gz", AUTHORS)
    assert goodreads.read(tmp_path).items["authors"].to_list() == [["J.K. Rowling"], ["T.S. Eliot"]]


def test_csv(tmp_path):
    (tmp_path / "goodreads_interactions.csv").write_text(CSV)
    (tmp_path / "book_id_map.csv").write_text(BOOK_IDS)
    write(tmp_path / "goodreads_books.json.gz", BOOKS)
    # Reviews are not looked at where there are interactions
    write(tmp_path / "goodreads_reviews_dedup.json.gz", EVENTS)
    log = goodreads.read(tmp_path)
    assert log.interactions.select("user_id", "item_id", "rating").rows() == [
        (0, 9, 5.0),
        (0, 402128, 4.0),
        (1, 9, 3.0),
    ]
    assert log.notes == {
        "books shelved and not read": 1,
        "books read and not rated": 1,
        "items without a title": 1,
        "interactions without item_id": 1,
        "interactions with an item without a title": 1,
    }
    assert not log.has_time


def test_several_genres(tmp_path):
    for genre in ("poetry", "children"):
        write(tmp_path / f"goodreads_interactions_{genre}.json.gz", EVENTS)
        write(tmp_path / f"goodreads_books_{genre}.json.gz", BOOKS)
    write(tmp_path / "goodreads_interactions_poetry.json", EVENTS)
    files = "goodreads_interactions_children.json.gz, goodreads_interactions_poetry.json"
    assert goodreads.find(tmp_path) == f"Goodreads ({files})"
    with pytest.raises(ValueError, match=rf"there are {files}. Give one of these files, not the folder."):
        goodreads.read(tmp_path)
    assert rows_of(goodreads.read(tmp_path / "goodreads_interactions_children.json.gz")) == ROWS


def test_errors(tmp_path):
    assert goodreads.find(tmp_path) is None
    assert goodreads.find(tmp_path / "absent") is None
    with pytest.raises(ValueError, match=r"not Goodreads. Give the folder with goodreads_interactions_GENRE.json.gz"):
        goodreads.read(tmp_path)
    events = tmp_path / "goodreads_interactions_poetry.json.gz"
    write(events, EVENTS)
    with pytest.raises(
        ValueError, match=r"poetry.json.gz: goodreads_books_poetry.json.gz is missing. Put it beside it."
    ):
        goodreads.read(tmp_path)
    write(tmp_path / "goodreads_books_poetry.json.gz", BOOKS)
    events.write_bytes(events.read_bytes()[:-12])
    with pytest.raises(ValueError, match=r"poetry.json.gz: in line 1 or after it, the compressed data is cut off"):
        goodreads.read(tmp_path)
    write(events, [{**row, "date_added": "2013-04-19"} for row in EVENTS])
    with pytest.raises(ValueError, match=r"no interactions are left .*5 interactions without a date that can be read"):
        goodreads.read(tmp_path)
    events.unlink()
    (tmp_path / "goodreads_interactions.csv").write_text(CSV)
    with pytest.raises(ValueError, match=r"goodreads_interactions.csv: goodreads_books.json.gz is missing"):
        goodreads.read(tmp_path)
    write(tmp_path / "goodreads_books.json.gz", BOOKS)
    with pytest.raises(ValueError, match=r"goodreads_interactions.csv: book_id_map.csv is missing"):
        goodreads.read(tmp_path)
