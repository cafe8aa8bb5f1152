"""Rows of one user that share a trunk: which batches they fall into, and that nothing but the cost depends on it."""

import itertools
from dataclasses import fields, replace

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, skip_first_batches
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

from tests.conftest import TITLES
from tests.trainer.helpers import assert_same_step, first_step
from trl_dmpo import DataCollatorForMultiPreference, DMPOConfig
from trl_dmpo.trainer.attention import model_inputs
from trl_dmpo.trainer.layout import Candidate, gather_completions
from trl_dmpo.trainer.trunks import TrunkSampler, share_trunks


def user_rows(targets: list[int], negatives: int = 3, question: str = "") -> list[dict]:
    """Of each user, whose number is its `user_id`, so many targets after a history that grows."""
    rows = []
    for user, count in enumerate(targets):
        titles = TITLES[user:] + TITLES[:user]
        for length in range(8, 8 + count):
            chosen, *rejected = (titles[place % len(titles)] for place in range(length, length + 1 + negatives))
            history = ", ".join(titles[place % len(titles)] for place in range(length))
            rows.append(
                {
                    "prompt": f"User {user} has watched {history}.{question} Next:",
                    "chosen": f" {chosen}",
                    "rejected": [f" {title}" for title in rejected],
                    "user_id": f"user {user}",
                }
            )
    return rows


# Histories as lists of short titles, of which each prompt takes the first few, and a question, or none
tokens = st.integers(5, 30)
title = st.lists(tokens, min_size=1, max_size=4)


@st.composite
def families(draw):
    """Examples of some users as the collator takes them; many prompts of a user are prefixes of one another."""
    question = draw(st.lists(tokens, max_size=3))
    examples = []
    for user in range(draw(st.integers(1, 3))):
        history = draw(st.lists(title, max_size=6))
        for _ in range(draw(st.integers(1, 4))):
            start = draw(st.sampled_from([0, 0, 0, 1]))
            seen = history[start : draw(st.integers(0, len(history)))]
            completions = st.lists(title, min_size=1, max_size=3)
            examples.append(
                {
                    "prompt_ids": [token for each in seen for token in each] + question,
                    "chosen_ids": draw(completions),
                    "rejected_ids": draw(completions),
                    "user": user,
                    "row_index": len(examples),
                }
            )
    return draw(st.permutations(examples))


@pytest.fixture(scope="module")
def model():
    """In float64 throughout, which neither RMSNorm nor the fused head are."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=31, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.5)
    return GPT2LMHeadModel(config).double().eval()


def logps_and_gradients(model, batch) -> tuple[torch.Tensor, torch.Tensor]:
    model.zero_grad()
    inputs = model_inputs(batch, model.config, model.dtype)
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask", "position_ids") if name in inputs}
    targets = batch["targets"].clamp(min=0)
    predicted = model(**inputs).logits[:, : targets.size(1)].log_softmax(-1)
    logps = gather_completions(predicted.gather(2, targets[..., None]).squeeze(2), batch)
    # Weights that tell tokens apart
    (logps * torch.linspace(1, 2, logps.numel(), dtype=logps.dtype).view_as(logps)).sum().backward()
    return logps.detach(), torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@settings(max_examples=40, deadline=None)
@given(
    families(),
    st.sampled_from([None, 6, 12]),
    st.sampled_from(["keep_start", "keep_end"]),
    st.sampled_from([None, 10, 25]),
)
def test_log_probabilities_and_gradients_are_those_of_repeated_prompts(model, examples, length, mode, cap):
    if mode == "keep_start" and length is not None:
        examples = [each for each in examples if len(each["prompt_ids"]) < length]
        if not examples:
            return
    collator = DataCollatorForMultiPreference(
        0, max_length=length, truncation_mode=mode, trunk_column="user", max_trunk_length=cap
    )
    trunks, repeated = collator(examples), replace(collator, prefix_sharing=False)(examples)
    if not (repeated["targets"] >= 0).any():
        return  # single tokens after nothing
    for got, expected in zip(*(logps_and_gradients(model, batch) for batch in (trunks, repeated)), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@settings(max_examples=100, deadline=None)
@given(families(), st.sampled_from([None, 1, 10, 25]), st.sampled_from([None, 8]))
def test_rows_hold_every_prompt_once_within_the_cap(examples, cap, max_length):
    collator = DataCollatorForMultiPreference(
        0, max_length=max_length, truncation_mode="keep_end", trunk_column="user"
    )
    batch = replace(collator, max_trunk_length=cap)(examples)
    alone = replace(collator, trunk_column=None)(examples)
    assert batch["attention_mask"].sum() <= alone["attention_mask"].sum()
    torch.testing.assert_close(batch["completion_lengths"], alone["completion_lengths"])
    width = batch["targets"].size(1)
    row_of = (batch["completion_positions"].flatten(1).amax(1) // width).tolist() if width else []
    shared = {row for row in row_of if row_of.count(row) > 1}
    if cap is not None and all(row >= 0 for row in row_of):
        assert all(batch["attention_mask"][row].sum() <= cap for row in shared)


def prompt(*ids: int) -> list[Candidate]:
    return [Candidate(list(ids), [1, 2]), Candidate(list(ids), [3])]


@pytest.mark.parametrize(
    ("prompts", "users", "expected"),
    [
        # prefixes of one another, of one user and of two
        ([prompt(*range(30)), prompt(*range(20)), prompt(*range(40))], "aaa", [[0, 1, 2]]),
        ([prompt(*range(30)), prompt(*range(20)), prompt(*range(40))], "aba", [[0, 2], [1]]),
        # with a question behind
        ([prompt(*range(30), 90, 91), prompt(*range(20), 90, 91)], "aa", [[0, 1]]),
        # windows that have slid on, with a beginning in common
        ([prompt(7, 8, *range(0, 20)), prompt(7, 8, *range(1, 21))], "aa", [[0], [1]]),
        # nothing to share
        ([prompt(4), prompt(4)], "aa", [[0], [1]]),
    ],
)
def test_prompts_share_a_row_where_most_of_it_is_the_same(prompts, users, expected, monkeypatch):
    monkeypatch.setattr("trl_dmpo.trainer.trunks._pack", lambda trees, _: sorted(sorted(t.prompts) for t in trees))
    assert share_trunks(prompts, users) == expected


def test_rows_that_would_be_mostly_padding_are_put_together():
    long, short = prompt(*range(400)), [prompt(*[user] * 60) for user in range(6)]
    assert share_trunks([long, *short], range(7)) == [[0], [1, 2, 3, 4, 5, 6]]
    assert share_trunks([long, *short], range(7), max_tokens=200) == [[0], [1, 3, 5], [2, 4, 6]]
    # Attention over a long row costs more than padding
    long, short = prompt(*range(20_000)), prompt(*[1] * 15_000)
    assert share_trunks([long, short], "ab") == [[0], [1]]


COUNTS = st.lists(st.integers(1, 9), min_size=1, max_size=12)


def users_of(counts: list[int]) -> list[int]:
    """Rows of users in turn, as in a log."""
    left, users = list(counts), []
    while any(left):
        for user, count in enumerate(left):
            if count:
                left[user] -= 1
                users.append(user)
    return users


@settings(max_examples=100, deadline=None)
@given(COUNTS, st.integers(1, 5), st.integers(0, 3))
def test_every_row_comes_once_and_few_users_are_torn_apart(counts, size, epoch):
    users = users_of(counts)
    sampler = TrunkSampler(users, size, seed=1)
    sampler.set_epoch(epoch)
    order = list(sampler)
    assert sorted(order) == list(range(len(users)))
    assert len(sampler) == len(users)
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    pieces = sum(len({users[row] for row in batch}) for batch in batches)
    least = sum(-(-count // size) for count in counts)
    assert pieces <= least + len(batches), "a batch splits one chunk at most"


def test_the_order_is_that_of_seed_and_epoch():
    users = users_of([5, 3, 8, 1, 2, 6])

    def order(seed: int, epoch: int) -> list[int]:
        sampler = TrunkSampler(users, 4, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed, epoch in itertools.product(range(3), range(3))}) == 9


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("num_processes", [1, 2])
def test_batches_of_processes_and_of_a_resumed_epoch(num_processes, num_workers):
    users = users_of([7, 3, 8, 1, 2, 6])
    batches = []
    for process in range(num_processes):
        sampler = TrunkSampler(users, 3)
        shard = BatchSamplerShard(BatchSampler(sampler, 3, drop_last=False), num_processes, process)
        loader = DataLoader(range(len(users)), batch_sampler=shard, num_workers=num_workers)
        sampler.set_epoch(2)
        batches.append([batch.tolist() for batch in loader])
        assert [batch.tolist() for batch in skip_first_batches(loader, 2)] == batches[-1][2:]
    assert {row for of_process in batches for batch in of_process for row in batch} == set(range(len(users)))


def test_an_order_that_is_split_makes_no_batches_of_two_users_where_it_need_not():
    sampler = TrunkSampler(["ann"] * 3 + ["bob"] * 2 + ["cleo"], batch_size=3)
    for epoch in range(5):
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert {frozenset(order[:3]), frozenset(order[3:])} == {frozenset([0, 1, 2]), frozenset([3, 4, 5])}


# Through the trainer


def trunks_and_stars(build, rows, **options):
    """The same rows in the same batches, with and without trunks."""
    with_trunks = build(rows, trunk_column="user_id", **options)
    without = build(rows, trunk_column="user_id", **options)
    for collator in (without.data_collator, without._train_collator):
        collator.trunk_column = None
    return with_trunks, without


@pytest.mark.parametrize(("architecture", "question"), [("llama", " What is"), ("gemma3_text", "")])
def test_loss_and_gradients_of_a_step(architecture, question, build, model_path):
    rows = user_rows([4, 3, 1], question=question)
    steps, tokens = [], []
    for trainer in trunks_and_stars(build, rows, model=model_path(architecture), per_device_train_batch_size=8):
        batch = next(iter(trainer.get_train_dataloader()))
        tokens.append(batch["attention_mask"].sum().item())
        steps.append(first_step(trainer))
        assert trainer._sharing_is_exact
    assert_same_step(*steps)
    assert tokens[0] < 0.7 * tokens[1]


@pytest.mark.parametrize(
    "options",
    [
        {"num_negatives": 2, "dataloader_num_workers": 1, "gradient_accumulation_steps": 2},
        {"precompute_ref_log_probs": True, "max_tokens_per_batch": 120, "loss_type": ["dmpo", "sft"]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_trainings_are_the_same(options, build):
    rows, logs = user_rows([6, 1, 4]), []
    for trainer in trunks_and_stars(build, rows, max_steps=3, per_device_train_batch_size=4, **options):
        trainer.train()
        logs.append(trainer.state.log_history[:-1])
    for got, expected in zip(*logs, strict=True):
        assert got["num_tokens"] < expected["num_tokens"]
        for name in ("loss", "grad_norm", "rewards/margins", "logps/chosen", "ranking/ndcg@5"):
            assert got[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-4), name


def test_evaluation_rows_share_trunks(build):
    rows, found = user_rows([4, 3, 1]), []
    for trainer in trunks_and_stars(build, rows, per_device_eval_batch_size=8):
        batch = next(iter(trainer.get_eval_dataloader(trainer.train_dataset)))
        found.append((batch["attention_mask"].sum(), trainer.evaluate(trainer.train_dataset)["eval_loss"]))
    assert found[0][0] < 0.7 * found[1][0]
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-4)


def test_self_play_keeps_trunks(build):
    from trl_dmpo.ranking.self_play import SelfPlayCallback

    rows, logs = user_rows([3, 2]), []
    for trainer in trunks_and_stars(build, rows, max_steps=1, per_device_train_batch_size=5):
        trainer.add_callback(SelfPlayCallback(trainer, every=1, exclude=None))
        trainer.train()
        logs.append([(entry["loss"], entry["num_tokens"]) for entry in trainer.state.log_history[:-1]])
    for (loss, tokens), (expected, tokens_alone) in zip(*logs, strict=True):
        assert loss == pytest.approx(expected, rel=1e-3)
        assert tokens < tokens_alone


def test_a_resumed_run_has_the_batches_of_the_one_that_was_not_stopped(build, tmp_path, monkeypatch):
    # As for several processes in the middle of an epoch: accelerate then does not reach the sampler
    monkeypatch.setattr("accelerate.data_loader.DataLoaderShard.set_epoch", lambda self, epoch: None)
    rows, seen = user_rows([5, 1, 3]), []
    options = {
        "num_train_epochs": 2,
        "max_steps": -1,
        "save_strategy": "steps",
        "save_steps": 4,
        "trunk_column": "user_id",
    }
    for checkpoint in (None, str(tmp_path / "out" / "checkpoint-4")):
        trainer = build(rows, per_device_train_batch_size=4, **options)
        step, indices = trainer.training_step, []

        def spy(model, inputs, *args, indices=indices, step=step, **kwargs):
            indices.append(inputs["row_index"].tolist())
            return step(model, inputs, *args, **kwargs)

        trainer.training_step = spy
        trainer.train(resume_from_checkpoint=checkpoint)
        seen.append(indices)
    assert seen[1] == seen[0][4:], "within the second epoch of three batches"
    assert seen[0][:3] != seen[0][3:]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_trunk_length": 100}, "`max_trunk_length` is the length of rows that prompts share by `trunk_column`"),
        ({"trunk_column": "user_id", "max_trunk_length": 0}, "`max_trunk_length` must be at least 1, got 0"),
        (
            {"trunk_column": "user_id", "max_trunk_length": 9, "max_tokens_per_batch": 8},
            "Rows of `max_trunk_length=9` tokens do not fit into `max_tokens_per_batch=8`",
        ),
        ({"trunk_column": "user_id", "prefix_sharing": False}, "under `prefix_sharing=False` not even"),
        (
            {"trunk_column": "user"},
            "has no column 'user', which `trunk_column` names. It has: prompt, chosen, rejected",
        ),
        (
            {"trunk_column": "rejected"},
            "train, column 'rejected': `trunk_column` must name a column of numbers or text",
        ),
        ({"trunk_column": "age"}, r"train\[2\], column 'age': the row does not say whose it is"),
    ],
)
def test_options_that_do_not_go_together(options, message, build):
    rows = [{**row, "age": None if number == 2 else 40} for number, row in enumerate(user_rows([4]))]
    with pytest.raises(ValueError, match=message):
        build(rows, **options)


def test_length_grouping_is_another_order(make_args):
    grouping = {"train_sampling_strategy": "group_by_length"}
    if "train_sampling_strategy" not in {field.name for field in fields(DMPOConfig)}:
        grouping = {"group_by_length": True}
    with pytest.raises(ValueError, match="`trunk_column` and 'group_by_length' sampling each say which rows"):
        make_args(trunk_column="user_id", **grouping)


def test_streams_have_an_order_of_their_own(build):
    with pytest.raises(ValueError, match="a streaming dataset comes in an order of its own"):
        build(Dataset.from_list(user_rows([3])).to_iterable_dataset(), trunk_column="user_id")
