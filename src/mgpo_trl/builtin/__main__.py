"""
Run the built-in task from an installed package.

    python -m mgpo_trl.builtin                                          the level `refer`, two rounds
    python -m mgpo_trl.builtin --level needle --seed 1 --num_rounds 1   the one-round baseline, same number of rollouts

Every option of `train.py` is accepted too. Results go to `outputs/builtin` unless `--output_dir` says otherwise.
"""

import argparse
import logging
import sys


def main(arguments: list[str]) -> None:
    """Parse and run; the recipe of the level gives every option that is not named."""
    parser = argparse.ArgumentParser(prog="python -m mgpo_trl.builtin", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--level", default="refer", choices=["needle", "refer"], help="Number of cards: one or four.")
    options, rest = parser.parse_known_args(arguments)

    from ..hub import quiet_requests
    from ..scripts import parse_training
    from .run import run_builtin

    quiet_requests()
    run_builtin(*parse_training(["--dataset_name", f"builtin:{options.level}", *rest]))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(sys.argv[1:])
