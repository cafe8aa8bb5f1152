"""Multinomial DPO, for several chosen answers."""

from typing import Any

import torch

from .scores import Scores


def mult_dpo(scores: Scores, config: Any) -> torch.Tensor:
    r"""
    The loss of Mult-DPO: several chosen answers, in no order among themselves, against all answers of the prompt.

    $$
    \mathcal{L} = -\sum_{w} \beta r_w + W \log \sum_{i} e^{\beta r_i}
    $$

    with w over the W chosen answers, i over all answers of the prompt, and r = log π_θ/π_ref. The objective of
    [Mult-DPO](https://huggingface.co/papers/2606.10078). It bounds from above -log of the likelihood that the chosen answers
    take the first W places in any order, under the model of `plackett_luce`, where the sum over orders is out of reach.

    With one chosen answer it is `sdpo`.

    Args:
        scores ([`Scores`]):
            Log-probabilities of all answers of N prompts, and which of them are chosen.
        config ([`DMPOConfig`]):
            `beta` is used.

    Returns:
        `torch.Tensor` of shape (N,).

    Example:

    ```python
    >>> import torch
    >>> from trl_dmpo import DMPOConfig
    >>> from trl_dmpo.losses import Scores, mult_dpo

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
    >>> mult_dpo(scores, DMPOConfig(beta=1.0, bf16=False))  # r_w = 1, r_1 = 0, r_2 = -1: log(1 + e^-1 + e^-2)
    tensor([0.4076])
    ```
    """
    answers = scores.answers
    log_shares = (config.beta * answers.logratios).masked_fill(~answers.mask, -torch.inf).log_softmax(dim=1)
    return -log_shares.masked_fill(~answers.chosen, 0).sum(1)
