"""Points from text, matched to known ones; the same reading of JSON as boxes."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mgpo_trl.points import MOST_POINTS, PointStatus, match_points, parse_points

VIEW = (84, 168)


@pytest.mark.parametrize(
    ("text", "status", "points"),
    [
        ('```json\n[{"point_2d": [10, 20], "label": "x"}, {"point_2d": [84, 168]}]\n```', "ok", ((10, 20), (84, 168))),
        ('Here: {"point": [1.5, 2]} and so on', "ok", ((1.5, 2),)),
        ('{"points": [{"point_2d": [1, 2]}, {"point_2d": [3, 4]}]}', "ok", ((1, 2), (3, 4))),
        ('[{"point_2d": [1, 2]}, {"point_2d": [85, 4]}]', "out_of_view", ((1, 2),)),
        ('[{"point_2d": [1, 2, 3]}, {"point_2d": [3, 4]}]', "not_numbers", ((3, 4),)),
        ('[{"point_2d": [NaN, 2]}]', "not_numbers", ()),
        ('[{"point_2d": [true, 2]}]', "not_numbers", ()),
        ('[{"bbox_2d": [1, 2, 3, 4]}]', "no_points", ()),
        ("```json\n[]\n```", "no_points", ()),
        ("I count 7.", "no_json", ()),
        ('[{"point_2d": [1, 2', "no_json", ()),
        ('[{"point_2d": [1e400, 2]}]', "out_of_view", ()),
    ],
)
def test_absolute_points(text, status, points):
    found = parse_points(text, VIEW, "absolute")
    assert (found.status.value, found.points_view) == (status, points)


def test_worked_examples():
    found = parse_points('[{"point_2d": [250, 500]}, {"point_2d": [750, 500]}]', (84, 84), "relative_1000")
    assert (found.status, found.points_view, found.written) == (PointStatus.OK, ((21.0, 42.0), (63.0, 42.0)), 2)
    assert parse_points('{"point_2d": [1001, 0]}', VIEW, "relative_1000").status is PointStatus.OUT_OF_VIEW
    assert match_points([(10, 10), (11, 11), (90, 90)], [(10, 12), (50, 50)], radius=5) == 1


@pytest.mark.parametrize("coordinates", ["auto", "pixels"])
def test_unsettled_coordinates_are_the_callers_mistake(coordinates):
    with pytest.raises(ValueError, match="resolve_coordinates"):
        parse_points("", VIEW, coordinates)


@given(st.text() | st.text(alphabet='{}[]",:point_2d0129.-eE\n '))
def test_any_text_is_read(text):
    found = parse_points(text, VIEW, "absolute")
    assert len(found.points_view) <= found.written
    assert (found.status is PointStatus.OK) == (0 < found.written == len(found.points_view))


def test_matching_takes_the_closest_pairs_first_and_each_once():
    assert match_points([(0, 0)], [(0, 1), (0, 2)], 5) == 1
    assert match_points([(0, 0), (0, 3)], [(0, 1), (0, 4)], 2) == 2
    assert match_points([(0, 0), (0, 2)], [(0, 1)], 1) == 1
    assert match_points([], [(0, 1)], 5) == match_points([(0, 1)], [], 5) == 0
    assert match_points([(0, 0)], [(0, 5)], 5) == 1 and match_points([(0, 0)], [(0, 5.01)], 5) == 0


def test_endless_points_are_bounded():
    text = '{"point_2d": [1, 2]}' * (3 * MOST_POINTS)
    found = parse_points(text, VIEW, "absolute")
    assert found.written == 3 * MOST_POINTS
    assert match_points(found.points_view, [(1, 2)] * 50, math.inf) == 50
