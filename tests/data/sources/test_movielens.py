import polars as pl
import pytest

from trl_dmpo.data.sources import load_interactions, movielens


def item(number, title, *genres):
    flags = "|".join("1" if index in genres else "0" for index in range(19))
    return f"{number}|{title}|01-Jan-1995||http://us.imdb.com/M|{flags}\n"


@pytest.fixture
def ml_100k(tmp_path):
    (tmp_path / "u.data").write_text("196\t242\t3\t881250949\n186\t267\t1\t891717742\n196\t1\t5\t881250940\n")
    films = (
        item(1, "Toy Story (1995)", 3, 4, 5) + item(242, "Misérables, Les (1995)", 8) + "267|unknown||||1" + "|0" * 18
    )
    (tmp_path / "u.item").write_bytes(films.encode("latin-1"))
    return tmp_path


def test_100k(ml_100k):
    log = load_interactions(ml_100k)
    assert (log.source, log.domain) == ("MovieLens 100K (u.data, u.item)", "film")
    assert log.interactions.rows() == [(196, 1, 5.0, 881250940), (196, 242, 3.0, 881250949)]
    assert log.items.rows() == [
        (1, "Toy Story (1995)", "1995", ["Animation", "Children's", "Comedy"]),
        (242, "Les Misérables (1995)", "1995", ["Drama"]),
    ]
    assert log.notes == {"items without a title": 1, "interactions with an item without a title": 1}


DAT = "1::1193::5::978300760\r\n2::661::3.5::978302109\r\n"
MOVIES = "661::City of Lost Children, The (Cité des enfants perdus, La) (1995)::Adventure|Sci-Fi\r\n1193::Alien: A::(no genres listed)\r\n"


@pytest.mark.parametrize(("users", "encoding", "edition"), [(True, "latin-1", "1M"), (False, "utf-8", "10M")])
def test_dat(tmp_path, users, encoding, edition):
    (tmp_path / "ratings.dat").write_bytes(DAT.encode())
    (tmp_path / "movies.dat").write_bytes(MOVIES.encode(encoding))
    if users:
        (tmp_path / "users.dat").touch()
    log = load_interactions(tmp_path / "ratings.dat")
    assert log.source == f"MovieLens {edition} (ratings.dat, movies.dat)"
    assert log.interactions["rating"].to_list() == [5, 3.5]
    assert log.items.rows() == [
        (661, "The City of Lost Children (La Cité des enfants perdus) (1995)", "1995", ["Adventure", "Sci-Fi"]),
        (1193, "Alien: A", None, []),
    ]


def test_csv(tmp_path):
    (tmp_path / "ratings.csv").write_text(
        "userId,movieId,rating,timestamp\n1,11,4.5,1112486027\n1,12,0.5,1112484676\n"
    )
    movies = 'movieId,title,genres\n11,"American President, The (1995)",Comedy|Drama\n12,"""Great"", 2 (2006–2007)",(no genres listed)\n'
    (tmp_path / "movies.csv").write_text(movies, encoding="utf-8")
    log = load_interactions(tmp_path)
    assert log.source == "MovieLens 20M or later (ratings.csv, movies.csv)"
    assert log.interactions.rows() == [(1, 12, 0.5, 1112484676), (1, 11, 4.5, 1112486027)]
    assert log.items.rows() == [
        (11, "The American President (1995)", "1995", ["Comedy", "Drama"]),
        (12, '"Great", 2 (2006–2007)', "2006", []),
    ]


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("Matrix, The (1999)", "The Matrix (1999)"),
        ("King and I, The", "The King and I"),
        ("Vitelloni, I (1953)", "I Vitelloni (1953)"),
        ("Bear, The (Ours, L') (1988)", "The Bear (L'Ours) (1988)"),
        ("Avventura, L' (a.k.a. Adventure, The) (1960)", "L'Avventura (a.k.a. The Adventure) (1960)"),
        ("Eighth Day, The (Le Huitième jour ) (1996)", "The Eighth Day (Le Huitième jour) (1996)"),
        ("Shanghai Triad (Yao a yao dao waipo qiao) (1995)", "Shanghai Triad (Yao a yao dao waipo qiao) (1995)"),
        ("Girl, Interrupted (1999)", "Girl, Interrupted (1999)"),
        ("(500) Days of Summer (2009)", "(500) Days of Summer (2009)"),
        ("Good, the Bad and the Ugly, The (Buono, il brutto, Il) (1966)", "The Good, the Bad and the Ugly (Il Buono, il brutto) (1966)"),
    ],
)  # fmt: skip
def test_articles(written, read):
    assert pl.select(movielens.turn_articles(pl.lit(written))).item() == read


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("u.data", "196\t242\t3\t881250949\n186\tx\t1\t891717742\n", "u.data, line 2: item_id 'x' is not an integer"),
        ("u.data", "196\t242\t3\t881250949\n186\t26", "u.data, line 2: the file is cut off: its last line has 2 fields of 4"),
        ("u.data", "", "u.data: the file is empty"),
        ("u.item", item(1, "Toy | Story", 3), "u.item, line 1: 25 fields for 24 columns"),
    ],
)  # fmt: skip
def test_broken_files(ml_100k, name, text, message):
    (ml_100k / name).write_text(text)
    with pytest.raises(ValueError, match=r"(?i)mend|get") as error:
        load_interactions(ml_100k)
    assert message in str(error.value)


def test_what_is_not_movielens(tmp_path):
    with pytest.raises(ValueError, match=r"not MovieLens. Give the folder with u.data and u.item"):
        load_interactions(tmp_path, format="movielens")
