"""What `train.py` and `eval.py` share: options, datasets, rewards, and putting the trainer together."""

import importlib
import json
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from .adapters import (
    LORA_ON,
    adapter_base,
    check_adapter_options,
    is_adapter,
    load_trainable,
    lora_config,
    quantization_config,
)
from .builtin.loading import BUILTIN_PREFIX, builtin_level, load_builtin
from .data import DataError, LoadedRows, load_rows
from .data.benchmarks import find_benchmark
from .launch_checks import check_launch, check_quantized, check_resume, newest_checkpoint
from .processing import load_config
from .rewards import accuracy_reward, flexible_accuracy_reward, format_reward, point_reward

logger = logging.getLogger(__name__)

REWARDS = {
    reward.__name__: reward for reward in (accuracy_reward, flexible_accuracy_reward, format_reward, point_reward)
}


@dataclass
class MGPOScriptArguments:
    """What to train on and what to reward, beside [`~mgpo_trl.MGPOConfig`] and [`~trl.ModelConfig`]."""

    dataset_name: str = field(
        default="builtin:refer",
        metadata={
            "help": "`.jsonl`, `.json` or `.csv` file, image folder with metadata, saved dataset, Parquet, Hub id "
            "`owner/name[:config]`, a published set (`mgpo-train`, or `mgpo-train:PATH` for a local copy), or the "
            "built-in task: `builtin:needle`, `builtin:refer`."
        },
    )
    dataset_train_split: str | None = field(
        default=None, metadata={"help": "Training split, where there are several."}
    )
    eval_dataset_name: str | None = field(
        default=None, metadata={"help": "Dataset for evaluation during training; the training dataset when unset."}
    )
    dataset_test_split: str | None = field(
        default=None,
        metadata={"help": "Split for evaluation during training: `test`, or a published set's own, when unset."},
    )
    columns: str | None = field(
        default=None, metadata={"help": 'Column names as JSON, ours to yours: {"question": "text"}.'}
    )
    extra_columns: list[str] | None = field(
        default=None, metadata={"help": "Further columns of the dataset that reward functions get."}
    )
    skip_bad_rows: bool = field(
        default=False, metadata={"help": "Leave out bad rows, and list them, instead of stopping at the first."}
    )
    limit: int | None = field(default=None, metadata={"help": "Train on the first rows only."})
    reward_funcs: list[str] = field(
        default_factory=lambda: ["accuracy_reward"],
        metadata={"help": f"Reward functions: {', '.join(REWARDS)}, or a dotted import path."},
    )
    lora_on: list[str] | None = field(
        default=None,
        metadata={
            "help": "Layers that a new LoRA adapter goes on. Unset: `language`; the vision tower stays as it is.",
            "choices": list(LORA_ON),
        },
    )
    adapter: str | None = field(
        default=None,
        metadata={"help": "LoRA adapter that training goes on from, on `--model_name_or_path` or its own base model."},
    )
    preflight: bool = field(
        default=False,
        metadata={"help": "Instead of training: two steps on the largest sample, memory, and a picture of the boxes."},
    )
    preflight_gpu_gib: float | None = field(
        default=None, metadata={"help": "Memory of the GPU that `--preflight` plans for, where it is not here."}
    )


def open_rows(
    spec: str,
    *,
    split: str | None = None,
    columns: str | None = None,
    extra_columns: list[str] | None = None,
    skip_bad_rows: bool = False,
    limit: int | None = None,
    seed: int = 0,
) -> LoadedRows:
    """
    Load a dataset by its name on the command line: the built-in task, or anything that `load_rows` reads.

    Args:
        spec (`str`): See [`MGPOScriptArguments`].
        split (`str`, *optional*): Split, where there are several.
        columns (`str`, *optional*): Column names as JSON.
        extra_columns (`list[str]`, *optional*): Further columns to keep, for reward functions.
        skip_bad_rows (`bool`, *optional*, defaults to `False`):
            Leave out bad rows and list them. Every image is decoded once beforehand to find the bad ones.
        limit (`int`, *optional*): Keep the first rows only.
        seed (`int`, *optional*, defaults to `0`): Seed of the built-in scenes.
    """
    if spec.startswith(BUILTIN_PREFIX):
        return load_builtin(spec, split=split, seed=seed, limit=limit)
    return load_rows(
        spec,
        split=split,
        columns=parse_columns(columns),
        extra_columns=extra_columns or (),
        skip_bad_rows=skip_bad_rows,
        limit=limit,
        check_images="full" if skip_bad_rows else True,
    )


def parse_columns(columns: str | None) -> dict[str, str] | None:
    """
    Column names given as JSON.

    Raises:
        ValueError: Not a JSON object of names.
    """
    if columns is None:
        return None
    try:
        names = json.loads(columns)
    except ValueError:
        names = None
    if not isinstance(names, dict) or not all(isinstance(value, str) for value in names.values()):
        raise ValueError(f'`columns` must be a JSON object such as {{"question": "text"}}, got {columns!r}.')
    return names


def resolve_rewards(names: list[str]) -> list[Callable]:
    """
    Reward functions by name.

    Args:
        names (`list[str]`): Names in [`REWARDS`], or dotted import paths that may live in the current directory.

    Raises:
        ValueError: A name is neither.
    """
    return [REWARDS[name] if name in REWARDS else _imported(name) for name in names]


def _imported(path: str) -> Callable:
    module, _, name = path.rpartition(".")
    try:
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"Reward function {path!r} was not found ({error}). Use one of {sorted(REWARDS)} or a dotted import path."
        ) from error


def training_help() -> str:
    """Help of `train.py` on the options that this package adds, without importing torch."""
    from trl import TrlParser

    from .round_options import RoundOptions

    parser = TrlParser((MGPOScriptArguments, RoundOptions), prog="train.py")
    parser.epilog = (
        "Also: --config FILE.yaml, and every option of GRPOConfig, TrainingArguments and ModelConfig "
        "(--model_name_or_path, --learning_rate, --use_peft, --output_dir, ...). --help_all lists them."
    )
    return parser.format_help()


def parse_training(arguments: list[str]) -> tuple[MGPOScriptArguments, Any, Any]:
    """
    Parse the command line of `train.py`: command line over YAML (`--config`) over the recipe of a built-in level over
    defaults.

    Args:
        arguments (`list[str]`): Without the program's name.

    Returns:
        `tuple`: ([`MGPOScriptArguments`], [`MGPOConfig`], [`~trl.ModelConfig`]).
    """
    from trl import ModelConfig, TrlParser

    from .mgpo_config import MGPOConfig

    check_config_file(arguments)
    parser = TrlParser((MGPOScriptArguments, MGPOConfig, ModelConfig), prog="train.py")
    if "--help_all" in arguments:
        parser.print_help()
        raise SystemExit
    script_args, *_ = TrlParser((MGPOScriptArguments,)).parse_args_and_config(arguments, return_remaining_strings=True)
    if script_args.dataset_name.startswith(BUILTIN_PREFIX):
        from .builtin.recipe import RECIPES

        parser.set_defaults_with_config(**RECIPES[builtin_level(script_args.dataset_name)].rl_options())
    return parser.parse_args_and_config(arguments)


def check_config_file(arguments: list[str]) -> None:
    """
    Refuse a `--config` that is not a file, before TRL's parser opens it.

    Raises:
        ValueError: There is no such file.
    """
    for word, following in pairwise([*arguments, ""]):
        name, equals, value = word.partition("=")
        path = value if equals else following
        if name == "--config" and not os.path.isfile(path):
            raise ValueError(f"There is no file '{path}' for `--config`. Recipes are in `configs/`.")


def is_builtin_run(script_args: MGPOScriptArguments, model_args) -> bool:
    """Whether to train the built-in model on its task: no model was named."""
    named = model_args.model_name_or_path or script_args.adapter
    return script_args.dataset_name.startswith(BUILTIN_PREFIX) and named is None


def open_training_sets(script_args: MGPOScriptArguments, args) -> tuple[LoadedRows, LoadedRows | None]:
    """The training rows, and the evaluation rows where `eval_strategy` asks for them."""
    train = open_training_rows(script_args, args)
    if args.eval_strategy == "no":
        return train, None
    name = script_args.eval_dataset_name or script_args.dataset_name
    # A published set has a split of its own to evaluate on, whatever its name.
    split = script_args.dataset_test_split or (None if find_benchmark(name) else "test")
    try:
        return train, open_rows(name, split=split, **_row_options(script_args, args))
    except DataError as error:
        raise DataError(
            f"{error} These are the rows to evaluate on during training: name others with `--eval_dataset_name` and "
            "`--dataset_test_split`, or leave `--eval_strategy` out."
        ) from error


def open_training_rows(script_args: MGPOScriptArguments, args) -> LoadedRows:
    """The training rows."""
    name = script_args.dataset_name
    split = script_args.dataset_train_split or _training_split(name)
    return open_rows(name, split=split, limit=script_args.limit, **_row_options(script_args, args))


def _row_options(script_args: MGPOScriptArguments, args) -> dict[str, Any]:
    return {
        "columns": script_args.columns,
        "extra_columns": script_args.extra_columns,
        "skip_bad_rows": script_args.skip_bad_rows,
        "seed": args.seed,
    }


def _training_split(name: str) -> str | None:
    """The split to train on where none was named; `None` for the only one, or that of the card."""
    if found := find_benchmark(name):
        return found[0].train_split
    return "train" if name.startswith(BUILTIN_PREFIX) else None


def build_trainer(
    script_args: MGPOScriptArguments,
    args,
    model_args,
    train: LoadedRows,
    evaluation: LoadedRows | None,
    trainer_class: type | None = None,
):
    """
    Put [`~mgpo_trl.MGPOTrainer`] (or a subclass of it) together from parsed options, and write `run.json` before the
    work starts.

    Raises:
        ValueError: No model was named, or a reward function or the checkpoint to resume from was not found.
    """
    from .builtin.tiny import register_processor
    from .memory import warn_of_memory
    from .mgpo_trainer import MGPOTrainer

    check_launch(args)
    register_processor()  # a model that the built-in run saved may be trained on
    name, adapter = starting_point(script_args, model_args)
    resume_point(args)
    check_adapter_options(model_args, script_args.lora_on, adapter)
    reward_funcs = resolve_rewards(script_args.reward_funcs)
    args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(args.model_init_kwargs or {}),
    }
    if args.push_to_hub and (model_args.use_peft or adapter is not None):
        _warn_of_local_base(name or adapter_base(adapter)[0])
    write_training_record(script_args, args, model_args, train.bad_rows)
    config, old_lora = configuration_of(name, adapter, args, model_args)
    warn_of_memory(config, old_lora, args=args, model_args=model_args, lora_on=script_args.lora_on)
    quantization = quantization_config(model_args)
    check_quantized(quantization, args)
    options = {"quantization_config": quantization, "peft_config": lora_config(model_args, script_args.lora_on)}
    if adapter is not None:
        options = {}
        name = load_trainable(adapter, args, name, quantization)
    return (trainer_class or MGPOTrainer)(
        name,
        reward_funcs,
        args,
        train_dataset=train.dataset,
        eval_dataset=None if evaluation is None else evaluation.dataset,
        **options,
    )


def configuration_of(name: str | None, adapter: str | None, args, model_args) -> tuple[Any, Any]:
    """Configuration of the model that is trained, and that of the adapter which training goes on from, or `None`."""
    from peft import PeftConfig

    revision = model_args.model_revision
    if name is None:
        name, revision = adapter_base(adapter)
    config = load_config(name, revision=revision, trust_remote_code=args.trust_remote_code)
    if adapter is None:
        return config, None
    lora = PeftConfig.from_pretrained(adapter)
    lora.inference_mode = False  # which every saved adapter says
    return config, lora


def _warn_of_local_base(base_model: str) -> None:
    if os.path.isdir(base_model):
        logger.warning(
            f"The adapter will name '{base_model}' as its base model, which nobody else has. Give the model's Hub id "
            "as `--model_name_or_path`, or push the merged model."
        )


def save_and_publish(trainer, dataset_name: str) -> None:
    """
    Save the trained model with its card, and push both where `push_to_hub` asks for it.

    Args:
        trainer ([`~mgpo_trl.MGPOTrainer`]): A trainer at the end of its training.
        dataset_name (`str`): What it was trained on.

    Raises:
        PushError: The push did not finish. The model is saved, and the message names the command that pushes it.
    """
    args = trainer.args
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=dataset_name)  # saves first
        trainer.accelerator.print(f"Model saved to {args.output_dir} and pushed to {trainer.hub_model_id}.")
        return
    trainer.save_model(args.output_dir)
    trainer.create_model_card(dataset_name=dataset_name)
    trainer.accelerator.print(f"Model saved to {args.output_dir}.")


def starting_point(script_args: MGPOScriptArguments, model_args) -> tuple[str | None, str | None]:
    """
    Base model and adapter that training starts from: (model, `None`), (model, adapter), or (`None`, adapter) where the
    adapter says what it belongs to.

    Raises:
        ValueError: Neither was named, or two adapters.
    """
    name, adapter = model_args.model_name_or_path, script_args.adapter
    if name is None and adapter is None:
        raise ValueError("No model was named. Give `--model_name_or_path`, for example Qwen/Qwen2.5-VL-3B-Instruct.")
    if name is None or not is_adapter(name):
        return name, adapter
    if adapter is not None:
        raise ValueError(f"Both '{name}' and '{adapter}' are adapters. Name the base model in `--model_name_or_path`.")
    return None, name


def write_training_record(script_args: MGPOScriptArguments, args, model_args, bad_rows: list[dict]) -> None:
    """`run.json` of a training run: the resolved options, commit, versions, prompts, and the rows left out."""
    from dataclasses import asdict

    from .conversation import Conversation
    from .prompts import load_prompts
    from .records import run_record, write_run

    if not args.should_save:
        return
    record = run_record(
        {"script": asdict(script_args), "training": args.to_dict(), "model": asdict(model_args)},
        **Conversation.from_config(args, load_prompts(args.prompts_file)).facts(),
        seed=args.seed,
        processes=args.world_size,
        bad_rows=bad_rows,
    )
    write_run(args.output_dir, record, overwrite=True)


def resume_point(args) -> str | None:
    """
    The checkpoint that `--resume_from_checkpoint` names: a directory, or `true` / `latest` for the newest one in the
    output directory that is whole.

    Raises:
        ValueError: There is no such checkpoint, or this launch can not read it.
    """
    directory = _named_checkpoint(args)
    if directory is not None:
        check_resume(directory, args)
    return directory


def _named_checkpoint(args) -> str | None:
    wanted = args.resume_from_checkpoint
    if wanted is None or str(wanted).lower() in ("false", "none", "no"):
        return None
    if str(wanted).lower() not in ("true", "latest", "last", "yes"):
        if not os.path.isdir(wanted):
            raise ValueError(f"There is no checkpoint '{wanted}' to resume from. Give a directory, or `true`.")
        return wanted
    return newest_checkpoint(args.output_dir)
