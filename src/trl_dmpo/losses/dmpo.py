"""Direct Multi-Preference Optimization."""

from typing import Any

import torch
import torch.nn.functional as F

from .scores import Scores, margins


def dmpo(scores: Scores, config: Any) -> torch.Tensor:
    r"""
    The loss of DMPO: the chosen completion against the mean of the rejected ones.

    $$
    \mathcal{L} = -\log \sigma\Big( \beta \log \frac{\pi_\theta(y_w|x)}{\pi_{ref}(y_w|x)}
    - \frac{1}{K} \sum_{i=1}^{K} \beta \log \frac{\pi_\theta(y_i|x)}{\pi_{ref}(y_i|x)} \Big)
    $$

    The objective of DMPO in
    [Finetuning Large Language Model for Personalized Ranking](https://huggingface.co/papers/2405.16127).

    Only the difference counts: the likelihood of the chosen completion may fall as long as that of the rejected ones falls
    faster. The code released with the paper adds the loss `sft` with weight 1 to hold it up.

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
    >>> from trl_dmpo.losses import Scores, dmpo

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
    >>> dmpo(scores, DMPOConfig(beta=1.0, bf16=False))  # r_w = 1, r_1 = 0, r_2 = -1: -log sigmoid(1 + 1/2)
    tensor([0.2014])
    ```
    """
    return scores.weighted(-F.logsigmoid(config.beta * scores.mean(margins(scores, config))))
