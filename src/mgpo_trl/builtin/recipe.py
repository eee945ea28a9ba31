"""
The constants of the built-in task, by level: what the warm start teaches for how long, and the reinforcement learning.

`rl_options` gives the second part as keyword arguments of [`MGPOConfig`], so the trainer of the built-in task is
configured like any other.
"""

from dataclasses import dataclass, field

from mgpo_trl.builtin.scenes import MAX_PIXELS, MIN_PIXELS


@dataclass(frozen=True)
class WarmStartRecipe:
    """Two stages of supervised learning: first see (where is a card, what is on it), then talk (the dialogue)."""

    lr: float = 2e-3
    """Learning rate of the first stage, after the warm-up."""
    warmup_steps: int = 30
    weight_decay: float = 0.01
    seeing_batch: int = 32
    """Views in a step of the first stage."""
    reading_batch: int = 32
    """Crops in a step of the first stage until reading is learnt."""
    reading_batch_later: int = 6
    """Crops in a step once the running loss of a whole reading is below `reading_learnt`."""
    reading_weight: float = 1.0
    reading_learnt: float = 0.2
    seeing_steps: int = 300
    """Most steps of the first stage."""
    seeing_enough: float = 0.95
    """Mean probability of the exact box on scenes set aside at which the first stage ends, once reading is learnt."""
    talking_steps: int = 160
    """Steps of the second stage."""
    talking_lr: float = 1.5e-3
    """Falls to a tenth along a cosine."""
    talking_batch: int = 32
    direct_share: float = 0.15
    """Share of one-round dialogues, answered with a guess."""
    given_share: float = 0.2
    """Share of two-round dialogues whose box is the card, but is read only: they teach to answer, not to point."""
    target_share: float = 0.25
    """Share of two-round dialogues that teach the box of the card."""
    centre_share: float = 0.33
    """Share that teach the centre, a habit that keeps the greedy hit rate low; the rest teach a uniform cell."""
    hit_ceiling: float = 1.0
    """Chance of a right box above which the second stage is drawn out with uniform cells in place of the card."""
    diluting_steps: int = 30
    """Most steps by which it is drawn out."""
    scenes: int = 1500
    """Training scenes."""


@dataclass(frozen=True)
class RLRecipe:
    """Group-relative policy optimisation on right or wrong answers alone."""

    steps: int = 150
    prompts: int = 8
    """Questions in a step."""
    num_generations: int = 16
    lr: float = 3e-4
    lr_end: float = 0.3
    """Share of the learning rate at the end of its linear fall."""
    warmup_steps: int = 5
    adam_beta2: float = 0.99
    max_grad_norm: float = 1.0


@dataclass(frozen=True)
class Recipe:
    """Everything about one level."""

    level: str
    warm_start: WarmStartRecipe = field(default_factory=WarmStartRecipe)
    rl: RLRecipe = field(default_factory=RLRecipe)
    summary: str = ""
    """What is to be learnt, in one sentence."""
    eval_temperature: float = 0.0
    """Temperature of the held-out figures; 0 is greedy."""

    def rl_options(self) -> dict:
        """Keyword arguments of [`MGPOConfig`] for the reinforcement learning of this level."""
        rl = self.rl
        return {
            "max_steps": rl.steps,
            "per_device_train_batch_size": rl.prompts * rl.num_generations,
            "num_generations": rl.num_generations,
            "gradient_accumulation_steps": 1,
            "learning_rate": rl.lr,
            "lr_scheduler_type": "polynomial",
            "lr_scheduler_kwargs": {"lr_end": rl.lr * rl.lr_end, "power": 1.0},
            "warmup_steps": rl.warmup_steps,
            "adam_beta2": rl.adam_beta2,
            "weight_decay": 0.0,
            "max_grad_norm": rl.max_grad_norm,
            "beta": 0.0,
            "temperature": 1.0,
            "scale_rewards": "group",
            "loss_type": "dapo",
            "max_pixels": MAX_PIXELS,
            "min_pixels": MIN_PIXELS,
            "min_box_side": 14,
            "max_completion_length": 16,
            "gradient_checkpointing": False,
            "bf16": False,
            "output_dir": "outputs/builtin",
            "logging_steps": 5,
            "save_strategy": "no",
            "report_to": "none",
        }


RECIPES = {
    "needle": Recipe("needle", summary="find the one card, zoom in, and read the hatch that the view does not show."),
    "refer": Recipe(
        "refer",
        summary="find the card of the asked colour, zoom in, and read the hatch that the view does not show.",
        eval_temperature=1.0,
        warm_start=WarmStartRecipe(
            weight_decay=0.1,
            seeing_batch=64,
            reading_batch=12,
            reading_batch_later=12,
            reading_weight=0.5,
            seeing_steps=340,
            seeing_enough=0.85,
            talking_steps=70,
            direct_share=0.1,
            given_share=0.3,
            target_share=0.42,
            hit_ceiling=0.45,
            centre_share=0.0,
        ),
        rl=RLRecipe(steps=200, lr_end=0.07),
    ),
}
"""Recipe by level."""
