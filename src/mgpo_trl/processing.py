"""The one place that touches a model's processor: fits images to the pixel budget and turns messages into ids.

Images are fitted here, once, with the resampling of the processor; what the processor gets afterwards already has its
final size, so every later pass over it (TRL's, vLLM's) keeps the pixels and the number of image tokens.
"""

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache

from PIL import Image

from .boxes import MODEL_COORDINATES
from .geometry import MAX_ASPECT

SUPPORTED_MODEL_TYPES = tuple(sorted(MODEL_COORDINATES))
SHARED_FAMILIES = ("qwen2_5_vl", "qwen3_vl")
"""Model types that share prefixes, packed rows and vision features; others take TRL's own passes."""
OTHER_LAYOUTS = {
    "gemma3": "it shows every image, whatever its shape, as one square of 256 tokens",
    "idefics3": "it pads the images of a whole batch to one block of tiles",
    "internvl": "it cuts an image into a varying number of tiles",
    "smolvlm": "it pads the images of a whole batch to one block of tiles",
}
"""
Families that are refused for how they lay out images, and why. TRL does not carry an image that joins during the
rollout for any of them; `tests/test_trl_seams.py` has the measurements.
"""


class VisionChat:
    """
    Tokenization of turns and sizing of images for the Qwen-VL families; implements [`~mgpo_trl.rollout.Chat`].

    Parameters:
        processor ([`~transformers.ProcessorMixin`]):
            Processor of the model, with an image processor of the Qwen2-VL kind (one token for a square of
            `patch_size * merge_size` pixels).
        max_pixels (`int`):
            Pixel budget of every image that the model sees, view or crop.
        min_pixels (`int`):
            Smaller images are enlarged to at least this many pixels.

        end_ids (`Iterable[int]`, *optional*):
            Every id that ends a sampled turn. Defaults to the EOS token of the tokenizer, which is also the one that
            we append where a turn was cut.

    Raises:
        ValueError: The processor is no vision-language processor, is of another kind, or the budget is empty or has no
        room for images of every shape.
    """

    def __init__(self, processor, *, max_pixels: int, min_pixels: int, end_ids: Iterable[int] | None = None):
        check_processor(processor)
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.image_processor = processor.image_processor
        self.max_pixels, self.min_pixels = max_pixels, min_pixels
        self.factor = self.image_processor.patch_size * self.image_processor.merge_size
        if max_pixels < self.factor**2 or min_pixels > max_pixels:
            raise ValueError(
                f"The pixel budget is empty: min_pixels={min_pixels}, max_pixels={max_pixels}, one image token covers "
                f"{self.factor}x{self.factor} pixels. Set {self.factor**2} <= min_pixels <= max_pixels."
            )
        fewest, most = -(-min_pixels // self.factor**2), max_pixels // self.factor**2
        if fewest > 1 and most < 2 * fewest:
            raise ValueError(
                f"min_pixels={min_pixels} and max_pixels={max_pixels} are too close: some crops have no size of "
                f"{fewest} to {most} image tokens. Set min_pixels to at most {max(most // 2, 1) * self.factor**2}, "
                "or raise max_pixels."
            )
        # A copy of the budget where transformers, TRL and a saved checkpoint look for it.
        self.image_processor.size = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
        self.image_token_id = processor.image_token_id
        self.end_of_turn_id = self.tokenizer.eos_token_id
        self.end_ids = {self.end_of_turn_id, *(end_ids or ())}
        self._template_ids = lru_cache(maxsize=4096)(self._encode)
        self._reply_cache: dict[str, list[int]] = {}

    def fitted_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Width and height that an image is shown at, see [`fitted_size`]."""
        return fitted_size(size, self.factor, self.min_pixels, self.max_pixels)

    def fit(self, image: Image.Image) -> Image.Image:
        """The image at the size that the model sees it, with the resampling filter of the processor."""
        size = self.fitted_size(image.size)
        return image if size == image.size else image.resize(size, self.image_processor.resample)

    def image_tokens(self, image: Image.Image) -> int:
        """Number of placeholder tokens of a fitted image."""
        return (image.width // self.factor) * (image.height // self.factor)

    def grid(self, image: Image.Image) -> tuple[int, int, int]:
        """Frames, rows and columns of patches of a fitted image: its line of `image_grid_thw`."""
        patch = self.image_processor.patch_size
        return (1, image.height // patch, image.width // patch)

    def prompt_ids(self, messages: list[dict], images: Sequence[Image.Image]) -> list[int]:
        """Ids of `messages` up to and including the header of the next assistant turn."""
        text = self._render(messages, add_generation_prompt=True)
        return self._expand(self._template_ids(text), images)

    def reply_ids(self, message: dict, image: Image.Image) -> list[int]:
        """Ids between an end-of-turn token and the first token of the next assistant turn."""
        key = str(message)
        if key not in self._reply_cache:
            self._reply_cache[key] = self._suffix_ids(message)
        return self._expand(self._reply_cache[key], [image])

    def decode(self, ids: Sequence[int]) -> str:
        """Text of sampled ids, without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def ends_turn(self, token_id: int) -> bool:
        """Whether a sampled id ends the turn."""
        return token_id in self.end_ids

    def encode_images(self, images: Sequence[Image.Image]) -> dict:
        """
        Tensors of fitted images; an image that occurs several times is processed once.

        Returns:
            `dict`: `pixel_values` (sum of patches, patch dimension) and `image_grid_thw` (number of images, 3).
        """
        import torch

        unique = {id(image): image for image in images}
        encoded = {}
        for key, image in unique.items():
            encoded[key] = self.image_processor(images=[image], return_tensors="pt")
        parts = [encoded[id(image)] for image in images]
        return {name: torch.cat([part[name] for part in parts]) for name in ("pixel_values", "image_grid_thw")}

    def token_types(self, ids: Sequence[int]) -> list[int]:
        """1 at image placeholders, else 0: what the position code of the model asks for."""
        return [int(token_id == self.image_token_id) for token_id in ids]

    def check_image_tokens(self, ids: Sequence[int], images: Sequence[Image.Image], name: str) -> None:
        """
        Compare placeholders with image features.

        Raises:
            ValueError: The numbers differ, or there is a video placeholder; the message names the sample.
        """
        if getattr(self.processor, "video_token_id", None) in ids:
            raise ValueError(
                f"Sample {name!r} holds a video placeholder token, and there are no videos. Look for "
                f"{self.processor.video_token!r} in its question or choices."
            )
        placeholders = sum(self.token_types(ids))
        features = sum(self.image_tokens(image) for image in images)
        if placeholders != features:
            raise ValueError(
                f"Sample {name!r} has {placeholders} image placeholder tokens but its {len(images)} images give "
                f"{features} features (sizes {[image.size for image in images]}). Look for a literal image token in "
                "its question or choices, or a chat template that drops images."
            )

    def _render(self, messages: list[dict], add_generation_prompt: bool) -> str:
        return self.processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _suffix_ids(self, message: dict) -> list[int]:
        """Render a dummy conversation with and without the reply; what the reply adds after the end of turn."""
        dummy = [
            {"role": "user", "content": [{"type": "text", "text": "."}]},
            {"role": "assistant", "content": [{"type": "text", "text": "."}]},
        ]
        before = self._encode(self._render(dummy, add_generation_prompt=False))
        after = self._encode(self._render([*dummy, message], add_generation_prompt=True))
        if self.end_of_turn_id not in before:
            raise ValueError(
                f"The chat template does not close an assistant turn with {self.tokenizer.eos_token!r}. Use a "
                "tokenizer whose EOS token ends a turn."
            )
        keep = len(before) - before[::-1].index(self.end_of_turn_id)
        if after[:keep] != before[:keep]:
            raise ValueError(
                "The chat template changes earlier turns when a reply is added. Use one that only appends."
            )
        return list(after[keep:])

    def _expand(self, ids: Sequence[int], images: Sequence[Image.Image]) -> list[int]:
        """Repeat each image placeholder as often as its image has tokens."""
        counts = iter([self.image_tokens(image) for image in images])
        expanded: list[int] = []
        for token_id in ids:
            expanded += [token_id] * (next(counts, 1) if token_id == self.image_token_id else 1)
        return expanded


def fitted_size(size: tuple[int, int], factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """
    Width and height, in pixels, that an image of `size` (width, height) is shown at. The processor leaves it there.

    Args:
        size (`tuple[int, int]`): (width, height) of the image.
        factor (`int`): Side of the square that one image token covers, `patch_size * merge_size`.
        min_pixels (`int`), max_pixels (`int`): The pixel budget.

    Raises:
        ValueError: One side is more than 200 times the other.
    """
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    if max(size) > MAX_ASPECT * min(size):
        raise ValueError(
            f"An image of {size[0]}x{size[1]} pixels is more than {MAX_ASPECT} times as long as it is wide, which "
            "the image processor refuses. Cut it into parts, or leave the row out."
        )
    for _ in range(8):  # an extreme aspect ratio needs a second pass to come under the budget
        height, width = smart_resize(size[1], size[0], factor, min_pixels, max_pixels)
        width, height = min(width, MAX_ASPECT * height), min(height, MAX_ASPECT * width)  # rounding may exceed it
        if (width, height) == size:
            return size
        size = (width, height)
    raise ValueError(f"No size within the pixel budget was found for an image of {size}. Raise `max_pixels`.")


def check_processor(processor) -> None:
    """
    Refuse what is not a Qwen-VL processor.

    Raises:
        ValueError: It has no image processor, or images are not a grid of `patch_size * merge_size` squares.
    """
    image_processor = getattr(processor, "image_processor", None)
    if image_processor is None:
        raise ValueError(
            f"The processor is a {type(processor).__name__} without an image processor: not a vision-language model, "
            "or a class that `AutoProcessor` does not know (then it silently returns the tokenizer). Give the "
            "directory of a vision-language model, or register its processor with `AutoProcessor.register`."
        )
    if not (hasattr(image_processor, "patch_size") and hasattr(image_processor, "merge_size")):
        raise ValueError(
            f"{type(image_processor).__name__} does not show an image as a grid of merged patches. Supported model "
            f"types: {list(SUPPORTED_MODEL_TYPES)}."
        )


def load_config(name: str, **options):
    """
    Configuration of a model; no weights are read.

    Args:
        name (`str`): Directory or Hub id.
        **options: As for [`~transformers.AutoConfig.from_pretrained`].

    Raises:
        ValueError: There is no such model, or it is not of a supported family.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name, **options)
    except OSError as error:
        raise ValueError(
            f"There is no model '{name}': no directory here with a `config.json`, and no repository that the Hub "
            f"gives out ({str(error).strip().splitlines()[0]})."
        ) from error
    check_model_type(config.model_type, name)
    return config


def check_model_type(model_type: str, name: str) -> None:
    """
    Refuse a model family that the round conversation can not be played with.

    Args:
        model_type (`str`): `model_type` of the model's configuration.
        name (`str`): Name of the model, for the message.

    Raises:
        ValueError: Not one of [`SUPPORTED_MODEL_TYPES`]; the message lists them.
    """
    if model_type in SUPPORTED_MODEL_TYPES:
        return
    reason = f": {OTHER_LAYOUTS[model_type]}" if model_type in OTHER_LAYOUTS else ""
    raise ValueError(
        f"Models of type {model_type!r} are not supported ('{name}'){reason}. Supported are vision-language models of "
        f"the types {list(SUPPORTED_MODEL_TYPES)}, for example Qwen/Qwen2.5-VL-3B-Instruct."
    )


def vision_token_ids(config) -> list[int]:
    """Ids of every vision placeholder of a model config; none of them may be sampled."""
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id", "vision_token_id")
    return sorted({value for name in names if isinstance(value := getattr(config, name, None), int)})


def parse_pixels(value: int | str) -> int:
    """
    A number of pixels, written as `1003520` or `"1280x28x28"`.

    Raises:
        ValueError: Neither a positive integer nor a product of positive integers.
    """
    text = str(value).strip().lower()
    if not re.fullmatch(r"\d+(\s*[x*]\s*\d+)*", text):
        raise ValueError(f"A pixel cap must look like 1003520 or 1280x28x28, got {value!r}.")
    product = 1
    for factor in re.split(r"\s*[x*]\s*", text):
        product *= int(factor)
    if product == 0:
        raise ValueError(f"A pixel cap must be positive, got {value!r}.")
    return product
