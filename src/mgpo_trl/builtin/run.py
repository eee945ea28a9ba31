"""The main job on the built-in task: warm start, held-out figures, training, held-out figures again, picture."""

import logging
import shutil
import time
from pathlib import Path

from transformers import ProgressCallback

from ..conversation import Conversation
from ..evaluation.protocols import resolve_protocols
from ..evaluation.questions import Questions
from ..evaluation.report import rescore
from ..evaluation.runner import Player, play_batches
from ..gallery import PictureWriter
from ..generation import ModelGenerator
from ..hub import prepare_push
from ..image_loading import ImageLoader
from ..images import open_image
from ..launch_checks import check_whole_models
from ..prompts import load_prompts
from ..records import RolloutWriter, read_rollouts, run_record, write_json, write_run
from ..viewer import Scene, draw_comparison
from .loading import builtin_level, load_builtin
from .progress import ShortProgress
from .recipe import RECIPES
from .warm_start import warm_start

EVAL_BATCH = 128
"""Held-out rollouts generated at once."""
PICTURED_SCENES = 6

logger = logging.getLogger(__name__)


def run_builtin(script_args, args, model_args) -> dict | None:
    """
    Train the built-in model on its task and leave `result.json` and `before_after.png` in the output directory.

    Args:
        script_args ([`~mgpo_trl.scripts.MGPOScriptArguments`]): Names the level, `builtin:needle` or `builtin:refer`.
        args ([`~mgpo_trl.MGPOConfig`]): The recipe of the level, with what the user changed.
        model_args ([`~trl.ModelConfig`]): Its model name is set to the warm-started model.

    Returns:
        `dict`: What `result.json` holds; `None` on processes other than the first.
    """
    from ..scripts import build_trainer, resume_point, save_and_publish

    check_whole_models(args, "The built-in run")  # its held-out scenes are played by the first process
    prepare_push(args)
    started = time.perf_counter()
    level = builtin_level(script_args.dataset_name)
    recipe = RECIPES[level]
    logger.info("Training a small model on the built-in task '%s': %s", level, recipe.summary)
    with args.main_process_first(local=False, desc="warm start"):
        warm = warm_start(level, args.seed, template=load_prompts(args.prompts_file))
    model_args.model_name_or_path = str(warm.model_dir)
    train = load_builtin(script_args.dataset_name, "train", args.seed, script_args.limit)
    heldout = load_builtin(script_args.dataset_name, "heldout", args.seed)
    if 0 < args.max_steps <= args.warmup_steps:  # the schedule divides by the steps after the warm-up
        args.warmup_steps = 0
    evaluation = None if args.eval_strategy == "no" else heldout
    trainer = build_trainer(script_args, args, model_args, train, evaluation)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(ShortProgress)

    base = _heldout_report(trainer, heldout.dataset, "base", recipe.eval_temperature)
    train_started = time.perf_counter()
    trainer.train(resume_from_checkpoint=resume_point(args))
    train_seconds = time.perf_counter() - train_started
    trained = _heldout_report(trainer, heldout.dataset, "trained", recipe.eval_temperature)
    result = None
    if trainer.accelerator.is_main_process:
        result = {
            "level": level,
            "num_rounds": args.num_rounds,
            "decoding": "sampled" if recipe.eval_temperature else "greedy",
            "base": _figures(base),
            "trained": _figures(trained),
            "n": trained["n"],
            "seed": args.seed,
            "seconds": {
                "warm_start": round(warm.seconds, 1),
                "warm_start_cached": warm.from_cache,
                "train": round(train_seconds, 1),
                "total": round(time.perf_counter() - started, 1),
            },
            "commit": trained["commit"],
        }
        write_json(Path(args.output_dir) / "result.json", result)
        _draw(Path(args.output_dir), heldout.dataset, level)
        logger.info("%s", _summary(result, args.output_dir))
    save_and_publish(trainer, script_args.dataset_name)
    return result


def _heldout_report(trainer, dataset, name: str, temperature: float) -> dict | None:
    """Play the held-out scenes with the trainer's model, on the first process, and report."""
    report = None
    if trainer.accelerator.is_main_process:
        directory = Path(trainer.args.output_dir) / f"heldout_{name}"
        shutil.rmtree(directory, ignore_errors=True)
        _write_record(directory, trainer, temperature, len(dataset))
        model = trainer.accelerator.unwrap_model(trainer.model)
        was_training = model.training
        model.eval()
        conversation: Conversation = trainer.conversation
        generate = ModelGenerator(model, trainer.chat, conversation.token_budgets, temperature)
        questions = Questions(dataset)
        (protocol,) = resolve_protocols(None, conversation.num_rounds)
        with RolloutWriter(directory) as writer, PictureWriter(directory, len(questions)) as pictures:
            player = Player(protocol, trainer.template, generate, writer, set(questions.ids), pictures)
            batches = questions.batches(EVAL_BATCH, player.wanted)
            play_batches(batches, [player], ImageLoader(trainer.chat), len(questions), trainer.args.seed)
        report = rescore(directory)
        model.train(was_training)
    trainer.accelerator.wait_for_everyone()
    return report


def _write_record(directory: Path, trainer, temperature: float, n: int) -> None:
    record = run_record(
        {"model": trainer.model.config._name_or_path, "training": trainer.args.to_dict()},
        **trainer.conversation.facts(),
        seed=trainer.args.seed,
        decoding={"mode": "sampled", "temperature": temperature} if temperature else {"mode": "greedy"},
        n_expected=n,
    )
    write_run(directory, record)


def _figures(report: dict) -> dict:
    return {
        "accuracy": report["accuracy"]["strict"],
        "accuracy_stderr": report["accuracy"]["stderr"]["strict"],
        "hit_rate": report["hit_rate"],
        "hit_rate_stderr": report["stderr"]["hit_rate"],
        "valid_ratio": report["valid_ratio"],
        "valid_ratio_stderr": report["stderr"]["valid_ratio"],
    }


def _summary(result: dict, output_dir: str) -> str:
    lines = [f"held-out, {result['decoding']}, n = {result['n']}    {'base':>15} {'trained':>15}"]
    for name, label in (("accuracy", "accuracy"), ("hit_rate", "hit rate"), ("valid_ratio", "valid boxes")):
        cells = [_cell(result[part][name], result[part][f"{name}_stderr"]) for part in ("base", "trained")]
        lines.append(f"{label:<28} {cells[0]:>15} {cells[1]:>15}")
    seconds = result["seconds"]
    lines.append(f"warm start {seconds['warm_start']:.0f} s, training {seconds['train']:.0f} s")
    lines.append(f"Picture: {Path(output_dir, 'before_after.png')}")
    return "\n".join(lines)


def _cell(value: float | None, stderr: float | None) -> str:
    return "-" if value is None else f"{value:.3f} +- {stderr:.3f}"


def _draw(directory: Path, dataset, level: str) -> None:
    """Six held-out scenes before and after training. The first ones, whatever they show."""
    names = ("base", "trained")
    records = [{r["id"]: r for r in read_rollouts(directory / f"heldout_{name}")} for name in names]
    rows = [dataset[index] for index in range(PICTURED_SCENES)]
    scenes = [Scene(open_image(row["image"], row["id"]), [by_id[row["id"]] for by_id in records]) for row in rows]
    title = f"Built-in task '{level}': what the model sees, the box it names (target dashed), the crop, the answer"
    draw_comparison(scenes, ("before training", "after training"), title).save(directory / "before_after.png")
