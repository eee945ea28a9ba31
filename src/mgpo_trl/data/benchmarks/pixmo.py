"""Pixmo counting: how many of a thing are there, with a point on each (`pixmo-points`, `pixmo-count`).

Source rows:

```python
# pixmo-points, split train: x and y in percent of the image's width and height
{"image_url": "https://...", "image_sha256": "ab12...", "label": "oranges", "count": 2,
 "points": [{"x": 25.0, "y": 50.0}, {"x": 75.0, "y": 40.0}], "collection_method": "counting"}
# pixmo-count, split test, and train to train on: x and y in pixels; no points in test and validation
{"image_url": "https://...", "image_sha256": "cd34...", "label": "people", "count": 2,
 "points": {"x": [120.0, 610.5], "y": [300.0, 95.0]}}
```

The answer is the count, free-form; the question is in our words. The column `points` has the points in pixels of the
original image, or `None`.

The units are not verified on the data. The card of `pixmo-points` speaks of pixels, but the training code of its
authors takes percent there and pixels for `pixmo-count`; the code is followed here. A point outside the image, or
another number of points than `count`, makes a bad row, so a wrong unit does not go unseen.

Images are given by URL, and are not fetched here: give a copy whose images lie beside the table, named by their
digest, `PATH/images/<image_sha256>.jpg` (or `.png`, `.webp`, or without a suffix), or a table with a column
`image_path` or with the images themselves in `image`.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ..fields import image_of, image_size
from .common import Benchmark, Row, RowError, folder_path

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", "")
WHOLE = 100.0
"""What a coordinate in percent has at the right or lower edge."""


def _read(row: Row, folder: Path, *, in_percent: bool) -> dict[str, Any]:
    count = row["count"]
    if not isinstance(count, int) or isinstance(count, bool) or count < 0:
        raise RowError("count", f"is {count!r}. Give the number of things.")
    label = str(row["label"] or "").strip()
    if not label:
        raise RowError("label", "is empty. Say what is counted.")
    image = row["image"] if isinstance(row.get("image"), Mapping) else _image(row, folder)
    return {
        "image": image,
        "question": f"How many {label} are in the image?",
        "answer": str(count),
        "group": row.get("image_sha256") or image_of(image)["path"],
        "points": _in_pixels(_pairs(row.get("points")), count, image, in_percent),
    }


def _image(row: Row, folder: Path) -> str:
    if row.get("image_path"):
        return folder_path(folder, row["image_path"])
    digest = str(row.get("image_sha256") or "")
    for suffix in SUFFIXES:
        if digest and (folder / "images" / f"{digest}{suffix}").is_file():
            return folder_path(folder, f"images/{digest}{suffix}")
    raise RowError("image", f"is not in '{folder / 'images'}' as {digest or row.get('image_url')!r}. Fetch it there.")


def _pairs(points: Any) -> list[tuple[float, float]] | None:
    """Points in either layout: a list of `{"x", "y"}`, or the list of all x and that of all y."""
    if not points:
        return None
    try:
        if isinstance(points, Mapping):
            return [(float(x), float(y)) for x, y in zip(points["x"] or (), points["y"] or (), strict=True)] or None
        return [(float(point["x"]), float(point["y"])) for point in points]
    except (ValueError, KeyError, TypeError):
        raise RowError("points", f"is {str(points)[:100]}. Give x and y of every point.") from None


def _in_pixels(points: list | None, count: int, image: Any, in_percent: bool) -> list[list[float]] | None:
    if points is None:
        return None
    if len(points) != count:
        raise RowError("points", f"holds {len(points)} points, but `count` is {count}. Leave the row out.")
    width, height = image_size(image_of(image), True)
    x_unit, y_unit = (width / WHOLE, height / WHOLE) if in_percent else (1.0, 1.0)
    for x, y in points:
        if not (0 <= x * x_unit <= width and 0 <= y * y_unit <= height):
            unit = "percent" if in_percent else "pixels"
            raise RowError("points", f"holds ({x}, {y}) {unit}, which is outside the image of {width} x {height}.")
    return [[x * x_unit, y * y_unit] for x, y in points]


BENCHMARKS = [
    Benchmark(
        name=name,
        hub_id=f"allenai/{name}",
        split=split,
        train_split="train",
        image="image",
        read=partial(_read, in_percent=in_percent),
        required=("label", "count"),
        extras=("points",),
    )
    for name, split, in_percent in (("pixmo-points", "train", True), ("pixmo-count", "test", False))
]
