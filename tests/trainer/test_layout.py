"""The two layouts, as tensors."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_dmpo import DataCollatorForMultiPreference
from trl_dmpo.trainer.attention import _mask
from trl_dmpo.trainer.layout import (
    Candidate,
    Segment,
    _flatten,
    common_prefix_length,
    gather_completions,
    radix_tree,
    repeated_layout,
    shared_layout,
    star,
    unpack,
)


tokens = st.lists(st.integers(0, 50), min_size=1, max_size=6)
prompts = st.lists(st.integers(0, 2), min_size=0, max_size=6)  # of few tokens, so that they start alike
batches = st.lists(st.tuples(prompts, st.lists(tokens, min_size=2, max_size=5)), min_size=1, max_size=4)


def candidates(batch) -> list[list[Candidate]]:
    return [[Candidate(prompt, completion) for completion in completions] for prompt, completions in batch]


def trees_of(batch, together: bool) -> list[list[int]] | None:
    """All prompts in one tree but the first, if there are more, or each in its own."""
    return [[0], list(range(1, len(batch)))] if together and len(batch) > 1 else None


def visible(batch) -> torch.Tensor:
    return _mask(batch, "sdpa", torch.float32, None, past=0)[:, 0]


@settings(max_examples=300, deadline=None)
@given(batches, st.sampled_from([None, 8]), st.booleans())
def test_every_token_sees_its_own_sequence_and_nothing_else(batch, multiple, together):
    """For each scored token of the tree: what it sees, in order, is the prompt and the completion up to there."""
    rows = candidates(batch)
    shared = shared_layout(rows, 7, multiple, trees_of(batch, together))
    width = shared["input_ids"].size(1)
    seen = visible(shared)
    for b, row in enumerate(rows):
        for c, (prompt, completion) in enumerate(row):
            for t in range(0 if prompt else 1, len(completion)):
                tree, position = divmod(shared["completion_positions"][b, c, t].item(), width)
                path = seen[tree, position].nonzero().flatten()
                assert shared["input_ids"][tree, path].tolist() == [*prompt, *completion[:t]]
                assert shared["position_ids"][tree, path].tolist() == list(range(len(path)))
                assert shared["targets"][tree, position] == completion[t]
    # no position is without anything to see, padding included
    assert seen.any(-1).all()
    # and no position is scored twice
    positions = shared["completion_positions"]
    assert len(set(positions[positions >= 0].tolist())) == (positions >= 0).sum() == (shared["targets"] != -100).sum()


@settings(max_examples=300, deadline=None)
@given(batches, st.sampled_from([None, 8]), st.booleans())
def test_both_layouts_score_the_same_tokens(batch, multiple, together):
    rows = candidates(batch)
    shared, repeated = shared_layout(rows, 7, multiple, trees_of(batch, together)), repeated_layout(rows, 7, multiple)
    torch.testing.assert_close(shared["completion_lengths"], repeated["completion_lengths"])
    targets = [gather_completions(layout["targets"], layout) for layout in (shared, repeated)]
    torch.testing.assert_close(*targets)
    for b, row in enumerate(rows):
        for c, (prompt, completion) in enumerate(row):
            unscored = 0 if prompt else 1
            assert targets[0][b, c, unscored : len(completion)].tolist() == completion[unscored:]
            assert targets[0][b, c, len(completion) :].sum() == 0
    assert shared["attention_mask"].sum() <= repeated["attention_mask"].sum()


@settings(max_examples=200, deadline=None)
@given(batches, st.booleans())
def test_unpack_gives_back_what_went_in(batch, together):
    rows = candidates(batch)
    unpacked = unpack(shared_layout(rows, pad_token_id=7, trees=trees_of(batch, together)))
    for before, after in zip(rows, unpacked, strict=True):
        for (prompt, completion), (got_prompt, got_completion) in zip(before, after, strict=True):
            if prompt or len(completion) > 1:  # a single token after nothing is not computed at all
                assert (list(got_prompt), list(got_completion)) == (prompt, completion)


@settings(max_examples=100, deadline=None)
@given(batches)
def test_prompts_of_a_tree_share_all_that_they_start_with(batch):
    rows = candidates(batch)
    segments = radix_tree(rows)
    trunks = {tuple(prompt[:-1]) for prompt, _ in batch}
    beginnings = {trunk[:end] for trunk in trunks for end in range(1, len(trunk) + 1)}
    assert sum(len(segment.ids) for segment in segments if segment.targets is None) == len(beginnings)
    # Depth first: a segment comes right after its parent's subtree so far, or `subtree_end` means nothing
    _, _, ends = _flatten(segments)
    for segment, end in zip(segments, ends, strict=True):
        assert segment.parent < 0 or end <= ends[segment.parent]
    for prompt in rows:
        assert radix_tree([prompt]) == star(prompt)


@settings(max_examples=100, deadline=None)
@given(prompts, prompts)
def test_common_prefix_length(first, second):
    length = common_prefix_length(first, second)
    assert first[:length] == second[:length]
    assert first[length : length + 1] != second[length : length + 1] or length == len(first) == len(second)


def test_trees_deeper_than_a_star():
    """A catalogue's titles share beginnings: root -> a -> (b, c), root -> d."""
    segments = [
        Segment([1, 2], -1),
        Segment([3, 4], 0),
        Segment([5], 1, [6], 0),
        Segment([5, 7], 1, [7, 8], 1),
        Segment([3, 9], 0, [9, 10], 2),
    ]
    starts, depths, ends = _flatten(segments)
    assert starts == [0, 2, 4, 5, 7]
    assert depths == [0, 2, 4, 4, 2]
    assert ends == [9, 7, 5, 7, 9]


def test_hand_made_mask():
    batch = shared_layout(
        [[Candidate([1, 2, 3], [4, 5]), Candidate([1, 2, 3], [6])]], pad_token_id=0, pad_to_multiple_of=8
    )
    #            1  2 |3  4 |3 | padding
    expected = [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 0, 0, 1],
    ]
    assert visible(batch)[0].int().tolist() == expected
    windowed = _mask(batch, "sdpa", torch.float32, window=2, past=0)[0, 0].int().tolist()
    assert windowed[3] == [0, 0, 1, 1, 0, 0, 0, 0]  # position 3 sees 2 and 3
    assert windowed[4] == [0, 1, 0, 0, 1, 0, 0, 0]  # position 2, of the other branch, sees 1 and 2
    eager = _mask(batch, "eager", torch.float16, None, past=0)
    assert eager.dtype == torch.float16
    assert torch.equal(eager[0, 0] == 0, visible(batch)[0])
    assert torch.isfinite(eager).all()


def test_flex_attention_gets_the_same_mask():
    batch = shared_layout([[Candidate([1, 2, 3], [4, 5]), Candidate([1, 2, 3], [6])]], pad_token_id=0)
    for window, past in itertools.product((None, 2), (0, 3)):
        block_mask = _mask(batch, "flex_attention", torch.float32, window, past)
        dense = _mask(batch, "sdpa", torch.float32, window, past)
        query, key = torch.arange(dense.size(-2))[:, None], torch.arange(dense.size(-1))
        mod = block_mask.mask_mod(torch.tensor(0), torch.tensor(0), query, key)
        assert torch.equal(mod, dense[0, 0])
        assert torch.equal(dense, _mask(batch, "sdpa", torch.float32, window, past=0)[:, :, past:])


EXAMPLE = {
    "row_index": 3,
    "prompt_ids": [1, 2, 3],
    "chosen_ids": [4, 5],
    "rejected_ids": [[6], [7, 8], [9], [10], [11]],
}


def test_truncation_is_per_completion():
    keep_start = DataCollatorForMultiPreference(0, max_length=4)([EXAMPLE])
    assert keep_start["completion_lengths"].tolist() == [[1] * 6]
    keep_end = DataCollatorForMultiPreference(0, max_length=4, truncation_mode="keep_end", prefix_sharing=False)(
        [EXAMPLE]
    )
    assert keep_end["input_ids"].tolist()[:3] == [[2, 3, 4, 5], [1, 2, 3, 6], [2, 3, 7, 8]]
    shared = DataCollatorForMultiPreference(0, max_length=4, truncation_mode="keep_end")([EXAMPLE])
    assert shared["completion_lengths"].tolist() == keep_end["completion_lengths"].tolist()


def test_a_prompt_that_fills_the_length_is_named():
    with pytest.raises(ValueError, match=r"prompt of 3 tokens leaves nothing .* `max_length=3`"):
        DataCollatorForMultiPreference(0, max_length=3)([EXAMPLE])
    with pytest.raises(ValueError, match="Unsupported truncation mode: middle"):
        DataCollatorForMultiPreference(0, truncation_mode="middle")


def drawn(collator) -> list[int]:
    batch = collator([EXAMPLE])
    return gather_completions(batch["targets"], batch)[0, 1:, 0].tolist()


def test_drawn_negatives_depend_on_seed_epoch_and_row_only():
    collator = DataCollatorForMultiPreference(0, num_negatives=2, seed=1)
    first = drawn(collator)
    assert len(set(first)) == 2
    assert drawn(collator) == first == drawn(DataCollatorForMultiPreference(0, num_negatives=2, seed=1))
    epochs = []
    for epoch in range(20):
        collator.epoch.fill_(epoch)
        epochs.append(tuple(drawn(collator)))
    assert {title for draw in epochs for title in draw} == {6, 7, 9, 10, 11}, "every negative has its turn"
    assert drawn(DataCollatorForMultiPreference(0, num_negatives=9)) == [6, 7, 9, 10, 11], "rows with fewer keep all"


def test_precomputed_references_follow_the_draw():
    example = {**EXAMPLE, "ref_chosen_logps": -1.0, "ref_rejected_logps": [-6.0, -7.0, -9.0, -10.0, -11.0]}
    batch = DataCollatorForMultiPreference(0, num_negatives=2)([example, example])
    firsts = gather_completions(batch["targets"], batch)[:, 1:, 0]
    assert torch.equal(batch["ref_rejected_logps"], -firsts.float())
    assert batch["ref_chosen_logps"].shape == (2,)
