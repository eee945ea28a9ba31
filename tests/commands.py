"""The commands of the repository: their modules for calls within a test, their environment for subprocesses."""

import importlib.util
import os
import sys
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
