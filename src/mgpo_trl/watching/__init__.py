"""Watching a training: rollouts with their rewards on disk, as a page, and in trackers; curves at its end."""

from .curves import CURVES_FILE, draw_curves
from .page import PAGE_FILE, write_training_page

__all__ = ["CURVES_FILE", "PAGE_FILE", "draw_curves", "write_training_page"]
