import random
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from trl_dmpo.ranking.beam import PrefixTree, beam_search
from trl_dmpo.ranking.tokens import Encoded


END = 0


@pytest.fixture(scope="module")
def model(model_path):
    return AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)


def draw_catalogue(draws: random.Random, size: int) -> list[list[int]]:
    """Sequences of three tokens, so that most begin alike and some begin with another's beginning, ended as texts are."""
    found: dict[tuple, None] = {}
    while len(found) < size:
        found[tuple(draws.choices((5, 6, 7), k=draws.randint(1, 4)))] = None
    return [[*sequence, END] for sequence in found]


def draw_rows(count: int, seed: int, size: int = 12) -> tuple[list[Encoded], list[list[int]]]:
    draws = random.Random(seed)
    rows, excluded = [], []
    for _ in range(count):
        completions = draw_catalogue(draws, draws.randint(2, size))
        rows.append(Encoded(draws.choices(range(10, 100), k=draws.randint(1, 6)), completions))
        excluded.append(draws.sample(range(len(completions)), draws.randint(0, len(completions))))
    return rows, excluded


@torch.no_grad()
def plain_scores(model, row: Encoded) -> list[float]:
    scores = []
    for completion in row.completions:
        logits = model(torch.tensor([row.prompt + completion])).logits[0, len(row.prompt) - 1 : -1]
        scores.append(logits.log_softmax(-1)[range(len(completion)), completion].sum().item())
    return scores


def test_a_thousand_catalogues_and_nothing_else_comes_out(model):
    rows, excluded = draw_rows(1000, seed=0)
    for row, left_out, found in zip(rows, excluded, beam_search(model, rows, excluded, num_beams=3), strict=True):
        left = set(range(len(row.completions))) - set(left_out)
        assert set(found) <= left
        assert len(set(found)) == len(found) == min(3, len(left))


@pytest.mark.parametrize("normalize", ["sum", "mean"])
def test_with_as_many_beams_as_completions_all_are_found_in_order(normalize, model):
    rows, excluded = draw_rows(20, seed=1, size=6)
    for row, left_out, found in zip(
        rows, excluded, beam_search(model, rows, excluded, num_beams=8, normalize=normalize), strict=True
    ):
        scores = torch.tensor(plain_scores(model, row))
        if normalize == "mean":
            scores /= torch.tensor([len(completion) for completion in row.completions])
        best = scores.argsort(descending=True).tolist()
        assert found == [place for place in best if place not in left_out]


def test_what_ends_all_completions_may_stand_within_them(model):
    """As the new line of a chat template does."""
    rows = [Encoded([20, 21], [[5, END, 6, END], [5, 6, END], [6, 5, 6, END, END]])]
    (found,) = beam_search(model, rows, [[]], num_beams=3)
    assert sorted(found) == [0, 1, 2]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(1, 3), max_size=4), min_size=1, max_size=12, unique_by=tuple), st.data())
def test_a_tree_allows_what_goes_on_to_a_sequence_that_is_left(bodies, data):
    sequences = [[*body, END] for body in bodies]
    excluded = data.draw(st.sets(st.integers(0, len(sequences) - 1)))
    tree = PrefixTree(sequences)
    spent = tree.spent(excluded)
    left = [sequence for number, sequence in enumerate(sequences) if number not in excluded]
    beginnings = {tuple(each) for sequence in sequences for each in accumulate([[], *([t] for t in sequence)])}
    for beginning in beginnings:
        start = len(beginning)
        following = {each[start] for each in left if tuple(each[:start]) == beginning and len(each) > start}
        if following or not left:
            assert set(tree.allowed(list(beginning), spent)) == following
    assert all(tree.allowed([*sequence, 9], spent) == [] for sequence in sequences)
    assert [tree.find([*sequence, END, 7]) for sequence in sequences] == list(range(len(sequences)))
    assert all(tree.is_whole(sequence) and not tree.is_whole(sequence[:-1]) for sequence in sequences)


def test_a_completion_that_begins_with_another_is_refused(model):
    with pytest.raises(ValueError, match=r"one answer begins with the tokens of another.*Use `method='exact'`"):
        beam_search(model, [Encoded([20], [[5, 6], [5, 6, 7]])], [[]], num_beams=2)


def test_a_prompt_without_room_for_its_completions_is_named(model):
    rows = [Encoded([20], [[5, END]]), Encoded([20] * 511, [[5, END], [6, END]])]
    with pytest.raises(ValueError, match=r"prompts\[1\] has 511 tokens, and with 2 of an answer.*window of 512"):
        beam_search(model, rows, [[], []], num_beams=2)
