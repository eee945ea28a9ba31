"""
Small pictures of rollouts, kept beside their records so that a page needs no image file later.

A line of `pictures.jsonl`: `{"id": "q7", "overview": "<base64 of a JPEG>", "crops": ["<base64>", null]}`.
"""

import base64
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ..records import RolloutWriter
from ..rollout import Rollout

PICTURES_FILE = "pictures.jsonl"
LONGEST_SIDE = 320
"""Pixels of the longer side of a small picture."""
QUALITY = 72
"""JPEG quality: about 10 KB a picture."""


def picture_of(rollout: Rollout) -> dict:
    """
    The small pictures of a played rollout: its view, and for each reply what it showed (`None` for the whole image).

    Args:
        rollout ([`~mgpo_trl.rollout.Rollout`]): A rollout after its rounds, images in memory.
    """
    return pictures_of([rollout])[0]


def pictures_of(rollouts: Sequence[Rollout]) -> list[dict]:
    """[`picture_of`] for each. Rollouts of a group share their view, and often a crop: each image is encoded once."""
    images = [image for rollout in rollouts for image in (rollout.view, *rollout.crops) if image is not None]
    encoded = {key: _encoded(image) for key, image in {id(image): image for image in images}.items()}
    return [
        {
            "id": rollout.id,
            "overview": encoded[id(rollout.view)],
            "crops": [None if crop is None else encoded[id(crop)] for crop in rollout.crops],
        }
        for rollout in rollouts
    ]


def decode(data: str) -> Image.Image:
    """A small picture, as an image."""
    return Image.open(io.BytesIO(base64.b64decode(data)))


def _encoded(image: Image.Image) -> str:
    small = image.copy()
    small.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=QUALITY)
    return base64.b64encode(buffer.getvalue()).decode()


class PictureWriter:
    """
    Appends the pictures of rollouts, up to a number of them; survives a kill as [`~mgpo_trl.records.RolloutWriter`]
    does.

    Args:
        directory (`str` or `os.PathLike`): Where `pictures.jsonl` goes.
        limit (`int`): Rollouts that get pictures; the others are shown without.
    """

    def __init__(self, directory: str | os.PathLike, limit: int):
        self.limit = limit
        self._writer = RolloutWriter(Path(directory) / PICTURES_FILE) if limit > 0 else None

    def add(self, rollout: Rollout) -> None:
        """Append the pictures of a played rollout, unless it has them or the limit is reached."""
        if self._writer and rollout.id not in self._writer.seen and len(self._writer.seen) < self.limit:
            self._writer.write(picture_of(rollout))

    def __enter__(self) -> "PictureWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._writer:
            self._writer.close()


class PictureReader:
    """Looks pictures up by id; keeps where they stand in the file, not the pictures."""

    def __init__(self, directory: str | os.PathLike):
        self._path = Path(directory) / PICTURES_FILE
        self._places: dict[str, int] = {}
        if self._path.is_file():
            with open(self._path, "rb") as file:
                place = 0
                for line in file:
                    if line.endswith(b"\n"):  # a half-written last line has no picture
                        self._places[json.loads(line)["id"]] = place
                    place += len(line)

    def __contains__(self, identity: str) -> bool:
        return identity in self._places

    def __call__(self, identity: str) -> dict | None:
        """The line of a rollout; `None` where it has no picture."""
        if identity not in self._places:
            return None
        with open(self._path, "rb") as file:
            file.seek(self._places[identity])
            return json.loads(file.readline())
