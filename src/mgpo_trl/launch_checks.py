"""
What a launch can not do, refused before a model loads: every message names the alternative. Imports no torch.

Launchers pass their wishes on as environment variables; where one of them can not be met, the libraries below us often
go on with something else (one process instead of two, plain data parallelism instead of sharding). Here each such case
is an error.
"""

import importlib.util
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

TRAINER_STATE = "trainer_state.json"
"""The last file of a checkpoint."""
OPTIMIZER_SHARDS = "global_step*/*optim_states.pt"
"""Files of a DeepSpeed checkpoint, one for each process that saved it."""
FSDP_FILES = ("pytorch_model_fsdp.bin", "pytorch_model_fsdp_0")
"""One of them lies in an FSDP checkpoint: the whole model, or a directory of shards."""


def check_launch(args, *, environment: Mapping[str, str] | None = None) -> None:
    """
    Refuse what can not work with these options on this launch.

    Args:
        args ([`~mgpo_trl.MGPOConfig`]): The options; their `world_size` is the number of processes.
        environment (`Mapping[str, str]`, *optional*): What the launcher set; the process's own by default.

    Raises:
        ValueError: Fact, value received, and what to do instead.
    """
    environment = os.environ if environment is None else environment
    for check in (_process_problems, _sharding_problems, _engine_problems):
        for problem in check(args, environment):
            raise ValueError(problem)


def _process_problems(args, environment: Mapping[str, str]) -> Iterator[str]:
    """Fewer processes than asked for."""
    by_accelerate = "ACCELERATE_MIXED_PRECISION" in environment
    if by_accelerate and args.world_size == 1 and "MASTER_ADDR" in environment and "WORLD_SIZE" not in environment:
        yield (
            "Several processes were asked for and one was started: `accelerate launch` starts only one with `--cpu`, "
            "and without a GPU. On CPUs use `accelerate launch --config_file ds_configs/multi_gpu.yaml "
            "--num_processes N --mixed_precision no train.py ...`. If one process is what you want, unset MASTER_ADDR."
        )


def _sharding_problems(args, environment: Mapping[str, str]) -> Iterator[str]:
    """Sharding that would silently not happen, or would lose the trained weights."""
    if _is_true(environment, "ACCELERATE_USE_DEEPSPEED") and _is_true(environment, "ACCELERATE_USE_CPU"):
        yield (
            "DeepSpeed was asked for, and ACCELERATE_USE_CPU=true turns it off: plain data parallelism would run. "
            "Take `use_cpu: true` out of the accelerate file (or unset the variable) and give `--use_cpu true` to "
            "train.py."
        )
    if args.deepspeed is not None and _is_on_cpu(args):
        yield (
            f"`deepspeed` ({args.deepspeed}) is not set up on CPUs. Leave the option out and name the file to the "
            "launcher: `accelerate launch --config_file ds_configs/zero3.yaml train.py ...`."
        )
    if _is_true(environment, "ACCELERATE_USE_FSDP"):
        yield from _fsdp_problems(args, environment)
    plugin = args.deepspeed_plugin
    zero = {} if plugin is None else plugin.deepspeed_config.get("zero_optimization", {})
    if zero.get("stage") == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save"):
        yield (
            "ZeRO-3 without `stage3_gather_16bit_weights_on_model_save` saves shards that no model loads. Set it to "
            "true in the DeepSpeed file, as ds_configs/zero3.json does (`zero3_save_16bit_model: true` where "
            "accelerate's file holds the settings)."
        )


def _fsdp_problems(args, environment: Mapping[str, str]) -> Iterator[str]:
    if _is_on_cpu(args):
        yield (
            "FSDP was asked for, and accelerate shards with it on GPUs only: plain data parallelism would run. On "
            "CPUs use ds_configs/zero3.yaml to shard, or ds_configs/multi_gpu.yaml."
        )
    state = environment.get("FSDP_STATE_DICT_TYPE")
    if state is not None and state != "FULL_STATE_DICT":
        yield (
            f"`fsdp_state_dict_type: {state}` leaves no model behind at the end of the training. Use "
            "`FULL_STATE_DICT`, as ds_configs/fsdp2.yaml does."
        )


def _engine_problems(args, environment: Mapping[str, str]) -> Iterator[str]:
    """Generation engines that can not play the rounds."""
    if args.use_transformers_continuous_batching:
        yield (
            "`use_transformers_continuous_batching` can not generate with images. Leave it out, or generate with "
            "`--use_vllm true`."
        )
    if args.use_vllm and importlib.util.find_spec("vllm") is None:
        yield (
            "`use_vllm` is set and vLLM is not installed. Install it (`pip install vllm`), or leave `use_vllm` out to "
            "generate with transformers."
        )
    size = args.vllm_tensor_parallel_size
    if args.use_vllm and args.vllm_mode == "colocate" and args.world_size % size:
        yield (
            f"`vllm_tensor_parallel_size` ({size}) does not divide the {args.world_size} processes, which share the "
            "colocated engines. Choose a divisor, or use `--vllm_mode server`."
        )


def batch_hint(args, error: ValueError) -> str:
    """
    What TRL's error on a batch that holds no whole groups leaves out: the processes, and where the size comes from.

    Args:
        args ([`~mgpo_trl.MGPOConfig`]): The options, as far as they are filled.
        error (`ValueError`): What TRL raised.

    Returns:
        `str`: To be added to its message; empty where it is about something else.
    """
    if "divisible by" not in str(error):
        return ""
    return (
        f" This run has {args.world_size} process(es), `per_device_train_batch_size` "
        f"{args.per_device_train_batch_size} and `gradient_accumulation_steps` {args.gradient_accumulation_steps}; "
        "their product is the generation batch unless `steps_per_generation` or `generation_batch_size` is set. "
        "Choose them so that it holds whole groups of `num_generations`."
    )


def check_resume(directory: str | os.PathLike, args, *, environment: Mapping[str, str] | None = None) -> None:
    """
    Refuse a checkpoint whose optimizer state this launch can not read: it would be left out, or end in a late error.

    Args:
        directory (`str`): The checkpoint.
        args ([`~mgpo_trl.MGPOConfig`]): The options of this run.
        environment (`Mapping[str, str]`, *optional*): What the launcher set; the process's own by default.

    Raises:
        ValueError: It was saved by another engine, or by another number of processes with DeepSpeed.
    """
    anew = "or give the checkpoint as `--model_name_or_path` to start anew from its weights."
    environment = os.environ if environment is None else environment
    fsdp = _is_true(environment, "ACCELERATE_USE_FSDP")
    here = "DeepSpeed" if args.deepspeed_plugin is not None else "FSDP" if fsdp else "plain"
    saved = checkpoint_engine(directory)
    if saved not in (None, here):
        raise ValueError(
            f"The checkpoint '{directory}' was saved by a {saved} run and this is a {here} run: its optimizer state "
            f"does not fit. Launch with the file that the checkpoint was made with, {anew}"
        )
    processes = len({path.name for path in Path(directory).glob(OPTIMIZER_SHARDS)})
    if saved == "DeepSpeed" and processes != args.world_size:
        raise ValueError(
            f"The checkpoint '{directory}' was saved by {processes} processes and this run has {args.world_size}: "
            "DeepSpeed does not redistribute its optimizer state. Launch with `--num_processes "
            f"{processes}`, {anew}"
        )


def checkpoint_engine(directory: str | os.PathLike) -> str | None:
    """`"DeepSpeed"`, `"FSDP"`, `"plain"`, or `None` where a checkpoint holds no optimizer state."""
    path = Path(directory)
    if any(path.glob(OPTIMIZER_SHARDS)):
        return "DeepSpeed"
    if any((path / name).exists() for name in FSDP_FILES):
        return "FSDP"
    return "plain" if (path / "optimizer.pt").exists() else None


def _is_true(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "false").lower() in ("true", "1", "yes")


def _is_on_cpu(args) -> bool:
    return args.distributed_state.distributed_type.value in ("NO", "MULTI_CPU")
