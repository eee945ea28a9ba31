import numpy as np
import pytest

from mgpo_trl.builtin.scenes import COLOURS, HATCHES, SIDE, cell_box, draw_scene


def test_a_seed_fixes_every_pixel():
    first, again, other = draw_scene(7, 4), draw_scene(7, 4), draw_scene(8, 4)
    assert first.cards == again.cards
    assert np.array_equal(np.asarray(first.image), np.asarray(again.image))
    assert not np.array_equal(np.asarray(first.image), np.asarray(other.image))


@pytest.mark.parametrize("num_cards", [1, 4, 8])
def test_cards_have_distinct_cells_and_colours_in_reading_order(num_cards):
    cards = draw_scene(3, num_cards).cards
    assert [card.cell for card in cards] == sorted({card.cell for card in cards})
    assert len({card.colour for card in cards}) == num_cards
    assert all(0 <= card.hatch < len(HATCHES) for card in cards)


def test_the_asked_card_takes_the_given_hatch():
    assert {draw_scene(5, 4, asked=2, hatch=hatch).cards[2].hatch for hatch in range(4)} == {0, 1, 2, 3}


def test_cells_tile_the_scene_and_the_view():
    assert cell_box(0) == (0, 0, 112, 112)
    assert cell_box(5, 28) == (56, 28, 84, 56)
    assert cell_box(8)[2:] == (SIDE, SIDE)


def test_the_border_of_the_named_box_shows_the_colour_of_the_card():
    for seed in range(20):
        scene = draw_scene(seed, 4)
        pixels = np.asarray(scene.image).astype(float)
        for card in scene.cards:
            x1, y1, x2, y2 = card.box_original_px
            border = np.concatenate([pixels[y1 : y1 + 10, x1:x2], pixels[y2 - 10 : y2, x1:x2]])
            outside = pixels[y1:y2, x1 - 8 : x1]
            assert np.abs(border.mean((0, 1)) - COLOURS[card.colour]).max() < 16
            assert np.abs(outside.mean((0, 1)) - COLOURS[card.colour]).max() > 16


def test_the_mean_of_a_card_does_not_tell_its_hatch():
    means = np.array([[_mean_brightness(seed, hatch) for seed in range(60)] for hatch in range(len(HATCHES))])
    standard_error = means.std(1).mean() / np.sqrt(means.shape[1])
    assert np.ptp(means.mean(1)) < 4 * standard_error


def test_the_hatch_is_in_the_original_pixels():
    """Horizontal neighbours differ where lines are vertical, vertical neighbours where they are horizontal."""
    for hatch, axis in ((0, 1), (1, 0)):
        scene = draw_scene(11, 1, hatch=hatch)
        x1, y1, x2, y2 = scene.cards[0].box_original_px
        inner = np.asarray(scene.image.convert("L")).astype(float)[y1 + 12 : y2 - 12, x1 + 12 : x2 - 12]
        steps = [np.abs(np.diff(inner, axis=direction)).mean() for direction in (0, 1)]
        assert steps[axis] > 2 * steps[1 - axis]


def _mean_brightness(seed, hatch):
    scene = draw_scene(seed, 1, hatch=hatch)
    return np.asarray(scene.image.crop(scene.cards[0].box_original_px)).mean() / sum(COLOURS[scene.cards[0].colour])
