"""Log-probabilities of packed rollouts: what the loss passes compute, without padding or repetition."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch

from .packing import PackedRows, pack_rows
from .vision_features import features_as_inputs, features_of


@dataclass(frozen=True)
class RolloutFacts:
    """What a loss pass needs of a batch beside TRL's tensors; one entry for each of B rollouts."""

    scored: torch.Tensor
    """Shape (B, C), bool: tokens that the model sampled."""
    prompts: Sequence[Hashable]
    """Equal where prompts are, images included."""
    images: Sequence[Sequence[Hashable]]
    """For each rollout a key of each of its images, equal where they are the same image."""
    features: Sequence[Sequence[torch.Tensor]] | None = None
    """For each image of each rollout its features ([`~mgpo_trl.vision_features`]), shared by reference; `None` where
    the vision tower is trained and has to run within the pass."""

    def rows(self, start: int, end: int, columns: int) -> "RolloutFacts":
        """The facts of some rollouts, with `columns` completion columns."""
        features = None if self.features is None else self.features[start:end]
        prompts, images = self.prompts[start:end], self.images[start:end]
        return RolloutFacts(self.scored[start:end, :columns], prompts, images, features)


def packed_logps(
    model, backbone, facts: RolloutFacts, input_ids, attention_mask, images: dict, encode_alone: bool = False
):
    """
    Log-probability and entropy of the sampled tokens of a padded batch, computed in one packed row.

    Args:
        model: The model as it is trained (PEFT, DDP and the like around it), with TRL's fused LM head.
        backbone: Its backbone, which has the position code (`get_rope_index`).
        facts ([`RolloutFacts`]): Which tokens count, which prompts are shared.
        input_ids (`torch.Tensor`), attention_mask (`torch.Tensor`): Shape (B, P+C).
        images (`dict`): `image_grid_thw` (images, 3), `num_images` of each rollout, `mm_token_type_ids` (B, P+C), and
            `pixel_values` (patches, dimension), which is read only without `facts.features`.
        encode_alone (`bool`, *optional*, defaults to `False`): Whether the vision tower may run by itself before the
            model does, once for each distinct image. Wrappers that gather weights or watch the forward pass forbid it.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Log-probabilities and entropies, (B, C), zero where not scored.
    """
    types, grids, num_images = images["mm_token_type_ids"], images["image_grid_thw"], images["num_images"]
    prompt_columns = input_ids.size(1) - facts.scored.size(1)
    packed = pack_rows(attention_mask, facts.scored, facts.prompts, _images_in(types[:, :prompt_columns]), num_images)
    positions, _ = backbone.get_rope_index(
        input_ids, mm_token_type_ids=types, image_grid_thw=grids, attention_mask=attention_mask
    )
    hidden = backbone.config.get_text_config().hidden_size
    outputs = model(
        input_ids=packed.gather(input_ids),
        packed_rows=packed,
        position_ids=packed.gather(positions),
        shift_labels=input_ids[:, prompt_columns:][facts.scored].unsqueeze(0),
        fused_lm_head=True,
        **_image_inputs(packed, facts, images, hidden, backbone if encode_alone else None),
    )
    return packed.scatter(outputs.log_probs), packed.scatter(outputs.entropy) if outputs.entropy is not None else None


def _images_in(types: torch.Tensor) -> list[int]:
    """Number of runs of image placeholders in each row (B, P)."""
    before = torch.nn.functional.pad(types, (1, 0))[:, :-1]
    return ((types == 1) & (before != 1)).sum(1).tolist()


def _image_inputs(packed: PackedRows, facts: RolloutFacts, images: dict, hidden: int, backbone) -> dict:
    """The images of a packed row in the order of their placeholders, as features or as pixels."""
    if facts.features is not None:
        return features_as_inputs([facts.features[row][number] for row, number in packed.image_owners], hidden)
    starts = torch.tensor([0, *images["num_images"]]).cumsum(0).tolist()
    wanted = [starts[row] + number for row, number in packed.image_owners]
    by_image = images["pixel_values"].split(images["image_grid_thw"].prod(-1).tolist())
    if backbone is not None:
        keys = [facts.images[row][number] for row, number in packed.image_owners]
        first = dict(reversed(list(zip(keys, wanted, strict=True))))
        pixels = torch.cat([by_image[number] for number in first.values()])
        encoded = backbone.get_image_features(pixels, images["image_grid_thw"][list(first.values())], return_dict=True)
        features = dict(zip(first, features_of(encoded), strict=True))
        return features_as_inputs([features[key] for key in keys], hidden)
    return {
        "pixel_values": torch.cat([by_image[number] for number in wanted]),
        "image_grid_thw": images["image_grid_thw"][wanted],
    }
