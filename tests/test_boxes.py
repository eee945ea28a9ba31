"""`parse_box` on every kind of text, its statuses, and the way back with `format_box`."""

import json
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mgpo_trl import boxes
from mgpo_trl.boxes import MAX_OBJECT_DEPTH, Box, BoxStatus, format_box, parse_box, resolve_coordinates

VIEW = (640, 480)
GOOD = '{"bbox_2d": [10, 20, 100, 200], "label": "cup"}'
GOOD_PX = (10, 20, 100, 200)


def parse(text, view_size=VIEW, coordinates="absolute", **limits):
    return parse_box(text, view_size, coordinates, **limits)


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        f"[{GOOD}]",
        f"```json\n[{GOOD}]\n```",
        f"```\n{GOOD}\n```",
        f"The cup stands on the left.\n\n```json\n[\n\t{GOOD}\n]\n```\nI will look there.",
        f'{{"score": 0.5, "more": {{"deep": [1, {{}}]}}, {GOOD[1:]}',
        '{"bbox": [10, 20, 100, 200], "label": "cup"}',
        '{"box": [10, 20, 100, 200], "label": "cup"}',
        f'{{"result": {{"boxes": [{GOOD}]}}}}',
        f"Braces {{like these}} and {{ this one, then {GOOD}",
        f'A 5" screen {{on the "left}} and [1]: {GOOD}',
        f"\\[ x \\{{ \\] {GOOD}",
        f'"{GOOD}"',
        f"[{GOOD}, {{",
        '{"bbox_2d": [10.4, 19.5, 1e2, 200.0], "label": "cup"}',
    ],
)
def test_accepts_every_layout(text):
    box = parse(text)
    assert (box.status, box.box_view_px, box.label) == (BoxStatus.OK, GOOD_PX, "cup")
    assert box.ok


@pytest.mark.parametrize("label", ["a } b", "{", "}}", 'say \\"{\\"', "\\\\"])
def test_braces_and_quotes_in_a_label_are_text(label):
    box = parse(f'{{"bbox_2d": [10, 20, 100, 200], "label": "{label}"}}')
    assert (box.box_view_px, box.label) == (GOOD_PX, json.loads(f'"{label}"'))


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("", "no_json"),
        ("The cup is at 10, 20, 100, 200.", "no_json"),
        ('[{"bbox_2d": [10, 20, 100, 200], "label": "cu', "no_json"),
        ("{'bbox_2d': [10, 20, 100, 200]}", "no_json"),
        ("{10, 20, 100, 200}", "no_json"),
        ("[]", "no_box"),
        ("```json\n[]\n```", "no_box"),
        ("[10, 20, 100, 200]", "no_box"),
        ('{"label": "cup"}', "no_box"),
        ('{"bbox_2d": null}', "not_numbers"),
        ('{"bbox_2d": [10, 20, 100]}', "not_numbers"),
        ('{"bbox_2d": [10, 20, 100, 200, 300]}', "not_numbers"),
        ('{"bbox_2d": ["10", 20, 100, 200]}', "not_numbers"),
        ('{"bbox_2d": [true, 20, 100, 200]}', "not_numbers"),
        ('{"bbox_2d": [NaN, 20, 100, 200]}', "not_numbers"),
        ('{"bbox_2d": [10, 20, Infinity, 200]}', "not_numbers"),
        ('{"bbox_2d": [10, 20, -Infinity, 200]}', "not_numbers"),
        ('{"bbox_2d": {"x1": 10}}', "not_numbers"),
        ('{"bbox_2d": [10, 20, 641, 200]}', "out_of_view"),
        ('{"bbox_2d": [10, 20, 100, 481]}', "out_of_view"),
        ('{"bbox_2d": [-1, 20, 100, 200]}', "out_of_view"),
        ('{"bbox_2d": [900, 20, 100, 200]}', "out_of_view"),
        ('{"bbox_2d": [10, 20, 1e400, 200]}', "out_of_view"),
        ('{"bbox_2d": [10, 20, 1' + "0" * 5000 + ", 200]}", "out_of_view"),
        ('{"bbox_2d": [100, 20, 10, 200]}', "empty"),
        ('{"bbox_2d": [10, 20, 10, 200]}', "empty"),
        ('{"bbox_2d": [10, 200, 100, 20]}', "empty"),
        ('{"bbox_2d": [10, 20, 38, 200]}', "too_small"),
        ('{"bbox_2d": [10, 20, 100, 48]}', "too_small"),
    ],
)
def test_names_what_is_wrong(text, status):
    box = parse(text)
    assert (box.status, box.box_view_px, box.ok) == (BoxStatus(status), None, False)
    json.dumps(box.box_text, allow_nan=False)


def test_limits_are_where_they_are_said_to_be():
    assert parse('{"bbox_2d": [0, 0, 640, 480]}').ok
    assert parse('{"bbox_2d": [10, 20, 39, 49]}').ok
    assert parse('{"bbox_2d": [10, 20, 38, 48]}', min_side=27).ok
    assert parse('{"bbox_2d": [0, 0, 299, 3]}', min_side=2).ok
    assert parse('{"bbox_2d": [0, 0, 300, 3]}', min_side=2).status is BoxStatus.TOO_NARROW
    assert parse('{"bbox_2d": [0, 0, 3, 300]}', min_side=2).status is BoxStatus.TOO_NARROW


def test_first_usable_box_counts_else_the_first():
    small, outside = '{"bbox_2d": [1, 1, 9, 9]}', '{"bbox_2d": [0, 0, 999, 99]}'
    other = '{"bbox_2d": [0, 0, 99, 99]}'
    assert parse(f"{small} {outside} {GOOD} {other}").box_view_px == GOOD_PX
    assert parse(f"[{outside}, {small}]").status is BoxStatus.OUT_OF_VIEW
    assert parse(f'{{"note": 1}} {small}').status is BoxStatus.TOO_SMALL


def test_box_text_is_what_the_model_wrote():
    assert parse('{"bbox_2d": [250, 500, 500, 750]}', (84, 84), "relative_1000", min_side=14) == Box(
        BoxStatus.OK, (250, 500, 500, 750), (21, 42, 42, 63), None
    )
    assert parse('{"bbox_2d": [1.25, 2, -3, 12345678901234567890]}').box_text == (1.25, 2, -3, 1.2345678901234567e19)


@pytest.mark.parametrize("number", ["1e308", "-1e308", "1e999", "-" + "9" * 5000, "1000.6"])
@pytest.mark.parametrize("place", range(4))
def test_far_numbers_are_out_of_view_in_thousandths_too(number, place):
    numbers = ["100", "100", "900", "900"]
    numbers[place] = number
    box = parse(f'{{"bbox_2d": [{", ".join(numbers)}]}}', (4000, 4000), "relative_1000")
    assert box.status is BoxStatus.OUT_OF_VIEW
    json.dumps(box.box_text, allow_nan=False)


def test_label_can_always_be_written_to_a_file():
    assert parse('{"bbox_2d": [10, 20, 100, 200], "label": "\\ud800x"}').label.encode() == b"?x"
    assert parse('{"bbox_2d": [10, 20, 100, 200], "label": 7}').label is None


@pytest.mark.parametrize("coordinates", ["auto", "pixels", None])
def test_unsettled_coordinates_are_the_callers_mistake(coordinates):
    with pytest.raises(ValueError, match="resolve_coordinates"):
        parse(GOOD, coordinates=coordinates)


def test_resolve_coordinates():
    assert resolve_coordinates("auto", "qwen2_5_vl") == "absolute"
    assert resolve_coordinates("auto", "qwen3_vl") == resolve_coordinates("auto", "qwen3_vl_moe") == "relative_1000"
    assert resolve_coordinates("relative_1000", "llava") == "relative_1000"
    assert resolve_coordinates("absolute") == "absolute"
    for model_type in ("llava", None):
        with pytest.raises(ValueError, match=f"{model_type!r}.*'absolute'.*'relative_1000'"):
            resolve_coordinates("auto", model_type)
    with pytest.raises(ValueError, match=r"'auto', 'absolute', 'relative_1000'.*'0-1'"):
        resolve_coordinates("0-1", "qwen3_vl")


# --- never raises ------------------------------------------------------------------------------------------------


def json_values(keys):
    return st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers(-(10**30), 10**30) | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.sampled_from(keys), inner, max_size=3),
        max_leaves=20,
    )


pieces = st.sampled_from(
    ['"', "\\", "{", "}", "[", "]", ",", ":", "```", "json", "\n", " ", "1", "-", "1e999", "NaN", "Infinity", GOOD]
    + ['"bbox_2d"', '"bbox_2d": [', "10, 20, 100, 200", "9" * 5000, "\ud800", "{'", "\x00", "é"]
)
systems = st.sampled_from(["absolute", "relative_1000"])


def check_sound(box, view_size):
    """Whatever the text: a box of the right form, inside the view where it is usable, that can be put on record."""
    assert isinstance(box, Box)
    assert box.ok == (box.box_view_px is not None)
    json.dumps([box.box_text, box.label], allow_nan=False, ensure_ascii=False).encode()
    if box.ok:
        x1, y1, x2, y2 = box.box_view_px
        assert all(type(value) is int for value in box.box_view_px)
        assert 0 <= x1 < x2 - 28 <= view_size[0] and 0 <= y1 < y2 - 28 <= view_size[1]


@given(st.text() | st.lists(pieces, max_size=30).map("".join), systems)
def test_never_raises_on_text(text, coordinates):
    check_sound(parse(text, coordinates=coordinates), VIEW)


@given(json_values(["bbox_2d", "bbox", "box", "label", "a"]), systems)
def test_never_raises_on_json(value, coordinates):
    check_sound(parse(json.dumps(value), coordinates=coordinates), VIEW)


@given(json_values(["a", "b}"]), json_values(["{", "label"]))
@example({"a": [{}]}, ["}", "{"])
def test_a_box_is_found_inside_any_json(before, inside):
    text = json.dumps([{"before": before}, {"extra": inside, "bbox_2d": list(GOOD_PX)}])
    assert parse(text).box_view_px == GOOD_PX


# --- linear ------------------------------------------------------------------------------------------------------

UNITS = {"`": 1_000_000, "[": 1_000_000, "{": 1_000_000, '"': 1_000_000, "{}": 400_000}
UNITS |= dict.fromkeys(["}", "\\", '\\"', '{"', '{"a":', '{"a":[', '{"bbox_2d":', GOOD, "``` ", "[[{", "{\n"], 300_000)
NESTED = ['{"a":' * 50_000 + "1" + "}" * 50_000, '{"a":' + "[" * 500_000 + "]" * 500_000 + "}"]
FAILING = [('{"a":' * depth + "1!" + "}" * depth) * (300_000 // (6 * depth)) for depth in (1, 8, 32, 100)]
LONG = [(unit * length)[:length] for unit, length in UNITS.items()] + NESTED + FAILING


@pytest.mark.parametrize("text", LONG, ids=lambda text: text[:12])
def test_work_is_linear(text, monkeypatch):
    decoded = []
    original = boxes._decode
    monkeypatch.setattr(boxes, "_decode", lambda part: decoded.append(len(part)) or original(part))
    check_sound(parse(text), VIEW)
    assert sum(decoded) <= 2 * (MAX_OBJECT_DEPTH + 1) * len(text)


def test_objects_deeper_than_the_limit_are_not_read():
    def wrap(depth):
        return '{"a": ' * depth + GOOD + "}" * depth

    assert parse(wrap(MAX_OBJECT_DEPTH - 1)).ok and parse(wrap(10 * MAX_OBJECT_DEPTH)).ok  # the inner ones are read
    assert not parse(GOOD[:-1] + ', "more": ' + '{"a": ' * 1000 + "1" + "}" * 1001).ok


# --- the way back ------------------------------------------------------------------------------------------------

sides = st.integers(56, 4000)


@st.composite
def views_with_boxes(draw, side=sides):
    """A view and a box in it that passes every check."""
    view_size = draw(st.tuples(side, side))
    corners = []
    for length in view_size:
        low = draw(st.integers(0, length - 42))
        corners.append((low, draw(st.integers(low + 41, length))))
    (x1, x2), (y1, y2) = corners
    return view_size, (x1, y1, x2, y2)


@given(views_with_boxes(), st.text())
def test_absolute_boxes_come_back_exactly(case, label):
    view_size, box_view_px = case
    box = parse(format_box(box_view_px, view_size, "absolute", label), view_size, "absolute")
    assert box.box_view_px == box.box_text == box_view_px
    assert box.label == label


@given(views_with_boxes(st.integers(56, 1000)))
def test_relative_boxes_come_back_exactly_in_small_views(case):
    view_size, box_view_px = case
    assert parse(format_box(box_view_px, view_size, "relative_1000"), *(view_size, "relative_1000")).box_view_px == (
        box_view_px
    )


@settings(max_examples=300)
@given(views_with_boxes(st.integers(1000, 9000)))
def test_relative_boxes_come_back_to_a_thousandth_in_large_views(case):
    view_size, box_view_px = case
    box = parse(
        format_box(box_view_px, view_size, "relative_1000"), view_size, "relative_1000", min_side=20, max_aspect=1000
    )
    for back, wanted, side in zip(box.box_view_px, box_view_px, view_size * 2, strict=True):
        assert abs(back - wanted) <= side / 2000 + 0.5


def test_format_box_writes_what_the_prompt_asks_for():
    assert format_box((21, 42, 42, 63), (84, 84), "relative_1000", "card") == (
        '```json\n[{"bbox_2d": [250, 500, 500, 750], "label": "card"}]\n```'
    )
    assert format_box((20.6, 42.4, 42, 63), (84, 84), "absolute") == '```json\n[{"bbox_2d": [21, 42, 42, 63]}]\n```'
    with pytest.raises(ValueError, match=re.escape("'absolute' or 'relative_1000', got 'auto'")):
        format_box((0, 0, 9, 9), (84, 84), "auto")
