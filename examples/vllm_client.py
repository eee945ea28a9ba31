r"""
Ask a model that vLLM serves, in the rounds that it was trained with. The standard library talks to the server.

    vllm serve outputs/merged --limit-mm-per-prompt '{"image": 2}'
    python examples/vllm_client.py outputs/merged street.jpg "What is the number on the door?" --choices 12 21 7

The rounds, prompts, pixel caps and box rules come from the model's directory (`conversation.json`), and the loop is
`mgpo_trl.rollout.run_rounds`, as in training: the first request carries the view, the second the view and the crop.
Images are sent as PNG at the size that the model saw in training, with the same pixel caps, so that vLLM leaves them
as they are. No weights are read here: a copy of the directory without them will do.

What differs from training: the server turns the text of the first turn into tokens again, which need not be the tokens
that were sampled, though they spell the same.
"""

import argparse
import base64
import io
import json
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

from PIL import Image

from mgpo_trl.answers import extract_answer, parse_choices
from mgpo_trl.cli.terminal import printable
from mgpo_trl.conversation import Conversation
from mgpo_trl.processing import fitted_size, vision_token_ids
from mgpo_trl.rollout import Context, Rollout, Sampled, run_rounds, start_rollouts

TIMEOUT = 600
"""Seconds that a turn may take."""


class ModelFiles:
    """
    What the small files of a model directory say.

    Args:
        directory (`str` or `Path`): Holds `config.json`, the processor's configuration, and `conversation.json` (the
            paper's defaults without).
    """

    def __init__(self, directory: str | Path):
        directory = Path(directory)
        config, images = _read_json(directory / "config.json"), _image_settings(directory)
        self.conversation = Conversation.load(directory) or Conversation()
        self.model_type: str = config["model_type"]
        self.vision_token_ids = vision_token_ids(SimpleNamespace(**config))
        self.factor: int = images["patch_size"] * images["merge_size"]
        self.resample: int = images.get("resample", Image.Resampling.BICUBIC)

    def fit(self, image: Image.Image) -> Image.Image:
        """The image at the size that the model sees it."""
        caps = self.conversation.min_pixels, self.conversation.max_pixels
        return image.resize(fitted_size(image.size, self.factor, *caps), self.resample)


def _image_settings(directory: Path) -> dict:
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (directory / name).is_file():
            settings = _read_json(directory / name)
            return settings.get("image_processor", settings)
    raise ValueError(f"There is no processor_config.json in '{directory}'. Give the directory of the served model.")


def _read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


class MessageChat:
    """
    Stands where training has a tokenizer, see `mgpo_trl.rollout.Chat`. An endpoint takes messages, so that an "id" is
    the number of a whole message here, and -1 says that the model ended its turn.

    Args:
        fit (`Callable`): Gives an image the size that the model sees it at.
    """

    end_of_turn_id = -1

    def __init__(self, fit):
        self.fit = fit
        self.messages: list[dict] = []

    def prompt_ids(self, messages: list[dict], images: Sequence[Image.Image]) -> list[int]:
        """Ids of the messages before the first turn."""
        return [self._add(message) for message in messages]

    def reply_ids(self, message: dict, image: Image.Image) -> list[int]:
        """Id of a reply."""
        return [self._add(message)]

    def turn_ids(self, text: str, ended: bool) -> list[int]:
        """Ids of a turn that the model wrote."""
        return [self._add({"role": "assistant", "content": text}), *([self.end_of_turn_id] if ended else [])]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of a turn."""
        return "".join(self.messages[number]["content"] for number in ids if number != self.end_of_turn_id)

    def ends_turn(self, token_id: int) -> bool:
        """Whether the model ended its turn."""
        return token_id == self.end_of_turn_id

    def for_endpoint(self, context: Context) -> list[dict]:
        """The messages of a context, with its images in place."""
        images = iter(context.images)
        messages = [self.messages[number] for number in context.ids if number != self.end_of_turn_id]
        return [_with_images(message, images) for message in messages]

    def _add(self, message: dict) -> int:
        self.messages.append(message)
        return len(self.messages) - 1


def _with_images(message: dict, images) -> dict:
    if isinstance(message["content"], str):
        return message
    blocks = [
        {"type": "image_url", "image_url": {"url": data_url(next(images))}} if block["type"] == "image" else block
        for block in message["content"]
    ]
    return {**message, "content": blocks}


def data_url(image: Image.Image) -> str:
    """An image as a PNG inside a URL: no pixel is lost."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


class Endpoint:
    """
    An OpenAI-compatible server.

    Args:
        url (`str`): Such as `http://localhost:8000/v1`.
        key (`str`, *optional*): API key, where the server asks for one.
    """

    def __init__(self, url: str, key: str | None = None):
        self.url, self.key = url.rstrip("/"), key
        self.model: str = self._call("models")["data"][0]["id"]

    def complete(self, **body) -> dict:
        """The first choice of a chat completion: `message` and `finish_reason`."""
        return self._call("chat/completions", {"model": self.model, **body})["choices"][0]

    def _call(self, path: str, body: dict | None = None) -> dict:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/{path}", data, headers)
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            raise ConnectionError(f"{request.full_url} answered {error.code}: {error.read().decode()}") from error
        except urllib.error.URLError as error:
            raise ConnectionError(f"No server answers at {self.url} ({error.reason}). Start `vllm serve`.") from error


class EndpointGenerator:
    """
    Continues contexts by one turn, for `run_rounds`.

    Args:
        endpoint ([`Endpoint`]): The server.
        files ([`ModelFiles`]): The model's settings.
        chat ([`MessageChat`]): Knows the messages.
        temperature (`float`): 0 decodes greedily.
        max_tokens (`int`, *optional*): Most tokens of a turn, below the budgets of training.
    """

    def __init__(self, endpoint: Endpoint, files: ModelFiles, chat: MessageChat, temperature, max_tokens):
        self.endpoint, self.files, self.chat = endpoint, files, chat
        self.temperature, self.max_tokens = temperature, max_tokens

    def __call__(self, contexts: list[Context]) -> list[Sampled]:
        """One request for each context."""
        return [self._continue(context) for context in contexts]

    def _continue(self, context: Context) -> Sampled:
        conversation = self.files.conversation
        budget = conversation.token_budgets[context.round - 1]
        choice = self.endpoint.complete(
            messages=self.chat.for_endpoint(context),
            max_tokens=min(budget, self.max_tokens or budget),
            temperature=self.temperature,
            # What is not said here would come from the checkpoint: the published Qwen2.5-VL penalises repetition.
            top_p=1.0,
            top_k=-1,
            repetition_penalty=1.0,
            logit_bias={str(token_id): -100 for token_id in self.files.vision_token_ids},
            mm_processor_kwargs={"min_pixels": conversation.min_pixels, "max_pixels": conversation.max_pixels},
        )
        return Sampled(self.chat.turn_ids(choice["message"]["content"] or "", choice["finish_reason"] == "stop"))


def ask(
    endpoint: Endpoint,
    files: ModelFiles,
    image,
    question: str,
    choices: Sequence[str] | None = None,
    temperature: float = 0.0,
    max_tokens: int | None = None,
) -> Rollout:
    """
    Play one conversation.

    Args:
        endpoint ([`Endpoint`]): The server.
        files ([`ModelFiles`]): The model's settings.
        image (`str`, `dict` or `PIL.Image.Image`): A path, an image, or `{"bytes": ...}` with a file's contents. Crops
            are cut from it at its full size.
        question (`str`): The question, without its choices.
        choices (`Sequence[str]`, *optional*): Texts of the choices.
        temperature (`float`, *optional*, defaults to `0.0`): 0 decodes greedily.
        max_tokens (`int`, *optional*): Most tokens of a turn, where the budgets of training are more than the server's
            context has room for.

    Returns:
        [`~mgpo_trl.rollout.Rollout`]: Its turns, boxes and crops.
    """
    chat, num_rounds = MessageChat(files.fit), files.conversation.num_rounds
    template = files.conversation.template_with(chat, files.model_type)
    row = {"id": "question", "image": image, "question": question, "choices": choices and parse_choices(list(choices))}
    generate = EndpointGenerator(endpoint, files, chat, temperature, max_tokens)
    return run_rounds(start_rollouts([row], template, num_rounds), generate, template, num_rounds)[0]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; see the top of this file."""
    parser = argparse.ArgumentParser(
        description="Ask a model that vLLM serves, in the rounds that it was trained with."
    )
    parser.add_argument("model", help="directory of the served model; its weights are not read")
    parser.add_argument("image", help="image file")
    parser.add_argument("question", help="the question, without its choices")
    parser.add_argument("--choices", nargs="+", help="texts of the choices")
    parser.add_argument("--url", default="http://localhost:8000/v1", help="of the server (default: %(default)s)")
    parser.add_argument("--key", help="API key, where the server asks for one")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 decodes greedily (default)")
    parser.add_argument("--max_tokens", type=int, help="most tokens of a turn, below the budget of training")
    args = parser.parse_args(arguments)
    try:
        endpoint, files = Endpoint(args.url, args.key), ModelFiles(args.model)
        rollout = ask(endpoint, files, args.image, args.question, args.choices, args.temperature, args.max_tokens)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    for number, turn in enumerate(rollout.turns, start=1):
        print(f"Round {number}: {printable(turn.text)}")
        if turn.box is not None:
            print(f"  box: {turn.box.status.value}, shown: {turn.shown_px or 'the whole image'}")
    answer = extract_answer(rollout.turns[-1].text, rollout.choices)
    print(f"Answer: {'no boxed answer' if answer is None else printable(answer)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
