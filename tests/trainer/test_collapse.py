"""When `CollapseCallback` speaks, what it says, and that it ends a training."""

import logging
from types import SimpleNamespace

import pytest
from datasets import Dataset
from transformers import TrainerControl, TrainerState

from trl_dmpo import DMPOTrainer
from trl_dmpo.trainer.collapse import CollapseCallback

from ..conftest import make_rows, not_interpreted


# Without noise. The means of three begin at .7 and -2; the likelihood can be judged with the sixth log, at step 60
FALLS_EVENLY = [0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
LESS_AND_LESS = [-1.0, -2.0, -3.0, -4.0, -5.0, -6.0, -7.0, -8.0]


def training(accuracies, changes, name="logps/chosen_change"):
    return [{"loss": 1.0, "ranking/mrr": a, name: c} for a, c in zip(accuracies, changes, strict=True)]


def evaluations(accuracies, changes):
    return [{"eval_ranking/mrr": a, "eval_logps/chosen_change": c} for a, c in zip(accuracies, changes, strict=True)]


class Run:
    """What a trainer does with its callbacks: one log at each of the steps 10, 20 and so on."""

    def __init__(self, caplog, output_dir="out", state=None, **options):
        self.caplog, self.args = caplog, SimpleNamespace(output_dir=str(output_dir))
        self.callback, self.control = CollapseCallback(**options), TrainerControl()
        self.state = state or TrainerState()
        self.callback.on_train_begin(self.args, self.state, self.control)

    def log(self, *entries):
        """The steps at which it spoke."""
        spoke = []
        for entry in entries:
            said = len(self.caplog.records)
            self.state.global_step += 10
            self.state.log_history.append({**entry, "step": self.state.global_step})
            self.callback.on_log(self.args, self.state, self.control, logs=entry)
            spoke += [self.state.global_step] * (len(self.caplog.records) - said)
        return spoke


class TestVerdict:
    def test_collapse(self, caplog, tmp_path):
        for step in (30, 50, 60):
            (tmp_path / f"checkpoint-{step}").mkdir()
        run = Run(caplog, tmp_path, tolerance=0.35)
        assert run.log(*training(FALLS_EVENLY, LESS_AND_LESS)) == [70]
        message = caplog.messages[0]
        assert "`logps/chosen_change` from -2 (steps 10 to 30) to -6 (steps 50 to 70)" in message
        assert "`ranking/mrr` from 0.7 (steps 10 to 30) to 0.3 (steps 50 to 70)" in message
        assert f"before the fall is {tmp_path / 'checkpoint-30'}." in message
        for remedy in (
            "'sft' to `loss_type`",
            "`negative_selection='boundary'`",
            "`loss_type='sdpo'`",
            "`num_negatives`",
            "`beta`",
            "`learning_rate`",
        ):
            assert remedy in message
        assert not run.control.should_training_stop

    def test_noise_counts(self, caplog):
        """
        The logs are .05 .05 .05 .15 0 .1 from the middles of their neighbours: 8 standard errors are 8 * .4 / 6 / 3**.5 =
        .31. The means are .533 .567 .633 .6 .5 .367, a fall of .27. The ninth log makes it .4, and the errors .33.
        """
        run = Run(caplog)
        assert run.log(*training([0.5, 0.5, 0.6, 0.6, 0.7, 0.5, 0.3, 0.3], LESS_AND_LESS)) == []
        assert run.log(*training([0.1], [-9.0])) == [90]

    def test_the_best_is_from_before(self, caplog):
        """The last mean shares no log with the best: after a peak at step 110, not yet at step 140. Of equals, the latest."""
        peak = [step / 10 for step in [*range(11), 9, 8, 7, 6]]
        assert Run(caplog, patience=4).log(*training(peak, [-float(step) for step in range(15)])) == [150]
        assert "`ranking/mrr` from 0.85 (steps 80 to 110) to 0.75 (steps 120 to 150)" in caplog.messages[0]
        assert Run(caplog, patience=2).log(*training([0.5] * 4 + [0.3, 0.1], LESS_AND_LESS[:6])) == [60]
        assert "`ranking/mrr` from 0.5 (steps 30 to 40) to 0.2 (steps 50 to 60)" in caplog.messages[1]

    @pytest.mark.parametrize(
        ("accuracies", "changes"),
        [
            (FALLS_EVENLY[::-1], LESS_AND_LESS),
            (FALLS_EVENLY, LESS_AND_LESS[::-1]),
            (FALLS_EVENLY, [-change for change in LESS_AND_LESS[::-1]]),
            ([0.6, 0.4] * 4, LESS_AND_LESS),
        ],
        ids=["accuracy rises", "likelihood rises", "likelihood falls, but is above the reference's", "noise"],
    )
    def test_no_collapse(self, accuracies, changes, caplog):
        assert Run(caplog).log(*training(accuracies, changes)) == []

    def test_once_until_it_recovers(self, caplog):
        run = Run(caplog, patience=2)
        fall, rise = training(FALLS_EVENLY, LESS_AND_LESS), training(FALLS_EVENLY[::-1], LESS_AND_LESS)
        assert run.log(*fall) == [40]
        assert run.log(*fall[-2:] * 3) == []
        again = run.log(*rise, *fall)
        assert len(again) == 1
        assert again[0] > 220

    def test_without_a_reference(self, caplog):
        """`logps/chosen` counts from its first mean, which is -22."""
        falling = [change - 20 for change in LESS_AND_LESS]
        run = Run(caplog)
        assert run.log(*training(FALLS_EVENLY, falling, "logps/chosen")) == [60]
        assert "`logps/chosen` from -22 (steps 10 to 30) to -25 (steps 40 to 60)" in caplog.messages[0]
        assert "out has no checkpoint from before the fall" in caplog.messages[0]
        higher = [-50.0, -20.0, -20.0, -23.0, -24.0, -25.0, -26.0, -27.0]  # its means begin at -30
        assert Run(caplog).log(*training(FALLS_EVENLY, higher, "logps/chosen")) == []


class TestLogs:
    def test_evaluations_count_alone_once_there_are_any(self, caplog):
        train, healthy = training(FALLS_EVENLY, LESS_AND_LESS), evaluations(FALLS_EVENLY[::-1], LESS_AND_LESS)
        mixed = [entry for pair in zip(train, healthy, strict=True) for entry in pair]
        assert Run(caplog).log(*mixed) == []
        train, failing = training(FALLS_EVENLY[::-1], LESS_AND_LESS), evaluations(FALLS_EVENLY, LESS_AND_LESS)
        mixed = [entry for pair in zip(train, failing, strict=True) for entry in pair]
        assert Run(caplog).log(*mixed) == [120]

    def test_the_first_of_several_evaluation_sets(self, caplog):
        run, spoke = Run(caplog), []
        for entry in evaluations(FALLS_EVENLY, LESS_AND_LESS):
            spoke += run.log(entry)
            run.state.global_step -= 10
            spoke += run.log({"eval_ranking/mrr": 0.9, "eval_logps/chosen_change": 0.0})
        assert spoke == [60]

    def test_metric_of_another_callback(self, caplog):
        run = Run(caplog, metric="eval_candidates/ndcg@10")
        entries = training(FALLS_EVENLY[::-1], LESS_AND_LESS)
        for entry, accuracy in zip(entries, FALLS_EVENLY, strict=True):
            run.log(entry)
            run.log({"eval_candidates/ndcg@10": accuracy})
        (message,) = caplog.messages
        assert "`eval_candidates/ndcg@10` from 0.7 (steps 20 to 60) to 0.4 (steps 80 to 120)" in message

    def test_a_log_without_a_number(self, caplog):
        entries = training(FALLS_EVENLY, LESS_AND_LESS)
        entries.insert(2, training([float("nan")], [-2.5])[0])
        assert Run(caplog).log(*entries) == [70]

    def test_stop_and_the_other_processes(self, caplog):
        for is_main in (True, False):
            caplog.clear()
            run = Run(caplog, state=TrainerState(is_world_process_zero=is_main), action="stop")
            run.log(*training(FALLS_EVENLY, LESS_AND_LESS))
            assert run.control.should_training_stop
            assert [message.endswith("Training stops here.") for message in caplog.messages] == [True] * is_main

    @pytest.mark.parametrize("steps", [3, 5, 7])
    def test_resumed(self, steps, caplog, tmp_path):
        entries = training(FALLS_EVENLY, LESS_AND_LESS)
        run = Run(caplog)
        whole = run.log(*entries[:steps])
        run.state.save_to_json(str(tmp_path / "state.json"))
        state = TrainerState.load_from_json(str(tmp_path / "state.json"))
        assert whole + Run(caplog, state=state).log(*entries[steps:]) == [60]
        # A new training begins anew
        run.callback.on_train_begin(run.args, TrainerState(), run.control)
        assert run.callback._accuracy.values == []


class TestErrors:
    def test_missing_names(self, caplog):
        with pytest.raises(ValueError, match=r"neither: it is for DMPOTrainer. The log has: loss, ranking/mrr"):
            Run(caplog).log({"loss": 1.0, "ranking/mrr": 0.5})
        entry = training([0.5], [-1.0])[0]
        with pytest.raises(
            ValueError, match=r"'ranking/mmr', which is not in the log. It has: logps/chosen_change, loss"
        ):
            Run(caplog, metric="ranking/mmr").log(entry)
        Run(caplog, metric="ranking/mmr").log({"eval_loss": 1.0})  # of an evaluation before the training

    def test_it_says_if_it_saw_too_little(self, caplog):
        run = Run(caplog, metric="eval_ranking/mmr")
        run.log(*training(FALLS_EVENLY, LESS_AND_LESS))
        run.callback.on_train_end(run.args, run.state, run.control)
        (message,) = caplog.messages
        assert "needs 6 logs and saw 8 of `logps/chosen_change` and 0 of `eval_ranking/mmr`" in message
        run = Run(caplog)
        run.log(*training(FALLS_EVENLY[2:], LESS_AND_LESS[2:][::-1]))
        run.callback.on_train_end(run.args, run.state, run.control)
        assert len(caplog.messages) == 1

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"action": "halt"}, "`action` must be 'warn' or 'stop', got 'halt'"),
            ({"metric": "eval_loss"}, "`metric` is 'eval_loss', but it must be one of which more is better"),
            ({"patience": 1}, "`patience` must be at least 2 logs, .*, got 1"),
            ({"tolerance": -0.1}, "`tolerance` must be a number of at least 0, got -0.1"),
            ({"tolerance": float("nan")}, "`tolerance` must be a number of at least 0, got nan"),
        ],
    )
    def test_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            CollapseCallback(**options)


@not_interpreted
def test_it_ends_a_training(model_path, tokenizer, make_args, caplog):
    """Evaluation takes for chosen what training rejects, and ranks it first to begin with, as it is shorter."""
    short, long = [" Big", " Heat", " Jaws", " Babe"], [" Red Heat", " Alien Jaws", " Big Fargo", " Red Babe"]
    prompts = [row["prompt"] for row in make_rows(4, 1)]
    trainer = DMPOTrainer(
        model_path(),
        args=make_args(
            max_steps=60,
            per_device_train_batch_size=4,
            learning_rate=5e-4,
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
            save_only_model=True,
        ),
        train_dataset=Dataset.from_dict({"prompt": prompts, "chosen": long, "rejected": [[text] for text in short]}),
        eval_dataset=Dataset.from_dict({"prompt": prompts, "chosen": short, "rejected": [[text] for text in long]}),
        processing_class=tokenizer,
        callbacks=[CollapseCallback(action="stop", patience=2)],
    )
    with caplog.at_level(logging.WARNING, "trl_dmpo.trainer.collapse"):
        trainer.train()
    step = trainer.state.global_step
    assert 4 <= step < 60
    (message,) = [record.message for record in caplog.records if record.name == "trl_dmpo.trainer.collapse"]
    assert "`eval_ranking/mrr` from 1 (steps" in message
    assert f"(steps {step - 1} to {step})" in message
    assert "before the fall is" in message
