"""The conversation template, as data: what every turn says, never how it is tokenized.

A rollout of two rounds reads (MGPO, arXiv 2507.05920; the wording is this project's own)::

    user       <image> {question} + `grounding`             choices are withheld
    assistant  a fenced JSON list with one box               sampled, round 1
    user       <crop>  `crop_reply` + `answer_choices`       or <image> `fallback_reply` + `answer_choices`
    assistant  reasoning and \\boxed{C}                       sampled, round 2

With `num_rounds=1` the first user turn is `direct_*` instead (plain GRPO); with more than two rounds the replies
between carry `zoom_*` in place of the answer instruction.
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path

PROTOCOL_VERSION = 1
"""Raised, with a dated CHANGELOG line, whenever a default prompt or the turn order changes."""

_ALLOWED = {
    "system": (),
    "grounding": ("question",),
    "crop_reply": (),
    "fallback_reply": ("status",),
    "zoom_crop": ("question",),
    "zoom_original": ("question",),
    "answer_choices": ("question", "choices"),
    "answer_free": ("question",),
    "direct_choices": ("question", "choices"),
    "direct_free": ("question",),
}
_REQUIRED = {name: set(marks) - {"status"} for name, marks in _ALLOWED.items() if not name.startswith("zoom")}


@dataclass(frozen=True)
class PromptTemplate:
    r"""
    Text of every turn that the model does not write. `{question}`, `{choices}` and `{status}` are replaced; every
    other brace is kept, so JSON and `\boxed{}` need no escaping.

    Parameters:
        system (`str`, *optional*, defaults to `""`):
            System message. Empty leaves the choice to the model's own chat template.
        grounding (`str`):
            First turn of a rollout with two or more rounds. Takes `{question}`; never sees the choices.
        crop_reply (`str`):
            Opens a reply that carries the crop.
        fallback_reply (`str`):
            Opens a reply that carries the whole image because the box was unusable. May take `{status}`.
        zoom_crop (`str`), zoom_original (`str`):
            Ask for the next box, in replies before the last (only with three or more rounds): a box inside the image
            just shown, or inside the first image. May take `{question}`.
        answer_choices (`str`), answer_free (`str`):
            Ask for the boxed answer in the last reply, with and without choices.
        direct_choices (`str`), direct_free (`str`):
            The only turn of a one-round rollout, with and without choices.
    """

    system: str = ""
    grounding: str = (
        "{question}\n"
        "Do not answer yet. Find the part of the image that you need to see to answer, and reply with its box as"
        " JSON:\n"
        '```json\n[{"bbox_2d": [x1, y1, x2, y2], "label": "what it shows"}]\n```'
    )
    crop_reply: str = "This is the region that you chose, cut from the full-resolution image.\n"
    fallback_reply: str = "Your reply held no usable region ({status}), so this is the whole image once more.\n"
    zoom_crop: str = (
        "{question}\n"
        "Do not answer yet. Choose the part of this last image that you need to see closer, and reply with its box as"
        " JSON."
    )
    zoom_original: str = (
        "{question}\n"
        "Do not answer yet. Choose the part of the first image that you need to see next, and reply with its box as"
        " JSON."
    )
    answer_choices: str = (
        "{question}\n{choices}\n"
        "Use both images. Explain your reasoning, then put the letter of the right choice in \\boxed{}."
    )
    answer_free: str = "{question}\nUse both images. Explain your reasoning, then put the final answer in \\boxed{}."
    direct_choices: str = (
        "{question}\n{choices}\nExplain your reasoning, then put the letter of the right choice in \\boxed{}."
    )
    direct_free: str = "{question}\nExplain your reasoning, then put the final answer in \\boxed{}."

    def __post_init__(self):
        for name, marks in _ALLOWED.items():
            _check_part(name, getattr(self, name), marks)

    @property
    def fingerprint(self) -> str:
        """First 16 hex digits of the SHA-256 of all parts: equal fingerprints mean equal prompts."""
        text = json.dumps(asdict(self), sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def first_messages(self, question: str, choices: list[str] | None, num_rounds: int) -> list[dict]:
        """
        Messages before the first sampled turn: the optional system message and the first user turn with one image.

        Args:
            question (`str`): The question, without its choices.
            choices (`list[str]`, *optional*): Texts of the choices; shown only when `num_rounds` is 1.
            num_rounds (`int`): Number of sampled turns of the rollout.

        Returns:
            `list[dict]`: Messages whose contents are lists of blocks, as TRL and transformers expect.
        """
        if num_rounds > 1:
            text = _fill(self.grounding, question=question)
        elif choices:
            text = _fill(self.direct_choices, question=question, choices=_choice_lines(choices))
        else:
            text = _fill(self.direct_free, question=question)
        system = [{"role": "system", "content": [{"type": "text", "text": self.system}]}] if self.system else []
        return [*system, _user_turn(text)]

    def reply_message(
        self, question: str, choices: list[str] | None, status: str, is_last: bool, zoom_from: str = "crop"
    ) -> dict:
        """
        The fixed user turn between two rounds. It always carries exactly one image: the crop, or the whole image.

        Args:
            question (`str`): The question, without its choices.
            choices (`list[str]`, *optional*): Texts of the choices; shown only in the last reply.
            status (`str`): Value of the box status; `"ok"` announces a crop, anything else the whole image.
            is_last (`bool`): Whether the answer is asked for (`True`) or another box (`False`).
            zoom_from (`str`, *optional*, defaults to `"crop"`): Which image another box refers to, the last `"crop"`
            or
                the `"original"`.
        """
        opening = self.crop_reply if status == "ok" else _fill(self.fallback_reply, status=status.replace("_", " "))
        if not is_last:
            closing = _fill(self.zoom_crop if zoom_from == "crop" else self.zoom_original, question=question)
        elif choices:
            closing = _fill(self.answer_choices, question=question, choices=_choice_lines(choices))
        else:
            closing = _fill(self.answer_free, question=question)
        return _user_turn(opening + closing)


def load_prompts(path: str | Path | None) -> PromptTemplate:
    """
    Read a template from a YAML file that names the parts to replace; parts it does not name keep their default.

    Args:
        path (`str` or `Path`, *optional*): YAML file. `None` gives the default template.

    Raises:
        ValueError: The file is missing, is no mapping, names an unknown part, or a part misses a placeholder.
    """
    if path is None:
        return PromptTemplate()
    if not Path(path).is_file():
        raise ValueError(
            f"`prompts_file` does not exist: {str(path)!r}. Give the path of a YAML file, or leave it unset."
        )
    import yaml

    try:
        parts = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"`prompts_file` {str(path)!r} is not valid YAML: {error}. Correct the file.") from error
    if not isinstance(parts, dict):
        raise ValueError(f"`prompts_file` {str(path)!r} must map part names to texts, got {type(parts).__name__}.")
    known = [field.name for field in fields(PromptTemplate)]
    if unknown := sorted(str(name) for name in set(parts) - set(known)):
        raise ValueError(f"`prompts_file` {str(path)!r} names unknown parts {unknown}. Known parts: {known}.")
    return PromptTemplate(**parts)


def _check_part(name: str, text: object, marks: tuple[str, ...]) -> None:
    if not isinstance(text, str):
        raise ValueError(f"Prompt part `{name}` must be a text, got {type(text).__name__}. Quote it in the YAML file.")
    for mark in _REQUIRED.get(name, ()):
        if "{" + mark + "}" not in text:
            raise ValueError(f"Prompt part `{name}` has no {{{mark}}}: {text!r}. Put {{{mark}}} where it belongs.")
    for mark in ("question", "choices", "status"):
        if "{" + mark + "}" in text and mark not in marks:
            raise ValueError(
                f"Prompt part `{name}` can not hold {{{mark}}}: {text!r}. It takes {list(marks) or 'none'}."
            )


def _fill(text: str, **values: str) -> str:
    """Replace the marks in one pass, so that a question which contains `{choices}` stays as it is."""
    return re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), text)


def _choice_lines(choices: list[str]) -> str:
    return "\n".join(f"({chr(ord('A') + i)}) {choice}" for i, choice in enumerate(choices))


def _user_turn(text: str) -> dict:
    return {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
