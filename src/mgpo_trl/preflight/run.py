"""The preflight itself: what is cheap first, then the model, two steps, and the picture."""

import copy
import math
from pathlib import Path

import torch
from transformers import PrinterCallback

from ..builtin.loading import builtin_level
from ..builtin.tiny import register_processor, save_tiny
from ..conversation import Conversation
from ..data import LoadedRows
from ..generation import ModelGenerator
from ..launch_checks import check_whole_models
from ..memory import GIB, MemoryEstimate, device_bytes, estimate_run
from ..prompts import load_prompts
from ..rollout import run_rounds, start_rollouts
from ..scripts import build_trainer, configuration_of, is_builtin_run, open_training_rows, starting_point
from ..viewer import Scene, draw_comparison
from .report import BAD, GOOD, UNSURE, PreflightReport
from .trainer import Measured, PreflightTrainer
from .worst_case import WorstCase, find_worst_case

PICTURED_ROWS = 8
PICTURED_TOKENS = 512
"""Most tokens of a turn in the picture: a model that rambles must not take minutes over it."""
PICTURE_FILE = "boxes.png"
MOST_DEVIATION = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
"""Mean |difference| of log-probabilities above which something is wrong rather than rounded. Allowances."""


def run_preflight(script_args, args, model_args) -> PreflightReport:
    """
    Look at the dataset, estimate memory, play two optimizer steps on the largest sample and draw the boxes of eight
    samples. Leaves `preflight.json` and `boxes.png` in `<output_dir>/preflight` and prints the report.

    Args:
        script_args ([`~mgpo_trl.scripts.MGPOScriptArguments`]), args ([`~mgpo_trl.MGPOConfig`]),
        model_args ([`~trl.ModelConfig`]): The options of the run that it is about. The model is not changed.

    Raises:
        ValueError: What would stop the run itself at its start, such as a bad row or an option that can not work.
    """
    directory = Path(args.output_dir, "preflight")
    report = PreflightReport()
    register_processor()  # a model that the built-in run saved may be looked at
    _settle_model(script_args, args, model_args, directory, report)
    train = open_training_rows(script_args, args)
    config, lora = configuration_of(*starting_point(script_args, model_args), args, model_args)
    worst = _look_at_rows(train, config, args, model_args, report)
    known = {"max_pixels": math.prod(worst.longest.view), "text_tokens": _text_tokens(worst, config, args)}

    def estimated(args, gpu_bytes) -> MemoryEstimate:
        return estimate_run(config, args, model_args, script_args.lora_on, gpu_bytes, lora, **known)

    size = _gpu_bytes(script_args)
    _judge_estimate(estimated, args, size, report)
    small = small_arguments(args, directory)
    trainer = _play(script_args, small, model_args, train, worst, report)
    if trainer is not None:
        _judge_memory(trainer.measured, estimated, args, small, size, report)
        _judge_time(trainer.measured, args, small, len(train.dataset), report)
        _judge_logps(trainer, report)
        _draw_boxes(trainer, train, directory, report)
    if args.should_save:
        directory.mkdir(parents=True, exist_ok=True)
        report.save(directory)
    return report


def small_arguments(args, directory: Path):
    """The arguments of two steps on whole groups, as few as a step can hold; nothing is saved or sent anywhere."""
    small = copy.copy(args)
    rollouts = args.per_device_train_batch_size * args.world_size
    small.gradient_accumulation_steps = args.num_generations // math.gcd(args.num_generations, rollouts)
    small.steps_per_generation = small.gradient_accumulation_steps
    small.generation_batch_size = rollouts * small.steps_per_generation
    small.num_iterations, small.max_steps = 1, 2
    small.learning_rate, small.lr_scheduler_type, small.warmup_steps = 0.0, type(args.lr_scheduler_type)("constant"), 0
    small.save_strategy = type(args.save_strategy)("no")
    small.eval_strategy = type(args.eval_strategy)("no")
    small.load_best_model_at_end = False
    small.output_dir, small.report_to, small.push_to_hub = str(directory), [], False
    small.resume_from_checkpoint, small.log_completions, small.log_rollouts_steps = None, False, None
    small.disable_tqdm, small.logging_strategy = True, type(args.logging_strategy)("no")
    return small


def _settle_model(script_args, args, model_args, directory: Path, report: PreflightReport) -> None:
    """The built-in task is looked at with a model of its size: the warm start would take longer than the look."""
    if not is_builtin_run(script_args, model_args):
        return
    check_whole_models(args, "The built-in model")
    with args.main_process_first(local=False, desc="built-in model"):
        if args.process_index == 0:  # the others read it at once
            save_tiny(directory / "model", builtin_level(script_args.dataset_name))
    model_args.model_name_or_path = str(directory / "model")
    report.add("model", UNSURE, "The built-in model before its warm start: its boxes and answers mean nothing yet.")


def _look_at_rows(train: LoadedRows, config, args, model_args, report: PreflightReport) -> WorstCase:
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(config._name_or_path, revision=model_args.model_revision)
    conversation = Conversation.from_config(args, load_prompts(args.prompts_file))
    template = conversation.template(processor, config.model_type)
    worst = find_worst_case(train.dataset, template, args.token_budgets, quiet=args.process_index > 0)
    text = f"{worst.rows} rows; longest rollout {worst.longest}"
    if worst.largest != worst.longest:
        text += f"\nlargest file {worst.largest}"
    if train.bad_rows:
        text += f"\n{len(train.bad_rows)} bad rows are left out"
    report.add("dataset", GOOD, text, rows=worst.rows, longest_tokens=worst.longest.tokens)
    return worst


def _text_tokens(worst: WorstCase, config, args) -> int:
    vision, row = config.vision_config, worst.longest
    image = math.prod(row.view) // (vision.patch_size * vision.spatial_merge_size) ** 2
    return row.prompt_tokens + row.reply_tokens - args.num_rounds * image


def _gpu_bytes(script_args) -> int | None:
    if script_args.preflight_gpu_gib is not None:
        return int(script_args.preflight_gpu_gib * GIB)
    return device_bytes()


def _judge_estimate(estimated, args, size: int | None, report: PreflightReport) -> None:
    if size is None and args.use_vllm and args.vllm_mode == "colocate":
        report.add("estimate", UNSURE, "vLLM takes a share of the GPU: give its size with `--preflight_gpu_gib`.")
        return
    found = estimated(args, size)
    if size is None:
        verdict, head = UNSURE, ["There is no GPU here to compare with; `--preflight_gpu_gib 24` names one."]
    else:
        verdict, head = GOOD if found.fits(size) else BAD, found.advice(size)
    text = "\n".join([*head, *found.table().splitlines()])
    report.add("estimate", verdict, text, peak_bytes=found.peak, parts=found.parts, gpu_bytes=size)


def _play(script_args, small, model_args, train: LoadedRows, worst: WorstCase, report) -> PreflightTrainer | None:
    """Two steps; `None` where memory did not suffice, which is a finding."""
    questions = 2 * small.generation_batch_size // small.num_generations
    rows = LoadedRows(train.dataset.select([worst.longest.index] * questions), [], train.source)
    trainer = None
    try:
        trainer = build_trainer(script_args, small, model_args, rows, None, PreflightTrainer)
        trainer.remove_callback(PrinterCallback)  # the figures of two steps on one sample tell nothing
        trainer.train()
    except torch.OutOfMemoryError as error:
        report.add("steps", BAD, str(error))
        return None
    found = trainer.measured
    report.add(
        "steps",
        GOOD,
        f"{found.rollouts} rollouts on this process, {found.sampled_tokens} sampled tokens, {found.image_tokens} "
        "image tokens, each with its feature; then one step with every turn as long as its budget",
        rollouts=found.rollouts,
        sampled_tokens=found.sampled_tokens,
        image_tokens=found.image_tokens,
    )
    return trainer


def _judge_memory(found: Measured, estimated, args, small, size: int | None, report: PreflightReport) -> None:
    if found.peak_bytes is None:
        report.add("memory", UNSURE, f"No accelerator here. This process took {_main_memory() / GIB:.1f} GiB in all.")
        return
    more = max(estimated(args, size).peak - estimated(small, size).peak, 0)
    expected = found.peak_bytes + more
    room = size or device_bytes()
    text = f"measured {found.peak_bytes / GIB:.1f} GiB, expected {expected / GIB:.1f} of {room / GIB:.1f} GiB"
    if more:
        text += " with the whole generation batch"
    report.add("memory", GOOD if expected <= room else BAD, text, measured=found.peak_bytes, expected=expected)


def _main_memory() -> int:
    """Most main memory of this process so far, in bytes."""
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _judge_time(found: Measured, args, small, rows: int, report: PreflightReport) -> None:
    """Time of an optimizer step of the real run; a larger generation batch costs at most its share more."""
    rollouts = args.per_device_train_batch_size * args.steps_per_generation
    generation = found.seconds["generation"] * rollouts / found.rollouts
    reuse = args.steps_per_generation * args.num_iterations / args.gradient_accumulation_steps
    loss = found.seconds["loss"] * args.gradient_accumulation_steps / small.gradient_accumulation_steps
    step = generation / reuse + loss
    steps = _optimizer_steps(args, rows)
    text = (
        f"about {step:.1f} s a step at most ({generation / reuse:.1f} generation, {loss:.1f} loss), "
        f"{step * steps / 3600:.1f} h for {steps} steps"
    )
    figures = {f"{name.replace(' ', '_')}_seconds": value for name, value in found.seconds.items()}
    report.add("time", UNSURE, text, step_seconds=step, steps=steps, **figures)


def _optimizer_steps(args, rows: int) -> int:
    if args.max_steps > 0:
        return args.max_steps
    rollouts = args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps
    return math.ceil(args.num_train_epochs * rows * args.num_generations / rollouts) * args.num_iterations


def _judge_logps(trainer: PreflightTrainer, report: PreflightReport) -> None:
    found = trainer.measured
    if not found.deviations:
        reason = "The first step sampled no token. Check the prompts and the end-of-turn token."
        if found.sampled_tokens:
            reason = (
                "every answer of the first step was cut, and `mask_truncated_completions` leaves nothing of it in the "
                f"loss. Raise `round_token_budgets` ({trainer.args.token_budgets})."
            )
        report.add("log-probs", BAD, reason)
        return
    mean = sum(found.deviations) / len(found.deviations)
    dtype = _precision(trainer)
    limit = MOST_DEVIATION[dtype]
    text = (
        f"the loss pass differs from {found.deviates_from} by {mean:.1e} on average, {max(found.deviations):.1e} at "
        f"most, over {len(found.deviations)} tokens ({str(dtype).removeprefix('torch.')}, limit of the mean {limit:g})"
    )
    report.add("log-probs", GOOD if mean <= limit else BAD, text, mean=mean, most=max(found.deviations))


def _precision(trainer: PreflightTrainer) -> torch.dtype:
    """The coarsest precision of the loss pass: an adapter on 4-bit weights is bf16, whatever lies below it."""
    if trainer.args.bf16 or trainer.args.fp16:
        return torch.bfloat16 if trainer.args.bf16 else torch.float16
    trained = (parameter.dtype for parameter in trainer.model.parameters() if parameter.requires_grad)
    return max({trainer.model.dtype, *trained}, key=MOST_DEVIATION.get)


def _draw_boxes(trainer: PreflightTrainer, train: LoadedRows, directory: Path, report: PreflightReport) -> None:
    """Eight samples with the boxes that the model names now, greedily."""
    if trainer.is_sharded:
        report.add("boxes", UNSURE, "not drawn: no process holds the whole model. Run the preflight without sharding.")
        return
    if not trainer.accelerator.is_main_process:
        return
    count = min(PICTURED_ROWS, len(train.dataset))
    rows = [train.dataset[number * len(train.dataset) // count] for number in range(count)]
    template, model = trainer.template, trainer.accelerator.unwrap_model(trainer.model)
    rollouts = start_rollouts(rows, template, trainer.args.num_rounds)
    budgets = [min(budget, PICTURED_TOKENS) for budget in trainer.args.token_budgets]
    model.eval()
    with trainer.accelerator.autocast():
        run_rounds(rollouts, ModelGenerator(model, template.chat, budgets), template, trainer.args.num_rounds)
    scenes = [Scene(rollout.image, [rollout.to_record()]) for rollout in rollouts]
    directory.mkdir(parents=True, exist_ok=True)
    draw_comparison(scenes, ["now"], "Boxes before training").save(directory / PICTURE_FILE)
    usable = sum(box.ok for rollout in rollouts for box in rollout.boxes)
    asked = sum(len(rollout.boxes) for rollout in rollouts)
    text = f"{usable} of {asked} usable, greedy, turns of at most {PICTURED_TOKENS} tokens: {directory / PICTURE_FILE}"
    if asked and not usable:
        text += "\nnone can be used: look at the picture, the prompts and `coordinates` before you train"
    report.add("boxes", UNSURE if asked and not usable else GOOD, text, usable=usable, asked=asked)
