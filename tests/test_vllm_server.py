"""A vLLM server that goes away: a stub of its routes, TRL's own client, and ours on top of it."""

import json
import logging
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from requests.adapters import HTTPAdapter
from trl.generation import vllm_client, vllm_generation

from mgpo_trl import vllm_server
from mgpo_trl.vllm_rollout import RoundGeneration
from mgpo_trl.vllm_server import PatientClient

IMAGE, TEXT = 9, 3
PLACES = 4
"""Features that the stub makes of every image."""


class Stub:
    """A server of vLLM's routes on a port that it keeps while it is down."""

    def __init__(self):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self):
        """Up, with the weights of the checkpoint."""
        self.version, self.requests, self.broken = "default", [], 0
        handler = type("Handler", (Routes,), {"stub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def stop(self):
        self.server.shutdown()
        self.server.server_close()

    def named(self, path):
        return [body for requested, body in self.requests if requested == path]


class Routes(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        answers = {
            "/health": {},
            "/v1/models": {"data": [{"id": "tiny"}]},
            "/weight_info": {"weight_version": self.stub.version},
            "/server_info": {"vllm_config": {"model_config": {"max_model_len": 64}}},
        }
        self.answer(answers[self.path.split("?")[0]])

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "{}")
        self.stub.requests.append((self.path, body))
        if self.path == "/finish_weight_update":
            self.stub.version = body["weight_version"]
        self.answer(self.result(body))

    def result(self, body):
        if self.path == "/v1/chat/completions/render":
            images = [part for part in body["messages"][0]["content"] if part["type"] == "image_url"]
            places = [{"offset": 7 * number, "length": PLACES} for number in range(len(images))]
            return {"features": {"mm_placeholders": {"image": places}}}
        if self.path == "/inference/v1/generate":
            logprobs = {"content": [{"token": f"token_id:{TEXT}", "logprob": -0.5, "top_logprobs": []}]}
            return {"choices": [{"token_ids": [TEXT], "logprobs": logprobs}] * body["sampling_params"]["n"]}
        return {}

    def answer(self, result):
        if self.stub.broken and self.path == "/inference/v1/generate":
            self.stub.broken -= 1
            self.close_connection = True
            return self.connection.shutdown(socket.SHUT_RDWR)  # died while it was working
        body = json.dumps(result).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def stub():
    stub = Stub()
    yield stub
    stub.stop()


@pytest.fixture
def pauses(monkeypatch):
    """No waiting in real time: pauses are noted, and move the clock."""
    clock, noted = [1000.0], []

    def sleep(seconds):
        noted.append(seconds)
        clock[0] += seconds

    monkeypatch.setattr(vllm_server, "time", SimpleNamespace(monotonic=lambda: clock[0], sleep=sleep))
    return noted


@pytest.fixture
def client(stub, pauses, monkeypatch):
    monkeypatch.setattr(vllm_client, "is_vllm_available", lambda: True)
    monkeypatch.setattr(vllm_client, "packed_nccl_broadcast_producer", lambda **_: None, raising=False)
    monkeypatch.setattr(vllm_client, "_HAS_STATEFUL_TRAINER_ENGINE", True)
    monkeypatch.setattr(vllm_client, "_HAS_RESET_PREFIX_CACHE_SUCCESS", True)
    client = PatientClient(base_url=stub.url, connection_timeout=100.0)
    client.session.mount("http://", HTTPAdapter())  # without the minute in which TRL's session tries on its own
    return client


def send_weights(client):
    client.update_named_params([("a", "float32", [1])], iter([("a", torch.ones(1))]))


def sample(client):
    return client.generate([[1, IMAGE, 2]], features=[None], n=2)["completion_ids"]


def test_a_server_that_stays_away_is_named(client, stub, pauses, caplog):
    stub.stop()
    with caplog.at_level(logging.WARNING), pytest.raises(ConnectionError, match=stub.url) as caught:
        sample(client)
    for words in ("is gone", "`vllm_server_timeout` (now 100 seconds)", "--resume_from_checkpoint"):
        assert words in str(caught.value)
    assert pauses == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0] and stub.url in caplog.text
    stub.start()


def test_a_server_that_breaks_off_is_asked_again(client, stub, pauses):
    send_weights(client)
    stub.broken = 2
    assert sample(client) == [[TEXT], [TEXT]]
    assert len(stub.named("/inference/v1/generate")) == 3 and pauses == []


def test_a_server_that_is_up_and_never_answers_is_given_up(client, stub):
    stub.broken = 99
    with pytest.raises(ConnectionError, match="3 attempts failed"):
        sample(client)
    assert len(stub.named("/inference/v1/generate")) == 3


def test_it_is_waited_for_until_it_is_back(client, stub, pauses, monkeypatch):
    stub.stop()
    sleep = vllm_server.time.sleep

    def until_back(seconds):
        sleep(seconds)
        if len(pauses) == 3:
            stub.start()

    monkeypatch.setattr(vllm_server.time, "sleep", until_back)
    assert sample(client) == [[TEXT], [TEXT]] and pauses == [1.0, 2.0, 4.0]


@pytest.mark.parametrize("ask", ["generate", "image_features", "reset_prefix_cache", "update_named_params"])
def test_a_server_that_was_started_again_is_not_sampled_from(client, stub, ask):
    """It has the weights of its checkpoint: its rollouts would look like ours."""
    send_weights(client)
    assert stub.version == client.weight_version != "default"
    stub.stop()
    stub.start()
    calls = {
        "generate": lambda: sample(client),
        "image_features": lambda: client.image_features([[Image.new("RGB", (28, 28))]]),
        "reset_prefix_cache": client.reset_prefix_cache,
        "update_named_params": lambda: send_weights(client),
    }
    with pytest.raises(RuntimeError, match=f"{stub.url} was started again.*'default'"):
        calls[ask]()
    assert stub.requests == []


def test_a_server_that_goes_away_while_it_gets_weights_is_named(client, stub, monkeypatch):
    send_weights(client)
    monkeypatch.setattr(vllm_client, "packed_nccl_broadcast_producer", lambda **_: stub.stop())
    with pytest.raises(ConnectionError, match=f"{stub.url} went away while it was sent the weights"):
        send_weights(client)
    stub.start()


def test_a_machine_that_lost_its_power_is_noticed(stub, monkeypatch):
    """The socket of a session as TRL makes it asks whether the other side is there."""
    monkeypatch.setattr(vllm_client, "is_vllm_available", lambda: True)
    client = PatientClient(base_url=stub.url)
    adapter = client.session.get_adapter(stub.url)
    connection = adapter.poolmanager.connection_from_url(stub.url)._get_conn()
    connection.connect()
    assert connection.sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    connection.close()


def test_no_server_at_the_start_is_named(stub, client):
    stub.stop()
    with pytest.raises(OSError, match=stub.url):
        PatientClient(base_url=stub.url)
    stub.start()


@pytest.fixture
def generation(client, stub, monkeypatch):
    """Our generation in server mode on the stub; joining the group that weights travel in needs CUDA."""
    monkeypatch.setattr(vllm_generation, "is_vllm_available", lambda: True)
    monkeypatch.setattr(PatientClient, "init_communicator", lambda self, device: None)
    accelerator = SimpleNamespace(
        is_main_process=True,
        process_index=0,
        num_processes=1,
        device="cpu",
        wait_for_everyone=lambda: None,
        state=SimpleNamespace(deepspeed_plugin=None, fsdp_plugin=None),
    )
    monkeypatch.setattr(vllm_generation, "broadcast_object_list", lambda objects, from_process: objects)
    monkeypatch.setattr(vllm_generation, "gather_object", list)
    monkeypatch.setattr("mgpo_trl.vllm_rollout.gather_object", list)
    return RoundGeneration(
        {"mm_processor_kwargs": {"size": {"shortest_edge": 1, "longest_edge": 2}}},
        model=torch.nn.Linear(2, 2),
        accelerator=accelerator,
        processing_class=SimpleNamespace(image_token_id=IMAGE),
        mode="server",
        server_base_url=stub.url,
    )


def ask(generation, prompts, num_generations=1):
    generation.samples = [f"photo-{number // num_generations}" for number in range(len(prompts))]
    images = [[Image.new("RGB", (56, 56))] * prompt.count(0) for prompt in prompts]
    prompts = [[one for part in prompt for one in ([IMAGE] * PLACES if part == 0 else [part])] for prompt in prompts]
    return generation.generate(prompts, images, num_generations)


def test_a_server_gets_the_ids_that_are_trained_on(generation, stub):
    seen, completions, logprobs, _ = ask(generation, [[1, 0, 2], [1, 0, 2], [1, 0, 2, 0], [1, 0, 2, 0]], 2)
    sent = sorted(stub.named("/inference/v1/generate"), key=lambda body: len(body["token_ids"]))
    assert [body["token_ids"] for body in sent] == [seen[0], seen[2]] and seen[0] == [1, *[IMAGE] * PLACES, 2]
    assert sent[1]["features"]["mm_placeholders"]["image"] == [
        {"offset": 1, "length": PLACES},
        {"offset": 6, "length": PLACES},
    ]
    assert completions == [[TEXT]] * 4 and logprobs == [[[-0.5]]] * 4


def test_a_server_that_resizes_images_is_told_apart_by_sample(generation):
    generation.samples = ["photo-0", "photo-1"]
    prompts = [[1, *[IMAGE] * PLACES, 2], [1, *[IMAGE] * (PLACES - 1), 2]]
    images = [[Image.new("RGB", (56, 56))]] * 2
    with pytest.raises(
        ValueError, match=r"features for the images of sample 'photo-1', which have \[3\].*longest_edge"
    ):
        generation.generate(prompts, images, 1)


def test_a_conversation_that_a_server_has_no_room_for_is_named(generation):
    with pytest.raises(ValueError, match="sample 'photo-1' has 65 tokens .* takes 64 in all"):
        ask(generation, [[1, 0, 2], [1] * 61 + [0]])


def test_weights_reach_a_server_with_a_version(generation, stub):
    generation.sync_weights()
    paths = [path for path, _ in stub.requests]
    assert paths == [
        "/start_weight_update", "/update_weights", "/finish_weight_update", "/reset_prefix_cache",
        "/reset_encoder_cache",
    ]  # fmt: skip
    assert stub.named("/update_weights")[0]["update_info"]["names"] == ["weight", "bias"]
    assert stub.version == generation.vllm_client.weight_version
