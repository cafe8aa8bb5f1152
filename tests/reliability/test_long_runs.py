"""A training that is killed, told to end, or loses its disk, its data or a worker goes on as if nothing had happened."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import psutil
import pytest
from datasets import Dataset, load_dataset
from transformers import TrainerCallback

from tests.reliability.training import CASES, build_trainer, describe, make_rows, save_model
from trl_dmpo.trainer.checkpoints import STATE_NAME, find_checkpoint, find_fault


KILL = Path(__file__).with_name("kill.py")
FULL = CASES["full"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def make(model):
    """From a folder and options to a trainer of six steps, three an epoch, that saves each second and logs each fourth."""

    def build(folder, **options):
        rows = Dataset.from_list(make_rows(15))
        defaults = {"num_train_epochs": 2, "save_total_limit": None, "train_dataset": rows}
        return build_trainer(FULL, model, folder, **(defaults | options))

    return build


@pytest.fixture(scope="module")
def whole(make, tmp_path_factory):
    """From options to the folder of a training that nothing has happened to, and what has come of it."""
    done = {}

    def train(**options):
        key = repr(sorted(options.items()))
        if key not in done:
            folder = tmp_path_factory.mktemp("whole")
            trainer = make(folder, **options)
            trainer.train()
            done[key] = folder, describe(trainer)
        return done[key]

    return train


@pytest.fixture
def checkpoints(whole, tmp_path):
    """A folder with the checkpoints 2, 4 and 6."""
    return Path(shutil.copytree(whole()[0], tmp_path / "out"))


def resumed(make, folder, **options):
    trainer = make(folder, **options)
    trainer.train(resume_from_checkpoint=True)
    return describe(trainer)


class At(TrainerCallback):
    """Does something at the end of a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()


class TestWhichCheckpoint:
    def test_the_last_that_is_whole(self, checkpoints, caplog):
        assert find_checkpoint(True, checkpoints) == str(checkpoints / "checkpoint-6")
        (checkpoints / "checkpoint-6" / "trainer_state.json").unlink()
        optimizer = checkpoints / "checkpoint-4" / "optimizer.pt"
        os.truncate(optimizer, 100)
        shutil.copytree(checkpoints / "checkpoint-2", checkpoints / "checkpoint-10-copy")  # not one of ours
        for wanted in (True, "true", "True"):
            assert find_checkpoint(wanted, checkpoints) == str(checkpoints / "checkpoint-2")
        for why in (
            "checkpoint-6 is passed over: it has no trainer_state.json",
            "checkpoint-4 is passed over: its optimizer.pt has 100",
        ):
            assert why in caplog.text
        (checkpoints / "checkpoint-2" / "model.safetensors").unlink()
        with pytest.raises(
            ValueError, match=r"no checkpoint in .*out is whole.*checkpoint-2: its model.safetensors is mis"
        ):
            find_checkpoint(True, checkpoints)

    def test_none_wanted_or_none_there(self, tmp_path):
        for wanted in (None, False, "false", "None"):
            assert find_checkpoint(wanted, tmp_path) is None
        for folder in (tmp_path, tmp_path / "absent"):
            with pytest.raises(
                ValueError, match=r"there is no checkpoint in .*Leave it out to start from the beginning"
            ):
                find_checkpoint("true", folder)

    @pytest.mark.parametrize("cut", ["trainer_state.json", STATE_NAME])
    def test_a_folder_that_is_named(self, cut, checkpoints):
        named = checkpoints / "checkpoint-4"
        os.truncate(named / cut, 20)
        with pytest.raises(
            ValueError, match=rf"from .*checkpoint-4: its {cut} is cut short. The last whole .*point-6"
        ):
            find_checkpoint(str(named), checkpoints)
        with pytest.raises(ValueError, match="there is no such folder"):
            find_checkpoint(checkpoints / "checkpoint-5", checkpoints)


class TestResumed:
    def test_between_two_logs(self, make, whole, tmp_path):
        """Means over steps before and after the checkpoint, and the count of tokens."""
        folder, expected = whole()
        shutil.copytree(folder / "checkpoint-2", tmp_path / "checkpoint-2")
        assert resumed(make, tmp_path) == expected
        assert [logs["step"] for logs in expected["logs"]] == [4]

    @pytest.mark.parametrize("strategy", ["steps", "epoch"])
    def test_where_nothing_is_left(self, strategy, make, whole, tmp_path):
        """Killed after its last checkpoint, in the middle of an epoch: no step is made beyond `max_steps`."""
        options = {"max_steps": 5, "save_steps": 5, "save_strategy": strategy, "logging_strategy": strategy}
        folder, expected = whole(**options)
        shutil.copytree(folder / "checkpoint-5", tmp_path / "checkpoint-5")
        saved = (tmp_path / "checkpoint-5" / STATE_NAME).stat().st_mtime_ns
        trainer = make(tmp_path, **options)
        trainer.train(resume_from_checkpoint=True)
        assert trainer.state.global_step == 5
        assert describe(trainer) == expected
        assert (tmp_path / "checkpoint-5" / STATE_NAME).stat().st_mtime_ns == saved

    def test_nothing_of_a_training_that_failed_comes_into_the_next(self, make, whole, tmp_path):
        trainer = make(tmp_path)
        fails = At(3, lambda: 1 / 0)
        trainer.add_callback(fails)
        with pytest.raises(ZeroDivisionError):
            trainer.train()
        trainer.remove_callback(fails)
        trainer.train(resume_from_checkpoint=True)
        # Operations that are counted are those of both
        assert describe(trainer) | {"flos": 0} == whole()[1] | {"flos": 0}

    def test_where_prompts_turned_out_not_to_be_shared(self, make, checkpoints, caplog):
        path = checkpoints / "checkpoint-4" / STATE_NAME
        path.write_text(json.dumps(json.loads(path.read_text()) | {"shares_prompts": False}))
        trainer = make(checkpoints, max_steps=5)
        trainer.train(resume_from_checkpoint=str(path.parent))
        assert trainer._sharing_is_exact is False
        assert "each is run once for every completion: that is what the training has found" in caplog.text

    def test_by_another_trainer_and_other_processes(self, make, whole, checkpoints, caplog):
        paths = [checkpoints / f"checkpoint-{step}" / STATE_NAME for step in (2, 4)]
        state = json.loads(paths[0].read_text())
        (loss,) = state["losses"]
        paths[0].write_text(json.dumps(state | {"losses": [loss - 1, loss + 1]}))
        trainer = make(checkpoints, max_steps=4)
        trainer.train(resume_from_checkpoint=str(paths[0].parent))
        assert "was saved by 2 processes, and 1 resume from it" in caplog.text
        assert trainer.state.log_history[0]["loss"] == pytest.approx(whole()[1]["logs"][0]["loss"])
        paths[1].unlink()
        make(checkpoints, max_steps=5).train(resume_from_checkpoint=str(paths[1].parent))
        assert f"checkpoint-4 has no {STATE_NAME}: it was saved by another trainer" in caplog.text

    @pytest.mark.slow
    def test_a_stream(self, make, whole, tmp_path, caplog):
        """Where it was, in its first pass; later, nobody knows where in the stream that is."""
        options = {"max_steps": 5, "train_dataset": Dataset.from_list(make_rows(15)).to_iterable_dataset()}
        folder, expected = whole(**options)
        shutil.copytree(folder / "checkpoint-2", tmp_path / "first" / "checkpoint-2")
        assert resumed(make, tmp_path / "first", **options) == expected
        assert "begins anew" not in caplog.text
        shutil.copytree(folder / "checkpoint-4", tmp_path / "second" / "checkpoint-4")
        assert resumed(make, tmp_path / "second", **options) != expected
        assert "The stream had begun anew before step 4, and begins anew now" in caplog.text


class TestSaving:
    def test_a_full_disk(self, make, whole, tmp_path):
        """Files may not grow beyond what the model takes: writing the optimizer's fails, as on a full disk."""
        folder, expected = whole()
        size = (folder / "checkpoint-2" / "optimizer.pt").stat().st_size
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        trainer = make(tmp_path, save_total_limit=1)
        trainer.add_callback(At(3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1000, hard))))
        try:
            with pytest.raises(
                RuntimeError, match=r"checkpoint-4 could not be saved: .* GiB are free there"
            ) as failed:
                trainer.train()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "free some of it or keep fewer checkpoints (`save_total_limit`)" in str(failed.value)
        (note,) = failed.value.__notes__
        assert f"stopped after step 4. The last whole checkpoint is {tmp_path / 'checkpoint-2'}" in note
        assert resumed(make, tmp_path, save_total_limit=1) == expected
        assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-6"]

    def test_one_cut_short_does_not_take_the_place_of_a_whole_one(self, make, checkpoints):
        """Where folders are saved within a second, transformers goes by their numbers."""
        os.truncate(checkpoints / "checkpoint-6" / "optimizer.pt", 0)
        make(checkpoints, save_total_limit=1, max_steps=5, save_steps=5).train(resume_from_checkpoint=True)
        assert [path.name for path in checkpoints.glob("checkpoint-*")] == ["checkpoint-5"]
        assert find_fault(checkpoints / "checkpoint-5") is None

    def test_over_an_older_one(self, make, checkpoints):
        """Nothing of it is left for what is saved now to be taken for."""
        (checkpoints / "checkpoint-6" / "self_play.parquet").write_text("of another training")
        make(checkpoints).train(resume_from_checkpoint=str(checkpoints / "checkpoint-4"))
        assert not (checkpoints / "checkpoint-6" / "self_play.parquet").exists()


class TestSigterm:
    @pytest.mark.parametrize(
        ("step", "options"),
        [
            (3, {}),
            (5, {}),
            pytest.param(4, {"logging_strategy": "epoch", "save_strategy": "epoch"}, marks=pytest.mark.slow),
            pytest.param(3, {"logging_strategy": "epoch", "save_steps": 3}, marks=pytest.mark.slow),
        ],
        ids=["end of an epoch", "between two logs", "within an epoch", "where it saves anyway"],
    )
    def test_it_saves_and_exits(self, step, options, make, whole, tmp_path):
        _, expected = whole(**options)
        before = signal.getsignal(signal.SIGTERM)
        trainer = make(tmp_path, **options)
        trainer.add_callback(At(step, lambda: [os.kill(os.getpid(), signal.SIGTERM) for _ in range(2)]))
        with pytest.raises(SystemExit) as stopped:
            trainer.train()
        assert stopped.value.code == 128 + signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) is before
        assert find_checkpoint(True, tmp_path) == str(tmp_path / f"checkpoint-{step}")
        assert resumed(make, tmp_path, **options) == expected

    @pytest.mark.parametrize("asked", [False, True])
    def test_another_handler_stays_unless_asked(self, asked, make, tmp_path):
        seen = []
        before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
        trainer = make(tmp_path, enable_jit_checkpoint=asked, max_steps=2)
        assert trainer.args.enable_jit_checkpoint is asked
        trainer.add_callback(At(1, lambda: os.kill(os.getpid(), signal.SIGTERM)))
        try:
            with pytest.raises(SystemExit) if asked else nullcontext():
                trainer.train()
        finally:
            signal.signal(signal.SIGTERM, before)
        assert seen == ([] if asked else [signal.SIGTERM])
        assert trainer.state.global_step == (1 if asked else 2)

    def test_nothing_to_save(self, make, tmp_path):
        trainer, seen = make(tmp_path, save_strategy="no", max_steps=1), []
        trainer.add_callback(At(1, lambda: seen.append(signal.getsignal(signal.SIGTERM))))
        trainer.train()
        assert seen == [signal.SIG_DFL]


class TestData:
    @pytest.mark.slow
    def test_a_worker_that_is_told_to_end_with_its_job(self, make, tmp_path):
        """A scheduler sends SIGTERM to all processes: were the worker to end, there would be no step to save after."""
        trainer, told = make(tmp_path, dataloader_num_workers=1, dataloader_prefetch_factor=1), []

        def terminate():
            told.extend(child for child in psutil.Process().children() if "tracker" not in " ".join(child.cmdline()))
            for child in told:
                child.send_signal(signal.SIGTERM)

        trainer.add_callback(At(1, terminate))
        trainer.train()
        assert told
        assert trainer.state.global_step == 6

    @pytest.mark.slow
    def test_workers_end_with_a_training_that_failed(self, model, tmp_path):
        """A process that ends sends its workers one SIGTERM and waits for them."""
        script = tmp_path / "fails.py"
        script.write_text(
            "from datasets import Dataset\n"
            "from tests.reliability.test_long_runs import FULL, At\n"
            "from tests.reliability.training import build_trainer, make_rows\n"
            "options = {'dataloader_num_workers': 2, 'train_dataset': Dataset.from_list(make_rows(15))}\n"
            f"trainer = build_trainer(FULL, {str(model)!r}, {str(tmp_path)!r}, **options)\n"
            "trainer.add_callback(At(1, lambda: 1 / 0))\n"
            "trainer.train()\n"
        )
        done = run(script, folder=Path(__file__).parents[2], timeout=120)
        assert done.returncode == 1
        assert "ZeroDivisionError" in done.stderr

    def test_a_file_that_vanishes_while_streaming(self, make, tmp_path):
        rows = make_rows(24)
        files = [tmp_path / f"part-{part}.jsonl" for part in range(4)]
        for part, path in enumerate(files):
            path.write_text("".join(json.dumps(row) + "\n" for row in rows[6 * part : 6 * part + 6]))
        stream = load_dataset("json", data_files=list(map(str, files)), split="train", streaming=True)
        trainer = make(tmp_path / "out", max_steps=4, train_dataset=stream)
        trainer.add_callback(At(2, files[3].unlink))
        with pytest.raises(FileNotFoundError, match=r"part-3\.jsonl") as failed:
            trainer.train()
        assert any("The last whole checkpoint is" in note for note in failed.value.__notes__)


def run(*arguments, folder, timeout=400):
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(["", *sys.path]),
    }
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
        timeout=timeout,
    )


@pytest.mark.slow
class TestProcesses:
    def test_killed(self, tmp_path):
        """One round each of those that `docs/reliability.md` counts; `--rounds 20` is what it reports."""
        options = ["--rounds", 1, "--cases", "lora", "--seed", 1, "--folder", tmp_path]
        done = run(KILL, *options, "--output", tmp_path / "kill.json", folder=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr[-3000:]
        rounds = json.loads((tmp_path / "kill.json").read_text())
        assert {(each["how"], each["processes"]) for each in rounds} == {
            (how, processes) for how in ("random", "saving", "sigterm", "worker") for processes in (1, 2)
        }
        assert not any(each["lost"] for each in rounds)
        assert all(each["kills"] for each in rounds)
        log = (tmp_path / "lora-1-worker-0.log").read_text()
        assert re.search(r"RuntimeError: DataLoader worker \(pid.*\) is killed by signal: Killed", log)
        assert re.search(r"The training stopped after step \d+. (The last whole checkpoint is|There is no whole)", log)
