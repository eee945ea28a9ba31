"""`curves.png`: how a training went, drawn from its log with Pillow."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

CURVES_FILE = "curves.png"
SCALE = 2
"""The picture is drawn this much larger and then reduced, which smooths its lines."""
PANEL, MARGIN = (520, 260), (52, 40, 16, 34)
"""Size of a panel, and what of it is left, above, right and below of the plot, in pixels of the picture."""
INK, SOFT, LINES = (28, 31, 36), (140, 146, 155), ((47, 111, 219), (201, 110, 0), (21, 122, 60), (150, 60, 160))

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Panel:
    """One plot: what it is about, and its lines by name."""

    title: str
    """Its heading."""
    lines: dict[str, Points]
    """(step, value) of each line."""
    share: bool
    """Whether the values are shares, between 0 and 1."""


def draw_curves(log_history: Sequence[Mapping[str, float]]) -> Image.Image | None:
    """
    Draw reward, valid boxes, crop area with target coverage, and entropy by turn, over the steps.

    Args:
        log_history (`Sequence[Mapping]`): `trainer.state.log_history`. What it does not hold is left out: a training
            of one round has no boxes, and coverage is there where target boxes are known.

    Returns:
        `PIL.Image.Image`: The picture, RGB; `None` where the log holds none of it.
    """
    panels = [panel for panel in _panels(log_history) if panel.lines]
    if not panels:
        return None
    columns = min(2, len(panels))
    width, height = (side * SCALE for side in PANEL)
    canvas = Image.new("RGB", (columns * width, math.ceil(len(panels) / columns) * height), "white")
    for place, panel in enumerate(panels):
        corner = (place % columns * width, place // columns * height)
        canvas.paste(_draw_panel(panel), corner)
    return canvas.reduce(SCALE)


def _panels(history: Sequence[Mapping[str, float]]) -> list[Panel]:
    names = {name for entry in history for name in entry}
    turns = sorted(name for name in names if name.startswith("turn") and name.endswith("/entropy"))
    entropies = {f"round {name.removeprefix('turn').removesuffix('/entropy')}": name for name in turns}
    wanted = [
        ("Reward", {"mean": "reward"}, False),
        ("Share of valid boxes", {"valid": "grounding/valid_ratio"}, True),
        ("Crops", {"area of the image": "grounding/crop_area", "target covered": "grounding/coverage"}, True),
        ("Entropy of sampled tokens", entropies, False),
    ]
    return [Panel(title, _lines(history, keys), share) for title, keys, share in wanted]


def _lines(history: Sequence[Mapping[str, float]], keys: Mapping[str, str]) -> dict[str, Points]:
    lines = {}
    for label, key in keys.items():
        points = [(entry["step"], entry[key]) for entry in history if _is_number(entry.get(key)) and "step" in entry]
        if points:
            lines[label] = points
    return lines


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _draw_panel(panel: Panel) -> Image.Image:
    image = Image.new("RGB", (PANEL[0] * SCALE, PANEL[1] * SCALE), "white")
    draw = ImageDraw.Draw(image)
    left, above, right, below = (side * SCALE for side in MARGIN)
    plot = (left, above, image.width - right, image.height - below)
    points = [point for line in panel.lines.values() for point in line]
    low, high = (0.0, 1.0) if panel.share else _range([y for _, y in points])
    first, last = min(x for x, _ in points), max(x for x, _ in points)

    def at(x: float, y: float) -> tuple[float, float]:
        share = (x - first) / (last - first) if last > first else 0.5
        return plot[0] + share * (plot[2] - plot[0]), plot[3] - (y - low) / (high - low) * (plot[3] - plot[1])

    draw.text((left, 8 * SCALE), panel.title, fill=INK, font=_font(14))
    _draw_axes(draw, plot, [low, (low + high) / 2, high], [first, last] if last > first else [first], at)
    legend = left + draw.textlength(panel.title, font=_font(14)) + 24 * SCALE
    for colour, (label, line) in zip(LINES * len(panel.lines), panel.lines.items(), strict=False):
        _draw_line(draw, [at(*point) for point in line], colour)
        if len(panel.lines) > 1:
            draw.text((legend, 9 * SCALE), label, fill=colour, font=_font(12))
            legend += draw.textlength(label, font=_font(12)) + 16 * SCALE
    return image


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Bounds of an axis that holds the values: from 0 where they are not negative, and never empty."""
    low, high = min(0.0, *values), max(values)
    return low, high if high > low else low + 1.0


def _draw_axes(draw, plot, levels: Sequence[float], steps: Sequence[float], at) -> None:
    for level in levels:
        y = at(steps[0], level)[1]
        draw.line((plot[0], y, plot[2], y), fill=(226, 229, 233), width=SCALE)
        draw.text((plot[0] - 6 * SCALE, y), f"{level:.2f}", fill=SOFT, font=_font(11), anchor="rm")
    for step, anchor in zip(steps, ("la", "ra"), strict=False):
        draw.text((at(step, levels[0])[0], plot[3] + 6 * SCALE), f"{step:g}", fill=SOFT, font=_font(11), anchor=anchor)
    draw.text(((plot[0] + plot[2]) / 2, plot[3] + 6 * SCALE), "step", fill=SOFT, font=_font(11), anchor="ma")


def _draw_line(draw, points: Points, colour) -> None:
    if len(points) == 1:
        (x, y), radius = points[0], 3 * SCALE
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    else:
        draw.line(points, fill=colour, width=2 * SCALE, joint="curve")


def _font(size: int):
    return ImageFont.load_default(size * SCALE)
