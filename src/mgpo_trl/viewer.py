"""Pictures of rollouts: what the model saw, the box it named, the crop it got back, and its answer. Pillow only."""

from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import shorten

from PIL import Image, ImageDraw, ImageFont

from .answers import extract_answer, verdict
from .images import crop_original

CELL = 216
"""Side of a drawn view or crop, in pixels."""
GAP = 14
LINE = 19
ROW = 8
"""Most rollouts of a group in one row."""
RIGHT, WRONG, NEUTRAL, TARGET = (22, 128, 61), (190, 32, 46), (60, 64, 72), (250, 204, 21)
_COLOURS = {True: RIGHT, False: WRONG, None: NEUTRAL}
_HEAD, _BAND = 2 * GAP + 3 * LINE, 2 * CELL + GAP + 5 * LINE
"""Heights of the head of a picture, and of one band of rollouts."""


@dataclass(frozen=True)
class Scene:
    """One question with its rollouts, oldest model first."""

    image: Image.Image
    """The original image."""
    records: Sequence[dict]
    """Rollout records of the same row, one for each column label."""


@dataclass(frozen=True)
class Tile:
    """One rollout, with the pictures that are at hand instead of its original."""

    view: Image.Image
    """The whole image, in any size."""
    crop: Image.Image | None
    """The last region that came back, in any size; `None` where there was none."""
    record: dict
    """The rollout record."""
    label: str
    """What stands above it, such as its reward."""


def draw_rollouts(tiles: Sequence[Tile], title: str) -> Image.Image:
    """
    Draw rollouts of one question side by side, up to eight in a row, each as [`draw_comparison`] does.

    Args:
        tiles (`Sequence[Tile]`): At least one.
        title (`str`): First line of the picture; the question stands below it.

    Returns:
        `PIL.Image.Image`: The picture, RGB.
    """
    columns = min(len(tiles), ROW)
    canvas = Image.new("RGB", (GAP + columns * (CELL + GAP), _HEAD + -(-len(tiles) // ROW) * _BAND), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((GAP, GAP), title, fill="black", font=_font(17))
    question = shorten(tiles[0].record["question"], 34 * columns, placeholder="...")
    draw.text((GAP, GAP + 2 * LINE), question, fill=NEUTRAL, font=_font(14))
    for place, tile in enumerate(tiles):
        row, column = divmod(place, ROW)
        corner = (GAP + column * (CELL + GAP), _HEAD + row * _BAND)
        box, size = _last_box(tile.record), tuple(tile.record["image"]["size"])
        view = _with_boxes(_letterbox(_reduced(tile.view), Image.Resampling.NEAREST, size), tile.record, box, size)
        crop = _no_crop(box) if tile.crop is None else _letterbox(tile.crop, Image.Resampling.BICUBIC)
        _draw_column(canvas, draw, corner, tile.label, (view, crop), tile.record)
    return canvas


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
    canvas = Image.new("RGB", (width, _HEAD + len(labels) * _BAND), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((GAP, GAP), title, fill="black", font=_font(17))
    for column, scene in enumerate(scenes):
        left = GAP + column * (CELL + GAP)
        question = shorten(scene.records[0]["question"], 34, placeholder="...")
        draw.text((left, GAP + 2 * LINE), question, fill=NEUTRAL, font=_font(14))
        for row, (label, record) in enumerate(zip(labels, scene.records, strict=True)):
            box = _last_box(record)
            cells = _view_with_boxes(scene.image, record, box), _crop_cell(scene.image, box)
            _draw_column(canvas, draw, (left, _HEAD + row * _BAND), label, cells, record)
    return canvas


def _draw_column(canvas, draw, corner: tuple[int, int], label: str, cells: tuple, record: dict) -> None:
    """A rollout: the label, the cells of its view and its crop, and its answer."""
    left, top = corner
    draw.text((left, top), label, fill="black", font=_font(14))
    top += LINE
    canvas.paste(cells[0], (left, top))
    top += CELL + GAP // 2
    canvas.paste(cells[1], (left, top))
    _outline(draw, (left, top, left + CELL - 1, top + CELL - 1), NEUTRAL)
    for text, colour in _captions(record):
        draw.text((left, top + CELL + 3), text, fill=colour, font=_font(14))
        top += LINE


def _last_box(record: dict) -> dict | None:
    boxes = [turn["box"] for turn in record["turns"] if turn["box"] is not None]
    return boxes[-1] if boxes else None


def _view_with_boxes(image: Image.Image, record: dict, box: dict | None) -> Image.Image:
    """The image at the resolution of the view, enlarged without smoothing: no clearer than what the model saw."""
    view = image.resize(tuple(record["view_size"]), Image.Resampling.BICUBIC)
    # The view's own aspect ratio is rounded.
    return _with_boxes(_letterbox(view, Image.Resampling.NEAREST, image.size), record, box, image.size)


def _with_boxes(cell: Image.Image, record: dict, box: dict | None, size: tuple[int, int]) -> Image.Image:
    """The letterboxed image of a size, with the targets and the named box."""
    draw = ImageDraw.Draw(cell)
    for target in record["target_boxes"] or []:
        _outline(draw, _to_cell(target, size), TARGET, dashed=True)
    if box is not None and box["box_original_px"] is not None:
        _outline(draw, _to_cell(box["box_original_px"], size), _COLOURS[_verdict(record)], width=3)
    return cell


def _crop_cell(image: Image.Image, box: dict | None) -> Image.Image:
    if box is None or box["box_original_px"] is None:
        return _no_crop(box)
    return _letterbox(crop_original(image, tuple(box["box_original_px"])), Image.Resampling.BICUBIC)


def _no_crop(box: dict | None) -> Image.Image:
    cell = Image.new("RGB", (CELL, CELL), (243, 244, 246))
    text = "no crop" if box is None else f"no crop: {box['status'].replace('_', ' ')}"
    ImageDraw.Draw(cell).text((CELL // 2, CELL // 2), text, fill=NEUTRAL, font=_font(14), anchor="mm")
    return cell


def _captions(record: dict) -> list[tuple[str, tuple[int, int, int]]]:
    given = extract_answer(record["turns"][-1]["text"], record["choices"])
    said = _name(given, record["choices"]) if given is not None else "no boxed answer"
    right = _verdict(record)
    lines = [(shorten(f"says {said}", 32, placeholder="..."), _COLOURS[right])]
    if right is False:
        lines.append((shorten(f"right: {_name(record['answer'], record['choices'])}", 32, placeholder="..."), NEUTRAL))
    return lines


def _name(answer: str, choices: list[str] | None) -> str:
    return f"({answer}) {choices[ord(answer) - ord('A')]}" if choices else answer


def _verdict(record: dict) -> bool | None:
    return verdict(record["turns"][-1]["text"], record["answer"], record["choices"])


def _reduced(image: Image.Image) -> Image.Image:
    """The image, smoothed down to the cell where it is larger."""
    small = image.copy()
    small.thumbnail((CELL, CELL))
    return small


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
