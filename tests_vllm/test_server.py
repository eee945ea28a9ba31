"""
A vLLM server of its own process, reached through TRL's client.

Weights travel by NCCL, which needs CUDA: joining its group and the broadcast are left out here. So the server keeps the
weights of the checkpoint, which are those of a trainer that has not made a step.
"""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import requests
import torch
from against_transformers import BOXES, greedy, logprobs_of, written_boxes
from conftest import ENGINE, HERE, MAX_PIXELS, MIN_PIXELS, group_rows
from trl.generation.vllm_client import VLLMClient

TOLERANCE = 1e-4
BUDGET = f'{{"size": {{"shortest_edge": {MIN_PIXELS}, "longest_edge": {MAX_PIXELS}}}}}'


def command(model_dir, port):
    """As in `docs/vllm.md`; the second line is what these tests need on top."""
    return [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model_dir), "--port", str(port),
        "--host", "127.0.0.1", "--max-model-len", "512", "--enable-scale-out",
        "--weight-transfer-config", '{"backend": "nccl"}',
        "--logprobs-mode", "processed_logprobs", "--max-logprobs", "-1",
        "--limit-mm-per-prompt", '{"image": 2, "video": 0}', "--mm-processor-kwargs", BUDGET,
        "--dtype", ENGINE["dtype"], "--enforce-eager", "--block-size", str(ENGINE["block_size"]),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def server(model_dir, tmp_path_factory):
    """(process, address) of a server that is up."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
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
                print(f"The server was up after {time.monotonic() - started:.0f} seconds.")
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
    session_patch.setattr(VLLMClient, "init_communicator", lambda self, device: None)
    session_patch.setattr(VLLMClient, "update_named_params", send_nothing)
    options = {"vllm_mode": "server", "vllm_server_base_url": server[1], "vllm_server_timeout": 5.0}
    return make_trainer(**options, learning_rate=0.0)


def send_nothing(client, metadata, named_params):
    """The version that `_finish_weight_update` sends is sent by the route for it alone."""
    client.weight_version = f"weights of {len(metadata)} tensors"
    client._post(f"{client.base_url}/update_weight_version", json={"new_version": client.weight_version})


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
    images = torch.tensor([one for one in range(7)])
    assert not torch.isin(batch["completion_ids"][sampled], images[3:]).any(), "a vision token was sampled"


def test_greedy_turns_of_a_server(trainer, photos):
    ours, expected = greedy(trainer, photos)
    assert ours == expected


def test_training(trainer):
    trainer._metrics["train"].clear()
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(log) == 2 and all(entry["sampling/sampling_logp_difference/max"] < 0.1 for entry in log)


def test_another_pixel_budget_is_named(trainer, photos):
    """The first image with a token more than the server has features for."""
    ids = trainer.chat.prompt_ids(
        [{"role": "user", "content": [{"type": "image"}]}], [(image := view(trainer, photos))]
    )
    place = ids.index(trainer.chat.image_token_id)
    trainer.vllm_generation.samples = ["photo-0"]
    with pytest.raises(ValueError, match=r"features for the images of sample 'photo-0'.*--mm-processor-kwargs"):
        trainer.vllm_generation.generate([[*ids[:place], ids[place], *ids[place:]]], [[image]], 1)


def view(trainer, photos):
    from mgpo_trl.images import open_image

    return trainer.chat.fit(open_image(photos[0]["image"], ""))


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
