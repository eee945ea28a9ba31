"""LoRA adapters: which layers they go on, the precision of what lies under them, and training one further.

The names below are those of the Qwen-VL families; `lora_on` picks groups of them::

    model.language_model.layers.0.self_attn.q_proj      language
    model.visual.merger.mlp.0                           projector, Qwen2.5-VL
    model.visual.deepstack_merger_list.1.linear_fc2     projector, Qwen3-VL
    model.visual.blocks.0.attn.qkv                      vision
"""

import logging
from collections.abc import Sequence

logger = logging.getLogger(__name__)

ADAPTER_CONFIG = "adapter_config.json"
LORA_ON = ("language", "projector", "vision")
"""Groups of linear layers that an adapter may go on."""

_LINEAR = {
    "language": r"language_model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj",
    "projector": r"visual\.(merger|deepstack_merger_list\.\d+)\.(mlp\.[02]|linear_fc[12])",
    "vision": r"visual\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(gate_proj|up_proj|down_proj|linear_fc[12]))",
}
FULL_PRECISION = ("model.visual", "lm_head")
"""
Modules, by full name, that stay in the precision of the checkpoint when the rest is loaded in 4 or 8 bits. The head,
as everywhere. And the vision tower: no adapter sits on its layers to train their rounding errors away, and what it
blurs is lost to both rounds; 4 bits would save 0.9 of the 1.3 GB that Qwen2.5-VL's takes in bf16.
"""


def target_modules(lora_on: Sequence[str]) -> str:
    """
    Pattern for the `target_modules` of a [`~peft.LoraConfig`]: every linear layer of the named groups.

    Args:
        lora_on (`Sequence[str]`): Some of [`LORA_ON`].

    Raises:
        ValueError: No group, or one that does not exist.
    """
    unknown = [group for group in lora_on if group not in LORA_ON]
    if unknown or not lora_on:
        raise ValueError(f"`lora_on` must name some of {list(LORA_ON)}, got {list(lora_on)}.")
    return rf"(.*\.)?({'|'.join(_LINEAR[group] for group in LORA_ON if group in lora_on)})"


def check_adapter_options(model_args, lora_on: Sequence[str] | None, adapter: str | None) -> None:
    """
    Refuse options that would be ignored or can not work, before anything is loaded.

    Args:
        model_args ([`~trl.ModelConfig`]): Options of the model.
        lora_on (`Sequence[str]`, *optional*): Groups of layers, where they were named.
        adapter (`str`, *optional*): Directory of the adapter that training starts from.

    Raises:
        ValueError: Names the option and what to do.
    """
    if adapter is not None and not is_adapter(adapter):
        raise ValueError(f"`--adapter` must be a directory or Hub id with `{ADAPTER_CONFIG}`, got '{adapter}'.")
    trains_adapter = model_args.use_peft or adapter is not None
    bits = 4 if model_args.load_in_4bit else 8 if model_args.load_in_8bit else None
    if bits and not trains_adapter:
        raise ValueError(f"Weights in {bits} bits can not be trained. Add `--use_peft` to train an adapter on them.")
    if bits == 4 and model_args.dtype == "auto":
        raise ValueError(
            "Weights in 4 bits are computed in the precision that `--dtype` names, got 'auto'. Give "
            "`--dtype bfloat16`, float16 or float32."
        )
    if lora_on is None:
        return
    target_modules(lora_on)
    if not model_args.use_peft or adapter is not None:
        raise ValueError("`--lora_on` says where a new adapter goes. Give `--use_peft`, and no adapter to start from.")
    if model_args.lora_target_modules is not None or model_args.lora_target_parameters is not None:
        raise ValueError("Give `--lora_on` or `--lora_target_modules` / `--lora_target_parameters`, not both.")


def lora_config(model_args, lora_on: Sequence[str] | None = None):
    """
    TRL's [`~peft.LoraConfig`] of the command line; where no target is named, the linear layers of the language model.

    Args:
        model_args ([`~trl.ModelConfig`]): Options of the model.
        lora_on (`Sequence[str]`, *optional*): Groups of layers in place of `["language"]`.

    Returns:
        [`~peft.LoraConfig`], or `None` without `--use_peft`.
    """
    from trl import get_peft_config

    config = get_peft_config(model_args)
    if config is not None and config.target_modules is None and not config.target_parameters:
        config.target_modules = target_modules(lora_on or ["language"])
    return config


def quantization_config(model_args):
    """TRL's quantisation of the command line, with the modules of [`FULL_PRECISION`] left as they are."""
    from trl import get_quantization_config

    config = get_quantization_config(model_args)
    if config is not None:
        config.llm_int8_skip_modules = list(FULL_PRECISION)
    return config


def is_adapter(path: str) -> bool:
    """Whether a directory or Hub repository holds an adapter rather than a model."""
    from transformers.utils import find_adapter_config_file

    return find_adapter_config_file(str(path)) is not None


def is_quantized(model) -> bool:
    """Whether a loaded model keeps its weights in 4 or 8 bits."""
    return bool(getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False))


def adapter_base(adapter: str) -> tuple[str, str | None]:
    """
    Base model that an adapter names, and its revision.

    Raises:
        ValueError: It names none.
    """
    from peft import PeftConfig

    config = PeftConfig.from_pretrained(adapter)
    if not config.base_model_name_or_path:
        raise ValueError(f"The adapter in '{adapter}' does not say what it was trained on. Name the base model too.")
    return config.base_model_name_or_path, config.revision


def load_trainable(adapter: str, args, base_model: str | None = None, quantization=None):
    """
    An adapter on its base model, ready to be trained further.

    With `beta > 0` TRL keeps a frozen copy of the adapter, not of the model, as the reference of the KL term.

    Args:
        adapter (`str`): Directory of the adapter.
        args ([`~mgpo_trl.MGPOConfig`]): Its `model_init_kwargs` load the base model.
        base_model (`str`, *optional*): Base model; the one that the adapter names when not given.
        quantization ([`~transformers.BitsAndBytesConfig`], *optional*): Precision of the base model.

    Returns:
        `PeftModel`
    """
    from peft import PeftModel
    from trl.trainer.utils import create_model_from_path

    options = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
    if base_model is None:
        base_model, options["revision"] = adapter_base(adapter)
    if quantization is not None:
        options["quantization_config"] = quantization
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):  # as TRL loads a model
        options["device_map"] = None
    base = create_model_from_path(base_model, **options)
    model = PeftModel.from_pretrained(base, adapter, is_trainable=True)
    kind = model.peft_config["default"]
    logger.info("Training goes on with the adapter '%s' (r=%s, alpha=%s).", adapter, kind.r, kind.lora_alpha)
    return model


def is_vision_frozen(model) -> bool:
    """Whether a model has a vision tower of which nothing is trained, adapters included."""
    tower = _vision_tower(model)
    return tower is not None and not any(parameter.requires_grad for parameter in tower.parameters())


def stop_gradients_at_frozen_vision(model) -> None:
    """
    Run the vision tower without a graph where none of its weights is trained.

    With gradient checkpointing TRL and PEFT make the output of every input embedding require gradients, the patch
    embedding of Qwen2.5-VL's tower included: the frozen tower would be kept, run again and differentiated for nothing.

    Args:
        model ([`~transformers.PreTrainedModel`] or `PeftModel`): The model as the trainer holds it.
    """
    import torch

    if is_vision_frozen(model):
        tower = _vision_tower(model)
        tower.forward = torch.no_grad()(tower.forward)


def _vision_tower(model):
    return next((module for name, module in model.named_modules() if name.endswith(".visual")), None)
