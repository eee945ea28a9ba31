"""
What the Hub page of a trained model says, made from the files in its directory alone.

`run.json` gives the command, the options and the versions, `conversation.json` how the model is asked,
`trainer_state.json` the course of training, `result.json` (built-in task) and the `report.json` of evaluations the
results. A section whose file is missing is left out: the card says nothing that no file says.
"""

import logging
import os
from pathlib import Path
from typing import Any

from ..conversation import Conversation
from ..records import RUN_FILE, read_run, run_record, write_atomically, write_run
from .facts import PAPER, STATE_FILE, CardFacts, base_license, copy_facts, is_hub_id, keep_reports, read_facts
from .picture import draw_rollouts, drop_picture, pick_rollouts
from .text import WRITTEN_BY, format_card

logger = logging.getLogger(__name__)

CARD_FILE = "README.md"


def write_card(directory: str | os.PathLike, **known: Any) -> Path:
    """
    Write the card, `README.md`, of the model in a directory.

    Args:
        directory (`str` or `os.PathLike`): Directory of a saved model.
        **known: Fields of [`CardFacts`] that are known better than from the files; `None` counts as not known.

    Returns:
        `Path`: The card.
    """
    path = Path(directory, CARD_FILE)
    write_atomically(path, format_card(read_facts(directory, **known)).encode())
    return path


def write_training_card(args, conversation: Conversation, base_model: str | None, **known: Any) -> Path | None:
    """
    [`write_card`] while training, when checkpoints are saved: where that fails, the training goes on with a warning.

    Args:
        args ([`~mgpo_trl.MGPOConfig`]): Options of the training; the card goes to its output directory.
        conversation ([`~mgpo_trl.conversation.Conversation`]): Its conversation.
        base_model (`str`, *optional*): What it started from.
        **known: As in [`write_card`].

    Returns:
        `Path`: The card; `None` where it was not written.
    """
    try:
        record_run(args.output_dir, args, conversation, base_model)
        return write_card(args.output_dir, base_model=base_model, **known)
    except Exception as error:
        logger.warning("The model card in '%s' was not written (%r).", args.output_dir, error)
        return None


def record_run(directory: str | os.PathLike, args, conversation: Conversation, base_model: str | None) -> None:
    """
    Write `run.json` where this command has not done so: a trainer that was put together in Python has no record yet.

    Args:
        directory (`str` or `os.PathLike`): Output directory of the training.
        args ([`~mgpo_trl.MGPOConfig`]): Its options.
        conversation ([`~mgpo_trl.conversation.Conversation`]): Its conversation.
        base_model (`str`, *optional*): What it started from.
    """
    record = run_record(
        {"training": args.to_dict(), "model": {"model_name_or_path": base_model}},
        **conversation.facts(),
        seed=args.seed,
        processes=args.world_size,
    )
    is_there = Path(directory, RUN_FILE).is_file() and read_run(directory).get("command") == record["command"]
    if not is_there:
        write_run(directory, record, overwrite=True)


def is_ours(directory: str | os.PathLike) -> bool:
    """Whether the card in a directory may be written anew: there is none, or one that nobody has taken over."""
    path = Path(directory, CARD_FILE)
    return not path.is_file() or WRITTEN_BY in path.read_text(encoding="utf-8")


__all__ = [
    "CARD_FILE", "PAPER", "STATE_FILE", "CardFacts", "base_license", "copy_facts", "draw_rollouts", "drop_picture",
    "format_card", "is_hub_id", "is_ours", "keep_reports", "pick_rollouts", "read_facts", "record_run", "write_card",
    "write_training_card",
]  # fmt: skip
