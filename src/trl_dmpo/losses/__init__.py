"""
The losses. Each is a pure function of [`Scores`] and a configuration that returns one value a prompt.

To add one: a file here, a line in `LOSSES`, a row in the tests' matrix, a line in `docs/losses.md`.
"""

from .dmpo import dmpo
from .pairwise import PAIRWISE_LOSSES, Loss, over_pairs
from .scores import Scores, divergence_scores, margins
from .sdpo import sdpo
from .sft import sft


LOSSES: dict[str, Loss] = {"dmpo": dmpo, "sdpo": sdpo, "sft": sft, **PAIRWISE_LOSSES}

# The term β log Z(x) of f-DPO cancels only where the loss is a function of margins
F_DIVERGENCE_LOSSES = frozenset(
    {"dmpo", "sdpo", "sft", "sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop"}
)

__all__ = [
    "F_DIVERGENCE_LOSSES",
    "LOSSES",
    "Loss",
    "Scores",
    "divergence_scores",
    "dmpo",
    "margins",
    "over_pairs",
    "sdpo",
    "sft",
]
