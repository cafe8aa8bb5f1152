"""Token sequences behind one prompt as a tree: what they have in common from their start is there once."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class TokenTree(NamedTuple):
    """
    A tree of the tokens that the model reads, in depth-first order, and what it is to predict at each.

    The root is the last token of the prompt, whatever that is. The last token of a sequence is predicted, but not read
    unless another sequence goes on from it.

    Args:
        ids (`np.ndarray` of shape (T,)):
            The tokens. The first one, the root, stands for the last token of a prompt.
        depths (`np.ndarray` of shape (T,)):
            Number of tokens between each and the root.
        ends (`np.ndarray` of shape (T,)):
            Where the subtree of each ends: its descendants are those behind it and before this place.
        parents (`np.ndarray` of shape (E,)):
            For each token that is predicted, the place in `ids` that predicts it.
        targets (`np.ndarray` of shape (E,)):
            The tokens that are predicted, each once.
        sequences (`np.ndarray` of shape (S,)):
            Which of the sequences given this tree has.
        steps (`np.ndarray` of shape (S, L)):
            For each of them, the places in `targets` of its tokens; -1 past its end.
    """

    ids: np.ndarray
    depths: np.ndarray
    ends: np.ndarray
    parents: np.ndarray
    targets: np.ndarray
    sequences: np.ndarray
    steps: np.ndarray


def token_trees(sequences: Sequence[Sequence[int]], max_tokens: int) -> list[TokenTree]:
    """
    The trees of some sequences, of about equal size: sequences that begin alike stand in the same tree.

    Args:
        sequences (`Sequence[Sequence[int]]`):
            Token ids, none empty.
        max_tokens (`int`):
            Tokens of a tree. It may have some more, up to the length of a sequence: what two trees have in common is in
            both.

    Returns:
        `list[TokenTree]`

    Example:

    ```python
    >>> from trl_dmpo.ranking.token_tree import token_trees

    >>> (tree,) = token_trees([[5, 6, 7], [5, 8]], max_tokens=64)
    >>> tree.ids, tree.depths, tree.ends
    (array([-1,  5,  6]), array([0, 1, 2]), array([3, 3, 3]))
    >>> tree.targets, tree.parents
    (array([5, 6, 7, 8]), array([0, 1, 2, 1]))
    >>> tree.steps
    array([[ 0,  1,  2],
           [ 0,  3, -1]])
    ```
    """
    lengths = np.array([len(sequence) for sequence in sequences])
    tokens = np.full((len(sequences), lengths.max()), -1, dtype=np.int64)
    tokens[np.arange(tokens.shape[1]) < lengths[:, None]] = np.concatenate([np.asarray(each) for each in sequences])
    order = np.lexsort(tokens.T[::-1])
    tokens, lengths = tokens[order], lengths[order]
    new = np.maximum(lengths - _common_with_previous(tokens) - 1, 0)
    count = -(-(1 + new.sum()) // max_tokens)
    shares = new.cumsum() * count // (1 + new.sum())
    cuts = np.flatnonzero(np.diff(shares)) + 1
    return [
        _tree(tokens[part], lengths[part], order[part]) for part in np.split(np.arange(len(order)), cuts) if len(part)
    ]


def _common_with_previous(tokens: np.ndarray) -> np.ndarray:
    """How many tokens at its start each row has in common with the row above."""
    equal = (tokens[1:] == tokens[:-1]) & (tokens[1:] >= 0)
    return np.concatenate([[0], np.logical_and.accumulate(equal, axis=1).sum(axis=1)])


def _tree(tokens: np.ndarray, lengths: np.ndarray, order: np.ndarray) -> TokenTree:
    """The tree of sorted sequences. A node is where a sequence parts from the one above, and every token after that."""
    tokens = tokens[:, : lengths.max()]
    columns = np.arange(tokens.shape[1])
    common = _common_with_previous(tokens)
    is_new = (columns >= common[:, None]) & (columns < lengths[:, None])
    # The nodes in depth-first order, and for each token of a sequence its node: the last new one in its column
    node = np.where(is_new, is_new.cumsum().reshape(is_new.shape) - 1, -1)
    node = np.maximum.accumulate(node, axis=0)
    steps = np.where(columns < lengths[:, None], node, -1)
    row, depth = np.nonzero(is_new)
    parent = np.where(depth > 0, node[row, depth - 1], -1)

    is_read = np.zeros(len(row), dtype=bool)
    is_read[parent[parent >= 0]] = True
    places = np.concatenate([[1], 1 + is_read.cumsum()])  # how many are read before each node, with the root
    first = np.concatenate([[0], is_new.sum(axis=1).cumsum()])  # the first node of each row
    ends = np.empty(len(row), dtype=np.int64)
    for column in columns:
        starts = np.append(np.flatnonzero(common <= column), len(tokens))
        here = depth == column
        ends[here] = first[starts[np.searchsorted(starts, row[here], side="right")]]
    return TokenTree(
        ids=np.concatenate([[-1], tokens[row, depth][is_read]]),
        depths=np.concatenate([[0], depth[is_read] + 1]),
        ends=np.concatenate([[places[-1]], places[ends[is_read]]]),
        parents=np.where(parent >= 0, places[parent], 0),
        targets=tokens[row, depth],
        sequences=order,
        steps=steps,
    )
