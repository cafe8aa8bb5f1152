"""One matrix for all losses: a new one joins `EXPECTED` with one row."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_dmpo.losses import (
    DYNAMIC_BETA_LOSSES,
    F_DIVERGENCE_LOSSES,
    GRADED_LOSSES,
    LIST_LOSSES,
    LOSSES,
    PAIRLESS_LOSSES,
    REFERENCE_FREE_LOSSES,
    Answers,
    Scores,
    dmpo,
    lipo,
    plackett_luce,
    sdpo,
)


CONFIG = SimpleNamespace(
    beta=0.5,
    label_smoothing=0.1,
    discopop_tau=0.05,
    f_divergence_type="reverse_kl",
    f_alpha_divergence_coef=0.5,
    nca_alpha=1e-3,
    plackett_luce_places=None,
)


def config_with(**options) -> SimpleNamespace:
    return SimpleNamespace(**{**vars(CONFIG), **options})


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


def shares(values):
    return [math.exp(v) / sum(math.exp(u) for u in values) for v in values]


def infonca_list(rs, targets):
    return -sum(t * math.log(p) for t, p in zip(targets, shares([0.5 * r for r in rs]), strict=True))


def nca_list(rs, targets):
    drawn_up = sum(t * log_sigmoid(0.5 * r) for t, r in zip(targets, rs, strict=True))
    return -drawn_up - sum(log_sigmoid(-0.5 * r) for r in rs) / len(rs)


def lipo_list(rs, relevance):
    ranked = sorted(range(len(rs)), key=lambda i: -rs[i])
    discount = {i: 1 / math.log(1 + rank) for rank, i in enumerate(ranked, start=1)}
    pairs = [(i, j) for i in ranked for j in ranked if relevance[i] > relevance[j]]
    swap = {(i, j): (2 ** relevance[i] - 2 ** relevance[j]) * abs(discount[i] - discount[j]) for i, j in pairs}
    return -sum(swap[i, j] * log_sigmoid(0.5 * (rs[i] - rs[j])) for i, j in pairs)


def ranking(rs, places):
    return -sum(math.log(shares([0.5 * r for r in rs[place:]])[0]) for place in range(places))


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
    "infonca": [infonca_list([w, *rs], [1] + [0] * len(rs)) for w, rs in R],
    "nca": [nca_list([w, *rs], [1] + [0] * len(rs)) for w, rs in R],
    "plackett_luce": [ranking([w, *rs], places=1 + len(rs)) for w, rs in R],
    "lipo": [lipo_list([w, *rs], [1] + [0] * len(rs)) for w, rs in R],
    "mult_dpo": [math.log(math.exp(0.5 * w) + sum(math.exp(0.5 * r) for r in rs)) - 0.5 * w for w, rs in R],
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


def assert_by_hand(losses, expected):
    torch.testing.assert_close(losses, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", sorted(GRADED_LOSSES))
def test_graded_relevance_by_hand(name):
    relevance = torch.tensor([[3.0, 1.0, 0.0, 2.5], [-1.5, -0.5, 99.0, -99.0]], dtype=torch.float64)
    graded = [[3.0, 1.0, 0.0, 2.5], [-1.5, -0.5]]
    by_hand = {
        "infonca": lambda rs, s: infonca_list(rs, shares([x / 0.8 for x in s])),
        "nca": lambda rs, s: nca_list(rs, shares([x / 0.8 for x in s])),
        "lipo": lipo_list,
    }[name]
    losses = LOSSES[name](replace(ragged(), relevance=relevance), config_with(nca_alpha=0.8))
    assert_by_hand(losses, [by_hand([w, *rs], s) for (w, rs), s in zip(R, graded, strict=True)])


def several_chosen() -> Scores:
    """Three rows of two prompts: r = (1.2, 0.4) against (0.2, -0.7), and r = -0.3 against 0.5."""
    answers = Answers(
        logratios=torch.tensor([[1.2, 0.4, 0.2, -0.7], [-0.3, 0.5, 99.0, -99.0]], dtype=torch.float64),
        mask=torch.tensor([[True] * 4, [True, True, False, False]]),
        chosen=torch.tensor([[True, True, False, False], [True, False, False, False]]),
        relevance=torch.tensor([[1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 99.0, 99.0]], dtype=torch.float64),
    )
    rows = make_scores([1.2, 0.4, -0.3], [[0.2, -0.7], [0.2, -0.7], [0.5, 99.0]], [[True] * 2] * 2 + [[True, False]])
    return replace(rows, several=answers)


@pytest.mark.parametrize("name", sorted(LIST_LOSSES))
def test_several_chosen_by_hand(name):
    first, second = [1.2, 0.4, 0.2, -0.7], [-0.3, 0.5]
    total = [math.log(sum(math.exp(0.5 * r) for r in rs)) for rs in (first, second)]
    expected = {
        "mult_dpo": [-0.5 * (1.2 + 0.4) + 2 * total[0], -0.5 * -0.3 + total[1]],
        "infonca": [-0.5 * (1.2 + 0.4) / 2 + total[0], -0.5 * -0.3 + total[1]],
        "nca": [nca_list(first, [0.5, 0.5, 0, 0]), nca_list(second, [1, 0])],
        "lipo": [lipo_list(first, [1, 1, 0, 0]), lipo_list(second, [1, 0])],
    }[name]
    assert_by_hand(LOSSES[name](several_chosen(), CONFIG), expected)


@pytest.mark.parametrize(("places", "counted"), [(None, 3), (1, 1), (2, 2), (3, 3), (9, 3)])
def test_places_of_a_ranking_by_hand(places, counted):
    """An answer that is not selected leaves no gap: the one behind it takes its place."""
    scores = make_scores([0.3], [[99.0, -0.2, 0.9]], mask=[[False, True, True]])
    losses = plackett_luce(scores, config_with(plackett_luce_places=places))
    assert_by_hand(losses, [ranking([0.3, -0.2, 0.9], counted)])


def test_lipo_has_a_gradient_where_all_log_ratios_are_equal():
    """As at the start of training: ranks 1, 2, 3 in the order given, log σ(0) = -log 2 with slope 1/2."""
    scores = make_scores([0.0], [[0.0, 0.0]])
    losses = lipo(scores, CONFIG)
    losses.sum().backward()
    weights = [1 / math.log(2) - 1 / math.log(3), 1 / math.log(2) - 1 / math.log(4)]
    assert_by_hand(losses, [sum(weights) * math.log(2)])
    assert_by_hand(scores.rejected_logps.grad, [[0.5 * 0.5 * weight for weight in weights]])


def test_lipo_holds_relevance_of_fifty():
    """In float32: 2^50 (1/log 2 - 1/log 3) log 2."""
    scores = in_float32(replace(make_scores([0.0], [[0.0]]), relevance=torch.tensor([[50.0, 0.0]])))
    assert lipo(scores, CONFIG).item() == pytest.approx(2**50 * (1 - math.log(2) / math.log(3)), rel=1e-5)


def test_sets_say_what_the_losses_do():
    scores, factors = ragged(), torch.full((2, 3), 0.7, dtype=torch.float64)
    relevance = torch.tensor([[3.0, 1.0, 0.0, 2.5], [1.0, 2.0, 9.0, 9.0]], dtype=torch.float64)

    def changed(other, config=CONFIG):
        return {n for n, loss in LOSSES.items() if not torch.allclose(loss(scores, CONFIG), loss(other, config))}

    assert changed(replace(scores, beta_factors=factors)) | {"sft"} == DYNAMIC_BETA_LOSSES
    assert changed(replace(scores, relevance=relevance)) == GRADED_LOSSES
    assert LOSSES.keys() - changed(replace(scores, weights=factors)) == PAIRLESS_LOSSES
    assert {name for name, loss in LOSSES.items() if len(loss(several_chosen(), CONFIG)) == 2} == LIST_LOSSES
    assert changed(scores, config_with(f_divergence_type="js_divergence")) | {"sft"} == F_DIVERGENCE_LOSSES
    # Without a reference there is no zero to compare a reward with, only other rewards
    lengths = {"chosen_lengths": torch.tensor([2, 2])}
    shifted = replace(scores, chosen_logps=scores.chosen_logps + 3, rejected_logps=scores.rejected_logps + 3)
    scores, shifted = replace(scores, **lengths), replace(shifted, **lengths)
    assert LOSSES.keys() - changed(shifted) - {"aot", "aot_unpaired"} == REFERENCE_FREE_LOSSES


@pytest.mark.parametrize("name", sorted(DYNAMIC_BETA_LOSSES))
def test_factors_of_beta_by_hand(name):
    """β_i in the place of β: within the mean or the sum of `dmpo` and `sdpo`, else in the loss of each pair."""
    factors = [[0.5, 1.5, 1.2], [0.8]]
    products = [
        [0.5 * f * (w - r) for f, r in zip(fs, rs, strict=True)] for fs, (w, rs) in zip(factors, R, strict=True)
    ]

    def pair(f, w, r):
        return LOSSES[name](make_scores([w], [[r]]), config_with(beta=0.5 * f)).item()

    expected = {
        "dmpo": [-log_sigmoid(sum(x) / len(x)) for x in products],
        "sdpo": [math.log(1 + sum(math.exp(-v) for v in x)) for x in products],
    }.get(name) or [
        sum(pair(f, w, r) for f, r in zip(fs, rs, strict=True)) / len(rs)
        for fs, (w, rs) in zip(factors, R, strict=True)
    ]
    padded = torch.tensor([factors[0], [0.8, 99.0, 99.0]], dtype=torch.float64)
    assert_by_hand(LOSSES[name](replace(ragged(), beta_factors=padded), CONFIG), expected)


@pytest.mark.parametrize("name", sorted(LOSSES.keys() - {"sft"}))
def test_nothing_flows_into_padding(name):
    scores = ragged()
    LOSSES[name](scores, CONFIG).sum().backward()
    assert scores.rejected_logps.grad[0].abs().sum() > 0
    assert scores.rejected_logps.grad[1, 1:].abs().max() == 0


@pytest.mark.parametrize("name", sorted(LOSSES.keys() - {"plackett_luce"}))  # there it is what they are ranked by
def test_order_of_negatives_does_not_matter(name):
    scores = make_scores([1.2, -0.3], [[0.2, -0.4, 0.7], [0.5, 0.1, -0.9]], rejected_lengths=[[2, 3, 5], [1, 2, 9]])
    order = torch.tensor([2, 0, 1])
    shuffled = replace(
        scores,
        **{n: getattr(scores, n)[:, order] for n in ("rejected_logps", "ref_rejected_logps", "rejected_lengths")},
    )
    torch.testing.assert_close(LOSSES[name](scores, CONFIG), LOSSES[name](shuffled, CONFIG), rtol=1e-12, atol=1e-12)


def in_float32(scores: Scores) -> Scores:
    values = {
        name: value for name, value in vars(scores).items() if torch.is_tensor(value) and value.is_floating_point()
    }
    leaves = {name: value.detach().float().requires_grad_(value.requires_grad) for name, value in values.items()}
    return replace(scores, **leaves)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("padding", [0.0, 1e30, -1e30])
def test_finite_at_log_ratios_of_ten_thousand(name, sign, dtype, padding):
    """Of both signs, at once, with anything where there is no answer."""
    scores = make_scores(
        [1e4 * sign, 0.0],
        [[-1e4 * sign, 1e4 * sign, 0.0], [1e4 * sign, *[padding] * 2]],
        [[True] * 3, [True, False, False]],
    )
    if name in GRADED_LOSSES:
        scores = replace(
            scores, relevance=torch.tensor([[10.0, 0.0, 1.0, 50.0], [0.0, 5.0, padding, padding]]).double()
        )
    if dtype == torch.float32:
        scores = in_float32(scores)
    losses = LOSSES[name](scores, config_with(beta=1.0))
    assert losses.dtype == dtype
    assert torch.isfinite(losses).all()
    if name != "sft":
        losses.sum().backward()
        assert torch.isfinite(scores.chosen_logps.grad).all()
        assert torch.isfinite(scores.rejected_logps.grad).all()
        assert scores.rejected_logps.grad[1, 1:].abs().max() == 0


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
    config = config_with(f_divergence_type=kind)
    losses = LOSSES[name](ragged(), config)
    # alpha-divergences go through float32, as TRL's do
    torch.testing.assert_close(losses, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-6)
    assert name in F_DIVERGENCE_LOSSES


# TRL refuses `aot` and `aot_unpaired`, the configuration those without pairs
@pytest.mark.parametrize("name", sorted(LOSSES.keys() - PAIRLESS_LOSSES - {"aot", "aot_unpaired"}))
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
        torch.testing.assert_close(LOSSES["infonca"](scores, CONFIG), pairwise)
        torch.testing.assert_close(LOSSES["nca"](scores, CONFIG), LOSSES["nca_pair"](scores, CONFIG))
        torch.testing.assert_close(lipo(scores, CONFIG), pairwise * (1 / math.log(2) - 1 / math.log(3)))
    # One chosen answer against all others, whatever the family it comes from
    torch.testing.assert_close(LOSSES["mult_dpo"](scores, CONFIG), soft)
    torch.testing.assert_close(LOSSES["infonca"](scores, CONFIG), soft)
    torch.testing.assert_close(plackett_luce(scores, config_with(plackett_luce_places=1)), soft)
    # Jensen, and a sum of exponentials is at least each of them
    assert joint.item() <= pairwise.item() + 1e-9
    assert soft.item() >= pairwise.item() - 1e-9
    # The reward of all answers may be shifted by the same amount
    shifted = make_scores([chosen + 3], [[r + 3 for r in rejected]])
    torch.testing.assert_close(dmpo(shifted, CONFIG), joint)
    torch.testing.assert_close(sdpo(shifted, CONFIG), soft)
