"""
Estimated memory of every recipe on the machine that it was written for.

    python benchmarks/recipe_memory.py            prints the rows of the table in configs/README.md

Nothing is downloaded and nothing is run: `mgpo_trl.memory` counts weights and passes on models without values.
"""

import json
from pathlib import Path
from typing import NamedTuple

from mgpo_trl import scripts
from mgpo_trl.layouts import layout_config
from mgpo_trl.memory import GIB, MemoryOptions, estimate_memory

ROOT = Path(__file__).parents[1]


class Machine(NamedTuple):
    """What a recipe was written for."""

    gpus: int
    """Number of GPUs."""
    gib: int
    """Memory of each, in GiB."""
    launch: str | None = None
    """File of `ds_configs/` without its ending, where there are several GPUs."""

    def __str__(self) -> str:
        return f"{self.gpus} x {self.gib} GB, `{self.launch}`" if self.launch else f"{self.gib} GB"


MACHINES = {
    "qwen2_5_vl_3b_qlora_12gb": Machine(1, 12),
    "qwen2_5_vl_3b_qlora_16gb": Machine(1, 16),
    "qwen2_5_vl_3b_qlora_24gb": Machine(1, 24),
    "qwen2_5_vl_3b_lora": Machine(1, 24),
    "counting_3b_lora_accuracy": Machine(1, 24),
    "counting_3b_lora_points": Machine(1, 24),
    "qwen2_5_vl_7b_qlora_24gb": Machine(1, 24),
    "qwen2_5_vl_7b_lora": Machine(1, 48),
    "qwen3_vl_4b_lora": Machine(1, 48),
    "qwen2_5_vl_3b_full": Machine(8, 80, "zero3"),
    "qwen2_5_vl_7b_full": Machine(8, 80, "zero3"),
}


def estimate(name: str, machine: Machine):
    """The [`~mgpo_trl.memory.MemoryEstimate`] of one recipe, and its parsed options."""
    script_args, args, model_args = scripts.parse_training(["--config", str(ROOT / "configs" / f"{name}.yaml")])
    zero = {} if machine.launch is None else _zero(machine.launch)
    offload = (zero.get("offload_optimizer") or {}).get("device", "none") != "none"
    options = MemoryOptions.from_args(
        args, model_args, script_args.lora_on, zero_stage=zero.get("stage", 0), processes=machine.gpus, offload=offload
    )
    config = layout_config(model_args.model_name_or_path)
    return estimate_memory(config, options, machine.gib * GIB), (args, model_args)


def _zero(launch: str) -> dict:
    return json.loads((ROOT / "ds_configs" / f"{launch}.json").read_text())["zero_optimization"]


def row(name: str, machine: Machine) -> str:
    """One line of the table."""
    found, (args, model_args) = estimate(name, machine)
    rollouts = args.per_device_train_batch_size * args.steps_per_generation
    kind = f"LoRA r={model_args.lora_r}" if model_args.use_peft else "all weights"
    kind = f"{kind} on 4 bits" if model_args.load_in_4bit else kind
    cells = [
        f"`{name}.yaml`", kind, str(machine), f"{args.per_device_train_batch_size} / {rollouts}",
        f"{found.training / GIB:.1f}", f"{found.generation / GIB:.1f}",
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    for name, machine in MACHINES.items():
        print(row(name, machine), flush=True)
