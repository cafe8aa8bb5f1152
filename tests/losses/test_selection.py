"""Selections and factors by hand, and the clusters against scikit-learn's."""

import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_dmpo.losses import Scores, dmpo
from trl_dmpo.losses import selection as selection_module
from trl_dmpo.losses.selection import select_negatives, top_cluster

from ..conftest import ROOT


def make_config(**options) -> SimpleNamespace:
    defaults = {"negative_selection": "boundary", "num_hard_negatives": None, "beta": 1.0}
    defaults |= {"dynamic_beta": False, "dynamic_beta_margin": 2.0}
    defaults |= {"f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.5}
    return SimpleNamespace(**defaults | options)


def make_scores(chosen, rejected, mask=None, device="cpu") -> Scores:
    """Scores with the given log-probabilities of the policy, in float64; the reference ranks the other way round."""
    chosen = torch.tensor(chosen, dtype=torch.float64, device=device, requires_grad=True)
    rejected = torch.tensor(rejected, dtype=torch.float64, device=device, requires_grad=True)
    ones = torch.ones(rejected.shape, dtype=torch.bool, device=device)
    return Scores(
        chosen_logps=chosen,
        rejected_logps=rejected,
        ref_chosen_logps=-2 * chosen.detach(),
        ref_rejected_logps=-2 * rejected.detach(),
        chosen_lengths=torch.ones(len(chosen), dtype=torch.long, device=device),
        rejected_lengths=ones.long(),
        rejected_mask=ones if mask is None else torch.tensor(mask, device=device),
        chosen_nll=-chosen.detach().mean(),
    )


def selected(scores: Scores, **options) -> list[list[int]]:
    mask = select_negatives(scores, make_config(**options)).rejected_mask
    return [[place for place, kept in enumerate(row) if kept] for row in mask.tolist()]


# Violators; an exact tie with the chosen; none, and three clear clusters; holes full of garbage, and none
CHOSEN = [-4.0, -5.0, -1.0, -1.0]
REJECTED = [
    [-3.0, -6.0, -3.5, -9.0, -7.0],
    [-5.0, -5.1, -8.0, -9.0, -7.0],
    [-6.1, -2.0, -6.0, -2.2, -9.0],
    [1e30, -8.0, -1e30, -3.0, 1e30],
]
MASK = [[True] * 5, [True] * 5, [True] * 5, [False, True, False, True, False]]


def by_hand() -> Scores:
    return make_scores(CHOSEN, REJECTED, MASK)


def test_boundary_by_hand():
    assert selected(by_hand()) == [[0, 2], [0], [1, 3], [3]]


@pytest.mark.parametrize(
    ("count", "expected"), [(1, [[0], [0], [1], [3]]), (3, [[0, 1, 2], [0, 1, 4], [1, 2, 3], [1, 3]])]
)
def test_hardest_by_hand(count, expected):
    assert selected(by_hand(), negative_selection="hardest", num_hard_negatives=count) == expected


def test_hardest_takes_the_first_of_equals():
    scores = make_scores([0.0], [[-2.0] * 40 + [-1.0]])
    assert selected(scores, negative_selection="hardest", num_hard_negatives=3) == [[0, 1, 40]]


def test_all_changes_nothing():
    scores = by_hand()
    assert select_negatives(scores, make_config(negative_selection="all")) is scores


def test_boundary_by_the_chosen_log_probability_of_each_pair():
    # Under `ld_alpha` the chosen completion has another log-probability against each rejected one
    scores = make_scores([[-4.0, -7.0, -4.0], [-1.0, -1.0, 1e30]], [[-5.0, -6.0, -8.0], [-3.0, -9.0, 1e30]])
    scores.rejected_mask[1, 2] = False
    assert selected(scores) == [[1], [0]]
    factors = select_negatives(scores, make_config(dynamic_beta=True)).beta_factors
    level = (-5.0 - 8.0) / 2
    expected = factor(-7.0 + 6.0, -6.0 - level, 2.0)
    torch.testing.assert_close(factors[0], torch.tensor([1.0, expected, 1.0], dtype=torch.float64))


def factor(a: float, b: float, margin: float) -> float:
    return 1 + 0.5 * math.tanh((a - b - margin) / (abs(a) + abs(b)))


@pytest.mark.parametrize("margin", [2.0, 6.0])
def test_dynamic_beta_by_hand(margin):
    result = select_negatives(by_hand(), make_config(dynamic_beta=True, dynamic_beta_margin=margin))
    # The means of the easy ones of the four prompts
    levels = [(-6.0 - 9.0 - 7.0) / 3, (-5.1 - 8.0 - 9.0 - 7.0) / 4, (-6.1 - 6.0 - 9.0) / 3, -8.0]
    expected = torch.ones(4, 5, dtype=torch.float64)
    for row, places in enumerate([[0, 2], [0], [1, 3], [3]]):
        for place in places:
            logp = REJECTED[row][place]
            expected[row, place] = factor(CHOSEN[row] - logp, logp - levels[row], margin)
    torch.testing.assert_close(result.beta_factors, expected, rtol=1e-12, atol=0)
    assert not result.beta_factors.requires_grad


def test_dynamic_beta_without_easy_ones():
    scores = make_scores([-4.0, -3.0, -3.0], [[-2.0, -3.0], [-3.0, -3.0], [-3.0, 1e30]])
    scores.rejected_mask[2, 1] = False
    # All are selected: b is the distance to their own mean. In the other rows a = b = 0: the limit of tanh(-2 / 0)
    expected = [[factor(-2.0, 0.5, 2.0), factor(-1.0, -0.5, 2.0)], [0.5, 0.5], [0.5, 1.0]]
    result = select_negatives(scores, make_config(dynamic_beta=True)).beta_factors
    torch.testing.assert_close(result, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)
    result = select_negatives(scores, make_config(dynamic_beta=True, dynamic_beta_margin=0.0)).beta_factors
    assert result[1:].eq(1).all()


def test_the_loss_of_dynamicpo_and_its_gradient():
    """-log σ(Σ β_i (r_w - r_i) / k) over the selected, in which the factors are constants."""
    scores = by_hand()
    result = select_negatives(scores, make_config(dynamic_beta=True))
    loss = dmpo(result, make_config())
    loss.sum().backward()
    f = result.beta_factors[0].tolist()
    # The reference is minus twice the policy: r = 3 logp
    logit = (f[0] * 3 * (-4.0 + 3.0) + f[2] * 3 * (-4.0 + 3.5)) / 2
    torch.testing.assert_close(loss[0].item(), math.log1p(math.exp(-logit)), rtol=1e-12, atol=0)
    slope = 1 / (1 + math.exp(logit))
    expected = torch.tensor([slope * f[0] / 2, 0, slope * f[2] / 2, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(scores.rejected_logps.grad[0], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([-3.0], [0]),
        ([-3.0, -2.0], [1]),
        ([-2.0, -2.0], [0, 1]),
        ([-2.0] * 4, [0, 1, 2, 3]),
        ([-5.0, -2.0, -5.0, -2.0], [1, 3]),
        ([0.1, 0.3, 0.1, 0.2, 0.3], [1, 4]),
        ([-1.0, -2.0, -3.0, -4.0, -5.0], [0]),  # as good as 1 and 2 in the highest
        ([0.0, -0.001, -0.002, -0.1, -0.2, -1000.0], [0, 1, 2]),  # sums of squares of 1e6 that differ by 1e-2
    ],
)
def test_top_cluster_by_hand(values, expected):
    values = torch.tensor([values])
    assert top_cluster(values, torch.ones_like(values, dtype=torch.bool))[0].nonzero().flatten().tolist() == expected


@pytest.mark.parametrize("step", [0.1, 0.3])
def test_neither_rounding_nor_padding_decides_between_optima(step):
    # 3, 4, 4 is as good as 4, 3, 4 and 4, 4, 3
    values = -step * torch.arange(1, 12, dtype=torch.float64)
    for padding in range(9):
        padded = torch.cat([values, torch.full((padding,), 1e30, dtype=torch.float64)]).unsqueeze(0)
        assert top_cluster(padded, padded < 0).sum() == 3


def inertia(clusters: list[list[float]]) -> float:
    return sum(sum((value - sum(c) / len(c)) ** 2 for value in c) for c in clusters if c)


def least_inertia(values: list[float], tops) -> float:
    """The least over all clusterings of sorted values into runs of which the highest has a length in `tops`."""
    size = len(values)
    return min(inertia([values[:top], values[top:end], values[end:]]) for top in tops for end in range(top, size + 1))


def test_clusters_are_optimal_and_those_of_scikit_learn():
    import sklearn
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    generator = torch.Generator().manual_seed(0)
    sets = [5 * torch.randn(1 + index % 19, generator=generator, dtype=torch.float64) for index in range(1000)]
    values = torch.nn.utils.rnn.pad_sequence(sets, batch_first=True, padding_value=1e30)
    tops = [top[: len(row)] for row, top in zip(sets, top_cluster(values, values < 1e29), strict=True)]

    # All clusterings of a fifth of them, of all sizes
    for row, top in list(zip(sets, tops, strict=True))[::5]:
        ordered = row.sort(descending=True).values.tolist()
        least = least_inertia(ordered, range(1, len(row) + 1))
        assert least_inertia(ordered, [int(top.sum())]) == pytest.approx(least, rel=1e-9), row

    different = 0
    with threadpool_limits(1), sklearn.config_context(assume_finite=True, skip_parameter_validation=True):
        for row, top in zip(sets, tops, strict=True):
            kmeans = KMeans(min(3, len(row)), n_init=2, random_state=0).fit(row.unsqueeze(1).numpy())
            if not torch.equal(top, torch.from_numpy(kmeans.labels_ == kmeans.cluster_centers_.argmax())):
                ours = least_inertia(row.sort(descending=True).values.tolist(), [int(top.sum())])
                assert ours < kmeans.inertia_ - 1e-9, row  # its two starts have missed the optimum
                different += 1
    assert different < 150


def test_two_thousand_in_chunks(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    values, mask = torch.randn(2, 300, generator=generator), torch.rand(2, 300, generator=generator) < 0.8
    at_once = top_cluster(values, mask)
    monkeypatch.setattr(selection_module, "MAX_SPLITS", 7 * 600)
    torch.testing.assert_close(top_cluster(values, mask), at_once)
    monkeypatch.undo()
    # Three heaps far from each other
    heaps = torch.arange(2000) % 3
    values = -50.0 * heaps + torch.rand(1, 2000, generator=generator)
    assert torch.equal(top_cluster(values, torch.ones(1, 2000, dtype=torch.bool))[0], heaps == 0)


def test_nothing_leaves_the_device():
    """On the device `meta` there are no values: whatever asks for one raises an error, and so does a tensor elsewhere."""
    scores = make_scores(CHOSEN, REJECTED, MASK, device="meta")
    for options in ({}, {"negative_selection": "hardest", "num_hard_negatives": 2}):
        result = select_negatives(scores, make_config(dynamic_beta=True, **options))
        assert result.rejected_mask.device.type == result.beta_factors.device.type == "meta"
    for sync in (lambda: scores.rejected_logps[scores.rejected_mask], lambda: scores.rejected_mask.any().item()):
        with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
            sync()


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path):
    command = [sys.executable, ROOT / "benchmarks/selection.py", "--tiny", "--prompt", "30", "--k", "3"]
    command += ["--rounds", "1", "--repeats", "3", "--output", tmp_path / "figures.json"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONWARNINGS": "ignore"})
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["settings"]["k"] == 3
    assert 0 < figures["loss"]["all"] < figures["step"]["all"]
    assert "share of a step" in done.stdout


# Sixteenths: sums of them are exact, and equal values frequent
logps = st.integers(-128, 0).map(lambda value: value / 16)


@settings(max_examples=60, deadline=None)
@given(st.lists(logps, min_size=1, max_size=12), logps, st.randoms(use_true_random=False))
def test_order_and_padding_change_nothing(rejected, chosen, random):
    options = [{}, {"negative_selection": "hardest", "num_hard_negatives": 3}]
    order = random.sample(range(len(rejected) + 4), len(rejected))
    padded = [random.choice([1e30, -1e30, 0.0]) for _ in range(len(rejected) + 4)]
    for value, place in zip(rejected, order, strict=True):
        padded[place] = value
    plain, moved = make_scores([chosen], [rejected]), make_scores([chosen], [padded])
    mask = torch.zeros_like(moved.rejected_mask)
    mask[0, order] = True
    moved.rejected_mask.copy_(mask)
    for option in options:
        before = select_negatives(plain, make_config(dynamic_beta=True, **option))
        after = select_negatives(moved, make_config(dynamic_beta=True, **option))
        assert before.rejected_mask.any()
        assert not (after.rejected_mask & ~mask).any()
        assert after.beta_factors.isfinite().all()
        if not option:
            assert torch.equal(after.rejected_mask[:, order], before.rejected_mask)
            torch.testing.assert_close(after.beta_factors[:, order], before.beta_factors)
        else:
            assert after.rejected_mask.sum() == min(3, len(rejected))
