"""Shared against repeated, over kinds of models: which one ran, and that it does not matter."""

import pytest
import torch
from datasets import Dataset

from tests.conftest import ARCHITECTURES, make_rows
from tests.trainer.helpers import assert_same_step, first_step, perturb
from trl_dmpo import DMPOTrainer
from trl_dmpo.ranking.scorer import trained_scorer
from trl_dmpo.trainer.sharing import compare_layouts, rounding_error


# Why the prompt is repeated; None where it is shared
OBSTACLES = {
    "llama": None,
    "qwen3": None,
    "gpt2": None,
    "gemma3_text": None,
    "mistral": None,
    "qwen3_moe": None,
    "lfm2": "lfm2 has convolutions over the row of tokens",
    "bloom": "bloom derives positions from the place in the row (ALiBi)",
}


def leak(batch, implementation, dtype, window, past):
    """A mask under which a branch sees the branches in front of it."""
    seen = torch.ones(len(batch["input_ids"]), 1, *[batch["input_ids"].size(1)] * 2).tril().bool()
    return seen if implementation == "sdpa" else torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(dtype).min)


def build(model_path, tokenizer, args, rows, architecture="llama", **kwargs):
    model = kwargs.pop("model", model_path(architecture))
    trainer = DMPOTrainer(
        model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, **kwargs
    )
    perturb(trainer.model)
    return trainer


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_losses_and_gradients(architecture, attn_implementation, model_path, tokenizer, make_args, caplog):
    if architecture == "bloom" and attn_implementation == "sdpa":
        attn_implementation = None  # it has one of its own
    rows, steps, trainers = make_rows(3, [4, 1, 6]), [], []
    kwargs = {"attn_implementation": attn_implementation} if attn_implementation else {}
    for prefix_sharing in ("auto", False):
        args = make_args(prefix_sharing=prefix_sharing, per_device_train_batch_size=3, model_init_kwargs=kwargs)
        trainers.append(build(model_path, tokenizer, args, rows, architecture))
        steps.append(first_step(trainers[-1]))
    obstacle = OBSTACLES[architecture]
    assert trainers[0].data_collator.prefix_sharing is (obstacle is None)
    assert trainers[0]._sharing_is_exact is (True if obstacle is None else None)
    if obstacle is not None:
        assert [r for r in caplog.records if obstacle in r.getMessage()], caplog.text
    assert_same_step(*steps)


def test_windows_are_counted_along_the_path(model_path, tokenizer, make_args):
    """The rows must be longer than the window, or the test above says nothing about windows."""
    trainer = build(model_path, tokenizer, make_args(per_device_train_batch_size=3), make_rows(3, 6), "mistral")
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["position_ids"].max() > 2 * trainer.model.config.sliding_window


@pytest.mark.parametrize("architecture", ["lfm2", "bloom"])
def test_demanding_it_where_it_is_not_exact_raises(architecture, model_path, tokenizer, make_args):
    with pytest.raises(ValueError, match=r"prefix_sharing=True.*" + OBSTACLES[architecture].split("(")[0]):
        build(model_path, tokenizer, make_args(prefix_sharing=True), make_rows(3, 2), architecture)


@pytest.mark.parametrize("prefix_sharing", ["auto", True])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_measurement_catches_what_the_rule_does_not_know(
    prefix_sharing, num_workers, model_path, tokenizer, make_args, monkeypatch, caplog
):
    """A model that the rule lets pass, but whose positions see the branches in front of them."""
    monkeypatch.setattr("trl_dmpo.trainer.attention._mask", leak)
    args = {"per_device_train_batch_size": 3, "dataloader_num_workers": num_workers}
    trainer = build(model_path, tokenizer, make_args(prefix_sharing=prefix_sharing, **args), make_rows(6, [4, 1, 6]))
    assert trainer.data_collator.prefix_sharing
    if prefix_sharing is True:
        with pytest.raises(ValueError, match="on the first batch, log-probabilities of tokens differ by"):
            first_step(trainer)
        return
    step = first_step(trainer)
    warnings = [r.getMessage() for r in caplog.records if "Prompts are not shared" in r.getMessage()]
    assert len(warnings) == 1
    assert "log-probabilities of tokens differ by" in warnings[0]
    assert not trainer.data_collator.prefix_sharing
    trainer.train()  # batches that a worker laid out before the verdict are laid out anew
    assert sum("Prompts are not shared" in r.getMessage() for r in caplog.records) == 1
    plain = build(model_path, tokenizer, make_args(prefix_sharing=False, **args), make_rows(6, [4, 1, 6]))
    assert_same_step(step, first_step(plain))


def test_measurement_catches_a_leak_in_half_precision(model_path, tokenizer, make_args, monkeypatch, caplog):
    """What is noise in bfloat16 is more than in float32, but not so much that a wrong mask would pass."""
    monkeypatch.setattr("trl_dmpo.trainer.attention._mask", leak)
    trainer = build(
        model_path, tokenizer, make_args(bf16=True, per_device_train_batch_size=3), make_rows(3, [4, 1, 6])
    )
    first_step(trainer)
    assert trainer._sharing_is_exact is False
    assert "differ by" in caplog.text


def test_reference_model_is_measured_too(model_path, tokenizer, make_args, monkeypatch):
    """A reference of another kind, which the rule does not know: the mask is wrong for it alone."""
    from transformers import AutoModelForCausalLM

    from trl_dmpo.trainer import attention

    correct = attention._mask
    monkeypatch.setattr(attention, "_mask", lambda b, kind, *a: (leak if kind == "eager" else correct)(b, kind, *a))
    rows, steps = make_rows(3, [4, 1, 6]), []
    for prefix_sharing in ("auto", False):
        reference = AutoModelForCausalLM.from_pretrained(model_path(), attn_implementation="eager")
        args = make_args(prefix_sharing=prefix_sharing, per_device_train_batch_size=3)
        trainer = build(model_path, tokenizer, args, rows, ref_model=reference)
        steps.append(first_step(trainer))
        assert trainer._sharing_is_exact is (False if prefix_sharing else None)
    assert_same_step(*steps)


def test_rows_as_long_as_the_model_allows(model_path, tokenizer, make_args):
    """The measurement must not need more positions than training does."""
    rows = [{**row, "prompt": "Seen: " + "Jaws, " * 115 + row["prompt"]} for row in make_rows(2, 3)]
    trainer = build(model_path, tokenizer, make_args(max_length=256), rows, "gpt2")
    longest = max(len(ids) for ids in trainer.train_dataset["prompt_ids"])
    assert 240 < longest < trainer.model.config.n_positions == 256
    first_step(trainer)
    assert trainer._sharing_is_exact


def test_router_logits_are_not_asked_for_without_their_loss(model_path, tokenizer, make_args):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_path("qwen3_moe"), output_router_logits=True)
    trainer = build(model_path, tokenizer, make_args(router_aux_loss_coef=0.0), make_rows(4, 3), model=model)
    first_step(trainer)
    assert trainer._sharing_is_exact


@pytest.mark.parametrize("architecture", ["bloom", "lfm2"])
def test_measurement_survives_a_model_that_refuses_the_mask(
    architecture, model_path, tokenizer, make_args, monkeypatch, caplog
):
    monkeypatch.setattr("trl_dmpo.trainer.dmpo_trainer.sharing_obstacle", lambda model: None)
    trainer = build(model_path, tokenizer, make_args(per_device_train_batch_size=3), make_rows(3, 3), architecture)
    first_step(trainer)
    assert "the model could not run on it" in caplog.text
    assert not trainer.data_collator.prefix_sharing


def test_prompt_learning_adapters_repeat(model_path, tokenizer, make_args, caplog):
    from peft import PromptTuningConfig

    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    trainer = build(model_path, tokenizer, make_args(), make_rows(4, 3), peft_config=config)
    assert not trainer.data_collator.prefix_sharing
    assert "virtual tokens" in caplog.text
    first_step(trainer)


def test_auxiliary_loss_repeats_and_is_logged(model_path, tokenizer, make_args, caplog):
    args = make_args(router_aux_loss_coef=0.1, max_steps=1)
    trainer = build(model_path, tokenizer, args, make_rows(4, 3), "qwen3_moe")
    assert not trainer.data_collator.prefix_sharing
    assert "auxiliary loss" in caplog.text
    trainer.train()
    assert trainer.state.log_history[0]["aux_loss"] > 0


def test_half_precision_is_noise(model_path, tokenizer, make_args):
    """What bfloat16 rounds away must not look like a difference between the layouts."""
    args = make_args(bf16=True, per_device_train_batch_size=3)
    trainer = build(model_path, tokenizer, args, make_rows(3, [4, 1, 6]))
    trainer.train()
    assert trainer._sharing_is_exact


def test_dropout_does_not_disturb_the_measurement(model_path, tokenizer, make_args):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_path("gpt2"), resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5)
    trainer = build(model_path, tokenizer, make_args(disable_dropout=False), make_rows(4, 3), model=model)
    first_step(trainer)
    assert trainer._sharing_is_exact
    assert trainer.model.training


def test_flash_attention_repeats(model_path):
    from transformers import AutoModelForCausalLM

    from trl_dmpo.trainer.sharing import sharing_obstacle

    model = AutoModelForCausalLM.from_pretrained(model_path())
    assert sharing_obstacle(model) is None
    model.config._attn_implementation_internal = "flash_attention_2"
    assert "flash_attention_2" in sharing_obstacle(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logps_equal_a_plain_forward(dtype, model_path, tokenizer, make_args):
    """Against `model(ids).logits`, one completion at a time, without anything of ours or TRL's."""
    rows = make_rows(3, [4, 1, 6])
    trainer = build(model_path, tokenizer, make_args(per_device_train_batch_size=3), rows)
    trainer.model.to(dtype)
    batch = next(iter(trainer.get_eval_dataloader(trainer.train_dataset)))
    logps = trainer._token_logps(trainer.model, batch).sum(-1)
    for row, got in zip(trainer.train_dataset, logps, strict=True):
        for completion, value in zip([row["chosen_ids"], *row["rejected_ids"]], got, strict=False):
            ids = torch.tensor([row["prompt_ids"] + completion])
            plain = trainer.model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])
            torch.testing.assert_close(value, plain[-len(completion) :].sum().to(value.dtype), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_rounding_error_is_of_the_size_of_the_type(dtype, model_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_path(), dtype=dtype)
    embeddings, ids = model.get_input_embeddings(), torch.arange(20)
    exact = embeddings(ids)
    with rounding_error(model, dtype):
        changes = (embeddings(ids) / exact - 1).double()[exact != 0]  # that of padding is 0
    step = torch.finfo(dtype).eps
    assert changes.abs().min() >= step / 2
    assert changes.abs().max() <= step * 2
    assert (changes > 0).any()
    assert (changes < 0).any()
    assert torch.equal(embeddings(ids), exact)


@pytest.mark.parametrize(("bf16", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_under_autocast_a_scorer_expects_noise_of_the_type_of_autocast(bf16, dtype, model_path, tokenizer, make_args):
    trainer = build(model_path, tokenizer, make_args(bf16=bf16), make_rows(3, 2))
    scorer = trained_scorer(trainer)
    assert scorer.model.dtype == torch.float32
    assert scorer.dtype == dtype
    scorer.score(["Seen: Heat. Next:"], [" Alien", " Big"])
    assert scorer._shares


@pytest.mark.parametrize(
    ("off", "unshared", "perturbed", "tolerance", "exact"),
    [
        (0.04, 0.0, 0.0, 0.01, False),  # of the type alone
        (0.04, 0.01, 0.0, 0.05, True),  # 5 times that of kernels
        (0.04, 0.0, 0.02, 0.06, True),  # 3 times that of a rounding error
        (0.04, 0.01, 0.02, 0.06, True),
        (0.07, 0.01, 0.02, 0.06, False),
    ],
)
def test_what_is_taken_for_noise(off, unshared, perturbed, tolerance, exact):
    repeated = torch.tensor([-1.0, -2.0], dtype=torch.float64)
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64)
    layouts = (repeated + each * signs for each in (off, unshared, perturbed))
    measured = compare_layouts(*layouts, repeated, torch.bfloat16)
    assert measured.difference == pytest.approx(off)
    assert measured.tolerance == pytest.approx(tolerance)
    assert measured.exact is exact
