"""What comes from elsewhere is data: it runs no code, leaves its folder no more than its place, and gives no secret away."""

import ast
import io
import json
import pickle
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig
from rich.table import Table
from rich.text import Text
from transformers import AutoModelForCausalLM

from tests.conftest import ROOT, make_dataset
from trl_dmpo import DMPOTrainer
from trl_dmpo.cli.main import main
from trl_dmpo.cli.screen import Screen
from trl_dmpo.data.card import fenced, one_line
from trl_dmpo.data.negatives import _read
from trl_dmpo.ranking.models import load_model
from trl_dmpo.trainer.checkpoints import STATE_NAME


SECRET = "hf_abcdefghijklmnopqrstuvwxyz012345"


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def bomb(tmp_path):
    """A pickle that leaves a mark if it is read, which every test checks."""
    mark = tmp_path / "it-ran"
    yield pickle.dumps(Touch(mark))
    assert not mark.exists()


def write_bomb(path: Path) -> None:
    """A file of `torch.save`, two folders below the mark that it leaves if it is unpickled without care."""
    torch.save(Touch(path.parents[2] / "it-ran"), path)
    if (path.parent / STATE_NAME).exists():  # whoever writes the one writes the other
        state = json.loads((path.parent / STATE_NAME).read_text())
        state["files"][path.name] = path.stat().st_size
        (path.parent / STATE_NAME).write_text(json.dumps(state))


def test_the_bomb_works(tmp_path):
    torch.save(Touch(tmp_path / "it-ran"), tmp_path / "file.pt")
    torch.load(tmp_path / "file.pt", weights_only=False)
    assert (tmp_path / "it-ran").exists()


@pytest.fixture
def build(model_path, tokenizer, make_args):
    def make(peft=None, **options):
        return DMPOTrainer(
            model_path(),
            args=make_args(**options),
            train_dataset=make_dataset(4, 2),
            processing_class=tokenizer,
            peft_config=peft,
        )

    return make


class TestCheckpoint:
    @pytest.fixture
    def checkpoint(self, build, tmp_path) -> Path:
        build(max_steps=1, save_strategy="steps", save_steps=1).train()
        return tmp_path / "out" / "checkpoint-1"

    @pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
    def test_what_is_unpickled_runs_no_code(self, build, checkpoint, bomb, name):
        write_bomb(checkpoint / name)
        with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
            build(max_steps=2).train(resume_from_checkpoint=str(checkpoint))

    def test_arguments_are_not_read(self, build, checkpoint, bomb):
        write_bomb(checkpoint / "training_args.bin")
        trainer = build(max_steps=2)
        trainer.train(resume_from_checkpoint=str(checkpoint))
        assert trainer.state.global_step == 2

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_model.bin"])
    def test_pickled_weights_of_a_model_run_no_code(self, model_path, tmp_path, bomb, name):
        folder = tmp_path / "out" / "model"
        model = AutoModelForCausalLM.from_pretrained(model_path())
        if name.startswith("adapter"):
            from peft import get_peft_model

            model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
        model.save_pretrained(folder)
        (folder / name.replace("pytorch_", "").replace(".bin", ".safetensors")).unlink()
        write_bomb(folder / name)
        with pytest.raises((ValueError, pickle.UnpicklingError)):
            load_model(folder, device="cpu")


class TestFiles:
    def test_item_vectors_are_not_unpickled(self, tmp_path, bomb):
        np.save(tmp_path / "vectors.npy", np.array([Touch(tmp_path / "it-ran")], dtype=object), allow_pickle=True)
        with pytest.raises(ValueError, match="allow_pickle"):
            _read(tmp_path / "vectors.npy")

    @pytest.mark.parametrize("command", ["prepare", "train", "evaluate"])
    def test_a_configuration_makes_no_objects(self, tmp_path, bomb, capsys, command):
        config = tmp_path / "config.yaml"
        config.write_text(f"output_dir: !!python/object/apply:pathlib.Path.touch [{tmp_path / 'it-ran'}]\n")
        with pytest.raises(SystemExit):
            main([command, "--config", str(config)])
        error = capsys.readouterr().err
        assert "is not YAML" in error
        assert "python/object" in error


def calls(path: Path) -> list[tuple[str, ast.Call]]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def test_the_sources_unpickle_and_evaluate_nothing():
    unsafe = re.compile(
        r"^(torch\.load|pickle\.\w+|joblib\.\w+|dill\.\w+|yaml\.(unsafe_|full_)?load\w*|eval|exec|os\.system)$"
    )
    files = [path for folder in ("src", "benchmarks", "examples") for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    found = [
        f"{path.relative_to(ROOT)}:{call.lineno}: {name}"
        for path in files
        for name, call in calls(path)
        if unsafe.match(name)
        or any(
            each.arg == "allow_pickle" or (each.arg == "trust_remote_code" and _is_true(each))
            for each in call.keywords
        )
    ]
    assert found == []


def _is_true(keyword: ast.keyword) -> bool:
    return isinstance(keyword.value, ast.Constant) and bool(keyword.value.value)


def test_code_that_comes_with_a_model_is_not_run(model_path, tmp_path, bomb, monkeypatch):
    folder = tmp_path / "remote"
    AutoModelForCausalLM.from_pretrained(model_path()).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "foreign", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'it-ran')!r}).touch()\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))  # transformers asks on a terminal
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_model(folder, device="cpu")


@pytest.mark.parametrize(
    "options",
    [{"hub_token": SECRET}, {"model_init_kwargs": {"token": SECRET, "dtype": "float32"}}],
    ids=["hub_token", "model_init_kwargs"],
)
def test_no_secret_is_saved(build, tmp_path, monkeypatch, options):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    trainer = build(max_steps=1, save_strategy="steps", save_steps=1, **options)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    saved = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {"training_args.bin", "README.md", "trainer_state.json"} <= {path.name for path in saved}
    assert [path for path in saved if SECRET.encode() in path.read_bytes()] == []
    assert SECRET not in trainer.args.to_json_string()
    # It is still there for what needs it
    assert SECRET in str(trainer.args.__dict__)


class TestScreen:
    TITLE = "Al\x1b]0;owned\x07ien\x1b[2J \x9b31m[red]:smile: \x00"

    def test_shows_control_characters_and_sends_none(self):
        out = io.StringIO()
        screen = Screen(file=out, width=80, force_terminal=True, color_system="standard")
        table = Table()
        table.add_column("title", style="red")
        table.add_row(self.TITLE)
        screen.print(table)
        screen.print(self.TITLE, highlight=False)
        screen.print(Text(self.TITLE))
        written = out.getvalue()
        assert written.count("Al␛]0;owned␇ien␛[2J \ufffd31m[red]:smile: ␀") == 2
        assert "\x1b[31m" in written  # a style is no text
        assert re.findall(r"[\x00-\x08\x0b-\x1a\x1c-\x1f\x7f-\x9f]|\x1b(?!\[[0-9;]*m)", written) == []


class TestCard:
    def test_a_name_stays_on_its_line(self):
        assert one_line("a\n---\n| `x` <img src=x> [l](u)\x1b") == r"a --- \| \`x\` &lt;img src=x&gt; \[l\](u)␛"

    def test_a_fence_is_longer_than_those_in_the_text(self):
        text = "a\n  ````\n<script>"
        assert fenced(text, "yaml") == f"`````yaml\n{text}\n`````"
        assert fenced("a", "json") == "```json\na\n```"


class TestLicences:
    @pytest.fixture
    def audit(self, monkeypatch):
        monkeypatch.syspath_prepend(str(ROOT / ".ci"))
        import audit

        return audit

    @pytest.mark.parametrize(
        ("licence", "binds"),
        [
            ("MIT", False),
            ("GPL-3.0-only", True),
            ("AGPL-3.0", True),
            ("MIT AND GPL-2.0", True),
            ("MIT OR GPL-2.0", False),
            ("LGPL-2.1", False),
            ("GNU Lesser General Public License v3 (LGPLv3)", False),
            ("GNU General Public License v3 (GPLv3)", True),
            ("BSD-3-Clause AND GPL-3.0-or-later WITH GCC-exception-3.1", False),
        ],
    )
    def test_that_bind(self, audit, licence, binds):
        assert audit.binds(licence) == binds

    def test_only_what_has_a_fix_fails(self, audit, capsys):
        def answer(*fixes):
            return [{"name": "x", "version": "1", "vulns": [{"id": "CVE-1", "fix_versions": list(fixes)}]}]

        assert audit.report_vulnerabilities(answer("2")) is True
        assert audit.report_vulnerabilities(answer()) is False
        assert capsys.readouterr().out == "x 1: CVE-1, fixed in 2\nx 1: CVE-1, no fix yet\n"

    def test_a_database_that_knows_nothing_is_no_clean_bill(self, audit, monkeypatch):
        class Done:
            stdout = json.dumps({"dependencies": [{"name": "x", "skip_reason": "not found"}]})
            stderr = ""

        monkeypatch.setattr(audit.subprocess, "run", lambda *args, **kwargs: Done)
        with pytest.raises(ConnectionError, match="knows none of the 1 packages"):
            audit.ask_database([audit.Package("x", "1", "MIT")])
