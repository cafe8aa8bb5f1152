"""Small trainings whose outcome must not depend on how many processes share them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from tests.conftest import make_rows
from tests.trainer.helpers import perturb
from trl_dmpo import DMPOConfig, DMPOTrainer
from trl_dmpo.losses import LOSSES
from trl_dmpo.ranking.self_play import SelfPlayCallback
from trl_dmpo.trainer.collapse import CollapseCallback


# Rows of an optimizer step, over all processes and micro-batches
STEP_ROWS = 4

# In which sums in another order differ by little
DTYPE = torch.float64


@dataclass(frozen=True)
class Case:
    """
    A training of one epoch.

    Args:
        rows (`int`, *optional*, defaults to `9`):
            Number of training rows. Of 9, the last step has one, which leaves nothing to the second process.
        eval_rows (`int`, *optional*):
            Number of rows to evaluate on after the epoch.
        peft (`bool`, *optional*, defaults to `False`):
            Whether to train a LoRA adapter.
        explicit_reference (`bool`, *optional*, defaults to `False`):
            Whether to give a reference model of other weights.
        to_dataset (`Callable`, *optional*):
            From rows to a dataset.
        add_callback (`Callable`, *optional*):
            From the trainer to a callback to add.
        options (`dict`, *optional*):
            Options of the configuration.
    """

    rows: int = 9
    eval_rows: int | None = None
    peft: bool = False
    explicit_reference: bool = False
    to_dataset: Callable[[list[dict]], Any] = Dataset.from_list
    add_callback: Callable[[DMPOTrainer], TrainerCallback] | None = None
    options: dict[str, Any] = field(default_factory=dict)


def several_chosen(rows: list[dict]) -> Dataset:
    return Dataset.from_list(
        [{**row, "chosen": [row["chosen"], *row["rejected"][1:3]], "rejected": row["rejected"][:1]} for row in rows]
    )


def stream(rows: list[dict], num_shards: int = 1):
    return Dataset.from_list(rows).to_iterable_dataset(num_shards=num_shards)


def not_finite_in_the_second_process(scores, config):
    loss = LOSSES["dmpo"](scores, config)
    return loss / 0 if PartialState().process_index == 1 else loss


MIXTURE = {"loss_type": ["dmpo", "sft"], "loss_weights": [1.0, 0.5]}

CASES = {
    "full": Case(rows=11, eval_rows=7, add_callback=lambda trainer: CollapseCallback(), options=MIXTURE),
    "lora": Case(eval_rows=5, peft=True, options={"loss_type": ["sdpo", "sft"]}),
    "explicit reference": Case(explicit_reference=True),
    "precomputed": Case(explicit_reference=True, eval_rows=5, options={"precompute_ref_log_probs": True}),
    "drawn": Case(peft=True, options={"num_negatives": 1, "num_train_epochs": 2}),
    "last rows dropped": Case(peft=True, options={"dataloader_drop_last": True}),
    "repeated": Case(options={"prefix_sharing": False, **MIXTURE}),
    "several chosen": Case(to_dataset=several_chosen, options={"loss_type": ["plackett_luce", "dmpo", "sft"]}),
    "token budget": Case(peft=True, eval_rows=5, options={"max_tokens_per_batch": 40, **MIXTURE}),
    "self-play": Case(peft=True, add_callback=partial(SelfPlayCallback, every=1, exclude=None)),
    "stream": Case(eval_rows=5, to_dataset=stream, options={"max_steps": 5, "num_negatives": 1, **MIXTURE}),
    "stream of files": Case(rows=8, to_dataset=partial(stream, num_shards=2), options={"max_steps": 2}),
    "probe fails in the second process": Case(peft=True, options=MIXTURE),
    "not finite in the second process": Case(options={"loss_type": [not_finite_in_the_second_process]}),
}


def chosen_logps(predictions) -> dict[str, float]:
    """Depends on every row's once: a mean over all of them."""
    return {"chosen_logps": float(predictions.predictions[predictions.label_ids == 1].mean())}


def make_options(case: Case, processes: int, accumulation: int, output_dir: str) -> dict[str, Any]:
    return {
        "output_dir": output_dir,
        "per_device_train_batch_size": STEP_ROWS // (processes * accumulation),
        "gradient_accumulation_steps": accumulation,
        "per_device_eval_batch_size": STEP_ROWS // processes,
        "eval_strategy": "no" if case.eval_rows is None else "steps",
        "eval_steps": 3,
        "num_train_epochs": 1,
        # Of all optimizers the one that does not make much of little: Adam divides by the size of a gradient
        "optim": "sgd",
        "learning_rate": 0.05,
        "beta": 0.1,  # larger gradients would need a larger tolerance
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1e9,
        "logging_steps": 1,
        "report_to": "none",
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "accelerator_config": {"use_configured_state": True},
        "save_strategy": "no",
        "disable_tqdm": True,
        "ddp_timeout": 60,
        **case.options,
    }


def build_trainer(
    case: Case,
    model_path: str,
    tokenizer: PreTrainedTokenizerFast,
    output_dir: str,
    processes: int,
    accumulation: int,
    **trainer_options,
) -> DMPOTrainer:
    """The trainer of a case, for one of several processes that share each step. Its policy is still its reference."""
    load = partial(AutoModelForCausalLM.from_pretrained, model_path, dtype=DTYPE)
    reference = load() if case.explicit_reference else None
    if reference is not None:
        perturb(reference, seed=2)
    eval_rows = None if case.eval_rows is None else case.to_dataset(make_rows(case.eval_rows, [2, 1, 4], seed=1))
    trainer = DMPOTrainer(
        load(),
        ref_model=reference,
        args=DMPOConfig(**make_options(case, processes, accumulation, output_dir)),
        train_dataset=case.to_dataset(make_rows(case.rows, [1, 3, 2, 5])),
        eval_dataset=eval_rows,
        processing_class=tokenizer,
        compute_metrics=chosen_logps,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if case.peft else None,
        **trainer_options,
    )
    if case.add_callback is not None:
        trainer.add_callback(case.add_callback(trainer))
    return trainer
