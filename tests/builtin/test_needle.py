import io
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from mgpo_trl.boxes import parse_box
from mgpo_trl.builtin.needle import LEVELS, all_questions, draw_question, make_dataset, make_row
from mgpo_trl.builtin.scenes import HATCHES, cell_box
from mgpo_trl.geometry import view_to_original
from mgpo_trl.images import crop_original, open_image


@pytest.mark.parametrize("level", LEVELS)
def test_rows_are_made_by_seed(level):
    assert make_row(level, "train", 3, 1) == make_row(level, "train", 3, 1)
    assert make_row(level, "train", 3, 1)["image"]["bytes"] != make_row(level, "train", 3, 2)["image"]["bytes"]


@pytest.mark.parametrize("level", LEVELS)
def test_no_scene_is_in_both_splits(level):
    pictures = [
        make_row(level, split, index, seed)["image"]["bytes"]
        for split in ("train", "heldout")
        for index in range(12)
        for seed in (1, 2)
    ]
    assert len(set(pictures)) == len(pictures)


@pytest.mark.parametrize("level", LEVELS)
def test_answers_are_balanced_and_match_the_scene(level):
    rows = [make_row(level, "train", index, 0) for index in range(16)]
    assert Counter(row["answer"] for row in rows) == dict.fromkeys("ABCD", 4)
    assert {row["question"] for row in rows} <= set(all_questions())
    for index, row in enumerate(rows):
        _, card = draw_question(level, "train", index, 0)
        assert row["choices"]["ABCD".index(row["answer"])] == HATCHES[card.hatch] == row["category"]
        assert row["target_boxes"] == [list(card.box_original_px)]


def test_the_question_of_refer_names_one_card_only():
    for index in range(20):
        scene, asked = draw_question("refer", "train", index, 4)
        question = make_row("refer", "train", index, 4)["question"]
        assert [card for card in scene.cards if f" {card.colour} " in question] == [asked]


def test_all_cards_of_refer_are_asked_for():
    asked = [draw_question("refer", "train", index, 0) for index in range(40)]
    assert {scene.cards.index(card) for scene, card in asked} == {0, 1, 2, 3}


def test_the_crop_of_the_target_box_is_the_card_pixel_for_pixel():
    for index in range(8):
        scene, card = draw_question("refer", "train", index, 1)
        row = make_row("refer", "train", index, 1)
        image = open_image(row["image"], row["id"])
        x1, y1, x2, y2 = row["target_boxes"][0]
        crop = np.asarray(crop_original(image, (x1, y1, x2, y2)))
        assert np.array_equal(crop, np.asarray(scene.image)[y1:y2, x1:x2])
        assert crop.shape == (96, 96, 3)


def test_one_visual_token_is_a_usable_box_around_the_card():
    _, card = draw_question("refer", "heldout", 5, 1)
    text = str(list(cell_box(card.cell, 28))).join(('[{"bbox_2d": ', "}]"))
    box = parse_box(text, (84, 84), "absolute", min_side=14)
    x1, y1, x2, y2 = view_to_original(box.box_view_px, (84, 84), (336, 336))
    assert (x1 + 8, y1 + 8, x2 - 8, y2 - 8) == card.box_original_px


def test_the_dataset_keeps_pictures_as_png_bytes():
    dataset = make_dataset("needle", "heldout", 4, 9)
    assert dataset.column_names == ["id", "image", "question", "choices", "answer", "target_boxes", "category"]
    assert dataset[2] == make_row("needle", "heldout", 2, 9)
    with Image.open(io.BytesIO(dataset[2]["image"]["bytes"])) as image:
        assert (image.format, image.size) == ("PNG", (336, 336))


@pytest.mark.parametrize("level, split, named", [("nedle", "train", "nedle"), ("needle", "test", "test")])
def test_unknown_names_are_refused(level, split, named):
    with pytest.raises(ValueError, match=f"must be one of .* got '{named}'"):
        make_dataset(level, split, 1, 0)
