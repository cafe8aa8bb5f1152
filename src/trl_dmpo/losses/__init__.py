"""
The losses. Each is a pure function of [`Scores`] and a configuration that returns one value a prompt.

To add one: a file here, a line in `LOSSES`, a row in the tests' matrix, a line in `docs/losses.md`.
"""

from .dmpo import dmpo
from .infonca import infonca
from .lipo import lipo
from .mult_dpo import mult_dpo
from .nca import nca
from .pairwise import PAIRWISE_LOSSES, Loss, over_pairs
from .plackett_luce import plackett_luce
from .scores import Answers, Scores, divergence_scores, margins
from .sdpo import sdpo
from .sft import sft


LOSSES: dict[str, Loss] = {
    "dmpo": dmpo,
    "sdpo": sdpo,
    "infonca": infonca,
    "nca": nca,
    "plackett_luce": plackett_luce,
    "lipo": lipo,
    "mult_dpo": mult_dpo,
    "sft": sft,
    **PAIRWISE_LOSSES,
}

# The term β log Z(x) of f-DPO cancels only where the loss is a function of margins
F_DIVERGENCE_LOSSES = frozenset(
    {"dmpo", "sdpo", "sft", "sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop"}
)

# Take all answers of a prompt at once, several chosen ones included; the others take each chosen one in turn, averaged
LIST_LOSSES = frozenset({"infonca", "nca", "lipo", "mult_dpo"})

# In which the loss of a prompt depends on the other prompts of the batch
BATCH_LOSSES = frozenset({"aot", "aot_unpaired"})

# Not of one chosen answer and each rejected one, so that `ld_alpha` and `use_weighting` have no meaning
PAIRLESS_LOSSES = LIST_LOSSES | {"plackett_luce"}

# Use the column `relevance`
GRADED_LOSSES = frozenset({"infonca", "nca", "lipo"})

# Functions of `margins`, which `dynamic_beta` scales; `sft` has none
DYNAMIC_BETA_LOSSES = frozenset({"dmpo", "sdpo", "sft", "sigmoid", "hinge", "exo_pair", "robust", "discopop"})

# The others ask of each reward by itself whether it is above zero, or compare with the distribution of the reference
REFERENCE_FREE_LOSSES = frozenset(LOSSES) - {
    "nca",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "aot",
    "aot_unpaired",
}

__all__ = [
    "BATCH_LOSSES",
    "DYNAMIC_BETA_LOSSES",
    "F_DIVERGENCE_LOSSES",
    "GRADED_LOSSES",
    "LIST_LOSSES",
    "LOSSES",
    "PAIRLESS_LOSSES",
    "REFERENCE_FREE_LOSSES",
    "Answers",
    "Loss",
    "Scores",
    "divergence_scores",
    "dmpo",
    "infonca",
    "lipo",
    "margins",
    "mult_dpo",
    "nca",
    "over_pairs",
    "plackett_luce",
    "sdpo",
    "sft",
]
