"""Two real optimizer steps on the largest sample: one as the model samples, one with every turn at its budget."""

import time
from dataclasses import dataclass, field

import torch

from ..boxes import format_box
from ..memory.estimate import CUDA_CONTEXT, FRAGMENTS
from ..mgpo_trainer import MGPOTrainer
from ..processing import VisionChat
from ..rollout import Rollout, flatten

CHECKED_ALONE = 2
"""Rollouts of a process that are run again by themselves, where the sampler tells no log-probabilities."""


@dataclass
class Measured:
    """What the two steps showed on this process."""

    seconds: dict[str, float] = field(default_factory=dict)
    """Of `"generation"` and `"loss"` in the first step and of `"longest loss"` in the second."""
    sampled_tokens: int = 0
    """Tokens sampled in the first step, all rollouts."""
    rollouts: int = 0
    """Rollouts of one step."""
    image_tokens: int = 0
    """Image placeholders of the first step, each of which had its feature."""
    deviations: list[float] = field(default_factory=list)
    """|loss pass - sampler| for each sampled token of the first step."""
    deviates_from: str = ""
    """What the loss pass was compared with."""
    peak_bytes: int | None = None
    """Most memory of the accelerator that the steps took, see [`peak_bytes`]; `None` on a CPU."""


class PreflightTrainer(MGPOTrainer):
    """An [`~mgpo_trl.MGPOTrainer`] that watches itself for two steps, with a learning rate of 0."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.measured = Measured()
        self._keeps_logprobs = True
        self._played: list[Rollout] = []
        self._before_loss = 0.0
        if torch.accelerator.is_available():
            torch.accelerator.reset_peak_memory_stats()

    @property
    def _is_first(self) -> bool:
        return self.state.global_step == 0

    def _generate_and_score_completions(self, inputs):
        started = _now()
        output = super()._generate_and_score_completions(inputs)
        if self._is_first:
            self._note_generation(_now() - started)
            self._compare_logps(output)
        self._before_loss += _now() - started
        return output

    def _generate_single_turn(self, prompt_ids, images, *args, **kwargs):
        if self._is_first:
            return super()._generate_single_turn(prompt_ids, images, *args, **kwargs)
        turns = [longest_turn(rollout, self._round, self.args, self.chat) for rollout in self._rollouts]
        unknown = [[float("nan")] * len(turn) for turn in turns]  # TRL corrects nothing where it finds these
        return turns, unknown if self.use_vllm else None

    def _log_rollouts(self, mode: str) -> None:
        self._played = list(self._rollouts)
        super()._log_rollouts(mode)

    def _note_generation(self, seconds: float) -> None:
        flat = [flatten(rollout) for rollout in self._played]
        self.measured.seconds["generation"] = seconds
        self.measured.rollouts = len(flat)
        self.measured.sampled_tokens = sum(turn > 0 for one in flat for turn in one.turn_ids)
        self.measured.image_tokens = sum(sum(self.chat.token_types(one.ids)) for one in flat)

    def training_step(self, *args, **kwargs):
        started, before = _now(), self._before_loss
        loss = super().training_step(*args, **kwargs)
        spent = _now() - started - (self._before_loss - before)
        name = "loss" if self._is_first else "longest loss"
        self.measured.seconds[name] = self.measured.seconds.get(name, 0.0) + spent
        self.measured.peak_bytes = peak_bytes()
        return loss

    # Log-probabilities

    @torch.no_grad()
    def _compare_logps(self, batch: dict) -> None:
        """The loss pass against the sampler, or, where it tells nothing, against each rollout run alone."""
        logps, sampled = self._loss_logps(batch), batch["turn_ids"] > 0
        if "sampling_per_token_logps" in batch:
            self.measured.deviates_from = "the sampler"
            known = batch["sampling_per_token_logps"]
            difference = (logps - known)[sampled & ~known.isnan()].abs()
        else:
            self.measured.deviates_from = f"{CHECKED_ALONE} rollouts run alone"
            alone = [self._logps_alone(rollout) for rollout in self._played[:CHECKED_ALONE]]
            difference = torch.cat(
                [(logps[row][sampled[row]] - one).abs() for row, one in enumerate(alone)] or [logps.new_empty(0)]
            )
        self.measured.deviations = difference.tolist()

    def _loss_logps(self, batch: dict) -> torch.Tensor:
        self._facts = self._facts_of_batch(batch)
        names = ("pixel_values", "image_grid_thw", "num_images", "mm_token_type_ids")
        logps, _, _ = self._get_per_token_logps_and_entropies(
            self.model,
            torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
            torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
            batch["completion_ids"].size(1),
            batch_size=self.args.per_device_train_batch_size,
            **{name: batch[name] for name in names if name in batch},
        )
        self._facts = None
        return logps

    def _logps_alone(self, rollout: Rollout) -> torch.Tensor:
        """Log-probabilities (sampled tokens,) of one rollout without padding, neighbours or shared work."""
        flat = flatten(rollout)
        device = self.accelerator.device
        ids = torch.tensor([flat.ids], device=device)
        before = len(flat.ids) - len(flat.turn_ids) - 1
        places = torch.tensor([before + place for place, turn in enumerate(flat.turn_ids) if turn], device=device)
        images = {name: value.to(device) for name, value in self.chat.encode_images(flat.images).items()}
        types = torch.tensor([self.chat.token_types(flat.ids)], device=device)
        with self.accelerator.autocast():
            logits = self.model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                mm_token_type_ids=types,
                logits_to_keep=places,
                use_cache=False,
                **images,
            ).logits[0]
        logps = (logits.float() / self.temperature).log_softmax(-1)
        return logps.gather(1, ids[0, places + 1].unsqueeze(1)).squeeze(1)


def longest_turn(rollout: Rollout, number: int, args, chat: VisionChat) -> list[int]:
    """
    A turn that uses up its budget. Before the last round it names the whole view, whose crop has as many tokens.

    Args:
        rollout ([`~mgpo_trl.rollout.Rollout`]): The rollout so far.
        number (`int`): Its round, from 1.
        args ([`~mgpo_trl.MGPOConfig`]): The budgets.
        chat ([`~mgpo_trl.processing.VisionChat`]): The tokenizer.
    """
    budget = args.token_budgets[number - 1]
    size = rollout.view.size
    text = "" if number == args.num_rounds else format_box((0, 0, *size), size, rollout.coordinates)
    ids = chat.tokenizer(text, add_special_tokens=False)["input_ids"]
    filler = chat.tokenizer("\n", add_special_tokens=False)["input_ids"][-1]
    return [*(ids + [filler] * budget)[: budget - 1], chat.end_of_turn_id]


def peak_bytes() -> int | None:
    """
    Most memory that this process took from its accelerator so far: what was allocated, and the estimate's allowances
    for fragments and the context, neither of which torch counts there. `None` on a CPU.
    """
    if not torch.accelerator.is_available():
        return None
    return int(torch.accelerator.max_memory_allocated() * (1 + FRAGMENTS)) + CUDA_CONTEXT


def _now() -> float:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()
