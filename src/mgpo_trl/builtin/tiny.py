"""
A Qwen2.5-VL of CPU size with a tokenizer and a processor of its own: no download, no torchvision.

The model is the stock `Qwen2_5_VLForConditionalGeneration` at 0.8 M parameters; the rotary bases are small because at
this size the stock ones leave almost no usable frequency. It saves, loads and trains like the 7B.
"""

import os
from pathlib import Path

from transformers import AutoProcessor, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.processing_utils import ProcessorMixin

from mgpo_trl.builtin.scenes import MAX_PIXELS, MIN_PIXELS
from mgpo_trl.builtin.tokenizer import build_tokenizer
from mgpo_trl.prompts import PromptTemplate

INITIALIZER_RANGE = {"needle": 0.05, "refer": 0.09}
"""Spread of the initial weights by level."""


class ImageOnlyQwen2_5_VLProcessor(Qwen2_5_VLProcessor):
    """
    `Qwen2_5_VLProcessor` without its video processor, which needs torchvision. The only change is the missing slot:
    `ProcessorMixin` reads the slots from the signature of `__init__`.
    """

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def register_processor() -> None:
    """
    Make `AutoProcessor.from_pretrained` find [`ImageOnlyQwen2_5_VLProcessor`]; without this it returns a tokenizer.

    A checkpoint that names another processor class, such as the published Qwen2.5-VL, keeps that class.
    """
    AutoProcessor.register(Qwen2_5_VLConfig, ImageOnlyQwen2_5_VLProcessor, exist_ok=True)


def build_processor(template: PromptTemplate | None = None) -> ImageOnlyQwen2_5_VLProcessor:
    """
    The processor of the built-in task.

    Args:
        template ([`PromptTemplate`], *optional*): Template whose sentences become tokens. Defaults to the default one.
    """
    import trl

    register_processor()
    chat_template = Path(trl.__file__).parent / "chat_templates" / "qwen2_5_vl.jinja"
    images = Qwen2VLImageProcessorPil(size={"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS})
    return ImageOnlyQwen2_5_VLProcessor(
        images, build_tokenizer(template), chat_template=chat_template.read_text(encoding="utf-8")
    )


def build_tiny(level: str = "needle", seed: int = 0, template: PromptTemplate | None = None):
    """
    A model with random weights and its processor, in well under a second.

    Args:
        level (`str`, *optional*, defaults to `"needle"`): `"needle"` or `"refer"`; sets the spread of the weights.
        seed (`int`, *optional*, defaults to `0`): Seed of the weights. The caller's random state is left alone.
        template ([`PromptTemplate`], *optional*): Template whose sentences become tokens. Defaults to the default one.

    Returns:
        `tuple`: (`Qwen2_5_VLForConditionalGeneration` in fp32 and eval mode, [`ImageOnlyQwen2_5_VLProcessor`]).
    """
    import torch

    processor = build_processor(template)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(_config(processor, INITIALIZER_RANGE[level]))
    return model.eval(), processor


def save_tiny(directory: str | os.PathLike, level: str = "needle", seed: int = 0) -> Path:
    """Write a random model and its processor where `from_pretrained` finds them; returns the directory."""
    model, processor = build_tiny(level, seed)
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return Path(directory)


def _config(processor, initializer_range: float) -> Qwen2_5_VLConfig:
    tokenizer = processor.tokenizer
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("vision_start", "vision_end")}
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    return Qwen2_5_VLConfig(
        text_config=_text_config(len(tokenizer), initializer_range) | ends,
        vision_config=_vision_config(initializer_range),
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
        tie_word_embeddings=True,
        initializer_range=initializer_range,
        **ends,
    )


def _text_config(vocab_size: int, initializer_range: float) -> dict:
    return {
        "vocab_size": vocab_size,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10.0, "mrope_section": [4, 6, 6]},
        "tie_word_embeddings": True,
        "initializer_range": initializer_range,
    }


def _vision_config(initializer_range: float) -> dict:
    return {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 2,
        "out_hidden_size": 128,
        "fullatt_block_indexes": [0, 1],
        "rope_parameters": {"rope_type": "axial", "rope_theta": 100.0},
        "initializer_range": initializer_range,
    }
