"""
What watching rollouts costs: the share of a built-in training's time that goes into keeping, showing and sending them.

    python benchmarks/watching.py            four minutes on one core, once the warm start is cached
    python benchmarks/watching.py --quick    half a minute: fewer steps

Each setting is a training by the built-in recipe (128 rollouts a step, watched every 10 steps) in which the watcher's
own calls are timed, so that other work on the machine slows both sides of the ratio. The page grows with the training
up to the bound on pictures: writing it there is timed by itself, and the share that it would make is given, too.
Trackers that are not installed are left out; the others stay offline.
"""

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

from common import conditions, write_result

SEED = 42
TRACKERS = ("none", "tensorboard", "trackio", "wandb")


@contextmanager
def timed_watcher(spent: list[float]):
    """Within it, every call of a watcher adds its seconds to the list."""
    from mgpo_trl.watching.watcher import RolloutWatcher

    originals = {name: getattr(RolloutWatcher, name) for name in ("on_train_begin", "watch", "on_train_end")}

    def timed(original):
        def call(*args, **kwargs):
            started = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                spent.append(time.perf_counter() - started)

        return call

    for name, original in originals.items():
        setattr(RolloutWatcher, name, timed(original))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(RolloutWatcher, name, original)


def train(model_dir: Path, directory: Path, steps: int, report_to: list[str]) -> dict:
    """One training; its seconds, and those of the watcher."""
    from mgpo_trl import MGPOConfig, MGPOTrainer
    from mgpo_trl.builtin.loading import load_builtin
    from mgpo_trl.builtin.recipe import RECIPES
    from mgpo_trl.rewards import accuracy_reward

    options = {**RECIPES["refer"].rl_options(), "max_steps": steps, "report_to": report_to, "disable_tqdm": True}
    args = MGPOConfig(**{**options, "output_dir": str(directory), "seed": SEED})
    rows = load_builtin("builtin:refer", "train", SEED).dataset
    trainer = MGPOTrainer(str(model_dir), accuracy_reward, args, train_dataset=rows)
    spent: list[float] = []
    started = time.perf_counter()
    with timed_watcher(spent):
        trainer.train()
    seconds = time.perf_counter() - started
    return {
        "steps": steps,
        "interval": args.log_rollouts_steps,
        "watched": len(spent) - 2,
        "seconds": round(seconds, 2),
        "watch_seconds": round(sum(spent), 3),
        "share": round(sum(spent) / (seconds - sum(spent)), 5),
        "max_pictures": args.log_rollouts_pictures,
    }


def page_when_full(directory: Path, max_pictures: int) -> dict:
    """Seconds for a page with as many pictured rollouts as are kept, copies of those that a training left."""
    from mgpo_trl.watching import write_training_page
    from mgpo_trl.watching.files import RolloutLog, rollout_id

    log = RolloutLog(directory, max_pictures)
    records, pictures = (
        [json.loads(line) for line in p.read_text().splitlines()] for p in (log.rollouts, log.pictures)
    )
    for path in (log.rollouts, log.pictures):
        path.unlink()
    for copy in range(max_pictures // len(records)):
        for one, picture in zip(records, pictures, strict=True):
            place = one["training"]
            step = place["step"] + copy * 1000
            one["id"] = picture["id"] = rollout_id(step, place["group"], place["sample"])
            log.add(step, [one], [picture])
    started = time.perf_counter()
    page = write_training_page(directory)
    return {"seconds": round(time.perf_counter() - started, 3), "bytes": page.stat().st_size}


def main() -> None:
    """Measure, print, write the result file."""
    from mgpo_trl.builtin.warm_start import warm_start

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="Fewer steps.")
    steps = 11 if parser.parse_args().quick else 40
    model_dir = warm_start("refer", SEED).model_dir
    result = {**conditions(sys.argv), "settings": {}}
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"TRACKIO_DIR": folder, "WANDB_DIR": folder, "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
        for tracker in TRACKERS:
            if tracker == "none" or importlib.util.find_spec(tracker):
                figures = train(model_dir, Path(folder) / tracker, steps, [tracker])
                result["settings"][tracker] = figures
                print(f"{tracker:<12} {100 * figures['share']:.2f} % of the rest of {steps} steps")
        full = page_when_full(Path(folder) / "none", figures["max_pictures"])
    plain = result["settings"]["none"]
    between = (plain["seconds"] - plain["watch_seconds"]) / steps * plain["interval"]
    full["share"] = round((plain["watch_seconds"] / plain["watched"] + full["seconds"]) / between, 5)
    result["page_when_full"] = full
    print(f"page at the bound on pictures: {full['seconds']:.2f} s, {full['bytes'] / 1e6:.1f} MB, at most", end=" ")
    print(f"{100 * full['share']:.2f} %")
    print("wrote", write_result("watching", result))


if __name__ == "__main__":
    main()
