"""`examples/vllm_client.py` against a real vLLM: both rounds are those that `GroundedVQA` plays with these weights."""

import base64
import importlib.util
import io
import json
import shutil
import subprocess
import sys

import pytest
from conftest import ENGINE, HERE, MAX_PIXELS, MIN_PIXELS
from PIL import Image
from test_server import free_port, kill, wait_until_up

from mgpo_trl import GroundedVQA
from mgpo_trl.conversation import Conversation
from mgpo_trl.rollout import Context

BUDGETS = (12, 6)


@pytest.fixture(scope="module")
def client():
    """The module of the example."""
    spec = importlib.util.spec_from_file_location("vllm_client", HERE.parent / "examples" / "vllm_client.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def served(model_dir, tmp_path_factory):
    """(directory, address) of a model with its conversation, served as `docs/using.md` says and as a CPU needs."""
    directory = tmp_path_factory.mktemp("served") / "merged"
    shutil.copytree(model_dir, directory)
    Conversation(max_pixels=MAX_PIXELS, min_pixels=MIN_PIXELS, token_budgets=BUDGETS, min_box_side=10).save(directory)
    port, log = free_port(), directory.parent / "log"
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(directory),
        "--limit-mm-per-prompt", json.dumps({"image": 2}), "--host", "127.0.0.1", "--port", str(port),
        "--max-model-len", "512", "--dtype", ENGINE["dtype"], "--enforce-eager",
        "--block-size", str(ENGINE["block_size"]),
    ]  # fmt: skip
    with open(log, "w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, cwd=HERE, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_until_up(process, address, log)
        yield directory, address
    finally:
        kill(process)


def test_both_rounds_are_those_of_the_model_at_hand(client, served, photos, monkeypatch):
    """Token by token: a random model writes bytes that are no text, so that texts would not do."""
    directory, address = served
    endpoint, files = client.Endpoint(f"{address}/v1"), client.ModelFiles(directory)
    vqa = GroundedVQA.from_pretrained(str(directory), dtype="float32", device="cpu")
    chat, requests, complete = vqa.template.chat, [], endpoint.complete

    def recorded(**body):
        choice = complete(**body, return_token_ids=True)
        requests.append((body["messages"], choice["token_ids"]))
        return choice

    monkeypatch.setattr(endpoint, "complete", recorded)
    for row in photos:
        client.ask(endpoint, files, row["image"], row["question"], row["choices"])
    assert len(requests) == 2 * len(photos)
    for messages, ids in requests:
        images = [image_of(block) for message in messages for block in blocks_of(message) if "image_url" in block]
        context = Context(chat.prompt_ids(list(map(with_places, messages)), images), images, len(images))
        (sampled,) = vqa.generate([context])
        assert [one for one in ids if not chat.ends_turn(one)] == [
            one for one in sampled.ids if not chat.ends_turn(one)
        ]


def blocks_of(message):
    return message["content"] if isinstance(message["content"], list) else []


def image_of(block):
    return Image.open(io.BytesIO(base64.b64decode(block["image_url"]["url"].partition(",")[2]))).convert("RGB")


def with_places(message):
    """The message as a chat template takes it: a place where each image is."""
    blocks = [{"type": "image"} if "image_url" in block else block for block in blocks_of(message)]
    return {**message, "content": blocks or message["content"]}
