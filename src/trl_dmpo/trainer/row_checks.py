"""Whether a row, which keeps the contract, gives the losses what they need."""

from collections.abc import Mapping
from itertools import accumulate
from typing import Any, NamedTuple

from ..data.schema import Problem, as_list, find_relevance_problem, is_several
from ..losses import GRADED_LOSSES


# 2 to the power of it is in the gradient, which clipping and optimizers square, in single precision
_HIGHEST_GRADE = 30


class Needs(NamedTuple):
    """
    What a configuration needs of a row. Not the configuration itself, by which a checked dataset could not be cached.

    Args:
        losses (`tuple[str, ...]`):
            Names of the losses.
        ld_alpha (`float`, *optional*):
            As of [`DMPOConfig`].
        num_hard_negatives (`int`, *optional*):
            As of [`DMPOConfig`].
        plackett_luce_places (`int`, *optional*):
            Places that must be in order. All if `None`.
    """

    losses: tuple[str, ...]
    ld_alpha: float | None = None
    num_hard_negatives: int | None = None
    plackett_luce_places: int | None = None

    @classmethod
    def of(cls, config: Any) -> "Needs":
        """The needs of a [`DMPOConfig`]."""
        losses = tuple(loss for loss in config.loss_type if isinstance(loss, str))
        # Which completions are in the first places, a draw or a selection decides
        takes_all = config.num_negatives is None and config.negative_selection == "all"
        places = config.plackett_luce_places if takes_all else None
        return cls(losses, config.ld_alpha, config.num_hard_negatives, places)

    @property
    def relevance(self) -> bool:
        """Whether a loss reads the column `relevance`."""
        return not GRADED_LOSSES.isdisjoint(self.losses)


def find_loss_problem(row: Mapping[str, Any], needs: Needs) -> Problem | None:
    """Why a row that keeps the contract does not give what is needed, or `None`."""
    if needs.ld_alpha is not None and is_several(row["chosen"]):
        return Problem(
            "list of chosen", "chosen", "`ld_alpha` is for one chosen completion, not for a list; leave it out"
        )
    count = len(as_list(row["rejected"]))
    if needs.num_hard_negatives is not None and count < needs.num_hard_negatives:
        return Problem(
            "too few rejected",
            "rejected",
            f"there are {count}, fewer than `num_hard_negatives={needs.num_hard_negatives}`; give more or lower it",
        )
    is_ranked = "plackett_luce" in needs.losses
    if not is_ranked and not needs.relevance:
        return None
    problem = find_relevance_problem(row, required="lipo" in needs.losses)
    if problem is not None or row.get("relevance") is None:
        return problem
    if "lipo" in needs.losses and max(row["relevance"]) > _HIGHEST_GRADE:
        return Problem(
            "relevance too large",
            "relevance",
            f"`lipo` takes 2 to the power of it, and {max(row['relevance'])} is above {_HIGHEST_GRADE}; use grades, or the "
            "logarithm of counts",
        )
    return _find_disorder(row, needs.plackett_luce_places) if is_ranked else None


def _find_disorder(row: Mapping[str, Any], places: int | None) -> Problem | None:
    """Whether the relevance of each of the first `places` is above that of all that come after it."""
    count = len(as_list(row["chosen"]))
    ranking = [min(row["relevance"][:count]), *row["relevance"][count:]]
    best_after = list(accumulate(reversed(ranking[1:]), max))[::-1]
    for place, (own, after) in enumerate(zip(ranking[:places], best_after, strict=False)):
        if own <= after:
            what = "the chosen completion" if place == 0 else f"rejected entry {place - 1}"
            return Problem(
                "no order",
                "relevance",
                f"`plackett_luce` needs the completions in order of preference, but {what} has {own}, and one after it "
                f"{after}; sort them, or set `plackett_luce_places` to the places that are in order",
            )
    return None
