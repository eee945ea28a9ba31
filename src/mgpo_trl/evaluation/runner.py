"""Evaluation of a model: rows -> the same round loop as training -> records -> report."""

from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..conversation import Conversation, load_conversation
from ..data import LoadedRows
from ..gallery import PictureWriter
from ..generation import ModelGenerator, end_ids, load_for_inference
from ..image_loading import ImageLoader
from ..processing import parse_pixels
from ..prompts import load_prompts
from ..records import RolloutWriter, run_record, seen_ids, write_run
from ..rollout import Crops, Generate, RoundTemplate, start_rollouts
from .arguments import EvalArguments
from .joint import joint_report, write_joint
from .protocols import Protocol, SharedFirstRound, resolve_protocols
from .questions import Questions
from .report import rescore


@dataclass
class Player:
    """One protocol in play: who plays it, and where its records go."""

    protocol: Protocol
    """How questions are played."""
    template: RoundTemplate
    """The fixed parts of the conversation, with the protocol's crop policy."""
    generate: Generate
    """The model's generator."""
    writer: RolloutWriter
    """Where the records go; what it has seen counts as done."""
    wanted: set[str]
    """Ids to be played."""
    pictures: PictureWriter | None = None
    """Where small pictures for the report go."""

    @property
    def todo(self) -> set[str]:
        """Ids that are not recorded yet."""
        return self.wanted - self.writer.seen


def run_evaluation(args: EvalArguments, rows: LoadedRows) -> dict[str, Any]:
    """
    Evaluate a model and write `run.json`, `rollouts.jsonl`, `report.json`, `report.md` and `report.html`; with several
    protocols, in one directory for each, and `protocols.json` and `protocols.md` over them.

    A directory that holds a part of the same evaluation is continued: rollouts that are there are kept and not played
    again.

    Args:
        args ([`EvalArguments`]): What to evaluate.
        rows ([`~mgpo_trl.data.LoadedRows`]): Checked rows of the dataset.

    Returns:
        `dict`: The report, or the joint report of several protocols.

    Raises:
        ValueError: A bad option, a bad row, or a directory that holds another evaluation.
    """
    conversation = resolve_conversation(args)
    protocols = resolve_protocols(args.protocol, conversation.num_rounds)
    questions = Questions(rows.dataset, args.num_samples, args.shuffle_choices)
    wanted = {protocol.name: _wanted(protocol, questions) for protocol in protocols}
    directories = _directories(args.output_dir, protocols)
    for protocol in protocols:
        _write_record(args, conversation, rows, protocol, directories[protocol.name], questions, wanted[protocol.name])
    base_model = args.model if args.adapter else None
    model, processor = load_for_inference(args.adapter or args.model, base_model, args.dtype, args.device)
    template = conversation.template(processor, model.config.model_type, end_ids(model))
    with ExitStack() as stack:
        players = [
            Player(
                protocol,
                protocol.template(template, args.seed),
                ModelGenerator(model, template.chat, _budgets(conversation, protocol), args.temperature, args.top_p),
                stack.enter_context(RolloutWriter(directories[protocol.name] / "rollouts.jsonl")),
                wanted[protocol.name],
                stack.enter_context(PictureWriter(directories[protocol.name], args.pictures)),
            )
            for protocol in protocols
        ]
        todo = set().union(*(player.todo for player in players))
        loader = ImageLoader(template.chat, args.view_decoding, args.image_threads)
        play_batches(questions.batches(args.batch_size, todo), players, loader, len(questions), args.seed)
    reports = {name: rescore(directory, args.official) for name, directory in directories.items()}
    if len(reports) == 1:
        return next(iter(reports.values()))
    joint = joint_report(args.output_dir, reports)
    write_joint(args.output_dir, joint)
    return joint


def play_batches(batches, players: Sequence[Player], loader: ImageLoader, total: int, seed: int) -> None:
    """
    Play batches of rows and append each rollout's record as soon as its batch is done. Shows progress and an ETA.

    Args:
        batches (`Iterable[tuple[int, list[dict]]]`): Position in the dataset and rows of each batch.
        players (`Sequence[Player]`): The protocols; those that share the first round sample it once.
        loader ([`~mgpo_trl.image_loading.ImageLoader`]): Opens the images, the next batch's while this one is played.
        total (`int`): Number of rows, for the progress bar.
        seed (`int`): Sampling is seeded for each batch and round from it and the batch's position.
    """
    done = total - len(set().union(*(player.todo for player in players)))
    bar = tqdm(total=total, initial=done, desc="evaluating", unit="rollout", dynamic_ncols=True)
    with bar as progress, closing(loader.batches(batches)) as opened_batches:
        for start, rows, opened in opened_batches:
            first = SharedFirstRound(lambda contexts: [])
            crops = Crops(loader.chat, loader.submit if loader.threads else None)
            for player in players:
                _play(player, rows, opened, crops, first, seed * 1_000_003 + start)
            progress.update(len(rows))


def _play(player: Player, rows: list[dict], opened: dict, crops: Crops, first: SharedFirstRound, seed: int) -> None:
    todo = player.todo
    rows = [row for row in rows if row["id"] in todo]
    if not rows:
        return
    rollouts = start_rollouts(rows, player.template, player.protocol.num_rounds, opened)
    generate = _seeded(player.generate, seed)
    if player.protocol.shares_first_round:
        first.generate = generate
        generate = first.for_rollouts(rollouts)
    for rollout in player.protocol.play(rollouts, generate, player.template, crops):
        if player.pictures is not None:
            player.pictures.add(rollout)
        player.writer.write({**rollout.to_record(), "protocol": player.protocol.name})


def _seeded(generate: Generate, seed: int) -> Generate:
    """The generator, seeded before every round: what one protocol samples does not move the draws of another."""

    def seeded(contexts):
        torch.manual_seed(seed + 499_979 * contexts[0].round)
        return generate(contexts)

    return seeded


def _wanted(protocol: Protocol, questions: Questions) -> set[str]:
    if protocol.name != "oracle-crop":
        return set(questions.ids)
    wanted = questions.with_boxes()
    if not wanted:
        raise ValueError("The protocol oracle-crop needs `target_boxes`, and no row has them. Leave the protocol out.")
    return wanted


def _directories(output_dir: str, protocols: Sequence[Protocol]) -> dict[str, Path]:
    several = len(protocols) > 1
    return {one.name: Path(output_dir) / one.name if several else Path(output_dir) for one in protocols}


def _budgets(conversation: Conversation, protocol: Protocol) -> tuple[int, ...]:
    return conversation.with_rounds(protocol.num_rounds).token_budgets


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


def _checked_budgets(budgets: list[int], num_rounds: int) -> tuple[int, ...]:
    if len(budgets) != num_rounds or min(budgets) < 1:
        raise ValueError(f"`token_budgets` must be {num_rounds} numbers >= 1, one for each round, got {budgets}.")
    return tuple(budgets)


def _write_record(
    args: EvalArguments,
    conversation: Conversation,
    rows: LoadedRows,
    protocol: Protocol,
    directory: Path,
    questions: Questions,
    wanted: set[str],
) -> None:
    conversation = conversation.with_rounds(protocol.num_rounds)
    config = asdict(args)
    del config["protocol"]  # a result says which one it is, not which others were asked for
    record = run_record(
        {**config, "conversation": asdict(conversation)},
        **conversation.facts(),
        seed=args.seed,
        decoding=args.decoding,
        protocol=protocol.name,
        official=args.official,
        n_expected=len(wanted),
        left_out=len(questions) - len(wanted),
        bad_rows=rows.bad_rows,
    )
    # A start that failed before its first rollout does not bind the directory to its options.
    nothing_yet = not seen_ids(directory)
    free = (
        "config.device",
        "config.output_dir",
        "config.scoring",
        "config.image_threads",
        "config.pictures",
        "official",
    )
    write_run(directory, record, ignore=free, overwrite=nothing_yet)
