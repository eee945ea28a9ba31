"""`train.py` killed with SIGKILL and started again with `--resume_from_checkpoint true`."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from commands import ROOT, environment, load_script
from safetensors.torch import load_file

STEPS = 6


def train_command(tiny_dir, output_dir, *more):
    options = {
        "model_name_or_path": tiny_dir, "dataset_name": "builtin:needle", "limit": 6, "output_dir": output_dir,
        "max_steps": STEPS, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 8,
        "num_generations": 2, "learning_rate": 1e-3, "weight_decay": 0.1, "round_token_budgets": "12 12",
        "reward_funcs": "rewards_of_this_test.by_length", "logging_steps": 1, "disable_tqdm": "true",
    }  # fmt: skip
    parts = [part for name, value in options.items() for part in (f"--{name}", *str(value).split(" "))]
    return [sys.executable, str(ROOT / "train.py"), *parts, *more]


@pytest.fixture
def directory(tmp_path):
    """Working directory with a reward that tells the rollouts of a random model apart."""
    (tmp_path / "rewards_of_this_test.py").write_text(
        "def by_length(completions, **kwargs):\n    return [float(len(c[-1]['content']) % 3) for c in completions]\n"
    )
    return tmp_path


def start(command, directory):
    return subprocess.Popen(
        command, cwd=directory, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(command, directory):
    process = start(command, directory)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output[-3000:]
    return output


def kill_when(process, condition, timeout=400):
    deadline = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, process.stdout.read()[-3000:]
        assert time.monotonic() < deadline, "the run saved no checkpoint"
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_a_killed_command_resumes_to_the_same_weights(directory, tiny_dir, monkeypatch):
    whole, killed = directory / "whole", directory / "killed"
    monkeypatch.chdir(directory)
    load_script("train").main(train_command(tiny_dir, whole)[2:])
    process = start(train_command(tiny_dir, killed), directory)
    kill_when(process, (killed / "checkpoint-2" / "trainer_state.json").exists)
    assert not (killed / "model.safetensors").exists() and not (killed / f"checkpoint-{STEPS}").exists()
    # As if the kill had come while the next checkpoint was being written: it must not be resumed from.
    (killed / "checkpoint-3").mkdir()
    (killed / "checkpoint-3" / "model.safetensors").write_bytes(b"half of it")
    finish(train_command(tiny_dir, killed, "--resume_from_checkpoint", "true"), directory)
    one, other = (load_file(path / "model.safetensors") for path in (whole, killed))
    assert one.keys() == other.keys()
    assert not [name for name in one if not torch.equal(one[name], other[name])]
    before = load_file(tiny_dir / "model.safetensors")
    assert [name for name in one if not torch.equal(one[name], before[name])]
    states = [
        json.loads((path / f"checkpoint-{STEPS}" / "trainer_state.json").read_text()) for path in (whole, killed)
    ]
    losses = [[entry["loss"] for entry in state["log_history"] if "loss" in entry] for state in states]
    assert losses[0] == losses[1] and states[1]["global_step"] == STEPS
