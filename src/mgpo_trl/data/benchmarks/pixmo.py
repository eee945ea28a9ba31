"""Pixmo counting: how many of a thing are there, with a point on each (`pixmo-points`) or without (`pixmo-count`).

Source rows:

```python
{"image_url": "https://...", "image_sha256": "ab12...", "label": "oranges", "count": 2,
 "points": [{"x": 25.0, "y": 50.0}, {"x": 75.0, "y": 40.0}], "collection_method": "counting"}
```

The answer is the count, free-form; the question is in our words. Points are percent of width and height in the source
(read off its documentation, not verified on the data); the column `points` has them in pixels of the original image.

Images are given by URL, and are not fetched here: give a copy whose images lie beside the table, named by their
digest, `PATH/images/<image_sha256>.jpg` (or `.png`, `.webp`, or without a suffix), or a table with a column
`image_path`.
"""

from pathlib import Path
from typing import Any

from .common import Benchmark, Row, RowError, folder_path

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", "")


def _read(row: Row, folder: Path) -> dict[str, Any]:
    count = row["count"]
    if not isinstance(count, int) or isinstance(count, bool) or count < 0:
        raise RowError("count", f"is {count!r}. Give the number of things.")
    label = str(row["label"] or "").strip()
    if not label:
        raise RowError("label", "is empty. Say what is counted.")
    path = _image(row, folder)
    read = {
        "image": path,
        "question": f"How many {label} are in the image?",
        "answer": str(count),
        "group": row.get("image_sha256") or path,
    }
    if row.get("points") is not None:
        read["points"] = _in_pixels(row["points"], path)
    return read


def _image(row: Row, folder: Path) -> str:
    if row.get("image_path"):
        return folder_path(folder, row["image_path"])
    digest = str(row.get("image_sha256") or "")
    for suffix in SUFFIXES:
        if digest and (folder / "images" / f"{digest}{suffix}").is_file():
            return folder_path(folder, f"images/{digest}{suffix}")
    raise RowError("image", f"is not in '{folder / 'images'}' as {digest or row.get('image_url')!r}. Fetch it there.")


def _in_pixels(points: list[dict], path: str) -> list[list[float]]:
    from ..image_check import check_image

    try:
        width, height = check_image({"bytes": None, "path": path})
        return [[point["x"] * width / 100, point["y"] * height / 100] for point in points]
    except (ValueError, KeyError, TypeError) as error:
        raise RowError("points", f"cannot be placed on the image ({error}). Give x and y in percent.") from None


BENCHMARKS = [
    Benchmark(
        name=name,
        hub_id=f"allenai/{name}",
        split=split,
        read=_read,
        required=("label", "count"),
        extras=extras,
    )
    for name, split, extras in (("pixmo-points", "train", ("points",)), ("pixmo-count", "test", ()))
]
