"""Boxes: read one from the model's text, in either coordinate system, and write one.

```python
>>> box = parse_box('[{"bbox_2d": [250, 500, 500, 750], "label": "card"}]', (84, 84), "relative_1000", min_side=14)
>>> box.status.value, box.box_text, box.box_view_px
('ok', (250, 500, 500, 750), (21, 42, 42, 63))
```

`box_text` is what the model wrote, `box_view_px` whole pixels of the resized image that it saw (the view);
[`mgpo_trl.geometry`] goes on to `box_original_px`. A box that cannot be used is data, not a crash: its [`BoxStatus`]
travels to the metric, the record and the picture.
"""

import json
import math
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

COORDINATES = ("auto", "absolute", "relative_1000")
BOX_KEYS = ("bbox_2d", "bbox", "box")

# Deeper objects are not read, which makes reading linear: no character is decoded in more than this many objects.
MAX_OBJECT_DEPTH = 32

MODEL_COORDINATES = {
    "qwen2_5_vl": "absolute",
    "qwen3_vl": "relative_1000",
    "qwen3_vl_moe": "relative_1000",
}
"""How each supported model family writes boxes, by `model_type`."""


class BoxStatus(StrEnum):
    """What became of the box that the model was asked for."""

    OK = "ok"
    """Usable: inside the view, large enough, not a sliver."""
    NO_JSON = "no_json"
    """The text holds no JSON object and is not itself a JSON list (a list cut off before its first object too)."""
    NO_BOX = "no_box"
    """There is JSON, but no object with one of the `BOX_KEYS`."""
    NOT_NUMBERS = "not_numbers"
    """The key is there, but its value is not a list of exactly four finite numbers."""
    OUT_OF_VIEW = "out_of_view"
    """A corner lies outside the view."""
    EMPTY = "empty"
    """Inverted or empty: x2 <= x1 or y2 <= y1."""
    TOO_SMALL = "too_small"
    """A side is not longer than `min_side` pixels of the view."""
    TOO_NARROW = "too_narrow"
    """The longer side is `max_aspect` times the shorter one, or more; or no processor takes a crop so long."""


@dataclass(frozen=True)
class Box:
    """One parsed box, usable or not."""

    status: BoxStatus
    """Whether the box is usable and, if not, the first reason why."""
    box_text: tuple[int | float, ...] | None = None
    """The four numbers as written (clamped to the range of a float: they can be written as strict JSON), or None."""
    box_view_px: tuple[int, int, int, int] | None = None
    """(x1, y1, x2, y2) in whole pixels of the view; None unless the status is OK."""
    label: str | None = None
    """What stands under the key `label`, if it is a string."""

    @property
    def ok(self) -> bool:
        """Whether the box is usable."""
        return self.status is BoxStatus.OK


def resolve_coordinates(coordinates: str, model_type: str | None = None) -> str:
    """
    Settles which coordinate system a model writes.

    Args:
        coordinates (`str`):
            `"absolute"` (pixels of the view), `"relative_1000"` (0 to 1000 along each side), or `"auto"`.
        model_type (`str`, *optional*):
            `model_type` of the model's configuration; read only for `"auto"`.

    Returns:
        `str`: `"absolute"` or `"relative_1000"`.

    Raises:
        `ValueError`: for an unknown value, or for `"auto"` with a model family that is not known.
    """
    if coordinates not in COORDINATES:
        raise ValueError(f"`coordinates` must be one of {list(COORDINATES)}, got {coordinates!r}.")
    if coordinates != "auto":
        return coordinates
    if model_type not in MODEL_COORDINATES:
        raise ValueError(
            f"`coordinates='auto'` knows the model types {sorted(MODEL_COORDINATES)}, got {model_type!r}. Pass "
            "`coordinates='absolute'` for a model that writes pixels of the image it sees, or "
            "`coordinates='relative_1000'` for one that writes 0 to 1000 along each side."
        )
    return MODEL_COORDINATES[model_type]


def parse_box(
    text: str, view_size: tuple[int, int], coordinates: str, *, min_side: float = 28, max_aspect: float = 100
) -> Box:
    """
    Reads the box out of what the model wrote. Never raises on any text, and takes time linear in its length.

    The JSON may be fenced or bare, a list or a single object, nested, with extra keys and with text around it. With
    several boxes the first usable one counts; where none is usable, the first one is returned with its status.

    Args:
        text (`str`):
            What the model wrote.
        view_size (`tuple[int, int]`):
            (width, height) of the view in pixels.
        coordinates (`str`):
            `"absolute"` or `"relative_1000"`; settle `"auto"` with [`resolve_coordinates`] first.
        min_side (`float`, *optional*, defaults to `28`):
            Both sides must be longer than this, in pixels of the view.
        max_aspect (`float`, *optional*, defaults to `100`):
            The longer side must be less than this many times the shorter one.

    Returns:
        [`Box`]: with `box_view_px` rounded to the nearest whole pixels if the status is OK.

    Raises:
        `ValueError`: if `coordinates` is not settled (a mistake of the caller, whatever the text).
    """
    check_settled(coordinates)
    entries, found_json = json_entries(text, BOX_KEYS)
    if not entries:
        return Box(BoxStatus.NO_BOX if found_json else BoxStatus.NO_JSON)
    boxes = [_judge_entry(entry, view_size, coordinates, min_side, max_aspect) for entry in entries]
    return next((box for box in boxes if box.ok), boxes[0])


def format_box(
    box_view_px: Sequence[float], view_size: tuple[int, int], coordinates: str, label: str | None = None
) -> str:
    """
    Writes a box the way the model is asked to: a fenced JSON list with one object.

    Args:
        box_view_px (`Sequence[float]`):
            (x1, y1, x2, y2) in pixels of the view; fractions are rounded to nearest.
        view_size (`tuple[int, int]`):
            (width, height) of the view in pixels.
        coordinates (`str`):
            `"absolute"` or `"relative_1000"`. Absolute boxes are read back by [`parse_box`] exactly; relative ones
            exactly where the view is less than 1000 pixels long, else to the nearest thousandth of the side.
        label (`str`, *optional*):
            Written under the key `label` where given.

    Returns:
        `str`: the fenced JSON text.
    """
    check_settled(coordinates)
    if coordinates == "relative_1000":
        sides = (*view_size, *view_size)
        numbers = [_nearest(value * 1000 / side) for value, side in zip(box_view_px, sides, strict=True)]
    else:
        numbers = [_nearest(value) for value in box_view_px]
    entry = {"bbox_2d": numbers} if label is None else {"bbox_2d": numbers, "label": label}
    return f"```json\n[{json.dumps(entry, ensure_ascii=False)}]\n```"


def check_settled(coordinates: str) -> None:
    """Refuse, with a `ValueError`, what is not a settled coordinate system."""
    if coordinates not in COORDINATES[1:]:
        known = " or ".join(map(repr, COORDINATES[1:]))
        raise ValueError(f"`coordinates` must be {known}, got {coordinates!r}. Use `resolve_coordinates` first.")


def _object_spans(text: str, respect_strings: bool) -> list[tuple[int, int]]:
    """(start, end) of every balanced {...} that nests at most `MAX_OBJECT_DEPTH` deep, by start.

    A quote opens a string only inside braces, and no string crosses a line: stray quotes of the prose do little harm.
    """
    spans, stack, in_string = [], [], False  # stack of [start, depth of the objects inside]
    for match in re.finditer(r'\\.|["{}\n]' if respect_strings else "[{}]", text):
        token = match.group()
        if token == "\n":
            in_string = False
        elif token == '"':
            in_string = not in_string and bool(stack)
        elif in_string or len(token) == 2:
            continue
        elif token == "{":
            stack.append([match.start(), 0])
        elif stack:
            start, depth = stack.pop()
            if stack:
                stack[-1][1] = max(stack[-1][1], depth + 1)
            if depth < MAX_OBJECT_DEPTH:
                spans.append((start, match.end()))
    return sorted(spans)


def _decode_objects(text: str, respect_strings: bool) -> Iterator[dict]:
    """Every JSON object of the text that is not part of another one, in order."""
    done = 0
    for start, end in _object_spans(text, respect_strings):
        value = _decode(text[start:end]) if start >= done else None
        if value is not None:
            done = end
            yield value


def _decode(text: str):
    try:
        return _DECODER.decode(text)
    except (ValueError, RecursionError):
        return None


def _decode_int(digits: str) -> int | float:
    return int(digits) if len(digits) <= 18 else _decode_float(digits)


def _decode_float(digits: str) -> float:
    return max(-sys.float_info.max, min(float(digits), sys.float_info.max))


# NaN and Infinity become strings, hence "not numbers"; every other number is finite and safe to write again.
_DECODER = json.JSONDecoder(parse_int=_decode_int, parse_float=_decode_float, parse_constant=str)


def _is_json_list(text: str) -> bool:
    """Whether the text, or its first fenced block, is a JSON list as a whole."""
    opening = text.find("```")
    closing = text.find("```", opening + 3) if opening >= 0 else -1
    body = text[opening + 3 : closing].removeprefix("json") if closing >= 0 else text
    return isinstance(_decode(body.strip()), list)


def json_entries(text: str, keys: Sequence[str]) -> tuple[list[dict], bool]:
    """Every JSON object of a text that has one of the keys, in order, and whether there is any JSON in the text. Never
    raises, and takes linear time."""
    found_json = False
    for respect_strings in (True, False):
        values = list(_decode_objects(text, respect_strings))
        entries = [entry for value in values for entry in _entries(value, keys)]
        found_json = found_json or bool(values)
        if entries:
            return entries, True
    return [], found_json or _is_json_list(text)


def _entries(value, keys: Sequence[str]) -> Iterator[dict]:
    """Every object with one of the keys inside a JSON value, in the order of the text (a loop: lists nest deeply)."""
    todo = [value]
    while todo:
        item = todo.pop()
        if isinstance(item, dict):
            if any(key in item for key in keys):
                yield item
            item = list(item.values())
        if isinstance(item, list):
            todo.extend(reversed(item))


def _judge_entry(entry: dict, view_size: tuple[int, int], coordinates: str, min_side: float, max_aspect: float) -> Box:
    label = entry.get("label")
    label = label.encode("utf-8", "replace").decode("utf-8") if isinstance(label, str) else None
    numbers = next(entry[key] for key in BOX_KEYS if key in entry)
    if not (isinstance(numbers, list) and len(numbers) == 4 and all(map(is_number, numbers))):
        return Box(BoxStatus.NOT_NUMBERS, label=label)
    box_view_px = _text_to_view(numbers, view_size, coordinates)
    status = _check_box(box_view_px, view_size, min_side, max_aspect)
    return Box(status, tuple(numbers), box_view_px if status is BoxStatus.OK else None, label)


def is_number(value) -> bool:
    """Whether a value read from JSON is a number (true and false are none)."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _text_to_view(
    numbers: Sequence[float], view_size: tuple[int, int], coordinates: str
) -> tuple[int, int, int, int] | None:
    """The box in whole pixels of the view; None where a number is too far out to be converted."""
    if max(map(abs, numbers)) > 1e9:
        return None
    if coordinates == "relative_1000":
        numbers = [value * side / 1000 for value, side in zip(numbers, (*view_size, *view_size), strict=True)]
    x1, y1, x2, y2 = map(_nearest, numbers)
    return x1, y1, x2, y2


def _nearest(value: float) -> int:
    """The nearest integer, halves upwards (Python's `round` takes halves to the even neighbour)."""
    return math.floor(value + 0.5)


def _check_box(
    box_view_px: tuple[int, int, int, int] | None, view_size: tuple[int, int], min_side: float, max_aspect: float
) -> BoxStatus:
    if box_view_px is None:
        return BoxStatus.OUT_OF_VIEW
    x1, y1, x2, y2 = box_view_px
    if min(box_view_px) < 0 or max(x1, x2) > view_size[0] or max(y1, y2) > view_size[1]:
        return BoxStatus.OUT_OF_VIEW
    short, long = sorted((x2 - x1, y2 - y1))
    if short <= 0:
        return BoxStatus.EMPTY
    if short <= min_side:
        return BoxStatus.TOO_SMALL
    return BoxStatus.TOO_NARROW if long >= max_aspect * short else BoxStatus.OK
