"""`MGPOConfig`: what MGPO adds to `GRPOConfig`."""

from dataclasses import dataclass, field

import torch
from trl import GRPOConfig

from .launch_checks import batch_hint
from .round_options import RoundOptions


@dataclass
class MGPOConfig(RoundOptions, GRPOConfig):
    r"""
    Configuration of [`MGPOTrainer`].

    Inherits every parameter of [`~trl.GRPOConfig`] and of [`~mgpo_trl.round_options.RoundOptions`], the two-round
    conversation. Takes the paper's value as the default where the paper
    ([arXiv 2507.05920](https://arxiv.org/abs/2507.05920)) gives one: `beta` 0.01, constant learning rate 1e-6, 8
    generations, temperature 1, 8192 tokens a turn.

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
