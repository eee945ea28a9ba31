"""The page: sections of tables and charts on top, then cards of rollouts with filters. Written as a stream."""

import html
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..answers import extract_answer, verdict

_ESCAPES = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"})
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


@dataclass(frozen=True)
class Section:
    """A part of the page above the gallery."""

    heading: str
    """Its heading, as text."""
    body: str
    """Its content, as HTML that is already escaped."""


@dataclass(frozen=True)
class Card:
    """One rollout of the gallery; everything is shown as text."""

    id: str
    """Id of the rollout."""
    question: str
    """The question."""
    choices: list[str] | None
    """Texts of the choices."""
    answer: str | None
    """The right answer; `None` where it is not known."""
    said: str | None
    """The answer that was read from the last turn."""
    right: bool | None
    """Whether it is right; `None` where no answer is known."""
    status: str
    """Status of the last box; empty for a direct answer."""
    category: str
    """Category of the row; empty where it has none."""
    size: list[int]
    """Width and height of the original image."""
    targets: list[list[float]]
    """Target boxes in original pixels."""
    boxes: list[list[int] | None]
    """For each grounding round the box that was named, in original pixels."""
    shown: list[list[int] | None]
    """For each grounding round the region that came back."""
    turns: list[str]
    """Text of each turn."""
    facts: dict[str, str] = field(default_factory=dict)
    """Further facts, shown as they are: reward, advantage."""
    step: int | None = None
    """Optimizer step of a rollout that was sampled in training. A gallery of such cards turns step by step."""
    group: str = ""
    """Rollouts of one prompt in one step: they are shown side by side under it."""


def card_of(
    record: Mapping[str, Any], facts: Mapping[str, str] | None = None, step: int | None = None, group: str = ""
) -> Card:
    """The card of a rollout record, see [`mgpo_trl.records`]."""
    text, choices, answer = record["turns"][-1]["text"], record.get("choices"), record["answer"]
    boxes = [turn["box"] for turn in record["turns"][:-1] if turn["box"]]
    named = [box["box_original_px"] for box in boxes]
    return Card(
        id=record["id"],
        question=record["question"],
        choices=choices,
        answer=answer,
        said=extract_answer(text, choices),
        right=verdict(text, answer, choices),
        status=boxes[-1]["status"] if boxes else "",
        category=record.get("category") or "",
        size=list(record["image"]["size"]),
        targets=record.get("target_boxes") or [],
        boxes=named,
        shown=[box.get("shown_px", one) for box, one in zip(boxes, named, strict=True)],
        turns=[turn["text"] for turn in record["turns"]],
        facts=dict(facts or {}),
        step=step,
        group=group,
    )


def write_page(
    path: str | os.PathLike,
    title: str,
    sections: Sequence[Section],
    cards: Iterable[tuple[Card, Mapping[str, Any] | None]],
) -> None:
    """
    Write a page that works from a file, without any request.

    Args:
        path (`str` or `os.PathLike`): The file; it is replaced in one step.
        title (`str`): Heading of the page.
        sections (`Sequence[Section]`): What stands above the gallery.
        cards (`Iterable[tuple[Card, Mapping]]`): Each card with its pictures ([`~mgpo_trl.gallery.picture_of`]), or
            `None`. Read once; pictures are not kept.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.part")
    try:
        with open(partial, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(_parts(title, sections, cards))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _parts(title: str, sections: Sequence[Section], cards: Iterable) -> Iterator[str]:
    yield _head(title)
    for section in sections:
        yield f"<section><h2>{html.escape(section.heading)}</h2>{section.body}</section>\n"
    yield _resource("gallery.html")
    for number, (card, picture) in enumerate(cards):
        yield f'<script type="application/json" class="card">{_data(asdict(card))}</script>\n'
        if picture is not None:
            yield f'<script type="application/json" id="picture-{number}">{_data(dict(picture))}</script>\n'
    yield f"<script>\n{_resource('page.js')}</script>\n</body></html>\n"


def _head(title: str) -> str:
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{_resource('page.css')}</style></head>\n"
        f"<body><header><h1>{html.escape(title)}</h1></header>\n"
    )


def _resource(name: str) -> str:
    return files("mgpo_trl.gallery").joinpath(name).read_text(encoding="utf-8")


def _data(value: Any) -> str:
    """JSON that can stand inside a script element whatever text it holds."""
    return json.dumps(value, ensure_ascii=False).translate(_ESCAPES)
