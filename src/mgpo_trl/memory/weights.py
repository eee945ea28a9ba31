"""Bytes of weights, gradients and optimizer, counted on a model without values."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from ..adapters import FULL_PRECISION, is_vision_frozen
from .options import MemoryOptions

BLOCK, NESTED_BLOCK = 64, 256
"""Weights that share a constant in 4 bits, and constants that share one in double quantisation (bitsandbytes)."""
EIGHT_BIT_MINIMUM, EIGHT_BIT_BLOCK = 4096, 256
"""Tensors below the minimum keep full states in an 8-bit optimizer; above, blocks of 256 share an fp32 constant."""


@dataclass(frozen=True)
class WeightBytes:
    """What a run keeps from its first step to its last, before any sharding."""

    base: int
    """Weights as loaded, quantisation constants included; tied weights once."""
    adapter: int
    """Weights of the adapter."""
    trained: int
    """Number of trained weights."""
    gradients: int
    """One gradient for each trained weight, in its precision."""
    optimizer: int
    """States of the optimizer."""
    largest_layer: int
    """Largest linear layer in the precision of computation: what a 4-bit layer is unpacked to."""
    trains_vision: bool
    """Whether anything of the vision tower is trained, adapters included."""


def meta_model(config, options: MemoryOptions):
    """The model of a configuration on the meta device, with its adapter where there is one."""
    from peft import get_peft_model
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"), without_zero_init():
        model = AutoModelForImageTextToText.from_config(config, dtype=getattr(torch, options.dtype))
    if options.lora is None:
        return model
    model = get_peft_model(model, options.lora)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(adapter_dtype(options))
    return model


@contextmanager
def without_zero_init() -> Iterator[None]:
    """While open, transformers makes models without DeepSpeed's ZeRO-3, which would send every weight around."""
    from transformers.integrations import deepspeed

    known = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = known


def adapter_dtype(options: MemoryOptions) -> torch.dtype:
    """TRL keeps an adapter in fp32, on quantised weights in bf16, and under ZeRO-3 in the model's own precision."""
    if options.bits < 16:
        return torch.bfloat16
    return getattr(torch, options.dtype) if options.zero_stage == 3 else torch.float32


def count_weights(config, options: MemoryOptions) -> WeightBytes:
    """
    Count every weight of a model and of its adapter.

    Args:
        config ([`~transformers.PreTrainedConfig`]): Configuration of the model.
        options ([`MemoryOptions`]): How it is trained.
    """
    model = meta_model(config, options)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    in_adapter = {id(parameter) for parameter in trained} if options.lora is not None else set()
    quantized = _quantized_weights(model, options)
    base = sum(
        quantized_bytes(parameter.numel(), options) if id(parameter) in quantized else _bytes(parameter)
        for parameter in model.parameters()
        if id(parameter) not in in_adapter
    )
    linear = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    return WeightBytes(
        base=base,
        adapter=sum(_bytes(parameter) for parameter in trained) if in_adapter else 0,
        trained=sum(parameter.numel() for parameter in trained),
        gradients=sum(_bytes(parameter) for parameter in trained),
        optimizer=sum(optimizer_bytes(parameter, options) for parameter in trained),
        largest_layer=max((weight.numel() * 2 for weight in linear if id(weight) in quantized), default=0),
        trains_vision=not is_vision_frozen(model),
    )


def quantized_bytes(numel: int, options: MemoryOptions) -> int:
    """
    Bytes of one quantised weight with its constants.

    Worked example, 4 bits with double quantisation: 65,536 weights take 32,768 bytes, 1,024 constants of one byte, 4
    constants of the constants of four bytes, their offset, and tables of 256 and 16 numbers: 34,900 bytes.
    """
    if options.bits == 8:
        return numel  # and one number for each row, which is nothing
    blocks = math.ceil(numel / BLOCK)
    table = 16 * 4
    if not options.double_quant:
        return numel // 2 + 4 * blocks + table
    return numel // 2 + blocks + 4 * math.ceil(blocks / NESTED_BLOCK) + 4 + 256 * 4 + table


def optimizer_bytes(parameter: torch.Tensor, options: MemoryOptions) -> int:
    """Bytes of the states of one trained tensor: two numbers for each weight, and a step count."""
    numel = parameter.numel()
    if "sgd" in options.optimizer:
        return 0
    if options.zero_stage:  # DeepSpeed keeps a copy of the weights and both states in fp32
        return 12 * numel
    if "8bit" in options.optimizer:
        small = numel < EIGHT_BIT_MINIMUM
        return 8 * numel if small else 2 * (numel + 4 * math.ceil(numel / EIGHT_BIT_BLOCK))
    return 2 * _bytes(parameter) + 4


def _quantized_weights(model, options: MemoryOptions) -> set[int]:
    if options.bits == 16:
        return set()
    return {
        id(module.weight)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and "lora_" not in name
        and not any(f".{kept}." in f".{name}." for kept in FULL_PRECISION)
    }


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
