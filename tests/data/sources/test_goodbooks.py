import pytest

from trl_dmpo.data.sources import goodbooks


# As published, but for columns of images and counts of ratings; the second book has no original title, the fourth no year
BOOKS = """\
book_id,goodreads_book_id,best_book_id,work_id,books_count,isbn,isbn13,authors,original_publication_year,original_title,title,language_code
1,2767052,2767052,2792775,272,439023483,9.78043902348e+12,Suzanne Collins,2008.0,The Hunger Games,"The Hunger Games (The Hunger Games, #1)",eng
2,3,3,4640799,491,439554934,9.78043955493e+12,"J.K. Rowling, Mary GrandPré",1997.0,,"Harry Potter and the Sorcerer's Stone (Harry Potter, #1)",eng
3,1371,1371,3293141,1726,0140275363,9.78014027536e+12,"Homer, Robert Fagles",-750.0,Ἰλιάς,"The ""Iliad"", of Troy",eng
4,6,6,7,8,,,Anonymous,,,Untitled,
5,7,7,9,8,,,Nobody,2001.0,No title,,eng
"""
RATINGS = "user_id,book_id,rating\n1,3,5\n2,4,4\n2,2,5\n2,1,3\n1,1,1\n2,2,2\n1,5,5\n"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "books.csv").write_text(BOOKS, encoding="utf-8")
    (tmp_path / "ratings.csv").write_text(RATINGS)
    return tmp_path


def test_ratings_in_the_order_of_the_file(folder):
    log = goodbooks.read(folder)
    assert log.interactions.select("user_id", "item_id", "rating").rows() == [
        (1, 3, 5.0),
        (1, 1, 1.0),
        (2, 4, 4.0),
        (2, 2, 5.0),
        (2, 1, 3.0),
    ]
    assert (log.source, log.domain, log.has_time) == ("goodbooks-10k (ratings.csv, books.csv)", "book", False)
    assert log.notes == {
        "items without a title": 1,
        "interactions with an item without a title": 1,
        "repeated interactions, the first kept": 1,
    }


def test_books(folder):
    assert goodbooks.read(folder / "ratings.csv").items.rows() == [
        (1, "The Hunger Games (The Hunger Games, #1)", "2008", ["Suzanne Collins"]),
        (2, "Harry Potter and the Sorcerer's Stone (Harry Potter, #1)", "1997", ["J.K. Rowling", "Mary GrandPré"]),
        (3, 'The "Iliad", of Troy', "-750", ["Homer", "Robert Fagles"]),
        (4, "Untitled", None, ["Anonymous"]),
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("ratings.csv", "userId,movieId,rating,timestamp\n1,2,3.5,1112486027\n"),
        ("ratings.csv", ""),
        ("ratings.csv", "\xff\xfe"),
        ("ratings.csv", None),
        # The first release: here the ids of the ratings are those of the column `id`
        (
            "books.csv",
            "id,book_id,best_book_id,work_id,authors,original_publication_year,title\n1,2767052,2767052,2792775,A,2008.0,B\n",
        ),
        ("books.csv", None),
    ],
)
def test_other_folders(folder, name, content):
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content, encoding="latin-1")
    assert goodbooks.find(folder) is None
    with pytest.raises(
        ValueError, match=r"not goodbooks-10k. Give the folder with ratings.csv .columns user_id, book_id, rating"
    ):
        goodbooks.read(folder)


def test_broken_files(folder):
    (folder / "ratings.csv").write_text(RATINGS + "3,1,five\n")
    with pytest.raises(ValueError, match=r"ratings.csv, line 9: rating 'five' is not a number"):
        goodbooks.read(folder)
    (folder / "ratings.csv").write_text(RATINGS + "3,1")
    with pytest.raises(ValueError, match=r"ratings.csv, line 9: the file is cut off: its last line has 2 fields of 3"):
        goodbooks.read(folder)
