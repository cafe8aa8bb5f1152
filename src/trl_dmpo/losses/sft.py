"""Supervised fine-tuning on the chosen completion, as a term of a mixture."""

from typing import Any

import torch

from .scores import Scores


def sft(scores: Scores, config: Any) -> torch.Tensor:
    r"""
    Negative log-likelihood of the chosen completions, counted once whatever the number of rejected ones.

    The mean over all their tokens in the batch, as TRL has it, repeated for each prompt. The code released with
    [DMPO](https://huggingface.co/papers/2405.16127) adds it with weight 1.

    Args:
        scores ([`Scores`]):
            Log-probabilities of B prompts.
        config ([`DMPOConfig`]):
            Not used.

    Returns:
        `torch.Tensor` of shape (B,).
    """
    return scores.weighted(scores.chosen_nll.expand(len(scores.rejected_mask)))
