import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from trl_dmpo.ranking.token_tree import token_trees


def path(tree, place: int) -> list[int]:
    """The tokens that the model reads on the way from the root to a place, by what is visible from there."""
    return [int(tree.ids[k]) for k in range(len(tree.ids)) if k <= place < tree.ends[k]]


# Few tokens, so that sequences often begin alike, are equal, or begin with another
@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), min_size=1, max_size=12), st.sampled_from([1, 5, 99])
)
def test_every_token_is_predicted_from_the_tokens_before_it(sequences, max_tokens):
    trees = token_trees(sequences, max_tokens)
    for tree in trees:
        for number, steps in zip(tree.sequences, tree.steps, strict=True):
            steps = steps[steps >= 0]
            assert tree.targets[steps].tolist() == sequences[number]
            for depth, step in enumerate(steps):
                parent = tree.parents[step]
                assert path(tree, parent) == [-1, *sequences[number][:depth]]
                assert tree.depths[parent] == depth
    assert sorted(np.concatenate([tree.sequences for tree in trees])) == list(range(len(sequences)))
    if len(trees) == 1:
        beginnings = {tuple(sequence[:length]) for sequence in sequences for length in range(1, len(sequence) + 1)}
        assert len(trees[0].targets) == len(beginnings)
        assert len(trees[0].ids) == 1 + len({beginning[:-1] for beginning in beginnings} - {()})


def test_trees_are_of_about_equal_size():
    generator = np.random.default_rng(0)
    sequences = [generator.integers(0, 50, generator.integers(3, 12)).tolist() for _ in range(2000)]
    sizes = [len(tree.ids) for tree in token_trees(sequences, 256)]
    assert len(sizes) > 10
    assert max(sizes) <= 256 + 12
    assert min(sizes) > 0.8 * max(sizes)
