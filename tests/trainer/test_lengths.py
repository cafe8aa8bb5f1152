"""Batches of rows of equal length: how long a row is, how much padding is left, and the order of a resumed run."""

import pytest
import torch
import transformers
from packaging.version import Version

from tests.conftest import make_dataset, make_rows
from trl_dmpo import DataCollatorForMultiPreference
from trl_dmpo.trainer.lengths import row_lengths


GROUPED = (
    {"train_sampling_strategy": "group_by_length"}
    if Version(transformers.__version__) >= Version("5.1")
    else {"group_by_length": True}
)


def uneven_rows(count: int) -> list[dict]:
    """Prompts of one to nine repetitions: most batches in random order have rows of very different lengths."""
    rows = make_rows(count, 2)
    return [{**row, "prompt": row["prompt"] * (1 + index % 9)} for index, row in enumerate(rows)]


def batches(trainer, epoch: int = 0) -> list[list[int]]:
    loader = trainer.get_train_dataloader()
    loader.set_epoch(epoch)
    return [batch["row_index"].tolist() for batch in loader]


def test_length_of_a_row_is_what_it_costs():
    from datasets import Dataset

    rows = [
        {"row_index": 0, "prompt_ids": [1] * 5, "chosen_ids": [2, 3], "rejected_ids": [[4], [5, 6, 7]]},
        {"row_index": 1, "prompt_ids": [1], "chosen_ids": [[2, 3], [2]], "rejected_ids": [[4]]},
    ]
    dataset = Dataset.from_list(rows[:1]), Dataset.from_list(rows[1:])

    def found(**options):
        return [row_lengths(each, DataCollatorForMultiPreference(0, **options))[0] for each in dataset]

    assert found() == [4 + 2 + 1 + 3, 0 + 2 + 1 + 1]
    assert found(prefix_sharing=False) == [5 + 3, 1 + 2]
    assert found(max_length=6) == [4 + 1 + 1 + 1, 0 + 2 + 1 + 1]
    assert found(num_negatives=1) in ([4 + 2 + 1, 4], [4 + 2 + 3, 4])


def test_groups_leave_little_padding(build):
    """In batches of 4 out of 240 rows, which have a third of padding in random order."""
    shares = {}
    for name, options in (("random", {}), ("grouped", GROUPED)):
        trainer = build(uneven_rows(240), per_device_train_batch_size=4, num_train_epochs=1, max_steps=-1, **options)
        seen = [(batch["attention_mask"], batch["row_index"]) for batch in trainer.get_train_dataloader()]
        assert sorted(torch.cat([rows for _, rows in seen]).tolist()) == list(range(240))
        shares[name] = 1 - sum(mask.sum() for mask, _ in seen) / sum(mask.numel() for mask, _ in seen)
    assert shares["random"] > 0.25
    assert shares["grouped"] < 0.1


def test_order_depends_on_seed_and_epoch_only(build):
    """Not on the random state, which differs between processes and in a resumed run."""
    trainer = build(uneven_rows(36), **GROUPED)
    first = batches(trainer)
    torch.rand(7)
    assert batches(trainer) == first
    assert batches(trainer, epoch=1) != first
    assert batches(build(uneven_rows(36), seed=7, **GROUPED)) != first


def test_a_resumed_run_goes_on_in_the_same_order(build, monkeypatch):
    from trl_dmpo import DMPOTrainer

    seen: list[list[int]] = []
    step = DMPOTrainer.training_step

    def watched(self, model, inputs, *args, **kwargs):
        seen.append(inputs["row_index"].tolist())
        return step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(DMPOTrainer, "training_step", watched)
    options = {**GROUPED, "save_strategy": "steps", "save_steps": 6, "max_steps": 8}
    build(uneven_rows(8), perturbed=False, **options).train()
    whole, seen[:] = list(seen), []
    # In the middle of the second epoch
    trainer = build(uneven_rows(8), perturbed=False, **options)
    trainer.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-6")
    assert len(whole) == 8
    assert whole[:4] != whole[4:]
    assert seen == whole[6:]


def test_given_lengths_are_taken(build):
    """Odd and even rows meet in the middle of a group only, of which there are four."""
    dataset = make_dataset(64, 2).add_column("length", [1, 9] * 32)
    mixed = [rows for rows in batches(build(dataset, **GROUPED)) if len({row % 2 for row in rows}) > 1]
    assert len(mixed) <= 4


def test_evaluation_and_rebalanced_batches(build):
    """Each row once, whichever of the strategies of transformers asks for lengths."""
    trainer = build(uneven_rows(8), trainer_options={"eval_dataset": make_dataset(5, 2)}, **GROUPED)
    rows = [row for batch in trainer.get_eval_dataloader() for row in batch["row_index"].tolist()]
    assert sorted(rows) == list(range(5))
    if "train_sampling_strategy" not in GROUPED:
        pytest.skip("this transformers has no such option")
    trainer = build(uneven_rows(8), train_sampling_strategy="batch_rebalance")
    rows = [row for batch in trainer.get_train_dataloader() for row in batch["row_index"].tolist()]
    assert sorted(rows) == list(range(8))
    trainer.train()
