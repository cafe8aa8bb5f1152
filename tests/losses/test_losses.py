"""One matrix for all losses: a new one joins `EXPECTED` with one row."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_dmpo.losses import F_DIVERGENCE_LOSSES, LOSSES, Scores, dmpo, sdpo


CONFIG = SimpleNamespace(
    beta=0.5, label_smoothing=0.1, discopop_tau=0.05, f_divergence_type="reverse_kl", f_alpha_divergence_coef=0.5
)


def make_scores(r_chosen, r_rejected, mask=None, chosen_lengths=None, rejected_lengths=None, nll=1.5) -> Scores:
    """Scores with the given log-ratios, in float64; the reference is anything but zero."""
    chosen = torch.tensor(r_chosen, dtype=torch.float64)
    rejected = torch.tensor(r_rejected, dtype=torch.float64)
    ref_chosen = torch.linspace(-7, -3, chosen.numel(), dtype=torch.float64)
    ref_rejected = torch.linspace(-9, -4, rejected.numel(), dtype=torch.float64).view(rejected.shape)
    return Scores(
        chosen_logps=(chosen + ref_chosen).requires_grad_(),
        rejected_logps=(rejected + ref_rejected).requires_grad_(),
        ref_chosen_logps=ref_chosen,
        ref_rejected_logps=ref_rejected,
        chosen_lengths=torch.tensor(chosen_lengths or [4] * len(r_chosen)),
        rejected_lengths=torch.tensor(rejected_lengths or [[2] * rejected.size(1)] * len(r_chosen)),
        rejected_mask=torch.ones(rejected.shape, dtype=torch.bool) if mask is None else torch.tensor(mask),
        chosen_nll=torch.tensor(nll, dtype=torch.float64),
    )


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# Two prompts: r_w = 1.2 with r = (0.2, -0.4, 0.7), and r_w = -0.3 with r = (0.5,). beta = 0.5.
R = [(1.2, [0.2, -0.4, 0.7]), (-0.3, [0.5])]


def over_pairs(loss):
    return [sum(loss(w, r) for r in rs) / len(rs) for w, rs in R]


def discopop_pair(w, r):
    x = 0.5 * (w - r)
    share = sigma(x / 0.05)
    return -log_sigmoid(x) * (1 - share) + math.exp(-x) * share


def exo_pair(w, r):
    x, eps = 0.5 * (w - r), 0.1
    return sigma(x) * (log_sigmoid(x) - math.log(1 - eps)) + sigma(-x) * (log_sigmoid(-x) - math.log(eps))


def transport(pairs):
    """Mean smoothed loss of the differences of two samples, each sorted."""
    left, right = (sorted(side) for side in zip(*pairs, strict=True))
    x = [0.5 * (a - b) for a, b in zip(left, right, strict=True)]
    return [sum(-0.9 * log_sigmoid(v) - 0.1 * log_sigmoid(-v) for v in x) / len(x)] * 2


# The policy and reference margins of the four pairs, from the references of `make_scores`
REF_W, REF_R = [-7.0, -3.0], [[-9.0, -8.0, -7.0], [-6.0]]
MARGINS = [
    ((w + ref_w) - (r + ref_r), ref_w - ref_r)
    for (w, rs), ref_w, refs in zip(R, REF_W, REF_R, strict=True)
    for r, ref_r in zip(rs, refs, strict=True)
]

EXPECTED = {
    "dmpo": [-log_sigmoid(0.5 * (w - sum(rs) / len(rs))) for w, rs in R],
    "sdpo": [math.log(1 + sum(math.exp(0.5 * (r - w)) for r in rs)) for w, rs in R],
    "sft": [1.5, 1.5],
    "sigmoid": over_pairs(lambda w, r: -log_sigmoid(0.5 * (w - r))),
    "hinge": over_pairs(lambda w, r: max(0, 1 - 0.5 * (w - r))),
    "ipo": over_pairs(lambda w, r: (w / 4 - r / 2 - 1) ** 2),
    "sigmoid_norm": over_pairs(lambda w, r: -log_sigmoid(0.5 * (w / 4 - r / 2))),
    "exo_pair": over_pairs(exo_pair),
    "nca_pair": over_pairs(
        lambda w, r: -log_sigmoid(0.5 * w) - 0.5 * log_sigmoid(-0.5 * w) - 0.5 * log_sigmoid(-0.5 * r)
    ),
    "robust": over_pairs(lambda w, r: (-0.9 * log_sigmoid(0.5 * (w - r)) + 0.1 * log_sigmoid(-0.5 * (w - r))) / 0.8),
    "bco_pair": over_pairs(lambda w, r: -log_sigmoid(0.5 * w) - log_sigmoid(-0.5 * r)),
    "sppo_hard": over_pairs(lambda w, r: (w - 1) ** 2 + (r + 1) ** 2),
    "aot": transport(MARGINS),
    "aot_unpaired": transport([(w, r) for w, rs in R for r in rs]),
    "apo_zero": over_pairs(lambda w, r: 1 - sigma(0.5 * w) + sigma(0.5 * r)),
    "apo_down": over_pairs(lambda w, r: sigma(0.5 * w) + 1 - sigma(0.5 * (w - r))),
    "discopop": over_pairs(discopop_pair),
}


def ragged() -> Scores:
    # 99 and -99 stand where there is nothing: no loss may look there
    return make_scores([1.2, -0.3], [[0.2, -0.4, 0.7], [0.5, 99.0, -99.0]], [[True] * 3, [True, False, False]])


def test_every_loss_has_its_row():
    assert EXPECTED.keys() == LOSSES.keys()


@pytest.mark.parametrize("name", LOSSES)
def test_by_hand(name):
    losses = LOSSES[name](ragged(), CONFIG)
    assert losses.shape == (2,)
    torch.testing.assert_close(losses, torch.tensor(EXPECTED[name], dtype=torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", sorted(LOSSES.keys() - {"sft"}))
def test_nothing_flows_into_padding(name):
    scores = ragged()
    LOSSES[name](scores, CONFIG).sum().backward()
    assert scores.rejected_logps.grad[0].abs().sum() > 0
    assert scores.rejected_logps.grad[1, 1:].abs().max() == 0


@pytest.mark.parametrize("name", LOSSES)
def test_order_of_negatives_does_not_matter(name):
    scores = make_scores([1.2, -0.3], [[0.2, -0.4, 0.7], [0.5, 0.1, -0.9]], rejected_lengths=[[2, 3, 5], [1, 2, 9]])
    order = torch.tensor([2, 0, 1])
    shuffled = replace(
        scores,
        **{n: getattr(scores, n)[:, order] for n in ("rejected_logps", "ref_rejected_logps", "rejected_lengths")},
    )
    torch.testing.assert_close(LOSSES[name](scores, CONFIG), LOSSES[name](shuffled, CONFIG), rtol=1e-12, atol=1e-12)


# These are unbounded by their papers' definition: an exponential, or a square
@pytest.mark.parametrize("name", sorted(LOSSES.keys() - {"discopop"}))
@pytest.mark.parametrize("sign", [1, -1])
def test_finite_at_log_ratios_of_ten_thousand(name, sign):
    scores = make_scores([1e4 * sign], [[-1e4 * sign, 1e4 * sign, 0.0]])
    losses = LOSSES[name](scores, SimpleNamespace(**{**vars(CONFIG), "beta": 1.0}))
    assert torch.isfinite(losses).all()
    if name != "sft":
        losses.sum().backward()
        assert torch.isfinite(scores.chosen_logps.grad).all()
        assert torch.isfinite(scores.rejected_logps.grad).all()


def test_sdpo_at_the_extremes_is_the_hardest_margin():
    """-log sigmoid(-logsumexp) -> max_i beta (r_i - r_w), which a raw `exp` would turn into infinity."""
    scores = make_scores([-1e4], [[1e4, 0.0]])
    assert sdpo(scores, CONFIG).item() == pytest.approx(0.5 * 2e4)


@pytest.mark.parametrize("kind", ["forward_kl", "js_divergence", "alpha_divergence"])
@pytest.mark.parametrize("name", ["dmpo", "sdpo", "sigmoid"])
def test_f_divergences_by_hand(name, kind):
    f = {
        "forward_kl": lambda r: 1 - math.exp(-r),
        "js_divergence": lambda r: math.log(2 * math.exp(r) / (math.exp(r) + 1)),
        "alpha_divergence": lambda r: (math.exp(-0.5 * r) - 1) / -0.5,
    }[kind]
    margins = [[f(w) - f(r) for r in rs] for w, rs in R]
    expected = {
        "dmpo": [-log_sigmoid(0.5 * sum(m) / len(m)) for m in margins],
        "sdpo": [math.log(1 + sum(math.exp(-0.5 * x) for x in m)) for m in margins],
        "sigmoid": [sum(-log_sigmoid(0.5 * x) for x in m) / len(m) for m in margins],
    }[name]
    config = SimpleNamespace(**{**vars(CONFIG), "f_divergence_type": kind})
    losses = LOSSES[name](ragged(), config)
    # alpha-divergences go through float32, as TRL's do
    torch.testing.assert_close(losses, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-6)
    assert name in F_DIVERGENCE_LOSSES


@pytest.mark.parametrize("name", sorted(LOSSES.keys() - {"aot", "aot_unpaired"}))  # TRL refuses these two
def test_weights_of_pairs(name):
    """Losses of pairs weigh each pair, the others the prompt, by the mean weight of its pairs."""
    loss, scores = LOSSES[name], ragged()
    weights = torch.tensor([[0.5, 2.0, 0.1], [0.3, 9.0, 9.0]], dtype=torch.float64)
    if name in ("dmpo", "sdpo", "sft"):
        expected = loss(scores, CONFIG) * torch.tensor([2.6 / 3, 0.3], dtype=torch.float64)
    else:
        pairs = [loss(make_scores([w], [[r]], rejected_lengths=[[2]]), CONFIG).item() for w, rs in R for r in rs]
        means = [(0.5 * pairs[0] + 2.0 * pairs[1] + 0.1 * pairs[2]) / 3, 0.3 * pairs[3]]
        expected = torch.tensor(means, dtype=torch.float64)
    torch.testing.assert_close(loss(replace(scores, weights=weights), CONFIG), expected)


finite = st.floats(-50, 50, allow_nan=False)


@settings(max_examples=200, deadline=None)
@given(st.lists(finite, min_size=1, max_size=8), finite)
def test_identities(rejected, chosen):
    scores = make_scores([chosen], [rejected])
    pairwise = LOSSES["sigmoid"](scores, CONFIG)
    joint, soft = dmpo(scores, CONFIG), sdpo(scores, CONFIG)
    if len(rejected) == 1:  # all three are DPO
        torch.testing.assert_close(joint, pairwise)
        torch.testing.assert_close(soft, pairwise)
    # Jensen, and a sum of exponentials is at least each of them
    assert joint.item() <= pairwise.item() + 1e-9
    assert soft.item() >= pairwise.item() - 1e-9
    # The reward of all answers may be shifted by the same amount
    shifted = make_scores([chosen + 3], [[r + 3 for r in rejected]])
    torch.testing.assert_close(dmpo(shifted, CONFIG), joint)
    torch.testing.assert_close(sdpo(shifted, CONFIG), soft)
