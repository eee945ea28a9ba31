"""The mapping between the view and the original, and the measures of a box, against slow and obvious counting."""

from fractions import Fraction
from math import prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgpo_trl.boxes import format_box, parse_box
from mgpo_trl.geometry import box_area_fraction, coverage, hit, original_to_view, view_to_original

sizes = st.tuples(st.integers(60, 3000), st.integers(60, 3000))
original_sizes = st.tuples(st.integers(1, 20000), st.integers(1, 20000))


@st.composite
def boxes_in(draw, size, least=1):
    """A box in an area of this size, with sides of at least `least`."""
    corners = []
    for length in size:
        low = draw(st.integers(0, length - least))
        corners.append((low, draw(st.integers(low + least, length))))
    (x1, x2), (y1, y2) = corners
    return x1, y1, x2, y2


def check_outward(box_original_px, named):
    """The named region (exact fractions) is inside the box, which exceeds it by less than one pixel a side."""
    for got, wanted in zip(box_original_px[:2], named[:2], strict=True):
        assert type(got) is int and 0 <= wanted - got < 1
    for got, wanted in zip(box_original_px[2:], named[2:], strict=True):
        assert type(got) is int and 0 <= got - wanted < 1


@settings(max_examples=400)
@given(st.data(), sizes, original_sizes)
def test_outward_rounding(data, view_size, original_size):
    box_view_px = data.draw(boxes_in(view_size))
    box = view_to_original(box_view_px, view_size, original_size)
    scale = [Fraction(o, v) for o, v in zip(original_size, view_size, strict=True)] * 2
    check_outward(box, [value * s for value, s in zip(box_view_px, scale, strict=True)])
    assert 0 <= box[0] < box[2] <= original_size[0] and 0 <= box[1] < box[3] <= original_size[1]


@settings(max_examples=300)
@given(st.data(), sizes, original_sizes, st.sampled_from(["absolute", "relative_1000"]))
def test_text_to_crop_and_back(data, view_size, original_size, coordinates):
    box_view_px = data.draw(boxes_in(view_size, least=41))
    box = parse_box(format_box(box_view_px, view_size, coordinates), view_size, coordinates)
    assert box.ok
    per_text = [Fraction(1) if coordinates == "absolute" else Fraction(side, 1000) for side in view_size] * 2
    for text, pixel, scale in zip(box.box_text, box.box_view_px, per_text, strict=True):
        assert abs(text * scale - pixel) <= Fraction(1, 2)  # what the model wrote, to the nearest pixel of the view
    x1, y1, x2, y2 = view_to_original(box.box_view_px, view_size, original_size)
    back = original_to_view((x1, y1, x2, y2), original_size, view_size)
    per_pixel = [v / o for v, o in zip(view_size, original_size, strict=True)] * 2
    for sign, value, wanted, scale in zip((1, 1, -1, -1), back, box.box_view_px, per_pixel, strict=True):
        assert -1e-6 <= sign * (wanted - value) < scale + 1e-6
    crop_size = (x2 - x1, y2 - y1)
    for axis in (0, 1):
        exact = Fraction(box.box_view_px[axis + 2] - box.box_view_px[axis]) * original_size[axis] / view_size[axis]
        assert exact <= crop_size[axis] < exact + 2


def test_worked_example():
    assert view_to_original((21, 42, 42, 63), (84, 84), (336, 336)) == (84, 168, 168, 252)
    assert view_to_original((1, 1, 2, 2), (3, 3), (10, 10)) == (3, 3, 7, 7)
    assert view_to_original((0, 0, 3, 3), (3, 3), (10, 10)) == (0, 0, 10, 10)
    assert view_to_original((5, 5, 6, 6), (100, 100), (2, 2)) == (0, 0, 1, 1)
    assert original_to_view((84, 168, 168, 252), (336, 336), (84, 84)) == (21, 42, 42, 63)


def test_boxes_are_clipped_to_the_image():
    assert view_to_original((-5, -5, 50, 500), (100, 100), (200, 200)) == (0, 0, 100, 200)


@pytest.mark.parametrize("box", [(5, 5, 5, 9), (9, 5, 5, 9), (5, 9, 9, 5), (100, 0, 120, 50), (-9, 0, 0, 50)])
def test_a_box_without_area_in_the_view_is_refused(box):
    with pytest.raises(ValueError, match=r"must overlap the view \(100, 100\)"):
        view_to_original(box, (100, 100), (200, 200))


def cells(boxes):
    return {(x, y) for x1, y1, x2, y2 in boxes for x in range(x1, x2) for y in range(y1, y2)}


@settings(max_examples=400)
@given(boxes_in((16, 16)), st.lists(boxes_in((16, 16)), min_size=1, max_size=6))
def test_coverage_counts_every_pixel_of_the_union_once(box, targets):
    wanted = cells(targets)
    assert coverage(box, targets) == len(wanted & cells([box])) / len(wanted)
    assert hit(box, targets) == (2 * len(wanted & cells([box])) >= len(wanted))


def test_coverage_of_overlapping_targets():
    targets = [(0, 0, 10, 10), (5, 0, 15, 10)]
    assert coverage((0, 0, 15, 10), targets) == 1.0
    assert coverage((0, 0, 10, 10), targets) == pytest.approx(100 / 150)
    assert coverage((20, 20, 30, 30), targets) == 0.0
    assert coverage((84, 168, 168, 252), [(84, 168, 168, 336)]) == 0.5
    assert coverage((0, 0, 1, 1), [(0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.5, 1.0)]) == pytest.approx(1 / 1.5)


def test_hit_is_half_of_the_target():
    assert hit((0, 0, 5, 10), [(0, 0, 10, 10)])
    assert not hit((0, 0, 4, 10), [(0, 0, 10, 10)])


@pytest.mark.parametrize("targets", [[], [(5, 5, 5, 9)], [(9, 9, 5, 5)]])
def test_targets_without_area_are_refused(targets):
    with pytest.raises(ValueError, match="`target_boxes` must have an area"):
        coverage((0, 0, 9, 9), targets)


@given(boxes_in((50, 40)))
def test_area_fraction(box):
    assert box_area_fraction(box, (50, 40)) == pytest.approx(len(cells([box])) / prod((50, 40)))
