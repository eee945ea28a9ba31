"""Curves: lines pass where the log says, what is not in the log is not drawn."""

import math

import numpy as np
import pytest

from mgpo_trl.watching.curves import LINES, MARGIN, PANEL, draw_curves


def where(picture, colour, panel=0):
    """(left, top, right, bottom) of a colour within the plot of a panel, as shares of the plot."""
    pixels = np.asarray(picture).astype(int)
    x, y = panel % 2 * PANEL[0], panel // 2 * PANEL[1]
    left, above, right, below = MARGIN
    plot = pixels[y + above - 2 : y + PANEL[1] - below + 2, x + left - 2 : x + PANEL[0] - right + 2]
    ys, xs = np.nonzero((abs(plot - np.array(colour)) < 40).all(axis=2))
    height, width = plot.shape[:2]
    return None if not len(xs) else (xs.min() / width, ys.min() / height, xs.max() / width, ys.max() / height)


def history(**values):
    """Log entries of steps 1, 2, 3, ..."""
    names = {"valid": "grounding/valid_ratio", "area": "grounding/crop_area", "coverage": "grounding/coverage"}
    length = max(map(len, values.values()))
    return [
        {"step": n + 1, **{names.get(name, name): series[n] for name, series in values.items() if n < len(series)}}
        for n in range(length)
    ]


def test_a_line_goes_from_corner_to_corner():
    picture = draw_curves(history(reward=[0.0, 0.25, 0.5]))
    assert picture.size == PANEL
    assert where(picture, LINES[0]) == pytest.approx((0, 0, 1, 1), abs=0.03)


def test_shares_stand_on_an_axis_from_zero_to_one():
    picture = draw_curves(history(reward=[1.0, 1.0], valid=[0.5, 0.5]))
    assert picture.size == (2 * PANEL[0], PANEL[1])
    left, top, right, bottom = where(picture, LINES[0], panel=1)
    assert (left, right) == pytest.approx((0, 1), abs=0.03) and (top, bottom) == pytest.approx((0.5, 0.5), abs=0.03)
    assert where(picture, LINES[0])[1] == pytest.approx(0, abs=0.03)  # the reward is at the top of its own


def test_every_panel_and_two_lines_in_one():
    entries = history(
        reward=[0.0, 1.0], valid=[0.0, 1.0], area=[0.25, 0.25], coverage=[0.75, 0.75],
        **{"turn1/entropy": [2.0, 1.0], "turn2/entropy": [1.0, 2.0], "loss": [0.1, 0.1]},
    )  # fmt: skip
    picture = draw_curves(entries)
    assert picture.size == (2 * PANEL[0], 2 * PANEL[1])
    assert where(picture, LINES[0], 2)[1] == pytest.approx(0.75, abs=0.03)
    assert where(picture, LINES[1], 2)[1] == pytest.approx(0.25, abs=0.03)
    for colour in LINES[:2]:
        assert where(picture, colour, 3)[1::2] == pytest.approx((0, 0.5), abs=0.03)


def test_missing_values_are_left_out_and_one_value_is_a_dot():
    picture = draw_curves([{"step": 1, "reward": None}, {"step": 2, "reward": math.nan}, {"step": 3, "reward": 0.5}])
    left, top, right, bottom = where(picture, LINES[0])
    assert right - left < 0.05 and (left + right) / 2 == pytest.approx(0.5, abs=0.02) and top < 0.03
    assert draw_curves([{"step": 3, "reward": 0.0}]) is not None  # an axis of its own, not of length zero
    assert where(draw_curves(history(reward=[-1.0, 1.0])), LINES[0]) == pytest.approx((0, 0, 1, 1), abs=0.03)


def test_no_curves_without_metrics():
    assert draw_curves([]) is None
    assert draw_curves([{"step": 1, "train_runtime": 3.0}, {"step": 1, "eval_reward": 1.0}]) is None
