"""Pictures of watched groups in the trackers that a training reports to, each through its own interface."""

import io
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from ..gallery import decode
from ..viewer import Tile, draw_rollouts
from .page import facts_of, number

TRACKERS = (TensorBoardCallback, TrackioCallback, WandbCallback)
QUALITY = 85
"""JPEG quality of a group's picture."""


class Group(NamedTuple):
    """The rollouts of one prompt."""

    records: list[dict]
    """Their records, as in `rollouts.jsonl`."""
    pictures: list[dict]
    """Their small pictures, as in `pictures.jsonl`."""


def trackers_of(callbacks: Sequence[TrainerCallback]) -> list[TrainerCallback]:
    """The callbacks of trackers that take pictures."""
    return [callback for callback in callbacks if isinstance(callback, TRACKERS)]


def send_groups(callbacks: Sequence[TrainerCallback], step: int, groups: Sequence[Group], with_table: bool) -> None:
    """
    Send each group as one picture to every tracker; to TensorBoard with its texts.

    Args:
        callbacks (`Sequence[TrainerCallback]`): What [`trackers_of`] returned.
        step (`int`): Optimizer steps that the sampling model had behind it.
        groups (`Sequence[Group]`): What to send.
        with_table (`bool`): Whether Weights & Biases and Trackio get a table of texts and rewards, too. TRL sends one
            with `log_completions`.
    """
    pictures = [draw_group(group) for group in groups]
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback):
            _to_tensorboard(callback.tb_writer, step, groups, pictures)
        elif isinstance(callback, TrackioCallback):
            _to_trackio(callback._trackio, step, groups, pictures, with_table)
        elif callback._wandb.run is not None:
            callback._wandb.log(_as_media(callback._wandb, step, groups, pictures, with_table, file_type="jpg"))


def draw_group(group: Group) -> Image.Image:
    """The rollouts of a group side by side: view with box, crop, answer, reward and advantage."""
    tiles = []
    for record, picture in zip(group.records, group.pictures, strict=True):
        training = record["training"]
        label = f"reward {number(training['reward'])}, advantage {number(training['advantage'], '+')}"
        crop = picture["crops"][-1] if picture["crops"] else None
        tiles.append(Tile(decode(picture["overview"]), decode(crop) if crop else None, record, label))
    return draw_rollouts(tiles, _caption(group))


def _caption(group: Group) -> str:
    training = group.records[0]["training"]
    return f"step {training['step']}, row {training['row']}"


def _to_tensorboard(writer, step: int, groups: Sequence[Group], pictures: Sequence[Image.Image]) -> None:
    for place, (group, picture) in enumerate(zip(groups, pictures, strict=True)):
        _add_image(writer, f"rollouts/group_{place}", picture, step)
        writer.add_text(f"rollouts/group_{place}", _as_markdown(group), step)


def _add_image(writer, tag: str, picture: Image.Image, step: int) -> None:
    """TensorBoard's `add_image` with a JPEG of ours: its own PNG takes ten times as long."""
    try:
        from tensorboard.compat.proto.summary_pb2 import Summary
    except ImportError:  # transformers makes do with tensorboardX
        return writer.add_image(tag, np.asarray(picture), step, dataformats="HWC")
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=QUALITY)
    image = Summary.Image(
        height=picture.height, width=picture.width, colorspace=3, encoded_image_string=data.getvalue()
    )
    writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)


def _as_markdown(group: Group) -> str:
    """The texts of a group, indented so that nothing in them is read as markup."""
    parts = [_caption(group), _indented(group.records[0]["question"])]
    for record in group.records:
        facts = ", ".join(f"{name} {value}" for name, value in facts_of(record["training"]).items())
        parts += [facts, *(_indented(turn["text"]) for turn in record["turns"])]
    return "\n\n".join(parts)


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines() or [""])


def _to_trackio(trackio, step: int, groups, pictures: Sequence[Image.Image], with_table: bool) -> None:
    """Trackio takes a file as it is, and makes a PNG of a picture, which takes longer. The file is copied at once."""
    with TemporaryDirectory() as folder:
        files = [Path(folder) / f"group_{place}.jpg" for place in range(len(pictures))]
        for file, picture in zip(files, pictures, strict=True):
            picture.save(file, quality=QUALITY)
        trackio.log(_as_media(trackio, step, groups, files, with_table))


def _as_media(tracker, step: int, groups, pictures: Sequence, with_table: bool, **options: str) -> dict[str, Any]:
    """One entry for the logs of Weights & Biases or Trackio, which name their classes alike."""
    entry = {
        f"rollouts/group_{place}": tracker.Image(picture, caption=_caption(group), **options)
        for place, (group, picture) in enumerate(zip(groups, pictures, strict=True))
    }
    if with_table:
        entry["rollouts/table"] = tracker.Table(columns=_columns(groups), data=_rows(groups))
    return {**entry, "train/global_step": step}


def _columns(groups: Sequence[Group]) -> list[str]:
    record = groups[0].records[0]
    turns = [name for turn in record["turns"] for name in (f"round {turn['round']}", f"box {turn['round']}")]
    return ["step", "row", "sample", "reward", "advantage", *record["training"]["rewards"], *turns[:-1]]


def _rows(groups: Sequence[Group]) -> list[list[Any]]:
    return [_row(record) for group in groups for record in group.records]


def _row(record: dict) -> list[Any]:
    training = record["training"]
    own = [training[name] for name in ("step", "row", "sample", "reward", "advantage")]
    turns = [value for turn in record["turns"] for value in (turn["text"], (turn["box"] or {}).get("status"))]
    return [*own, *training["rewards"].values(), *turns[:-1]]
