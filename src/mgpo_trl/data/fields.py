"""The fields of a row, one function each: check the value, bring it into its canonical form, or say what is wrong."""

import json
import math
from collections.abc import Mapping
from typing import Any

from ..answers import normalise_answer, parse_choices
from .image_check import check_image, image_struct

_LARGEST_PIXEL = 10**9  # also refuses NaN, infinities, and integers that no float holds


class DataError(ValueError):
    """A data set that cannot be used."""


class RowError(DataError):
    """
    One row that cannot be used.

    Args:
        field (`str`): The column at fault.
        reason (`str`): What is wrong with which value, and what to do.
        row (`int`, *optional*): Position of the row, counted from 0.
        id (`str`, *optional*): Id of the row, where it has one.
        source (`str`, *optional*): Where the row came from.
    """

    def __init__(self, field: str, reason: str, row: int | None = None, id: str | None = None, source: str = "data"):
        self.field, self.reason, self.row, self.id, self.source = field, reason, row, id, source
        named = f" (id '{id}')" if id is not None else ""
        super().__init__(f"{source}, row {row} counted from 0{named}, field `{field}`: {reason}")

    def at(self, row: int, id: str | None, source: str) -> "RowError":
        """The same error, with the row that it is about."""
        return RowError(self.field, self.reason, row, id, source)

    def as_dict(self) -> dict[str, Any]:
        """What a record keeps of a skipped row."""
        return {"row": self.row, "id": self.id, "field": self.field, "reason": self.reason}


def optional_text(row: Mapping, name: str) -> str | None:
    value = row.get(name)
    if isinstance(value, float) and math.isnan(value):  # how pandas writes an empty cell
        return None
    if value is not None and (isinstance(value, bool) or not isinstance(value, (str, int, float))):
        raise RowError(name, f"is {_shown(value)}, where text is expected.")
    return str(value).strip() or None if value is not None else None


def required_text(row: Mapping, name: str, fix: str) -> str:
    text = optional_text(row, name)
    if text is None:
        raise RowError(name, f"is missing or empty ({_shown(row.get(name))}). {fix}")
    return text


def choices_of(value: Any) -> list[str] | None:
    value = from_json_text(value)
    if isinstance(value, Mapping):  # Arrow fills the keys that other rows have
        value = {key: text for key, text in value.items() if text is not None}
    if value is None or (isinstance(value, float) and math.isnan(value)) or (not isinstance(value, int) and not value):
        return None
    try:
        return parse_choices(value)
    except ValueError as error:
        raise RowError("choices", f"{error} The row has {_shown(value)}.") from None


def answer_of(row: Mapping, choices: list[str] | None) -> str:
    fix = "Give the letter or the text of the right choice." if choices else "Give every row its right answer."
    text = required_text(row, "answer", fix)
    if choices is None:
        return text
    value = row["answer"] if isinstance(row["answer"], int) else text
    try:
        return normalise_answer(value, choices)
    except ValueError as error:
        raise RowError("answer", str(error)) from None


def image_of(value: Any) -> dict[str, Any]:
    try:
        return image_struct(value)
    except ValueError as error:
        raise RowError("image", str(error)) from None


def image_size(image: dict[str, Any], check_images: bool | str) -> tuple[int, int] | None:
    try:
        return check_image(image, check_images)
    except ValueError as error:
        raise RowError("image", str(error)) from None


def boxes_of(value: Any) -> list[list[float]] | None:
    value = from_json_text(value)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    boxes = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(boxes, (list, tuple)):
        raise RowError("target_boxes", f"is {_shown(value)}. Give a list of boxes, [[x1, y1, x2, y2], ...].")
    if boxes and not any(isinstance(box, (list, tuple)) for box in boxes):
        boxes = [boxes]
    return [_target_box(box) for box in boxes] or None


def _target_box(box: Any) -> list[float]:
    numbers = isinstance(box, (list, tuple)) and all(
        isinstance(n, (int, float)) and not isinstance(n, bool) and abs(n) < _LARGEST_PIXEL for n in box
    )
    if not numbers or len(box) != 4:
        raise RowError("target_boxes", f"holds {_shown(box)}. A box is four numbers, [x1, y1, x2, y2].")
    x1, y1, x2, y2 = box
    if x1 >= x2 or y1 >= y2:
        raise RowError("target_boxes", f"holds {list(box)}, inverted or empty. Write [left, top, right, bottom].")
    return list(box)


def check_inside(boxes: list[list[float]] | None, size: tuple[int, int] | None) -> None:
    width, height = size or (math.inf, math.inf)
    for x1, y1, x2, y2 in boxes or ():
        if x1 < 0 or y1 < 0 or x2 > width or y2 > height:
            shape = f"the image, which is {width} x {height} after its EXIF orientation" if size else "any image"
            raise RowError(
                "target_boxes",
                f"holds [{x1}, {y1}, {x2}, {y2}], which reaches outside {shape}. Give pixels of the original image.",
            )


def from_json_text(value: Any) -> Any:
    """The value of a CSV cell that holds JSON; anything else as it is."""
    if isinstance(value, str):
        value = value.strip() or None
        if value and value[0] in "[{":
            try:
                return json.loads(value)
            except (ValueError, RecursionError):
                return value
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."
