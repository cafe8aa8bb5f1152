import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import yaml
from transformers import AutoModelForCausalLM

from tests.conftest import make_rows
from tests.ranking.test_rows import prepare
from trl_dmpo.cli.main import main
from trl_dmpo.ranking.scorer import Scorer


NASTY = " [red]Heat[/red] <script>document.title='ran'</script>"


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch):
    """An empty working directory with rows, a wide screen, and a cache that goes with the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    write_rows("rows.jsonl")


def write_rows(name, **changes):
    rows = make_rows(5, 3)
    rows[1]["rejected"][0] = NASTY
    rows = [row | {"user_id": place // 2, "kind": "ab"[place % 2]} | changes for place, row in enumerate(rows)]
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def argv(model_path):
    def build(*more, models=("llama",), rows="rows.jsonl", out="out"):
        models = [model_path(name) for name in models]
        return ["evaluate", "--model_name_or_path", *models, "--dataset_name", rows, "--output_dir", out, *more]

    return build


@pytest.fixture
def refused(capsys):
    """From arguments to the one line of an error."""

    def run(argv):
        with pytest.raises(SystemExit, match="2"):
            main(argv)
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        return line

    return run


def read(folder="out"):
    return json.loads(Path(folder, "results.json").read_text()), pl.read_parquet(Path(folder, "per_user.parquet"))


def test_two_models(argv, model_path, tokenizer, capsys):
    Path("options.yaml").write_text(yaml.safe_dump({"cutoffs": [1, 2], "normalize": "mean", "group_by": "kind"}))
    assert main(argv("--config=options.yaml", "--generate", "--max_new_tokens", "4", models=("llama", "gpt2"))) == 0
    shown = capsys.readouterr().out
    results, table = read()
    llama, gpt2 = model_path("llama"), model_path("gpt2")
    assert list(results["results"]) == table["model"].unique(maintain_order=True).to_list() == [llama, gpt2]
    model = AutoModelForCausalLM.from_pretrained(gpt2)
    own = table.filter(pl.col("model") == gpt2)
    for row, scores, candidates in zip(make_rows(5, 3), own["scores"], own["candidates"].to_list(), strict=True):
        alone = Scorer(model, tokenizer).score([row["prompt"]], candidates, normalize="mean")[0]
        np.testing.assert_allclose(scores, alone, atol=1e-4)
    assert own["candidates"][1][1] == NASTY
    assert set(results["groups"]) == {"kind"}
    assert results["settings"]["models"][gpt2]["normalize"] == "mean"
    assert results["settings"]["users"] == 3
    assert results["comparisons"].keys() == {gpt2}
    assert own["generated"].null_count() == 0
    hit_rate = results["results"][gpt2]["hit_rate@2"]
    assert re.search(rf"hit_rate@2 .* {hit_rate['value']:.4f} \[{hit_rate['low']:.4f}, ", shown)
    assert "gpt2 against llama, on the same rows" in shown
    assert "Saved to out: results.json, per_user.parquet, report.html" in shown
    assert "<script>document" not in Path("out/report.html").read_text()
    assert sorted(os.listdir("out")) == ["per_user.parquet", "report.html", "results.json"]


def test_models_are_loaded_as_the_options_say(argv, model_path):
    assert (
        main(argv("--max_rows", "2", "--dtype", "bfloat16", "--attn_implementation", "eager", "--device", "cpu")) == 0
    )
    loaded = read()[0]["settings"]["models"][model_path()]
    assert [loaded[name] for name in ("dtype", "attn_implementation", "device")] == ["bfloat16", "eager", "cpu"]


def test_compared_to_an_earlier_run(argv, model_path, refused, capsys):
    assert main(argv("--max_rows", "3")) == 0
    assert "A random sample of 3 rows (seed 0), in their order." in capsys.readouterr().out
    assert main(argv("--max_rows", "3", "--compare_to", "out", models=("gpt2", "llama"), out="new")) == 0
    results, table = read("new")
    llama, gpt2 = model_path("llama"), model_path("gpt2")
    assert list(results["results"]) == [f"{llama} (out)", gpt2, llama]
    before, _, again = (part["scores"].to_list() for part in table.partition_by("model", maintain_order=True))
    assert before == read()[1]["scores"].to_list()
    np.testing.assert_allclose(before, again, atol=1e-4)
    assert results["comparisons"][llama]["mrr"]["difference"]["value"] == pytest.approx(0)
    assert "other rows: rows.jsonl (3 rows), and here rows.jsonl (4 rows)" in refused(
        argv("--max_rows", "4", "--compare_to", "out", out="other")
    )
    write_rows("rows.jsonl", prompt="Changed:")
    assert "but other prompts, candidates or right answers" in refused(
        argv("--max_rows", "3", "--compare_to", "out", out="other")
    )
    assert not Path("other").exists()


def test_another_way_of_scoring_does_not_pass_for_another_model(argv, capsys):
    assert main(argv("--max_rows", "2")) == 0
    assert main(argv("--max_rows", "2", "--normalize", "mean", "--generate", "--compare_to", "out", out="new")) == 0
    shown = capsys.readouterr().out
    assert "Mind that `normalize` was sum in the earlier run, and is mean here." in shown
    assert "`dtype`" not in shown
    assert "`max_new_tokens`" not in shown


def test_the_whole_catalogue(argv, capsys):
    prepare(Path("films"))
    options = ("--dataset_split", "validation", "--max_rows", "4", "--full_catalogue")
    assert main(argv(*options, rows="films")) == 0
    assert "Ranked: all 39 answers that the catalogue has, but those of the history." in capsys.readouterr().out
    results, table = read()
    assert table["candidates"].list.len().min() > 20
    assert {"coverage@10", "popularity_lift@10"} <= results["results"][table["model"][0]].keys()
    assert results["groups"].keys() == {"activity", "popularity"}


@pytest.mark.parametrize(
    ("prompt", "more"), [("next_item", ()), ("next_item", ("--full_catalogue",)), ("next_item_from_list", ())]
)
def test_why(argv, capsys, model_path, prompt, more):
    prepare(Path("films"), prompt=prompt)
    assert main(argv("--dataset_split", "validation", "--max_rows", "3", "--explain", *more, rows="films")) == 0
    assert "not explained" not in capsys.readouterr().out
    page = Path("out/report.html").read_text()
    assert page.count("<h3>Why <bdi>") == 3
    assert f"coloured by how they move the ranking of <bdi>{model_path()}</bdi>" in page
    results, table = read()
    assert results["settings"]["explained"] == model_path()
    best = table["scores"].list.arg_max()
    for place, candidates in zip(best, table["candidates"], strict=True):
        assert f"<h3>Why <bdi>{candidates[place].strip()}</bdi>" in page


def test_a_prompt_that_cannot_be_written_again_is_not_explained(argv, capsys):
    prepare(Path("films"), prompt="next_item(wording='any')")
    assert main(argv("--dataset_split", "validation", "--max_rows", "6", "--explain", rows="films")) == 0
    told = re.search(r"(\d) of 6 rows are not explained", capsys.readouterr().out)
    assert Path("out/report.html").read_text().count("<h3>Why <bdi>") == 6 - int(told[1])


def test_an_answer_that_names_no_item_cannot_be_explained(argv, refused, monkeypatch):
    monkeypatch.setattr(Scorer, "score", None)
    prepare(Path("films"), prompt="rank_list")
    told = refused(argv("--explain", "--dataset_split", "validation", rows="films"))
    assert "`explain`: an answer of the form RankList names no single item" in told


def test_why_needs_captum(argv, refused, monkeypatch):
    prepare(Path("films"))
    monkeypatch.setattr("trl_dmpo.cli.explanations.find_spec", lambda name: None)
    assert "pip install 'trl-dmpo[explain]'" in refused(
        argv("--explain", "--dataset_split", "validation", rows="films")
    )


def test_several_orders(argv, model_path):
    rows = [
        {"historyList": ["Alien", "Big"], "itemList": [*titles], "trueSelection": titles[0]}
        for titles in (["Jaws", "Heat", "Babe"], ["Fargo", "Heat", "Aliens"])
    ]
    Path("movielens_val.json").write_text(json.dumps(rows))
    assert main(argv("--num_orders", "3", rows="movielens_val.json")) == 0
    results, table = read()
    name = model_path("llama")
    assert list(results["results"]) == [name, f"{name}, mean of 3", f"{name}, STELLA of 3"]
    plain, mean, _ = table.partition_by("model", maintain_order=True)
    orders = np.array(plain["order_scores"].to_list())
    np.testing.assert_allclose(orders[:, 0], plain["scores"].to_list(), rtol=1e-6)
    np.testing.assert_allclose(orders.mean(axis=1), mean["scores"].to_list(), rtol=1e-6)
    assert len(results["settings"]["position_bias"][name]["place_shares"]) == 3
    assert 'id="places"' in Path("out/report.html").read_text()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--max_rows", "0"], "`max_rows` is 0, but it is at least 1."),
        (["--cutoffs", "0"], "`cutoffs` is [0], but they are at least 1."),
        (["--num_orders", "1"], "`num_orders` is 1, but it is at least 2."),
        (["--group_by", "age"], "`group_by`: rows.jsonl has no column 'age', only: user_id, kind."),
        (["--full_catalogue"], "`full_catalogue`: rows.jsonl has no catalogue of items."),
        (["--num_orders", "2"], "rows.jsonl, row 0: "),
        (["--max_new_tokens", "5"], "`max_new_tokens` is for generated answers. Set `generate`, or leave it out."),
        (["--num_orders", "2", "--full_catalogue"], "`num_orders` is for prompts that list their candidates"),
        (
            ["--explain"],
            "`explain` is for a dataset made by `trl-dmpo prepare`, and rows.jsonl does not say which items",
        ),
        (["--compare_to", "nowhere"], "`compare_to`: nowhere holds no evaluation"),
        (["--dataset_split", "test"], "`config` and `split` are for a prepared dataset, and rows.jsonl is none."),
        (["--max_row", "3"], "Unknown option --max_row. Did you mean --max_rows?"),
    ],
)
def test_what_is_wrong_is_one_line(argv, refused, more, message):
    assert message in refused(argv(*more))
    assert not Path("out").exists()
    assert not list(Path().glob(".out*"))


def test_models_are_looked_for_before_any_is_scored(argv, refused, monkeypatch):
    monkeypatch.setattr(Scorer, "score", None)
    arguments = argv()
    arguments.insert(3, "./nowhere")
    assert "`model_name_or_path`: there is no folder nowhere." in refused(arguments)
    assert "is there twice. Leave one out." in refused(argv(models=("llama", "llama")))
    assert "Give rows: `--dataset_name`." in refused(["evaluate", "--model_name_or_path", "m"])


def test_a_chat_for_a_model_without_a_template(argv, refused, tokenizer, tmp_path):
    AutoModelForCausalLM.from_pretrained(argv()[2]).save_pretrained("plain")
    tokenizer.save_pretrained("plain")
    Path("plain/chat_template.jinja").unlink()
    say = [{"role": "assistant", "content": "Heat"}]
    write_rows(
        "rows.jsonl", prompt=[{"role": "user", "content": "?"}], chosen=say, rejected=[[say[0] | {"content": "B"}]]
    )
    arguments = argv()
    arguments[2] = "./plain"
    assert "rows.jsonl[0] is a chat, but the tokenizer has no chat template" in refused(arguments)


def test_what_is_there_is_kept(argv, refused):
    assert ". is the folder that you are in, which cannot be replaced." in refused(argv(out="."))
    Path("out").mkdir()
    Path("out/mine.txt").write_text("mine")
    assert "out is there and is not an evaluation. Choose another folder." in refused(argv("--overwrite_output_dir"))
    Path("out/mine.txt").unlink()
    assert main(argv("--max_rows", "2")) == 0
    before = Path("out/results.json").read_text()
    assert "holds an evaluation. Choose another folder, or set `overwrite_output_dir`." in refused(argv())
    assert Path("out/results.json").read_text() == before
    assert main(argv("--overwrite_output_dir")) == 0
    assert read()[0]["settings"]["rows"] == 5
    Path("out/notes.txt").write_text("mine")
    assert "out is there and is not an evaluation." in refused(argv("--overwrite_output_dir"))


def test_a_folder_that_cannot_be_written_to_is_known_before_scoring(argv, refused, monkeypatch):
    monkeypatch.setattr(Scorer, "score", None)
    Path("file").touch()
    assert "file" in refused(argv(out="file/out"))


@pytest.mark.slow
def test_the_command_itself(argv):
    done = subprocess.run(
        [Path(sys.executable).with_name("trl-dmpo"), *argv()],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert read()[0]["settings"]["rows"] == 5
