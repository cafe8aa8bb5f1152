"""Masks for flex attention: which blocks are computed, that none is missing, and that new lengths compile nothing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import AutoModelForCausalLM

from tests.conftest import make_rows
from trl_dmpo import Scorer
from trl_dmpo.trainer.attention import BLOCK, _mask, check_backward, tree_attention_mask
from trl_dmpo.trainer.layout import Candidate, shared_layout


lengths = st.sampled_from([1, 2, 60, BLOCK - 1, BLOCK, BLOCK + 1, 200])
rows = st.lists(st.tuples(lengths, st.lists(lengths, min_size=1, max_size=4)), min_size=1, max_size=2)
masks = st.tuples(rows, st.sampled_from([None, 1, 50, 2 * BLOCK]), st.sampled_from([0, 1, BLOCK, 200]))


def lay_out(rows) -> dict[str, torch.Tensor]:
    return shared_layout([[Candidate([1] * prompt, [2] * each) for each in answers] for prompt, answers in rows], 0)


def block_table(count: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Lists of blocks as a table of bools, (R, queries, keys)."""
    listed = torch.arange(indices.size(-1)) < count[..., None]
    return torch.zeros(indices.shape, dtype=torch.bool).scatter(-1, indices.long(), listed)[:, 0]


def block_tables(mask) -> tuple[torch.Tensor, torch.Tensor]:
    """Which blocks are computed, and which of them without a look at single positions."""
    full = block_table(mask.full_kv_num_blocks, mask.full_kv_indices)
    return block_table(mask.kv_num_blocks, mask.kv_indices) | full, full


@settings(max_examples=25, deadline=None)
@given(masks)
def test_blocks_of_flex_attention(drawn):
    """Against all pairs of positions of the mask for SDPA: no block is missing, and full blocks are full."""
    described, window, past = drawn
    batch = lay_out(described)
    past = min(past, batch["input_ids"].size(1) - 1)
    dense = _mask(batch, "sdpa", torch.float32, window, past)
    found = _mask(batch, "flex_attention", torch.float32, window, past)
    count, _, queries, keys = dense.shape
    assert found.shape == (count, 1, queries, keys)
    zero, query, key = torch.tensor(0), torch.arange(queries)[:, None], torch.arange(keys)
    for row in range(count):
        assert torch.equal(found.mask_mod(torch.tensor(row), zero, query, key), dense[row, 0])

    def inside(b, h, q, k):
        return dense[b, 0, q.clamp(max=queries - 1), k.clamp(max=keys - 1)] & (q < queries) & (k < keys)

    (needed, full), (all_needed, all_full) = map(
        block_tables, (found, create_block_mask(inside, count, None, queries, keys, device="cpu"))
    )
    assert not (all_needed & ~needed).any()
    assert not (full & ~all_full).any()
    if window is None:
        assert torch.equal(full, all_full)
    if window is None and past % BLOCK == 0:
        assert torch.equal(needed, all_needed)


def test_blocks_that_no_position_may_see_are_skipped():
    """A branch sees the trunk and itself: with many branches, most blocks below the diagonal are not computed."""
    batch = lay_out([(4 * BLOCK + 1, [2 * BLOCK] * 16)])
    needed, full = block_tables(_mask(batch, "flex_attention", torch.float32, None, past=0))
    trunk = needed[0, 4:, :4]
    assert trunk.all()
    assert full[0, 4:, :4].all()
    # A branch of two blocks computes three of them
    assert needed[0, 4:, 4:].sum() == 3 * 16
    windowed, _ = block_tables(_mask(batch, "flex_attention", torch.float32, window=BLOCK, past=0))
    assert not windowed[0, 4:, :2].any()


class Counting:
    """In the place of the compiled flex attention of transformers: counts compilations, and needs no C++ compiler."""

    compilations = 0

    def __init__(self, training: bool):
        pass

    def __call__(self):
        return torch.compile(flex_attention, backend=self.compile)

    @classmethod
    def compile(cls, graph, inputs):
        cls.compilations += 1
        return graph.forward


@pytest.fixture
def compilations(monkeypatch):
    """From nothing to the number of compilations of flex attention so far."""
    torch._dynamo.reset()
    monkeypatch.setattr("transformers.integrations.flex_attention.WrappedFlexAttention", Counting)
    monkeypatch.setattr(Counting, "compilations", 0)
    yield lambda: Counting.compilations
    torch._dynamo.reset()


def hidden_states(model, batch) -> torch.Tensor:
    mask = tree_attention_mask(batch, model.config, model.dtype)
    with torch.no_grad():
        return model.base_model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], attention_mask=mask, use_cache=False
        ).last_hidden_state


def load(model_path, architecture: str, implementation: str):
    return AutoModelForCausalLM.from_pretrained(model_path(architecture), attn_implementation=implementation).eval()


def test_new_lengths_compile_nothing(model_path, compilations):
    """The first two lengths do, and the first with several blocks, for layers of both kinds together; then nothing."""
    flex, sdpa = (load(model_path, "gemma3_text", name) for name in ("flex_attention", "sdpa"))
    for step, prompt in enumerate([20, 40, 150, 30, 127, 128, 129, 260, 200, 90]):
        flex.train(step % 2 == 0)  # policy and reference take turns
        batch = lay_out([(prompt, [3, 4]), (prompt - 7, [2])])
        torch.testing.assert_close(hidden_states(flex, batch), hidden_states(sdpa, batch), rtol=1e-4, atol=1e-4)
        if step == 2:
            compiled = compilations()
            assert 1 <= compiled <= 3
    assert compilations() == compiled


def test_training_on_the_cpu_says_what_to_do(model_path):
    flex, sdpa = (load(model_path, "llama", name) for name in ("flex_attention", "sdpa"))
    with pytest.raises(ValueError, match=r"no backward pass on the CPU.* `attn_implementation='sdpa'`"):
        check_backward(flex.config, torch.device("cpu"))
    check_backward(flex.config, torch.device("cuda"))
    check_backward(sdpa.config, torch.device("cpu"))


def test_trainer_on_the_cpu_says_what_to_do(build, model_path):
    trainer = build(make_rows(2, 1), model=load(model_path, "llama", "flex_attention"), perturbed=False)
    with pytest.raises(ValueError, match="Load the model with `attn_implementation='sdpa'`"):
        trainer.train()


@pytest.mark.slow
def test_compiled_kernel(model_path):
    """What the compiler makes of the mask, with fixed and with dynamic lengths, as it runs outside of tests."""
    flex, sdpa = (load(model_path, "gemma3_text", name) for name in ("flex_attention", "sdpa"))
    for prompt in (200, 340, 300):
        batch = lay_out([(prompt, [3, 4]), (prompt - 7, [2])])
        torch.testing.assert_close(hidden_states(flex, batch), hidden_states(sdpa, batch), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_scorer_with_flex_attention(model_path, tokenizer, compilations):
    (row,) = make_rows(1, 3)
    answers = [row["chosen"], *row["rejected"]]
    found, expected = (
        Scorer(load(model_path, "gemma3_text", name), tokenizer, prefix_sharing=True).score([row["prompt"]], [answers])
        for name in ("flex_attention", "sdpa")
    )
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-4)
    assert compilations() >= 1
