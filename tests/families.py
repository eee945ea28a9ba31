"""A tiny model of every supported family, with the built-in tokenizer and a processor without torchvision."""

from dataclasses import dataclass
from pathlib import Path

import torch
import trl
from transformers import AutoProcessor, Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.processing_utils import ProcessorMixin

from mgpo_trl.builtin.tiny import save_tiny
from mgpo_trl.builtin.tokenizer import build_tokenizer

TEMPLATES = Path(trl.__file__).parent / "chat_templates"


@dataclass(frozen=True)
class Family:
    """What the tests need to know about one model family."""

    model_type: str
    """`config.model_type`."""
    coordinates: str
    """How the family writes boxes."""
    factor: int
    """Side of the square that one image token covers, in pixels."""

    def scaled(self, numbers):
        """Pixels that were written down for squares of 28, for squares of this family: whole tokens stay whole."""
        return tuple(number * self.factor // 28 for number in numbers)

    @property
    def budget(self):
        """The pixel budget of the tests: views of four to nine tokens."""
        return {"max_pixels": (3 * self.factor) ** 2, "min_pixels": (2 * self.factor) ** 2}


FAMILIES = {
    "qwen2_5_vl": Family("qwen2_5_vl", "absolute", 28),
    "qwen3_vl": Family("qwen3_vl", "relative_1000", 32),
}


def save_family(name: str, directory) -> Path:
    """Write a random model of a family and its processor where `from_pretrained` finds them."""
    return {"qwen2_5_vl": _save_qwen2_5, "qwen3_vl": _save_qwen3}[name](Path(directory))


class ImageOnlyQwen3VLProcessor(Qwen3VLProcessor):
    """`Qwen3VLProcessor` without the slot of its video processor, which needs torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def _save_qwen2_5(directory: Path) -> Path:
    return save_tiny(directory, "refer", seed=0)


def _save_qwen3(directory: Path) -> Path:
    AutoProcessor.register(Qwen3VLConfig, ImageOnlyQwen3VLProcessor, exist_ok=True)
    tokenizer = build_tokenizer()
    images = Qwen2VLImageProcessorPil(
        patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3,
        size={"shortest_edge": 64 * 64, "longest_edge": 128 * 128},
    )  # fmt: skip
    template = (TEMPLATES / "qwen3_vl.jinja").read_text(encoding="utf-8")
    processor = ImageOnlyQwen3VLProcessor(images, tokenizer, chat_template=template)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen3VLForConditionalGeneration(qwen3_config(processor))
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory


def qwen3_config(processor) -> Qwen3VLConfig:
    """Two language layers with grouped heads, three vision blocks of which two feed the language layers directly."""
    tokenizer, spread = processor.tokenizer, 0.09
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("vision_start", "vision_end")}
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10.0, "mrope_section": [6, 5, 5],
                            "mrope_interleaved": True},
        "tie_word_embeddings": True, "initializer_range": spread, **ends,
    }  # fmt: skip
    vision = {
        "depth": 3, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "out_hidden_size": 128,
        "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1], "initializer_range": spread,
    }  # fmt: skip
    return Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
        tie_word_embeddings=True,
        initializer_range=spread,
        **ends,
    )
