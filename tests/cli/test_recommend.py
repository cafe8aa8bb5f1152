import json
import logging

import polars as pl
import pytest
import torch
from transformers import AutoModelForCausalLM

from trl_dmpo import Recommender
from trl_dmpo.cli.main import main
from trl_dmpo.cli.users import Users, read_users, write_recommendations
from trl_dmpo.data import card
from trl_dmpo.data.build_config import BuildConfig
from trl_dmpo.data.plan import make_plan
from trl_dmpo.data.save import save_dataset

from ..conftest import TITLES
from ..data.test_log import make_log, taken


CATALOGUE = pl.DataFrame({"item_id": list(range(1, 14)), "title": [*TITLES, "[bold]300[/bold]"]})
HISTORIES = [["Alien", "Big"], [], [3, 6]]


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch):
    """An empty working directory and a wide screen."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture(scope="module")
def recommender(model_path, tokenizer, tmp_path_factory):
    """A recommender and the folder that it is in."""
    model = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)
    made = Recommender(model, tokenizer, CATALOGUE, "next_item(domain='film')")
    folder = tmp_path_factory.mktemp("recommenders") / "films"
    made.save_pretrained(folder)
    return made, str(folder)


def write_users(path, records):
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))


def test_one_user(recommender, capsys):
    made, folder = recommender
    assert main(["recommend", "--recommender", folder, "--history", "Alien", "3", "--k", "20"]) == 0
    printed = capsys.readouterr().out
    expected = made.recommend(["Alien", 3], 20)
    shown = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if line.startswith("│")]
    assert shown == [
        [str(place), title, str(item), f"{score:.3f}"]
        for place, (item, title, score) in enumerate(zip(*expected, strict=True), 1)
    ]
    assert "[bold]300[/bold]" in printed
    assert "Only 11 items are left to recommend." in printed


@pytest.mark.parametrize(
    ("given", "options"),
    [
        (["--exclude", "none"], {"exclude": None}),
        (["--exclude", "Jaws", "1"], {"exclude": ["Jaws", 1]}),
        (["--method", "beam", "--num_beams", "13"], {}),
    ],
)
def test_options_reach_the_recommender(given, options, recommender, capsys):
    made, folder = recommender
    assert main(["recommend", "--recommender", folder, "--history", "Big", "--k", "13", *given]) == 0
    printed = capsys.readouterr().out
    assert [line.split("│")[2].strip() for line in printed.splitlines() if line.startswith("│")] == made.recommend(
        ["Big"], 13, **options
    ).titles


def test_why(recommender, capsys):
    made, folder = recommender
    assert main(["recommend", "--recommender", folder, "--history", "Alien", "Big", "--k", "2", "--explain"]) == 0
    printed = capsys.readouterr().out
    first, second = made.recommend(["Alien", "Big"], 2).titles
    assert f"Why {first} rather than {second}: log-odds +" in printed
    assert "The model says: " in printed


@pytest.mark.parametrize(
    ("suffix", "ids"), [(".jsonl", None), (".csv", ["ann", "böb", "cem"]), (".parquet", [3, 1, 2])]
)
def test_a_file_of_users(suffix, ids, recommender, tmp_path, capsys):
    made, folder = recommender
    with_ids = [{} if ids is None else {"user_id": user} for user in ids or HISTORIES]
    write_users(tmp_path / "users.jsonl", [a | {"history": b} for a, b in zip(with_ids, HISTORIES, strict=True)])
    line = [
        "recommend",
        "--recommender",
        folder,
        "--users",
        "users.jsonl",
        "--output",
        f"new/out{suffix}",
        "--k",
        "12",
    ]
    assert main(line) == 0
    found = made.recommend(HISTORIES, 12)
    columns = {"user_id": ids} if ids else {}
    columns |= {"item_ids": [each.ids for each in found], "titles": [each.titles for each in found]}
    out = tmp_path / "new" / f"out{suffix}"
    if suffix == ".jsonl":
        records = [json.loads(each) for each in out.read_text().splitlines()]
        written = {name: [record[name] for record in records] for name in records[0]}
    else:
        frame = pl.read_csv(out) if suffix == ".csv" else pl.read_parquet(out)
        written = frame.to_dict(as_series=False)
    if suffix == ".csv":
        written |= {name: list(map(json.loads, written[name])) for name in ("item_ids", "titles", "scores")}
    for scores, each in zip(written.pop("scores"), found, strict=True):
        assert scores == pytest.approx(each.scores, abs=1e-4)
    assert written == columns
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    printed = capsys.readouterr().out
    assert "2 users got fewer than 12 items: no more were left." in printed
    with pytest.raises(SystemExit, match="2"):
        main(line)
    assert "is there. Choose another file, or set `overwrite_output`" in capsys.readouterr().err


def test_histories_in_every_kind_of_file(tmp_path):
    users = Users([["Heat", "a, b"], [], ["Amélie"]], ["u1", "u2", "u3"])
    frame = pl.DataFrame({"user_id": users.ids, "history": users.histories})
    frame.write_parquet(tmp_path / "users.parquet")
    frame.write_ndjson(tmp_path / "users.jsonl")
    frame.with_columns(history=pl.Series([json.dumps(each) for each in users.histories])).write_csv(
        tmp_path / "users.csv"
    )
    assert all(read_users(path) == users for path in tmp_path.iterdir())


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], r"has no rows"),
        ([{"history": ["Big"]}, {"items": ["Big"]}], r"users.jsonl\[1\] has no `history`, only: items"),
        ([["Big"]], r"users.jsonl\[0\] has no `history`, only: no columns"),
        (
            [{"history": ["Big", None]}],
            r"the `history` of users.jsonl\[0\] is \['Big', None\], but it is a list of ids",
        ),
        ([{"history": "Big, Heat"}], r"the `history` of users.jsonl\[0\] is 'Big, Heat', but it is a list"),
        ([{"history": [], "user_id": 1}, {"history": []}], r"the `user_id` of users.jsonl\[1\] is None"),
        (
            [{"history": [], "user_id": 1}, {"history": [], "user_id": "1"}],
            r"the `user_id` of users.jsonl\[1\] is '1'",
        ),
    ],
)
def test_a_bad_row_is_named(records, message, tmp_path):
    write_users(tmp_path / "users.jsonl", records)
    with pytest.raises(ValueError, match=message):
        read_users(tmp_path / "users.jsonl")


def test_an_item_that_is_not_there_is_named_and_nothing_is_written(recommender, tmp_path, capsys):
    write_users(tmp_path / "users.jsonl", [{"history": ["Big"]}, {"history": [999]}])
    with pytest.raises(SystemExit, match="2"):
        main(["recommend", "--recommender", recommender[1], "--users", "users.jsonl", "--output", "out.csv"])
    assert "error: `histories[1]`: the catalogue has no item of the id 999" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["users.jsonl"]


def test_what_fails_while_writing_leaves_what_was_there(recommender, tmp_path):
    (tmp_path / "out.parquet").write_text("before")
    found = recommender[0].recommend([["Big"]], 2)
    with pytest.raises(pl.exceptions.ShapeError):
        write_recommendations(tmp_path / "out.parquet", Users([["Big"]], ["a", "b"]), found, overwrite=True)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]


def test_a_recommender_made_on_the_spot_and_saved(model_path, tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.setattr(card, "_draw_picture", lambda path, plans: None)
    events = [(user, 1 + (5 * user + place) % 13, None, place) for user in range(6) for place in range(6)]
    options = {"num_negatives": 2, "ranking_negatives": 2, "negatives": "uniform"}
    plan = make_plan(make_log(taken(*events), CATALOGUE, "films", "film"), BuildConfig(**options))
    save_dataset([plan], tmp_path / "rows", options)
    line = ["recommend", "--model_name_or_path", model_path(), "--dataset_name", "rows", "--save_recommender", "films"]
    with caplog.at_level(logging.WARNING):
        assert main([*line, "--history", "Alien", "Hete"]) == 0
    first = capsys.readouterr().out
    assert first.startswith("Saved the recommender to films\n")
    assert "Did you mean 'Heat'?" in caplog.text
    assert main(["recommend", "--recommender", "films", "--history", "Alien", "Hete"]) == 0
    assert capsys.readouterr().out == first.partition("\n")[2]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--recommender", "r", "--history", "B", "--k", "0"], "`k` is 0, but it is at least 1."),
        (["--recommender", "r", "--history", "B", "--num_beams", "9"], "`num_beams` is for `--method beam`."),
        (["--recommender", "r", "--history", "B", "--overwrite_output"], "`overwrite_output` is for `--output`."),
        (
            ["--model_name_or_path", "m", "--dataset_name", "d", "--save_recommender", "s", "--k", "3"],
            "`k` is for recommending: give `--history` or `--users`, or leave it out.",
        ),
        (["--history", "Big"], "Give either `--recommender`, or `--model_name_or_path` and `--dataset_name`"),
        (["--model_name_or_path", "m", "--history", "Big"], "that has the catalogue: `--dataset_name`"),
        (["--recommender", "r"], "Give whom to recommend to: `--history`, or `--users`"),
        (["--recommender", "r", "--history", "Big", "--users", "u"], "Give either `--history` or `--users`"),
        (["--recommender", "r", "--users", "u"], "`--users` and `--output` go together"),
        (
            ["--recommender", "r", "--dataset_name", "d", "--history", "Big"],
            "`dataset_name` goes with `--model_name_or_",
        ),
        (["--recommender", "r", "--users", "u", "--output", "o", "--explain"], "`explain` is for one user"),
        (
            ["--recommender", "r", "--history", "Big", "--explain", "--method", "beam"],
            "leave out `exclude` and `method`",
        ),
        (["--recommender", "r", "--users", "u.csv", "--output", "o.csv"], "There is no file u.csv"),
        (
            ["--recommender", "r", "--history", "Big"],
            "r is no recommender: there is no recommender.json. Make one with",
        ),
        (["--recommender", "r", "--histroy", "Big"], "Unknown option --histroy. Did you mean --history?"),
    ],
)
def test_a_mistake_is_one_line_with_exit_code_2(argv, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["recommend", *argv])
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_an_output_that_cannot_be_written_is_said_before_a_model_is_loaded(tmp_path, capsys):
    write_users(tmp_path / "users.jsonl", [{"history": ["Big"]}])
    with pytest.raises(SystemExit, match="2"):
        main(["recommend", "--recommender", "none", "--users", "users.jsonl", "--output", "out.xlsx"])
    assert "`output`: out.xlsx is not of a kind that is written. It is one of: .jsonl" in capsys.readouterr().err
