"""Which token of a shared batch may see which: masks over a tree of tokens, in the form that each kind of attention takes."""

from typing import Any

import torch

from .layout import IGNORE_INDEX, is_shared


# Positions of a side of a block, of those that flex attention computes or skips as a whole
BLOCK = 128


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


def check_backward(config: Any, device: torch.device) -> None:
    """
    Check that a model can be trained on a device, before the first step fails deep inside of it.

    Args:
        config ([`~transformers.PreTrainedConfig`]):
            Configuration of the model.
        device (`torch.device`):
            Where it is trained.

    Raises:
        `ValueError`: it has flex attention, which on the CPU can only score.
    """
    if device.type == "cpu" and config.get_text_config()._attn_implementation == "flex_attention":
        raise ValueError(
            "`attn_implementation='flex_attention'` has no backward pass on the CPU. Load the model with "
            "`attn_implementation='sdpa'`, or train on a GPU."
        )


def _mask(
    batch: dict[str, torch.Tensor], implementation: str, dtype: torch.dtype, window: int | None, past: int
) -> Any:
    end, position = batch["subtree_end"], batch["position_ids"]
    if implementation == "flex_attention":
        return _block_mask(end, position, window, past)
    index = torch.arange(end.size(1), device=end.device)
    query = index[past:, None]
    seen = (index <= query) & (query < end[:, None, :])
    if window is not None:
        seen &= position[:, past:, None] - position[:, None, :] < window
    seen = seen[:, None]
    if implementation == "sdpa":
        return seen
    return torch.zeros(seen.shape, dtype=dtype, device=end.device).masked_fill_(~seen, torch.finfo(dtype).min)


def _block_mask(end: torch.Tensor, position: torch.Tensor, window: int | None, past: int) -> Any:
    """
    The `BlockMask` of the tree: which blocks of keys a block of queries needs, from what the blocks have as extremes.

    The kernel skips the blocks that are not needed, and asks `mask_mod` for single positions in those that are not full.
    Unlike `create_block_mask`, this never looks at all pairs of positions.
    """
    from torch.nn.attention.flex_attention import BlockMask

    width = end.size(1)
    reach = width if window is None else window
    query_position = position[:, past:]
    keys = torch.arange(0, width, BLOCK, device=end.device)
    queries = torch.arange(past, width, BLOCK, device=end.device)[:, None]
    end_max, end_min = (each[:, None] for each in _block_extremes(end))
    key_max, key_min = (each[:, None] for each in _block_extremes(position))
    query_max, query_min = (each[:, :, None] for each in _block_extremes(query_position))
    needed = (keys < queries + BLOCK) & (end_max > queries) & (query_min - key_max < reach)
    # Seen by every query to the last of a whole block: never so where a block reaches over the end of the row
    full = (keys + BLOCK <= queries + 1) & (end_min >= queries + BLOCK) & (query_max - key_min < reach)
    # Tensors, since for another number compiled code is made anew; and one function for both kinds of layers
    past_tensor, reach_tensor = torch.tensor([past, reach], device=end.device)

    def visible(b, h, q, k):
        place = q + past_tensor
        return (k <= place) & (place < end[b, k]) & (query_position[b, q] - position[b, k] < reach_tensor)

    return BlockMask.from_kv_blocks(
        *_block_lists(needed & ~full),
        *_block_lists(full),
        BLOCK_SIZE=BLOCK,
        mask_mod=visible,
        seq_lengths=(width - past, width),
    )


def _block_extremes(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Maximum and minimum of each block of the rows of `values`, (R, T) -> 2 x (R, blocks)."""
    # The last value once more where a row ends within a block: it changes neither
    missing = -values.size(1) % BLOCK
    filled = torch.cat([values, values[:, -1:].expand(-1, missing)], dim=1)
    blocks = filled.unflatten(1, (-1, BLOCK))
    return blocks.amax(2), blocks.amin(2)


def _block_lists(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a table of blocks, (R, queries, keys): how many each block of queries has, and their indices, these first."""
    blocks = blocks[:, None].int()
    return blocks.sum(-1, dtype=torch.int32), blocks.argsort(dim=-1, descending=True, stable=True).int()


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
