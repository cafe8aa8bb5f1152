import os
from pathlib import Path

import pytest

from trl_dmpo.data.sources import load_interactions


ASSETS = Path(os.environ.get("TRL_DMPO_ASSETS", Path.home() / ".cache" / "trl-dmpo-assets"))

INTER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\nu1\t7\t4.5\t881250949.0\nu1\t8\t3\t881250940\n"
ITEM = 'item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\tscore:float\n7\t"Net", The\t1995\tSci-Fi Thriller\t1.5\n8\tBig\t\t\t\n'


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "ml.inter").write_text(INTER)
    (tmp_path / "ml.item").write_text(ITEM)
    return tmp_path


def test_atomic_files(folder):
    log = load_interactions(folder)
    assert log.source == "RecBole atomic files (ml.inter, ml.item; titles from movie_title)"
    assert log.domain == "film"
    assert log.interactions.select("user_id", "item_id", "rating", "timestamp").rows() == [
        ("u1", 8, 3.0, 881250940),
        ("u1", 7, 4.5, 881250949),
    ]
    assert log.items.columns == ["item_id", "title", "release_year", "class"]
    assert log.items.rows() == [(7, 'The "Net"', "1995", ["Sci-Fi", "Thriller"]), (8, "Big", None, [])]


def test_other_names_and_tokens_between_commas(tmp_path):
    (tmp_path / "anime.inter").write_text("uid:token\tanime_id:token\tlabel:float\n1\t0032\t1\n")
    (tmp_path / "anime.item").write_text(
        "anime_id:token\tname:token_seq\ttags:token_seq\n0032\tFate, The\tSlice of Life, Drama\n"
    )
    log = load_interactions(tmp_path / "anime.inter")
    assert (log.domain, log.has_time) == ("item", False)
    assert log.interactions.rows() == [(1, "0032", 0)]
    assert log.items.rows() == [("0032", "Fate, The", ["Slice of Life", "Drama"])]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("b.inter", INTER, "there are the .inter files b.inter, ml.inter. Give the one to read"),
        ("ml.item", None, "ml.item: there is no such file, and so there are no titles. Put it beside ml.inter"),
        ("ml.item", "item_id:token\tyear:token\n", "there is no column of titles, only: item_id, year. Rename the one"),
        ("ml.item", "movie:token\ttitle:token\n", "none of its columns of tokens (user_id, item_id, rating, timestamp) is in"),
        ("ml.inter", "user_id\titem_id\n", "ml.inter, line 1: the columns 'user_id', 'item_id' have no type"),
        ("ml.inter", INTER.replace("4.5", "good"), "ml.inter, line 2: rating:float 'good' is not a number. Mend"),
    ],
)  # fmt: skip
def test_what_is_wrong(folder, name, text, message):
    (folder / name).unlink() if text is None else (folder / name).write_text(text)
    with pytest.raises(ValueError, match=r"\.") as error:
        load_interactions(folder)
    assert message in str(error.value)


@pytest.mark.real
@pytest.mark.skipif(not (ASSETS / "ml-100k").exists(), reason="MovieLens-100K is absent: run real_assets.py ml-100k")
def test_movielens_100k():
    log = load_interactions(ASSETS / "ml-100k")
    assert (log.interactions.height, log.interactions["user_id"].n_unique(), log.items.height) == (100_000, 943, 1_682)
    assert (log.domain, log.has_time, log.notes) == ("film", True, {})
    assert log.items.row(11) == (12, "The Usual Suspects", "1995", ["Crime", "Thriller"])
    assert log.interactions["rating"].value_counts().sort("rating")["count"].to_list() == [
        6110,
        11370,
        27145,
        34174,
        21201,
    ]
    assert (log.interactions["timestamp"].min(), log.interactions["timestamp"].max()) == (874724710, 893286638)
