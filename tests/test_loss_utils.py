import pytest
import torch

from mgpo_trl.loss_utils import is_clipped, kl_to_reference, pad_turn_ids, relative_weights, sums_by_turn, turn_weights

TURN_IDS = torch.tensor([[1, 1, 0, 0, 2], [1, 0, 2, 2, 0]])


def test_turn_ids_are_padded_on_the_right_with_0():
    padded = pad_turn_ids([[1, 0, 2], [1], []], 4, torch.device("cpu"))
    assert padded.dtype == torch.long and padded.tolist() == [[1, 0, 2, 0], [1, 0, 0, 0], [0, 0, 0, 0]]


def test_the_worked_example_of_turn_weights():
    assert turn_weights(torch.tensor([[1, 1, 0, 0, 2]]), [0.5, 2]).tolist() == [[0.5, 0.5, 0, 0, 2]]


@pytest.mark.parametrize(
    "weights, expected",
    [
        (None, [[1, 1, 0, 0, 1], [1, 0, 1, 1, 0]]),
        ([1, 1], [[1, 1, 0, 0, 1], [1, 0, 1, 1, 0]]),
        ([1, 0], [[1, 1, 0, 0, 0], [1, 0, 0, 0, 0]]),
        ([0, 1], [[0, 0, 0, 0, 1], [0, 0, 1, 1, 0]]),
    ],
)
def test_turn_weights(weights, expected):
    weighed = turn_weights(TURN_IDS, weights)
    assert weighed.dtype == torch.float32 and weighed.tolist() == expected


@pytest.mark.parametrize(
    "weights, expected",
    [
        (None, None),
        ([0.001, 0.004], [1, 4]),
        ([0.5, 2], [1, 4]),
        ([3, 3], [1, 1]),
        ([0, 0.25], [0, 1]),
        ([8, 1], [8, 1]),
    ],
)
def test_relative_weights(weights, expected):
    assert relative_weights(weights) == expected


def test_sums_by_turn_leave_out_what_the_model_did_not_write():
    values = torch.tensor([[1.0, 2.0, 100.0, 100.0, 3.0], [4.0, 100.0, 5.0, 6.0, 100.0]])
    assert sums_by_turn(values, TURN_IDS, 2).tolist() == [[7.0, 3.0], [14.0, 3.0]]
    assert sums_by_turn(values, TURN_IDS, 3).tolist() == [[7.0, 3.0], [14.0, 3.0], [0.0, 0.0]]


def test_kl_to_reference_is_the_low_variance_estimate():
    logps, ref_logps = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.0, -1.0, -5.0])
    expected = [0.0, torch.e - 1 - 1, float(torch.exp(torch.tensor(-2.0))) + 2 - 1]
    assert kl_to_reference(logps, ref_logps).tolist() == pytest.approx(expected)
    assert (kl_to_reference(torch.randn(100), torch.randn(100)) >= 0).all()


def test_is_clipped_only_where_the_advantage_pushes_out():
    ratio = torch.tensor([[0.7, 0.9, 1.1, 1.3], [0.7, 0.9, 1.1, 1.3], [0.7, 0.9, 1.1, 1.3]])
    advantages = torch.tensor([[1.0], [-1.0], [0.0]])
    clipped = is_clipped(ratio.log(), torch.zeros(3, 4), advantages, 0.2, 0.2)
    assert clipped.tolist() == [[0, 0, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]]
    wide_above = is_clipped(ratio.log(), torch.zeros(3, 4), advantages, 0.2, 0.4)
    assert wide_above.tolist() == [[0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
