import logging
import subprocess
import sys

import pytest

from trl_dmpo.data.sources import SOURCES, load_interactions


RATINGS = "userId,movieId,rating,timestamp\n1,11,4.5,1112486027\n"


@pytest.fixture
def movies(tmp_path):
    folder = tmp_path / "ml-20m"
    folder.mkdir()
    (folder / "ratings.csv").write_text(RATINGS)
    (folder / "movies.csv").write_text("movieId,title,genres\n11,Big (1988),Comedy\n")
    return folder


def test_it_says_what_it_took_a_folder_for(movies, caplog):
    with caplog.at_level(logging.INFO):
        log = load_interactions(str(movies), domain="item")
    assert f"{movies} was taken for {log.source}" in caplog.text
    assert log.domain == "item"


def test_a_folder_of_two_sources(movies):
    (movies / "ml.inter").write_text("user_id:token\titem_id:token\n5\t6\n")
    (movies / "ml.item").write_text("item_id:token\tname:token_seq\n6\tHeat\n")
    with pytest.raises(ValueError, match=r"may be taken for MovieLens .*; RecBole .* Say which by format=") as error:
        load_interactions(movies)
    assert "format='movielens'" in str(error.value)
    assert load_interactions(movies, format="recbole").items["title"].to_list() == ["Heat"]


def test_not_recognised(tmp_path):
    for number in range(12):
        (tmp_path / f"part{number:02}.bin").touch()
    with pytest.raises(ValueError, match=r"not recognised. It holds part00.bin, .* and 2 more") as error:
        load_interactions(tmp_path)
    # Every source says what it looks like
    assert all(f"- {name}: " in str(error.value) for name in SOURCES)
    assert "columns={" in str(error.value)
    (tmp_path / "ml-1m.zip").touch()
    with pytest.raises(ValueError, match=r"this is an archive. Unpack it"):
        load_interactions(tmp_path / "ml-1m.zip")


def test_a_table_is_told_its_columns(movies):
    (movies / "movies.csv").unlink()
    with pytest.raises(
        ValueError, match=r"columns={'user_id': 'userId', 'item_id': 'movieId', 'title': 'your column'}"
    ):
        load_interactions(movies / "ratings.csv")


def test_wrong_paths(movies):
    with pytest.raises(FileNotFoundError, match=r"In .*, did you mean 'ml-20m'\?"):
        load_interactions(movies.parent / "ml-2m")
    with pytest.raises(FileNotFoundError, match="there is nothing with such a name"):
        load_interactions(movies / "a" / "b")
    with pytest.raises(FileNotFoundError, match=r"items\.csv: there is no such file"):
        load_interactions(movies / "ratings.csv", items=movies / "items.csv")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "movielense"}, "There is no format 'movielense'. Give one of: movielens, amazon"),
        ({"format": "movielens", "columns": {"user_id": "userId"}}, "columns= has no meaning for movielens"),
        ({"format": "amazon"}, "there are no reviews of Amazon. Give the file of one category"),
        ({"format": "tabular"}, "there is no column 'user_id', 'item_id', 'title', only: userId"),
    ],
)
def test_wrong_options(movies, options, message):
    with pytest.raises(ValueError, match=message):
        load_interactions(movies, **options)


def test_importing_is_quick():
    code = "import sys, trl_dmpo.data.sources; print(*{'torch', 'transformers', 'datasets', 'pyarrow', 'pandas'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
