"""Rankings during training: what is logged, and that the training does not notice."""

from types import SimpleNamespace

import pytest
import torch
from datasets import DatasetDict
from peft import LoraConfig
from transformers import TrainerCallback

from trl_dmpo import DMPOTrainer, Scorer
from trl_dmpo.ranking.callback import RankingCallback
from trl_dmpo.ranking.evaluate import evaluate_scores, score_rows
from trl_dmpo.ranking.rows import load_ranking_rows

from ..conftest import make_dataset, make_rows, not_interpreted


pytestmark = not_interpreted
ROWS = load_ranking_rows(make_rows(5, 6, seed=1))


@pytest.fixture
def make_trainer(model_path, tokenizer, make_args):
    def make(eval_dataset=None, peft_config=None, **options):
        return DMPOTrainer(
            model=model_path(),
            args=make_args(seed=1, **options),
            train_dataset=make_dataset(8, 2),
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            peft_config=peft_config,
        )

    return make


class Seen(TrainerCallback):
    """What an integration such as TensorBoard is given."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def ours(log):
    return {name: value for name, value in log.items() if name.startswith("eval_candidates/")}


def without_time(history):
    return [{k: v for k, v in log.items() if "runtime" not in k and "per_second" not in k} for log in history]


def test_it_logs_what_the_model_is_worth_then(make_trainer, tokenizer):
    trainer, seen = make_trainer(max_steps=3), Seen()
    callback = RankingCallback(trainer, ROWS, eval_steps=3, cutoffs=(1, 3))
    trainer.add_callback(callback)
    trainer.add_callback(seen)
    trainer.train()
    (logged,) = [log for log in trainer.state.log_history if ours(log)]
    assert logged["step"] == 3
    scores = score_rows(Scorer(trainer.model, tokenizer), ROWS)
    results = evaluate_scores(ROWS, {"model": scores}, cutoffs=(1, 3)).results["model"]
    names = ["hit_rate@1", "hit_rate@3", "ndcg@3", "mrr", "paired_accuracy", "pooled_auc", "coin_flip_auc"]
    assert ours(logged) == pytest.approx({f"eval_candidates/{name}": results[name].value for name in names})
    assert [ours(log) for log in seen.logs if ours(log)] == [ours(logged)]
    assert callback.evaluation.results["candidates"]["mrr"] == results["mrr"]


def test_the_training_goes_on_as_without(make_trainer):
    lora = LoraConfig(lora_dropout=0.2, target_modules=["q_proj"])
    weights, histories = [], []
    for eval_steps in (None, 1):
        trainer = make_trainer(peft_config=lora, max_steps=2, logging_steps=2, gradient_checkpointing=True)
        if eval_steps:
            trainer.add_callback(RankingCallback(trainer, ROWS, eval_steps))
        trainer.train()
        assert trainer.model.training
        weights.append([weight.detach().clone() for weight in trainer.model.parameters()])
        histories.append(trainer.state.log_history)
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    assert [log["step"] for log in histories[1] if ours(log)] == [1, 2]
    left = [log for log in histories[1] if not ours(log)]
    assert [log["step"] for log in left] == [2, 2]  # that of the step, and the summary
    assert without_time(left) == without_time(histories[0])


def test_whenever_the_trainer_evaluates(make_trainer):
    sets = DatasetDict(first=make_dataset(2, 2, seed=2), second=make_dataset(2, 2, seed=3))
    trainer = make_trainer(
        sets,
        max_steps=4,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        metric_for_best_model="candidates/mrr",
        load_best_model_at_end=True,
    )
    trainer.add_callback(RankingCallback(trainer, ROWS))
    trainer.train()
    logged = [log for log in trainer.state.log_history if ours(log)]
    assert [log["step"] for log in logged] == [2, 4]
    best = max(logged, key=lambda log: log["eval_candidates/mrr"])
    assert trainer.state.best_metric == best["eval_candidates/mrr"]
    assert trainer.evaluate(sets["first"])["eval_candidates/mrr"] == pytest.approx(best["eval_candidates/mrr"])


def test_an_exception_says_what_was_going_on(make_trainer):
    trainer = make_trainer()
    rows = load_ranking_rows([{"prompt": "Alien, " * 600, "chosen": " Heat", "rejected": [" Big"]}])
    trainer.add_callback(RankingCallback(trainer, rows, eval_steps=2))
    with pytest.raises(ValueError, match=r"^list\[0\] has \d+ tokens") as raised:
        trainer.train()
    assert raised.value.__notes__[0] == "This was RankingCallback, ranking list after step 2."


def test_what_it_cannot_do(make_trainer, monkeypatch):
    trainer = make_trainer()
    for rows, options, message in (
        ("rows", {}, "`rows` must be rows that `load_ranking_rows` has read"),
        (ROWS, {}, "The trainer never evaluates. Set its `eval_strategy`, or `eval_steps`"),
        (ROWS, {"eval_steps": 0}, "`eval_steps` is 0, but it is at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            RankingCallback(trainer, rows, **options)
    plugin = SimpleNamespace(zero_stage=3)
    state = SimpleNamespace(deepspeed_plugin=plugin)
    spread = (
        {"is_fsdp_enabled": True},
        {"is_deepspeed_enabled": True, "accelerator": SimpleNamespace(state=state)},
    )
    for changes in spread:
        with monkeypatch.context() as patch:
            for name, value in changes.items():
                patch.setattr(trainer, name, value)
            with pytest.raises(ValueError, match="needs the whole model in one process"):
                RankingCallback(trainer, ROWS, eval_steps=1)
