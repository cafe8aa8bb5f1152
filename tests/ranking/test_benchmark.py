"""The benchmark of scoring runs. What it finds is not asserted: a timed test fails when the machine is busy."""

import importlib.util

import pytest

from tests.conftest import ROOT


@pytest.fixture(scope="module")
def scoring():
    spec = importlib.util.spec_from_file_location("scoring", ROOT / "benchmarks" / "scoring.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_variant_is_measured_and_shown(scoring, model_path, tmp_path, capsys, monkeypatch):
    titles = tmp_path / "titles.txt"
    titles.write_text("".join(f"Star Trek {number}\n" for number in range(30)))
    command = ["--model", model_path(), "--titles", str(titles), "--prompt", "20", "--rounds", "1"]

    def measure_here(variant, candidates, options):
        more = ["--variant", variant, "--candidates", str(candidates), "--repeats", "1"]
        return scoring.measure(scoring.parse([*command, *more]))

    monkeypatch.setattr(scoring, "run_child", measure_here)
    scoring.compare(scoring.parse([*command, "--counts", "3"]))
    shown = capsys.readouterr().out
    assert all(name in shown for name in scoring.NAMES.values())


def test_the_floor_has_the_tokens_that_the_scorer_computes(scoring, model_path, tmp_path, tokenizer):
    titles = tmp_path / "titles.txt"
    titles.write_text("".join(f"Star Trek {number}\n" for number in range(30)))
    command = ["--model", model_path(), "--titles", str(titles), "--prompt", "20", "--candidates", "30"]
    bench = scoring.Bench(scoring.parse(command))
    seen = []
    bench.model.register_forward_pre_hook(
        lambda module, args, inputs: seen.append(inputs["input_ids"].numel()), with_kwargs=True
    )
    bench.scorer(0)
    seen.clear()
    bench.scorer(1)
    assert sum(seen) == bench.unique_tokens()
