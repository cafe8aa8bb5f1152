"""
Every private name of TRL that this package touches, and why.

This is the only list. A contract test checks it against the lowest and the newest supported TRL, and importing the
trainer checks it against the installed one.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet


SUPPORTED_TRL = ">=1.15,<2"

# Overridden, called or read on `DPOTrainer`
TRAINER_HOOKS = {
    "_prepare_dataset": "overridden: rows with K rejected completions are checked and tokenized",
    "_set_signature_columns_if_needed": "overridden: keeps the index of a row, for errors and drawn negatives",
    "_precompute_ref_logps": "overridden: K differs from row to row; calls the original with padded rows",
    "compute_ref_log_probs": "overridden: K per prompt, either layout; TRL's precomputation calls it",
    "_compute_loss": "overridden: the multi-negative loss",
    "train": "overridden: resumes from whole checkpoints, saves one at SIGTERM",
    "_load_from_checkpoint": "overridden: an adapter keeps its dtype",
    "_save_checkpoint": "overridden: a folder that is not saved to the end is known for that, and an error names it",
    "_save_rng_state": "overridden: the last that all processes save: what transformers leaves out is saved after it",
    "get_batch_samples": "overridden: counts the rows of an optimizer step over processes and micro-batches",
    "training_step": "overridden: batches within `max_tokens_per_batch`; rejected completions that a callback has renewed",
    "log": "overridden: evaluation metrics as means over all rows, not over batches",
    "prediction_step": "overridden: `compute_metrics` gets log-probabilities instead of logits",
    "_get_train_sampler": "overridden: rows of a user, or of a length, fall into the same batches (a hook of transformers')",
    "_get_eval_sampler": "overridden: lengths of rows for transformers' length grouping (a hook of transformers')",
    "get_eval_dataloader": "overridden: its workers outlive a SIGTERM that is sent to a whole job",
    "get_train_dataloader": "overridden: negatives are drawn in training only",
}

# Called on `DPOTrainer`, which has them from transformers
CALLED = {
    "_get_output_dir": "where a checkpoint is saved",
    "_load_rng_state": "of a checkpoint after which no step is left",
}

# What `train` sets, to resume the curve of a training that was killed; the contract test trains to see it
TRAINING_STATE = {
    "_globalstep_last_logged": "the step since which the loss is summed up",
    "_total_loss_scalar": "sum of the losses that were logged",
}

# Attributes that `DPOTrainer.__init__` sets and that are read here
TRAINER_ATTRIBUTES = {
    "_tokenizer": "the tokenizer, also when the processing class is a processor",
    "_is_vlm": "a processor was given: prompts are not shared",
    "_precompute_model_hash": "part of the name of a file of precomputed references: other settings, another file",
    "beta": "scale of the rewards that are logged",
    "loss_types": "what the configuration names",
    "_metrics": "where the metrics of a step are collected for `log`",
    "_total_train_tokens": "running count behind `num_tokens`",
    "_tp_size": "tensor-parallel ranks see the same tokens",
    "aux_loss_enabled": "a mixture of experts with an auxiliary loss",
    "router_aux_loss_coef": "its coefficient",
    "precompute_ref_logps": "the reference comes with the batch",
    "loss_weights": "weights of a mixture of losses",
    "ld_alpha": "LD-DPO's α",
    "use_weighting": "WPO's weights",
}

# Functions and classes imported from modules that TRL does not document
FUNCTIONS = {
    "trl.cli.accelerate_config.resolve_accelerate_config_argument": "`--accelerate_config` of the command line",
    "trl.data_utils._tokenize": "text and messages to token ids, as TRL does",
    "trl.data_utils.common_prefix_length": "where a completion starts when tokens merge across the prompt's end",
    "trl.data_utils.extract_prompt": "the implicit prompt of a pair",
    "trl.models.utils.disable_gradient_checkpointing": "the reference forward",
    "trl.trainer.dpo_trainer.DataCollatorForPreference": "the collator that ours takes the place of",
    "trl.trainer.utils.add_fused_lm_head": "per-token outputs of `model(..., fused_lm_head=True)`, by `DPOTrainer`",
    "trl.trainer.utils.get_config_model_id": "name of the default output folder",
    "trl.trainer.utils.global_then_local_main_first": "one process prepares a dataset, the others read its cache",
    "trl.trainer.utils.use_adapter": "the reference of a PEFT model",
}


# What the fused LM head is asked for, and what it gives
# It calls the model's `base_model` and scores the `last_hidden_state` of that, of which we leave the scored positions
FUSED_HEAD_ARGUMENTS = ("fused_lm_head", "labels", "shift_labels")
FUSED_HEAD_OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs", "aux_loss")


def missing_hooks() -> list[str]:
    """Names of the hooks that the installed TRL lacks."""
    from trl import DPOTrainer

    missing = [f"trl.DPOTrainer.{name}" for name in (*TRAINER_HOOKS, *CALLED) if not hasattr(DPOTrainer, name)]
    initializer = DPOTrainer.__init__.__code__
    missing += [f"trl.DPOTrainer().{name}" for name in TRAINER_ATTRIBUTES if name not in initializer.co_names]
    for path in FUNCTIONS:
        module, name = path.rsplit(".", 1)
        try:
            if not hasattr(import_module(module), name):
                missing.append(path)
        except ImportError:
            missing.append(path)
    return missing


def require_supported_trl() -> None:
    """
    Check the installed TRL.

    Raises:
        `ImportError`: TRL is absent, of an unsupported version, or lacks a hook; the message names both versions.
    """
    try:
        installed = version("trl")
    except PackageNotFoundError:
        raise ImportError(
            f"trl-dmpo extends TRL, which is not installed: `pip install 'trl{SUPPORTED_TRL}'`."
        ) from None
    supported = SpecifierSet(SUPPORTED_TRL).contains(installed, prereleases=True)
    missing = missing_hooks() if supported else []
    if missing or not supported:
        lacks = f", which lacks {', '.join(missing)}" if missing else ""
        raise ImportError(
            f"trl-dmpo supports trl{SUPPORTED_TRL}, but trl=={installed} is installed{lacks}. "
            f"`pip install 'trl{SUPPORTED_TRL}'`, or a trl-dmpo that supports it."
        )
