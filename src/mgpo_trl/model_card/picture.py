"""The picture of rollouts on a model card."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ..images import LateImage
from ..records import to_json
from ..rollout import Rollout
from ..viewer import Scene, draw_comparison

logger = logging.getLogger(__name__)

PICTURES = ("before_after.png", "rollouts.png")
"""Pictures of rollouts, the first of them that is there: the built-in task's, and that of any training."""
MOST_SCENES = 4
"""Rollouts in `rollouts.png`."""


def pick_rollouts(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """One rollout of each of the first few questions that have an answer, to be drawn once training ends."""
    picked: dict[str, Rollout] = {}
    for rollout in rollouts:
        if rollout.answer is not None and len(picked) < MOST_SCENES:
            picked.setdefault(rollout.id, rollout)
    return list(picked.values())


def draw_rollouts(rollouts: Sequence[Rollout], directory: str | os.PathLike, label: str) -> None:
    """
    Draw `rollouts.png`; nothing where there are no rollouts.

    A card is written with every checkpoint: what can not be drawn costs the picture and a warning, not the training.

    Args:
        rollouts (`Sequence[Rollout]`): Rollouts after their rounds, images in memory, each with an answer.
        directory (`str` or `os.PathLike`): Where the picture goes.
        label (`str`): What stands above each rollout.
    """
    if not rollouts:
        return
    try:
        scenes = [Scene(_opened(rollout.image), [to_json(rollout.to_record())]) for rollout in rollouts]
        picture = draw_comparison(scenes, [label], "View, named box, crop, answer")
    except Exception as error:
        logger.warning("The model card goes without a picture of rollouts: drawing them failed (%r).", error)
        return
    picture.save(Path(directory, PICTURES[-1]))


def drop_picture(directory: str | os.PathLike) -> None:
    """Take `rollouts.png` away, which an earlier run may have left: it would be pushed."""
    Path(directory, PICTURES[-1]).unlink(missing_ok=True)


def _opened(image: Image.Image | LateImage) -> Image.Image:
    return image.decoded if isinstance(image, LateImage) else image
