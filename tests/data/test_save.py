import re
from pathlib import Path

import datasets
import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
import yaml
from matplotlib.image import imread

from trl_dmpo.data import build_dataset, card, save
from trl_dmpo.data.build_config import BuildConfig
from trl_dmpo.data.plan import make_plan
from trl_dmpo.data.save import check_folder, save_dataset

from .test_build import OPTIONS, films, make_rows
from .test_log import make_log, taken


@pytest.fixture
def prepare(tmp_path):
    """Save the films' dataset in a folder of this name, with some options changed."""

    def run(folder, rows=None, titles=None, saving=None, **options):
        log = make_log(taken(*(rows or make_rows())), films() if titles is None else titles, "films", "film")
        options = OPTIONS | options
        plan = make_plan(log, BuildConfig(**options))
        return save_dataset([plan], tmp_path / folder, options, **(saving or {}))

    return run


@pytest.fixture
def without_picture(monkeypatch):
    """Drawing takes most of the time, and not every test is about it."""
    monkeypatch.setattr(card, "_draw_picture", lambda path, plans: None)


def files_of(folder, pattern="**/*"):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.glob(pattern) if path.is_file()}


def test_the_same_to_the_byte(prepare, tmp_path):
    first, again = prepare("first"), prepare("again")
    assert first == again
    files = files_of(tmp_path / "first")
    assert files == files_of(tmp_path / "again")
    assert len([name for name in files if name.endswith(".parquet")]) == 9
    shuffled = prepare("shuffled", rows=make_rows()[::-1], titles=films()[::-1])
    assert shuffled.content_hash == first.content_hash
    assert files_of(tmp_path / "shuffled", "**/*.parquet") == files_of(tmp_path / "first", "**/*.parquet")


@pytest.mark.usefixtures("without_picture")
def test_what_changes_the_hash(prepare):
    titles = films()
    renamed = titles.with_columns(title=pl.when(pl.col("item_id") == 3).then(pl.lit("M")).otherwise("title"))
    hashes = [
        prepare("plain").content_hash,
        prepare("seed", seed=1).content_hash,
        prepare("title", titles=renamed).content_hash,
        prepare("feature", titles=titles.with_columns(genres=pl.col("genres").list.reverse())).content_hash,
        prepare("row", rows=make_rows()[:-1]).content_hash,
    ]
    assert len(set(hashes)) == len(hashes)


@pytest.mark.usefixtures("without_picture")
def test_load_dataset_reads_what_was_built(prepare, tmp_path):
    saved = prepare("out")
    log = make_log(taken(*make_rows()), films(), "films", "film")
    loaded = {
        name: datasets.load_dataset(str(tmp_path / "out"), name, cache_dir=str(tmp_path / "cache"))
        for name in ("preference", "sft", "ranking", "items")
    }
    for name in ("preference", "sft", "ranking"):
        built = build_dataset(log, name, **OPTIONS)
        assert {split: rows.to_list() for split, rows in loaded[name].items()} == {
            split: rows.to_list() for split, rows in built.items()
        }
    counts = {name: {split: len(rows) for split, rows in splits.items()} for name, splits in loaded.items()}
    assert saved.rows == counts
    assert saved.examples == loaded["preference"]["train"].to_list()[:3]
    assert datasets.load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))["train"].column_names == (
        loaded["preference"]["train"].column_names
    )


def test_the_catalogue_counts_likes_of_training(tmp_path):
    # By user the liked ones in order, of which the last two are of the test and of validation; item 9 is disliked
    rows = [(1, item, time, 5) for time, item in enumerate([0, 1, 2, 3])] + [(1, 9, 9, 1)]
    rows += [(2, item, time, 4) for time, item in enumerate([1, 0, 4, 5, 6])]
    plan = make_plan(make_log(taken(*rows), films()[:10], "films"), BuildConfig())
    save_dataset([plan], tmp_path / "out", {})
    items = pl.read_parquet(tmp_path / "out/items/train-00000-of-00001.parquet")
    assert items.drop("popularity").equals(films()[:10])
    assert items["popularity"].to_list() == [2, 2, 0, 0, 1, 0, 0, 0, 0, 0]


@pytest.mark.usefixtures("without_picture")
class TestInterrupted:
    @pytest.fixture
    def before(self, prepare, tmp_path):
        """The files of a dataset that is there already, in `out`."""
        prepare("out", seed=5)
        return files_of(tmp_path)

    def interrupt(self, error):
        def progress(rows):
            raise error

        return progress

    @pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("the row of user 7"), SystemExit(143)])
    def test_nothing_is_left(self, error, prepare, tmp_path, before):
        with pytest.raises(type(error)) as raised:
            prepare("new/here", saving={"progress": self.interrupt(error)})
        assert raised.value is error
        with pytest.raises(type(error)):
            prepare("out", saving={"progress": self.interrupt(error), "overwrite": True})
        assert files_of(tmp_path) == before
        assert [path.name for path in tmp_path.iterdir() if path.name != "new"] == ["out"]
        assert list((tmp_path / "new").iterdir()) == []

    def test_at_the_last_moment(self, prepare, tmp_path, before, monkeypatch):
        rename = Path.rename

        def fail(path, target):
            if path.name == "new":
                raise KeyboardInterrupt
            return rename(path, target)

        monkeypatch.setattr(Path, "rename", fail)
        with pytest.raises(KeyboardInterrupt):
            prepare("out", saving={"overwrite": True})
        assert files_of(tmp_path) == before

    def test_a_folder_that_came_up_meanwhile(self, prepare, tmp_path):
        def progress(rows):
            (tmp_path / "out").mkdir(exist_ok=True)
            (tmp_path / "out" / "thesis.tex").write_text("years of work")

        with pytest.raises(FileExistsError, match="is not a prepared dataset"):
            prepare("out", saving={"progress": progress, "overwrite": True})
        assert files_of(tmp_path) == {"out/thesis.tex": b"years of work"}

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
    def test_a_full_disk(self, prepare, tmp_path, before, monkeypatch):
        writer = pq.ParquetWriter
        monkeypatch.setattr(save.pq, "ParquetWriter", lambda path, *args, **kw: writer("/dev/full", *args, **kw))
        with pytest.raises(OSError, match="No space left on device"):
            prepare("out", saving={"overwrite": True})
        assert files_of(tmp_path) == before

    def test_the_last_file_fails(self, prepare, tmp_path, monkeypatch):
        write = save._Split.write

        def fail(split, table):
            if "popularity" in table.column_names:
                raise OSError(28, "No space left on device")
            write(split, table)

        monkeypatch.setattr(save._Split, "write", fail)
        with pytest.raises(OSError, match="No space left on device"):
            prepare("out")
        assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("without_picture")
class TestFolder:
    @pytest.mark.parametrize("kind", ["file", "folder"])
    @pytest.mark.parametrize("overwrite", [False, True])
    def test_what_is_not_ours_stays(self, kind, overwrite, prepare, tmp_path):
        path = tmp_path / "out" / "thesis.tex" if kind == "folder" else tmp_path / "out"
        path.parent.mkdir(exist_ok=True)
        path.write_text("years of work")
        with pytest.raises(FileExistsError) as error:
            prepare("out", saving={"overwrite": overwrite})
        assert str(error.value) == (
            f"`output_dir`: {tmp_path / 'out'} is there and is not a prepared dataset. Choose another folder."
        )
        assert path.read_text() == "years of work"

    def test_a_dataset_is_replaced_only_if_asked(self, prepare, tmp_path):
        prepare("out", split="user(validation=0, test=0.5)")
        with pytest.raises(FileExistsError, match=r"holds a prepared dataset.*set `overwrite_output_dir`"):
            prepare("out")
        prepare("out", saving={"overwrite": True})
        prepare("new")
        assert files_of(tmp_path / "out") == files_of(tmp_path / "new")
        assert {path.name for path in tmp_path.iterdir()} == {"out", "new"}

    def test_an_empty_folder_will_do(self, prepare, tmp_path):
        (tmp_path / "out").mkdir()
        check_folder(tmp_path / "out", overwrite=False)
        prepare("out")
        assert (tmp_path / "out" / "README.md").is_file()


class TestCard:
    @pytest.fixture
    def text(self, prepare, tmp_path):
        self.saved = prepare("out", num_negatives=39, prompt="next_item(wording='quotes')")
        return (tmp_path / "out" / "README.md").read_text(encoding="utf-8")

    def test_the_head_names_every_file(self, text, tmp_path):
        head = yaml.safe_load(text.split("---\n")[1])
        named = {
            (config["config_name"], file["split"]): [
                str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").glob(file["path"])
            ]
            for config in head["configs"]
            for file in config["data_files"]
        }
        assert sorted(path for paths in named.values() for path in paths) == sorted(
            files_of(tmp_path / "out", "**/*.parquet")
        )
        assert set(named) == {(name, split) for name, rows in self.saved.rows.items() for split in rows}
        assert [config["config_name"] for config in head["configs"] if config.get("default")] == ["preference"]

    def test_the_counts_are_those_of_the_rows(self, text, tmp_path):
        lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
        table = {line[0]: dict(zip(lines[0][1:], line[1:], strict=True)) for line in lines[2:]}
        rows = {
            path.name.split("-")[0]: pl.read_parquet(path) for path in (tmp_path / "out/preference").glob("*.parquet")
        }
        assert set(table) == set(rows) == {"train", "validation", "test"}

        def summary(lists):
            lengths = lists.list.len()
            return f"{lengths.mean():.1f} ({lengths.min()} to {lengths.max()})"

        for split, frame in rows.items():
            assert table[split] == {
                "rows": str(frame.height),
                "users": str(frame["user_id"].n_unique()),
                "items": str(frame["chosen_id"].n_unique()),
                "history": summary(frame["history_ids"]),
                "negatives": summary(frame["rejected_ids"]),
            }

    def test_parameters_notes_and_hash_are_there(self, text, tmp_path):
        options = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])
        assert options == yaml.safe_load((tmp_path / "out" / "prepare.yaml").read_text())
        assert options["num_negatives"] == 39
        total = sum(self.saved.rows["preference"].values())
        assert self.saved.notes["rows with fewer than 39 negatives"] == total
        for reason, count in self.saved.notes.items():
            assert f"- {count} {reason}\n" in text
        assert f"`{self.saved.content_hash}`" in text
        assert '"chosen": " ' in text

    def test_the_picture_shows_every_split(self, text, tmp_path):
        pixels = (imread(tmp_path / "out" / card.PICTURE)[..., :3] * 255).round().astype(int)
        assert f"]({card.PICTURE})" in text
        for panel in np.array_split(pixels, 3, axis=1):
            assert 0.02 < (panel != 255).any(axis=2).mean() < 0.9
        for color in card._COLORS.values():
            wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
            assert (pixels == wanted).all(axis=2).sum() > 2_000  # more than the legend has

    @pytest.mark.parametrize("options", [{"prompt": "like"}, {"split": "user(validation=0, test=0)"}])
    def test_every_dataset_has_one(self, options, prepare, tmp_path):
        prepare("out", **options)
        assert (tmp_path / "out" / card.PICTURE).stat().st_size > 5_000
