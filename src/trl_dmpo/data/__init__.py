"""
Recommendation data: from an interaction log, or rows that exist already, to rows with K rejected answers.

Imports neither torch nor transformers, and nothing until a name is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING


_EXPORTS = {
    "BuildConfig": "build_config",
    "InteractionLog": "log",
    "build_dataset": "build",
    "load_interactions": "sources",
    "load_rows": "formats",
}

__all__ = ["BuildConfig", "InteractionLog", "build_dataset", "load_interactions", "load_rows"]

if TYPE_CHECKING:
    from .build import build_dataset
    from .build_config import BuildConfig
    from .formats import load_rows
    from .log import InteractionLog
    from .sources import load_interactions


def __getattr__(name: str) -> object:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
