"""Estimated memory of a training run, from the model's configuration alone."""

from .estimate import GIB, MemoryEstimate, estimate_memory
from .launch import device_bytes, estimate_run, warn_of_memory
from .options import MemoryOptions

__all__ = [
    "GIB",
    "MemoryEstimate",
    "MemoryOptions",
    "device_bytes",
    "estimate_memory",
    "estimate_run",
    "warn_of_memory",
]
