"""What is shipped: the wheel, its metadata, and that it runs where nothing else is."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.cli.test_demo import SMALL
from tests.conftest import ROOT


def run(*command: str | Path, **kwargs) -> subprocess.CompletedProcess:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT)
    return next(folder.glob("*.whl"))


@pytest.mark.slow
def test_metadata_and_content(wheel):
    run(sys.executable, "-m", "twine", "check", "--strict", *wheel.parent.iterdir())
    names = zipfile.ZipFile(wheel).namelist()
    assert "trl_dmpo/py.typed" in names
    assert "trl_dmpo/trainer/dmpo_trainer.py" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "docs"))]


@pytest.mark.slow
def test_the_wheel_runs_the_demo_in_a_clean_environment(wheel, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    pip = [tmp_path / "venv/bin/python", "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt"]
    run(*pip, "torch", env=environment)
    run(*pip, wheel, env=environment)
    done = run(tmp_path / "venv/bin/trl-dmpo", "demo", *SMALL, cwd=tmp_path, env=environment)
    for words in ("random", "SFT", "DMPO", "hit rate@1", "NDCG@10", "MRR"):
        assert words in done.stdout


@pytest.mark.slow
def test_the_benchmark_of_a_step_runs(tmp_path):
    command = [
        sys.executable,
        ROOT / "benchmarks/step_cost.py",
        "--variant",
        "shared",
        "--k",
        "3",
        "--tiny",
        "--steps",
        "1",
    ]
    done = run(*command, "--prompt", "30", env={**os.environ, "PYTHONWARNINGS": "ignore"})
    assert '"tokens": 65' in done.stdout.splitlines()[-1]  # 29 of the prompt and 4 times 9
