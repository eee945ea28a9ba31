"""The rollout: a question, its turns, and the loop that alternates sampling with cropping.

Training, evaluation and inference call the same [`run_rounds`] with different generators. Token ids are plain lists
here: this module knows neither tensors nor tokenizers. What it needs from a tokenizer and an image processor comes
through the [`Chat`] protocol.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

from PIL import Image

from .boxes import Box, BoxStatus, parse_box
from .geometry import MAX_ASPECT, view_to_original
from .images import crop_original, open_image
from .prompts import PromptTemplate

PixelBox = tuple[int, int, int, int]


class Chat(Protocol):
    """What the loop asks of a tokenizer and an image processor; see [`~mgpo_trl.processing.VisionChat`]."""

    def fit(self, image: Image.Image) -> Image.Image: ...

    def prompt_ids(self, messages: list[dict], images: Sequence[Image.Image]) -> list[int]: ...

    def reply_ids(self, message: dict, image: Image.Image) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def ends_turn(self, token_id: int) -> bool: ...

    @property
    def end_of_turn_id(self) -> int: ...


class Sampled(NamedTuple):
    """What a generator returns for one context."""

    ids: list[int]
    """Sampled ids, exactly as sampled, up to and including the first end-of-turn token."""
    logprobs: list[float] | None = None
    """Log-probability of each sampled id under the sampler, where the generator knows it."""


class Context(NamedTuple):
    """What a generator is asked to continue."""

    ids: list[int]
    """Prompt and every turn so far, image placeholders expanded."""
    images: list[Image.Image]
    """Fitted images in the order of their placeholders."""
    round: int
    """1 for the first sampled turn."""


Generate = Callable[[list[Context]], list[Sampled]]


@dataclass
class Turn:
    """One sampled turn, and the fixed reply that follows it."""

    ids: list[int]
    """Sampled ids; never re-encoded, cut or overwritten."""
    text: str
    """Decoded ids without special tokens: what the box or the answer is parsed from."""
    truncated: bool
    """Whether the token budget ended the turn (no end-of-turn token was sampled)."""
    logprobs: list[float] | None = None
    """Log-probabilities under the sampler, one for each id, if it gave them."""
    box: Box | None = None
    """The parsed box; `None` on the last turn, which answers."""
    box_original_px: PixelBox | None = None
    """The box in pixels of the original image; `None` unless the status is `OK`."""
    reply_ids: list[int] = field(default_factory=list)
    """Ids that we append after this turn: a missing end of turn, then the reply. Not the model's."""
    reply_image: Image.Image | None = None
    """The fitted image that the reply carries: the crop, or the view of the whole image."""


@dataclass
class Rollout:
    """One conversation about one image, from the prompt to the answer."""

    id: str
    """Id of the dataset row."""
    question: str
    """The question, without its choices."""
    image: Image.Image
    """The original image: every crop is cut from it. Shared between the rollouts of a group, never copied."""
    view: Image.Image
    """The original fitted into the pixel budget: what round 1 sees."""
    prompt_ids: list[int]
    """Ids of everything before the first sampled turn."""
    choices: list[str] | None = None
    """Texts of the choices, or `None` for a free-form question."""
    answer: str | None = None
    """The right letter or text. Nothing in the rollout loop reads it."""
    category: str | None = None
    """Category of the row, for reports."""
    target_boxes: list[PixelBox] | None = None
    """Boxes of the evidence in original pixels, where known. Nothing in the rollout loop reads them."""
    turns: list[Turn] = field(default_factory=list)
    """Sampled turns so far."""

    @property
    def images(self) -> list[Image.Image]:
        """Fitted images in the order of their placeholders: the view, then one for each reply."""
        return [self.view, *(turn.reply_image for turn in self.turns if turn.reply_image is not None)]

    @property
    def boxes(self) -> list[Box]:
        """The parsed boxes, one for each round before the last."""
        return [turn.box for turn in self.turns if turn.box is not None]

    @property
    def crops(self) -> list[Image.Image | None]:
        """The fitted crops, one for each round before the last; `None` where the box was unusable."""
        return [turn.reply_image if turn.box.ok else None for turn in self.turns if turn.box is not None]

    def to_record(self) -> dict:
        """The rollout as a JSON object for `rollouts.jsonl`: texts, boxes and sizes, no pixels."""
        return {
            "id": self.id,
            "question": self.question,
            "choices": self.choices,
            "answer": self.answer,
            "category": self.category,
            "image": {"size": list(self.image.size)},
            "view_size": list(self.view.size),
            "target_boxes": [list(box) for box in self.target_boxes] if self.target_boxes else None,
            "num_rounds": len(self.turns),
            "turns": [_turn_record(number, turn) for number, turn in enumerate(self.turns, start=1)],
        }


@dataclass(frozen=True)
class RoundTemplate:
    """Everything fixed about a conversation: the words, the tokenizer, and how a box is read."""

    prompts: PromptTemplate
    """What the turns say."""
    chat: Chat
    """How the turns are tokenized and the images fitted."""
    coordinates: str
    """`"absolute"` or `"relative_1000"`; see [`~mgpo_trl.boxes.resolve_coordinates`]."""
    min_box_side: int = 28
    """A side of a usable box is longer than this many view pixels (paper: 28)."""
    max_box_aspect: float = 100
    """The longer side of a usable box is less than this many times the shorter (paper: 100)."""
    zoom_from: str = "crop"
    """With three or more rounds: whether the next box is read in the last `"crop"` or in the `"original"`."""

    def start(self, row: dict, image: Image.Image, view: Image.Image, num_rounds: int) -> Rollout:
        """
        Open a rollout.

        Args:
            row (`dict`): A canonical row, see [`~mgpo_trl.data.schema.normalise_row`].
            image (`PIL.Image.Image`): The original image.
            view (`PIL.Image.Image`): The original fitted by `chat.fit`, shared by a group.
            num_rounds (`int`): Number of sampled turns that the rollout will have.
        """
        messages = self.prompts.first_messages(row["question"], row.get("choices"), num_rounds)
        return Rollout(
            id=str(row["id"]),
            question=row["question"],
            image=image,
            view=view,
            prompt_ids=self.chat.prompt_ids(messages, [view]),
            choices=row.get("choices"),
            answer=row.get("answer"),
            category=row.get("category"),
            target_boxes=[tuple(box) for box in row["target_boxes"]] if row.get("target_boxes") else None,
        )

    def reply(self, rollout: Rollout, turn: Turn, is_last: bool) -> dict:
        """The user message that answers a turn with a box."""
        return self.prompts.reply_message(
            rollout.question, rollout.choices, turn.box.status.value, is_last, self.zoom_from
        )


class FlatRollout(NamedTuple):
    """A rollout as the loss sees it; see [`flatten`]."""

    ids: list[int]
    """Prompt and completion, length P + C."""
    turn_ids: list[int]
    """For each completion token the round that sampled it, 0 where it was appended, length C."""
    images: list[Image.Image]
    """Fitted images in the order of their placeholders."""

    @property
    def completion_ids(self) -> list[int]:
        """The last C ids."""
        return self.ids[len(self.ids) - len(self.turn_ids) :]


def start_rollouts(rows: Sequence[dict], template: RoundTemplate, num_rounds: int) -> list[Rollout]:
    """
    Open a rollout for every row. Rows that show the same file share one decoded image and one view.

    Args:
        rows (`Sequence[dict]`): Canonical rows, see [`~mgpo_trl.data.schema.normalise_row`]; repeats are welcome.
        template ([`RoundTemplate`]): The fixed parts of the conversation.
        num_rounds (`int`): Number of sampled turns that the rollouts will have.

    Raises:
        ImageError: An image can not be opened; the message names its row.
        ValueError: An image has no size within the pixel budget; the message names its row.
    """
    opened: dict = {}
    rollouts = []
    for index, row in enumerate(rows):
        row = {**row, "id": row.get("id", f"#{index} of the batch")}
        key = _image_key(row["image"])
        if key not in opened:
            opened[key] = _open_and_fit(row, template.chat)
        rollouts.append(template.start(row, *opened[key], num_rounds))
    return rollouts


def run_rounds(
    rollouts: Sequence[Rollout], generate: Generate, template: RoundTemplate, num_rounds: int = 2
) -> Sequence[Rollout]:
    """
    Play every round of every rollout: sample, and between rounds read the box, crop the original and reply.

    `generate` is called once a round with one context for each rollout, in order. Every rollout has `num_rounds` turns
    afterwards, whatever the model wrote: an unusable box gets the whole image back and a status that says why.

    Args:
        rollouts (`Sequence[Rollout]`): Fresh rollouts; their `turns` are filled in place.
        generate (`Callable`): Takes a list of [`Context`], returns a list of [`Sampled`] of the same length.
        template ([`RoundTemplate`]): The fixed parts of the conversation.
        num_rounds (`int`, *optional*, defaults to `2`): 1 is plain GRPO, 2 is MGPO, more zoom in again.

    Returns:
        `Sequence[Rollout]`: The same rollouts.

    Raises:
        ValueError: The generator returned another number of samples than it was given contexts.
    """
    fitted_crops: dict[tuple, Image.Image] = {}
    for number in range(1, num_rounds + 1):
        contexts = [Context(_context_ids(rollout), rollout.images, number) for rollout in rollouts]
        samples = generate(contexts)
        if len(samples) != len(contexts):
            raise ValueError(
                f"The generator returned {len(samples)} samples for {len(contexts)} contexts in round {number}. It "
                "must return one for each context, in order."
            )
        for rollout, sample in zip(rollouts, samples, strict=True):
            rollout.turns.append(_sampled_turn(sample, template.chat))
            if number < num_rounds:
                _reply(rollout, template, number == num_rounds - 1, fitted_crops)
    return rollouts


def flatten(rollout: Rollout) -> FlatRollout:
    """
    Join prompt and turns by id concatenation and mark which tokens the model sampled.

    Worked example (P prompt, G grounding, E end of turn that we appended because the turn was cut, R reply text, I
    image placeholders of the crop, A answer)::

        ids      P P P | G G G E R R I I I R R A A A
        turn_ids       | 1 1 1 0 0 0 0 0 0 0 0 2 2 2

    Args:
        rollout ([`Rollout`]): A rollout after [`run_rounds`].

    Returns:
        [`FlatRollout`]: The ids, the turn ids of the completion, and the images by reference.
    """
    turn_ids: list[int] = []
    for number, turn in enumerate(rollout.turns, start=1):
        turn_ids += [number] * len(turn.ids) + [0] * len(turn.reply_ids)
    return FlatRollout(_context_ids(rollout), turn_ids, rollout.images)


def _image_key(image):
    """Equal for rows that show the same file: its bytes, else its path, else the object."""
    if isinstance(image, dict):
        return image.get("bytes") or image.get("path")
    return image if isinstance(image, (str, bytes)) else id(image)


def _open_and_fit(row: dict, chat: Chat) -> tuple[Image.Image, Image.Image]:
    image = open_image(row["image"], str(row["id"]))
    try:
        return image, chat.fit(image)
    except ValueError as error:
        raise ValueError(f"The image of row {row['id']!r} can not be shown ({image.size} pixels): {error}") from error


def _context_ids(rollout: Rollout) -> list[int]:
    ids = list(rollout.prompt_ids)
    for turn in rollout.turns:
        ids += turn.ids
        ids += turn.reply_ids
    return ids


def _sampled_turn(sample: Sampled, chat: Chat) -> Turn:
    ids = list(sample.ids)
    truncated = not ids or not chat.ends_turn(ids[-1])
    return Turn(ids, chat.decode(ids), truncated, sample.logprobs)


def _reply(rollout: Rollout, template: RoundTemplate, is_last: bool, fitted_crops: dict) -> None:
    """Read the box of the last turn, and append the reply with the crop or with the whole image."""
    turn = rollout.turns[-1]
    frame, frame_view = _frame(rollout, template)
    turn.box = parse_box(
        turn.text,
        frame_view.size,
        template.coordinates,
        min_side=template.min_box_side,
        max_aspect=template.max_box_aspect,
    )
    if turn.box.ok:
        _place_box(turn, frame_view.size, frame)
    if turn.box.ok:
        turn.reply_image = _fitted_crop(rollout.image, turn.box_original_px, template.chat, fitted_crops)
    else:
        turn.reply_image = rollout.view
    message = template.reply(rollout, turn, is_last)
    ended = bool(turn.ids) and turn.ids[-1] == template.chat.end_of_turn_id
    closing = [] if ended else [template.chat.end_of_turn_id]
    turn.reply_ids = closing + template.chat.reply_ids(message, turn.reply_image)


def _frame(rollout: Rollout, template: RoundTemplate) -> tuple[PixelBox, Image.Image]:
    """The region of the original that the next box refers to, and the fitted image that shows it."""
    if template.zoom_from == "crop" and len(rollout.turns) > 1 and rollout.turns[-2].box_original_px is not None:
        return rollout.turns[-2].box_original_px, rollout.turns[-2].reply_image
    return (0, 0, *rollout.image.size), rollout.view


def _place_box(turn: Turn, view_size: tuple[int, int], frame: PixelBox) -> None:
    """Map a usable box to the original. Where no processor would show its crop, the box is too narrow after all."""
    left, top, right, bottom = _box_in_original(turn.box.box_view_px, view_size, frame)
    short, long = sorted((right - left, bottom - top))
    if long > MAX_ASPECT * short:
        turn.box = replace(turn.box, status=BoxStatus.TOO_NARROW, box_view_px=None)
    else:
        turn.box_original_px = (left, top, right, bottom)


def _box_in_original(box_view_px: PixelBox, view_size: tuple[int, int], frame: PixelBox) -> PixelBox:
    left, top, right, bottom = frame
    x1, y1, x2, y2 = view_to_original(box_view_px, view_size, (right - left, bottom - top))
    return (left + x1, top + y1, left + x2, top + y2)


def _fitted_crop(image: Image.Image, box: PixelBox, chat: Chat, fitted_crops: dict) -> Image.Image:
    """Rollouts of a group often name the same box: cut and fit it once."""
    key = (id(image), box)
    if key not in fitted_crops:
        fitted_crops[key] = chat.fit(crop_original(image, box))
    return fitted_crops[key]


def _turn_record(number: int, turn: Turn) -> dict:
    return {
        "round": number,
        "text": turn.text,
        "num_tokens": len(turn.ids),
        "truncated": turn.truncated,
        "box": None if turn.box is None else _box_record(turn),
    }


def _box_record(turn: Turn) -> dict:
    crop = turn.box_original_px
    return {
        "status": turn.box.status.value,
        "box_text": turn.box.box_text,
        "box_view_px": turn.box.box_view_px,
        "box_original_px": crop,
        "crop_size": None if crop is None else [crop[2] - crop[0], crop[3] - crop[1]],
    }
