"""Pure tensor functions of the turn-aware loss. Shapes: B rollouts, C completion tokens, N rounds."""

from collections.abc import Sequence

import torch


def pad_turn_ids(turn_ids: Sequence[Sequence[int]], length: int, device: torch.device) -> torch.Tensor:
    """Right-pad turn ids with 0 to a (B, C) tensor of `length` columns."""
    rows = [list(row) + [0] * (length - len(row)) for row in turn_ids]
    return torch.tensor(rows, dtype=torch.long, device=device)


def turn_weights(turn_ids: torch.Tensor, weights: Sequence[float] | None) -> torch.Tensor:
    """
    Weight of every completion token in the loss.

    Worked example with weights `[0.5, 2]`: turn ids `[1, 1, 0, 0, 2]` give `[0.5, 0.5, 0, 0, 2]`.

    Args:
        turn_ids (`torch.Tensor`): Shape (B, C): the round that sampled the token, 0 for tokens that are not the
        model's. weights (`Sequence[float]`, *optional*): One for each round; `None` weighs every model token 1.

    Returns:
        `torch.Tensor`: Shape (B, C), float.
    """
    if weights is None:
        return (turn_ids > 0).float()
    table = torch.tensor([0.0, *weights], dtype=torch.float32, device=turn_ids.device)
    return table[turn_ids]


def relative_weights(weights: Sequence[float] | None) -> list[float] | None:
    """
    The same weights as multiples of the smallest one that is not 0: `[0.001, 0.004]` gives `[1, 4]`.

    A weighted mean stays as it is. TRL divides by the sum of the weights of a rollout or of a batch, but never by less
    than 1: with these, whatever has a weighed token adds up to that.
    """
    if weights is None:
        return None
    unit = min(weight for weight in weights if weight > 0)
    return [weight / unit for weight in weights]


def sums_by_turn(values: torch.Tensor, turn_ids: torch.Tensor, num_rounds: int) -> torch.Tensor:
    """Shape (N, 2): for each round the sum of `values` (B, C) over its tokens, and their number."""
    masks = [turn_ids == number for number in range(1, num_rounds + 1)]
    return torch.stack([torch.stack([(values * mask).sum(), mask.sum().to(values.dtype)]) for mask in masks])


def kl_to_reference(logps: torch.Tensor, ref_logps: torch.Tensor) -> torch.Tensor:
    """Low-variance estimate of KL(policy || reference) for each token, as in TRL's GRPO loss. Shape as the inputs."""
    return torch.exp(ref_logps - logps) - (ref_logps - logps) - 1


def is_clipped(
    logps: torch.Tensor, old_logps: torch.Tensor, advantages: torch.Tensor, low: float, high: float
) -> torch.Tensor:
    """1 where the ratio to the sampling policy left the trust region on the side the advantage pushes to, else 0."""
    ratio = torch.exp(logps - old_logps)
    return (((ratio < 1 - low) & (advantages < 0)) | ((ratio > 1 + high) & (advantages > 0))).float()
