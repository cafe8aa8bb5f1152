"""
Direct Multi-Preference Optimization for TRL: one chosen answer against K rejected ones, for about the price of one pair.

Nothing is imported until a name is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING


__version__ = "0.1.0"

_EXPORTS = {
    "DMPOConfig": "trainer.dmpo_config",
    "DMPOTrainer": "trainer.dmpo_trainer",
    "DataCollatorForMultiPreference": "trainer.collator",
    "LOSSES": "losses",
    "Recommender": "ranking.recommender",
    "Scorer": "ranking.scorer",
    "Scores": "losses",
}

__all__ = [
    "LOSSES",
    "DMPOConfig",
    "DMPOTrainer",
    "DataCollatorForMultiPreference",
    "Recommender",
    "Scorer",
    "Scores",
    "__version__",
]

if TYPE_CHECKING:
    from .losses import LOSSES, Scores
    from .ranking.recommender import Recommender
    from .ranking.scorer import Scorer
    from .trainer.collator import DataCollatorForMultiPreference
    from .trainer.dmpo_config import DMPOConfig
    from .trainer.dmpo_trainer import DMPOTrainer


def __getattr__(name: str) -> object:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
