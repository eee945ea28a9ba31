"""
The command `mgpo`: ask a trained model, look at results, start a page to try it, merge an adapter.

    mgpo ask street.jpg "What is the number on the door?" --model outputs/run
    mgpo view outputs/eval
    mgpo demo outputs/run
    mgpo merge outputs/run outputs/merged

Torch is imported by the subcommands that need it, once they run: `mgpo --help` answers at once.
"""

import argparse
import logging
import sys
from collections.abc import Sequence

from . import ask, demo, merge, view

SUBCOMMANDS = (ask, view, demo, merge)


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Run a subcommand.

    Args:
        arguments (`Sequence[str]`, *optional*): Without the program's name; those of the process when not given.

    Returns:
        `int`: 0, or 1 after an error that was said on stderr. (Wrong arguments exit with 2, as `argparse` does.)
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    args = build_parser().parse_args(arguments)
    try:
        args.run(args)
    except (ValueError, OSError) as error:  # a bad file, box, directory, model name: said, not traced
        print(f"mgpo {args.subcommand}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of `mgpo`; every subcommand adds its own."""
    parser = argparse.ArgumentParser(prog="mgpo", description="Use a model that looks twice.")
    subparsers = parser.add_subparsers(dest="subcommand", required=True, metavar="COMMAND")
    for module in SUBCOMMANDS:
        name = module.__name__.rpartition(".")[2]
        subparser = subparsers.add_parser(name, help=module.SUMMARY, description=module.SUMMARY)
        module.add_arguments(subparser)
        subparser.set_defaults(run=module.run)
    return parser


__all__ = ["build_parser", "main"]
