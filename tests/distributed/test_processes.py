"""The same training on one process and on two, which share each step: DDP, FSDP2 and DeepSpeed ZeRO over gloo."""

import json
import os
import subprocess
import sys
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import ROOT
from tests.distributed import worker
from tests.distributed.cases import CASES


pytestmark = pytest.mark.slow

CONFIGS = ROOT / "examples" / "accelerate_configs"
# By the configuration, what runs: `full@2` with two micro-batches a step
RUNS = {
    "cpu": [*CASES, "full@2", "lora@2", "token budget@2"],
    "fsdp2": ["full", "lora@2", "explicit reference", "precomputed"],
    "deepspeed_zero2": ["full", "lora@2"],
    "deepspeed_zero3": ["full", "lora@2"],
}
ENGINES = {"cpu": "MULTI_CPU", "fsdp2": "FSDP", "deepspeed_zero2": "DEEPSPEED", "deepspeed_zero3": "DEEPSPEED"}
# One process comes to other results, or to none
APART = {"stream of files", "probe fails in the second process", "not finite in the second process"}
COMPARED = [(config, run) for config, runs in RUNS.items() for run in runs if run not in APART]

needs_deepspeed = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="docs/several_processes.md says how to install it"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def alone(model_path, folder):
    """The folder of what came of each case on one process."""
    out = folder / "alone"
    worker.main(model_path(), str(out), *(name for name in CASES if name not in APART))
    return out


@pytest.fixture(scope="module")
def shared(model_path, folder):
    """From the name of a configuration for `accelerate launch` to the folder of its runs on two processes."""

    @lru_cache
    def launch(config: str) -> Path:
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", CONFIGS / f"{config}.yaml"]
        command += ["--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0", worker.__file__]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
        }
        done = subprocess.run(
            [*map(str, command), model_path(), folder / config, *RUNS[config]],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-6000:]
        return folder / config

    return launch


def read(path: Path) -> list[dict]:
    """What came of a run in each of its processes."""
    return json.loads((path / "result.json").read_text())


def assert_same_log(left: list[dict], right: list[dict]) -> None:
    assert len(left) == len(right)
    for expected, found in zip(left, right, strict=True):
        assert expected.keys() == found.keys()
        # Sums of metrics are float32
        assert found == pytest.approx(expected, rel=2e-5, abs=2e-5)


@pytest.mark.parametrize(
    ("config", "run"),
    [pytest.param(*each, marks=needs_deepspeed if each[0].startswith("deepspeed") else ()) for each in COMPARED],
)
def test_two_processes_train_as_one(config, run, alone, shared):
    name = run.partition("@")[0]
    [expected], results = read(alone / name), read(shared(config) / run)
    assert [result["engine"] for result in results] == [ENGINES[config]] * 2
    for result in results:
        assert_same_log(expected["log"], result["log"])
        assert result["found"] == expected["found"]
    tensors, found = (load_file(path / "tensors.safetensors") for path in (alone / name, shared(config) / run))
    # DeepSpeed keeps the gradients to itself
    assert found.keys() == {key for key in tensors if key.startswith("weight") or not config.startswith("deepspeed")}
    assert max(tensor.abs().max() for key, tensor in tensors.items() if key.startswith("gradient")) > 1e-2
    # TRL sums the gradient of the LM head in float32, as DeepSpeed does everything
    tolerance = 1e-12 if CASES[name].peft and not config.startswith("deepspeed") else 2e-6
    for key, tensor in found.items():
        torch.testing.assert_close(
            tensor.double(), tensors[key], rtol=0, atol=tolerance, msg=lambda m, k=key: f"{k}: {m}"
        )


def test_rows_of_several_files_count_once_each(alone, shared, model_path, folder):
    # Each process reads files of its own, so that the steps have other rows than on one process
    run = "stream of files"
    worker.main(model_path(), str(folder / "alone"), run)
    [expected], results = read(alone / run), read(shared("cpu") / run)
    assert results[0]["log"][1]["num_tokens"] == expected["log"][1]["num_tokens"]
    assert results[0]["log"] == results[1]["log"]


def test_a_probe_that_fails_in_one_process_decides_for_all(shared):
    results = read(shared("cpu") / "probe fails in the second process")
    assert [result["shares"] for result in results] == [False, False]
    assert len(results[0]["log"]) == len(results[1]["log"]) == 4


def test_a_loss_that_is_not_finite_in_one_process_ends_all(shared):
    first, second = (result["error"] for result in read(shared("cpu") / "not finite in the second process"))
    assert "another process's" in first
    assert "loss 'not_finite_in_the_second_process' of rows" in second
