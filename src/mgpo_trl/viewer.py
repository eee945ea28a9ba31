"""Pictures of rollouts: what the model saw, the box it named, the crop it got back, and its answer. Pillow only."""

from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import shorten

from PIL import Image, ImageDraw, ImageFont

from .answers import extract_answer, judge
from .images import crop_original

CELL = 216
"""Side of a drawn view or crop, in pixels."""
GAP = 14
LINE = 19
RIGHT, WRONG, NEUTRAL, TARGET = (22, 128, 61), (190, 32, 46), (60, 64, 72), (250, 204, 21)


@dataclass(frozen=True)
class Scene:
    """One question with its rollouts, oldest model first."""

    image: Image.Image
    """The original image."""
    records: Sequence[dict]
    """Rollout records of the same row, one for each column label."""


def draw_comparison(scenes: Sequence[Scene], labels: Sequence[str], title: str) -> Image.Image:
    """
    Draw one column a scene and one band a model: the view with the named box (and the target, dashed in yellow), the
    crop that came back, and the answer in green or red.

    Args:
        scenes (`Sequence[Scene]`): Scenes; each has one record for each label.
        labels (`Sequence[str]`): Names of the models, such as `["before", "after"]`.
        title (`str`): First line of the picture.

    Returns:
        `PIL.Image.Image`: The picture, RGB.
    """
    width = GAP + len(scenes) * (CELL + GAP)
    head = 2 * GAP + 3 * LINE
    band = 2 * CELL + GAP + 5 * LINE
    canvas = Image.new("RGB", (width, head + len(labels) * band), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((GAP, GAP), title, fill="black", font=_font(17))
    for column, scene in enumerate(scenes):
        left = GAP + column * (CELL + GAP)
        question = shorten(scene.records[0]["question"], 34, placeholder="...")
        draw.text((left, GAP + 2 * LINE), question, fill=NEUTRAL, font=_font(14))
        for row, (label, record) in enumerate(zip(labels, scene.records, strict=True)):
            _draw_rollout(canvas, draw, (left, head + row * band), label, scene.image, record)
    return canvas


def _draw_rollout(canvas, draw, corner: tuple[int, int], label: str, image: Image.Image, record: dict) -> None:
    left, top = corner
    box = _last_box(record)
    draw.text((left, top), label, fill="black", font=_font(14))
    top += LINE
    canvas.paste(_view_with_boxes(image, record, box), (left, top))
    top += CELL + GAP // 2
    canvas.paste(_crop_cell(image, box), (left, top))
    _outline(draw, (left, top, left + CELL - 1, top + CELL - 1), NEUTRAL)
    for text, colour in _captions(record, box):
        draw.text((left, top + CELL + 3), text, fill=colour, font=_font(14))
        top += LINE


def _last_box(record: dict) -> dict | None:
    boxes = [turn["box"] for turn in record["turns"] if turn["box"] is not None]
    return boxes[-1] if boxes else None


def _view_with_boxes(image: Image.Image, record: dict, box: dict | None) -> Image.Image:
    """The image at the resolution of the view, enlarged without smoothing: no clearer than what the model saw."""
    view = image.resize(tuple(record["view_size"]), Image.Resampling.BICUBIC)
    cell = _letterbox(view, Image.Resampling.NEAREST, image.size)  # the view's own aspect ratio is rounded
    draw = ImageDraw.Draw(cell)
    for target in record["target_boxes"] or []:
        _outline(draw, _to_cell(target, image.size), TARGET, dashed=True)
    if box is not None and box["box_original_px"] is not None:
        _outline(
            draw, _to_cell(box["box_original_px"], image.size), WRONG if not _is_right(record) else RIGHT, width=3
        )
    return cell


def _crop_cell(image: Image.Image, box: dict | None) -> Image.Image:
    if box is None or box["box_original_px"] is None:
        cell = Image.new("RGB", (CELL, CELL), (243, 244, 246))
        text = "no crop" if box is None else f"no crop: {box['status'].replace('_', ' ')}"
        ImageDraw.Draw(cell).text((CELL // 2, CELL // 2), text, fill=NEUTRAL, font=_font(14), anchor="mm")
        return cell
    return _letterbox(crop_original(image, tuple(box["box_original_px"])), Image.Resampling.BICUBIC)


def _captions(record: dict, box: dict | None) -> list[tuple[str, tuple[int, int, int]]]:
    given = extract_answer(record["turns"][-1]["text"], record["choices"])
    said = _name(given, record["choices"]) if given is not None else "no boxed answer"
    right = _is_right(record)
    lines = [(shorten(f"says {said}", 32, placeholder="..."), RIGHT if right else WRONG)]
    if not right:
        lines.append((shorten(f"right: {_name(record['answer'], record['choices'])}", 32, placeholder="..."), NEUTRAL))
    return lines


def _name(answer: str, choices: list[str] | None) -> str:
    return f"({answer}) {choices[ord(answer) - ord('A')]}" if choices else answer


def _is_right(record: dict) -> bool:
    return judge(record["turns"][-1]["text"], record["answer"], record["choices"])


def _letterbox(image: Image.Image, resample: Image.Resampling, shape: tuple[int, int] | None = None) -> Image.Image:
    """The image in a white square cell, with the aspect ratio of `shape`, else its own."""
    shape = shape or image.size
    scale = CELL / max(shape)
    size = tuple(max(1, round(side * scale)) for side in shape)
    cell = Image.new("RGB", (CELL, CELL), "white")
    cell.paste(image.resize(size, resample), ((CELL - size[0]) // 2, (CELL - size[1]) // 2))
    return cell


def _to_cell(box, image_size: tuple[int, int]) -> tuple[float, float, float, float]:
    """A box in original pixels, in pixels of the letterboxed cell."""
    scale = CELL / max(image_size)
    left, top = ((CELL - side * scale) / 2 for side in image_size)
    x1, y1, x2, y2 = (value * scale for value in box)
    return (left + x1, top + y1, left + x2 - 1, top + y2 - 1)


def _outline(draw, box, colour, width: int = 1, dashed: bool = False) -> None:
    if not dashed:
        draw.rectangle(box, outline=colour, width=width)
        return
    x1, y1, x2, y2 = box
    for start in range(0, int(max(x2 - x1, y2 - y1)), 10):
        for y in (y1, y2):
            if x1 + start < x2:
                draw.line((x1 + start, y, min(x1 + start + 5, x2), y), fill=colour, width=2)
        for x in (x1, x2):
            if y1 + start < y2:
                draw.line((x, y1 + start, x, min(y1 + start + 5, y2)), fill=colour, width=2)


def _font(size: int):
    return ImageFont.load_default(size)
