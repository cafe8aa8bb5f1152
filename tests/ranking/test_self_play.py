"""Negatives that move with the model: which they are, that training takes them, and that a resumed training does, too."""

import shutil

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from transformers import Trainer, TrainerState

from trl_dmpo import DMPOTrainer
from trl_dmpo.ranking import self_play
from trl_dmpo.ranking.self_play import FILE_NAME, SelfPlayCallback

from ..conftest import TITLES, make_rows, not_interpreted


pytestmark = not_interpreted
ANSWERS = [f" {title}" for title in TITLES]
ROWS = make_rows(6, [3, 4])
INVALID = {"prompt": "Next:", "chosen": " Heat", "rejected": [" Heat"]}


@pytest.fixture
def make_trainer(model_path, tokenizer, make_args):
    def make(rows=ROWS, peft_config=None, **options):
        rows = Dataset.from_list(rows) if isinstance(rows, list) else rows
        args = make_args(**({"seed": 1, "lr_scheduler_type": "constant"} | options))
        return DMPOTrainer(
            model_path(), args=args, train_dataset=rows, processing_class=tokenizer, peft_config=peft_config
        )

    return make


@pytest.fixture
def play(make_trainer):
    """From rows and options to a callback that has scored answers once, at the start."""

    def make(rows=ROWS, trainer=None, **options):
        trainer = trainer or make_trainer(rows)
        callback = SelfPlayCallback(trainer, every=5, **options)
        callback.on_step_begin(trainer.args, TrainerState(max_steps=5), trainer.control)
        return callback

    return make


def train(trainer, every, resume_from_checkpoint=None, **options):
    """Weights, losses and what was found last."""
    callback = SelfPlayCallback(trainer, every, **options)
    trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    weights = [weight.detach().clone() for weight in trainer.model.parameters()]
    losses = {log["step"]: log["loss"] for log in trainer.state.log_history if "loss" in log}
    return weights, losses, callback


def assert_same_weights(left, right):
    assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def conversational(row):
    def say(text):
        return [{"role": "assistant", "content": text}]

    return {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "chosen": say(row["chosen"]),
        "rejected": list(map(say, row["rejected"])),
    }


def test_the_best_wrong_answers_by_plain_forwards(play, tokenizer):
    callback = play(answers=ANSWERS)
    candidates = play(trainer=callback.trainer, answers=ANSWERS, num_candidates=4)
    model = callback.trainer.model.double().eval()
    for index, row in enumerate(ROWS):
        prompt = tokenizer(row["prompt"])["input_ids"]
        scores = {}
        for answer in ANSWERS:
            ids = torch.tensor([tokenizer(row["prompt"] + answer + tokenizer.eos_token)["input_ids"]])
            logps = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])
            scores[answer] = logps[len(prompt) - 1 :].sum().item()
        history = row["prompt"].split("watched ")[1].removesuffix(". Next:").split(", ")
        wrong = [answer for answer in ANSWERS if answer != row["chosen"] and answer.strip() not in history]
        # Of 3 or 4 rejected completions, half are the model's
        assert callback.found[index] == sorted(wrong, key=scores.get, reverse=True)[:2]
        drawn = [f" {text}" for text in candidates._wrong_answers(row | {"row_index": index})]
        assert len(drawn) == 4
        assert set(drawn) <= set(wrong)
        assert candidates.found[index] == sorted(drawn, key=scores.get, reverse=True)[:2]


@pytest.mark.parametrize(("num_negatives", "several"), [(None, False), (2, True)])
def test_training_is_that_on_a_dataset_with_them(make_trainer, num_negatives, several):
    """With a row dropped, and with dropout: not one random number of the training is another."""
    rows = [{**row, "chosen": [row["chosen"], " Brazil"][: 1 + index % 2]} for index, row in enumerate(ROWS)]
    rows = [{**INVALID, "chosen": [" Heat"]}, *rows] if several else [INVALID, *ROWS]
    lora = LoraConfig(lora_dropout=0.2, target_modules=["q_proj"], init_lora_weights=False)
    options = {"max_steps": 3, "on_invalid_row": "drop", "num_negatives": num_negatives, "peft_config": lora}
    weights, losses, callback = train(make_trainer(rows, **options), every=3)
    assert callback.refreshes == 1
    assert callback.found.keys() == set(range(1, 7))
    moved = rows[:1] + [{**row, "rejected": callback.rejected(index)} for index, row in enumerate(rows[1:], 1)]
    assert moved != rows
    assert all(answer not in row["chosen"] for row in moved[1:] for answer in row["rejected"])
    trainer = make_trainer(moved, **options)
    trainer.train()
    assert_same_weights(weights, [weight.detach() for weight in trainer.model.parameters()])
    assert losses == {log["step"]: log["loss"] for log in trainer.state.log_history if "loss" in log}


def test_a_row_keeps_its_number(play, make_trainer):
    trainer = make_trainer()
    for share, counts in ((1e-9, (1, 1)), (0.5, (2, 2)), (0.7, (2, 3)), (1, (3, 4))):
        callback = play(trainer=trainer, share=share)
        for index, row in enumerate(ROWS):
            rejected = callback.rejected(index)
            assert len(set(rejected)) == len(rejected) == len(row["rejected"])
            assert row["chosen"] not in rejected
            own, others = rejected[: counts[index % 2]], rejected[counts[index % 2] :]
            assert own == callback.found[index]
            assert others == [answer for answer in row["rejected"] if answer in others]
            assert callback.rejected(index) == rejected


def test_others_are_drawn_anew(play):
    row = {"prompt": "Seen: Jaws. Next:", "chosen": " Big", "rejected": [" a", " b", " c", " d"]}
    callback = play([row, row], answers=[" Big", " Heat", " Alien"])
    drawn = []
    for callback.refreshes in range(1, 9):
        drawn.append([tuple(callback.rejected(index)[2:]) for index in (0, 1)])
    assert {answer for first, _ in drawn for answer in first} == set(row["rejected"])
    assert any(first != second for first, second in drawn)


def test_what_is_no_wrong_answer(play):
    rows = [
        {"prompt": "Seen: Red Heat, Aliens. Next:", "chosen": " Big", "rejected": [" Alien", " Jaws"], "user_id": 1},
        {"prompt": "Seen: Big. Next:", "chosen": " Babe", "rejected": [" Alien", " Jaws"], "user_id": 1},
        {"prompt": "Seen: Jaws. Next:", "chosen": " Alien", "rejected": [" Jaws", " Babe"], "user_id": 2},
    ]
    answers = [" Heat", "Red Heat", " Aliens", " Alien", " Big", " Babe", " Jaws"]

    def found(rows, **options):
        rows = [{**row, "rejected": [f" {n}" for n in range(9)]} for row in rows]
        own = play(rows, share=1, answers=answers, **options).found
        return [{answer.strip() for answer in own[index]} for index in range(len(rows))]

    everything = {answer.strip() for answer in answers}
    assert found(rows) == [
        everything - {"Red Heat", "Aliens", "Big", "Babe"},
        everything - {"Big", "Babe"},
        everything - {"Jaws", "Alien"},
    ]
    assert found(rows, exclude=None) == [everything - {"Big", "Babe"}] * 2 + [everything - {"Alien"}]
    alone = [{**row, "user_id": None} for row in rows]
    assert found(alone, exclude=None) == [everything - {"Big"}, everything - {"Babe"}, everything - {"Alien"}]
    same = [{**row, "prompt": "Next:"} for row in alone]
    assert found(same, exclude=None) == [everything - {"Big", "Babe", "Alien"}] * 3


def test_too_few_wrong_answers(play):
    row = {"prompt": "Seen: Heat. Next:", "chosen": " Big", "rejected": [" Alien", " Jaws", " Babe"]}
    rows = [row, {**row, "prompt": "Seen: Alien. Next:"}]
    callback = play(rows, share=1, answers=[" Big", " Heat", " Alien"])
    assert callback.found == {0: [" Alien"], 1: [" Heat"]}
    assert callback.rejected(0) == [" Alien", " Jaws", " Babe"]
    with pytest.raises(ValueError, match="No row has a wrong answer among the 2 `answers`") as raised:
        play(rows[:1], answers=[" Big", " Heat"])
    assert raised.value.__notes__ == ["This was SelfPlayCallback, scoring answers after step 0."]


def test_candidates_are_drawn_for_each_row_and_time(play):
    rows = [{"prompt": "Next:", "chosen": " Big", "rejected": [" 1", " 2"]}] * 2
    callback = play(rows, answers=[" Big", *ANSWERS], num_candidates=4)
    drawn = []
    for callback.refreshes in (1, 2):
        drawn += [callback._wrong_answers(row) for row in callback._rows]
    assert len(set(map(tuple, drawn))) == 4
    assert callback._wrong_answers(callback._rows[1]) == drawn[3]


def test_processes_share_the_rows(play, monkeypatch):
    callback = play()
    alone, gathered = dict(callback.found), []
    monkeypatch.setattr(self_play, "_ROWS_AT_A_TIME", 2)
    monkeypatch.setattr(self_play, "gather_object", lambda found: gathered.append(found) or found)
    arguments = type(callback.trainer.args)
    monkeypatch.setattr(arguments, "world_size", 2)
    for process in (0, 1):
        monkeypatch.setattr(arguments, "process_index", process)
        callback.on_train_begin(callback.trainer.args, TrainerState(), None)
        callback.on_step_begin(callback.trainer.args, TrainerState(max_steps=5), None)
    assert [sorted(index for index, _ in found) for found in gathered] == [[0, 2, 4], [1, 3, 5]]
    assert {index: [f" {text}" for text in texts] for found in gathered for index, texts in found} == alone


def test_when_and_what_is_logged(make_trainer):
    trainer = make_trainer(max_steps=4, learning_rate=0.05)
    _, _, callback = train(trainer, every=2)
    new = {log["step"]: log["self_play/new"] for log in trainer.state.log_history if "self_play/new" in log}
    # The model moves: some of the answers are new, and after the last step none are looked for
    assert new.keys() == {1, 2}
    assert new[1] == 1
    assert 0 < new[2] < 1
    assert callback.refreshes == 2
    assert trainer.rejected_pools is None


def test_a_resumed_training_is_the_same(make_trainer, tmp_path):
    saves = {"save_strategy": "steps", "save_steps": 1}
    options = {"every": 2, "share": 0.7}
    weights, losses, callback = train(make_trainer(max_steps=5, learning_rate=0.05, **saves), **options)
    # In the middle, where answers have just been scored, and where they were not, it being the last step
    short = make_trainer(
        max_steps=4, learning_rate=0.05, output_dir=str(tmp_path / "short"), **saves | {"save_steps": 4}
    )
    train(short, **options)
    shutil.copytree(tmp_path / "out" / "checkpoint-3", tmp_path / "elsewhere=1")
    for folder in (tmp_path / "elsewhere=1", tmp_path / "out" / "checkpoint-4", tmp_path / "short" / "checkpoint-4"):
        assert [path.name for path in folder.glob("self_play*")] == [FILE_NAME]
        trainer = make_trainer(max_steps=5, learning_rate=0.05, output_dir=str(tmp_path / "resumed"))
        resumed = train(trainer, resume_from_checkpoint=str(folder), **options)
        assert_same_weights(weights, resumed[0])
        assert resumed[1] == losses
        assert resumed[2].found == callback.found
        assert resumed[2].refreshes == callback.refreshes == 3


def test_messages(play, tmp_path):
    """They are what the model says of them as text, but for the template, and come back from a checkpoint."""
    callback = play([conversational(row) for row in ROWS])
    found, refreshes = callback.found, callback.refreshes
    for index, row in enumerate(ROWS):
        for (message,) in callback.rejected(index):
            assert message["content"] in ANSWERS
            assert message["content"] != row["chosen"]
            assert message["content"].strip() not in row["prompt"]
    callback.save(tmp_path)
    callback.found, callback.refreshes = {}, 0
    callback._load(tmp_path)
    assert (callback.found, callback.refreshes) == (found, refreshes)
    tokenizer = callback.trainer.processing_class
    (example,) = callback.examples([3])
    assert [tokenizer.decode(ids) for ids in example["rejected_ids"]] == [
        f"{message['content']}<|end|>" for (message,) in callback.rejected(3)
    ]


def test_checkpoints_that_do_not_fit(make_trainer, tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    train(make_trainer(**(options | {"max_steps": 2})), every=1)
    trainer = make_trainer(ROWS[:5], **options)
    with pytest.raises(ValueError, match=rf"{FILE_NAME} is of 6 rows, which are not the 5 of the training set"):
        train(trainer, every=1, resume_from_checkpoint=True)
    make_trainer(**(options | {"max_steps": 2})).train()
    with pytest.raises(ValueError, match=rf"checkpoint-2 has no {FILE_NAME}: it is of a training without SelfPlay"):
        train(make_trainer(**options), every=1, resume_from_checkpoint=True)


def test_options_out_of_range(make_trainer):
    trainer = make_trainer()
    for options, message in (
        ({"every": 0}, "`every` is 0, but it is a number of steps, at least 1"),
        ({"every": 0.5}, "`every` is 0.5, but it is a number of steps"),
        ({"share": 0}, "`share` is 0, but it is above 0 and at most 1"),
        ({"share": 1.1}, r"`share` is 1.1, but it is above 0"),
        ({"num_candidates": 1}, "`num_candidates` is 1, fewer than the 2 answers to find where a row has 4 rejected"),
        ({"exclude": "history"}, "`exclude` is 'history', but it is 'prompt' or None"),
        ({"answers": " Heat"}, "`answers` is a single answer. Give a list of answers"),
        (
            {"answers": [" Heat", ""]},
            r"`answers\[1\]` is '', expected a completion like those of the rows, such as ' ",
        ),
        ({"answers": [[{"role": "assistant", "content": " Heat"}]]}, r"`answers\[0\]` is \[\{'role'"),
        ({"answers": TITLES}, "None of the 12 `answers` is a completion of the training set. Write them as the rows"),
        ({"answers": [" Heat", " Heat  "]}, "There is only one answer, 'Heat'. Give at least two"),
    ):
        with pytest.raises(ValueError, match=message):
            SelfPlayCallback(trainer, **({"every": 1} | options))


def test_what_it_does_not_go_with(make_trainer, monkeypatch):
    assert SelfPlayCallback(make_trainer(), every=1).rejected(1) == ROWS[1]["rejected"]  # nothing is found yet
    listing = [{**row, "prompt": f"Which of{row['chosen']},{row['rejected'][0]}?"} for row in ROWS]
    implicit = [
        {"chosen": row["prompt"] + row["chosen"], "rejected": [row["prompt"] + each for each in row["rejected"]]}
        for row in ROWS
    ]
    graded = [{**row, "relevance": [1.0] * (1 + len(row["rejected"]))} for row in ROWS]
    for rows, options, message in (
        (IterableDataset.from_generator(lambda: iter(ROWS)), {}, "`train_dataset` must be a `Dataset`, got `Iterable"),
        (ROWS, {"precompute_ref_log_probs": True}, "found in training cannot be precomputed. Leave out"),
        (listing, {}, "Every prompt names the chosen answer of its row"),
        (implicit, {}, "The training set has no column 'prompt'"),
        (graded, {"loss_type": "infonca"}, "The loss 'infonca' takes from the column 'relevance' how good each"),
        (
            [{**row, "tools": "[]"} for row in ROWS],
            {},
            "has the column 'tools', which answers are scored without",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            SelfPlayCallback(make_trainer(rows, **options), every=1)
    trainer = make_trainer()
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "loss_types", ["sft", "plackett_luce"])
        with pytest.raises(
            ValueError, match="The loss 'plackett_luce' takes the rejected completions of a row to be in"
        ):
            SelfPlayCallback(trainer, every=1)
    monkeypatch.setattr(trainer, "is_fsdp_enabled", True)
    with pytest.raises(ValueError, match="SelfPlayCallback needs the whole model in one process"):
        SelfPlayCallback(trainer, every=1)
    with pytest.raises(TypeError, match="`trainer` must be a `DMPOTrainer`, got `Trainer`"):
        SelfPlayCallback(object.__new__(Trainer), every=1)
