"""MGPO (arXiv 2507.05920) as a TRL trainer: a model learns where to look from nothing but right and wrong answers."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .inference import GroundedVQA
    from .mgpo_config import MGPOConfig
    from .mgpo_trainer import MGPOTrainer

__version__ = "0.1.0"
__all__ = ["GroundedVQA", "MGPOConfig", "MGPOTrainer"]

_MODULES = {"GroundedVQA": "inference", "MGPOConfig": "mgpo_config", "MGPOTrainer": "mgpo_trainer"}


def __getattr__(name: str):
    """Import the trainer on first use: boxes, answers and records stay importable without torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
