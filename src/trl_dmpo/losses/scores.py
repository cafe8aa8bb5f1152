"""What every loss sees."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F


class Answers(NamedTuple):
    """
    All completions of N prompts in one list each, the chosen ones first, for losses that do not compare pairs.

    Args:
        logratios (`torch.Tensor`):
            r(x, y) = log π_θ(y|x) - log π_ref(y|x), of shape (N, A). Finite and without meaning where `mask` is `False`.
        mask (`torch.Tensor`):
            Which completions there are, bool of shape (N, A).
        chosen (`torch.Tensor`):
            Which of them are chosen, bool of shape (N, A), at least one in each row.
        relevance (`torch.Tensor`):
            How good each of them is, of shape (N, A): the column `relevance`, or 1 for the chosen and 0 for the others.
    """

    logratios: torch.Tensor
    mask: torch.Tensor
    chosen: torch.Tensor
    relevance: torch.Tensor


def make_answers(
    logratios: torch.Tensor, mask: torch.Tensor, num_chosen: int, relevance: torch.Tensor | None
) -> Answers:
    """[`Answers`] of which the first `num_chosen` places are for chosen completions; with a relevance of 1 and 0 if `None`."""
    chosen = mask.clone()
    chosen[:, num_chosen:] = False
    return Answers(logratios, mask, chosen, chosen.to(logratios) if relevance is None else relevance)


@dataclass(frozen=True)
class Scores:
    r"""
    Log-probabilities of B chosen completions, each with up to K rejected completions of its prompt.

    All tensors are floating point and in nats, but for the lengths (tokens) and the mask. Where a prompt has fewer than
    K rejected completions, `rejected_mask` is `False` and the values of `rejected_*` are finite and without meaning. A
    prompt with several chosen completions has a row for each of them, and `answers` has all of them in one.

    Args:
        chosen_logps (`torch.Tensor`):
            log π_θ(y_w|x), summed over tokens. Shape (B,), or (B, K) under `ld_alpha`, where the weight of a token of the
            chosen completion depends on the length of the rejected one that it is compared with.
        rejected_logps (`torch.Tensor`):
            log π_θ(y_i|x), summed over tokens, of shape (B, K).
        ref_chosen_logps (`torch.Tensor`):
            log π_ref(y_w|x), of the shape of `chosen_logps`.
        ref_rejected_logps (`torch.Tensor`):
            log π_ref(y_i|x), of shape (B, K).
        chosen_lengths (`torch.Tensor`):
            Number of tokens of each chosen completion, of shape (B,).
        rejected_lengths (`torch.Tensor`):
            Number of tokens of each rejected completion, of shape (B, K).
        rejected_mask (`torch.Tensor`):
            Which rejected completions count, bool of shape (B, K), at least one in each row: those that there are and
            that `negative_selection` has selected.
        chosen_nll (`torch.Tensor`):
            Mean of -log π_θ over the tokens of all chosen completions, a scalar.
        weights (`torch.Tensor`, *optional*):
            Weight of each pair under `use_weighting`, of shape (B, K), detached.
        beta_factors (`torch.Tensor`, *optional*):
            β_i / β of each pair under `dynamic_beta`, of shape (B, K), detached. [`margins`] are multiplied with it.
        relevance (`torch.Tensor`, *optional*):
            Relevance of the chosen and the rejected completions, of shape (B, 1 + K), where a loss that is named reads it.
        several (`Answers`, *optional*):
            Where a prompt of the batch has several chosen completions: all completions of its N prompts.

    Example:

    ```python
    >>> import torch
    >>> from trl_dmpo.losses import Scores

    >>> scores = Scores(
    ...     chosen_logps=torch.tensor([-4.0]),
    ...     rejected_logps=torch.tensor([[-5.0, -6.0]]),
    ...     ref_chosen_logps=torch.tensor([-5.0]),
    ...     ref_rejected_logps=torch.tensor([[-5.0, -5.0]]),
    ...     chosen_lengths=torch.tensor([2]),
    ...     rejected_lengths=torch.tensor([[2, 3]]),
    ...     rejected_mask=torch.tensor([[True, True]]),
    ...     chosen_nll=torch.tensor(2.0),
    ... )
    >>> scores.chosen_logratios - scores.rejected_logratios
    tensor([[1., 2.]])
    ```
    """

    chosen_logps: torch.Tensor
    rejected_logps: torch.Tensor
    ref_chosen_logps: torch.Tensor
    ref_rejected_logps: torch.Tensor
    chosen_lengths: torch.Tensor
    rejected_lengths: torch.Tensor
    rejected_mask: torch.Tensor
    chosen_nll: torch.Tensor
    weights: torch.Tensor | None = None
    beta_factors: torch.Tensor | None = None
    relevance: torch.Tensor | None = None
    several: Answers | None = None

    @property
    def answers(self) -> Answers:
        """All completions of each prompt in one list, the chosen first. Not defined under `ld_alpha`."""
        if self.several is not None:
            return self.several
        logratios = torch.cat([self.chosen_logratios, self.rejected_logratios], dim=1)
        return make_answers(logratios, F.pad(self.rejected_mask, (1, 0), value=True), 1, self.relevance)

    @property
    def chosen_logratios(self) -> torch.Tensor:
        """r(x, y_w) = log π_θ(y_w|x) - log π_ref(y_w|x), of shape (B, 1), or (B, K) under `ld_alpha`."""
        logratios = self.chosen_logps - self.ref_chosen_logps
        return logratios if logratios.dim() == 2 else logratios.unsqueeze(1)

    @property
    def rejected_logratios(self) -> torch.Tensor:
        """r(x, y_i) = log π_θ(y_i|x) - log π_ref(y_i|x), of shape (B, K)."""
        return self.rejected_logps - self.ref_rejected_logps

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Mean of `values` (B, K), or (B, 1), over the rejected completions that there are, of shape (B,)."""
        mask = self.rejected_mask
        return values.expand_as(mask).masked_fill(~mask, 0).sum(1) / mask.sum(1)

    def per_chosen(self, values: torch.Tensor) -> torch.Tensor:
        """`values` (B,), or (B, K) under `ld_alpha`, as one value a chosen completion."""
        return values if values.dim() == 1 else self.mean(values)

    def weighted(self, losses: torch.Tensor) -> torch.Tensor:
        """`losses` (B,) times the mean weight of the pairs of each prompt, if there are weights."""
        return losses if self.weights is None else losses * self.mean(self.weights)


def margins(scores: Scores, config: Any) -> torch.Tensor:
    """
    How much more the policy has come to prefer the chosen completion than each rejected one, of shape (B, K).

    Args:
        scores ([`Scores`]):
            Log-probabilities.
        config ([`DMPOConfig`]):
            `f_divergence_type` and `f_alpha_divergence_coef` are used.

    Returns:
        `torch.Tensor` of shape (B, K): f'(u_w) - f'(u_i), with u the ratio of policy to reference. For the reverse KL
        divergence of DPO, r(x, y_w) - r(x, y_i). Under `dynamic_beta`, times β_i / β.
    """
    chosen, rejected = divergence_scores(scores, config)
    return chosen - rejected if scores.beta_factors is None else (chosen - rejected) * scores.beta_factors


def divergence_scores(scores: Scores, config: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The two terms of [`margins`], without the factors of `dynamic_beta`: f'(u_w) of shape (B, 1) or (B, K), and f'(u_i) of shape (B, K)."""
    return _divergence(scores.chosen_logratios, config), _divergence(scores.rejected_logratios, config)


def _divergence(logratios: torch.Tensor, config: Any) -> torch.Tensor:
    """f'(u) at u = exp(logratios), Table 1 of f-DPO (https://huggingface.co/papers/2309.16240), up to a constant."""
    kind, alpha = config.f_divergence_type, config.f_alpha_divergence_coef
    if kind == "forward_kl":
        return 1 - torch.exp(-logratios)
    if kind == "js_divergence":
        return math.log(2) + F.logsigmoid(logratios)
    if kind == "alpha_divergence" and abs(alpha - 1) >= 1e-6:
        # Beyond e^80 (e^11 in half precision) the ratio has no representation; TRL clamps there as well
        limit = 11.0 if logratios.dtype == torch.float16 else 80.0
        exponent = ((alpha - 1) * logratios.float()).clamp(max=limit)
        return (torch.expm1(exponent) / (alpha - 1)).to(logratios.dtype)
    return logratios
