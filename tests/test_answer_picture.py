"""Pixels of the picture of one answer: the region is drawn where it is, the crop beside it, a missing one is said."""

import numpy as np
import pytest
from PIL import Image
from test_viewer import BACKGROUND, IMAGES, MARK, where

from mgpo_trl.answer_picture import EMPTY, GAP, LINE, MOST_LINES, REGION, SIDE, TEXT, draw_answer, mark_region


def parts(picture, lines=1):
    """The view and the crop of a picture, as arrays."""
    top = GAP + lines * LINE + GAP // 2
    pixels = np.asarray(picture)[top : top + SIDE].astype(int)
    return pixels[:, GAP : GAP + SIDE], pixels[:, 2 * GAP + SIDE : 2 * GAP + 2 * SIDE]


@pytest.mark.parametrize("size, view_size, box", IMAGES)
def test_the_region_and_the_crop(size, view_size, box):
    crop = Image.new("RGB", (56, 28), MARK)
    picture = draw_answer(Image.new("RGB", view_size, BACKGROUND), size, box, crop, "What is there?", "42")
    view, shown = parts(picture)
    assert where(view, REGION) == pytest.approx([value * SIDE / max(size) for value in box], abs=1.5)
    assert where(shown, MARK) == (0, 0, SIDE, SIDE // 2)
    assert where(np.asarray(picture).astype(int)[-GAP - LINE :], TEXT) is not None  # what was said


def test_a_missing_crop_says_why():
    view = Image.new("RGB", (84, 84), BACKGROUND)
    drawn = [parts(draw_answer(view, (400, 400), None, None, "?", "", why)) for why in ("no crop: no json", "direct")]
    assert where(drawn[0][0], REGION) is None and (drawn[0][1][:60] == EMPTY).all()
    assert (drawn[0][1] != drawn[1][1]).any()


def test_long_texts_are_cut():
    view = Image.new("RGB", (84, 84), BACKGROUND)
    heights = [draw_answer(view, (84, 84), None, None, "word " * n, "\n" * n).height for n in (1, 10_000)]
    assert heights[1] - heights[0] == LINE * (2 * MOST_LINES - 2)


@pytest.mark.parametrize("size, view_size, box", IMAGES)
def test_a_marked_view_is_enlarged_by_whole_times(size, view_size, box):
    marked = mark_region(Image.new("RGB", view_size, BACKGROUND), size, box)
    times = marked.width // view_size[0]
    assert marked.size == (view_size[0] * times, view_size[1] * times) and SIDE <= max(marked.size) < 2 * SIDE
    scales = [marked.size[axis % 2] / size[axis % 2] for axis in range(4)]
    expected = [value * scale for value, scale in zip(box, scales, strict=True)]
    assert where(np.asarray(marked).astype(int), REGION) == pytest.approx(expected, abs=1.5)


def test_a_large_view_keeps_its_pixels():
    noise = Image.effect_noise((700, 500), 60).convert("RGB")
    assert mark_region(noise, (7000, 5000), None).tobytes() == noise.tobytes()


def test_a_region_of_one_pixel_can_be_drawn():
    view = Image.new("RGB", (84, 84), BACKGROUND)
    for box in [(5, 5, 6, 6), (4031, 0, 4032, 4032)]:
        assert where(np.asarray(mark_region(view, (4032, 4032), box)).astype(int), REGION) is not None
        assert where(parts(draw_answer(view, (4032, 4032), box, view, "", ""), 0)[0], REGION) is not None
