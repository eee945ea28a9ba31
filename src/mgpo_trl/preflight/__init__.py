"""Whether tonight's run will survive: the largest sample, memory, two real steps, and a look at the boxes."""

from .report import PreflightReport
from .run import run_preflight

__all__ = ["PreflightReport", "run_preflight"]
