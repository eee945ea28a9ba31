"""Shapes of the published models, for estimates without a download. From the `config.json` of each model."""

_QWEN2_5_VISION = {
    "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "patch_size": 14,
    "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
}  # fmt: skip
_QWEN2_5_ROPE = {"rope_type": "default", "rope_theta": 1_000_000.0, "mrope_section": [16, 24, 24]}
_QWEN3_VISION = {"num_heads": 16, "patch_size": 16, "spatial_merge_size": 2, "num_position_embeddings": 2304}
_QWEN3_ROPE = {
    "rope_type": "default", "rope_theta": 5_000_000.0, "mrope_section": [24, 20, 20], "mrope_interleaved": True,
}  # fmt: skip

LAYOUTS = {
    "Qwen/Qwen2.5-VL-3B-Instruct": {
        "model_type": "qwen2_5_vl",
        "tie_word_embeddings": True,
        "text_config": {
            "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
            "num_key_value_heads": 2, "vocab_size": 151936, "rope_parameters": _QWEN2_5_ROPE,
        },
        "vision_config": {**_QWEN2_5_VISION, "out_hidden_size": 2048},
    },
    "Qwen/Qwen2.5-VL-7B-Instruct": {
        "model_type": "qwen2_5_vl",
        "tie_word_embeddings": False,
        "text_config": {
            "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
            "num_key_value_heads": 4, "vocab_size": 152064, "rope_parameters": _QWEN2_5_ROPE,
        },
        "vision_config": {**_QWEN2_5_VISION, "out_hidden_size": 3584},
    },
    "Qwen/Qwen3-VL-4B-Instruct": {
        "model_type": "qwen3_vl",
        "tie_word_embeddings": True,
        "text_config": {
            "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
            "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "rope_parameters": _QWEN3_ROPE,
        },
        "vision_config": {
            **_QWEN3_VISION, "depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "out_hidden_size": 2560,
            "deepstack_visual_indexes": [5, 11, 17],
        },
    },
    "Qwen/Qwen3-VL-8B-Instruct": {
        "model_type": "qwen3_vl",
        "tie_word_embeddings": False,
        "text_config": {
            "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
            "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "rope_parameters": _QWEN3_ROPE,
        },
        "vision_config": {
            **_QWEN3_VISION, "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "out_hidden_size": 4096,
            "deepstack_visual_indexes": [8, 16, 24],
        },
    },
}  # fmt: skip


def layout_config(model_name: str):
    """
    Configuration of a published model, as far as it decides memory.

    Args:
        model_name (`str`): Hub id.

    Raises:
        ValueError: The model is not in the list.
    """
    from transformers import AutoConfig

    if model_name not in LAYOUTS:
        raise ValueError(f"There is no layout of '{model_name}'. Known: {sorted(LAYOUTS)}.")
    layout = dict(LAYOUTS[model_name])
    return AutoConfig.for_model(layout.pop("model_type"), **layout)
