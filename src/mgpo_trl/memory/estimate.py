"""Estimated memory of one GPU, part by part."""

import math
from dataclasses import dataclass, field
from functools import partial

from ..processing import SHARED_FAMILIES
from ..shared_prefix import IMAGES_AT_ONCE, PREFILL_TOKENS
from .options import MemoryOptions
from .simulate import Pass, attend_through_probe, language_pass, vision_pass
from .weights import WeightBytes, count_weights, meta_model

GIB = 1024**3
CUDA_CONTEXT = int(0.8 * GIB)
"""What a process takes before its first tensor. An allowance: it depends on card and driver."""
FRAGMENTS = 0.06
"""Share of the peak that the allocator holds without using it. An allowance, too."""
HEAD_TILE = (4096, 32768)
"""Tokens and vocabulary entries whose logits TRL's fused head holds at once."""
ZERO_BUCKETS = 2 * 500_000_000 * 2
"""Two buckets of 5e8 numbers in bf16, the default of DeepSpeed, in which gradients and weights travel."""

ALWAYS = ("weights", "adapter", "reference", "gradients", "optimizer", "images", "unpacked layer", "CUDA context")
TRAINING = ("activations", "vision activations", "LM head", "ZeRO buffers")
GENERATION = ("KV cache", "prefill", "gathered weights")
ADVICE = {
    "weights": "`--load_in_4bit true --use_peft true`, a smaller model, or ZeRO-3 over more GPUs",
    "reference": "`--beta 0` or `--use_peft true`, which need no second copy of the weights",
    "gradients": "`--use_peft true`, or ZeRO-2 over more GPUs",
    "optimizer": "`--use_peft true`, `--optim paged_adamw_8bit`, or ZeRO over more GPUs",
    "images": "a lower `--steps_per_generation`: the images of all rollouts of a generation stay on the GPU",
    "activations": "a lower `--per_device_train_batch_size`, `--gradient_checkpointing true`, smaller "
    "`--round_token_budgets` or a lower `--max_pixels`",
    "vision activations": "a lower `--max_pixels`, or `--lora_on language`",
    "KV cache": "a lower `--steps_per_generation`, smaller `--round_token_budgets`, or `--use_vllm true`",
    "prefill": "a lower `--steps_per_generation` or `--max_pixels`",
    "vLLM": "a lower `--vllm_gpu_memory_utilization`, or `--vllm_enable_sleep_mode true`",
    "gathered weights": "`--use_vllm true`, or `--ds3_gather_for_generation false`",
}
"""What lowers a part, by its name."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of every part, and which of them meet."""

    parts: dict[str, int] = field(default_factory=dict)
    """Bytes by name of the part."""
    vllm_sleeps: bool = False
    """Whether the memory of a colocated vLLM is free while training runs."""
    vllm_weights: int = 0
    """Bytes of weights that a colocated vLLM holds within its share."""

    @property
    def training(self) -> int:
        """Peak of the loss step."""
        names = [*ALWAYS, *TRAINING, *([] if self.vllm_sleeps else ["vLLM"])]
        return self._with_fragments(names)

    @property
    def generation(self) -> int:
        """Peak of the rollout."""
        return self._with_fragments([*ALWAYS, *GENERATION, "vLLM"])

    @property
    def peak(self) -> int:
        """The larger of both."""
        return max(self.training, self.generation)

    def _with_fragments(self, names) -> int:
        vllm = self.parts.get("vLLM", 0) if "vLLM" in names else 0  # takes its whole share, and no more
        ours = sum(self.parts.get(name, 0) for name in names if name != "vLLM")
        return int(ours * (1 + FRAGMENTS)) + vllm

    def fits(self, gpu_bytes: int) -> bool:
        """Whether the peak stays within a GPU of this size, and a colocated vLLM can load the weights."""
        return self.peak <= gpu_bytes and not self._starved()

    def table(self) -> str:
        """One line a part, in GiB, then the two peaks."""
        lines = [f"{name:<20} {size / GIB:>7.2f} GiB" for name, size in self.parts.items() if size]
        lines.append(f"{'peak of training':<20} {self.training / GIB:>7.2f} GiB")
        lines.append(f"{'peak of generation':<20} {self.generation / GIB:>7.2f} GiB")
        return "\n".join(lines)

    def advice(self, gpu_bytes: int) -> list[str]:
        """What to change where the run does not fit, the largest part first; one line where it does."""
        size = gpu_bytes / GIB
        if self.fits(gpu_bytes):
            return [f"Estimated peak {self.peak / GIB:.1f} GiB: fits a GPU of {size:.0f} GiB."]
        if self.peak <= gpu_bytes:
            return self._starved()
        phase, names = ("training", TRAINING) if self.training >= self.generation else ("generation", GENERATION)
        peak = f"Estimated peak {self.peak / GIB:.1f} GiB in {phase}: does not fit a GPU of {size:.0f} GiB."
        ours = sorted({*ALWAYS, *names, "vLLM"} & set(ADVICE), key=lambda name: -self.parts.get(name, 0))
        largest = [
            f"{name} takes {self.parts[name] / GIB:.1f} GiB: {ADVICE[name]}."
            for name in ours[:3]
            if self.parts.get(name, 0)
        ]
        return [peak, *self._starved(), *largest]

    def _starved(self) -> list[str]:
        share = self.parts.get("vLLM", 0)
        if self.vllm_weights <= share:
            return []
        return [
            f"vLLM's share of {share / GIB:.1f} GiB has no room for the weights, {self.vllm_weights / GIB:.1f} GiB: "
            "raise `--vllm_gpu_memory_utilization` or `--vllm_tensor_parallel_size`."
        ]


def estimate_memory(config, options: MemoryOptions, gpu_bytes: int | None = None) -> MemoryEstimate:
    """
    Estimate what one GPU holds while a model is trained.

    Weights, gradients and optimizer are counted on the model's own classes without values; activations come from a
    pass through its own layers on the meta device. The CUDA context and the allocator's fragments are allowances.

    Args:
        config ([`~transformers.PreTrainedConfig`]): Configuration of the model; no weights are read.
        options ([`MemoryOptions`]): How it is trained, see [`MemoryOptions.from_args`].
        gpu_bytes (`int`, *optional*): Size of the GPU; needed for the share of a colocated vLLM.

    Raises:
        ValueError: vLLM is colocated and the size of the GPU is not known.
    """
    if options.vllm == "colocate" and gpu_bytes is None:
        raise ValueError("A colocated vLLM takes a share of the GPU: `gpu_bytes` must be given.")
    weights = count_weights(config, options)
    parts = _kept_parts(config, options, weights)
    parts |= _training_parts(config, options, weights)
    parts |= _generation_parts(config, options, weights)
    parts["vLLM"] = int(options.vllm_share * gpu_bytes) if options.vllm == "colocate" else 0
    parts["CUDA context"] = CUDA_CONTEXT
    vllm_weights = weights.base // options.vllm_parallel if options.vllm == "colocate" else 0
    return MemoryEstimate(parts, options.vllm_sleeps, vllm_weights)


def image_tokens(config, options: MemoryOptions) -> int:
    """Most tokens of one image."""
    vision = config.vision_config
    return options.max_pixels // (vision.patch_size * vision.spatial_merge_size) ** 2


def row_tokens(config, options: MemoryOptions) -> int:
    """Most tokens of one rollout, from the prompt to the answer."""
    return options.num_rounds * image_tokens(config, options) + options.text_tokens + options.sampled_tokens


def _patches(config, options: MemoryOptions, rollouts: int) -> int:
    return rollouts * options.num_rounds * image_tokens(config, options) * config.vision_config.spatial_merge_size**2


def _kept_parts(config, options: MemoryOptions, weights: WeightBytes) -> dict[str, int]:
    """What is held throughout, with ZeRO's share of it: stage 1 cuts the optimizer, 2 gradients, 3 weights."""
    share = {stage: options.processes if options.zero_stage >= stage else 1 for stage in (1, 2, 3)}
    vision = config.vision_config
    numbers = vision.patch_size**2 * vision.temporal_patch_size * vision.in_channels  # of one patch, as fp32
    return {
        "weights": weights.base // share[3],
        "adapter": weights.adapter // share[3],
        "reference": (weights.base if options.lora is None else weights.adapter) // share[3] * options.reference,
        "gradients": weights.gradients // share[2],
        "optimizer": 0 if options.offload else weights.optimizer // share[1],
        "unpacked layer": weights.largest_layer,
        "images": 4 * numbers * _patches(config, options, options.generation_batch),
    }


def _prepared(options: MemoryOptions, checkpointing: bool, config):
    """A model for the passes: on the meta device, with adapters, the probe and gradient checkpointing."""
    model = meta_model(config, options)
    model = model.get_base_model() if options.lora is not None else model
    attend_through_probe(model)
    if checkpointing:
        model.gradient_checkpointing_enable()
    return model


def _training_parts(config, options: MemoryOptions, weights: WeightBytes) -> dict[str, int]:
    prepare = partial(_prepared, options, options.checkpointing)
    tokens = row_tokens(config, options)
    language = language_pass(config, prepare, options.batch, tokens, train=True)
    vision = vision_pass(config, prepare, _patches(config, options, options.batch), train=weights.trains_vision)
    head = _head_bytes(config, options)
    sharded = options.zero_stage == 3
    return {
        # The head works while everything is held, the layers one after the other: only the larger one counts.
        "activations": max(language.peak, language.held + head) - head,
        "LM head": head,
        # A frozen tower runs before the language layers and leaves its output.
        "vision activations": vision.held if weights.trains_vision else _beyond(vision, language),
        "ZeRO buffers": ZERO_BUCKETS if options.zero_stage >= 2 and (sharded or options.lora is None) else 0,
    }


def _beyond(vision: Pass, language: Pass) -> int:
    """What the tower's pass needs beyond what the language layers need later anyway."""
    return max(vision.held, vision.peak - language.peak)


def _head_bytes(config, options: MemoryOptions) -> int:
    """Logits of one tile, the hidden states' gradient in fp32, and that of the head where the head is trained."""
    text = config.text_config
    tokens = options.batch * row_tokens(config, options)
    tile = 2 * min(tokens, HEAD_TILE[0]) * min(text.vocab_size, HEAD_TILE[1])
    head = 6 * text.vocab_size * text.hidden_size if options.lora is None else 0
    return tile + 6 * tokens * text.hidden_size + head


def _generation_parts(config, options: MemoryOptions, weights: WeightBytes) -> dict[str, int]:
    if options.vllm is not None:
        return {"KV cache": 0, "prefill": 0, "gathered weights": 0}
    text, rows = config.text_config, options.generation_batch
    tokens = row_tokens(config, options)
    prompt = tokens - math.ceil(options.sampled_tokens / options.num_rounds)
    prefilled, encoded = _at_once(config, options, prompt)
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    layer = 2 * text.num_key_value_heads * width * 2 * rows * tokens  # keys and values in bf16
    repeated = layer * (text.num_attention_heads // text.num_key_value_heads)  # a padded batch repeats them
    prepare = partial(_prepared, options, False)
    language = language_pass(config, prepare, prefilled, prompt, train=False)
    vision = vision_pass(config, prepare, encoded * _patches(config, options, 1) // options.num_rounds, train=False)
    logits = 4 * 4 * rows * text.vocab_size  # raw, processed, sorted and as probabilities
    return {
        "KV cache": layer * text.num_hidden_layers + layer,  # one layer is copied when it grows
        "prefill": max(language.peak, vision.peak, repeated) + logits,
        "gathered weights": weights.base if options.zero_stage == 3 else 0,
    }


def _at_once(config, options: MemoryOptions, prompt: int) -> tuple[int, int]:
    """Contexts that one prefill call holds, and images that are encoded in one go."""
    rows = options.generation_batch
    if not (options.shares_prefix and config.model_type in SHARED_FAMILIES and options.zero_stage < 3):
        return rows, rows * options.num_rounds  # `generate` runs the whole batch, with every image of every context
    return min(rows, max(PREFILL_TOKENS // prompt, 1)), min(rows, IMAGES_AT_ONCE)
