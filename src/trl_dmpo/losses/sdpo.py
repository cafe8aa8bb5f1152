"""Softmax-DPO."""

from typing import Any

import torch
import torch.nn.functional as F

from .scores import Scores, margins


def sdpo(scores: Scores, config: Any) -> torch.Tensor:
    r"""
    The loss of S-DPO: the chosen completion against a soft maximum of the rejected ones.

    $$
    \mathcal{L} = -\log \sigma\Big( -\log \sum_{i=1}^{K} \exp\big( \beta \log \frac{\pi_\theta(y_i|x)}{\pi_{ref}(y_i|x)}
    - \beta \log \frac{\pi_\theta(y_w|x)}{\pi_{ref}(y_w|x)} \big) \Big)
    $$

    The objective of S-DPO with one chosen item, in
    [On Softmax Direct Preference Optimization for Recommendation](https://huggingface.co/papers/2406.09215). Its gradient is dominated by the rejected completions that the policy still prefers.

    Args:
        scores ([`Scores`]):
            Log-probabilities of B prompts with up to K rejected completions.
        config ([`DMPOConfig`]):
            `beta`, and the f-divergence, are used.

    Returns:
        `torch.Tensor` of shape (B,).

    Example:

    ```python
    >>> import torch
    >>> from trl_dmpo import DMPOConfig
    >>> from trl_dmpo.losses import Scores, sdpo

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
    >>> sdpo(scores, DMPOConfig(beta=1.0, bf16=False))  # r_w = 1, r_1 = 0, r_2 = -1: log(1 + e^-1 + e^-2)
    tensor([0.4076])
    ```
    """
    exponents = (-config.beta * margins(scores, config)).masked_fill(~scores.rejected_mask, -torch.inf)
    return scores.weighted(-F.logsigmoid(-torch.logsumexp(exponents, dim=1)))
