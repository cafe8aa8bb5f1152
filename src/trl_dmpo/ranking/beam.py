"""Constrained beam search: completions of a given list that are likely behind a prompt, without scoring all of them."""

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from .generation import check_lengths, in_batches, pad_left, plain_generation
from .token_budget import TokenBudget
from .tokens import Encoded


class PrefixTree:
    """
    Which token may follow which, so that one of some sequences comes out.

    Args:
        sequences (`Sequence[list[int]]`):
            Token ids, none empty.

    Raises:
        `ValueError`: a sequence begins with another, so that a search cannot tell where it ends.

    Example:

    ```python
    >>> from trl_dmpo.ranking.beam import PrefixTree

    >>> tree = PrefixTree([[5, 6, 7], [5, 8], [9, 8]])
    >>> tree.allowed([5]), tree.allowed([5], tree.spent([0])), tree.allowed([], tree.spent([0, 1]))
    ([6, 8], [8], [9])
    >>> tree.find([5, 8, 1, 1]), tree.find([5, 7])
    (1, None)
    ```
    """

    def __init__(self, sequences: Sequence[list[int]]):
        self.sequences = sequences
        self.depth = max(map(len, sequences))
        self._children: list[dict[int, int]] = [{}]
        self._ends: dict[int, int] = {}
        self._sizes = [0]
        for number, sequence in enumerate(sequences):
            self._add(number, sequence)
        inner = next((node for node in self._ends if self._children[node]), None)
        if inner is not None or len(self._ends) < len(sequences):
            raise ValueError(
                "one answer begins with the tokens of another, since nothing ends it: a search cannot tell them apart. Use "
                "`method='exact'`."
            )

    def _add(self, number: int, sequence: list[int]) -> None:
        node = 0
        self._sizes[0] += 1
        for token in sequence:
            if token not in self._children[node]:
                self._children[node][token] = len(self._children)
                self._children.append({})
                self._sizes.append(0)
            node = self._children[node][token]
            self._sizes[node] += 1
        self._ends[node] = number

    def _path(self, tokens: Iterable[int]) -> list[int]:
        """The nodes that `tokens` lead through, up to the end of a sequence or where they leave the tree."""
        path = [0]
        for token in tokens:
            following = self._children[path[-1]].get(token)
            if following is None:
                break
            path.append(following)
        return path

    def spent(self, excluded: Iterable[int]) -> set[int]:
        """The nodes behind which all sequences are excluded."""
        counts = Counter(node for number in set(excluded) for node in self._path(self.sequences[number]))
        return {node for node, count in counts.items() if count == self._sizes[node]}

    def allowed(self, tokens: list[int], spent: Iterable[int] = ()) -> list[int]:
        """The tokens that may follow `tokens`; empty at the end of a sequence and outside of the tree."""
        path = self._path(tokens)
        if len(path) <= len(tokens):
            return []
        return [token for token, node in self._children[path[-1]].items() if node not in spent]

    def find(self, tokens: list[int]) -> int | None:
        """The number of the sequence that `tokens` begin with."""
        return self._ends.get(self._path(tokens)[-1])

    def is_whole(self, tokens: list[int]) -> bool:
        """Whether `tokens` are a sequence, no more and no less."""
        path = self._path(tokens)
        return len(path) == len(tokens) + 1 and path[-1] in self._ends


class _Whole(StoppingCriteria):
    """
    Ends a beam where its sequence does.

    Not by the last token, as `eos_token_id` would: with some chat templates all messages end with a new line, which may
    stand within them too.
    """

    def __init__(self, trees: Sequence[PrefixTree], width: int):
        self.trees, self.width = trees, width

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs) -> torch.Tensor:
        rows = input_ids[:, self.width :].tolist()
        beams = len(rows) // len(self.trees)
        whole = [self.trees[index // beams].is_whole(row) for index, row in enumerate(rows)]
        return torch.tensor(whole, device=input_ids.device)


def beam_search(
    model: Any,
    encoded: Sequence[Encoded],
    excluded: Sequence[Sequence[int]],
    num_beams: int,
    normalize: str = "sum",
    budget: TokenBudget | None = None,
) -> list[list[int]]:
    """
    Likely completions of each prompt, by the beam search of transformers, held to the tokens of the completions given
    ([De Cao et al., 2021](https://huggingface.co/papers/2010.00904)).

    Nothing of a `generation_config` that the model was shipped with is used. With as many beams as completions, all are
    found.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model.
        encoded (`Sequence[Encoded]`):
            N prompts with their completions, as token ids.
        excluded (`Sequence[Sequence[int]]`):
            For each prompt, the places of the completions that must not come out.
        num_beams (`int`):
            How many beginnings are followed at a time, at least two.
        normalize (`str`, *optional*, defaults to `"sum"`):
            What is likely: by the `"sum"` of log-probabilities, or by their `"mean"` over tokens.
        budget ([`~trl_dmpo.ranking.token_budget.TokenBudget`], *optional*):
            How many tokens there may be at a time. By default what the memory holds.

    Returns:
        `list[list[int]]`: for each prompt, the places of up to `num_beams` completions, the likeliest first.

    Raises:
        `ValueError`: the model cannot generate, a prompt and its completions do not fit into its window, or a completion
        begins with another.
    """
    # Prompts that end alike share one list of completions
    tree_of = lru_cache(maxsize=None)(lambda number: PrefixTree(lists[number]))
    lists = {id(each.completions): each.completions for each in encoded}
    trees = [tree_of(id(each.completions)) for each in encoded]
    prompts = [each.prompt for each in encoded]
    depth = max((tree.depth for tree in trees), default=0)
    check_lengths(model, prompts, depth)
    found: list[list[int]] = [[] for _ in encoded]

    def search(rows: list[int]) -> None:
        some = [prompts[row] for row in rows], [trees[row] for row in rows], [excluded[row] for row in rows]
        for row, result in zip(rows, _search(model, *some, num_beams, normalize), strict=True):
            found[row] = result

    # Where nothing is left, there is nothing to search
    some = [row for row, tree in enumerate(trees) if len(set(excluded[row])) < len(tree.sequences)]
    with plain_generation(model):
        in_batches(model, some, lambda row: num_beams * (len(prompts[row]) + depth), search, budget=budget)
    return found


def _search(
    model: Any,
    prompts: list[list[int]],
    trees: list[PrefixTree],
    excluded: list[Sequence[int]],
    num_beams: int,
    normalize: str,
) -> list[list[int]]:
    batch = pad_left(prompts, model.device)
    width = batch["input_ids"].shape[1]
    spent = [tree.spent(numbers) for tree, numbers in zip(trees, excluded, strict=True)]

    def allowed(index: int, ids: torch.Tensor) -> list[int]:
        # A beam that is whole already, or has nowhere to go since there are fewer sequences than beams, has no chance
        # against the others whatever follows, but something must
        return trees[index].allowed(ids[width:].tolist(), spent[index]) or [0]

    config = GenerationConfig(
        do_sample=False,
        num_beams=num_beams,
        num_return_sequences=num_beams,
        max_new_tokens=max(tree.depth for tree in trees),
        # The search goes on until no beam can become better than what was found, by the score that is wanted
        early_stopping="never",
        length_penalty=1.0 if normalize == "mean" else 0.0,
        pad_token_id=0,
    )
    made = model.generate(
        **batch,
        generation_config=config,
        prefix_allowed_tokens_fn=allowed,
        stopping_criteria=StoppingCriteriaList([_Whole(trees, width)]),
    )
    beams = made[:, width:].reshape(len(prompts), num_beams, -1).tolist()
    found = [[tree.find(beam) for beam in row] for tree, row in zip(trees, beams, strict=True)]
    return [
        [number for number in dict.fromkeys(numbers) if number is not None and number not in set(left_out)]
        for numbers, left_out in zip(found, excluded, strict=True)
    ]
