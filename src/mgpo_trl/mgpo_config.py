"""`MGPOConfig`: what MGPO adds to `GRPOConfig`."""

import logging
import math
from dataclasses import dataclass, field

import torch
from trl import GRPOConfig

from .launch_checks import batch_hint
from .round_options import RoundOptions

logger = logging.getLogger(__name__)


@dataclass
class MGPOConfig(RoundOptions, GRPOConfig):
    r"""
    Configuration of [`MGPOTrainer`].

    Inherits every parameter of [`~trl.GRPOConfig`] and of [`~mgpo_trl.round_options.RoundOptions`], the two-round
    conversation. Takes the paper's value as the default where the paper
    ([arXiv 2507.05920](https://arxiv.org/abs/2507.05920)) gives one: `beta` 0.01, constant learning rate 1e-6, 8
    generations, temperature 1, 8192 tokens a turn.

    A generation window is the `steps_per_generation * num_iterations` micro-batches that share one sampling. A run
    that is resumed from the end of a window goes on bit for bit; inside one, it samples the questions of that window
    again. So `save_steps` should be a multiple of the window, counted in optimizer steps; a warning says so where it
    is not.

    Without an accelerator `use_cpu` is set and `bf16` is not, so that the same command runs on a laptop.

    Raises:
        ValueError: An option can not work; the message names it, the value received, and what to do.
    """

    lr_scheduler_type: str = field(default="constant", metadata={"help": "Learning rate schedule (paper: constant)."})
    beta: float = field(default=0.01, metadata={"help": "KL coefficient (paper: 0.01, low-variance estimator)."})

    def __post_init__(self):
        if not torch.accelerator.is_available():
            self.use_cpu = True
            self.bf16 = False if self.bf16 is None else self.bf16
        try:
            super().__post_init__()
        except ValueError as error:
            raise ValueError(f"{error}{batch_hint(self, error)}") from error
        self.check_rounds()
        self._check_inherited()
        self._check_save_steps()

    def _check_inherited(self) -> None:
        """Refuse options of GRPO that would be passed over in silence, or take away what a rollout needs."""
        if self.remove_unused_columns:
            raise ValueError(
                "`remove_unused_columns` must be False, got True: it would drop every row's question. Leave it out."
            )
        if self.chat_template_kwargs:
            raise ValueError(
                f"`chat_template_kwargs` has no effect on the rounds, got {self.chat_template_kwargs}. Put what you "
                "need into the processor's chat template, or into `prompts_file`."
            )

    def _check_save_steps(self) -> None:
        """Warn where checkpoints fall inside a generation window."""
        if self.save_strategy != "steps" or self.save_steps < 1:  # below 1 it is a share of the run
            return
        batches = self.steps_per_generation * self.num_iterations
        window = batches // math.gcd(batches, self.gradient_accumulation_steps)  # in optimizer steps
        if self.save_steps % window:
            logger.warning(
                f"`save_steps` should be a multiple of {window}, got {self.save_steps}: a run that is resumed inside "
                "a generation window samples its questions again, and is not the uninterrupted run bit for bit."
            )

    def __getstate__(self) -> dict:
        """Pickled as `training_args.bin`, the options lie beside the weights and are pushed with them: no token."""
        return {**self.__dict__, "hub_token": None}
