"""Points: read them from the model's text, in either coordinate system, and match them to known ones.

```python
>>> found = parse_points('[{"point_2d": [250, 500]}, {"point_2d": [750, 500]}]', (84, 84), "relative_1000")
>>> found.status.value, found.points_view
('ok', ((21.0, 42.0), (63.0, 42.0)))
>>> match_points([(10, 10), (11, 11), (90, 90)], [(10, 12), (50, 50)], radius=5)
1
```

As with boxes, points that cannot be used are data: a [`PointStatus`] says what was wrong.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from .boxes import check_settled, is_number, json_entries

POINT_KEYS = ("point_2d", "point")
MOST_POINTS = 1000
"""Points beyond these are counted, and matched to nothing: it bounds the work on a text without end."""


class PointStatus(StrEnum):
    """What became of the points that the model was asked for."""

    OK = "ok"
    """Every point is usable."""
    NO_JSON = "no_json"
    """The text holds no JSON object and is not itself a JSON list."""
    NO_POINTS = "no_points"
    """There is JSON, an empty list for instance, but no object with one of the `POINT_KEYS`."""
    NOT_NUMBERS = "not_numbers"
    """A value is not a list of exactly two finite numbers; that point is left out."""
    OUT_OF_VIEW = "out_of_view"
    """A point lies outside the view; it is left out."""


@dataclass(frozen=True)
class Points:
    """The points of one text."""

    status: PointStatus
    """Whether all are usable and, if not, what is wrong with the first that is not."""
    points_view: tuple[tuple[float, float], ...] = ()
    """(x, y) of the usable ones, in pixels of the view."""
    written: int = 0
    """How many the text names, usable or not."""


def parse_points(text: str, view_size: tuple[int, int], coordinates: str) -> Points:
    """
    Reads the points out of what the model wrote. Never raises on any text, and takes time linear in its length.

    Args:
        text (`str`): What the model wrote: JSON objects `{"point_2d": [x, y]}`, fenced or bare, with text around them.
        view_size (`tuple[int, int]`): (width, height) of the view in pixels.
        coordinates (`str`): `"absolute"` or `"relative_1000"`, as in [`~mgpo_trl.boxes.parse_box`].

    Raises:
        `ValueError`: if `coordinates` is not settled (a mistake of the caller, whatever the text).
    """
    check_settled(coordinates)
    entries, found_json = json_entries(text, POINT_KEYS)
    if not entries:
        return Points(PointStatus.NO_POINTS if found_json else PointStatus.NO_JSON)
    judged = [_judge(entry, view_size, coordinates) for entry in entries]
    bad = next((one for one in judged if isinstance(one, PointStatus)), PointStatus.OK)
    return Points(bad, tuple(one for one in judged if not isinstance(one, PointStatus)), len(entries))


def match_points(points: Sequence[tuple[float, float]], targets: Sequence[tuple[float, float]], radius: float) -> int:
    """
    Number of targets that are found: pairs at most `radius` apart, closest first, each point and target once.

    Args:
        points (`Sequence[tuple]`), targets (`Sequence[tuple]`): (x, y) in the same pixels.
        radius (`float`): Largest distance of a pair.
    """
    near = [
        (distance, number, place)
        for number, point in enumerate(points[:MOST_POINTS])
        for place, target in enumerate(targets)
        if (distance := math.dist(point, target)) <= radius
    ]
    used, found = set(), set()
    for _, number, place in sorted(near):
        if number not in used and place not in found:
            used.add(number)
            found.add(place)
    return len(found)


def _judge(entry: dict, view_size: tuple[int, int], coordinates: str) -> tuple[float, float] | PointStatus:
    numbers = next(entry[key] for key in POINT_KEYS if key in entry)
    if not (isinstance(numbers, list) and len(numbers) == 2 and all(map(is_number, numbers))):
        return PointStatus.NOT_NUMBERS
    scale = (1000, 1000) if coordinates == "relative_1000" else view_size
    if not all(0 <= value <= side for value, side in zip(numbers, scale, strict=True)):
        return PointStatus.OUT_OF_VIEW
    x, y = (value * side / whole for value, side, whole in zip(numbers, view_size, scale, strict=True))
    return (x, y)
