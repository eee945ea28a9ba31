"""`rollouts.html`: the watched rollouts of a training, step by step and group by group, in one file."""

import base64
import html
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..gallery import Card, PictureReader, Section, card_of, write_page
from ..records import RecordError, read_rollouts
from .curves import CURVES_FILE

PAGE_FILE = "rollouts.html"


def write_training_page(directory: str | os.PathLike) -> Path:
    """
    Write the page of a training from its `rollouts.jsonl`, and `pictures.jsonl` and `curves.png` where they are there.

    Records are read one at a time; the page replaces an older one in one step.

    Args:
        directory (`str` or `os.PathLike`): The `output_dir` of the training.

    Returns:
        `Path`: The file `rollouts.html` in that directory.

    Raises:
        [`~mgpo_trl.records.RecordError`]: There are no rollouts, or none of a training.
    """
    directory = Path(directory)
    pictures = PictureReader(directory)
    steps: dict[int, dict[str, Any]] = {}
    total = bare = 0
    for record in read_rollouts(directory):
        training = _training(record, directory)
        steps[training["step"]] = training
        total += 1
        bare += record["id"] not in pictures
    title = f"Rollouts of the training '{directory.resolve().name}'"
    sections = [Section("What is shown", "".join(map(_note, _notes(steps, total, bare))))]
    if (directory / CURVES_FILE).is_file():
        sections.append(Section("Curves", _picture(directory / CURVES_FILE)))
    write_page(directory / PAGE_FILE, title, sections, _cards(directory, pictures))
    return directory / PAGE_FILE


def _training(record: Mapping[str, Any], directory: Path) -> Mapping[str, Any]:
    if "training" not in record:
        raise RecordError(
            f"'{directory}' holds rollouts of an evaluation, not of a training. For its page, run "
            f"`python eval.py --rescore {directory}`."
        )
    return record["training"]


def _notes(steps: Mapping[int, Mapping[str, Any]], total: int, bare: int) -> Iterator[str]:
    if not steps:
        yield "No rollouts yet."
        return
    yield (
        f"{total} rollouts of {len(steps)} steps, {min(steps)} to {max(steps)}. The step is the number of updates "
        "that the sampling model had behind it."
    )
    last = steps[max(steps)]
    shown, of = last["groups_shown"], last["groups_of_step"]
    if shown < of:
        yield f"Of every such step the first {shown} of {of} groups of the batch are kept (log_rollouts_groups)."
    if bare:
        yield (
            f"{bare} of the rollouts are shown without pictures: log_rollouts_pictures bounds how many there are, and "
            "steps between others lose theirs first."
        )


def _note(note: str) -> str:
    return f'<p class="note">{html.escape(note)}</p>'


def _picture(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img class="picture" alt="Curves of the training" src="data:image/png;base64,{data}">'


def _cards(directory: Path, pictures: PictureReader) -> Iterator[tuple[Card, dict | None]]:
    for record in read_rollouts(directory):
        training = record["training"]
        group = f"step {training['step']} · group {training['group']} · row {training['row']}"
        card = card_of(record, facts_of(training), training["step"], group)
        yield card, pictures(record["id"])


def facts_of(training: Mapping[str, Any]) -> dict[str, str]:
    """What a rollout was worth: reward, advantage, and each function's reward where there are several."""
    facts = {"reward": number(training["reward"]), "advantage": number(training["advantage"], "+")}
    if len(training["rewards"]) > 1:
        facts |= {name: number(value) for name, value in training["rewards"].items()}
    return facts


def number(value: float | None, sign: str = "-") -> str:
    """A figure for people: `"0.50"`, or `"none"` where there is none."""
    return "none" if value is None else f"{value:{sign}.2f}"
