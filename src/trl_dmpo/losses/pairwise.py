"""
The losses of TRL's [`~trl.DPOTrainer`], with the meaning: mean over the K pairs (chosen, rejected_i).

Each function here takes [`Scores`] and the [`DMPOConfig`] and returns a tensor of shape (B, K), one value a pair;
[`over_pairs`] makes losses of prompts of them, of shape (B,). With one rejected completion these are TRL's own, which the tests check for every one of them.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from .scores import Scores, divergence_scores, margins


Loss = Callable[[Scores, Any], torch.Tensor]


def over_pairs(loss: Loss) -> Loss:
    """Turn a loss of pairs, of shape (B, K), into one of prompts, of shape (B,): the mean over their pairs."""

    @functools.wraps(loss)
    def mean(scores: Scores, config: Any) -> torch.Tensor:
        losses = loss(scores, config)
        return scores.mean(losses if scores.weights is None else losses * scores.weights)

    return mean


def sigmoid(scores: Scores, config: Any) -> torch.Tensor:
    """-log σ(β Δ), Δ the margin. Equation 7 of [DPO](https://huggingface.co/papers/2305.18290)."""
    return -F.logsigmoid(config.beta * margins(scores, config))


def hinge(scores: Scores, config: Any) -> torch.Tensor:
    """max(0, 1 - β Δ). [SLiC-HF](https://huggingface.co/papers/2305.10425), normalized as by [RSO](https://huggingface.co/papers/2309.06657)."""
    return torch.relu(1 - config.beta * margins(scores, config))


def _length_normalized_margins(scores: Scores, config: Any) -> torch.Tensor:
    chosen, rejected = divergence_scores(scores, config)
    return chosen / scores.chosen_lengths.clamp(min=1).unsqueeze(1) - rejected / scores.rejected_lengths.clamp(min=1)


def ipo(scores: Scores, config: Any) -> torch.Tensor:
    """(Δ - 1/(2β))², Δ of means over tokens. Equation 17 of [IPO](https://huggingface.co/papers/2310.12036), β its τ."""
    return (_length_normalized_margins(scores, config) - 1 / (2 * config.beta)) ** 2


def sigmoid_norm(scores: Scores, config: Any) -> torch.Tensor:
    """-log σ(β Δ), Δ of means over tokens, as [Tulu 3](https://huggingface.co/papers/2411.15124) normalizes DPO."""
    return -F.logsigmoid(config.beta * _length_normalized_margins(scores, config))


def exo_pair(scores: Scores, config: Any) -> torch.Tensor:
    """KL(p_θ ‖ [1-ε, ε]), ε the label smoothing. Equation 16 of [EXO](https://huggingface.co/papers/2402.00856)."""
    logits = config.beta * margins(scores, config)
    log_win, log_loss = F.logsigmoid(logits), F.logsigmoid(-logits)
    epsilon = config.label_smoothing
    return log_win.exp() * (log_win - math.log1p(-epsilon)) + log_loss.exp() * (log_loss - math.log(epsilon))


def nca_pair(scores: Scores, config: Any) -> torch.Tensor:
    """-log σ(β r_w) - ½ log σ(-β r_w) - ½ log σ(-β r_i). [NCA](https://huggingface.co/papers/2402.05369)."""
    chosen, rejected = config.beta * scores.chosen_logratios, config.beta * scores.rejected_logratios
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def robust(scores: Scores, config: Any) -> torch.Tensor:
    """Unbiased under labels flipped with probability ε, the label smoothing. [Robust DPO](https://huggingface.co/papers/2403.00409)."""
    logits, epsilon = config.beta * margins(scores, config), config.label_smoothing
    return (-(1 - epsilon) * F.logsigmoid(logits) + epsilon * F.logsigmoid(-logits)) / (1 - 2 * epsilon)


def bco_pair(scores: Scores, config: Any) -> torch.Tensor:
    """-log σ(β r_w) - log σ(-β r_i). [BCO](https://huggingface.co/papers/2404.04656), without its reward shift."""
    return -F.logsigmoid(config.beta * scores.chosen_logratios) - F.logsigmoid(
        -config.beta * scores.rejected_logratios
    )


def sppo_hard(scores: Scores, config: Any) -> torch.Tensor:
    """(r_w - 1/(2β))² + (r_i + 1/(2β))². Equation 4.7 of [SPPO](https://huggingface.co/papers/2405.00675), hard labels."""
    return (scores.chosen_logratios - 0.5 / config.beta) ** 2 + (scores.rejected_logratios + 0.5 / config.beta) ** 2


def apo_zero(scores: Scores, config: Any) -> torch.Tensor:
    """1 - σ(β r_w) + σ(β r_i). Equation 7 of [APO](https://huggingface.co/papers/2408.06266)."""
    return (
        1
        - torch.sigmoid(config.beta * scores.chosen_logratios)
        + torch.sigmoid(config.beta * scores.rejected_logratios)
    )


def apo_down(scores: Scores, config: Any) -> torch.Tensor:
    """σ(β r_w) + 1 - σ(β (r_w - r_i)). Equation 8 of [APO](https://huggingface.co/papers/2408.06266)."""
    logratios = scores.chosen_logratios - scores.rejected_logratios
    return torch.sigmoid(config.beta * scores.chosen_logratios) + 1 - torch.sigmoid(config.beta * logratios)


def discopop(scores: Scores, config: Any) -> torch.Tensor:
    """A blend of logistic and exponential loss. Equation 5 of [DiscoPOP](https://huggingface.co/papers/2406.08414)."""
    logits = config.beta * margins(scores, config)
    scaled = logits / config.discopop_tau
    # The product of e^-x and the share of the exponential loss, of which the first alone would overflow
    return -F.logsigmoid(logits) * torch.sigmoid(-scaled) + torch.exp(F.logsigmoid(scaled) - logits)


def _transport(left: torch.Tensor, right: torch.Tensor, scores: Scores, config: Any) -> torch.Tensor:
    """Loss of the differences of two sorted samples of shape (B, K); each pair gets the mean over the batch."""
    valid = scores.rejected_mask.flatten()
    behind = torch.arange(valid.numel(), device=valid.device) >= valid.sum()

    def ordered(values: torch.Tensor) -> torch.Tensor:
        values = values.expand_as(scores.rejected_mask).flatten().masked_fill(~valid, torch.inf)
        return values.sort().values.masked_fill(behind, 0)

    logits, epsilon = config.beta * (ordered(left) - ordered(right)), config.label_smoothing
    losses = -(1 - epsilon) * F.logsigmoid(logits) - epsilon * F.logsigmoid(-logits)
    return (losses.masked_fill(behind, 0).sum() / valid.sum()).expand_as(scores.rejected_mask)


def aot(scores: Scores, config: Any) -> torch.Tensor:
    """Margins of the policy against those of the reference, both sorted over all pairs of the batch. [AOT](https://huggingface.co/papers/2406.05882)."""
    chosen, ref_chosen = (
        x if x.dim() == 2 else x.unsqueeze(1) for x in (scores.chosen_logps, scores.ref_chosen_logps)
    )
    return _transport(chosen - scores.rejected_logps, ref_chosen - scores.ref_rejected_logps, scores, config)


def aot_unpaired(scores: Scores, config: Any) -> torch.Tensor:
    """Log-ratios of the chosen against those of the rejected, both sorted over all pairs of the batch. [AOT](https://huggingface.co/papers/2406.05882)."""
    return _transport(scores.chosen_logratios, scores.rejected_logratios, scores, config)


PAIRWISE_LOSSES: dict[str, Loss] = {
    loss.__name__: over_pairs(loss)
    for loss in (
        sigmoid,
        hinge,
        ipo,
        exo_pair,
        nca_pair,
        robust,
        bco_pair,
        sppo_hard,
        aot,
        aot_unpaired,
        apo_zero,
        apo_down,
        discopop,
        sigmoid_norm,
    )
}
