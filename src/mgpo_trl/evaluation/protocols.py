"""
Protocols: how a question is played. Besides the paper's two, counterfactuals that tell what the crop was worth.

| name | round 1 | what comes back | round 2 |
|---|---|---|---|
| `direct` | - | - | answers from the view alone, in one round |
| `mgpo` | names a region | that region of the original | answers from both |
| `no-crop` | as `mgpo` | the whole image | answers from both |
| `random-crop` | as `mgpo` | a region of the same size at a random place | answers from both |
| `oracle-crop` | as `mgpo` | the region around the target boxes | answers from both |
| `crop-only` | as `mgpo` | that region of the original | answers from the crop alone |

Where the model's box is unusable, all but `oracle-crop` do what `mgpo` does: the whole image comes back, with the
reason.
`oracle-crop` needs target boxes; rows without them are left out, and counted.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..rollout import (
    Context,
    CropPolicy,
    Crops,
    Generate,
    PixelBox,
    Rollout,
    RoundTemplate,
    Sampled,
    run_rounds,
    sampled_turn,
)

PROTOCOLS = ("direct", "mgpo", "no-crop", "random-crop", "oracle-crop", "crop-only")
UTILITIES = (
    ("mgpo", "no-crop"),
    ("mgpo", "random-crop"),
    ("mgpo", "crop-only"),
    ("mgpo", "direct"),
    ("oracle-crop", "mgpo"),
)
"""Pairs whose difference in accuracy a joint report gives: what the first adds to the second."""


@dataclass(frozen=True)
class Protocol:
    """One way to play."""

    name: str
    """One of `PROTOCOLS`."""
    num_rounds: int
    """Sampled turns."""

    @property
    def shares_first_round(self) -> bool:
        """Whether its first turn is that of `mgpo`."""
        return self.name != "direct"

    def takes(self, row: dict) -> bool:
        """Whether a row can be played: the oracle needs target boxes."""
        return self.name != "oracle-crop" or bool(row.get("target_boxes"))

    def template(self, template: RoundTemplate, seed: int) -> RoundTemplate:
        """The template with the protocol's crop policy."""
        return replace(template, crop_policy=_policy(self.name, template, seed))

    def play(
        self, rollouts: Sequence[Rollout], generate: Generate, template: RoundTemplate, crops: Crops | None = None
    ) -> Sequence[Rollout]:
        """Play fresh rollouts; `template` is that of [`Protocol.template`], `crops` as in [`run_rounds`]."""
        if self.name != "crop-only":
            return run_rounds(rollouts, generate, template, self.num_rounds, crops)
        run_rounds(rollouts, _without_round(self.num_rounds, generate), template, self.num_rounds, crops)
        return _answer_from_the_crop(rollouts, generate, template)


def resolve_protocols(names: Sequence[str] | None, num_rounds: int) -> list[Protocol]:
    """
    The protocols that `--protocol` names; by default the one that the number of rounds means.

    Args:
        names (`Sequence[str]`, *optional*): Names in `PROTOCOLS`.
        num_rounds (`int`): Rounds of the conversation; counterfactuals take at least 2.

    Raises:
        ValueError: An unknown name, or one twice.
    """
    names = list(names or ["direct" if num_rounds == 1 else "mgpo"])
    if unknown := [name for name in names if name not in PROTOCOLS]:
        raise ValueError(f"`--protocol` must be among {list(PROTOCOLS)}, got {unknown[0]!r}.")
    if len(set(names)) < len(names):
        raise ValueError(f"`--protocol` names one twice: {names}. Name each once.")
    return [Protocol(name, 1 if name == "direct" else max(2, num_rounds)) for name in names]


class SharedFirstRound:
    """
    A generator that samples the first turn of each rollout once, whichever protocols play it.

    Args:
        generate (`Callable`): The model's generator.
    """

    def __init__(self, generate: Generate):
        self.generate = generate
        self._first: dict[str, Sampled] = {}

    def for_rollouts(self, rollouts: Sequence[Rollout]) -> Generate:
        """The generator for these rollouts: a first turn that is known by the rollout's id is not sampled again."""

        def generate(contexts: list[Context]) -> list[Sampled]:
            if contexts[0].round > 1:
                return self.generate(contexts)
            new = [i for i, rollout in enumerate(rollouts) if rollout.id not in self._first]
            if new:
                samples = self.generate([contexts[i] for i in new])
                self._first.update((rollouts[i].id, sample) for i, sample in zip(new, samples, strict=True))
            return [self._first[rollout.id] for rollout in rollouts]

        return generate


def _without_round(number: int, generate: Generate) -> Generate:
    """A generator that leaves the turns of one round empty; they are sampled elsewhere."""
    return lambda contexts: generate(contexts) if contexts[0].round != number else [Sampled([])] * len(contexts)


def _answer_from_the_crop(rollouts, generate: Generate, template: RoundTemplate) -> Sequence[Rollout]:
    """Replace the last turn by an answer to a conversation that shows the last reply's image alone."""
    contexts = []
    for rollout in rollouts:
        rollout.turns.pop()
        image = rollout.turns[-1].reply_image
        messages = template.prompts.first_messages(rollout.question, rollout.choices, 1)
        contexts.append(Context(template.chat.prompt_ids(messages, [image]), [image], len(rollout.turns) + 1))
    for rollout, sample in zip(rollouts, generate(contexts), strict=True):
        rollout.turns.append(sampled_turn(sample, template.chat))
    return rollouts


def _policy(name: str, template: RoundTemplate, seed: int) -> CropPolicy | None:
    if name == "no-crop":
        return lambda rollout, named: named and (0, 0, *rollout.image.size)
    if name == "random-crop":
        return lambda rollout, named: named and _moved(named, rollout, seed)
    if name == "oracle-crop":
        return lambda rollout, named: oracle_box(rollout, template)
    return None


def _moved(box: PixelBox, rollout: Rollout, seed: int) -> PixelBox:
    """A box of the same size at a uniformly random place in the image, the same for every run with this seed."""
    rng = random.Random(f"{seed}/{rollout.id}/{len(rollout.turns)}")
    width, height = box[2] - box[0], box[3] - box[1]
    x, y = rng.randint(0, rollout.image.width - width), rng.randint(0, rollout.image.height - height)
    return (x, y, x + width, y + height)


def oracle_box(rollout: Rollout, template: RoundTemplate) -> PixelBox:
    """
    The smallest usable box around every target: their bounding box, grown about its centre until a model might have
    named it (each side longer than `min_box_side` pixels of the view), and kept inside the image.
    """
    boxes = rollout.target_boxes
    sides = []
    for low, high in ((0, 2), (1, 3)):
        size, view = rollout.image.size[low], rollout.view.size[low]
        least = -(-(template.min_box_side + 1) * size // view)
        sides.append(_grown(min(box[low] for box in boxes), max(box[high] for box in boxes), least, size))
    (left, right), (top, bottom) = sides
    return (left, top, right, bottom)


def _grown(start: float, end: float, least: int, size: int) -> tuple[int, int]:
    """An interval around [start, end] of at least `least`, inside [0, size]. `(10, 12, 8, 100)` gives `(7, 15)`."""
    length = min(size, max(int(-(-end // 1)) - int(start // 1), least))
    begin = max(0, min(int(round((start + end - length) / 2)), size - length, int(start // 1)))
    return begin, begin + length
