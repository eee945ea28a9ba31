"""Geometry: carry a box between the view and the original image, and measure what it covers.

Three coordinate spaces are never mixed, and every name says which one it is in: `box_text` (the numbers as the model
wrote them), `box_view_px` (pixels of the resized image that the model saw) and `box_original_px` (pixels of the
original image after its EXIF orientation has been applied).

```python
>>> view_to_original((21, 42, 42, 63), (84, 84), (336, 336))
(84, 168, 168, 252)
>>> coverage((84, 168, 168, 252), [(84, 168, 168, 336)])
0.5
```
"""

import math
from collections.abc import Sequence

MAX_ASPECT = 200
"""Longest image that the processors of the Qwen-VL family accept, in multiples of its shorter side."""

HIT_COVERAGE = 0.5
"""Share of the target area that a box must cover to count as a hit."""


def view_to_original(
    box_view_px: tuple[int, int, int, int], view_size: tuple[int, int], original_size: tuple[int, int]
) -> tuple[int, int, int, int]:
    """
    Maps a box from the view to the original image, rounding outwards in exact integer arithmetic.

    The region that the box names is wholly inside the result, which exceeds it by less than one original pixel on each
    side. The result is clipped to the image and never empty.

    Args:
        box_view_px (`tuple[int, int, int, int]`):
            (x1, y1, x2, y2) in whole pixels of the view, with x1 < x2 and y1 < y2.
        view_size (`tuple[int, int]`), original_size (`tuple[int, int]`):
            (width, height) of the view and of the original image.

    Returns:
        `tuple[int, int, int, int]`: box_original_px.

    Raises:
        `ValueError`: if the box is empty or lies wholly outside the view.
    """
    x1, y1, x2, y2 = box_view_px
    (view_w, view_h), (width, height) = view_size, original_size
    if not (max(x1, 0) < min(x2, view_w) and max(y1, 0) < min(y2, view_h)):
        raise ValueError(
            f"`box_view_px` must overlap the view {tuple(view_size)}, got {tuple(box_view_px)}. Map only boxes whose "
            "status is OK."
        )
    return (
        max(x1 * width // view_w, 0),
        max(y1 * height // view_h, 0),
        min(-(-x2 * width // view_w), width),
        min(-(-y2 * height // view_h), height),
    )


def original_to_view(
    box_original_px: Sequence[float], original_size: tuple[int, int], view_size: tuple[int, int]
) -> tuple[float, float, float, float]:
    """
    Maps a box from the original image to the view, unrounded.

    Args:
        box_original_px (`Sequence[float]`):
            (x1, y1, x2, y2) in pixels of the original image.
        original_size (`tuple[int, int]`), view_size (`tuple[int, int]`):
            (width, height) of the original image and of the view.

    Returns:
        `tuple[float, float, float, float]`: (x1, y1, x2, y2) in pixels of the view.
    """
    x1, y1, x2, y2 = box_original_px
    scale_x, scale_y = view_size[0] / original_size[0], view_size[1] / original_size[1]
    return x1 * scale_x, y1 * scale_y, x2 * scale_x, y2 * scale_y


def box_area_fraction(box_original_px: Sequence[float], original_size: tuple[int, int]) -> float:
    """Area of the box over the area of the image (width, height)."""
    x1, y1, x2, y2 = box_original_px
    return (x2 - x1) * (y2 - y1) / (original_size[0] * original_size[1])


def coverage(box_original_px: Sequence[float], target_boxes: Sequence[Sequence[float]]) -> float:
    """
    Share of the targets that the box covers: |box & targets| / |targets|, each the exact area of a union.

    Args:
        box_original_px (`Sequence[float]`):
            (x1, y1, x2, y2) of the crop.
        target_boxes (`Sequence[Sequence[float]]`):
            Boxes in the same pixels. Where they overlap, the shared area counts once.

    Returns:
        `float`: between 0 and 1.

    Raises:
        `ValueError`: if the targets have no area.
    """
    total = _union_area(target_boxes)
    if total <= 0:
        raise ValueError(
            f"`target_boxes` must have an area, got {[list(box) for box in target_boxes]}. Use None for a row whose "
            "target is not known."
        )
    x1, y1, x2, y2 = box_original_px
    clipped = [(max(a, x1), max(b, y1), min(c, x2), min(d, y2)) for a, b, c, d in target_boxes]
    return _union_area(clipped) / total


def hit(box_original_px: Sequence[float], target_boxes: Sequence[Sequence[float]]) -> bool:
    """Whether the box covers at least half of the area of the targets. The whole image always does: read a hit rate
    beside the area of the crops."""
    return coverage(box_original_px, target_boxes) >= HIT_COVERAGE


def _union_area(boxes: Sequence[Sequence[float]]) -> float:
    """Exact area of a union of rectangles: slabs between neighbouring x edges, intervals of y merged in each."""
    boxes = [box for box in boxes if box[0] < box[2] and box[1] < box[3]]
    edges = sorted({x for box in boxes for x in (box[0], box[2])})
    area = 0
    for left, right in zip(edges, edges[1:], strict=False):
        reach, height = -math.inf, 0
        for _, low, _, high in sorted((b for b in boxes if b[0] <= left and right <= b[2]), key=lambda b: b[1]):
            height += max(0, high - max(low, reach))
            reach = max(reach, high)
        area += (right - left) * height
    return area
