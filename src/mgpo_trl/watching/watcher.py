"""The callback that watches: it keeps rollouts now and then, and draws the curves at the end of training."""

import io
import logging
import math
from collections.abc import Sequence
from pathlib import Path

from accelerate.utils import broadcast_object_list, gather_object
from PIL import Image
from transformers import TrainerCallback

from ..gallery import pictures_of
from ..records import to_json, write_atomically
from ..rollout import Rollout
from .curves import CURVES_FILE, draw_curves
from .files import RolloutLog, rollout_id
from .page import write_training_page
from .trackers import Group, send_groups, trackers_of

logger = logging.getLogger(__name__)


class RolloutWatcher(TrainerCallback):
    """
    Keeps whole groups of rollouts every `log_rollouts_steps` optimizer steps: records and pictures on disk, a page,
    and pictures in the trackers. Draws `curves.png` when training ends.

    A generation batch is kept when it is the first one at or after a multiple of the interval, so a training whose
    batches serve several steps keeps no less. Every process takes part; the main one writes. A disk that can not be
    written to costs the rollouts of that step and a warning, not the training; every other error is raised.

    Args:
        args ([`~mgpo_trl.MGPOConfig`]): Directory, interval, bounds, and the number of generations.
        reward_weights (`Sequence[tuple[str, float]]`): Name and weight of each reward function, in order.
        callbacks (`Sequence[TrainerCallback]`): All callbacks of the trainer; the trackers among them get pictures.
    """

    def __init__(self, args, reward_weights: Sequence[tuple[str, float]], callbacks: Sequence[TrainerCallback]):
        self._args, self._callbacks = args, callbacks
        self._names = _distinct([name for name, _ in reward_weights])
        self._weights = [weight for _, weight in reward_weights]
        self._log = RolloutLog(args.output_dir, args.log_rollouts_pictures)
        self._curves = Path(args.output_dir) / CURVES_FILE
        self._due: int | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        last = None
        if state.is_world_process_zero:
            last = self._log.begin(state.global_step)
            self._curves.unlink(missing_ok=True)  # of an earlier training; drawn again at the end of this one
        [last] = broadcast_object_list([last])  # the files may be in sight of the main process alone
        self._due = 0 if last is None else self._next(last)

    def _next(self, step: int) -> int:
        """The step after `step` from which on rollouts are to be kept."""
        return (step // self._args.log_rollouts_steps + 1) * self._args.log_rollouts_steps

    def is_due(self, step: int) -> bool:
        """Whether the rollouts that are sampled at a step of training are to be kept; the same on every process."""
        return self._due is not None and step >= self._due

    def watch(
        self,
        step: int,
        rollouts: Sequence[Rollout],
        rewards: Sequence[Sequence[float]],
        advantages: Sequence[float],
    ) -> None:
        """
        Keep the first groups of a generation batch. Every process calls it with its share of the batch.

        Args:
            step (`int`): Optimizer steps done so far.
            rollouts (`Sequence[Rollout]`): Rollouts after their rounds, as many on every process; the processes in
                their order make up the batch.
            rewards (`Sequence[Sequence[float]]`): Of each rollout the reward by every function, NaN for none.
            advantages (`Sequence[float]`): One for each rollout.
        """
        self._due = self._next(step)
        trackers = trackers_of(self._callbacks)
        records = self._records(step, rollouts, rewards, advantages)
        pictured = trackers or self._args.log_rollouts_pictures
        pictures = _pictures(rollouts[: len(records)], records) if pictured else []
        records, pictures = gather_object(records), gather_object(pictures)
        if self._args.process_index != 0:
            return
        self._keep(step, records, pictures)
        if trackers:
            size = self._args.num_generations
            groups = [Group(records[i : i + size], pictures[i : i + size]) for i in range(0, len(records), size)]
            send_groups(trackers, step, groups, with_table=not self._args.log_completions)

    def _records(self, step: int, rollouts, rewards, advantages) -> list[dict]:
        """Records of those of this process's rollouts that are in the first groups of the batch."""
        size = self._args.num_generations
        groups = len(rollouts) * self._args.world_size // size
        shown = min(groups, self._args.log_rollouts_groups)
        start = self._args.process_index * len(rollouts)
        rows = zip(rollouts, rewards, advantages, strict=True)
        records = []
        for place, (rollout, given, advantage) in list(enumerate(rows, start))[: max(0, shown * size - start)]:
            group, sample = divmod(place, size)
            training = {
                "step": step, "row": rollout.id, "group": group, "sample": sample, "groups_shown": shown,
                "groups_of_step": groups, "rewards": dict(zip(self._names, given, strict=True)),
                "reward": self._total(given), "advantage": advantage,
            }  # fmt: skip
            identity = rollout_id(step, group, sample)
            records.append(to_json({**rollout.to_record(), "id": identity, "training": training}))
        return records

    def _total(self, rewards: Sequence[float]) -> float | None:
        """TRL's reward: the weighted sum over the functions that gave one."""
        weighed = [w * r for w, r in zip(self._weights, rewards, strict=True) if not math.isnan(r)]
        return sum(weighed) if weighed else None

    def _keep(self, step: int, records: list[dict], pictures: list[dict]) -> None:
        try:
            self._log.add(step, records, pictures)
            write_training_page(self._args.output_dir)
        except OSError as error:
            logger.warning(
                f"The rollouts of step {step} could not all be kept in '{self._args.output_dir}' ({error}). Training "
                "goes on. Make room on the disk, or set `log_rollouts_steps` to 0."
            )

    def on_train_end(self, args, state, control, **kwargs):
        self._due = None
        if not state.is_world_process_zero:
            return
        curves = draw_curves(state.log_history)
        if curves is None:
            logger.info("No curves are drawn: the log holds no training metrics (see `logging_steps`).")
            return
        try:
            write_atomically(self._curves, _png(curves))
            if self._log.rollouts.exists():
                write_training_page(args.output_dir)
        except OSError as error:
            logger.warning(f"The curves could not be kept in '{args.output_dir}' ({error}). Make room on the disk.")


def _distinct(names: Sequence[str]) -> list[str]:
    """The names, numbered where two functions have the same: `["f", "f"]` becomes `["f", "f 2"]`."""
    numbers = [names[: place + 1].count(name) for place, name in enumerate(names)]
    return [name if number == 1 else f"{name} {number}" for name, number in zip(names, numbers, strict=True)]


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _pictures(rollouts: Sequence[Rollout], records: Sequence[dict]) -> list[dict]:
    pairs = zip(pictures_of(rollouts), records, strict=True)
    return [{**picture, "id": record["id"]} for picture, record in pairs]
