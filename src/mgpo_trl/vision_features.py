"""What a vision tower makes of an image, as one tensor that can be kept, shared and handed to the model later.

Qwen2.5-VL gives features (tokens, hidden) that stand in place of the placeholders. Qwen3-VL also gives features for
its first language layers (DeepStack): they follow side by side, (tokens, (1 + layers) * hidden).
"""

from collections.abc import Sequence

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling


def features_of(encoded) -> list[torch.Tensor]:
    """
    The tensor of each image.

    Args:
        encoded ([`~transformers.modeling_outputs.BaseModelOutputWithPooling`]): What `get_image_features` returns.
    """
    layers = getattr(encoded, "deepstack_features", None) or []
    return [torch.cat(parts, dim=1) for parts in zip(encoded.pooler_output, *layers, strict=True)]


def features_as_inputs(features: Sequence[torch.Tensor], hidden: int) -> dict:
    """
    The keyword arguments that give a model these images in place of their pixels.

    Args:
        features (`Sequence[torch.Tensor]`): Tensors of [`features_of`], in the order of the placeholders.
        hidden (`int`): Width of the language model.
    """
    first, *layers = zip(*(one.split(hidden, dim=1) for one in features), strict=True)
    encoded = BaseModelOutputWithPooling(pooler_output=list(first))
    if layers:
        encoded.deepstack_features = [list(layer) for layer in layers]
    return {"mm_encoder_outputs": {"image": encoded}}
