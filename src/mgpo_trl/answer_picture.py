"""One answer as a picture, where nobody knows the right one: the view with the region, the crop, what was said."""

from collections.abc import Sequence
from textwrap import wrap

from PIL import Image, ImageDraw, ImageFont

from .geometry import original_to_view

SIDE = 480
"""Longer side of a drawn view or crop, in pixels."""
GAP = 14
LINE = 19
LINE_CHARACTERS, MOST_LINES = 110, 8
"""Room for a text in the picture; what is longer is cut."""
TEXT, REGION, EMPTY = (60, 64, 72), (219, 39, 119), (243, 244, 246)

PixelBox = tuple[int, int, int, int]


def draw_answer(
    view: Image.Image,
    image_size: tuple[int, int],
    box: PixelBox | None,
    crop: Image.Image | None,
    question: str,
    said: str,
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
        said (`str`): Last lines of the picture.
        no_crop (`str`, *optional*, defaults to `"no crop"`): What stands in place of a missing crop.

    Returns:
        `PIL.Image.Image`: The picture, RGB.
    """
    seen = _scaled(view, image_size)
    _outline(seen, image_size, box)
    shown = _empty(no_crop) if crop is None else _scaled(crop, crop.size)
    above, below = _lines(question), _lines(said)
    top = GAP + len(above) * LINE + GAP // 2
    bottom = top + max(seen.height, shown.height) + GAP // 2
    canvas = Image.new("RGB", (3 * GAP + 2 * SIDE, bottom + len(below) * LINE + GAP), "white")
    canvas.paste(seen, (GAP, top))
    canvas.paste(shown, (2 * GAP + SIDE, top))
    _write(canvas, GAP, above, (0, 0, 0))
    _write(canvas, bottom, below, TEXT)
    return canvas


def mark_region(view: Image.Image, image_size: tuple[int, int], box: Sequence[int] | None) -> Image.Image:
    """
    The view with a region drawn on it, for a page. A view smaller than `SIDE` is enlarged by a whole number of times,
    without smoothing.

    Args:
        view (`PIL.Image.Image`): What the model saw first.
        image_size (`tuple[int, int]`): (width, height) of the original image.
        box (`Sequence[int]`, *optional*): The region, in pixels of the original image.
    """
    times = -(-SIDE // max(view.size))
    marked = view.resize((view.width * times, view.height * times), Image.Resampling.NEAREST)
    _outline(marked, image_size, box)
    return marked


def _scaled(image: Image.Image, shape: tuple[int, int]) -> Image.Image:
    """The image with a longer side of `SIDE` and the aspect ratio of `shape`; smoothed only where it is reduced."""
    size = (max(1, round(shape[0] * SIDE / max(shape))), max(1, round(shape[1] * SIDE / max(shape))))
    is_enlarged = max(image.size) <= SIDE
    return image.resize(size, Image.Resampling.NEAREST if is_enlarged else Image.Resampling.BICUBIC)


def _empty(text: str) -> Image.Image:
    empty = Image.new("RGB", (SIDE, SIDE // 2), EMPTY)
    ImageDraw.Draw(empty).text((SIDE // 2, SIDE // 4), text, fill=TEXT, font=_font(), anchor="mm")
    return empty


def _outline(picture: Image.Image, image_size: tuple[int, int], box: Sequence[int] | None) -> None:
    """Draw a region, given in original pixels, on a picture of the whole image; it has at least one pixel."""
    if box is None:
        return
    x1, y1, x2, y2 = original_to_view(box, image_size, picture.size)
    width = max(2, round(max(picture.size) / 250))
    corners = (x1, y1, max(x1, x2 - 1), max(y1, y2 - 1))
    ImageDraw.Draw(picture).rectangle(corners, outline=REGION, width=width)


def _lines(text: str) -> list[str]:
    lines = [line for part in text.splitlines() for line in wrap(part, LINE_CHARACTERS) or [""]]
    return lines if len(lines) <= MOST_LINES else [*lines[: MOST_LINES - 1], "..."]


def _write(canvas: Image.Image, top: int, lines: Sequence[str], colour) -> None:
    draw = ImageDraw.Draw(canvas)
    for number, line in enumerate(lines):
        draw.text((GAP, top + number * LINE), line, fill=colour, font=_font())


def _font():
    return ImageFont.load_default(15)
