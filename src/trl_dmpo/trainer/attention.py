"""Which token of a shared batch may see which: masks over a tree of tokens, in the form that each kind of attention takes."""

from typing import Any

import torch

from .layout import IGNORE_INDEX, is_shared


def attention_kinds(config: Any) -> set[str]:
    """The kinds of attention layers of a model, in the words of `config.layer_types`."""
    config = config.get_text_config()
    if getattr(config, "layer_types", None):
        return set(config.layer_types)
    return {"sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"}


def tree_attention_mask(batch: dict[str, torch.Tensor], config: Any, dtype: torch.dtype, past: int = 0) -> Any:
    """
    The attention mask of a shared batch, in the form that the model's attention implementation takes.

    A position q sees k if `k <= q < subtree_end[k]`, that is, if k lies on the path from q to the root. In a layer with
    a sliding window it must also be less than `sliding_window` tokens back, counted along the path.

    Args:
        batch (`dict[str, torch.Tensor]`):
            What [`shared_layout`] returned; of it, `subtree_end` and `position_ids`.
        config ([`~transformers.PreTrainedConfig`]):
            Configuration of the model: its attention implementation, its kinds of attention and its window.
        dtype (`torch.dtype`):
            Type of the mask that eager attention adds to the scores.
        past (`int`, *optional*, defaults to `0`):
            Number of columns at the start that are in a cache of keys and values, and not computed.

    Returns:
        `torch.Tensor` of shape (R, 1, T - past, T), bool for `"sdpa"` and `dtype` for `"eager"`, or a `BlockMask` for
        `"flex_attention"`; for a model with several kinds of attention, a dict from kind to mask.
    """
    config = config.get_text_config()
    kinds = attention_kinds(config)
    width = batch["subtree_end"].size(1)

    def mask(kind: str) -> Any:
        window = config.sliding_window if kind == "sliding_attention" else None
        if window is not None and window >= width:
            window = None
        return _mask(batch, config._attn_implementation, dtype, window, past)

    masks = {kind: mask(kind) for kind in sorted(kinds)}
    return masks if len(masks) > 1 else masks.popitem()[1]


def _mask(
    batch: dict[str, torch.Tensor], implementation: str, dtype: torch.dtype, window: int | None, past: int
) -> Any:
    end, position = batch["subtree_end"], batch["position_ids"]
    rows, width = end.shape
    if implementation == "flex_attention":
        from torch.nn.attention.flex_attention import create_block_mask

        def visible(b, h, q, k):
            q = q + past
            seen = (k <= q) & (q < end[b, k])
            return seen if window is None else seen & (position[b, q] - position[b, k] < window)

        return create_block_mask(visible, rows, None, width - past, width, device=end.device)
    index = torch.arange(width, device=end.device)
    query = index[past:, None]
    seen = (index <= query) & (query < end[:, None, :])
    if window is not None:
        seen &= position[:, past:, None] - position[:, None, :] < window
    seen = seen[:, None]
    if implementation == "sdpa":
        return seen
    return torch.zeros(seen.shape, dtype=dtype, device=end.device).masked_fill_(~seen, torch.finfo(dtype).min)


def model_inputs(batch: dict[str, torch.Tensor], config: Any, dtype: torch.dtype) -> dict[str, Any]:
    """
    Keyword arguments with which a model with TRL's fused LM head scores `batch`.

    Args and the meaning of `config` and `dtype` are those of [`tree_attention_mask`]. In the repeated layout the labels
    are not shifted: prompt-learning adapters put virtual tokens in front of them.
    """
    if is_shared(batch):
        return {
            "input_ids": batch["input_ids"],
            "position_ids": batch["position_ids"],
            "attention_mask": tree_attention_mask(batch, config, dtype),
            "shift_labels": batch["targets"],
        }
    return {
        "input_ids": batch["input_ids"],
        "attention_mask": batch["attention_mask"],
        "labels": torch.nn.functional.pad(batch["targets"], (1, 0), value=IGNORE_INDEX),
    }
