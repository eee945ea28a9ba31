r"""
Questions about the scenes, as rows that every other dataset of this package could have.

Two levels: `needle` hides one card ("What is on the card?"), `refer` shows four and the question picks one by its
colour ("What is on the red card?"). An example row::

    {"id": "refer-train-1-00007", "image": {"bytes": b"\x89PNG...", "path": "refer-train-1-00007.png"},
     "question": "What is on the red card?",
     "choices": ["vertical lines", "horizontal lines", "rising lines", "falling lines"], "answer": "D",
     "target_boxes": [[120, 8, 216, 104]], "category": "falling lines"}
"""

import io

import numpy as np

from mgpo_trl.builtin.scenes import COLOURS, HATCHES, Card, Scene, draw_scene

LEVELS = {"needle": 1, "refer": 4}
"""Number of cards in a scene by level."""
SPLITS = ("train", "heldout")
"""Their scenes are drawn from disjoint seeds."""
LETTERS = "ABCD"


def ask(level: str, card: Card) -> str:
    """The question about one card."""
    return "What is on the card?" if level == "needle" else f"What is on the {card.colour} card?"


def all_questions() -> list[str]:
    """Every question of both levels."""
    return ["What is on the card?", *(f"What is on the {colour} card?" for colour in COLOURS)]


def draw_question(level: str, split: str, index: int, seed: int) -> tuple[Scene, Card]:
    """
    The scene of one row and the card that is asked for. Answers go round A, B, C, D, so every prefix is balanced.

    Args:
        level (`str`): `"needle"` or `"refer"`.
        split (`str`): `"train"` or `"heldout"`.
        index (`int`): Number of the row.
        seed (`int`): Seed of the whole split.
    """
    if level not in LEVELS:
        raise ValueError(f"`level` must be one of {list(LEVELS)}, got {level!r}.")
    if split not in SPLITS:
        raise ValueError(f"`split` must be one of {list(SPLITS)}, got {split!r}.")
    key = (seed, SPLITS.index(split), LEVELS[level], index)
    asked = int(np.random.default_rng((*key, 1)).integers(LEVELS[level]))
    scene = draw_scene((*key, 0), LEVELS[level], asked=asked, hatch=index % len(HATCHES))
    return scene, scene.cards[asked]


def make_row(level: str, split: str, index: int, seed: int) -> dict:
    """One canonical dataset row; the picture is a PNG in memory."""
    scene, card = draw_question(level, split, index, seed)
    name = f"{level}-{split}-{seed}-{index:05d}"
    return {
        "id": name,
        "image": {"bytes": _png(scene), "path": f"{name}.png"},
        "question": ask(level, card),
        "choices": list(HATCHES),
        "answer": LETTERS[card.hatch],
        "target_boxes": [list(card.box_original_px)],
        "category": HATCHES[card.hatch],
    }


def make_dataset(level: str, split: str, n: int, seed: int):
    """
    Rows 0 to n-1 of a split as a `datasets.Dataset` whose pictures stay PNG bytes until someone opens them.

    Args:
        level (`str`): `"needle"` or `"refer"`.
        split (`str`): `"train"` or `"heldout"`; no scene is in both.
        n (`int`): Number of rows.
        seed (`int`): Seed; equal seeds give equal bytes.

    Returns:
        `datasets.Dataset`: Columns id, image, question, choices, answer, target_boxes, category.
    """
    from datasets import Dataset, Features, Image, List, Value

    text, boxes = Value("string"), List(List(Value("int64")))
    columns = dict.fromkeys(("id", "image", "question", "choices", "answer", "target_boxes", "category"), text)
    columns |= {"image": Image(decode=False), "choices": List(text), "target_boxes": boxes}
    return Dataset.from_list([make_row(level, split, index, seed) for index in range(n)], features=Features(columns))


def _png(scene: Scene) -> bytes:
    buffer = io.BytesIO()
    scene.image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
