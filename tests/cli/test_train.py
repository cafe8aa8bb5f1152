import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file
from trl import DatasetMixtureConfig, ScriptArguments

from tests.conftest import make_rows
from trl_dmpo.cli import train
from trl_dmpo.cli.dataset import load_splits, select_splits
from trl_dmpo.cli.main import main


SCRIPT = Path(__file__).parents[2] / "examples" / "scripts" / "dmpo.py"


@pytest.fixture
def rows_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in make_rows(8, [2, 3])))
    return path


@pytest.fixture
def options(model_path, rows_file, tmp_path):
    """Options of a training of two steps on the CPU, with some changed or, if `None`, left out."""

    def build(**changes) -> dict:
        options = {
            "model_name_or_path": model_path(),
            "dataset_name": str(rows_file),
            "output_dir": str(tmp_path / "out"),
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "report_to": "none",
            "save_strategy": "no",
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "disable_tqdm": True,
        }
        return {name: value for name, value in (options | changes).items() if value is not None}

    return build


def to_argv(options: dict) -> list[str]:
    argv = []
    for name, value in options.items():
        argv += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return argv


def run_train(options: dict, *more: str) -> int:
    return main(["train", *to_argv(options), *more])


def run_python(*argv: str, cwd: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(cwd / "cache")}
    return subprocess.run(
        [sys.executable, *argv], capture_output=True, text=True, cwd=cwd, env=environment, timeout=300
    )


def parse(argv: list[str]):
    """The training arguments that `argv` makes."""
    parsed, _ = train.make_parser().parse_with_launch_args(["--use_cpu", *argv])
    return parsed[1]


def assert_trained(folder: Path, model: str) -> None:
    """The weights saved in `folder` are finite, and differ from those of `model`."""
    before, after = (load_file(Path(path) / "model.safetensors") for path in (model, folder))
    assert all(torch.isfinite(tensor).all() for tensor in after.values())
    assert any(not torch.equal(before[name], after[name]) for name in before)


class TestTraining:
    def test_the_script_end_to_end(self, options, tmp_path):
        done = run_python(str(SCRIPT), *to_argv(options()), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert f"Model saved to {tmp_path / 'out'}" in done.stdout
        assert_trained(tmp_path / "out", options()["model_name_or_path"])

    @pytest.mark.slow
    def test_through_accelerate_with_a_configuration_file(self, options, tmp_path):
        config = tmp_path / "train.yaml"
        config.write_text(yaml.safe_dump(options() | {"num_processes": 1, "cpu": True, "mixed_precision": "no"}))
        done = run_python(
            "-m", "trl_dmpo.cli.main", "train", "--config", str(config), "--num_machines", "1", cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("Model saved to") == 1
        assert_trained(tmp_path / "out", options()["model_name_or_path"])

    def test_lora_in_process(self, options, tmp_path, capsys):
        assert run_train(options(lora_r=4, lora_dropout=0.0), "--use_peft") == 0
        weights = load_file(tmp_path / "out" / "adapter_model.safetensors")
        assert any(tensor.abs().sum() > 0 for name, tensor in weights.items() if "lora_B" in name)
        assert "Model saved to" in capsys.readouterr().out

    def test_the_command_trains_what_the_class_trains(self, options, tmp_path):
        from trl_dmpo import DMPOConfig, DMPOTrainer

        assert run_train(options(loss_type=["dmpo", "sft"], loss_weights=[1.0, 0.5], prefix_sharing="false")) == 0
        values = options(output_dir=str(tmp_path / "class"), loss_type=["dmpo", "sft"], loss_weights=[1.0, 0.5])
        model, dataset = values.pop("model_name_or_path"), values.pop("dataset_name")
        args = DMPOConfig(**values, prefix_sharing=False)
        trainer = DMPOTrainer(model, args=args, train_dataset=Dataset.from_json(dataset))
        trainer.train()
        for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
            torch.testing.assert_close(tensor, trainer.model.state_dict()[name])

    @pytest.mark.parametrize("kind", ["parquet", "saved", "saved splits", "folder of files", "stream"])
    def test_kinds_of_datasets(self, kind, options, rows_file, tmp_path):
        dataset, path = Dataset.from_json(str(rows_file)), tmp_path / "data"
        splits = DatasetDict({"train": dataset, "test": dataset.select(range(3))})
        if kind == "parquet":
            path = tmp_path / "data.parquet"
            dataset.to_parquet(path)
        elif kind == "saved":
            dataset.save_to_disk(path)
        elif kind == "saved splits":
            splits.save_to_disk(path)
        elif kind == "folder of files":
            for name, split in splits.items():
                split.to_json(path / f"{name}.jsonl")
        script_args = ScriptArguments(str(rows_file if kind == "stream" else path), dataset_streaming=kind == "stream")
        has_test = kind in ("saved splits", "folder of files")
        training_args = parse(["--eval_strategy", "steps" if has_test else "no"])
        train_rows, test_rows = select_splits(
            load_splits(script_args, DatasetMixtureConfig()), script_args, training_args
        )
        assert list(train_rows) == list(dataset)
        assert (test_rows is not None) == has_test
        if has_test:
            assert list(test_rows) == list(dataset)[:3]


class TestOptions:
    @pytest.mark.parametrize(
        ("value", "expected"), [("auto", "auto"), ("true", True), ("True", True), ("false", False)]
    )
    def test_prefix_sharing(self, value, expected):
        assert parse(["--prefix_sharing", value]).prefix_sharing == expected

    def test_defaults_are_those_of_the_class(self):
        from trl_dmpo import DMPOConfig

        expected = DMPOConfig("trainer_output", use_cpu=True)
        parsed = parse([])
        for name in ("loss_type", "prefix_sharing", "num_negatives", "on_invalid_row", "ranking_k", "beta"):
            assert getattr(parsed, name) == getattr(expected, name)

    def test_flags_and_file_mean_the_same(self, tmp_path):
        values = {
            "loss_type": ["dmpo", "sft"],
            "loss_weights": [1.0, 0.5],
            "ranking_k": [1, 3],
            "num_negatives": 2,
            "on_invalid_row": "drop",
            "prefix_sharing": False,
            "learning_rate": 1e-4,
        }
        config = tmp_path / "train.yaml"
        config.write_text(yaml.safe_dump(values))
        from_flags, from_file = parse(to_argv(values)), parse([f"--config={config}"])
        for name, value in values.items():
            assert getattr(from_flags, name) == getattr(from_file, name) == value

    def test_a_flag_overrides_the_file(self, tmp_path):
        config = tmp_path / "train.yaml"
        config.write_text("beta: 0.5\nloss_type: sdpo\n")
        args = parse(["--config", str(config), "--beta", "0.7"])
        assert args.beta == 0.7
        assert args.loss_type == ["sdpo"]


class TestLaunch:
    @pytest.fixture
    def launched(self, monkeypatch):
        """The arguments of the `accelerate launch` that would have run."""
        import accelerate.commands.launch

        calls = []
        monkeypatch.setattr(accelerate.commands.launch, "launch_command", calls.append)
        return calls

    def test_options_are_told_apart(self, options, launched):
        assert run_train(options(beta=0.3), "--num_processes", "2", "--multi_gpu") == 0
        (args,) = launched
        assert (args.num_processes, args.multi_gpu, args.module) == (2, True, True)
        assert args.training_script == "trl_dmpo.cli.train"
        parsed, _ = train.make_parser().parse_with_launch_args(args.training_script_args)
        assert parsed[1].beta == 0.3

    def test_options_in_the_configuration_file(self, options, launched, tmp_path):
        config = tmp_path / "train.yaml"
        config.write_text(yaml.safe_dump(options() | {"num_processes": 3, "cpu": True, "multi_gpu": False}))
        assert main(["train", "--config", str(config)]) == 0
        assert (launched[0].num_processes, launched[0].cpu, launched[0].multi_gpu) == (3, True, False)
        # A process that was launched does not launch again
        parsed, launch_args = train.make_parser().parse_with_launch_args(launched[0].training_script_args)
        assert parsed[0].dataset_name == options()["dataset_name"]
        assert launch_args == []

    def test_a_configuration_that_trl_ships(self, options, launched):
        assert run_train(options(), "--accelerate_config", "zero2") == 0
        assert Path(launched[0].config_file).name == "zero2.yaml"

    def test_the_script_does_not_launch(self, options, capsys):
        with pytest.raises(SystemExit, match="2"):
            train.make_parser().parse_args_and_config([*to_argv(options()), "--num_processes", "2"])
        assert "--num_processes belongs to `accelerate launch`" in capsys.readouterr().err


class TestMistakes:
    @pytest.fixture
    def error(self, capsys):
        """What a command that must fail prints last, on one line."""

        def run(options: dict, *more: str) -> str:
            with pytest.raises(SystemExit, match="2"):
                run_train(options, *more)
            return capsys.readouterr().err.strip().splitlines()[-1]

        return run

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"los_type": "dmpo"}, "Unknown option --los_type. Did you mean --loss_type?"),
            ({"qqqq": 1}, "Unknown option --qqqq."),
            ({"loss_type": "dmqo"}, "Unknown `loss_type` 'dmqo'. Did you mean 'dmpo'?"),
            ({"num_negatives": 0}, "`num_negatives` must be at least 1, got 0."),
            ({"prefix_sharing": "maybe"}, "invalid choice: 'maybe'"),
            ({"model_name_or_path": None}, "Give a model: `--model_name_or_path`"),
            ({"dataset_name": None}, "Give a dataset: either `--dataset_name`"),
            ({"dataset_name": "missing.jsonl"}, "there is no file or folder missing.jsonl"),
            ({"dataset_name": "./data/rows/missing"}, "there is no file or folder"),
            ({"eval_strategy": "steps"}, "there is no 'test', only: train"),
            ({"config": "missing.yaml"}, "there is no file missing.yaml"),
            ({"accelerate_config": "zero9"}, "zero9"),
        ],
    )
    def test_is_one_line(self, changes, message, options, error):
        assert message in error(options(**changes))

    def test_a_stray_argument(self, options, error):
        assert "Unknown option stray." in error(options(), "stray")

    @pytest.mark.parametrize(
        ("name", "text", "message"),
        [
            ("rows.csv", "prompt,chosen\n", "It is one of: .json, .jsonl, .parquet"),
            ("broken.jsonl", '{"prompt": \n', "line 1 (row broken.jsonl[0]): cut off or malformed JSON"),
            ("empty.jsonl", "", "empty.jsonl is empty"),
            ("row.jsonl", '{"prompt": "a", "chosen": " b", "rejected": []}\n', "train[0], column 'rejected'"),
        ],
    )
    def test_a_file_that_cannot_be_trained_on(self, name, text, message, options, error, tmp_path):
        (tmp_path / name).write_text(text)
        assert message in error(options(dataset_name=str(tmp_path / name)))

    def test_no_rows(self, options, error, rows_file, tmp_path):
        none = Dataset.from_json(str(rows_file)).select([])
        none.to_parquet(tmp_path / "none.parquet")
        assert "none.parquet cannot be read" in error(options(dataset_name=str(tmp_path / "none.parquet")))
        with pytest.raises(ValueError, match="The split 'train' has no rows"):
            select_splits({"train": none}, ScriptArguments(), parse([]))

    def test_a_split_that_is_not_there(self, options, error, rows_file, tmp_path):
        DatasetDict({"dev": Dataset.from_json(str(rows_file))}).save_to_disk(tmp_path / "data")
        assert "There is no split 'train' to train on, only: dev." in error(
            options(dataset_name=str(tmp_path / "data"))
        )

    def test_a_file_that_is_not_yaml(self, options, error, tmp_path):
        (tmp_path / "train.yaml").write_text("beta: [1\n")
        assert "train.yaml is not YAML" in error(options(), "--config", str(tmp_path / "train.yaml"))

    @pytest.mark.parametrize("bits", ["--load_in_4bit", "--load_in_8bit"])
    def test_without_bitsandbytes(self, bits, options, error, monkeypatch):
        monkeypatch.setattr(train, "find_spec", lambda name: None)
        assert "pip install 'trl-dmpo[quantization]'" in error(options(), "--use_peft", bits)
