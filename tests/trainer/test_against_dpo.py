"""With one rejected completion, `DMPOTrainer` is `DPOTrainer`; with K, TRL's losses are means over pairs."""

import inspect
import re

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

from tests.conftest import make_rows
from tests.trainer.helpers import assert_same_step, first_step, pair_dataset, perturb
from trl_dmpo import LOSSES, DMPOTrainer


TRL_LOSSES = sorted(set(re.findall(r'loss_type == "(\w+)"', inspect.getsource(DPOTrainer._compute_loss))))

OPTIONS = {
    "exo_pair": {"label_smoothing": 1e-3},
    "robust": {"label_smoothing": 0.1},
    "aot": {"label_smoothing": 0.05},
}


def test_every_loss_of_the_installed_trl_is_known():
    assert len(TRL_LOSSES) >= 15
    assert set(TRL_LOSSES) <= set(LOSSES), "TRL has a loss that trl-dmpo lacks: add it to losses/pairwise.py"


def build(cls, model_path, tokenizer, args, rows, peft=False, **kwargs):
    torch.manual_seed(0)
    peft_config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"]) if peft else None
    trainer = cls(
        model_path(), args=args, train_dataset=rows, processing_class=tokenizer, peft_config=peft_config, **kwargs
    )
    perturb(trainer.model)
    return trainer


@pytest.mark.parametrize("loss_type", TRL_LOSSES)
@pytest.mark.parametrize("prefix_sharing", [True, False], ids=["shared", "repeated"])
def test_same_loss_and_gradients_with_one_rejected(loss_type, prefix_sharing, model_path, tokenizer, make_args):
    rows, options = (
        make_rows(4, 1),
        {"loss_type": [loss_type], "per_device_train_batch_size": 4, **OPTIONS.get(loss_type, {})},
    )
    dpo = build(DPOTrainer, model_path, tokenizer, make_args(DPOConfig, **options), pair_dataset(rows))
    dmpo = build(
        DMPOTrainer,
        model_path,
        tokenizer,
        make_args(prefix_sharing=prefix_sharing, **options),
        Dataset.from_list(rows),
    )
    assert dmpo.data_collator.prefix_sharing is prefix_sharing
    assert_same_step(first_step(dpo), first_step(dmpo))


COMBINATIONS = {
    "lora": {"peft": True},
    "precomputed": {"precompute_ref_log_probs": True},
    "lora-precomputed": {"peft": True, "precompute_ref_log_probs": True},
    "ld": {"ld_alpha": 0.5},
    "ld-precomputed": {"ld_alpha": 0.3, "precompute_ref_log_probs": True},
    "wpo": {"use_weighting": True},
    "mixture": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "forward_kl": {"f_divergence_type": "forward_kl"},
    "js": {"f_divergence_type": "js_divergence"},
    "alpha": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
    "alpha-limit": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0},
    "truncated": {"max_length": 16},
    "truncated-end": {"max_length": 16, "truncation_mode": "keep_end"},
    "multiple": {"pad_to_multiple_of": 8},
    "checkpointing": {"gradient_checkpointing": True},
    "accumulation": {"gradient_accumulation_steps": 2},
}
# Means over the tokens of an optimizer step here, and over its micro-batches of means over their tokens there
OVER_TOKENS = {"entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected"}


@pytest.mark.filterwarnings("ignore:The `'keep_end'`")
@pytest.mark.parametrize("options", COMBINATIONS.values(), ids=COMBINATIONS.keys())
def test_same_run_with_one_rejected(options, model_path, tokenizer, make_args):
    """Losses, gradient norms and every metric that TRL logs, over three optimizer steps."""
    options = {"loss_type": ["sigmoid"], "max_steps": 3, **options}
    peft = options.pop("peft", False)
    different = OVER_TOKENS if "gradient_accumulation_steps" in options else set()
    rows = make_rows(8, 1)
    logs, weights = [], []
    for cls, config, dataset in (
        (DPOTrainer, DPOConfig, pair_dataset(rows)),
        (DMPOTrainer, None, Dataset.from_list(rows)),
    ):
        trainer = build(cls, model_path, tokenizer, make_args(config, **options), dataset, peft)
        trainer.train()
        logs.append(trainer.state.log_history)
        weights.append({n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad})
    assert trainer._sharing_is_exact, "the layout under test is the shared one"
    for theirs, ours in zip(*logs, strict=True):
        for name in theirs.keys() - {"num_tokens", "total_flos"} - different:
            if not name.endswith(("runtime", "per_second")):
                assert ours[name] == pytest.approx(theirs[name], rel=2e-4, abs=2e-5), name
    assert logs[1][0]["grad_norm"] > 1e-3
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=1e-3, atol=2e-4)


SEVERAL_REJECTED = {
    **{
        name: {"loss_type": [name], **OPTIONS.get(name, {})}
        for name in TRL_LOSSES
        if name not in ("sft", "aot", "aot_unpaired")
    },
    "ld": {"loss_type": ["sigmoid"], "ld_alpha": 0.4},
    "wpo": {"loss_type": ["sigmoid"], "use_weighting": True},
}


@pytest.mark.parametrize("options", SEVERAL_REJECTED.values(), ids=SEVERAL_REJECTED.keys())
def test_mean_over_pairs_with_several_rejected(options, model_path, tokenizer, make_args):
    """The same number of pairs for each prompt, so that TRL's mean over pairs is the mean over prompts."""
    rows = make_rows(3, 3)
    pairs = make_args(DPOConfig, **options, per_device_train_batch_size=9)
    prompts = make_args(**options, per_device_train_batch_size=3)
    dpo = build(DPOTrainer, model_path, tokenizer, pairs, pair_dataset(rows))
    dmpo = build(DMPOTrainer, model_path, tokenizer, prompts, Dataset.from_list(rows))
    assert_same_step(first_step(dpo), first_step(dmpo))


def test_pretrained_adapter_is_the_reference(model_path, tokenizer, make_args):
    """A PEFT model without `peft_config`: TRL keeps a copy of its adapter as "ref"."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    rows, steps = make_rows(4, 1), []
    for cls, config, dataset in (
        (DPOTrainer, DPOConfig, pair_dataset(rows)),
        (DMPOTrainer, None, Dataset.from_list(rows)),
    ):
        torch.manual_seed(0)
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(model_path()), LoraConfig(r=4, init_lora_weights=False)
        )
        args = make_args(config, loss_type=["sigmoid"], per_device_train_batch_size=4)
        trainer = cls(model, args=args, train_dataset=dataset, processing_class=tokenizer)
        assert "ref" in trainer.model.peft_config
        perturb(trainer.model)
        steps.append(first_step(trainer))
    assert steps[0][0] != pytest.approx(0.6931, abs=1e-3)
    assert_same_step(*steps)


def test_explicit_reference_model(model_path, tokenizer, make_args):
    from transformers import AutoModelForCausalLM

    rows, steps = make_rows(4, 1), []
    for cls, config, dataset in (
        (DPOTrainer, DPOConfig, pair_dataset(rows)),
        (DMPOTrainer, None, Dataset.from_list(rows)),
    ):
        reference = AutoModelForCausalLM.from_pretrained(model_path(), attn_implementation="eager")
        perturb(reference, seed=2)
        args = make_args(config, loss_type=["sigmoid"], per_device_train_batch_size=4)
        steps.append(first_step(build(cls, model_path, tokenizer, args, dataset, ref_model=reference)))
    assert_same_step(*steps)
