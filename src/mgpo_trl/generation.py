"""A generator for the round loop: continues contexts with a transformers model."""

import torch

from .processing import VisionChat, vision_token_ids
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

    Args:
        path (`str`): Directory or Hub id of a full model, or of an adapter (it has an `adapter_config.json`).
        base_model (`str`, *optional*): Base of the adapter; the one that it names when not given.
        dtype (`str`, *optional*, defaults to `"auto"`): As in `from_pretrained`.
        device (`str`, *optional*): Device; the accelerator when there is one.

    Returns:
        `tuple`: (model in evaluation mode, processor).
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from .processing import check_processor

    is_adapter = _has_file(path, "adapter_config.json")
    if is_adapter:
        from peft import PeftConfig, PeftModel

        base_model = base_model or PeftConfig.from_pretrained(path).base_model_name_or_path
    has_processor = not is_adapter or _has_file(path, "tokenizer_config.json")
    processor = AutoProcessor.from_pretrained(path if has_processor else base_model, padding_side="left")
    check_processor(processor)
    model = AutoModelForImageTextToText.from_pretrained(base_model if is_adapter else path, dtype=dtype)
    if is_adapter:
        model = PeftModel.from_pretrained(model, path).merge_and_unload()
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    return model.to(device or accelerator).eval(), processor


def _has_file(path: str, name: str) -> bool:
    """Whether a model directory or Hub repository holds a file."""
    from transformers.utils import cached_file

    return cached_file(path, name, _raise_exceptions_for_missing_entries=False) is not None
