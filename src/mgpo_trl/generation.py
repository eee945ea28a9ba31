"""A generator for the round loop: continues contexts with a transformers model."""

import torch

from .adapters import adapter_base, is_adapter, is_quantized
from .processing import VisionChat, check_processor, load_config, vision_token_ids
from .rollout import Context, Sampled


class ModelGenerator:
    """
    Samples turns with `model.generate`; one instance serves every round of [`~mgpo_trl.rollout.run_rounds`].

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model, in evaluation mode on its device.
        chat ([`VisionChat`]):
            Its processor.
        token_budgets (`Sequence[int]`):
            Most sampled tokens of each round.
        temperature (`float`, *optional*, defaults to `0.0`):
            0 is greedy, which is what evaluation does unless asked otherwise.
        top_p (`float`, *optional*, defaults to `1.0`):
            Nucleus of sampling; without effect when greedy.
    """

    def __init__(self, model, chat: VisionChat, token_budgets, temperature: float = 0.0, top_p: float = 1.0):
        if temperature < 0:
            raise ValueError(f"`temperature` must be >= 0, got {temperature}. Use 0 for greedy decoding.")
        self.model, self.chat, self.token_budgets = model, chat, list(token_budgets)
        sampling = {"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {}
        self._options = {
            "do_sample": temperature > 0,
            **sampling,
            # What is not said here would come from the checkpoint: the published Qwen2.5-VL penalises repetition.
            "repetition_penalty": 1.0,
            "no_repeat_ngram_size": 0,
            "pad_token_id": chat.tokenizer.pad_token_id,
            "eos_token_id": sorted(chat.end_ids),
            "suppress_tokens": vision_token_ids(model.config),
            "disable_compile": True,
        }

    def __call__(self, contexts: list[Context]) -> list[Sampled]:
        """Continue every context by one turn, in one left-padded batch."""
        budget = self.token_budgets[contexts[0].round - 1]
        inputs = self._inputs(contexts)
        with torch.inference_mode():
            ids = self.model.generate(**inputs, generation_config=self._config(budget))
        return [Sampled(self._until_end(row)) for row in ids[:, inputs["input_ids"].size(1) :].tolist()]

    def _inputs(self, contexts: list[Context]) -> dict:
        inputs = self.chat.encode_images([image for context in contexts for image in context.images])
        inputs["input_ids"] = _left_pad([context.ids for context in contexts], self.chat.tokenizer.pad_token_id)
        inputs["attention_mask"] = _left_pad([[1] * len(context.ids) for context in contexts], 0)
        inputs["mm_token_type_ids"] = _left_pad([self.chat.token_types(context.ids) for context in contexts], 0)
        inputs = {name: tensor.to(self.model.device) for name, tensor in inputs.items()}
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        return inputs

    def _config(self, budget: int):
        from transformers import GenerationConfig

        return GenerationConfig(max_new_tokens=budget, **self._options)

    def _until_end(self, ids: list[int]) -> list[int]:
        end = next((i for i, token_id in enumerate(ids) if self.chat.ends_turn(token_id)), len(ids) - 1)
        return ids[: end + 1]


def _left_pad(rows: list[list[int]], value: int) -> torch.Tensor:
    length = max(len(row) for row in rows)
    return torch.tensor([[value] * (length - len(row)) + row for row in rows])


def end_ids(model) -> list[int]:
    """Every id that ends a turn according to the model's generation configuration."""
    ends = model.generation_config.eos_token_id
    return [ends] if isinstance(ends, int) else list(ends or [])


def load_for_inference(path: str, base_model: str | None = None, dtype: str = "auto", device: str | None = None):
    """
    Load a model directory or Hub id, or a LoRA adapter on its base model, with its processor.

    The adapter becomes part of the weights, unless the base model is stored in 4 or 8 bits: rounding the sum to those
    would move the model by more than the adapter does, so there it stays beside them.

    Args:
        path (`str`): Directory or Hub id of a full model, or of an adapter (it has an `adapter_config.json`).
        base_model (`str`, *optional*): Base of the adapter; the one that it names when not given.
        dtype (`str`, *optional*, defaults to `"auto"`): As in `from_pretrained`.
        device (`str`, *optional*): Device; the accelerator when there is one.

    Returns:
        `tuple`: (model in evaluation mode, processor).

    Raises:
        ValueError: The model is not of a supported family; no weights were loaded.
    """
    from transformers import AutoModelForImageTextToText

    adapter = path if is_adapter(path) else None
    name, revision = (path, None) if adapter is None else (base_model, None) if base_model else adapter_base(path)
    load_config(name, revision=revision)
    processor = _load_processor(path, name, revision)
    model = AutoModelForImageTextToText.from_pretrained(name, revision=revision, dtype=dtype)
    if adapter is not None:
        model = _with_adapter(model, adapter)
    if not is_quantized(model):  # those are on their device, and can not be moved
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
        model = model.to(device or accelerator)
    return model.eval(), processor


def _load_processor(path: str, model_name: str, revision: str | None):
    """The processor in `path`, or the base model's where an adapter was saved without one."""
    from transformers import AutoProcessor

    if is_adapter(path) and not _has_file(path, "tokenizer_config.json"):
        path = model_name
    processor = AutoProcessor.from_pretrained(
        path, revision=revision if path == model_name else None, padding_side="left"
    )
    check_processor(processor)
    return processor


def _with_adapter(model, adapter: str):
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(model, adapter)
    return adapted if is_quantized(model) else adapted.merge_and_unload()


def _has_file(path: str, name: str) -> bool:
    """Whether a model directory or Hub repository holds a file."""
    from transformers.utils import cached_file

    return cached_file(path, name, _raise_exceptions_for_missing_entries=False) is not None
