"""The commands of the repository and of its documents: calls within a test, and the environment of subprocesses."""

import importlib.util
import json
import os
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SMALL_BATCH = ["--max_steps", "1", "--num_generations", "2", "--per_device_train_batch_size", "2"]
SMALL_MODEL = [
    "--dtype", "float32", "--bf16", "false", "--gradient_accumulation_steps", "1", "--steps_per_generation", "1",
    "--max_pixels", "84x84", "--min_pixels", "56x56", "--log_completions", "false", "--save_steps", "1",
    "--gradient_checkpointing", "false", "--report_to", "none",
]  # fmt: skip
SMALL_EVAL = ["--token_budgets", "4", "4", "--max_pixels", "84x84", "--min_pixels", "56x56"]


def load_script(name):
    """The module of `train.py` or `eval.py`."""
    spec = importlib.util.spec_from_file_location(f"script_{name}", ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def environment(**changes):
    """The environment of a subprocess: one thread, no network, the commands of this Python first on the path."""
    bin_dir = str(Path(sys.executable).parent)
    path = os.pathsep.join([bin_dir, os.environ.get("PATH", "")])
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **changes}


def every_second_is_right(completions, **kwargs):
    """A reward that gives every group a signal, whatever a random model writes."""
    return [float(number % 2) for number in range(len(completions))]


def shorten_builtin(patch, cache_dir, heldout=8):
    """Give the built-in task a warm start of a few steps, a cache of its own, and few scenes; returns the recipes."""
    from mgpo_trl.builtin import loading
    from mgpo_trl.builtin.recipe import RECIPES

    short = {"seeing_batch": 4, "reading_batch": 4, "seeing_steps": 2, "talking_steps": 2, "talking_batch": 4}
    recipes = {
        level: replace(recipe, warm_start=replace(recipe.warm_start, scenes=8, **short))
        for level, recipe in RECIPES.items()
    }
    patch.setenv("XDG_CACHE_HOME", str(cache_dir))
    for module in ("recipe", "run", "warm_start"):
        patch.setattr(f"mgpo_trl.builtin.{module}.RECIPES", recipes)
    patch.setattr(loading, "ROWS", {"train": 16, "heldout": heldout})
    return recipes


# commands of a document


def commands_of(text):
    """One command a line; a line that ends in a backslash goes on, what follows a # is a comment."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def kind_of(words):
    """What a command is, by its first words; `None` for one that is not known here."""
    if words[0] == "make":
        return "make"
    if words[:3] == ["accelerate", "launch", "train.py"]:
        return "train"
    if words[:2] == ["python", "eval.py"]:
        return "eval"
    if words[:3] == ["python", "-m", "mgpo_trl.builtin"]:
        return "builtin"
    return None


def arguments_of(words):
    return words[{"make": 1, "train": 3, "eval": 2, "builtin": 3}[kind_of(words)] :]


def run_short(words, stand_ins, tiny_dir):
    """
    A command of `train.py`, `eval.py` or the built-in task with a small budget, in this process and directory: the
    tiny model in place of one that would be downloaded, other words by `stand_ins`.
    """
    from mgpo_trl import scripts
    from mgpo_trl.builtin import __main__ as builtin_command

    published = [word for word in words if word.startswith("Qwen/")]
    stand_ins = {**dict.fromkeys(published, str(tiny_dir)), **stand_ins}
    arguments = [stand_ins.get(word, word) for word in arguments_of(words)]
    if kind_of(words) == "builtin":
        return builtin_command.main([*arguments, *SMALL_BATCH])
    if kind_of(words) == "eval":
        return load_script("eval").main([*arguments, *_short_evaluation(arguments, tiny_dir)])
    if scripts.is_builtin_run(*scripts.parse_training(arguments)[::2]):
        return load_script("train").main([*arguments, *SMALL_BATCH])
    rounds = scripts.parse_training(arguments)[1].num_rounds
    small = [*SMALL_BATCH, *SMALL_MODEL, "--round_token_budgets", *["4"] * rounds]
    return load_script("train").main([*arguments, *small, "--model_name_or_path", str(tiny_dir)])


def _short_evaluation(arguments, tiny_dir):
    """Few rows; small images and turns where the model has no `conversation.json` that says so."""
    if {"--rescore", "--compare", "outputs/builtin"} & set(arguments):
        return []
    return ["--limit", "2", *(SMALL_EVAL if str(tiny_dir) in arguments else [])]


def output_of(words):
    """The directory that a command writes to."""
    from mgpo_trl import scripts

    for option in ("--output_dir", "--rescore"):
        if option in words:
            return words[words.index(option) + 1]
    if kind_of(words) == "eval":
        return "outputs/eval"
    return scripts.parse_training(arguments_of(words))[1].output_dir


def write_rows(path, rows):
    """Rows of the built-in task as JSON Lines with their pictures beside them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for row in rows:
        (path.parent / row["image"]["path"]).write_bytes(row["image"]["bytes"])
        kept = {name: row[name] for name in ("question", "choices", "answer")}
        lines.append(json.dumps({"image": row["image"]["path"], **kept}) + "\n")
    path.write_text("".join(lines))
