"""Launches with the files of `ds_configs/`, on CPUs: two processes, and nothing else of the files is overridden."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import yaml
from commands import ROOT, environment

CONFIGS = sorted(path.stem for path in (ROOT / "ds_configs").glob("*.yaml"))
LAUNCHER = [sys.executable, "-m", "accelerate.commands.launch"]
WORKER = Path(__file__).parent / "worker.py"
TIMEOUT = 400


class Launch(NamedTuple):
    """A finished launch."""

    code: int
    output: str
    ended: float
    """Seconds since the epoch."""


def config_of(name):
    return yaml.safe_load((ROOT / "ds_configs" / f"{name}.yaml").read_text())


def accelerate(name, *more):
    """`accelerate launch` with a file of ours, for CPUs."""
    precision = ["--mixed_precision", "no"] if "mixed_precision" in config_of(name) else []
    return [*LAUNCHER, "--config_file", f"ds_configs/{name}.yaml", "--num_processes", "2", *precision, *map(str, more)]


def run(*commands, **variables):
    """Run commands beside each other, one for each node; every process that they leave behind is ended."""
    started = [
        subprocess.Popen(
            command, cwd=ROOT, env=environment(PYTHONPATH=str(ROOT / "src"), **variables), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )
        for command in commands
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=TIMEOUT)[0] for process in started]
    finally:
        for process in started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    return Launch(max(abs(process.returncode) for process in started), "\n".join(outputs), time.time())


def launch(name, model, directory, *cases):
    """Play cases on two processes of one node."""
    return run(accelerate(name, "--main_process_port", 0, WORKER, model, directory, *cases))


def launch_two_nodes(name, model, directory, *cases):
    """Play cases on two nodes of one process each, both on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = ["--main_process_ip", "127.0.0.1", "--main_process_port", port]
    return run(
        *(accelerate(name, *address, "--machine_rank", rank, WORKER, model, directory, *cases) for rank in (0, 1))
    )


def results(directory):
    """What every process wrote."""
    return [json.loads(Path(directory, f"rank-{rank}.json").read_text()) for rank in (0, 1)]
