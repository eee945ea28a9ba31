"""
What a launch can not do, refused before a model loads: every message names the alternative. Imports no torch.

Launchers pass their wishes on as environment variables; where one of them can not be met, the libraries below us often
go on with something else (one process instead of two, plain data parallelism instead of sharding). Here each such case
is an error.
"""

import importlib.util
import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

logger = logging.getLogger(__name__)

TRAINER_STATE = "trainer_state.json"
"""The last file of a checkpoint."""
OPTIMIZER_SHARDS = "global_step*/*optim_states.pt"
"""Files of a DeepSpeed checkpoint, one for each process that saved it."""
FSDP_FILES = ("pytorch_model_fsdp.bin", "pytorch_model_fsdp_0")
"""One of them lies in an FSDP checkpoint: the whole model, or a directory of shards."""
QUANTISED_FOR_VLLM = (
    "`use_vllm` needs weights that are not quantised, got a model in 4 or 8 bits: vLLM is sent the adapter merged "
    "into them, and that merge is lossy. Leave `use_vllm` out, or `load_in_4bit`."
)
"""The message of a model that vLLM can not be sent."""


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
    for check in (_process_problems, _sharding_problems, _splitting_problems, _engine_problems):
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
            f"`deepspeed` ({args.deepspeed}) is set up on GPUs and by a launcher only. Leave the option out and name "
            "the file to the launcher: `accelerate launch --config_file ds_configs/zero3.yaml train.py ...`."
        )
    if _is_true(environment, "ACCELERATE_USE_FSDP"):
        yield from _fsdp_problems(args, environment)
    zero = _zero_options(args)
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


def _splitting_problems(args, environment: Mapping[str, str]) -> Iterator[str]:
    """One sequence or one layer over several processes: the trainer would count each part as a rollout of its own."""
    for size in ("TP_SIZE", "CP_SIZE", "SP_SIZE"):
        value = environment.get(f"PARALLELISM_CONFIG_{size}", "1")
        if value != "1":
            yield (
                f"`parallelism_config_{size.lower()}: {value}` splits rollouts over processes, which GRPO's trainer "
                "does not know. Leave it out: ds_configs/fsdp2.yaml and ds_configs/zero3.yaml shard the weights."
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
            "`use_vllm` is set and vLLM is not installed. Install the version that fits (`pip install -e '.[vllm]'`), "
            "or leave `use_vllm` out to generate with transformers."
        )
    size = args.vllm_tensor_parallel_size
    if args.use_vllm and args.vllm_mode == "colocate" and args.world_size % size:
        yield (
            f"`vllm_tensor_parallel_size` ({size}) does not divide the {args.world_size} processes, which share the "
            "colocated engines. Choose a divisor, or use `--vllm_mode server`."
        )


def check_quantized(quantization, args, *, environment: Mapping[str, str] | None = None) -> None:
    """
    Refuse quantised weights that vLLM can not sample from, or that FSDP would not shard.

    Args:
        quantization ([`~transformers.BitsAndBytesConfig`], *optional*): How the model is loaded.
        args ([`~mgpo_trl.MGPOConfig`]): The options.
        environment (`Mapping[str, str]`, *optional*): What the launcher set; the process's own by default.

    Raises:
        ValueError: They would stand whole on every process, can not be split, or can not be sent to vLLM.
    """
    environment = os.environ if environment is None else environment
    if quantization is not None and args.use_vllm:
        raise ValueError(QUANTISED_FOR_VLLM)
    if quantization is None or not _is_true(environment, "ACCELERATE_USE_FSDP"):
        return
    elsewhere = "use ds_configs/multi_gpu.yaml or ds_configs/zero2.yaml, where every process holds them"
    if getattr(quantization, "load_in_8bit", False):
        raise ValueError(f"FSDP can not shard weights in 8 bits. Load them in 4 bits, or {elsewhere}.")
    storage = getattr(quantization, "bnb_4bit_quant_storage", None)
    if getattr(quantization, "load_in_4bit", False) and not storage.is_floating_point:
        raise ValueError(
            f"FSDP leaves weights in 4 bits that are stored as {storage} whole on every process. Store them as the "
            f"rest of the model (`--bnb_4bit_quant_storage bfloat16`), or {elsewhere}."
        )


def warn_of_lost_updates(model, args) -> None:
    """
    Warn where whole weights are trained in 16 bits without the 32-bit copy that ZeRO and FSDP keep.

    Args:
        model ([`~transformers.PreTrainedModel`] or `PeftModel`): The model as it is trained.
        args ([`~mgpo_trl.MGPOConfig`]): The options.
    """
    keeps_copy = args.deepspeed_plugin is not None or _is_true(os.environ, "ACCELERATE_USE_FSDP")
    if keeps_copy or hasattr(model, "peft_config"):
        return
    dtypes = {str(parameter.dtype) for parameter in model.parameters() if parameter.requires_grad}
    if dtypes & {"torch.bfloat16", "torch.float16"}:
        logger.warning(
            "All weights are trained in %s, where an update much smaller than a weight is lost to rounding (learning "
            "rate %s). Give `--dtype float32`, launch with a file of ds_configs/ that keeps a 32-bit copy (zero1 to "
            "zero3, fsdp2), or train an adapter with `--use_peft`.",
            " and ".join(sorted(dtypes)),
            args.learning_rate,
        )


def check_whole_models(args, what: str, *, environment: Mapping[str, str] | None = None) -> None:
    """
    Refuse a sharded model where one process has to play alone.

    Args:
        args ([`~mgpo_trl.MGPOConfig`]): The options.
        what (`str`): What plays alone, to begin the message with.
        environment (`Mapping[str, str]`, *optional*): What the launcher set; the process's own by default.

    Raises:
        ValueError: The weights are sharded.
    """
    environment = os.environ if environment is None else environment
    if _is_true(environment, "ACCELERATE_USE_FSDP") or _zero_options(args).get("stage") == 3:
        raise ValueError(
            f"{what} needs the whole model on one process, and this launch shards it. Use ds_configs/multi_gpu.yaml "
            "or ds_configs/zero2.yaml."
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
    Refuse a checkpoint that this launch can not go on from: something would be left out, or end in a late error.

    Args:
        directory (`str`): The checkpoint.
        args ([`~mgpo_trl.MGPOConfig`]): The options of this run.
        environment (`Mapping[str, str]`, *optional*): What the launcher set; the process's own by default.

    Raises:
        ValueError: It is not whole; it has no optimizer state; it was saved by another engine, or by another number of
            processes with DeepSpeed; or the reference model had moved on.
    """
    environment = os.environ if environment is None else environment
    for problems in (_missing_parts(directory, args), _other_engine(directory, args, environment)):
        for problem in problems:
            raise ValueError(problem)


def newest_checkpoint(output_dir: str | os.PathLike) -> str:
    """
    The newest checkpoint that was saved to its end.

    Args:
        output_dir (`str`): Where `checkpoint-N` directories are.

    Raises:
        ValueError: There is none.
    """
    named = [(path.name.removeprefix("checkpoint-"), path) for path in Path(output_dir).glob("checkpoint-*")]
    whole = [(int(step), str(path)) for step, path in named if step.isdigit() and is_whole(path)]
    if not whole:
        raise ValueError(
            f"There is no checkpoint in '{output_dir}' to resume from. Leave `--resume_from_checkpoint` out to start "
            "anew."
        )
    return max(whole)[1]


def _missing_parts(directory: str | os.PathLike, args) -> Iterator[str]:
    """What a resumed run would have to do without."""
    if not is_whole(directory):
        yield (
            f"'{directory}' holds no `{TRAINER_STATE}` that can be read: it is no checkpoint, or the run died while "
            "saving it. Take the one before (`--resume_from_checkpoint true` finds the newest whole one), or give a "
            "model as `--model_name_or_path`."
        )
    if checkpoint_engine(directory) is None:
        yield (
            f"The checkpoint '{directory}' holds no optimizer state (`save_only_model`), so no run can go on from it. "
            "Give it as `--model_name_or_path` to start anew from its weights."
        )
    if args.sync_ref_model:
        yield (
            "`sync_ref_model` moves the reference model, and no checkpoint holds it: a resumed run would start from "
            "the first one again. Leave `sync_ref_model` out, or give the checkpoint as `--model_name_or_path` to "
            "start anew from its weights, which then are the reference."
        )


def _other_engine(directory: str | os.PathLike, args, environment: Mapping[str, str]) -> Iterator[str]:
    """An optimizer state that does not fit."""
    anew = "or give the checkpoint as `--model_name_or_path` to start anew from its weights."
    fsdp = _is_true(environment, "ACCELERATE_USE_FSDP")
    here = "DeepSpeed" if args.deepspeed_plugin is not None else "FSDP" if fsdp else "plain"
    saved = checkpoint_engine(directory)
    if saved != here:
        yield (
            f"The checkpoint '{directory}' was saved by a {saved} run and this is a {here} run: its optimizer state "
            f"does not fit. Launch with the file that the checkpoint was made with, {anew}"
        )
    processes = len({path.name for path in Path(directory).glob(OPTIMIZER_SHARDS)})
    if saved == "DeepSpeed" and processes != args.world_size:
        yield (
            f"The checkpoint '{directory}' was saved by {processes} processes and this run has {args.world_size}: "
            "DeepSpeed does not redistribute its optimizer state. Launch with `--num_processes "
            f"{processes}`, {anew}"
        )


def is_whole(directory: str | os.PathLike) -> bool:
    """Whether a checkpoint was saved to its end: the state comes last, after the files of every process."""
    try:
        json.loads(Path(directory, TRAINER_STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def checkpoint_engine(directory: str | os.PathLike) -> str | None:
    """`"DeepSpeed"`, `"FSDP"`, `"plain"`, or `None` where a checkpoint holds no optimizer state."""
    path = Path(directory)
    if any(path.glob(OPTIMIZER_SHARDS)):
        return "DeepSpeed"
    if any((path / name).exists() for name in FSDP_FILES):
        return "FSDP"
    return "plain" if (path / "optimizer.pt").exists() else None


def _zero_options(args) -> dict:
    plugin = args.deepspeed_plugin
    return {} if plugin is None else plugin.deepspeed_config.get("zero_optimization", {})


def _is_true(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "false").lower() in ("true", "1", "yes")


def _is_on_cpu(args) -> bool:
    return args.distributed_state.distributed_type.value in ("NO", "MULTI_CPU")
