"""Estimated memory of a training run, from the model's configuration alone."""

from .estimate import MemoryEstimate, estimate_memory
from .options import MemoryOptions

__all__ = ["MemoryEstimate", "MemoryOptions", "estimate_memory"]
