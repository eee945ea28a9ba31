"""
The files of a watched training: `rollouts.jsonl` and `pictures.jsonl`, in the order of the steps, without doubles.

A record is that of any rollout (see [`mgpo_trl.records`]) and what the training made of it:

```python
{"id": "step-20/group-1/sample-3", "question": ..., "turns": ...,
 "training": {"step": 20, "row": "q7", "group": 1, "sample": 3, "groups_shown": 2, "groups_of_step": 16,
              "rewards": {"accuracy_reward": 1.0, "format_reward": None}, "reward": 1.0, "advantage": 0.93}}
```

`step` is the number of optimizer steps that the sampling model had behind it, 0 for the model that training began
with; `reward` is the weighted sum, and a function that gave a rollout no reward stands as `None`.
"""

import json
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from ..gallery import PICTURES_FILE
from ..records import ROLLOUTS_FILE, RecordError, RolloutWriter, read_rollouts, sample_id

logger = logging.getLogger(__name__)

_PLACE = re.compile(r"step-(\d+)/group-\d+/sample-\d+$")


def rollout_id(step: int, group: int, sample: int) -> str:
    """Id of a rollout in a training: `rollout_id(20, 1, 3)` is `"step-20/group-1/sample-3"`."""
    return sample_id(f"step-{step}/group-{group}", sample)


def step_of(identity: str) -> int | None:
    """The step in an id of [`rollout_id`], `None` for any other id."""
    match = _PLACE.match(identity)
    return int(match[1]) if match else None


class RolloutLog:
    """
    Appends the rollouts of a step, and keeps pictures of a bounded number of them, spread over the training.

    Args:
        directory (`str` or `os.PathLike`): The run's directory, made if absent.
        max_pictures (`int`): Most rollouts with pictures. Where a step would exceed it, half of the steps that have
            pictures lose them, so that the others stay spread over the training.
    """

    def __init__(self, directory: str | os.PathLike, max_pictures: int):
        self.rollouts, self.pictures = (Path(directory) / name for name in (ROLLOUTS_FILE, PICTURES_FILE))
        self._max_pictures = max_pictures
        self._pictured: Counter[int] = Counter()

    def begin(self, step: int) -> int | None:
        """
        Make ready for a training that goes on from `step`: what is there of this and later steps, it will do again.

        Returns:
            `int`: The last step that is kept, `None` where there is none.

        Raises:
            [`~mgpo_trl.records.RecordError`]: The directory holds rollouts that no training wrote.
        """
        steps = Counter(self._training_step(identity) for identity in _ids(self.rollouts))
        replaced = sum(count for of_step, count in steps.items() if of_step >= step)
        if replaced:
            logger.warning(
                f"{replaced} rollouts in '{self.rollouts}' are of step {step} or later and are dropped: the training "
                "goes on from there and samples anew."
            )
            keep_lines(self.rollouts, lambda identity: step_of(identity) < step)
        self._pictured = Counter(self._training_step(identity) for identity in _ids(self.pictures))
        if any(of_step >= step for of_step in self._pictured):
            self._forget({of_step for of_step in self._pictured if of_step >= step})
        return max((of_step for of_step in steps if of_step < step), default=None)

    def _training_step(self, identity: str) -> int:
        step = step_of(identity)
        if step is None:
            raise RecordError(
                f"'{self.rollouts.parent}' holds a rollout that no training wrote ('{identity}'). Train into another "
                "`output_dir`, or set `log_rollouts_steps` to 0."
            )
        return step

    def add(self, step: int, records: Sequence[dict], pictures: Sequence[dict]) -> None:
        """
        Append the rollouts of a step, and their pictures as far as there is room.

        Raises:
            `OSError`: The disk is full, or can not be written to. No line is left half-written.
        """
        with RolloutWriter(self.rollouts, unique=False) as writer:
            for record in records:
                writer.write(record)
        pictures = pictures[: self._max_pictures]
        while pictures and self._pictured.total() + len(pictures) > self._max_pictures:
            steps = sorted(self._pictured)
            self._forget(set(steps) - spread(steps, len(steps) // 2))
        if pictures:
            with RolloutWriter(self.pictures, unique=False) as writer:
                for picture in pictures:
                    writer.write(picture)
                    self._pictured[step] += 1

    def _forget(self, steps: set[int]) -> None:
        """Take the pictures of these steps away."""
        keep_lines(self.pictures, lambda identity: step_of(identity) not in steps)
        self._pictured = Counter({step: count for step, count in self._pictured.items() if step not in steps})


def spread(steps: Sequence[int], count: int) -> set[int]:
    """At most `count` of the rising steps, about evenly spaced: `spread([0, 1, 2, 3, 10], 3)` is `{0, 3, 10}`."""
    gaps = max(1, count - 1)
    marks = [steps[0] + (steps[-1] - steps[0]) * number / gaps for number in range(count)]
    return {min(steps, key=lambda step: abs(step - mark)) for mark in marks}


def _ids(path: Path) -> list[str]:
    return [record["id"] for record in read_rollouts(path)] if path.exists() else []


def keep_lines(path: Path, keep: Callable[[str], bool]) -> None:
    """Drop the lines of a JSON Lines file whose id is not to be kept, in one step; a half-written last line too."""
    partial = path.with_name(f".{path.name}.part")
    try:
        with open(path, "rb") as old, open(partial, "wb") as new:
            new.writelines(line for line in old if line.endswith(b"\n") and keep(json.loads(line)["id"]))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
