"""Hand-written turns for trainer tests: photos of known view sizes, boxes in them, and batches made of texts."""

from datasets import Dataset
from datasets import Image as ImageFeature

from mgpo_trl.boxes import format_box

VIEW_SIZES = [(112, 56), (56, 112), (84, 84), (84, 56)]  # of the rows in `photos`
BOX = {number: (5, 4, 50, 40) if number != 1 else (4, 10, 50, 100) for number in range(4)}


def ids_of(trainer, text, end=True):
    return trainer._tokenizer(text)["input_ids"] + ([trainer._tokenizer.eos_token_id] if end else [])


def box_text(number, box=None):
    return format_box(box or BOX[number], VIEW_SIZES[number], "absolute", "card")


def group_rows(rows, generations=2):
    return [dict(row) for row in rows for _ in range(generations)]


def generate(trainer, script, rows, *rounds):
    """The training batch of hand-written turns, given as texts ("..." closed, ("...",) cut) for each round and row."""
    turns = [
        [ids_of(trainer, turn) if isinstance(turn, str) else ids_of(trainer, *turn, end=False) for turn in turns]
        for turns in rounds
    ]
    newline = ids_of(trainer, "\n", end=False)
    for written, ids in zip(rounds, turns, strict=True):
        for number, turn in enumerate(written):
            if isinstance(turn, tuple):  # a cut turn used up its whole budget
                ids[number] += newline * (max(map(len, ids)) - len(ids[number]))
    script(trainer, *turns)
    trainer.model.train()
    return trainer._generate_and_score_completions(rows), turns


ANSWER = "The card shows vertical lines. \\boxed{A}"


def photos_dataset(photos):
    return Dataset.from_list(photos).cast_column("image", ImageFeature(decode=False))
