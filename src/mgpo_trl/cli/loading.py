"""The model of a command line: its options, and loading it."""

import argparse
import os

MODEL_VARIABLE = "MGPO_MODEL"


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of loading a model: its base, rounds, precision, device."""
    parser.add_argument("--base_model", help="base of an adapter; the one that it names when not given")
    parser.add_argument("--revision", help="branch, tag or commit of a model on the Hub")
    parser.add_argument("--num_rounds", type=int, help="another number of rounds than the model was trained with")
    parser.add_argument("--dtype", default="auto", help="precision of the weights (default: auto)")
    parser.add_argument("--device", help="device; the accelerator when there is one")


def named_model(model: str | None) -> str:
    """
    The model to load: the one given, else the one that the environment names.

    Raises:
        ValueError: Neither is there.
    """
    model = model or os.environ.get(MODEL_VARIABLE)
    if not model:
        raise ValueError(f"No model was named. Give `--model DIR`, or set {MODEL_VARIABLE} to a model directory.")
    return model


def load_model(model: str, args: argparse.Namespace):
    """The [`~mgpo_trl.GroundedVQA`] of a model and the options of [`add_model_arguments`]."""
    from ..inference import GroundedVQA

    return GroundedVQA.from_pretrained(
        model,
        args.base_model,
        num_rounds=args.num_rounds,
        dtype=args.dtype,
        device=args.device,
        revision=args.revision,
    )
