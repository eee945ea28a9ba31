"""
A vLLM server of its own process, reached through TRL's client.

Weights travel by NCCL, which needs CUDA: joining its group and the broadcast are left out here. So the server keeps
the weights of the checkpoint, which are those of a trainer that has not made a step.
"""

import os
import shlex
import signal
import socket
import subprocess
import sys
import time

import pytest
import requests
import torch
from against_transformers import BOXES, greedy, logprobs_of, written_boxes
from conftest import ENGINE, HERE, MAX_PIXELS, MIN_PIXELS, group_rows, leave_out_nccl
from two_processes import run

from mgpo_trl.images import open_image
from mgpo_trl.processing import vision_token_ids

TOLERANCE = 1e-4
BUDGET = f'{{"size": {{"shortest_edge": {MIN_PIXELS}, "longest_edge": {MAX_PIXELS}}}}}'


def command(model_dir, port):
    """
    The options of the command in `docs/vllm.md`, with the model and pixel budget of these tests, and what a CPU needs.
    vLLM's build for CPUs has no working `vllm serve`, which would start this same module.
    """
    text = (HERE.parent / "docs" / "vllm.md").read_text(encoding="utf-8").replace("\\\n", " ")
    line = next(line for line in text.splitlines() if line.startswith("VLLM_SERVER_DEV_MODE=1 vllm serve "))
    model, *options = shlex.split(line)[3:]
    assert model == "Qwen/Qwen2.5-VL-7B-Instruct"
    options = [BUDGET if "shortest_edge" in option else option for option in options]
    assert BUDGET in options
    return [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model_dir), *options,
        "--host", "127.0.0.1", "--port", str(port), "--max-model-len", "512",
        "--dtype", ENGINE["dtype"], "--enforce-eager", "--block-size", str(ENGINE["block_size"]),
    ]  # fmt: skip


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def server(model_dir, tmp_path_factory):
    """(process, address) of a server that is up."""
    port = free_port()
    log = tmp_path_factory.mktemp("server") / "log"
    environment = {**os.environ, "VLLM_SERVER_DEV_MODE": "1"}
    with open(log, "w") as output:
        process = subprocess.Popen(
            command(model_dir, port), env=environment, stdout=output, stderr=output, cwd=HERE, start_new_session=True
        )
    address = f"http://127.0.0.1:{port}"
    try:
        wait_until_up(process, address, log)
        yield process, address
    finally:
        kill(process)


def wait_until_up(process, address, log, seconds=300):
    started = time.monotonic()
    while time.monotonic() < started + seconds and process.poll() is None:
        try:
            if requests.get(f"{address}/health", timeout=5).ok:
                return
        except requests.RequestException:
            time.sleep(1)
    raise RuntimeError(f"The server did not come up:\n{log.read_text()[-4000:]}")


def kill(process):
    """The server and the processes of its engine: they are in a session of their own."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def trainer(server, make_trainer, session_patch):
    leave_out_nccl(session_patch)
    options = {"vllm_mode": "server", "vllm_server_base_url": server[1], "vllm_server_timeout": 5.0}
    return make_trainer(**options, learning_rate=0.0)


def test_rollouts_of_a_server(trainer, photos, figure):
    trainer.model.train()
    with written_boxes(trainer):
        batch = trainer._generate_and_score_completions(group_rows(photos))
    assert trainer._metrics["train"]["grounding/valid_ratio"] == [len(BOXES) / 8]
    sampled = batch["turn_ids"] > 0
    for row in BOXES:
        sampled[row] &= batch["turn_ids"][row] == 2
    plain, biased = logprobs_of(trainer, batch)
    same = (batch["sampling_per_token_logps"] - biased)[sampled].abs().max().item()
    figure("largest difference of a log-probability, server to transformers with the same bias", same)
    assert same < TOLERANCE
    for number, budget in ((1, 12), (2, 6)):
        assert ((batch["turn_ids"] == number).sum(1)[[1, 2, 5, 6, 7]] <= budget).all()
    vision = torch.tensor(vision_token_ids(trainer.model.config))
    assert not torch.isin(batch["completion_ids"][sampled], vision).any()


def test_greedy_turns_of_a_server(trainer, photos):
    ours, expected = greedy(trainer, photos)
    assert ours == expected


def test_training(trainer):
    trainer._metrics["train"].clear()
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(log) == 2 and all(entry["sampling/sampling_logp_difference/max"] < 0.1 for entry in log)


def test_two_processes_share_a_server(server, model_dir, tmp_path):
    options = {"vllm_mode": "server", "vllm_server_base_url": server[1], "learning_rate": 0.0}
    result = run(model_dir, tmp_path, options)
    assert result["num_processes"] == 2 and len(result["differences"]) == 2 and max(result["differences"]) < 0.1
    assert result["error"].startswith("vLLM has") and "sample 'photo-2'" in result["error"]


def test_another_number_of_features_is_named(trainer, photos):
    image = trainer.chat.fit(open_image(photos[0]["image"], ""))
    ids = trainer.chat.prompt_ids([{"role": "user", "content": [{"type": "image"}]}], [image])
    place = ids.index(trainer.chat.image_token_id)
    trainer.vllm_generation.samples = ["photo-0"]
    with pytest.raises(ValueError, match=r"features for the images of sample 'photo-0'.*--mm-processor-kwargs"):
        trainer.vllm_generation.generate([[*ids[:place], ids[place], *ids[place:]]], [[image]], 1)


def test_other_weights_are_noticed(trainer, photos):
    client = trainer.vllm_generation.vllm_client
    client._post(f"{client.base_url}/update_weight_version", json={"new_version": "default"})
    with pytest.raises(RuntimeError, match="was started again"):
        greedy(trainer, photos)
    client._post(f"{client.base_url}/update_weight_version", json={"new_version": client.weight_version})


def test_a_server_that_is_killed_is_named(trainer, server, photos, figure):
    process, address = server
    kill(process)
    started = time.monotonic()
    with pytest.raises(ConnectionError, match=f"The vLLM server at {address} is gone"):
        greedy(trainer, photos)
    figure("seconds until a killed server was given up, vllm_server_timeout=5", time.monotonic() - started)
