"""Pictures of rollouts: what the model saw, the box it named, the crop it got back, and its answer. Pillow only."""

from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import shorten, wrap

from PIL import Image, ImageDraw, ImageFont

from .answers import extract_answer, judge
from .geometry import original_to_view
from .images import crop_original

CELL = 216
"""Side of a drawn view or crop, in pixels."""
LARGE = 480
"""Side of a drawn view or crop where a picture shows one answer alone."""
MOST_LINES = 8
"""Most lines of a text in such a picture."""
GAP = 14
LINE = 19
RIGHT, WRONG, NEUTRAL, TARGET = (22, 128, 61), (190, 32, 46), (60, 64, 72), (250, 204, 21)
CHOSEN = (219, 39, 119)
"""Colour of a region where nobody knows whether the answer is right."""
EMPTY = (243, 244, 246)


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


def draw_answer(
    view: Image.Image,
    image_size: tuple[int, int],
    box: tuple[int, int, int, int] | None,
    crop: Image.Image | None,
    question: str,
    said: Sequence[str],
    no_crop: str = "no crop",
) -> Image.Image:
    """
    Draw one answer: the question, the view with the region beside the crop, and what was said.

    Args:
        view (`PIL.Image.Image`): What the model saw first.
        image_size (`tuple[int, int]`): (width, height) of the original image.
        box (`tuple[int, int, int, int]`, *optional*): The region, in pixels of the original image.
        crop (`PIL.Image.Image`, *optional*): The region as the model saw it.
        question (`str`): First lines of the picture.
        said (`Sequence[str]`): Last lines of the picture.
        no_crop (`str`, *optional*, defaults to `"no crop"`): What stands in place of a missing crop.

    Returns:
        `PIL.Image.Image`: The picture, RGB.
    """
    above, below = _wrapped(question), [line for text in said for line in _wrapped(text)]
    top = GAP + len(above) * LINE + GAP // 2
    height = top + LARGE + GAP // 2 + len(below) * LINE + GAP
    canvas = Image.new("RGB", (3 * GAP + 2 * LARGE, height), "white")
    draw = ImageDraw.Draw(canvas)
    _write_lines(draw, GAP, above, "black")
    seen = _letterbox(view, _magnifier(view, LARGE), image_size, LARGE)
    if box is not None:
        _outline(ImageDraw.Draw(seen), _to_cell(box, image_size, LARGE), CHOSEN, width=3)
    canvas.paste(seen, (GAP, top))
    shown = _empty_cell(no_crop, LARGE) if crop is None else _letterbox(crop, Image.Resampling.BICUBIC, side=LARGE)
    canvas.paste(shown, (2 * GAP + LARGE, top))
    _write_lines(draw, top + LARGE + GAP // 2, below, NEUTRAL)
    return canvas


def mark_box(
    view: Image.Image, image_size: tuple[int, int], box: Sequence[int] | None, least_side: int = LARGE
) -> Image.Image:
    """
    The view with a region drawn on it, for a page; a small view is enlarged without smoothing.

    Args:
        view (`PIL.Image.Image`): What the model saw first.
        image_size (`tuple[int, int]`): (width, height) of the original image.
        box (`Sequence[int]`, *optional*): The region, in pixels of the original image.
        least_side (`int`, *optional*): The longer side of the result has at least this many pixels.
    """
    times = -(-least_side // max(view.size))
    marked = view.resize((view.width * times, view.height * times), Image.Resampling.NEAREST)
    if box is not None:
        width = max(2, round(max(marked.size) / 250))
        _outline(ImageDraw.Draw(marked), _drawn(original_to_view(box, image_size, marked.size)), CHOSEN, width)
    return marked


def _magnifier(image: Image.Image, side: int) -> Image.Resampling:
    """Enlarges without smoothing, which would look clearer than it is; reduces with."""
    return Image.Resampling.NEAREST if max(image.size) <= side else Image.Resampling.BICUBIC


def _wrapped(text: str) -> list[str]:
    """Lines that fit a picture of one answer; what goes beyond a handful of them is left to the record."""
    lines = [line for part in text.splitlines() for line in wrap(part, 110) or [""]]
    return lines if len(lines) <= MOST_LINES else [*lines[: MOST_LINES - 1], "..."]


def _write_lines(draw, top: int, lines: Sequence[str], colour) -> None:
    for number, line in enumerate(lines):
        draw.text((GAP, top + number * LINE), line, fill=colour, font=_font(15))


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
        return _empty_cell("no crop" if box is None else f"no crop: {box['status'].replace('_', ' ')}", CELL)
    return _letterbox(crop_original(image, tuple(box["box_original_px"])), Image.Resampling.BICUBIC)


def _empty_cell(text: str, side: int) -> Image.Image:
    cell = Image.new("RGB", (side, side), EMPTY)
    ImageDraw.Draw(cell).text((side // 2, side // 2), text, fill=NEUTRAL, font=_font(14), anchor="mm")
    return cell


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


def _letterbox(
    image: Image.Image, resample: Image.Resampling, shape: tuple[int, int] | None = None, side: int = CELL
) -> Image.Image:
    """The image in a white square cell of `side` pixels, with the aspect ratio of `shape`, else its own."""
    shape = shape or image.size
    scale = side / max(shape)
    size = tuple(max(1, round(length * scale)) for length in shape)
    cell = Image.new("RGB", (side, side), "white")
    cell.paste(image.resize(size, resample), ((side - size[0]) // 2, (side - size[1]) // 2))
    return cell


def _to_cell(box, image_size: tuple[int, int], side: int = CELL) -> tuple[float, float, float, float]:
    """A box in original pixels, in pixels of the letterboxed cell; never empty."""
    scale = side / max(image_size)
    left, top = ((side - length * scale) / 2 for length in image_size)
    x1, y1, x2, y2 = (value * scale for value in box)
    return _drawn((left + x1, top + y1, left + x2, top + y2))


def _drawn(edges: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
    """The corner pixels of a box with these edges; a box thinner than a pixel is drawn as one pixel."""
    x1, y1, x2, y2 = edges
    return x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)


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
