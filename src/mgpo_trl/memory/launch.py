"""The estimate for the run at hand: its options, its launch, its device."""

import logging
from dataclasses import replace

from .estimate import MemoryEstimate, estimate_memory
from .options import MemoryOptions

logger = logging.getLogger(__name__)


def estimate_run(
    config, args, model_args, lora_on=None, gpu_bytes: int | None = None, lora=None, **known
) -> MemoryEstimate:
    """
    Estimate what one GPU of this launch holds.

    Args:
        config ([`~transformers.PreTrainedConfig`]): Configuration of the model.
        args ([`~mgpo_trl.MGPOConfig`]): Training arguments; they know the number of processes and DeepSpeed's file.
        model_args ([`~trl.ModelConfig`]): Options of the model.
        lora_on (`list[str]`, *optional*): `--lora_on`.
        gpu_bytes (`int`, *optional*): Size of the GPU; needed for the share of a colocated vLLM.
        lora ([`~peft.LoraConfig`], *optional*): Adapter that training goes on from.
        **known: Fields of [`~mgpo_trl.memory.MemoryOptions`] that are known better, such as the tokens of a dataset.
    """
    stage, offload = _zero(args)
    options = MemoryOptions.from_args(
        args, model_args, lora_on, zero_stage=stage, processes=args.world_size, offload=offload, lora=lora
    )
    return estimate_memory(config, replace(options, **known), gpu_bytes)


def _zero(args) -> tuple[int, bool]:
    """DeepSpeed's stage (0 without it; FSDP shards as stage 3 does), and whether it offloads the optimizer."""
    if args.deepspeed_plugin is None:
        fsdp = getattr(args.distributed_state.distributed_type, "value", "") == "FSDP"
        return (3 if fsdp else 0), False
    zero = args.deepspeed_plugin.deepspeed_config.get("zero_optimization", {})
    return zero.get("stage", 0), (zero.get("offload_optimizer") or {}).get("device", "none") != "none"


def device_bytes() -> int | None:
    """Memory of this process's accelerator; `None` on a CPU."""
    import torch

    if not torch.accelerator.is_available():
        return None
    return torch.accelerator.get_memory_info()[1]


def warn_of_memory(config, lora=None, *, args, model_args, lora_on=None) -> MemoryEstimate | None:
    """
    Say before the weights load where the run is not expected to fit this process's accelerator; silent on a CPU.

    Returns:
        [`MemoryEstimate`], or `None` on a CPU. A failing estimate is a warning: it must not stop a run that may fit.
    """
    size = device_bytes()
    if size is None:
        return None
    try:
        found = estimate_run(config, args, model_args, lora_on, size, lora)
    except Exception as error:  # an estimate for a launch that nobody has tried yet
        logger.warning("Memory was not estimated: %s: %s", type(error).__name__, error)
        return None
    say = logger.info if found.fits(size) else logger.warning
    for line in found.advice(size):
        say(line)
    return found
