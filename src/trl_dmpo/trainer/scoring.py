"""Per-token outputs of a model for a batch in either layout, from TRL's fused LM head."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import is_peft_model

from .attention import model_inputs
from .layout import IGNORE_INDEX, is_shared


# Those that are per token, of what the fused LM head returns
PER_TOKEN_OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def forward(model: Any, unwrapped: Any, batch: dict[str, torch.Tensor], **kwargs) -> Any:
    """
    Run `model` on `batch` through TRL's fused LM head.

    Args:
        model ([`~torch.nn.Module`]):
            The model to call, possibly wrapped for distributed training.
        unwrapped ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The same model without the wrapper.
        batch (`dict[str, torch.Tensor]`):
            A batch in the shared or the repeated layout.
        **kwargs:
            Passed to the model.

    Returns:
        TRL's `FusedCausalLMOutput`, its per-token fields of shape (R, T) for a shared batch, where they are 0 at positions
        without a target, and (R, T - 1) for a repeated one, plus the columns of virtual tokens in front.
    """
    inputs = model_inputs(batch, unwrapped.config, unwrapped.dtype) | {"use_cache": False, "fused_lm_head": True}
    inputs |= _without_router(unwrapped) | kwargs
    if not is_shared(batch):
        return model(**inputs)

    # Off Triton, the head projects every position on the vocabulary, and most of a shared row is prompt
    targets = batch["targets"].flatten()
    scored = (targets != IGNORE_INDEX).nonzero().squeeze(1)
    inputs["shift_labels"] = targets[scored][None]
    with _only_positions(_backbone(unwrapped), scored, targets.numel()):
        outputs = model(**inputs)
    for name in PER_TOKEN_OUTPUTS:
        values = getattr(outputs, name)
        if values is not None:
            spread = values.new_zeros(targets.shape).index_copy(0, scored, values[0])
            setattr(outputs, name, spread.view(batch["targets"].shape))
    return outputs


def logits_at(model: Any, positions: torch.Tensor, **inputs) -> torch.Tensor:
    """
    Logits at some positions of a batch; at the others, the LM head is not run.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model.
        positions (`torch.Tensor`):
            Places in the flattened `input_ids`, int64 of shape (M,).
        **inputs:
            Passed to the model, `input_ids` among them.

    Returns:
        `torch.Tensor` of shape (M, V).
    """
    with _only_positions(_backbone(model), positions, inputs["input_ids"].numel()):
        return model(**inputs, **_without_router(model)).logits[0]


def _without_router(unwrapped: Any) -> dict[str, Any]:
    """A configuration of a mixture of experts that asks for router logits asks for a loss, too."""
    has_router = hasattr(unwrapped.config.get_text_config(), "output_router_logits")
    return {"output_router_logits": False} if has_router else {}


def _backbone(unwrapped: Any) -> torch.nn.Module:
    """The module that the LM head calls for hidden states."""
    return (unwrapped.get_base_model() if is_peft_model(unwrapped) else unwrapped).base_model


@contextmanager
def _only_positions(backbone: torch.nn.Module, positions: torch.Tensor, count: int) -> Iterator[None]:
    """Have `backbone` return, as one row, the hidden states at `positions` of the `count` that the rows given have."""

    def select(module: torch.nn.Module, args: Any, output: Any) -> Any:
        hidden = output.last_hidden_state
        # Virtual tokens of a prompt-learning adapter stand in front of a row
        hidden = hidden[:, hidden.size(1) - count // hidden.size(0) :].flatten(0, 1)
        output.last_hidden_state = hidden.index_select(0, positions.to(hidden.device))[None]
        return output

    handle = backbone.register_forward_hook(select)
    try:
        yield
    finally:
        handle.remove()
