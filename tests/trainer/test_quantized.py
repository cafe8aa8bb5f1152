"""QLoRA by bitsandbytes, whose kernels for the CPU are those that run here."""

import bitsandbytes
import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.conftest import make_dataset
from tests.trainer.helpers import first_step, perturb
from trl_dmpo import DMPOTrainer
from trl_dmpo.trainer import dmpo_trainer
from trl_dmpo.trainer.quantization import keep_differentiable


NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
INT8 = BitsAndBytesConfig(load_in_8bit=True)


@pytest.fixture
def build(model_path, tokenizer, make_args):
    def make(quantization=NF4, rows=4, **options):
        return DMPOTrainer(
            model_path(),
            args=make_args(per_device_train_batch_size=4, **options),
            train_dataset=make_dataset(rows, 3),
            eval_dataset=make_dataset(2, 3),
            processing_class=tokenizer,
            quantization_config=quantization,
            peft_config=LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0),
        )

    return make


@pytest.fixture
def repacks(monkeypatch):
    """Have every CPU repack 4-bit weights in evaluation mode, as one with AVX512-BF16 does."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True, raising=False)


def frozen(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora_" not in name}


def score(model, tokenizer) -> torch.Tensor:
    """Log-probabilities of the tokens of a text."""
    ids = tokenizer("User 3 has watched Alien, Heat, Big. Next: Aliens", return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, :-1]
    return logits.log_softmax(-1).gather(-1, ids[0, 1:, None]).squeeze(-1)


def load(path, quantization=None):
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=quantization, dtype=torch.float32)
    keep_differentiable(model)
    return model.eval()


@pytest.mark.parametrize("quantization", [NF4, INT8], ids=["4bit", "8bit"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_the_loss_falls_and_the_base_weights_stay(build, quantization, checkpointing, repacks):
    trainer = build(
        quantization,
        max_steps=6,
        learning_rate=2e-2,
        gradient_checkpointing=checkpointing,
        eval_strategy="steps",
        eval_steps=2,
    )
    before = frozen(trainer.model)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)  # policy and reference are the same
    assert losses[-1] < 0.6
    after = frozen(trainer.model)
    assert len(before) > 20
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert trainer._sharing_is_exact is True


class TestGradients:
    def test_an_evaluation_takes_none_away(self, build, repacks):
        torch.manual_seed(0)
        trainer = build()
        perturb(trainer.model)
        _, expected = first_step(trainer)
        trainer.evaluate()
        _, gradients = first_step(trainer)
        assert len(gradients) == 28  # two matrices on 7 layers of 2 blocks
        for name, gradient in expected.items():
            torch.testing.assert_close(gradients[name], gradient)

    @pytest.mark.skipif(
        not hasattr(bitsandbytes.nn.modules, "has_avx512bf16"), reason="this bitsandbytes repacks nothing"
    )
    def test_weights_that_were_repacked_are_refused(self, model_path, repacks):
        model = AutoModelForCausalLM.from_pretrained(model_path(), quantization_config=NF4)
        layer = model.model.layers[1].mlp.down_proj  # the only ones here that are wide enough
        with torch.no_grad():
            layer.eval()(torch.zeros(1, layer.in_features))
        with pytest.raises(
            ValueError, match=r"first: model\.layers\.1\.mlp\.down_proj.* repacked .* Load the model anew"
        ):
            keep_differentiable(model)


class TestSharing:
    @pytest.mark.parametrize("quantization", [NF4, INT8], ids=["4bit", "8bit"])
    def test_what_no_position_may_see_is_found(self, build, quantization, monkeypatch):
        found = []

        def measure(batch, score, *args):
            # Every answer sees those before it
            found.append(measure_sharing(batch, lambda inputs: score(_without_branches(inputs)), *args))
            return found[0]

        measure_sharing = dmpo_trainer.measure_sharing
        monkeypatch.setattr(dmpo_trainer, "measure_sharing", measure)
        trainer = build(quantization)
        trainer.train()
        assert trainer._sharing_is_exact is False
        assert found[0].error is None
        assert found[0].difference > 3 * found[0].tolerance

    def test_loss_and_gradients_are_those_of_the_repeated_layout(self, build):
        steps = []
        for prefix_sharing in (True, False):
            torch.manual_seed(0)
            trainer = build(prefix_sharing=prefix_sharing)
            perturb(trainer.model)
            steps.append(first_step(trainer))
        (shared, gradients), (repeated, expected) = steps
        assert shared == pytest.approx(repeated, rel=1e-2)
        # The adapters are in bfloat16
        flat, flat_expected = (
            torch.cat([each[name].float().flatten() for name in expected]) for each in (gradients, expected)
        )
        assert torch.nn.functional.cosine_similarity(flat, flat_expected, dim=0) > 0.999


class TestCheckpoint:
    def test_reloads_and_merges(self, build, model_path, tokenizer, tmp_path):
        trainer = build(max_steps=4, learning_rate=1e-2, save_strategy="steps", save_steps=4)
        trainer.train()
        trained = score(trainer.model.eval(), tokenizer)
        checkpoint = tmp_path / "out" / "checkpoint-4"
        again = PeftModel.from_pretrained(load(model_path(), NF4), checkpoint, torch_dtype=torch.bfloat16)
        again = again.eval()
        base = score(load(model_path(), NF4), tokenizer)
        moved = (trained - base).abs().mean()
        assert moved > 0.1
        assert (score(again, tokenizer) - trained).abs().mean() < 0.05 * moved

        full = PeftModel.from_pretrained(load(model_path()), checkpoint).eval()
        expected = score(full, tokenizer)
        torch.testing.assert_close(score(full.merge_and_unload(), tokenizer), expected, rtol=1e-4, atol=1e-4)

    def test_training_goes_on_as_if_never_stopped(self, build, tmp_path):
        options = {"learning_rate": 1e-2, "lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 2}
        whole = build(max_steps=4, **options)
        whole.train()
        resumed = build(max_steps=4, **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
        expected = {name: parameter for name, parameter in whole.model.named_parameters() if parameter.requires_grad}
        assert {parameter.dtype for parameter in expected.values()} == {torch.bfloat16}
        found = dict(resumed.model.named_parameters())
        for name, parameter in expected.items():
            assert found[name].dtype == parameter.dtype
            torch.testing.assert_close(found[name], parameter, rtol=0, atol=0)


def test_without_an_adapter_it_is_refused(model_path, tokenizer, make_args):
    with pytest.raises(ValueError, match="purely quantized models"):
        DMPOTrainer(
            model_path(),
            args=make_args(),
            train_dataset=make_dataset(2, 2),
            processing_class=tokenizer,
            quantization_config=NF4,
        )


def _without_branches(inputs: dict) -> dict:
    if "subtree_end" not in inputs:
        return inputs
    return inputs | {"subtree_end": torch.full_like(inputs["subtree_end"], inputs["subtree_end"].size(1))}
