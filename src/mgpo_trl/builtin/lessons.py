"""
Supervised samples of the warm start, made of the very ids that a rollout of the trainer has.

A [`Sample`] is a sequence of ids with a weight for each id that is to be predicted, and its images. A sequence may
branch: tokens of segment 0 are the trunk that every branch sees, tokens of segment 1, 2, ... see the trunk and their
own branch, and the positions of every branch restart where the trunk ends, as if it were alone::

    ids       T T T | a a a | b b
    segments  0 0 0 | 1 1 1 | 2 2
    position  0 1 2 | 3 4 5 | 3 4
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from mgpo_trl.boxes import format_box
from mgpo_trl.builtin.needle import ask, draw_question
from mgpo_trl.builtin.scenes import GRID, HATCHES, Card, Scene, cell_box
from mgpo_trl.builtin.tokenizer import BOX_LABEL, DETECT, READ, answer_text
from mgpo_trl.geometry import view_to_original
from mgpo_trl.images import crop_original
from mgpo_trl.processing import VisionChat
from mgpo_trl.prompts import PromptTemplate

VIEW_CELL = 28
"""Side of a cell in pixels of the view."""


@dataclass
class Sample:
    """One training sequence."""

    ids: list[int] = field(default_factory=list)
    """Token ids."""
    weights: list[float] = field(default_factory=list)
    """Weight of each id as a target; 0 where it is only read."""
    segments: list[int] = field(default_factory=list)
    """0 in the trunk, else the number of the branch."""
    images: list[Image.Image] = field(default_factory=list)
    """Fitted images in the order of their placeholders, all in the trunk if there are branches."""

    def add(self, ids: Sequence[int], weight: float | Sequence[float] = 0.0, segment: int = 0) -> "Sample":
        """Append ids with one weight for all, or one for each."""
        self.ids += ids
        self.weights += [weight] * len(ids) if isinstance(weight, int | float) else weight
        self.segments += [segment] * len(ids)
        return self


@dataclass(frozen=True)
class Item:
    """One question of the training set, its view fitted once."""

    level: str
    scene: Scene
    asked: Card
    view: Image.Image

    @property
    def question(self) -> str:
        return ask(self.level, self.asked)


class Lessons:
    """
    Makes every kind of sample.

    Parameters:
        chat ([`VisionChat`]): The processor, at the pixel budget of the task.
        template ([`PromptTemplate`]): The conversation.
        level (`str`): `"needle"` or `"refer"`.
        seed (`int`): Seed of the training scenes.
    """

    def __init__(self, chat: VisionChat, template: PromptTemplate, level: str, seed: int):
        self.chat, self.template, self.level, self.seed = chat, template, level, seed
        self._crops: dict[tuple[int, int], Image.Image] = {}

    def items(self, start: int, stop: int) -> list[Item]:
        """Questions `start` to `stop - 1` of the training split."""
        drawn = (draw_question(self.level, "train", index, self.seed) for index in range(start, stop))
        return [Item(self.level, scene, asked, self.chat.fit(scene.image)) for scene, asked in drawn]

    def seeing(self, item: Item) -> Sample:
        """What the first stage teaches: where the cards are."""
        if self.level == "needle":
            return self.detection(item, corner_weight=3.0, other_weight=1.0)
        return self.branches(item, other_weight=0.1)

    def probe(self, item: Item) -> Sample:
        """The same question with weight on the first corner alone: what tells whether a box is exact."""
        if self.level == "needle":
            return self.detection(item, corner_weight=1.0, other_weight=0.0)
        return self._view_sample(item, self._grounding(item)).add(*self._box(item.asked.cell, 1.0, 0.0))

    def detection(self, item: Item, corner_weight: float, other_weight: float) -> Sample:
        """Its own instruction -> the box of the card; the second corner follows from the first, which weighs more."""
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": DETECT}]}]
        return self._view_sample(item, messages).add(*self._box(item.asked.cell, corner_weight, other_weight))

    def reading(self, item: Item) -> Sample:
        """The crop of the card, alone -> its colour and the answer."""
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": READ}]}]
        crop = self.crop(item.scene, item.asked.cell)
        sample = Sample(images=[crop]).add(self.chat.prompt_ids(messages, [crop]))
        ids = self._turn(item.asked.colour + answer_text(item.asked.hatch))
        weights = [0.3] * len(ids)
        weights[0], weights[2] = 1.0, 3.0  # the colour and the hatch
        return sample.add(ids, weights)

    def direct(self, item: Item, hatch: int) -> Sample:
        """The one-round conversation, answered with `hatch`."""
        messages = self.template.first_messages(item.question, list(HATCHES), num_rounds=1)
        return self._view_sample(item, messages).add(self._turn(answer_text(hatch)), 1.0)

    def dialogue(self, item: Item, cell: int, rng: np.random.Generator, box_weight: float = 1.0) -> Sample:
        """
        The two-round conversation with a box around `cell`; the answer is a guess unless the crop shows the card. With
        a `box_weight` of 0 the box is given rather than taught.
        """
        sample = self._view_sample(item, self._grounding(item)).add(*self._box(cell, box_weight, box_weight))
        crop = self.crop(item.scene, cell)
        reply = self.template.reply_message(item.question, list(HATCHES), "ok", is_last=True)
        sample.images.append(crop)
        hatch = item.asked.hatch if cell == item.asked.cell else int(rng.integers(len(HATCHES)))
        return sample.add(self.chat.reply_ids(reply, crop)).add(self._turn(answer_text(hatch)), 1.0)

    def branches(self, item: Item, other_weight: float) -> Sample:
        """
        Every card of the scene in a branch of its own: the real conversation for the asked one, `colour x1 y1` for the
        others. One question an image leaves the binding of colours to places near chance for hundreds of steps.
        """
        sample = self._view_sample(item, self._grounding(item))
        trunk = sample.ids.index(self._vision_end()) + 1
        sample.segments[trunk:] = [1] * (len(sample.ids) - trunk)
        sample.add(*self._box(item.asked.cell, 1.0, other_weight), segment=1)
        others = [card for card in item.scene.cards if card is not item.asked]
        for number, card in enumerate(others, start=2):
            x1, y1, _, _ = cell_box(card.cell, VIEW_CELL)
            ids = [self._id(card.colour), self._id(str(x1)), self._id(str(y1))]
            sample.add(ids, [0.0, 1.0, 1.0], segment=number)
        return sample

    def crop(self, scene: Scene, cell: int) -> Image.Image:
        """The fitted crop of a cell, cut from the original."""
        key = (id(scene), cell)
        if key not in self._crops:
            side = GRID * VIEW_CELL
            box = view_to_original(cell_box(cell, VIEW_CELL), (side, side), scene.image.size)
            self._crops[key] = self.chat.fit(crop_original(scene.image, box))
        return self._crops[key]

    def _grounding(self, item: Item) -> list[dict]:
        return self.template.first_messages(item.question, list(HATCHES), num_rounds=2)

    def _view_sample(self, item: Item, messages: list[dict]) -> Sample:
        return Sample(images=[item.view]).add(self.chat.prompt_ids(messages, [item.view]))

    def _box(self, cell: int, corner_weight: float, other_weight: float) -> tuple[list[int], list[float]]:
        """Ids of a grounding turn and their weights: the two numbers of the first corner, and everything else."""
        box = cell_box(cell, VIEW_CELL)
        side = GRID * VIEW_CELL
        ids = self._turn(format_box(box, (side, side), "absolute", BOX_LABEL))
        weights = [other_weight] * len(ids)
        weights[1] = weights[3] = corner_weight
        return ids, weights

    def _turn(self, text: str) -> list[int]:
        return [*self.chat.tokenizer.encode(text), self.chat.end_of_turn_id]

    def _id(self, word: str) -> int:
        return self.chat.tokenizer.convert_tokens_to_ids(word)

    def _vision_end(self) -> int:
        return self._id("<|vision_end|>")
