"""Pixels of the picture: the box is drawn where it was named, the crop below it, and what is missing is said."""

import numpy as np
import pytest
from PIL import Image

from mgpo_trl.viewer import CELL, GAP, LINE, NEUTRAL, RIGHT, TARGET, WRONG, Scene, draw_comparison

CHOICES = ["a dog", "a cat"]
HEAD = 2 * GAP + 3 * LINE
BAND = 2 * CELL + GAP + 5 * LINE
BACKGROUND, MARK = (90, 120, 160), (250, 0, 250)


def record(image, view_size, box=None, *, status="ok", answer="B", targets=None):
    box = {"status": status, "box_original_px": list(box) if box else None, "box_view_px": None}
    turns = [{"text": "...", "box": box}, {"text": f"\\boxed{{{answer}}}", "box": None}]
    return {
        "id": "1",
        "question": "What is there?",
        "choices": CHOICES,
        "answer": "B",
        "image": {"size": list(image.size)},
        "view_size": list(view_size),
        "target_boxes": targets,
        "turns": turns,
    }


def cells(picture, column=0, row=0):
    """The view and the crop of one rollout, as arrays."""
    left, top = GAP + column * (CELL + GAP), HEAD + row * BAND + LINE
    pixels = np.asarray(picture)
    view = pixels[top : top + CELL, left : left + CELL]
    crop = pixels[top + CELL + GAP // 2 :, left : left + CELL][:CELL]
    return view.astype(int), crop.astype(int)


def where(cell, colour, tolerance=2):
    """Bounding box (x1, y1, x2, y2) of the pixels of a colour, `None` where there are none."""
    ys, xs = np.nonzero((abs(cell - np.array(colour)) <= tolerance).all(axis=2))
    return (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) if len(xs) else None


def draw(image, *records, labels=None):
    return draw_comparison([Scene(image, records)], labels or [f"model {i}" for i in range(len(records))], "A title")


@pytest.mark.parametrize("scenes, labels", [(1, 1), (6, 2), (2, 3)])
def test_the_size_of_the_picture(scenes, labels):
    image = Image.new("RGB", (400, 300), BACKGROUND)
    rollouts = [record(image, (112, 84), (0, 0, 100, 100))] * labels
    picture = draw_comparison([Scene(image, rollouts)] * scenes, ["x"] * labels, "A title")
    assert picture.mode == "RGB" and picture.size == (GAP + scenes * (CELL + GAP), HEAD + labels * BAND)


IMAGES = [
    pytest.param((432, 432), (84, 84), (108, 216, 324, 432), id="square"),
    pytest.param((400, 300), (112, 84), (40, 60, 200, 240), id="landscape"),
    pytest.param((300, 400), (84, 112), (60, 40, 240, 200), id="portrait"),
    pytest.param((600, 220), (112, 28), (200, 20, 500, 110), id="view of another aspect ratio"),
    pytest.param((220, 600), (28, 112), (20, 200, 110, 500), id="narrow view of another aspect ratio"),
    pytest.param((4032, 3024), (112, 84), (0, 0, 4032, 3024), id="whole image"),
]


def expected_corners(size, box):
    scale = CELL / max(size)
    left, top = (round((CELL - side * scale) / 2) for side in size)
    return [offset + value * scale for offset, value in zip((left, top, left, top), box, strict=True)]


@pytest.mark.parametrize("size, view_size, box", IMAGES)
def test_the_box_is_drawn_where_the_mapping_says(size, view_size, box):
    image = Image.new("RGB", size, BACKGROUND)
    right, wrong = record(image, view_size, box), record(image, view_size, box, answer="A")
    picture = draw(image, right, wrong)
    for row, colour in ((0, RIGHT), (1, WRONG)):
        view, _ = cells(picture, row=row)
        assert where(view, colour) == pytest.approx(expected_corners(size, box), abs=1.5)
    assert where(cells(picture, row=0)[0], WRONG) is None and where(cells(picture, row=1)[0], RIGHT) is None


@pytest.mark.parametrize("size, view_size, box", IMAGES)
def test_what_the_box_surrounds_is_in_the_box_and_in_the_crop(size, view_size, box):
    """A mark that fills the named region appears right inside its frame, and it fills the crop."""
    image = Image.new("RGB", size, BACKGROUND)
    image.paste(MARK, box)
    view, crop = cells(draw(image, record(image, view_size, box)))
    x1, y1, x2, y2 = (round(corner) for corner in expected_corners(size, box))
    scale = CELL / max(size)
    blurred = max(side * scale / seen for side, seen in zip(size, view_size, strict=True))  # one pixel of the view
    margin = int(blurred) + 4
    core = view[y1 + margin : y2 - margin, x1 + margin : x2 - margin]
    assert core.size
    filled = (abs(core - np.array(MARK)) <= 12).all()
    assert filled
    assert where(view, MARK, tolerance=60) == pytest.approx((x1, y1, x2, y2), abs=blurred + 4)
    scale = CELL / max(box[2] - box[0], box[3] - box[1])
    shown = where(crop, MARK)
    width, height = (box[2] - box[0]) * scale, (box[3] - box[1]) * scale
    assert (shown[2] - shown[0], shown[3] - shown[1]) == pytest.approx((width, height), abs=3)


def test_the_target_is_dashed_in_yellow():
    image = Image.new("RGB", (432, 432), BACKGROUND)
    view, _ = cells(draw(image, record(image, (84, 84), (0, 0, 60, 60), targets=[[216, 108, 324, 216]])))
    assert where(view, TARGET) == pytest.approx((108, 54, 162, 108), abs=2.5)
    edge = (abs(view[54, 108:162] - np.array(TARGET)) <= 2).all(axis=1)
    assert 0.3 < edge.mean() < 0.9  # dashes, not a line


def test_the_view_is_no_clearer_than_what_the_model_saw():
    """A checkerboard of single pixels is legible in the crop and grey in the view."""
    ticks = np.indices((432, 432)).sum(axis=0) % 2 * 255
    image = Image.fromarray(ticks.astype(np.uint8)).convert("RGB")
    view, crop = cells(draw(image, record(image, (84, 84), (0, 0, 100, 100))))
    assert view[120:200, 120:200].std() < 15 and crop[20:-20, 20:-20].std() > 60


@pytest.mark.parametrize("status", ["no_json", "too_small"])
def test_an_unusable_box_is_a_grey_cell_that_says_so(status):
    image = Image.new("RGB", (400, 300), BACKGROUND)
    view, crop = cells(draw(image, record(image, (112, 84), None, status=status)))
    assert where(view, RIGHT) is None
    assert (crop[10:50, 10:-10] == (243, 244, 246)).all()
    text = where(crop, NEUTRAL)[1], where(crop[60:-60, 10:-10], NEUTRAL)
    assert text[0] == 0 and text[1] is not None  # the frame, and words in the middle
    assert where(crop, BACKGROUND) is None


def test_each_status_has_its_own_words():
    image = Image.new("RGB", (400, 300), BACKGROUND)
    shown = [cells(draw(image, record(image, (112, 84), None, status=s)))[1] for s in ("no_json", "too_small")]
    assert (shown[0] != shown[1]).any()


def test_one_round_has_no_crop():
    image = Image.new("RGB", (400, 300), BACKGROUND)
    one = record(image, (112, 84))
    one["turns"] = one["turns"][-1:]
    view, crop = cells(draw(image, one))
    assert where(view, RIGHT) is None and where(view, WRONG) is None and where(crop, BACKGROUND) is None


@pytest.mark.parametrize("answer, colours", [("B", {RIGHT}), ("A", {WRONG, NEUTRAL}), ("", {WRONG, NEUTRAL})])
def test_the_answer_is_green_or_red_with_the_right_one_below(answer, colours):
    image = Image.new("RGB", (400, 300), BACKGROUND)
    one = record(image, (112, 84), None, status="no_box", answer=answer)
    picture = np.asarray(draw(image, one)).astype(int)
    caption = picture[HEAD + LINE + 2 * CELL + GAP // 2 + 2 :]
    assert {colour for colour in (RIGHT, WRONG, NEUTRAL) if where(caption, colour)} == colours


def test_free_form_answers_are_drawn_too():
    image = Image.new("RGB", (400, 300), BACKGROUND)
    one = record(image, (112, 84), (0, 0, 100, 100), answer="42") | {"choices": None, "answer": "42"}
    assert where(cells(draw(image, one))[0], RIGHT) is not None


def test_a_record_without_a_label_is_refused():
    image = Image.new("RGB", (400, 300), BACKGROUND)
    with pytest.raises(ValueError):
        draw(image, record(image, (112, 84)), labels=["before", "after"])
