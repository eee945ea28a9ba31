"""Out of memory in terms that a person can act on: doing what, with which sample, and what to lower. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Load:
    """What one rollout asks of the memory."""

    id: str
    """Id of the dataset row."""
    tokens: int
    """Length of the sequence, image placeholders included."""
    image_sizes: tuple[tuple[int, int], ...]
    """Width and height of its fitted images, in pixels."""

    def __str__(self) -> str:
        sizes = " and ".join(f"{width}x{height}" for width, height in self.image_sizes)
        return f"sample {self.id!r}: {self.tokens} tokens, images of {sizes} pixels"


def memory_advice(doing: str, loads: Sequence[Load], options) -> str:
    """
    One message for an out-of-memory error.

    Args:
        doing (`str`): What ran, for example `"generating round 2"`.
        loads (`Sequence[Load]`): The rollouts that this process had in hand.
        options ([`~mgpo_trl.MGPOConfig`]): Whose settings are named with their values.
    """
    largest = max(loads, key=lambda load: load.tokens)
    return (
        f"Out of memory while {doing}, with {len(loads)} rollouts at once. The largest is {largest}. Lower "
        f"`max_pixels` ({options.max_pixels}), `round_token_budgets` ({options.token_budgets}), "
        f"`per_device_train_batch_size` ({options.per_device_train_batch_size}) or `num_generations` "
        f"({options.num_generations}). Generation holds `steps_per_generation` ({options.steps_per_generation}) "
        "batches at once."
    )
