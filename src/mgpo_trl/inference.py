"""A trained model asked as it was trained: `GroundedVQA`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from PIL import Image

from .answer_picture import draw_answer
from .answers import extract_answer, parse_choices
from .boxes import format_box
from .conversation import Conversation, load_conversation
from .generation import ModelGenerator, end_ids, load_for_inference
from .geometry import MAX_ASPECT, view_to_original
from .hub import download
from .image_loading import image_key, open_and_fit
from .rollout import Context, CropPolicy, Generate, Rollout, RoundTemplate, Sampled, run_rounds, start_rollouts

PixelBox = tuple[int, int, int, int]


@dataclass(frozen=True)
class Question:
    """One question about one image."""

    image: object
    """A path, the bytes of a file, or a `PIL.Image.Image`."""
    question: str
    """The question, without its choices."""
    choices: Sequence[str] | None = None
    """Texts of the choices; `None` for a free-form question."""
    box: PixelBox | None = None
    """A region chosen by hand, (x1, y1, x2, y2) in original pixels, in place of the first that the model names."""


@dataclass(frozen=True)
class GroundedAnswer:
    """What a model answered, and what it looked at."""

    answer: str | None
    r"""The letter (or the text) in the last `\boxed{}`; `None` where there is none."""
    text: str
    """The whole answer turn."""
    box: PixelBox | None
    """The last region that came back, in original pixels; `None` for a direct answer or an unusable box."""
    status: str | None
    """Status of the model's last box, `"by_hand"` for a region chosen by hand, `None` for a direct answer."""
    crop: Image.Image | None
    """That region as the model saw it."""
    rollout: Rollout
    """The conversation: its turns, the original image and the view."""

    @property
    def turns(self) -> list[str]:
        """What the model wrote, round by round; where a region was chosen by hand, the first is ours."""
        return [turn.text for turn in self.rollout.turns]

    @property
    def words(self) -> str:
        """The answer in words: a letter with the text of its choice, or that there is none."""
        if self.answer is None:
            return "no boxed answer"
        choices = self.rollout.choices
        return f"({self.answer}) {choices[ord(self.answer) - ord('A')]}" if choices else self.answer

    @property
    def no_crop(self) -> str:
        """Why there is no crop, in words; empty where there is one."""
        if self.crop is not None:
            return ""
        return "answered directly" if self.status is None else f"no crop: {self.status.replace('_', ' ')}"

    def picture(self) -> Image.Image:
        """A picture of it: the question, the view with the region, the crop, the answer."""
        rollout = self.rollout
        return draw_answer(
            rollout.view, rollout.image.size, self.box, self.crop, rollout.question, self.words, self.no_crop
        )


class GroundedVQA:
    """
    Asks a model with the rounds, prompts, pixel caps and box rules that it was trained with.

    ```python
    vqa = GroundedVQA.from_pretrained("outputs/run")
    said = vqa("street.jpg", "What is the number on the door?", choices=["12", "21", "7"])
    said.answer, said.box, said.crop
    ```

    Args:
        model ([`~transformers.PreTrainedModel`]): The model, in evaluation mode on its device.
        processor ([`~transformers.ProcessorMixin`]): Its processor.
        conversation ([`~mgpo_trl.conversation.Conversation`]): The conversation that it was trained with.
        temperature (`float`, *optional*, defaults to `0.0`): 0 decodes greedily.
        batch_size (`int`, *optional*, defaults to `8`): Questions generated at once.
    """

    def __init__(self, model, processor, conversation: Conversation, temperature: float = 0.0, batch_size: int = 8):
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be >= 1, got {batch_size}.")
        self.conversation, self.batch_size = conversation, batch_size
        self.template = conversation.template(processor, model.config.model_type, end_ids(model))
        self.generate = ModelGenerator(model, self.template.chat, conversation.token_budgets, temperature)

    @classmethod
    def from_pretrained(
        cls,
        path: str,
        base_model: str | None = None,
        *,
        num_rounds: int | None = None,
        temperature: float = 0.0,
        batch_size: int = 8,
        dtype: str = "auto",
        device: str | None = None,
        revision: str | None = None,
    ) -> "GroundedVQA":
        """
        Load a model directory, a Hub id, or a LoRA adapter with its base.

        Args:
            path (`str`): Model or adapter; its `conversation.json` says how to ask (the paper's defaults without).
            base_model (`str`, *optional*): Base of an adapter; the one that it names when not given.
            num_rounds (`int`, *optional*): Another number of rounds than it was trained with.
            temperature (`float`, *optional*, defaults to `0.0`): 0 decodes greedily.
            batch_size (`int`, *optional*, defaults to `8`): Questions generated at once.
            dtype (`str`, *optional*, defaults to `"auto"`): Precision of the weights.
            device (`str`, *optional*): Device; the accelerator when there is one.
            revision (`str`, *optional*): Branch, tag or commit of a Hub repository.

        Raises:
            ValueError: There is no such model, or it is not of a supported family.
        """
        from .builtin.tiny import register_processor

        register_processor()  # a model that the built-in run saved may be asked
        path = path if revision is None else download(path, revision)
        conversation = load_conversation(path)
        if num_rounds is not None:
            conversation = conversation.with_rounds(num_rounds)
        model, processor = load_for_inference(path, base_model, dtype, device)
        return cls(model, processor, conversation, temperature, batch_size)

    def __call__(
        self, image, question: str, choices: Sequence[str] | None = None, box: PixelBox | None = None
    ) -> GroundedAnswer:
        """
        Ask one question.

        Args:
            image (`str`, `bytes` or `PIL.Image.Image`): The image.
            question (`str`): The question, without its choices.
            choices (`Sequence[str]`, *optional*): Texts of the choices.
            box (`tuple[int, int, int, int]`, *optional*): A region by hand, see [`Question`].

        Raises:
            ImageError: The image cannot be opened.
            ValueError: The choices or the region cannot be used; the message says why.
        """
        return self.batch([Question(image, question, choices, box)])[0]

    def batch(self, questions: Sequence[Question]) -> list[GroundedAnswer]:
        """Ask many questions, `batch_size` at a time."""
        answers: list[GroundedAnswer] = []
        for start in range(0, len(questions), self.batch_size):
            answers += self._play(questions[start : start + self.batch_size])
        return answers

    def _play(self, questions: Sequence[Question]) -> list[GroundedAnswer]:
        rounds = self.conversation.num_rounds
        rows = [_row(number, question) for number, question in enumerate(questions)]
        opened = {image_key(row["image"]): open_and_fit(row, self.template.chat) for row in rows}
        rollouts = start_rollouts(rows, self.template, rounds, opened)
        by_hand = {id(r): q.box for r, q in zip(rollouts, questions, strict=True) if q.box is not None}
        if by_hand and rounds < 2:
            raise ValueError("A region by hand needs two rounds, and this conversation has one. Pass `num_rounds=2`.")
        _check_regions(rollouts, by_hand)
        template = replace(self.template, crop_policy=_crop_of(by_hand))
        run_rounds(rollouts, _with_regions(self.generate, rollouts, by_hand, template), template, rounds)
        return [_answer(rollout) for rollout in rollouts]


def _row(number: int, question: Question) -> dict:
    if not question.question.strip():
        raise ValueError("There is no question. Give its text, without the choices.")
    choices = None if question.choices is None else parse_choices(list(question.choices))
    image = question.image
    if isinstance(image, (bytes, bytearray)):
        image = {"bytes": bytes(image), "path": None}
    return {"id": f"question {number}", "image": image, "question": question.question, "choices": choices}


def _check_regions(rollouts: Sequence[Rollout], by_hand: dict[int, PixelBox]) -> None:
    for rollout in rollouts:
        if id(rollout) in by_hand:
            _check_region(by_hand[id(rollout)], rollout.image.size)


def _check_region(box: PixelBox, size: tuple[int, int]) -> None:
    x1, y1, x2, y2 = box
    if not (0 <= x1 < x2 <= size[0] and 0 <= y1 < y2 <= size[1]):
        raise ValueError(
            f"The region {tuple(box)} is not inside the image of {size} pixels, or is empty. Give (x1, y1, x2, y2) in "
            "original pixels."
        )
    short, long = sorted((x2 - x1, y2 - y1))
    if long > MAX_ASPECT * short:
        raise ValueError(
            f"The region {tuple(box)} is more than {MAX_ASPECT} times as long as it is wide, which no model can be "
            "shown. Make it wider."
        )


def _crop_of(by_hand: dict[int, PixelBox]) -> CropPolicy:
    """The first region that comes back is the one chosen by hand, to the pixel; later ones are the model's."""

    def policy(rollout: Rollout, named: PixelBox | None) -> PixelBox | None:
        return by_hand.get(id(rollout), named) if len(rollout.turns) == 1 else named

    return policy


def _with_regions(generate: Generate, rollouts, by_hand: dict[int, PixelBox], template: RoundTemplate) -> Generate:
    """The generator, with the first turn of some rollouts written by us: the box that was chosen by hand."""

    def generated(contexts: list[Context]) -> list[Sampled]:
        if contexts[0].round > 1 or not by_hand:
            return generate(contexts)
        asked = [number for number, rollout in enumerate(rollouts) if id(rollout) not in by_hand]
        sampled = dict(zip(asked, generate([contexts[number] for number in asked]) if asked else [], strict=True))
        return [
            sampled[number] if number in sampled else _written(rollout, by_hand[id(rollout)], template)
            for number, rollout in enumerate(rollouts)
        ]

    return generated


def _written(rollout: Rollout, box: PixelBox, template: RoundTemplate) -> Sampled:
    """A first turn of ours that names the smallest box of whole view pixels around the region."""
    seen = view_to_original(box, rollout.image.size, rollout.view.size)  # outwards, the other way round
    text = format_box(seen, rollout.view.size, template.coordinates)
    ids = template.chat.tokenizer(text, add_special_tokens=False)["input_ids"]
    return Sampled([*ids, template.chat.end_of_turn_id], given=True)


def _answer(rollout: Rollout) -> GroundedAnswer:
    text, grounding = rollout.turns[-1].text, rollout.turns[-2] if len(rollout.turns) > 1 else None
    status = None if grounding is None else "by_hand" if grounding.given else grounding.box.status.value
    usable = grounding is not None and grounding.shown_px is not None
    return GroundedAnswer(
        answer=extract_answer(text, rollout.choices),
        text=text,
        box=grounding.shown_px if usable else None,
        status=status,
        crop=grounding.reply_image if usable else None,
        rollout=rollout,
    )


__all__ = ["GroundedAnswer", "GroundedVQA", "Question"]
