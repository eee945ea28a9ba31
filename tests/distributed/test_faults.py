"""A process that dies ends the job in bounded time, and what it leaves half saved is not taken for a checkpoint."""

import re
from types import SimpleNamespace

import pytest
from launching import LAUNCHER, accelerate, config_of, launch, run

from mgpo_trl import scripts

pytestmark = pytest.mark.slow
BOUND = 60
"""Seconds from the death of a process to the end of the job; measured 1-2."""
KILLED = re.compile(r"Root Cause.*rank\s*: 1 .*exitcode\s*: -9 .*\(SIGKILL\)", re.DOTALL)


@pytest.mark.parametrize("name", ["multi_gpu", "zero2"])
def test_a_process_killed_in_a_rollout_ends_the_job(name, tiny_dir, tmp_path):
    done = launch(name, tiny_dir, tmp_path, "dies_in_a_rollout")
    died = float((tmp_path / "dies_in_a_rollout" / "died").read_text())
    assert done.code != 0 and done.ended - died < BOUND
    assert KILLED.search(done.output), done.output[-3000:]


@pytest.mark.parametrize("name", ["multi_gpu", "zero2"])
def test_a_checkpoint_that_a_process_died_in_is_never_resumed_from(name, tiny_dir, tmp_path):
    done = launch(name, tiny_dir, tmp_path, "dies_in_a_save")
    assert done.code != 0 and KILLED.search(done.output), done.output[-3000:]
    directory = tmp_path / "dies_in_a_save"
    half = directory / "checkpoint-2"
    assert (half / "model.safetensors").exists() and (half / "rng_state_0.pth").exists()
    plugin = None
    if config_of(name)["distributed_type"] == "DEEPSPEED":
        assert (half / "latest").read_text() == "global_step2"  # DeepSpeed is through with its files
        plugin = SimpleNamespace(deepspeed_config={})
    args = SimpleNamespace(output_dir=str(directory), deepspeed_plugin=plugin, world_size=2, sync_ref_model=False)
    args.resume_from_checkpoint = "true"
    assert scripts.resume_point(args) == str(directory / "checkpoint-1")
    args.resume_from_checkpoint = str(half)
    with pytest.raises(ValueError, match="checkpoint-2' holds no `trainer_state.json`.*died while saving it"):
        scripts.resume_point(args)


def test_a_launch_that_would_silently_do_something_else_is_refused_before_the_model_loads():
    script = ["train.py", "--model_name_or_path", "nowhere", "--limit", 4, "--report_to", "none"]
    one_process = [*LAUNCHER, "--cpu", "--num_processes", 2, *script]
    done = run(list(map(str, one_process)), accelerate("fsdp2", "--main_process_port", 0, *script))
    assert done.code != 0 and "Several processes were asked for and one was started" in done.output
    assert "FSDP was asked for, and accelerate shards with it on GPUs only" in done.output
    assert "OSError" not in done.output  # the model was not looked for
