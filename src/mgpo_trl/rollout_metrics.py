"""What the rollouts of a batch say about grounding, as sums that processes can add up. Imports no torch."""

from collections.abc import Sequence

from .boxes import BoxStatus
from .geometry import box_area_fraction, coverage, hit
from .rollout import Rollout


def rollout_sums(rollouts: Sequence[Rollout], num_rounds: int) -> dict[str, tuple[float, int]]:
    """Sum and number of values for each metric; the names depend on nothing but `num_rounds`, on every process."""
    turns = {number: [rollout.turns[number - 1] for rollout in rollouts] for number in range(1, num_rounds + 1)}
    sums: dict[str, tuple[float, int]] = {}
    for number, of_round in turns.items():
        sums[f"turn{number}/length"] = (sum(len(turn.ids) for turn in of_round), len(of_round))
        sums[f"turn{number}/truncated_ratio"] = (sum(turn.truncated for turn in of_round), len(of_round))
    if num_rounds > 1:
        sums |= _grounding_sums(rollouts)
    return sums


def _grounding_sums(rollouts: Sequence[Rollout]) -> dict[str, tuple[float, int]]:
    boxes = [box for rollout in rollouts for box in rollout.boxes]
    sums = {
        f"grounding/status/{status.value}": (sum(box.status is status for box in boxes), len(boxes))
        for status in BoxStatus
    }
    sums["grounding/valid_ratio"] = sums[f"grounding/status/{BoxStatus.OK.value}"]
    crops = [
        (rollout, turn.box_original_px)
        for rollout in rollouts
        for turn in rollout.turns
        if turn.box_original_px is not None
    ]
    areas = [box_area_fraction(box, rollout.image.size) for rollout, box in crops]
    sums["grounding/crop_area"] = (sum(areas), len(areas))
    with_targets = [rollout for rollout in rollouts if rollout.target_boxes]
    last = [(rollout.turns[-2].box_original_px, rollout.target_boxes) for rollout in with_targets]
    sums["grounding/coverage"] = (sum(coverage(box, targets) for box, targets in last if box), len(last))
    sums["grounding/hit_rate"] = (sum(hit(box, targets) for box, targets in last if box), len(last))
    return sums
