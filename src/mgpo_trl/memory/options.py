"""What decides the memory of a run, gathered from the options of `train.py`."""

from dataclasses import dataclass, field
from typing import Any

from ..adapters import lora_config


@dataclass(frozen=True)
class MemoryOptions:
    """
    What [`~mgpo_trl.memory.estimate_memory`] needs to know beside the model's configuration. The defaults are a full
    fine-tune in bf16 on one GPU with the paper's pixel cap.
    """

    lora: Any = None
    """[`~peft.LoraConfig`] of the adapter, or `None` where all weights are trained."""
    bits: int = 16
    """Precision of the language layers below an adapter: 4 or 8 where they are quantised."""
    double_quant: bool = False
    """Whether the constants of the 4-bit blocks are quantised too."""
    dtype: str = "bfloat16"
    """Precision of the weights that are not quantised."""
    batch: int = 1
    """Rollouts of one backward pass on one GPU: `per_device_train_batch_size`."""
    generation_batch: int = 8
    """Rollouts that one GPU generates at once, and whose images it keeps: `batch` x `steps_per_generation`."""
    num_rounds: int = 2
    """Rounds of a rollout; each one shows one image."""
    max_pixels: int = 1280 * 28 * 28
    """Pixel cap of an image."""
    sampled_tokens: int = 2048
    """Most tokens that a rollout samples, in all rounds."""
    text_tokens: int = 512
    """Tokens of prompt and replies without images: an allowance, which long questions exceed."""
    checkpointing: bool = True
    """Gradient checkpointing."""
    optimizer: str = "adamw_torch_fused"
    """`optim` of the training arguments."""
    reference: bool = False
    """Whether a frozen copy of what is trained is held for the KL term: of all weights, or of an adapter that training
    goes on from. A new adapter needs none, the reference is the model without it."""
    shares_prefix: bool = True
    """Whether generation prefills what contexts share once (`share_prefix`), where the model's family allows it."""
    zero_stage: int = 0
    """DeepSpeed ZeRO stage; 0 without DeepSpeed."""
    processes: int = 1
    """GPUs that share the work."""
    offload: bool = False
    """Whether DeepSpeed keeps the optimizer's state in the main memory of the machine."""
    vllm: str | None = None
    """`None`, or vLLM's mode: `"colocate"` on the same GPUs, `"server"` on others."""
    vllm_share: float = field(default=0.3, metadata={"help": "`vllm_gpu_memory_utilization`"})
    """Share of the GPU's memory that a colocated vLLM takes."""
    vllm_parallel: int = 1
    """GPUs that share one colocated engine: `vllm_tensor_parallel_size`."""
    vllm_sleeps: bool = False
    """Whether a colocated vLLM gives its memory back while training runs."""

    @classmethod
    def from_args(
        cls, args, model_args, lora_on=None, *, zero_stage: int = 0, processes: int = 1, offload=False, lora=None
    ):
        """
        Gather the options of one run.

        Args:
            args ([`~mgpo_trl.MGPOConfig`]): Training arguments.
            model_args ([`~trl.ModelConfig`]): Options of the model.
            lora_on (`list[str]`, *optional*): `--lora_on`.
            zero_stage (`int`, *optional*, defaults to `0`): Stage of the DeepSpeed configuration, which the
                arguments do not hold when it is given to `accelerate launch`.
            processes (`int`, *optional*, defaults to `1`): Number of GPUs.
            offload (`bool`, *optional*, defaults to `False`): Whether DeepSpeed offloads the optimizer.
            lora ([`~peft.LoraConfig`], *optional*): Adapter that training goes on from, in place of a new one.
        """
        new = None if lora is not None else lora_config(model_args, lora_on)
        return cls(
            lora=lora or new,
            bits=4 if model_args.load_in_4bit else 8 if model_args.load_in_8bit else 16,
            double_quant=model_args.use_bnb_nested_quant,
            dtype="bfloat16" if model_args.dtype == "auto" else model_args.dtype,
            batch=args.per_device_train_batch_size,
            generation_batch=args.per_device_train_batch_size * args.steps_per_generation,
            num_rounds=args.num_rounds,
            max_pixels=args.max_pixels,
            sampled_tokens=sum(args.token_budgets),
            checkpointing=args.gradient_checkpointing,
            optimizer=getattr(args.optim, "value", args.optim),
            reference=new is None and args.beta != 0.0,
            shares_prefix=args.share_prefix,
            zero_stage=zero_stage,
            processes=processes,
            offload=offload,
            vllm=args.vllm_mode if args.use_vllm else None,
            vllm_share=args.vllm_gpu_memory_utilization,
            vllm_parallel=args.vllm_tensor_parallel_size,
            vllm_sleeps=args.vllm_enable_sleep_mode,
        )
