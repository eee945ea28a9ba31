"""`mgpo merge`: an adapter and its base model become a model of their own."""

import argparse

SUMMARY = "Add a LoRA adapter to its base model and save the sum as an ordinary model."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `mgpo merge`."""
    parser.add_argument("adapter", metavar="ADAPTER", help="directory or Hub id of the adapter")
    parser.add_argument("out", metavar="OUT", help="new or empty directory for the model")
    parser.add_argument("--dtype", default="auto", help="precision of the merged weights (default: the base model's)")
    parser.add_argument("--base_model", help="base model in full precision; the one that the adapter names by default")


def run(args: argparse.Namespace) -> None:
    """Merge, and print where the model is."""
    from ..builtin.tiny import register_processor
    from ..merging import merge_adapter

    register_processor()  # an adapter of the built-in model may be merged
    print(merge_adapter(args.adapter, args.out, dtype=args.dtype, base_model=args.base_model))
