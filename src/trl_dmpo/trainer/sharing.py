"""
Whether the completions of a prompt may share it: a rule on the kind of model, then a measurement.

The rule speaks for what a measurement could miss: a window longer than the first batch, a convolution whose reach into
the wrong branch changes little in an untrained model. The measurement speaks for everything else.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from accelerate.utils import is_peft_model

from .attention import attention_kinds
from .layout import Candidate, unpack


SHARING_ATTENTION_IMPLEMENTATIONS = ("sdpa", "eager", "flex_attention")

# Without `layer_types` in their configuration, and with the same sliding window in every layer
_SLIDING_WINDOW_MODELS = ("mistral", "mixtral", "phi3", "starcoder2")

# Of the log-probability of a token, on average. Kernels add up in another order when shapes or masks change.
_NOISE_FLOOR = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
# Times what kernels and masks differ by where nothing is shared, and times what a rounding error of the embeddings changes
_KERNEL_FACTOR, _ROUNDING_FACTOR = 5.0, 3.0

# What a forward raises that cannot work with a mask or positions of ours
REFUSALS = (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError)


def compute_dtype(model: Any, mixed_precision: str) -> torch.dtype:
    """The type that a model computes in, under `mixed_precision` of an [`~accelerate.Accelerator`]."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision, model.dtype)


def sharing_obstacle(model: Any) -> str | None:
    """
    Why prompts cannot be shared exactly by `model`, by its kind.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            A causal language model.

    Returns:
        `str` or `None`: the reason, as the end of a sentence; `None` if nothing is known to stand against it.
    """
    if is_peft_model(model):
        if model.active_peft_config.is_prompt_learning:
            return "prompt-learning adapters put virtual tokens in front of the prompt"
        model = model.get_base_model()
    config = model.config.get_text_config()
    implementation = config._attn_implementation
    if implementation not in SHARING_ATTENTION_IMPLEMENTATIONS:
        return f"attn_implementation={implementation!r} takes no mask over a tree of tokens"
    if getattr(model, "_is_stateful", False):
        return f"{config.model_type} carries a state from token to token"
    if any(isinstance(module, torch.nn.Conv1d) for module in model.modules()):
        return f"{config.model_type} has convolutions over the row of tokens"
    if getattr(config, "alibi", False) or config.model_type in ("bloom", "mpt"):
        return f"{config.model_type} derives positions from the place in the row (ALiBi)"
    if "local" in getattr(config, "attention_layers", ()):
        return f"{config.model_type} has local attention over the row of tokens"
    if unknown := attention_kinds(config) - {"full_attention", "sliding_attention"}:
        return f"{config.model_type} has layers of the kind {', '.join(sorted(unknown))}"
    if (
        getattr(config, "sliding_window", None)
        and not getattr(config, "layer_types", None)
        and config.model_type not in _SLIDING_WINDOW_MODELS
    ):
        return f"it is not known how {config.model_type} applies its sliding window"
    if not {"position_ids", "attention_mask"} <= inspect.signature(type(model).forward).parameters.keys():
        return f"{config.model_type} takes no position ids"
    return None


class Measurement(NamedTuple):
    """
    What the two layouts differ by.

    Args:
        difference (`float`):
            Mean absolute difference of a token's log-probability between the layouts, in nats.
        tolerance (`float`):
            What is taken for noise, the largest of: 5 times the same difference where nothing is shared, every completion
            laid out as a tree of its own; 3 times that where only the embeddings are off by a rounding error; and the
            noise of the dtype.
        error (`str`, *optional*):
            Why the shared layout could not run at all.
    """

    difference: float
    tolerance: float
    error: str | None = None

    @property
    def exact(self) -> bool:
        """Whether the difference is noise."""
        return self.difference <= self.tolerance  # not so for NaN

    def describe(self) -> str:
        """The measurement, as the end of a sentence."""
        if self.error is not None:
            return f"the model could not run on it: {self.error}"
        return (
            f"log-probabilities of tokens differ by {self.difference:.1e} on average from those with a prompt of their "
            f"own, where {self.tolerance:.1e} would be noise"
        )


def measure_sharing(
    batch: dict[str, torch.Tensor],
    score: Callable[[dict[str, Any]], torch.Tensor],
    lay_out: Callable[[list[list[Candidate | None]], bool], dict[str, Any]],
    dtype: torch.dtype,
    model: Any,
) -> Measurement:
    """
    Score the first completions of a shared batch in both layouts.

    Args:
        batch (`dict[str, torch.Tensor]`):
            A batch in the shared layout.
        score (`Callable`):
            From a batch to the log-probabilities of its tokens, of shape (B, C, L).
        lay_out (`Callable`):
            From candidates, and whether they share, to a batch.
        dtype (`torch.dtype`):
            Type that the model computes in.
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model that `score` runs, without a wrapper.

    Returns:
        [`Measurement`].
    """
    # Enough to see a difference, and soon done
    places = [row.nonzero().flatten()[:4].tolist() for row in batch["completion_lengths"][:2]]
    rows = unpack(batch, places)
    alone = [[candidate] for row in rows for candidate in row]
    repeated_batch = lay_out(alone, False)
    repeated = score(repeated_batch)
    tokens = repeated_batch["completion_positions"] >= 0
    try:
        with rounding_error(model, dtype):
            perturbed = score(repeated_batch)
        shared = score(batch)
        unshared = score(lay_out(alone, True))
    except REFUSALS as error:
        return refused(error)
    together = torch.stack([shared[b, c, : tokens.size(2)] for b, row in enumerate(places) for c in row])
    return compare_layouts(together[tokens[:, 0]], unshared[tokens], perturbed[tokens], repeated[tokens], dtype)


@contextmanager
def rounding_error(model: Any, dtype: torch.dtype) -> Iterator[None]:
    """
    Have the embeddings of a model be off by one rounding error, up and down in turns.

    What comes of it at the other end is the noise of the model, also where kernels happen to round the same in every layout.
    A model that has been compiled goes on as it is.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model.
        dtype (`torch.dtype`):
            Type of which the rounding error is.
    """

    def perturb(module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        signs = torch.arange(output.size(-1), device=output.device) % 2 * 2 - 1
        return output * (1 + torch.finfo(dtype).eps * signs.to(output.dtype))

    handle = model.get_input_embeddings().register_forward_hook(perturb)
    try:
        yield
    finally:
        handle.remove()


def compare_layouts(
    shared: torch.Tensor,
    unshared: torch.Tensor,
    perturbed: torch.Tensor,
    repeated: torch.Tensor,
    dtype: torch.dtype,
) -> Measurement:
    """
    Compare log-probabilities of the same tokens, each argument of shape (tokens,).

    Args:
        shared (`torch.Tensor`):
            From prompts that several completions share.
        unshared (`torch.Tensor`):
            From the same kernels with one completion a prompt: what they differ by from `repeated` is noise.
        perturbed (`torch.Tensor`):
            From a plain forward with a [`rounding_error`], which is noise as well.
        repeated (`torch.Tensor`):
            From a plain forward of every completion.
        dtype (`torch.dtype`):
            Type that the model computes in.

    Returns:
        [`Measurement`].
    """
    difference = (shared - repeated).abs().mean().item()
    of_kernels = _KERNEL_FACTOR * (unshared - repeated).abs().mean().item()
    of_rounding = _ROUNDING_FACTOR * (perturbed - repeated).abs().mean().item()
    return Measurement(difference, max(_NOISE_FLOOR.get(dtype, 1e-2), of_kernels, of_rounding))


def refused(error: Exception) -> Measurement:
    """
    The measurement of a model that could not run on a shared layout.

    Raises:
        `error` itself, where it says nothing about the layout.
    """
    if isinstance(error, torch.OutOfMemoryError) or "CUDA error" in str(error):
        raise error
    return Measurement(float("inf"), 0.0, f"{type(error).__name__}: {error}")
