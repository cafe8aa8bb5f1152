"""Batches in parts, and what a row of an optimizer step counts."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import IterableDatasetShard
from datasets import Dataset
from hypothesis import example, given
from hypothesis import strategies as st

from tests.conftest import make_rows
from tests.trainer.helpers import assert_same_step
from trl_dmpo import DataCollatorForMultiPreference
from trl_dmpo.trainer.layout import LAYOUT_KEYS
from trl_dmpo.trainer.micro_batches import join_parts, split_batch, split_prompts, take_prompts
from trl_dmpo.trainer.step_counts import COUNT_KEYS, count_step, counted, rows_that_count


ids = st.lists(st.integers(1, 50), min_size=1, max_size=5)
examples = st.lists(
    st.fixed_dictionaries(
        {
            "prompt_ids": st.lists(st.integers(1, 50), max_size=6),
            "chosen_ids": ids,
            "rejected_ids": st.lists(ids, min_size=1, max_size=4),
        }
    ),
    min_size=1,
    max_size=5,
)


def collate(rows: list[dict], **options) -> dict[str, torch.Tensor]:
    return DataCollatorForMultiPreference(pad_token_id=0, **options)([*rows])


def predicted(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The token that each place of each completion is scored on, -1 where there is none."""
    positions = batch["completion_positions"]
    if batch["targets"].numel() == 0:
        return torch.full_like(positions, -1)
    return batch["targets"].flatten()[positions.clamp(min=0)].masked_fill(positions < 0, -1)


@given(examples, st.booleans(), st.sampled_from([None, 8]), st.data())
def test_part_of_a_batch_is_the_batch_of_its_rows(rows, shares, multiple_of, data):
    wanted = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, unique=True))
    options = {"prefix_sharing": shares, "pad_to_multiple_of": multiple_of}
    part = take_prompts(collate(rows, **options), wanted, multiple_of or 1)
    alone = collate([rows[index] for index in wanted], **options)
    places, length = alone["completion_lengths"].size(1), alone["completion_positions"].size(2)
    assert torch.equal(part["completion_lengths"][:, :places], alone["completion_lengths"])
    assert torch.equal(predicted(part)[:, :places, :length], predicted(alone))
    if all(
        row["prompt_ids"] for row in rows
    ):  # where nothing is scored, the part has a row of tokens for it all the same
        names = [name for name in LAYOUT_KEYS if name in alone]
        assert all(torch.equal(part[name].sort(0).values, alone[name].sort(0).values) for name in names)


@given(examples, st.booleans(), st.integers(1, 60))
@example(
    [{"prompt_ids": [], "chosen_ids": each, "rejected_ids": [[1]]} for each in ([1, 1], [1])]
    + [{"prompt_ids": [], "chosen_ids": [1], "rejected_ids": [[1, 1]]}],
    False,
    1,
)
def test_parts_keep_to_the_budget(rows, shares, budget):
    batch = collate(rows, prefix_sharing=shares)
    parts = split_prompts(batch, budget)
    assert sorted(prompt for part in parts for prompt in part) == list(range(len(rows)))
    for part in parts:
        # A prompt of which nothing is scored takes no tokens: it may be beside one that alone has more
        scored = (batch["completion_positions"][part] >= 0).any(dim=(1, 2))
        if scored.sum() > 1 and len(parts) > 1:
            assert take_prompts(batch, part)["input_ids"].numel() <= budget


def test_as_many_parts_on_all_processes():
    """Another process has three: the last one here is repeated without counting, so that all collectives match."""
    rows = [{"prompt_ids": [1, 2, 3], "chosen_ids": [4], "rejected_ids": [[5]]}] * 4
    accelerator = SimpleNamespace(device="cpu", gather=lambda count: torch.cat([count, torch.tensor([3])]))
    batch = counted(collate(rows), Accelerator(cpu=True))
    parts = split_batch(batch, 8, accelerator)
    assert [part["counts"].tolist() for part in parts] == [[True, True], [True, True], [False, False]]
    joined = join_parts(parts, [(part["place"] * 10, part["counts"].sum()) for part in parts])
    assert joined[0].tolist() == [0, 10, 20, 30]
    assert joined[1] == 4


class TestSteps:
    @pytest.mark.parametrize(
        "options",
        [
            {"loss_type": ["dmpo"]},
            {"loss_type": ["dmpo"], "prefix_sharing": False},
            {"loss_type": ["sdpo", "sft"], "loss_weights": [1.0, 0.5]},
            {"loss_type": ["sigmoid"], "ld_alpha": 0.5},
            {"loss_type": ["dmpo"], "precompute_ref_log_probs": True},
        ],
        ids=["shared", "repeated", "sft", "ld", "precomputed"],
    )
    def test_same_gradient_within_a_budget(self, options, build, monkeypatch):
        rows, steps, forwards = make_rows(4, [3, 1, 6, 2]), [], []
        for budget in (None, 60):
            trainer = build(rows, per_device_train_batch_size=4, max_tokens_per_batch=budget, max_steps=1, **options)
            compute = trainer._compute_loss
            monkeypatch.setattr(
                trainer, "_compute_loss", lambda *a, f=compute: forwards.append(a[1]["input_ids"].numel()) or f(*a)
            )
            trainer.create_optimizer_and_scheduler(1)
            batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
            trainer.current_gradient_accumulation_steps = 1
            loss = trainer.training_step(trainer.model, batch)
            gradients = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
            steps.append((loss.item(), gradients))
            trainer.log({})
            trainer.metrics = trainer.state.log_history[-1]
            if budget is None:
                expected, whole = trainer.metrics, forwards.pop()
        assert_same_step(*steps)
        assert len(forwards) > 1
        assert max(forwards) < whole
        for name in expected.keys() - {"tokens/padding"}:
            assert trainer.metrics[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name

    def test_evaluation_within_a_budget(self, build):
        rows, found = make_rows(5, [3, 1, 6, 2]), []
        for budget in (None, 40):
            trainer = build(
                rows,
                max_tokens_per_batch=budget,
                per_device_eval_batch_size=3,
                trainer_options={
                    "compute_metrics": lambda p: {"first": p.predictions[0, 0], "last": p.predictions[4, 2]}
                },
            )
            found.append(trainer.evaluate(Dataset.from_list(rows)))
        for name in found[0].keys() - {"eval_tokens/padding"}:
            if not name.endswith(("runtime", "per_second")):
                assert found[1][name] == pytest.approx(found[0][name], rel=1e-4, abs=1e-4), name

    def test_rows_count_equally_in_uneven_micro_batches(self, build):
        """Three rows as two and one: loss and gradient are those of three at once."""
        rows, logs = make_rows(3, [3, 1, 6]), []
        options = {"loss_type": ["dmpo", "sft"], "loss_weights": [1.0, 1.0], "max_steps": 1, "seed": 3}
        for sizes in (
            {"per_device_train_batch_size": 3},
            {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        ):
            trainer = build(rows, **options, **sizes)
            trainer.train()
            logs.append(trainer.state.log_history[0])
        for name in ("loss", "grad_norm"):
            assert logs[1][name] == pytest.approx(logs[0][name], rel=1e-5), name

    def test_evaluation_metrics_are_means_over_rows(self, build):
        rows, found = make_rows(3, [3, 1, 6]), []
        for size in (3, 2):
            trainer = build(rows, per_device_eval_batch_size=size)
            found.append(trainer.evaluate(Dataset.from_list(rows)))
        for name in ("eval_loss", "eval_rewards/margins", "eval_logps/chosen", "eval_entropy", "eval_num_tokens"):
            assert found[1][name] == pytest.approx(found[0][name], rel=1e-4), name


class TestCounts:
    @staticmethod
    def accelerator(process: int, remainder: int, gathered=None):
        state = SimpleNamespace(end_of_dataloader=True, remainder=remainder, active_dataloader=None)
        return SimpleNamespace(
            gradient_state=state, process_index=process, num_processes=2, gather=lambda rows: torch.tensor(gathered)
        )

    batch = {"completion_lengths": torch.ones(2, 3), "row_index": torch.tensor([0, 1])}

    @pytest.mark.parametrize(("process", "remainder", "expected"), [(0, 3, [1, 1]), (1, 3, [1, 0]), (1, 1, [0, 0])])
    def test_rows_that_fill_up_the_last_batch_do_not(self, process, remainder, expected):
        accelerator = self.accelerator(process, remainder)
        assert rows_that_count(self.batch, accelerator, is_last=True).int().tolist() == expected
        assert rows_that_count(self.batch, accelerator, is_last=False).all()

    @pytest.mark.parametrize(
        ("process", "gathered", "expected"),
        [(0, [8, 9, 0, 1], [1, 1]), (1, [8, 9, 0, 1], [0, 0]), (1, [7, 8, 9, 0], [1, 0])],
    )
    def test_nor_those_of_a_stream(self, process, gathered, expected):
        accelerator, loader = (
            self.accelerator(process, -1, gathered),
            SimpleNamespace(dataset=IterableDatasetShard([])),
        )
        assert rows_that_count(self.batch, accelerator, True, loader).int().tolist() == expected

    def test_of_a_step(self):
        """Four rows in two micro-batches, and 2 + 1 + 1 + 1 tokens of chosen completions."""
        rows = [{"prompt_ids": [1], "chosen_ids": [4] * (2 - (i > 0)), "rejected_ids": [[5]]} for i in range(4)]
        batches = [collate(rows[:3]), collate(rows[3:])]
        count_step(batches, Accelerator(cpu=True))
        for batch in batches:
            assert {key: batch[key].tolist() for key in COUNT_KEYS[1:]} == {"rows": 2.0, "chosen_tokens_per_row": 1.25}


class TestErrors:
    @pytest.mark.parametrize("loss", ["aot", "aot_unpaired"])
    def test_losses_of_a_whole_batch(self, loss, make_args):
        with pytest.raises(
            ValueError, match=rf"The loss '{loss}' compares the rows of a batch .*max_tokens_per_batch"
        ):
            make_args(loss_type=["dmpo", loss], max_tokens_per_batch=100)

    def test_no_budget(self, make_args):
        with pytest.raises(ValueError, match="`max_tokens_per_batch` must be at least 1, got 0"):
            make_args(max_tokens_per_batch=0)

    def test_dispatched_batches(self, make_args):
        with pytest.raises(
            ValueError, match="`dispatch_batches=True` of `accelerator_config` has one process lay out"
        ):
            make_args(accelerator_config={"dispatch_batches": True})
        assert make_args().accelerator_config.dispatch_batches is False
