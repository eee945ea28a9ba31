"""The client for vLLM says to a server exactly what training says to the model: the same tokens, the same pixels."""

import base64
import importlib.util
import io
import json
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from commands import ROOT, environment
from conftest import photo_row
from PIL import Image

from mgpo_trl import GroundedVQA
from mgpo_trl.conversation import Conversation
from mgpo_trl.prompts import PromptTemplate
from mgpo_trl.rollout import Sampled

CONVERSATION = Conversation(max_pixels=84 * 84, min_pixels=56 * 56, token_budgets=(10, 8), min_box_side=14)
GOOD, BAD = '[{"bbox_2d": [10, 10, 40, 50]}]', "nowhere"
LETTER = r"It is \boxed{B}."


def load_example():
    spec = importlib.util.spec_from_file_location("vllm_client", ROOT / "examples" / "vllm_client.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


client = load_example()


class Server:
    """Speaks `/v1/models` and `/v1/chat/completions`; keeps the requests, writes the turns that it is told to."""

    def __init__(self):
        self.bodies, self.keys, self.turns, self.finish = [], [], [], "stop"
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.answer({"object": "list", "data": [{"id": "served"}]} if self.path == "/v1/models" else None)

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.bodies.append(body)
                server.keys.append(self.headers["Authorization"])
                if self.path != "/v1/chat/completions" or not server.turns:
                    return self.answer(None)
                message = {"role": "assistant", "content": server.turns.pop(0)}
                self.answer({"choices": [{"index": 0, "message": message, "finish_reason": server.finish}]})

            def answer(self, value):
                data = json.dumps(value or {"error": {"message": "too many tokens"}}).encode()
                self.send_response(200 if value else 400)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def server():
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture(scope="module")
def model(tiny_dir):
    return GroundedVQA.from_pretrained(str(tiny_dir), device="cpu")


@pytest.fixture
def directory(tiny_dir, tmp_path):
    """The model's directory without its weights."""
    for path in tiny_dir.iterdir():
        if path.suffix in (".json", ".jinja"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    CONVERSATION.save(tmp_path)
    return tmp_path


def as_trained(model, conversation, turns, ended, image, question, choices):
    """The contexts that the model is asked to go on with where it writes these turns, and what comes of them."""
    vqa = GroundedVQA(model.generate.model, model.template.chat.processor, conversation)
    chat, contexts = vqa.template.chat, []

    def generate(batch):
        contexts.extend(batch)
        ids = chat.tokenizer(turns[batch[0].round - 1], add_special_tokens=False)["input_ids"]
        return [Sampled([*ids, chat.end_of_turn_id] if ended else ids)]

    vqa.generate = generate
    return vqa(image, question, choices), contexts, chat


def received(body):
    """Messages with image blocks as our prompts have them, and the images."""
    images, messages = [], []
    for message in body["messages"]:
        blocks = [message["content"]] if isinstance(message["content"], str) else message["content"]
        blocks = [{"type": "text", "text": block} if isinstance(block, str) else block for block in blocks]
        for block in blocks:
            if block["type"] == "image_url":
                data = base64.b64decode(block["image_url"]["url"].removeprefix("data:image/png;base64,"))
                images.append(Image.open(io.BytesIO(data)))
        kept = [{"type": "image"} if block["type"] == "image_url" else block for block in blocks]
        messages.append({**message, "content": kept})
    return messages, images


SYSTEM = replace(CONVERSATION, prompts=PromptTemplate(system="Look closely."))
CASES = {
    "a usable box": (CONVERSATION, [GOOD, LETTER], "stop"),
    "an unusable box": (CONVERSATION, [BAD, LETTER], "stop"),
    "a turn that was cut": (CONVERSATION, [GOOD, LETTER], "length"),
    "one round": (CONVERSATION.with_rounds(1), [LETTER], "stop"),
    "three rounds": (CONVERSATION.with_rounds(3), [GOOD, GOOD, LETTER], "stop"),
    "a system message": (SYSTEM, [GOOD, LETTER], "stop"),
}


@pytest.mark.parametrize("choices", [None, ["one", "two"]], ids=["free", "choices"])
@pytest.mark.parametrize("case", CASES)
def test_the_server_is_told_what_the_model_was_trained_on(case, choices, server, directory, model):
    conversation, turns, server.finish = CASES[case]
    server.turns = list(turns)
    conversation.save(directory)
    image = photo_row(0, (400, 200))["image"]["bytes"]
    rollout = client.ask(client.Endpoint(server.url), client.ModelFiles(directory), image, "How many?", choices)
    said, contexts, chat = as_trained(
        model, conversation, turns, server.finish == "stop", image, "How many?", choices
    )  # fmt: skip
    assert len(server.bodies) == len(contexts) == conversation.num_rounds
    for body, context in zip(server.bodies, contexts, strict=True):
        messages, images = received(body)
        assert chat.prompt_ids(messages, images) == context.ids
        assert [one.size for one in images] == [one.size for one in context.images]
        assert [one.tobytes() for one in images] == [one.tobytes() for one in context.images]
    assert [turn.text for turn in rollout.turns] == turns
    assert [turn.shown_px for turn in rollout.turns] == [turn.shown_px for turn in said.rollout.turns]


def test_a_request_in_full(server, directory):
    server.turns = [GOOD, LETTER]
    image = Image.new("RGB", (336, 336), (9, 90, 200))
    endpoint = client.Endpoint(server.url, key="secret")
    client.ask(endpoint, client.ModelFiles(directory), image, "How many?", temperature=0.5, max_tokens=9)
    first, second = server.bodies
    config = json.loads((directory / "config.json").read_text())
    vision = {str(config[f"{name}_token_id"]) for name in ("image", "video", "vision_start", "vision_end")}
    assert first["logit_bias"] == dict.fromkeys(vision, -100)
    wanted = {"model": "served", "temperature": 0.5, "top_p": 1.0, "top_k": -1, "repetition_penalty": 1.0}
    wanted["mm_processor_kwargs"] = {"min_pixels": 56 * 56, "max_pixels": 84 * 84}
    for body, tokens in ((first, 9), (second, 8)):
        assert {name: body[name] for name in wanted} == wanted and body["max_tokens"] == tokens
    assert server.keys == ["Bearer secret"] * 2
    assert [message["role"] for message in second["messages"]] == ["user", "assistant", "user"]


def test_the_processor_leaves_what_is_sent_as_it_is(server, directory, model):
    """The caps that go with a request are those that the images were fitted to."""
    processor = model.template.chat.processor
    for size in [(4000, 300), (30, 20), (336, 335), (85, 84)]:
        fitted = client.ModelFiles(directory).fit(Image.new("RGB", size))
        caps = {"min_pixels": CONVERSATION.min_pixels, "max_pixels": CONVERSATION.max_pixels}
        grid = processor.image_processor(images=[fitted], return_tensors="pt", **caps)["image_grid_thw"][0].tolist()
        assert (grid[2] * 14, grid[1] * 14) == fitted.size


def test_errors_name_the_server_and_what_it_said(server, directory):
    image, endpoint = Image.new("RGB", (336, 336)), client.Endpoint(server.url)
    with pytest.raises(ConnectionError, match="chat/completions answered 400.*too many tokens"):
        client.ask(endpoint, client.ModelFiles(directory), image, "How many?")
    (directory / "processor_config.json").unlink()
    with pytest.raises(ValueError, match="There is no processor_config.json"):
        client.ModelFiles(directory)
    with pytest.raises(ConnectionError, match=r"No server answers at http://127.0.0.1:9/v1 .* Start `vllm serve`"):
        client.Endpoint("http://127.0.0.1:9/v1")


def test_the_command(server, directory, tmp_path):
    server.turns = [GOOD, LETTER]
    Image.new("RGB", (336, 336)).save(tmp_path / "a.png")
    command = [sys.executable, str(ROOT / "examples" / "vllm_client.py"), str(directory), str(tmp_path / "a.png")]
    command += ["How many?", "--choices", "one", "two", "--url", server.url]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(PYTHONPATH=str(ROOT / "src")))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"Round 1: {GOOD}", "  box: ok, shown: (40, 40, 160, 200)", f"Round 2: {LETTER}", "Answer: B",
    ]  # fmt: skip
    done = subprocess.run([*command[:2], "x", *command[3:-1], "http://127.0.0.1:9"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("No server answers") and done.stdout == ""
