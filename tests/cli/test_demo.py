import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tests.conftest import not_interpreted
from trl_dmpo.cli import demo
from trl_dmpo.cli.demo import catalogue, report


SMALL = ["--users", "100", "--items", "100", "--num_negatives", "2"]


def run_demo(*argv: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"COLUMNS": "100", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "trl_dmpo.cli.main", "demo", *argv]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)


def assert_complete(done: subprocess.CompletedProcess, folder) -> dict:
    """The demo ran and wrote finite numbers, which it printed; returns them."""
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    results = json.loads((folder / "results.json").read_text())["results"]
    assert list(results) == ["random", "SFT", "DMPO", "DMPO - SFT"]
    for columns in results.values():
        assert list(columns) == ["hit rate@1", "NDCG@10", "MRR"]
        for estimate in columns.values():
            assert all(math.isfinite(value) for value in estimate.values())
            assert estimate["low"] <= estimate["mean"] <= estimate["high"]
    assert f"{100 * results['DMPO']['NDCG@10']['mean']:.1f} [" in done.stdout
    assert done.stdout.count("ranked ") == 3
    assert "trl-dmpo train --help" in done.stdout
    return results


@pytest.mark.slow
@not_interpreted
def test_a_small_demo_twice_with_the_same_seed(tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    with ThreadPoolExecutor() as executor:  # side by side, for time
        done = list(executor.map(lambda folder: run_demo(*SMALL, "--output_dir", str(folder)), folders))
    first, second = (assert_complete(*each) for each in zip(done, folders, strict=True))
    assert first == second
    assert (tmp_path / "a" / "dmpo" / "model.safetensors").is_file()


@pytest.mark.slow
def test_the_whole_demo_ranks_better_than_chance(tmp_path):
    results = assert_complete(run_demo("--output_dir", str(tmp_path)), tmp_path)
    for model in ("SFT", "DMPO"):
        assert results[model]["MRR"]["low"] > results["random"]["MRR"]["high"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--users", "5"], "--users must be from 100 to 20000, got 5"),
        (["--items", "1000"], "--items must be from 100 to 400, got 1000"),
        (["--num_negatives", "50"], "--num_negatives must be from 1 to 49, got 50"),
        (["--output_dir", __file__], "is a file"),
    ],
)
def test_options_out_of_bounds(argv, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        demo.parse(argv)
    assert message in capsys.readouterr().err


class TestCatalogue:
    def test_titles_are_unique_up_to_the_largest_catalogue(self):
        items = demo.BOUNDS["items"][1]
        titles = catalogue.make_catalogue(items, np.random.default_rng(0)).titles
        assert len(set(titles)) == len(titles) == items

    def test_choices_are_among_what_was_shown_and_new(self):
        rng = np.random.default_rng(0)
        world = catalogue.make_catalogue(100, rng)
        for choice in catalogue.simulate_user(world, rng):
            shown = [choice.chosen, *choice.passed_over]
            assert len(set(shown)) == catalogue.SLATE_SIZE
            assert set(shown).isdisjoint(choice.history)

    def test_the_rows_keep_the_contract(self):
        from trl_dmpo.data.schema import find_problem

        rows = catalogue.make_rows(users=20, held_out_users=10, items=100, negatives=3, seed=1)
        assert [find_problem(row) for row in rows.dmpo + rows.held_out] == [None] * (
            20 * catalogue.CHOICES_PER_USER + 10
        )
        assert {len(row["rejected"]) for row in rows.held_out} == {catalogue.SLATE_SIZE - 1}
        assert rows == catalogue.make_rows(users=20, held_out_users=10, items=100, negatives=3, seed=1)


class TestReport:
    def test_metrics_of_known_ranks(self):
        # The chosen one comes first, second, and third of three
        logps = np.array([[3.0, 2.0, 1.0], [2.0, 3.0, 1.0], [1.0, 3.0, 2.0]])
        values = report.metrics_per_user(logps)
        np.testing.assert_allclose(values["hit rate@1"], [1, 0, 0])
        np.testing.assert_allclose(values["NDCG@10"], [1, 1 / np.log2(3), 1 / 2])
        np.testing.assert_allclose(values["MRR"], [1, 1 / 2, 1 / 3], rtol=1e-6)

    def test_the_interval_is_that_of_the_normal_approximation(self):
        values = np.random.default_rng(0).normal(size=1000)
        estimate = report.bootstrap(values, seed=0)
        half = 1.96 * values.std() / np.sqrt(len(values))
        assert estimate.mean == pytest.approx(values.mean())
        assert (estimate.high - estimate.low) / 2 == pytest.approx(half, rel=0.1)

    def test_the_difference_is_paired(self):
        logps = np.random.default_rng(0).normal(size=(50, 5))
        results = report.summarize({"random": logps, "SFT": logps, "DMPO": logps}, seed=0)
        assert results["DMPO"]["MRR"].low < results["DMPO"]["MRR"].high
        assert results["DMPO - SFT"]["MRR"] == (0, 0, 0)
