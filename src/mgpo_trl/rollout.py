"""The rollout: a question, its turns, and the loop that alternates sampling with cropping.

Training, evaluation and inference call the same [`run_rounds`] with different generators. Token ids are plain lists
here: this module knows neither tensors nor tokenizers. What it needs from a tokenizer and an image processor comes
through the [`Chat`] protocol.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

from PIL import Image

from .boxes import Box, BoxStatus, parse_box
from .geometry import MAX_ASPECT, view_to_original
from .image_loading import image_key, open_and_fit
from .images import LateImage, crop_original
from .prompts import PromptTemplate

PixelBox = tuple[int, int, int, int]
CropPolicy = Callable[["Rollout", PixelBox | None], PixelBox | None]
"""Decides which region of the original a reply shows. Gets the rollout and the region that the model named (`None`
where its box is unusable), in original pixels; returns the region, or `None` for the whole image as a fallback."""


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
    given: bool = False
    """Whether the ids were written for the model instead of sampled by it."""


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
    """Sampled ids; never re-encoded, cut or overwritten. Written ones where the turn was `given`."""
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
    shown_px: PixelBox | None = None
    """The region of the original that the reply shows; `None` for the whole image as a fallback. The named box, unless
    a crop policy decides otherwise."""
    reply_ids: list[int] = field(default_factory=list)
    """Ids that we append after this turn: a missing end of turn, then the reply. Not the model's."""
    reply_image: Image.Image | None = None
    """The fitted image that the reply carries: the crop, or the view of the whole image."""
    given: bool = False
    """Whether the turn was written for the model, such as a box chosen by hand: its ids carry turn id 0."""


@dataclass
class Rollout:
    """One conversation about one image, from the prompt to the answer."""

    id: str
    """Id of the dataset row."""
    question: str
    """The question, without its choices."""
    image: Image.Image | LateImage
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
    group: str | None = None
    """Rows of one group are not independent: intervals are clustered by it."""
    target_boxes: list[PixelBox] | None = None
    """Boxes of the evidence in original pixels, where known. Nothing in the rollout loop reads them."""
    coordinates: str = "absolute"
    """How the model writes boxes and points: `"absolute"` or `"relative_1000"`."""
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
        """The fitted crops, one for each round before the last; `None` where the whole image came back."""
        return [turn.reply_image if turn.shown_px else None for turn in self.turns if turn.box is not None]

    def to_record(self) -> dict:
        """The rollout as a JSON object for `rollouts.jsonl`: texts, boxes and sizes, no pixels."""
        return {
            "id": self.id,
            "question": self.question,
            "choices": self.choices,
            "answer": self.answer,
            "category": self.category,
            "group": self.group,
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
    crop_policy: CropPolicy | None = None
    """What comes back for a box; `None` shows what the model named (MGPO)."""

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
            group=row.get("group"),
            target_boxes=[tuple(box) for box in row["target_boxes"]] if row.get("target_boxes") else None,
            coordinates=self.coordinates,
        )

    def reply(self, rollout: Rollout, turn: Turn, is_last: bool) -> dict:
        """The user message that answers a turn with a box."""
        status = BoxStatus.OK if turn.shown_px else turn.box.status
        return self.prompts.reply_message(rollout.question, rollout.choices, status.value, is_last, self.zoom_from)

    def shown(self, rollout: Rollout, named: PixelBox | None) -> PixelBox | None:
        """The region that comes back for the one that the model named."""
        return named if self.crop_policy is None else self.crop_policy(rollout, named)


class Crops:
    """
    Fitted crops of a batch of rollouts. Rollouts of a group often name the same box: it is cut and fitted once.

    Args:
        chat ([`Chat`]): Fits images to the pixel budget.
        submit (`Callable`, *optional*): Runs a function in another thread and returns its `Future`. Without it, crops
            are made where they are needed.
    """

    def __init__(self, chat: Chat, submit: Callable[..., Future] | None = None):
        self._chat, self._submit = chat, submit
        self._futures: dict[tuple, Future] = {}
        self._made: dict[tuple, Image.Image] = {}

    def begin(self, image: Image.Image | LateImage, box: PixelBox) -> None:
        """Start on a crop that will be asked for."""
        key = (id(image), box)
        if self._submit is not None and key not in self._futures and key not in self._made:
            self._futures[key] = self._submit(self._make, image, box)

    def get(self, image: Image.Image | LateImage, box: PixelBox) -> Image.Image:
        """The crop; the same object for the same box of the same image."""
        key = (id(image), box)
        if key not in self._made:
            begun = self._futures.pop(key, None)
            # One that still stands behind other work, such as the next batch's images, is made here and now.
            is_elsewhere = begun is not None and not begun.cancel()
            self._made[key] = begun.result() if is_elsewhere else self._make(image, box)
        return self._made[key]

    def _make(self, image: Image.Image | LateImage, box: PixelBox) -> Image.Image:
        return self._chat.fit(crop_original(image, box))


class FlatRollout(NamedTuple):
    """A rollout as the loss sees it; see [`flatten`]."""

    ids: list[int]
    """Prompt and completion, length P + C."""
    turn_ids: list[int]
    """For each completion token the round that sampled it, 0 where it was appended or given, length C."""
    images: list[Image.Image]
    """Fitted images in the order of their placeholders."""

    @property
    def completion_ids(self) -> list[int]:
        """The last C ids."""
        return self.ids[len(self.ids) - len(self.turn_ids) :]


def start_rollouts(
    rows: Sequence[dict], template: RoundTemplate, num_rounds: int, opened: dict | None = None
) -> list[Rollout]:
    """
    Open a rollout for every row. Rows that show the same file share one decoded image and one view.

    Args:
        rows (`Sequence[dict]`): Canonical rows, see [`~mgpo_trl.data.schema.normalise_row`]; repeats are welcome.
        template ([`RoundTemplate`]): The fixed parts of the conversation.
        num_rounds (`int`): Number of sampled turns that the rollouts will have.
        opened (`dict`, *optional*): Image and view by [`~mgpo_trl.image_loading.image_key`], where they are open.

    Raises:
        ImageError: An image can not be opened; the message names its row.
        ValueError: An image has no size within the pixel budget; the message names its row.
    """
    opened = {} if opened is None else opened
    rollouts = []
    for row in with_ids(rows):
        key = image_key(row["image"])
        if key not in opened:
            opened[key] = open_and_fit(row, template.chat)
        rollouts.append(template.start(row, *opened[key], num_rounds))
    return rollouts


def with_ids(rows: Sequence[dict]) -> list[dict]:
    """The rows, each with an id: its own, or its place in the batch."""
    return [{**row, "id": row.get("id", f"#{index} of the batch")} for index, row in enumerate(rows)]


def run_rounds(
    rollouts: Sequence[Rollout],
    generate: Generate,
    template: RoundTemplate,
    num_rounds: int = 2,
    crops: Crops | None = None,
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
        crops ([`Crops`], *optional*): Where crops come from; some may have been begun while the model was sampling.

    Returns:
        `Sequence[Rollout]`: The same rollouts.

    Raises:
        ValueError: The generator returned another number of samples than it was given contexts.
    """
    crops = crops or Crops(template.chat)
    for number in range(1, num_rounds + 1):
        contexts = [Context(_context_ids(rollout), rollout.images, number) for rollout in rollouts]
        samples = generate(contexts)
        if len(samples) != len(contexts):
            raise ValueError(
                f"The generator returned {len(samples)} samples for {len(contexts)} contexts in round {number}. It "
                "must return one for each context, in order."
            )
        for rollout, sample in zip(rollouts, samples, strict=True):
            rollout.turns.append(sampled_turn(sample, template.chat))
        if number < num_rounds:
            _reply_to_all(rollouts, template, number == num_rounds - 1, crops)
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
        turn_ids += [0 if turn.given else number] * len(turn.ids) + [0] * len(turn.reply_ids)
    return FlatRollout(_context_ids(rollout), turn_ids, rollout.images)


def _context_ids(rollout: Rollout) -> list[int]:
    ids = list(rollout.prompt_ids)
    for turn in rollout.turns:
        ids += turn.ids
        ids += turn.reply_ids
    return ids


def sampled_turn(sample: Sampled, chat: Chat) -> Turn:
    """The turn that a sample makes, with its text."""
    ids = list(sample.ids)
    truncated = not ids or not chat.ends_turn(ids[-1])
    return Turn(ids, chat.decode(ids), truncated, sample.logprobs, given=sample.given)


def read_region(
    rollout: Rollout, text: str, template: RoundTemplate, before: Sequence[Turn]
) -> tuple[Box, PixelBox | None, PixelBox | None]:
    """
    Read the box of a turn, and decide what comes back for it.

    Args:
        rollout ([`Rollout`]): The rollout that the turn belongs to.
        text (`str`): The turn.
        template ([`RoundTemplate`]): How a box is read, and the crop policy.
        before (`Sequence[Turn]`): The turns before it.

    Returns:
        `tuple`: the box; the region that it names, in original pixels; and the region to be shown.
    """
    frame, frame_view = _frame(rollout, template, before)
    box = parse_box(
        text,
        frame_view.size,
        template.coordinates,
        min_side=template.min_box_side,
        max_aspect=template.max_box_aspect,
    )
    named = _box_in_original(box.box_view_px, frame_view.size, frame) if box.ok else None
    if named is not None and _is_too_long(named):
        box, named = replace(box, status=BoxStatus.TOO_NARROW, box_view_px=None), None
    return box, named, template.shown(rollout, named)


def _is_too_long(box: PixelBox) -> bool:
    """Whether no processor would show the crop: rounding to whole pixels can make a narrow box narrower."""
    short, long = sorted((box[2] - box[0], box[3] - box[1]))
    return long > MAX_ASPECT * short


def _reply_to_all(rollouts: Sequence[Rollout], template: RoundTemplate, is_last: bool, crops: Crops) -> None:
    """Read the box of every last turn, and reply; where crops have threads, they are cut side by side."""
    for rollout in rollouts:
        turn = rollout.turns[-1]
        turn.box, turn.box_original_px, turn.shown_px = read_region(rollout, turn.text, template, rollout.turns[:-1])
        if turn.shown_px is not None:
            crops.begin(rollout.image, turn.shown_px)
    for rollout in rollouts:
        _reply(rollout, template, is_last, crops)


def _reply(rollout: Rollout, template: RoundTemplate, is_last: bool, crops: Crops) -> None:
    """Append the reply with the crop or with the whole image."""
    turn = rollout.turns[-1]
    turn.reply_image = rollout.view if turn.shown_px is None else crops.get(rollout.image, turn.shown_px)
    message = template.reply(rollout, turn, is_last)
    ended = bool(turn.ids) and turn.ids[-1] == template.chat.end_of_turn_id
    closing = [] if ended else [template.chat.end_of_turn_id]
    turn.reply_ids = closing + template.chat.reply_ids(message, turn.reply_image)


def _frame(rollout: Rollout, template: RoundTemplate, before: Sequence[Turn]) -> tuple[PixelBox, Image.Image]:
    """The region of the original that the next box refers to, and the fitted image that shows it."""
    if template.zoom_from == "crop" and before and before[-1].shown_px is not None:
        return before[-1].shown_px, before[-1].reply_image
    return (0, 0, *rollout.image.size), rollout.view


def _box_in_original(box_view_px: PixelBox, view_size: tuple[int, int], frame: PixelBox) -> PixelBox:
    left, top, right, bottom = frame
    x1, y1, x2, y2 = view_to_original(box_view_px, view_size, (right - left, bottom - top))
    return (left + x1, top + y1, left + x2, top + y2)


def _turn_record(number: int, turn: Turn) -> dict:
    return {
        "round": number,
        "text": turn.text,
        "num_tokens": len(turn.ids),
        "truncated": turn.truncated,
        "box": None if turn.box is None else _box_record(turn),
        **({"given": True} if turn.given else {}),
    }


def _box_record(turn: Turn) -> dict:
    crop = turn.box_original_px
    return {
        "status": turn.box.status.value,
        "box_text": turn.box.box_text,
        "box_view_px": turn.box.box_view_px,
        "box_original_px": crop,
        "crop_size": None if crop is None else [crop[2] - crop[0], crop[3] - crop[1]],
        "shown_px": turn.shown_px,
    }
