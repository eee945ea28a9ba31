"""Reward functions as TRL calls them: lists in, one float a completion out, only the answer turn read."""

import inspect
import json
import re
from pathlib import Path

import pytest
from PIL import Image

from mgpo_trl.rewards import accuracy_reward, answer_text, flexible_accuracy_reward, format_reward, point_reward
from mgpo_trl.rollout import Rollout, Turn

CHOICES = ["red", "green", "blue"]
BOX_TURN = {"role": "assistant", "content": r'[{"bbox_2d": [1, 2, 3, 4]}] \boxed{C}'}
REPLY = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": r"Put it in \boxed{C}."}]}


def rollout(answer):
    return [BOX_TURN, REPLY, {"role": "assistant", "content": answer}]


def call(reward, completions, **columns):
    """As TRL calls it, with every argument that it passes."""
    n = len(completions)
    extra = {"prompts": [[]] * n, "completion_ids": [[1]] * n, "image": [None] * n, "mode": ["x"] * n}
    return reward(completions=completions, trainer_state=None, **extra, **columns)


def test_only_the_answer_turn_counts():
    completions = [rollout(r"\boxed{C}"), rollout(r"\boxed{A}"), rollout("no idea"), rollout("")]
    assert call(accuracy_reward, completions, answer=["C"] * 4, choices=[CHOICES] * 4) == [1.0, 0.0, 0.0, 0.0]


def test_a_rollout_without_an_answer_turn_earns_nothing():
    completions = [[BOX_TURN, REPLY], []]
    assert call(accuracy_reward, completions, answer=["C"] * 2, choices=[CHOICES] * 2) == [0.0, 0.0]
    assert call(format_reward, completions, choices=[CHOICES] * 2) == [0.0, 0.0]


def test_one_round_and_plain_text():
    completions = [[{"role": "assistant", "content": r"\boxed{C}"}], r"\boxed{C}", r"\boxed{B}"]
    assert call(accuracy_reward, completions, answer=["C"] * 3, choices=[CHOICES] * 3) == [1.0, 1.0, 0.0]


def test_content_in_blocks():
    blocks = [{"type": "text", "text": r"It is \bo"}, {"type": "image"}, {"type": "text", "text": "xed{C}"}]
    assert answer_text(rollout(blocks)) == r"It is \boxed{C}"
    assert answer_text(rollout(None)) == answer_text(rollout([])) == ""
    assert call(accuracy_reward, [rollout(blocks)], answer=["C"], choices=[CHOICES]) == [1.0]


def test_strict_and_flexible():
    completions = [rollout("The answer is C."), rollout("A cat. C it is"), rollout(r"\boxed{C}")]
    columns = {"answer": ["C"] * 3, "choices": [CHOICES] * 3}
    assert call(accuracy_reward, completions, **columns) == [0.0, 0.0, 1.0]
    assert call(flexible_accuracy_reward, completions, **columns) == [1.0, 0.0, 1.0]


def test_rows_with_and_without_choices():
    completions = [rollout(r"\boxed{1,000}"), rollout(r"\boxed{B}")]
    assert call(accuracy_reward, completions, answer=["1000", "B"], choices=[None, CHOICES]) == [1.0, 1.0]
    assert call(accuracy_reward, completions, answer=["1000.0", "B"]) == [1.0, 1.0]
    assert call(accuracy_reward, completions, answer=["1001", "A"], choices=[None, CHOICES]) == [0.0, 0.0]


def test_format_reward_is_about_the_box_only():
    completions = [rollout(r"\boxed{A}"), rollout(r"\boxed{Z}"), rollout("The answer is A."), rollout(r"\boxed{A")]
    assert call(format_reward, completions, choices=[CHOICES] * 4, answer=["C"] * 4) == [1.0, 0.0, 0.0, 0.0]
    assert call(format_reward, completions, answer=["C"] * 4) == [1.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("reward", [accuracy_reward, flexible_accuracy_reward])
def test_bad_columns_are_named(reward):
    with pytest.raises(ValueError, match="dataset column `answer`, which is missing. Add it"):
        call(reward, [rollout(r"\boxed{C}")], choices=[CHOICES])
    with pytest.raises(ValueError, match=r"one of the letters \['A', 'B', 'C'\] .* got 'D'"):
        call(reward, [rollout(r"\boxed{C}")], answer=["D"], choices=[CHOICES])
    with pytest.raises(ValueError, match="shorter"):
        call(reward, [rollout(r"\boxed{C}")] * 2, answer=["C"])


def test_rewards_are_plain_functions_with_names():
    for reward in (accuracy_reward, flexible_accuracy_reward, format_reward):
        assert inspect.isfunction(reward) and reward.__name__.endswith("_reward")
        assert inspect.signature(reward).parameters["kwargs"].kind is inspect.Parameter.VAR_KEYWORD


# points


def counted(texts, size=(1000, 500), view=(100, 50), coordinates="absolute"):
    image, view = Image.new("RGB", size), Image.new("RGB", view)
    turns = [Turn([1], text, False) for text in texts]
    return Rollout("q", "How many?", image, view, [0], coordinates=coordinates, turns=turns)


def points_text(points):
    return json.dumps([{"point_2d": list(point)} for point in points])


def test_the_point_reward_is_f1_in_original_pixels():
    """Worked example: three named, two known, two within the radius of 56 pixels (5 % of the diagonal)."""
    known = [[100, 100], [900, 400]]
    rollouts = [
        counted([points_text([(10, 10), (91, 41), (50, 25)])]),
        counted([points_text([(10, 10), (90, 40)])]),
        counted(["none", points_text([(10, 10)])]),
        counted(["I count 2"]),
        counted([points_text([(100, 200), (900, 800)])], coordinates="relative_1000"),
        counted([points_text([(10, 16)])]),
    ]
    rewards = point_reward(["x"] * 6, rollouts=rollouts, points=[known] * 6, answer=["2"] * 6)
    assert rewards == pytest.approx([0.8, 1.0, 2 / 3, 0.0, 1.0, 0.0])


def test_the_radius_is_a_share_of_the_diagonal():
    """The diagonal of 1000x500 is 1118 pixels: a point 100 pixels off is a pair within 10 %, and none within 5 %."""
    rollouts = [counted([points_text([(20, 10)])])]
    shares = {share: point_reward([""], rollouts, [[[100, 100]]], radius_share=share) for share in (0.05, 0.1)}
    assert shares == {0.05: [0.0], 0.1: [1.0]}


def test_the_documented_reward_with_another_radius():
    text = (Path(__file__).parents[1] / "docs" / "counting.md").read_text(encoding="utf-8")
    names = {}
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], names)  # noqa: S102
    columns = {"rollouts": [counted([points_text([(13, 10)])])], "points": [[[100, 100]]]}  # 30 pixels off, 2 % are 22
    assert point_reward(completions=[""], **columns) == [1.0]
    assert names["close_points"](completions=[""], **columns) == [0.0]


def test_points_of_a_turn_that_saw_a_crop_do_not_count():
    """They may be meant in the crop; after an unusable box the turn saw the view again, and they count."""
    named = points_text([(10, 10)])
    crop, fallback = counted(["a box", named]), counted(["no box", named])
    crop.turns[0].shown_px = (0, 0, 500, 500)
    assert point_reward([""] * 2, rollouts=[crop, fallback], points=[[[100, 100]]] * 2) == [0.0, 1.0]


def test_what_became_of_the_points_is_logged():
    texts = ["I count 2", "[]", points_text([(1, 1)]), points_text([(1, 1), (101, 1)])]
    logged = {}
    rollouts = [counted([text]) for text in texts]
    point_reward([""] * 4, rollouts=rollouts, points=[None] * 4, log_metric=logged.__setitem__)
    shares = {"no_json": 0.25, "no_points": 0.25, "ok": 0.25, "out_of_view": 0.25, "not_numbers": 0.0}
    assert logged == {f"points/status/{name}": share for name, share in shares.items()}


def test_no_things_and_no_points_agree():
    rollouts = [counted(["I count 0"]), counted([points_text([(1, 1)])]), counted(["I count 0"])]
    assert point_reward([""] * 3, rollouts=rollouts, points=[[], [], None]) == [1.0, 0.0, None]


def test_what_the_point_reward_needs_is_named():
    with pytest.raises(ValueError, match="needs the dataset column `points`"):
        point_reward(["x"], rollouts=[counted(["x"])])
    with pytest.raises(ValueError, match="needs the argument `rollouts`"):
        point_reward(["x"], points=[[]])
