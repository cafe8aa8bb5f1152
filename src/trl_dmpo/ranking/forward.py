"""
Log-probabilities of the tokens of many completions of some prompts, in two ways with one result.

- *shared*: the keys and values of a prompt are computed once and kept; its completions, as trees of tokens, attend to them.
- *repeated*: a plain forward of prompt and completion, for models on which sharing is not exact.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

from ..trainer.attention import tree_attention_mask
from ..trainer.scoring import logits_at
from .token_tree import TokenTree, token_trees
from .tokens import Encoded


# Tokens of a tree. In a larger one, more of the attention is computed in vain, since a branch does not see the others; in
# smaller ones, more of what branches have in common is computed twice
TREE_TOKENS = 256
# Logits are in float32 for so many positions at a time
_SLICE = 128


class _Job(NamedTuple):
    """A tree of completions of a prompt."""

    row: int
    tree: TokenTree


class _PromptLayer(DynamicLayer):
    """Keys and values of prompts in a layer, which completions attend to and never change. `rows` says whose prompt."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, rows: torch.Tensor):
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values, self.rows = keys, values, rows

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        pairs = (self.keys, key_states), (self.values, value_states)
        keys, values = (torch.cat([self._of_rows(kept), new], dim=-2) for kept, new in pairs)
        return keys, values

    def _of_rows(self, kept: torch.Tensor) -> torch.Tensor:
        # Not copied where all completions are of one prompt
        return kept.expand(len(self.rows), -1, -1, -1) if len(kept) == 1 else kept[self.rows]


class _Prompts(NamedTuple):
    """
    Prompts without their last token, which heads each tree.

    Args:
        layers (`list[tuple[torch.Tensor, torch.Tensor]]`):
            Keys and values of each layer, of shape (R, heads, P, D).
        lengths (`np.ndarray` of shape (R,)):
            Tokens of each prompt. What is behind them is padding.
        last (`np.ndarray` of shape (R,)):
            The last token of each, which is not in `layers`.
    """

    layers: list[tuple[torch.Tensor, torch.Tensor]]
    lengths: np.ndarray
    last: np.ndarray


def score_shared(
    model: Any,
    rows: Sequence[Encoded],
    max_tokens: int,
    trees: Callable[[list[list[int]]], list[TokenTree]] | None = None,
) -> list[torch.Tensor]:
    """
    Log-probabilities of tokens, with each prompt computed once, and once what its completions have in common.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model.
        rows (`Sequence[Encoded]`):
            R prompts with their completions.
        max_tokens (`int`):
            Tokens of a forward pass over completions, with those of their prompts that it attends to.
        trees (`Callable`, *optional*):
            From completions to their trees. Prompts may have them in common.

    Returns:
        `list[torch.Tensor]`: for each prompt, the log-probability of each token of each completion, float32 of shape
        (completions, tokens of the longest) on the CPU, 0 past the end of a completion.
    """
    trees = trees or partial(token_trees, max_tokens=min(max_tokens, TREE_TOKENS))
    prompts = _prefill(model, rows)
    found = [torch.zeros(len(row.completions), max(map(len, row.completions))) for row in rows]
    jobs = [_Job(index, tree) for index, row in enumerate(rows) for tree in trees(row.completions)]
    for batch in _batches(jobs, int(prompts.lengths.max()), max_tokens):
        logps = _score_trees(model, prompts, batch)
        start = 0
        for row, tree in batch:
            steps = torch.from_numpy(tree.steps)
            of_tree = logps[start : start + len(tree.targets)]
            start += len(tree.targets)
            found[row][tree.sequences, : steps.size(1)] = of_tree[steps.clamp(min=0)].masked_fill(steps < 0, 0)
    return found


def _batches(jobs: list[_Job], prompt_tokens: int, max_tokens: int) -> Iterator[list[_Job]]:
    batch: list[_Job] = []
    widest = 0
    for job in jobs:
        widest = max(widest, len(job.tree.ids))
        if batch and (len(batch) + 1) * (prompt_tokens + widest) > max_tokens:
            yield batch
            batch, widest = [], len(job.tree.ids)
        batch.append(job)
    yield batch


def _prefill(model: Any, rows: Sequence[Encoded]) -> _Prompts:
    lengths = np.array([len(row.prompt) - 1 for row in rows])
    last = np.array([row.prompt[-1] for row in rows])
    if lengths.max() == 0:
        return _Prompts([], lengths, last)
    columns = np.arange(lengths.max())
    ids = np.zeros((len(rows), len(columns)), dtype=np.int64)
    ids[columns < lengths[:, None]] = np.concatenate([row.prompt[:-1] for row in rows]).astype(np.int64)
    # A row without any token to attend to would come out as NaN, and NaN comes through any mask
    mask = columns < np.maximum(lengths, 1)[:, None]
    # Without the configuration, which would have the layers with a sliding window forget
    cache = DynamicCache()
    logits_at(
        model,
        torch.zeros(0, dtype=torch.int64),
        input_ids=_to(model, ids),
        attention_mask=_to(model, mask.astype(np.int64)),
        past_key_values=cache,
        use_cache=True,
    )
    return _Prompts([(layer.keys, layer.values) for layer in cache.layers], lengths, last)


def _to(model: Any, array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).to(model.device)


def _score_trees(model: Any, prompts: _Prompts, jobs: list[_Job]) -> torch.Tensor:
    """Log-probabilities of the targets of all trees, one after the other."""
    rows = np.array([job.row for job in jobs])
    past, width = int(prompts.lengths.max()), max(len(job.tree.ids) for job in jobs)
    lengths = prompts.lengths[rows, None]
    ids, positions, ends = (
        np.zeros((len(jobs), size), dtype=np.int64) for size in (width, past + width, past + width)
    )
    # A prompt is seen to the end, its padding never, and padding behind a tree sees and is seen by itself alone
    columns = np.arange(past + width)
    ends[:] = np.where(columns < lengths, past + width, np.where(columns < past, 0, columns + 1))
    positions[:, :past] = columns[:past]
    for index, (_, tree) in enumerate(jobs):
        size = len(tree.ids)
        ids[index, :size] = tree.ids
        positions[index, past : past + size] = tree.depths
        ends[index, past : past + size] = past + tree.ends
    ids[:, 0] = prompts.last[rows]
    positions[:, past:] += lengths

    layout = {"subtree_end": _to(model, ends), "position_ids": _to(model, positions)}
    whose = _to(model, rows)
    cache = Cache(layers=[_PromptLayer(*layer, whose) for layer in prompts.layers]) if prompts.layers else None
    inputs = {
        "input_ids": _to(model, ids),
        "position_ids": layout["position_ids"][:, past:],
        "attention_mask": tree_attention_mask(layout, model.config, model.dtype, past),
        "past_key_values": cache,
        "use_cache": cache is not None,
    }
    read = np.concatenate([index * width + np.arange(len(tree.ids)) for index, (_, tree) in enumerate(jobs)])
    starts = np.concatenate([[0], np.cumsum([len(tree.ids) for _, tree in jobs])])
    parents = np.concatenate([start + tree.parents for start, (_, tree) in zip(starts, jobs, strict=False)])
    targets = np.concatenate([tree.targets for _, tree in jobs])
    logits = logits_at(model, _to(model, read), **inputs)
    return log_probabilities(logits, torch.from_numpy(parents), torch.from_numpy(targets))


def log_probabilities(logits: torch.Tensor, positions: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """
    Log-probabilities of tokens, several of which may be predicted at one position.

    Args:
        logits (`torch.Tensor`):
            Logits of shape (M, V).
        positions (`torch.Tensor`):
            Where each token is predicted, a row of `logits`, int64 of shape (E,).
        targets (`torch.Tensor`):
            The tokens, int64 of shape (E,).

    Returns:
        `torch.Tensor` of shape (E,), float32 on the CPU.
    """
    normalizers = torch.cat([part.float().logsumexp(-1) for part in logits.split(_SLICE)])
    positions, targets = positions.to(logits.device), targets.to(logits.device)
    return (logits[positions, targets].float() - normalizers[positions]).cpu()


def score_repeated(model: Any, rows: Sequence[Encoded], max_tokens: int) -> list[torch.Tensor]:
    """
    Log-probabilities of tokens, from a plain forward of every completion after its prompt.

    Takes and returns what [`score_shared`] does.
    """
    found = [torch.zeros(len(row.completions), max(map(len, row.completions))) for row in rows]
    places = [(row, index) for row, each in enumerate(rows) for index in range(len(each.completions))]
    places.sort(key=lambda place: len(rows[place[0]].prompt) + len(rows[place[0]].completions[place[1]]))
    while places:
        # The last is the longest
        row, index = places[-1]
        longest = len(rows[row].prompt) + len(rows[row].completions[index])
        count = max(max_tokens // longest, 1)
        batch, places = places[-count:], places[:-count]
        pairs = [(rows[row].prompt, rows[row].completions[index]) for row, index in batch]
        parts = _score_pairs(model, pairs).split([len(completion) for _, completion in pairs])
        for (row, index), logps in zip(batch, parts, strict=True):
            found[row][index, : len(logps)] = logps
    return found


def _score_pairs(model: Any, pairs: list[tuple[list[int], list[int]]]) -> torch.Tensor:
    """Log-probabilities of the tokens of all completions, one after the other."""
    lengths = np.array([len(prompt) + len(completion) for prompt, completion in pairs])
    width = lengths.max()
    ids = np.zeros((len(pairs), width), dtype=np.int64)
    mask = np.arange(width) < lengths[:, None]
    ids[mask] = np.concatenate([[*prompt, *completion] for prompt, completion in pairs])
    read = np.concatenate(
        [
            row * width + np.arange(len(prompt) - 1, len(prompt) + len(completion) - 1)
            for row, (prompt, completion) in enumerate(pairs)
        ]
    )
    logits = logits_at(
        model,
        _to(model, read),
        input_ids=_to(model, ids),
        attention_mask=_to(model, mask.astype(np.int64)),
        use_cache=False,
    )
    targets = torch.tensor([token for _, completion in pairs for token in completion])
    return log_probabilities(logits, torch.arange(len(targets)), targets)
