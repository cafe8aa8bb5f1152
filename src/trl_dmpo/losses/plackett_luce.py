"""DPO with the model of Plackett and Luce, for rejected answers in order of preference."""

from typing import Any

import torch
import torch.nn.functional as F

from .scores import Scores


def plackett_luce(scores: Scores, config: Any) -> torch.Tensor:
    r"""
    The likelihood of a ranking: the chosen answer first, then the rejected ones in the order in which the row has them.

    $$
    \mathcal{L} = -\sum_{p=1}^{n} \log \frac{e^{\beta r_p}}{\sum_{q \geq p} e^{\beta r_q}}
    $$

    with r = log π_θ/π_ref of the answer in place p, and n the number of places that count. DPO under the Plackett-Luce
    model, appendix A.3 of [DPO](https://huggingface.co/papers/2305.18290), from which
    [S-DPO](https://huggingface.co/papers/2406.09215) derives its objective.

    With n = 1 it is `sdpo`; with one rejected answer, DPO. The last place of all has a term of 0: nothing is left to choose.

    Args:
        scores ([`Scores`]):
            Log-probabilities of B prompts with up to K rejected completions, the preferred ones first. Those that are
            masked out have no place.
        config ([`DMPOConfig`]):
            `beta` and `plackett_luce_places` are used. All places count if the latter is `None` or more than there are.

    Returns:
        `torch.Tensor` of shape (B,).

    Example:

    ```python
    >>> import torch
    >>> from trl_dmpo import DMPOConfig
    >>> from trl_dmpo.losses import Scores, plackett_luce

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
    >>> # r = (1, 0, -1): log(1 + e^-1 + e^-2) + log(1 + e^-1)
    >>> plackett_luce(scores, DMPOConfig(beta=1.0, bf16=False))
    tensor([0.7209])
    >>> plackett_luce(scores, DMPOConfig(beta=1.0, plackett_luce_places=1, bf16=False))
    tensor([0.4076])
    ```
    """
    rewards = config.beta * torch.cat([scores.chosen_logratios, scores.rejected_logratios], dim=1)
    mask = F.pad(scores.rejected_mask, (1, 0), value=True)
    not_before = mask.unsqueeze(1).expand(-1, mask.size(1), -1).triu()
    rivals = rewards.unsqueeze(1).masked_fill(~not_before, -torch.inf).logsumexp(dim=2)
    counted = mask
    if config.plackett_luce_places is not None:
        counted = mask & (mask.cumsum(1) <= config.plackett_luce_places)
    return (rivals - rewards).masked_fill(~counted, 0).sum(1)
