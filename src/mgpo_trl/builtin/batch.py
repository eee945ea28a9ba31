"""Batches of branching samples for a Qwen2.5-VL: padded ids, 4-D attention mask, M-RoPE positions, weighted loss."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch.nn.functional import cross_entropy

from mgpo_trl.builtin.lessons import Sample
from mgpo_trl.processing import VisionChat


class Collator:
    """
    Turns samples into tensors.

    Parameters:
        model (`Qwen2_5_VLForConditionalGeneration`): Its own position code numbers the tokens.
        chat ([`VisionChat`]): Encodes the images.
    """

    def __init__(self, model, chat: VisionChat):
        self.model, self.chat = model, chat
        self._pixels: dict[int, torch.Tensor] = {}
        self._positions = lru_cache(maxsize=None)(self._branch_positions)

    def __call__(self, samples: Sequence[Sample]) -> dict:
        """
        Returns:
            `dict`: `inputs` of the model, and `labels` and `weights` of shape (B, T - 1), shifted so that column t
            belongs to the logits at t.
        """
        length = max(len(sample.ids) for sample in samples)
        ids = torch.full((len(samples), length), self.chat.tokenizer.pad_token_id)
        weights = torch.zeros(len(samples), length)
        segments = torch.full((len(samples), length), -1)
        positions = torch.zeros(3, len(samples), length, dtype=torch.long)
        for row, sample in enumerate(samples):
            size = len(sample.ids)
            ids[row, :size] = torch.tensor(sample.ids)
            weights[row, :size] = torch.tensor(sample.weights)
            segments[row, :size] = torch.tensor(sample.segments)
            positions[:, row, :size] = self.positions(sample)
        images = [image for sample in samples for image in sample.images]
        inputs = {
            "input_ids": ids,
            "attention_mask": branch_mask(segments),
            "position_ids": positions,
            **self.chat.encode_images(images),
        }
        return {"inputs": inputs, "labels": ids[:, 1:], "weights": weights[:, 1:]}

    def positions(self, sample: Sample) -> torch.Tensor:
        """M-RoPE positions (3, T): every branch is numbered as if it followed the trunk alone."""
        types = self.chat.token_types(sample.ids)
        trunk = [index for index, segment in enumerate(sample.segments) if segment == 0]
        grids = tuple((1, image.height // 14, image.width // 14) for image in sample.images)
        parts = []
        for segment in sorted(set(sample.segments)) if max(sample.segments) else [0]:
            own = [index for index, other in enumerate(sample.segments) if other == segment and segment]
            key = tuple(types[index] for index in trunk + own)
            parts.append(self._positions(key, grids)[:, len(trunk) if segment else 0 :])
        return torch.cat(parts, dim=1)

    def _branch_positions(self, types: tuple[int, ...], grids: tuple[tuple[int, int, int], ...]) -> torch.Tensor:
        types = torch.tensor([types])
        positions, _ = self.model.model.get_rope_index(
            torch.zeros_like(types), mm_token_type_ids=types.int(), image_grid_thw=torch.tensor(grids)
        )
        return positions[:, 0]


def branch_mask(segments: torch.Tensor) -> torch.Tensor:
    """
    Additive attention mask: a token sees what comes before it in the trunk (segment 0) and in its own branch.

    Args:
        segments (`torch.Tensor`): (B, T), -1 at padding.

    Returns:
        `torch.Tensor`: (B, 1, T, T), 0 where attention is allowed.
    """
    length = segments.size(1)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    query, key = segments[:, :, None], segments[:, None, :]
    allowed = causal & ((key == 0) | (key == query))
    return torch.zeros(allowed.shape).masked_fill_(~allowed, torch.finfo(torch.float32).min)[:, None]


def token_losses(model, batch: dict) -> torch.Tensor:
    """Cross entropy of every next token that has a weight, (B, T - 1); 0 elsewhere."""
    hidden = model.model(**batch["inputs"]).last_hidden_state[:, :-1]
    wanted = batch["weights"] > 0
    losses = torch.zeros_like(batch["weights"])
    logits = model.lm_head(hidden[wanted])
    return losses.masked_scatter(wanted, cross_entropy(logits, batch["labels"][wanted], reduction="none"))


def weighted_mean(losses: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Mean of the losses by weight, over the whole batch."""
    return (losses * weights).sum() / weights.sum()
