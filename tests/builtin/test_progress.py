"""The line that the built-in run prints."""

from mgpo_trl.builtin.progress import progress_line


def test_worked_example():
    logs = {"reward": 0.53, "grounding/hit_rate": 0.364, "grounding/valid_ratio": 0.975, "entropy": 0.16, "loss": 0.1}
    assert progress_line(20, 80, logs) == "step 20/80  reward 0.53  hit rate 0.36  valid boxes 0.97  entropy 0.16"


def test_one_round_has_no_boxes_and_a_metric_without_values_is_left_out():
    assert progress_line(5, 80, {"reward": 0.25, "entropy": None}) == "step  5/80  reward 0.25"


def test_the_summary_at_the_end_prints_no_line():
    assert progress_line(80, 80, {"reward": 0.9, "train_runtime": 100.0}) == ""
    assert progress_line(80, 80, {"train_loss": 0.0}) == ""
