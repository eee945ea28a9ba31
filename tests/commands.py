"""The commands of the repository: their modules for calls within a test, their environment for subprocesses."""

import importlib.util
import os
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parents[1]


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
