import os
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import polars as pl
import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.conftest import not_interpreted
from trl_dmpo.cli.main import main
from trl_dmpo.cli.prepare import PrepareArguments
from trl_dmpo.data import BuildConfig


ASSETS = Path(os.environ.get("TRL_DMPO_ASSETS", Path.home() / ".cache" / "trl-dmpo-assets"))
ML_100K = ASSETS / "ml-100k"


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch):
    """An empty working directory, a wide screen, and a cache that goes with the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def ml_100k():
    """`ml-100k/`, small: 30 users who rated 10 of 40 films each, and one who rated a single one."""
    generator = np.random.default_rng(0)
    ratings = [
        (user, int(film) + 1, int(generator.integers(1, 6)), 881_250_000 + 100 * place + user)
        for user in range(1, 31)
        for place, film in enumerate(generator.choice(40, 10, replace=False))
    ]
    lines = ["\t".join(map(str, rating)) + "\n" for rating in [*ratings, (31, 1, 5, 881_250_000)]]
    flags = "|".join("01"[genre == 8] for genre in range(19))
    films = [f"{n}|Misérables {n}, Les (1995)|01-Jan-1995||http://us.imdb.com/M|{flags}\n" for n in range(1, 41)]
    Path("ml-100k").mkdir()
    Path("ml-100k/u.data").write_text("".join(lines))
    Path("ml-100k/u.item").write_bytes("".join(films).encode("latin-1"))
    return ratings


def write_books(folder="books"):
    """A folder in the columns of the house: 6 readers of 8 of 20 books each, ids that are text, no ratings."""
    rows = [f"u{user},b{(3 * user + place) % 20},{place}\n" for user in range(6) for place in range(8)]
    Path(folder).mkdir()
    Path(folder, "interactions.csv").write_text("user_id,item_id,timestamp\n" + "".join(rows))
    books = [f"b{number},Book {number},Author {number % 3}\n" for number in range(20)]
    Path(folder, "items.csv").write_text("item_id,title,author\n" + "".join(books))


LINE = shlex.split(
    "prepare --source ml-100k/ --output_dir out --num_negatives 15 --negatives popularity --prompt next_item "
    "--split leave_one_out --few_shot 20 --seed 0"
)


@pytest.fixture
def screen(capsys):
    """Run `trl-dmpo`, which must do well, and return what it prints."""

    def run(*argv):
        assert main(list(argv)) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture
def error(capsys):
    """Run `trl-dmpo prepare`, which must fail, and return its last line. It leaves nothing behind."""

    def run(*argv):
        here = set(Path().rglob("*"))
        with pytest.raises(SystemExit, match="2"):
            main(["prepare", *argv])
        assert set(Path().rglob("*")) == here
        return capsys.readouterr().err.strip().splitlines()[-1]

    return run


def content_hash(folder):
    return re.search(r"Content hash: `(\w{64})`", Path(folder, "README.md").read_text(encoding="utf-8"))[1]


def read(folder, configuration="preference"):
    paths = sorted(Path(folder, configuration).glob("*.parquet"))
    return {path.name.split("-")[0]: pl.read_parquet(path) for path in paths}


class TestScreen:
    def test_the_line_as_it_stands(self, ml_100k, screen):
        shown = screen(*LINE)
        liked = {user: [film for u, film, rating, _ in ml_100k if u == user and rating > 3] for user in range(1, 31)}
        counts = {
            "train": 20,
            "validation": sum(len(films) > 2 for films in liked.values()),
            "test": sum(len(films) > 1 for films in liked.values()),
        }
        rows = read("out")
        assert {split: frame.height for split, frame in rows.items()} == counts
        for user, film in rows["test"].select("user_id", "chosen_id").rows():
            assert film == liked[user][-1]
        assert "MovieLens 100K (u.data, u.item): 301 interactions of 31 users with 40 items" in shown
        for split, count in counts.items():
            assert re.search(rf"{split} *│ *{count} │ *{count} │", shown)
        assert f"{31 - counts['test']:>9} users without a target after 1 others\n" in shown
        assert f"Saved to out. Content hash {content_hash('out')}\n" in shown

    def test_three_rows_as_a_person_would_read_them(self, ml_100k, screen):
        shown = screen(*LINE)
        for number, row in enumerate(read("out")["train"].head(3).to_dicts(), 1):
            assert f" Row {number}, of user {row['user_id']} " in shown
            for line in row["prompt"].splitlines():
                assert re.search(rf"│ {re.escape(line)} *│\n", shown)
            assert re.search(rf"  chosen:  {re.escape(row['chosen'])} *│\n", shown)
            for answer in row["rejected"][:3]:
                assert re.search(rf"  rejected:{re.escape(answer)} *│\n", shown)
        assert shown.count("and 12 more") == shown.count("chosen:") == 3

    def test_a_table_of_ones_own_whatever_is_in_it(self, screen):
        lines = [
            f"[/b]{user},{item},2024-01-{item - user + 1:02},:smile: [red]{item}\n"
            for user in range(1, 5)
            for item in range(user, user + 6)
        ]
        Path("own.csv").write_text("reader,isbn,day,name\n" + "".join(lines))
        columns = ["user_id=reader", "item_id=isbn", "timestamp=day", "title=name"]
        shown = screen("prepare", "--source", "own.csv", "--output_dir", "[b]", "--columns", *columns)
        assert "Row 1, of user [/b]1 " in shown
        assert "  chosen:   :smile: [red]4 " in shown
        assert "Saved to [b]. " in shown
        assert "it has no time stamps" not in shown.lower()

    def test_a_log_without_time_stamps_says_so(self, screen):
        Path("own.csv").write_text(
            "user_id,item_id,title\n" + "".join(f"1,{n},T{n}\n2,{n + 3},T{n + 3}\n" for n in range(5))
        )
        shown = screen("prepare", "--source", "own.csv", "--output_dir", "out")
        assert "It has no time stamps: the order of its rows is taken for the order of events.\n" in shown

    @pytest.mark.parametrize("prompt", ["next_item(chat=True)", "rating"])
    def test_messages_and_few_answers(self, prompt, ml_100k, screen):
        shown = screen("prepare", "--source", "ml-100k", "--output_dir", "out", "--prompt", prompt)
        assert ("[user] A user has watched" in shown) == ("[assistant] Les Misérables" in shown) == ("chat" in prompt)
        assert ("and 1 more" in shown) == (prompt == "rating")

    def test_help_names_every_option(self, capsys):
        with pytest.raises(SystemExit, match="0"):
            main(["prepare", "--help"])
        shown = capsys.readouterr().out
        for option in (*fields(PrepareArguments), *fields(BuildConfig)):
            assert f"--{option.name}" in shown
            assert " ".join(option.metadata["help"].split()[:4]) in " ".join(shown.split())


class TestOptions:
    def test_the_file_of_a_dataset_makes_it_again(self, ml_100k, screen):
        screen(*LINE, "--negatives", "0.5 * popularity + 0.5 * uniform", "--positive=-inf", "--no_fewer_negatives")
        screen("prepare", "--config", "out/prepare.yaml", "--output_dir", "again")
        assert content_hash("again") == content_hash("out")
        assert Path("again/prepare.yaml").read_text() == Path("out/prepare.yaml").read_text()
        assert "--config prepare.yaml --output_dir out" in Path("out/README.md").read_text(encoding="utf-8")

    def test_a_flag_overrides_the_file(self, ml_100k, screen):
        screen(*LINE)
        screen(*LINE, "--seed", "1", "--output_dir", "flags")
        screen("prepare", "--config=out/prepare.yaml", "--seed", "1", "--output_dir", "file")
        assert content_hash("file") == content_hash("flags") != content_hash("out")

    def test_columns_in_a_file(self, screen):
        write_books()
        Path("books/interactions.csv").write_text(
            Path("books/interactions.csv").read_text().replace("user_id,item_id", "reader,isbn")
        )
        mapping = {"user_id": "reader", "item_id": "isbn"}
        Path("books/items.csv").rename("titles.csv")
        Path("titles.csv").write_text(Path("titles.csv").read_text().replace("item_id", "isbn"))
        given = {"source": "books/interactions.csv", "items": "titles.csv", "columns": mapping, "domain": "book"}
        Path("own.yaml").write_text(yaml.safe_dump(given))
        screen("prepare", "--config", "own.yaml", "--output_dir", "out")
        screen("prepare", "--config", "out/prepare.yaml", "--output_dir", "again")
        flags = [f"{ours}={theirs}" for ours, theirs in mapping.items()]
        screen("prepare", "--source", "books/interactions.csv", "--items", "titles.csv", "--domain", "book",
               "--output_dir", "flags", "--columns", *flags)  # fmt: skip
        assert content_hash("out") == content_hash("again") == content_hash("flags")
        assert "A user has read these books" in read("out")["train"]["prompt"][0]

    def test_an_existing_dataset(self, ml_100k, screen, error):
        screen(*LINE)
        first = content_hash("out")
        assert "`output_dir`: out holds a prepared dataset." in error(*LINE[1:], "--seed", "1")
        assert content_hash("out") == first
        screen(*LINE, "--seed", "1", "--overwrite_output_dir")
        assert content_hash("out") != first

    def test_tokens(self, ml_100k, screen, model_path, tokenizer):
        shown = screen(*LINE, "--tokenizer", model_path(), "--max_prompt_tokens", "170")
        lengths = [len(tokenizer(row)["input_ids"]) for frame in read("out").values() for row in frame["prompt"]]
        screen(*LINE, "--output_dir", "long")
        whole = [row for frame in read("long").values() for row in frame["prompt"]]
        cut = sum(len(tokenizer(row)["input_ids"]) > 170 for row in whole)
        assert max(lengths) <= 170
        assert f"{cut:>9} prompts with a history cut for `max_prompt_tokens`\n" in shown


class TestMistakes:
    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (["--source", "ml-100k"], "Say where to write the dataset: `--output_dir`."),
            (["--output_dir", "out"], "Give either `--source`, or `--train_domain` and `--test_domain`."),
            (
                ["--output_dir", "out", "--source", "ml-100k", "--test_domain", "ml-100k"],
                "Give either `--source`, or `--train_domain` and `--test_domain`.",
            ),
            (
                ["--output_dir", "out", "--train_domain", "ml-100k"],
                "`--train_domain` and `--test_domain` go together.",
            ),
            (
                ["--output_dir", "out", "--source", "ml-100k", "--hub_dataset_id", "me/films"],
                "`--hub_dataset_id` is for `--push_to_hub`. Set it, or leave this out.",
            ),
        ],
    )
    def test_what_does_not_go_together(self, argv, message, ml_100k, error):
        assert error(*argv) == f"error: {message}"

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (["--num_negative", "3"], "Unknown option --num_negative. Did you mean --num_negatives?"),
            (["stray"], "Unknown option stray."),
            (["--columns", "reader"], "`--columns`: 'reader' is not of the form user_id=reviewer."),
            (["--source", "ml-1m"], "ml-1m: there is no such file or folder. In"),
            (["--format", "ml-20m"], "There is no format 'ml-20m'."),
            (["--split", "leave_two_out"], "`split`: there is no 'leave_two_out', only:"),
            (["--num_negatives", "0"], "`num_negatives` is 0, but it is at least 1."),
            (["--positive", "5"], "`positive`: no rating is above 5; they go from 1 to 5. Lower it."),
            (["--min_history", "9"], "No rows are left: no user has 9 interactions"),
            (["--few_shot", "99"], "`few_shot`: there are"),
            (["--prompt", "rank_two"], "rank_two takes one negative, and there are 15. Set `num_negatives=1`"),
            (["--max_prompt_tokens", "99"], "`--tokenizer` and `--max_prompt_tokens` go together."),
            (["--tokenizer", "here"], "`--tokenizer` and `--max_prompt_tokens` go together."),
            (["--config", "none.yaml"], "there is no file none.yaml"),
            (["--output_dir", "ml-100k"], "`output_dir`: ml-100k is there and is not a prepared dataset."),
        ],
    )
    def test_is_one_line(self, argv, message, ml_100k, error):
        assert message in error("--source", "ml-100k", "--output_dir", "out", *argv)

    def test_an_option_of_a_file(self, ml_100k, error):
        Path("own.yaml").write_text("source: ml-100k\noutput_dir: out\nnum_negativs: 3\n")
        assert "Unknown option --num_negativs. Did you mean --num_negatives?" in error("--config", "own.yaml")


class TestTwoDomains:
    @pytest.mark.parametrize("dashes", [False, True])
    @pytest.mark.parametrize("ids", ["text", "numbers"])
    def test_training_is_from_the_one_and_the_test_from_the_other(self, dashes, ids, ml_100k, screen):
        write_books()
        if ids == "numbers":  # ratings, no genres, and ids that the films have, too
            for name in ("interactions.csv", "items.csv"):
                path = Path("books", name)
                path.write_text(re.sub(r"\b[ub](\d+)", r"\1", path.read_text()))
        names = ("--train-domain", "--test-domain") if dashes else ("--train_domain", "--test_domain")
        shown = screen("prepare", names[0], "ml-100k", names[1], "books", "--output_dir", "out", "--few_shot", "10")
        rows = read("out")
        assert {split: frame.height for split, frame in rows.items()}.items() >= {"train": 10, "test": 6}.items()
        for split, title in (("train", "Les Misérables"), ("validation", "Les Misérables"), ("test", "Book")):
            texts = [text for row in rows[split].to_dicts() for text in (row["chosen"], *row["rejected"])]
            assert all(text.startswith(f" {title} ") for text in texts)
        users = set(rows["test"]["user_id"])
        assert users == {f"{'u' * (ids == 'text')}{number}" for number in range(6)}
        assert "301 interactions" in shown
        assert "48 interactions of 6 users with 20 items" in shown
        # The catalogues have different columns
        items = datasets.load_dataset("out", "items")
        assert [len(items[split]) for split in ("train", "test")] == [40, 20]
        assert items["train"][0]["year"] == "1995"
        assert items["test"][0]["author"] == "Author 0"
        for configuration in ("preference", "sft", "ranking"):
            loaded = datasets.load_dataset("out", configuration)
            assert {split: len(part) for split, part in loaded.items()} == {
                split: frame.height for split, frame in read("out", configuration).items()
            }

    @pytest.mark.parametrize(
        ("domains", "options", "message"),
        [
            (("ml-100k", "books"), ["--split", "user(test=0)"], "`test_domain`: a table (interactions.csv, items.csv) has no rows to test on."),
            (("books", "ml-100k"), ["--min_history", "6"], "`train_domain`: a table (interactions.csv, items.csv) has no rows to train on."),
        ],
    )  # fmt: skip
    def test_one_without_rows(self, domains, options, message, ml_100k, error):
        write_books()
        argv = ["--train_domain", domains[0], "--test_domain", domains[1], "--output_dir", "out"]
        assert message in error(*argv, *options)


@pytest.mark.parametrize(("name", "expected"), [(None, "out"), ("me/films", "me/films")])
def test_push_to_hub(name, expected, ml_100k, screen, monkeypatch):
    import huggingface_hub

    calls = {}

    class Api:
        def create_repo(self, repo_id, **options):
            calls["create"] = repo_id, options
            return SimpleNamespace(repo_id=f"someone/{repo_id}")

        def upload_folder(self, folder_path, **options):
            calls["upload"] = (
                sorted(str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*.*")),
                options,
            )

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    screen(*LINE, "--push_to_hub", "--hub_private_repo", "True", *(["--hub_dataset_id", name] if name else []))
    assert calls["create"] == (expected, {"repo_type": "dataset", "private": True, "exist_ok": True})
    files, options = calls["upload"]
    assert options == {"repo_id": f"someone/{expected}", "repo_type": "dataset"}
    assert {"README.md", "prepare.yaml", "images/rows.png", "preference/train-00000-of-00001.parquet"} <= set(files)
    assert "output_dir" not in Path("out/prepare.yaml").read_text()


def start(code, *argv):
    return subprocess.Popen(
        [sys.executable, "-c", code, *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_signal_leaves_nothing_behind(ml_100k):
    waiting = (
        "import sys, time; from trl_dmpo.cli.main import main; from trl_dmpo.data import save\n"
        "save.write_card = lambda *args: (print('waiting', flush=True), time.sleep(60))\n"
        "main(sys.argv[1:])"
    )
    here = set(Path().rglob("*"))
    running = {
        number: start(waiting, *LINE[:-2], "--output_dir", f"out-{number}")
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    for number, process in running.items():
        assert any("waiting" in line for line in process.stdout)
        assert any(path.name.startswith(f".out-{number}.") for path in Path().iterdir())
        process.send_signal(number)
    codes = {number: process.wait(timeout=30) for number, process in running.items()}
    for process in running.values():
        process.communicate()
    assert codes[signal.SIGTERM] == 128 + signal.SIGTERM
    assert codes[signal.SIGINT] != 0
    assert set(Path().rglob("*")) == here


def test_neither_torch_nor_transformers_is_imported(ml_100k):
    code = (
        "import sys; from trl_dmpo.cli.main import main; main(sys.argv[1:])\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'torch', 'transformers', 'accelerate', 'peft'}))"
    )
    process = start(code, *LINE)
    shown, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert shown.splitlines()[-1] == "[]"
    assert errors == ""


TRAINING = {"max_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "report_to": "none",
            "save_strategy": "no", "use_cpu": True, "bf16": False, "disable_tqdm": True}  # fmt: skip


def training_argv(model, configuration):
    options = TRAINING | {"model_name_or_path": model, "dataset_name": "out", "dataset_config": configuration}
    return [
        part for name, value in (options | {"output_dir": "trained"}).items() for part in (f"--{name}", str(value))
    ]


def assert_trained(model):
    before, after = (load_file(Path(path) / "model.safetensors") for path in (model, "trained"))
    assert all(torch.isfinite(tensor).all() for tensor in after.values())
    assert any(not torch.equal(before[name], after[name]) for name in before)


@not_interpreted
def test_then_train(ml_100k, screen, model_path):
    screen(*LINE)
    assert "Model saved to trained" in screen(
        "train", *training_argv(model_path(), "preference"), "--gradient_checkpointing", "False"
    )
    assert_trained(model_path())


@pytest.mark.slow
def test_then_trl_sft(ml_100k, screen, model_path):
    screen(*LINE)
    done = subprocess.run(
        [Path(sys.executable).with_name("trl"), "sft", *training_argv(model_path(), "sft")],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": "cache"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert_trained(model_path())


@pytest.mark.real
@pytest.mark.skipif(not ML_100K.exists(), reason="MovieLens-100K is absent: run real_assets.py ml-100k")
def test_movielens_100k_whole(screen):
    shown = screen(*LINE, "--source", str(ML_100K), "--few_shot", "100")
    assert "100,000 interactions of 943 users with 1,682 items" in shown
    # User 685 liked one film only, and 237 liked films have the title of another one that the user had rated
    notes = {
        "interactions with a title that the user had met before, not to be predicted": 237,
        "users without a target after 1 others": 1,
    }
    for reason, count in notes.items():
        assert f"{count:>9} {reason}\n" in shown
    rows = read("out")
    assert {split: frame.height for split, frame in rows.items()} == {"train": 100, "validation": 942, "test": 942}
    assert all(set(frame["rejected_ids"].list.len()) == {15} for frame in rows.values())
    ranking = read("out", "ranking")
    assert {split: frame.height for split, frame in ranking.items()} == {"validation": 942, "test": 942}
    assert all(set(frame["candidate_ids"].list.len()) == {100} for frame in ranking.values())
