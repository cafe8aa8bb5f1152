"""That the sweep over K runs, goes on where it was, and puts its figures together rightly."""

import argparse
import json
from pathlib import Path

import pytest


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import many_negatives

    return many_negatives


def made_up(hits, chosen):
    return {"user": [1, 2], "hit_rate@1": hits, "chosen": chosen, "others": [-9.0, -9.0], "trained_on": -1.0}


def test_figures_are_those_of_all_seeds(bench):
    runs = {}
    for seed, drop in ((0, 1.0), (1, 3.0)):
        runs[seed, "start", 1] = made_up([1.0, 0.0], [-2.0, -4.0])
        runs[seed, "sft", 1] = made_up([1.0, 1.0], [-1.0, -3.0])
        runs[seed, "dmpo", 5] = made_up([0.0, 0.0], [-2.0 - drop, -4.0 - drop])
    for (seed, *_), run in runs.items():
        run["seed"] = seed
    start, sft, dmpo = bench.summarise(runs, [0, 1])
    assert [each["hit_rate@1"]["value"] for each in (start, sft, dmpo)] == [0.5, 1.0, 0.0]
    assert dmpo["chosen_change"]["value"] == -2.0
    assert dmpo["hit_rate@1"]["n"] == 2  # the same users in both seeds
    assert (dmpo["to_start"]["value"], dmpo["to_sft"]["value"], start["to_start"]["value"]) == (-0.5, -1.0, 0.0)
    assert [each["chosen_change"] for each in dmpo["seeds"]] == [-1.0, -3.0]
    assert "| dmpo |  | 0.000 (0.000 to 0.000) |" in bench.tables([start, sft, dmpo])


def test_rows_are_the_same_for_every_k(bench, monkeypatch):
    monkeypatch.setattr(bench, "ROWS", 6)
    monkeypatch.setattr(bench, "DATA", bench.TINY["DATA"])
    rows = bench.Bench(argparse.Namespace(tiny=True, work=Path("unused")), seed=0).rows
    one, five = (bench.training_rows(rows, k, seed=0).to_list() for k in (1, 5))
    assert [row["rejected"] for row in one] == [row["rejected"][:1] for row in five]
    for row, longer in zip(one, five, strict=True):
        assert (row["prompt"], row["chosen"]) == (longer["prompt"], longer["chosen"])
        assert len(set(row["chosen"])) == 3
        assert not set(row["chosen"]) & set(longer["rejected"])
        # The three follow one another in the history of one user
        place = next(
            i for i in range(len(rows)) if rows[i]["chosen"] == row["chosen"][0] and rows[i]["prompt"] == row["prompt"]
        )
        assert rows[place + 2]["prompt"].endswith("".join(f"{title}\n" for title in row["chosen"][:2]))
    assert one != bench.training_rows(rows, 1, seed=1).to_list()

    monkeypatch.setattr(bench, "ROWS", 10**6)
    with pytest.raises(ValueError, match="training rows with 3 films to choose, 1000000 are needed"):
        bench.training_rows(rows, 1, seed=0)


def test_k_is_at_most_what_a_row_has(bench, capsys):
    with pytest.raises(SystemExit):
        bench.parse(["--ks", "1", "20"])
    assert "--ks: [1, 20], but a row has 19 rejected films" in capsys.readouterr().err


@pytest.mark.slow
def test_the_sweep_runs_and_goes_on(bench, monkeypatch, tmp_path):
    for name in bench.TINY:
        monkeypatch.setattr(bench, name, getattr(bench, name))  # as they are again afterwards
    monkeypatch.setattr("torch.set_num_threads", lambda threads: None)

    def runs(*arguments):
        options = ["--tiny", "--seeds", "0", "--work", str(tmp_path / "work"), "--learning_rate", "0.01", "--ks", "2"]
        bench.main(bench.parse([*options, *map(str, arguments)]))
        return (tmp_path / "work/runs.jsonl").read_text().splitlines()

    first = runs("--methods", "sft", "dmpo")
    assert len(first) == 3  # the start is one of them
    both = runs("--output", tmp_path / "out.json", "--plot", tmp_path / "out.png")
    assert both[:3] == first
    assert len(both) == 2 + 5
    assert (tmp_path / "out.png").stat().st_size > 10_000
    results = {each["method"]: each for each in json.loads((tmp_path / "out.json").read_text())["results"]}
    # What it is trained on, it learns; and dmpo moves the rejected ones, too
    assert results["sft"]["seeds"][0]["trained_on_change"] > 0.1
    assert results["dmpo"]["others_change"]["value"] != results["sft"]["others_change"]["value"]
