"""Prompts in other orders, and what places do to scores, where the truth is known."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import SHARED
from tests.ranking.test_listing import FORMS, ITEMS, write
from trl_dmpo.ranking import position_bias as module
from trl_dmpo.ranking.position_bias import (
    PositionBias,
    balanced_orders,
    cross_fitted_stella,
    list_orders,
    position_bias,
    stella,
    transition_matrix,
)
from trl_dmpo.ranking.rows import RankingRows
from trl_dmpo.ranking.scorer import Scorer


def make_rows(prompts, candidates, labels) -> RankingRows:
    return RankingRows("films", prompts, candidates, np.array(labels))


@pytest.mark.parametrize(
    "prompt",
    [
        "Seen: Heat. Next:",
        "Which: Heat, Heather? Next:",
        "Which: Heat, and then Big - Babe? Next:",
        [{"role": "user", "content": "Heat, Big"}, {"role": "assistant", "content": "Babe"}],
    ],
)
def test_prompt_that_does_not_list_its_candidates_is_named(prompt):
    rows = make_rows(["Of Big, Heat, Babe:", prompt], [[" Heat", " Big", " Babe"]] * 2, [0, 0])
    with pytest.raises(ValueError, match=r"films, row 1: its prompt does not list its 3 candidates, each once"):
        list_orders(rows, 2)


@given(st.integers(1, 12), st.integers(1, 40), st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_candidates_stand_equally_often_in_each_place(count, num_orders, seed):
    orders = balanced_orders(count, num_orders, seed)
    assert orders.shape == (num_orders, count)
    assert (np.sort(orders, axis=1) == np.arange(count)).all()
    assert (orders[0] == np.arange(count)).all()
    times = np.array([[(orders[:, place] == i).sum() for i in range(count)] for place in range(count)])
    assert times.max() - times.min() <= (num_orders % count > 0)


def test_orders_are_random_and_of_the_row_alone():
    rows = make_rows(["Of A, B, C, D:"] * 200, [list("ABCD")] * 200, [0] * 200)
    _, orders = list_orders(rows, 4, seed=3)
    part = RankingRows("films", rows.prompts[5:9], rows.candidates[5:9], rows.labels[5:9], places=np.arange(5, 9))
    assert (list_orders(part, 4, seed=3)[1] == orders[5:9]).all()
    assert not (list_orders(rows, 4, seed=4)[1] == orders).all()
    # 24 orders, of which the second of each row is anything but the first: A never stays, and any pair may be neighbours
    second = Counter(map(tuple, orders[:, 1].tolist()))
    assert len(second) == 9
    assert max(second.values()) < 50


class ListScorer:
    """Knows what each title is worth, and adds what its place in "Of A, B, C:" is worth."""

    def __init__(self, worth, place_worth):
        self.worth, self.place_worth = worth, place_worth

    def score(self, prompts, candidates, normalize="sum", progress=None, names=None):
        scores = []
        for prompt, titles in zip(prompts, candidates, strict=True):
            listed = prompt[3:-1].split(", ")
            worth = [self.worth[title] + self.place_worth[listed.index(title)] for title in titles]
            scores.append(torch.tensor(worth, dtype=torch.float32))
            if progress is not None:
                progress(1)
        return scores


def test_bias_by_hand():
    scorer = ListScorer({"A": 0.0, "B": -1.0, "C": -2.0}, [0.5, 0.0, 4.0])
    rows = make_rows(["Of C, A, B:", "Of B, A:"], [["A", "B", "C"], ["A", "B"]], [1, 0])
    done = []
    bias = position_bias(scorer, rows, num_orders=6, progress=done.append)
    assert sum(done) == 12
    # The first order is the prompt's
    np.testing.assert_array_equal(bias.scores[:, 0], [[0.0, 3.0, -1.5], [0.0, -0.5, np.nan]])
    np.testing.assert_array_equal(bias.places[:, 0], [[1, 2, 0], [1, 0, -1]])
    # Each candidate stands twice, or three times, in each place, so the mean has the mean of the places
    np.testing.assert_allclose(bias.calibrated, [[1.5, 0.5, -0.5], [0.25, -0.75, np.nan]])
    spread = np.var([0.5, 0, 4] * 2, ddof=1)
    np.testing.assert_allclose(bias.variance, [[spread] * 3, [0.075, 0.075, np.nan]])
    # Who stands third is first; B is before C if it stands before it or third... so its rank is 1 a third of the time
    assert sorted(bias.ranks[0].tolist()) == sorted(
        1 + sum(bias.scores[0, order, other] > bias.scores[0, order, 1] for other in (0, 2)) for order in range(6)
    )
    np.testing.assert_array_equal(bias.ranks[1], [1] * 6)
    np.testing.assert_allclose(bias.rank_variance[1], 0)
    assert bias.rank_variance[0] > 0
    # Of row 0 the third place always wins (A first: 0.5 < 4 - 2); of row 1 the place of A, which is each half of the time
    np.testing.assert_allclose(bias.place_shares, [3 / 12, 3 / 12, 6 / 6])
    np.testing.assert_allclose(bias.expected_shares, [(6 / 3 + 6 / 2) / 12] * 2 + [1 / 3])
    np.testing.assert_allclose(bias.place_scores, [(-1 * 6 * 3 / 3 + 0.25 * 6) / 12, (-1.5 * 6 - 0.25 * 6) / 12, 2.5])


def test_ties_share_the_first_rank():
    bias = PositionBias(np.array([[[1.0, 1, 0], [0, 0, 0]]]), np.array([[[2, 1, 0], [0, 1, 2]]]), np.array([0]))
    np.testing.assert_allclose(bias.first_places[0], [[0, 0.5, 0.5], [1 / 3, 1 / 3, 1 / 3]])
    np.testing.assert_allclose(bias.ranks, [[1.5, 2]])


def simulate(rows, count, num_orders, place_worth, strength, seed):
    """
    A ranker that sees the right candidate `strength` above noise, and adds what places are worth to it.
    """
    random = np.random.default_rng(seed)
    labels = random.integers(count, size=rows)
    orders = np.stack([balanced_orders(count, num_orders, seed, row) for row in range(rows)])
    worth = random.normal(size=(rows, num_orders, count)) + strength * (labels[:, None] == np.arange(count))[:, None]
    scores = worth + np.asarray(place_worth)[orders.argsort(axis=2)]
    return PositionBias(scores, orders, labels)


def accuracy(scores, labels):
    best = scores == scores.max(axis=1, keepdims=True)
    return (best / best.sum(axis=1, keepdims=True))[np.arange(len(labels)), labels].mean()


def test_transition_matrix_counts():
    """Against a loop over rows and orders."""
    probing = simulate(50, 4, 3, [1, 0, 0, -1], 1.0, seed=0)
    counts = np.full((4, 4), 0.25)
    for scores, orders, label in zip(probing.scores, probing.orders, probing.labels, strict=True):
        for values, order in zip(scores, orders.tolist(), strict=True):
            counts[order.index(label), order.index(values.argmax())] += 1
    np.testing.assert_allclose(transition_matrix(probing), counts / counts.sum(axis=1, keepdims=True))


def test_posterior_is_bayes_rule_applied_order_by_order():
    """Against a loop: update, entropy, and the posterior of the smallest."""
    probing, bias = simulate(80, 4, 4, [1, 0, 0, -1], 1.5, 0), simulate(30, 4, 5, [1, 0, 0, -1], 1.5, 1)
    transition = transition_matrix(probing)
    for row, found in enumerate(stella(bias, transition)):
        prior, best = np.full(4, 0.25), (np.inf, None)
        for values, order in zip(bias.scores[row], bias.orders[row].tolist(), strict=True):
            likelihood = transition[[order.index(i) for i in range(4)], order.index(values.argmax())]
            prior = prior * likelihood / (prior * likelihood).sum()
            best = min(best, (-(prior * np.log(prior)).sum(), prior.tolist()))
        np.testing.assert_allclose(np.exp(found), best[1], atol=1e-8)


def test_correction_recovers_what_a_preferred_place_hides():
    """
    The first place is put first whoever stands there, but for where the right one stands in the last: the plain scores say
    nothing, and the correction finds the right one as soon as it has stood in the last place.
    """
    count, rows = 4, 60
    labels = np.arange(rows) % count
    orders = np.stack([balanced_orders(count, count, 0, row) for row in range(rows)])
    places = orders.argsort(axis=2)
    scores = -places.astype(float)
    seen = np.take_along_axis(places, labels[:, None, None], axis=2)[..., 0] == count - 1
    scores[np.nonzero(seen)[0], np.nonzero(seen)[1], labels] = 10
    bias = PositionBias(scores, orders, labels)
    half = np.arange(rows) < rows // 2
    probing, rest = module._take(bias, half), module._take(bias, ~half)
    assert accuracy(rest.scores[:, 0], rest.labels) < 0.7
    np.testing.assert_array_equal(stella(rest, transition_matrix(probing)).argmax(axis=1), rest.labels)


def test_a_ranker_that_sees_places_only_is_corrected_to_ignorance():
    bias = simulate(400, 4, 4, [9, 0, 0, 0], 0.0, seed=0)
    np.testing.assert_allclose(bias.place_shares, [1, 0, 0, 0])
    posterior = np.exp(stella(bias, transition_matrix(bias)))
    np.testing.assert_allclose(posterior, 0.25, atol=0.02)


def test_unbiased_ranker_keeps_its_first_choice():
    """Of a ranker without a bias, the likelihood is larger for who is put first most often: a vote."""
    bias = simulate(300, 5, 5, np.zeros(5), 1.5, seed=0)
    probing = simulate(2000, 5, 5, np.zeros(5), 1.5, seed=1)
    one = PositionBias(bias.scores[:, :1], bias.orders[:, :1], bias.labels)
    found = stella(one, transition_matrix(probing))
    np.testing.assert_array_equal(found.argmax(axis=1), one.scores[:, 0].argmax(axis=1))


def test_corrections_help_against_a_bias():
    place_worth = [2.0, 1.0, 0.0, 0.0, -1.0]
    bias, probing = (simulate(1000, 5, 5, place_worth, 1.5, seed) for seed in (0, 1))
    plain = accuracy(bias.scores[:, 0], bias.labels)
    posterior = stella(bias, transition_matrix(probing))
    assert accuracy(bias.calibrated, bias.labels) > plain + 0.2
    assert accuracy(posterior, bias.labels) > plain + 0.1
    fitted = cross_fitted_stella(bias, users=np.arange(1000) // 2)
    assert abs(accuracy(fitted, bias.labels) - accuracy(posterior, bias.labels)) < 0.02


def test_no_row_is_corrected_with_its_own_answer():
    bias = simulate(40, 3, 3, [1, 0, 0], 1.0, seed=0)
    users = np.arange(40) // 4
    found = cross_fitted_stella(bias, users, seed=5)
    for user in range(10):
        labels = np.where(users == user, (bias.labels + 1) % 3, bias.labels)
        changed = cross_fitted_stella(PositionBias(bias.scores, bias.orders, labels), users, seed=5)
        np.testing.assert_array_equal(changed[users == user], found[users == user])
        assert (changed[users != user] != found[users != user]).any()


def test_what_cannot_be_corrected_is_said():
    ragged = position_bias(
        ListScorer({"A": 0.0, "B": -1.0, "C": -2.0}, [0, 0, 0]),
        make_rows(["Of C, A, B:", "Of B, A:"], [["A", "B", "C"], ["A", "B"]], [1, 0]),
        num_orders=2,
    )
    with pytest.raises(ValueError, match="row 1 has 2 candidates and another has 3"):
        transition_matrix(ragged)
    bias = simulate(4, 3, 3, [1, 0, 0], 1.0, seed=0)
    with pytest.raises(ValueError, match=r"of shape \(2, 2\), but rows have 3"):
        stella(bias, np.eye(2))
    with pytest.raises(ValueError, match="all rows are of one user"):
        cross_fitted_stella(bias, np.zeros(4, int))
    with pytest.raises(ValueError, match="`num_orders` is 1"):
        position_bias(None, None, 1)


def test_first_order_scores_as_without_orders(model_path, tokenizer):
    from transformers import AutoModelForCausalLM

    scorer = Scorer(AutoModelForCausalLM.from_pretrained(model_path()), tokenizer)
    texts = [write(FORMS[name], seed=0, items=ITEMS[: 3 + i]) for i, name in enumerate(["sdpo", "chat"])]
    rows = make_rows(*map(list, zip(*texts, strict=True)), [0, 1])
    bias = position_bias(scorer, rows, num_orders=3)
    again = position_bias(scorer, rows, num_orders=3)
    np.testing.assert_array_equal(bias.scores, again.scores)
    for row, scores in enumerate(scorer.score(rows.prompts, rows.candidates)):
        np.testing.assert_allclose(bias.scores[row, 0, : len(scores)], scores.numpy(), rtol=1e-4)
    # A model with attention reads the order
    assert (np.nan_to_num(bias.variance, nan=1) > 1e-4).all()


@pytest.mark.real
@pytest.mark.skipif(not SHARED.exists(), reason="the published data files are absent")
def test_published_rows_list_their_candidates():
    from trl_dmpo.ranking.rows import load_ranking_rows

    rows = load_ranking_rows(SHARED / "data/llara/lastfm_val.json", max_rows=400)
    prompts, orders = list_orders(rows, 2)
    for row in (0, 1, len(rows) - 1):
        titles = [candidate.strip() for candidate in rows.candidates[row]]
        assert ", ".join(titles[i] for i in orders[row, 1]) in prompts[row][1]
        assert sorted(prompts[row][1]) == sorted(rows.prompts[row])
