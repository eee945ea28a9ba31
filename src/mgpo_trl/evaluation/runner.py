"""Evaluation of a model: rows -> the same round loop as training -> records -> report."""

from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import torch
from tqdm import tqdm

from ..conversation import Conversation
from ..data import LoadedRows
from ..generation import ModelGenerator, load_for_inference
from ..processing import parse_pixels
from ..prompts import PROTOCOL_VERSION, load_prompts
from ..records import RolloutWriter, run_record, seen_ids, write_run
from ..rollout import Generate, RoundTemplate, run_rounds, start_rollouts
from .arguments import EvalArguments
from .report import rescore


def run_evaluation(args: EvalArguments, rows: LoadedRows) -> dict[str, Any]:
    """
    Evaluate a model and write `run.json`, `rollouts.jsonl`, `report.json` and `report.md`.

    A directory that holds a part of the same evaluation is continued: rollouts that are there are kept and not played
    again.

    Args:
        args ([`EvalArguments`]): What to evaluate.
        rows ([`~mgpo_trl.data.LoadedRows`]): Checked rows of the dataset.

    Returns:
        `dict`: The report.

    Raises:
        ValueError: A bad option, a bad row, or a directory that holds another evaluation.
    """
    conversation = resolve_conversation(args)
    _write_record(args, conversation, rows)
    base_model = args.model if args.adapter else None
    model, processor = load_for_inference(args.adapter or args.model, base_model, args.dtype, args.device)
    template = conversation.template(processor, model.config.model_type, _end_ids(model))
    generate = ModelGenerator(model, template.chat, conversation.token_budgets, args.temperature, args.top_p)
    with RolloutWriter(f"{args.output_dir}/rollouts.jsonl") as writer:
        todo = _unseen_batches(rows.dataset, args.batch_size, writer.seen)
        play_batches(todo, template, generate, conversation.num_rounds, writer, len(rows.dataset), args.seed)
    return rescore(args.output_dir)


def play_batches(
    batches, template: RoundTemplate, generate: Generate, num_rounds: int, writer: RolloutWriter, total: int, seed: int
) -> None:
    """
    Play batches of rows and append each rollout's record as soon as its batch is done. Shows progress and an ETA.

    Args:
        batches (`Iterable[tuple[int, list[dict]]]`): Position in the dataset and rows of each batch.
        template ([`RoundTemplate`]): The fixed parts of the conversation.
        generate (`Callable`): The generator.
        num_rounds (`int`): Rounds of each rollout.
        writer ([`RolloutWriter`]): Where the records go; what it has seen counts as done.
        total (`int`): Number of rows, for the progress bar.
        seed (`int`): Sampling is seeded for each batch from it and the batch's position.
    """
    with tqdm(
        total=total, initial=len(writer.seen), desc="evaluating", unit="rollout", dynamic_ncols=True
    ) as progress:
        for start, rows in batches:
            torch.manual_seed(seed * 1_000_003 + start)
            for rollout in run_rounds(start_rollouts(rows, template, num_rounds), generate, template, num_rounds):
                writer.write(rollout.to_record())
            progress.update(len(rows))


def resolve_conversation(args: EvalArguments) -> Conversation:
    """The conversation saved with the model (or the default one), with the options that were given put over it."""
    conversation = load_conversation(args.adapter or args.model)
    if args.num_rounds is not None and args.num_rounds != conversation.num_rounds:
        conversation = conversation.with_rounds(args.num_rounds)
    changes: dict[str, Any] = {
        name: getattr(args, name) for name in ("coordinates", "min_box_side") if getattr(args, name) is not None
    }
    for name in ("max_pixels", "min_pixels"):
        if getattr(args, name) is not None:
            changes[name] = parse_pixels(getattr(args, name))
    if args.prompts_file is not None:
        changes["prompts"] = load_prompts(args.prompts_file)
    if args.token_budgets is not None:
        changes["token_budgets"] = _checked_budgets(args.token_budgets, conversation.num_rounds)
    conversation = replace(conversation, **changes)
    if conversation.min_pixels > conversation.max_pixels:
        raise ValueError(
            f"`min_pixels` ({conversation.min_pixels}) is above `max_pixels` ({conversation.max_pixels}). Lower it or "
            "raise the cap."
        )
    return conversation


def load_conversation(path: str) -> Conversation:
    """The conversation saved in a model directory or Hub repository; the default one where there is none."""
    import os

    from transformers.utils import cached_file

    from ..conversation import CONVERSATION_FILE

    if not os.path.isdir(path):
        found = cached_file(path, CONVERSATION_FILE, _raise_exceptions_for_missing_entries=False)
        path = os.path.dirname(found) if found else path
    return Conversation.load(path) or Conversation()


def _checked_budgets(budgets: list[int], num_rounds: int) -> tuple[int, ...]:
    if len(budgets) != num_rounds or min(budgets) < 1:
        raise ValueError(f"`token_budgets` must be {num_rounds} numbers >= 1, one for each round, got {budgets}.")
    return tuple(budgets)


def _write_record(args: EvalArguments, conversation: Conversation, rows: LoadedRows) -> None:
    record = run_record(
        {**asdict(args), "conversation": asdict(conversation)},
        prompts_fingerprint=conversation.prompts.fingerprint,
        max_pixels=conversation.max_pixels,
        min_pixels=conversation.min_pixels,
        seed=args.seed,
        num_rounds=conversation.num_rounds,
        decoding=args.decoding,
        protocol_version=PROTOCOL_VERSION,
        n_expected=len(rows.dataset),
        bad_rows=rows.bad_rows,
    )
    # A start that failed before its first rollout does not bind the directory to its options.
    nothing_yet = not seen_ids(args.output_dir)
    write_run(args.output_dir, record, ignore=["config.device", "config.output_dir"], overwrite=nothing_yet)


def _unseen_batches(dataset, batch_size: int, seen) -> Iterator[tuple[int, list[dict]]]:
    """Batches at fixed positions, less the rows that are done: a continued evaluation seeds them alike."""
    for start in range(0, len(dataset), batch_size):
        stop = min(start + batch_size, len(dataset))
        ids = dataset[start:stop]["id"]
        todo = [start + offset for offset, row_id in enumerate(ids) if row_id not in seen]
        if todo:
            yield start, [dataset[index] for index in todo]


def _end_ids(model) -> list[int]:
    ends = model.generation_config.eos_token_id
    return [ends] if isinstance(ends, int) else list(ends or [])
