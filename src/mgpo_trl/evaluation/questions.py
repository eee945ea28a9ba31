"""The rows of a dataset as they are asked: each several times, its choices in another order, where that is wanted."""

import random
from collections.abc import Iterator
from typing import Any

from ..answers import LETTERS
from ..records import sample_id


class Questions:
    """
    Rows to be played, read one at a time.

    Args:
        dataset (`datasets.Dataset`): Canonical rows.
        num_samples (`int`, *optional*, defaults to `1`): Rollouts of each row; above 1 their ids end in `/sample-N`.
        shuffle_choices (`int`, *optional*): Seed of another order of the choices, see [`shuffled`].
    """

    def __init__(self, dataset, num_samples: int = 1, shuffle_choices: int | None = None):
        self._dataset, self._num_samples, self._seed = dataset, num_samples, shuffle_choices
        self.ids = [self._id(row_id, sample) for row_id in dataset["id"] for sample in range(num_samples)]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self._dataset[index // self._num_samples]
        if self._seed is not None:
            row = shuffled(row, self._seed)
        return {**row, "id": self.ids[index]}

    def with_boxes(self) -> set[str]:
        """Ids of the rows whose target boxes are known."""
        known = [bool(boxes) for boxes in self._dataset["target_boxes"]]
        return {one for number, one in enumerate(self.ids) if known[number // self._num_samples]}

    def batches(self, size: int, wanted) -> Iterator[tuple[int, list[dict]]]:
        """Batches at fixed positions, less the rows that are not wanted: a continued evaluation seeds them alike."""
        for start in range(0, len(self), size):
            todo = [index for index in range(start, min(start + size, len(self))) if self.ids[index] in wanted]
            if todo:
                yield start, [self[index] for index in todo]

    def _id(self, row_id: str, sample: int) -> str:
        return row_id if self._num_samples == 1 else sample_id(row_id, sample)


def shuffled(row: dict[str, Any], seed: int) -> dict[str, Any]:
    """
    The row with its choices in an order that depends on the seed and the row's id alone, and the letter of the answer
    moved along. Choices that refer to others ("none of the above") are moved like any other.
    """
    if not row.get("choices"):
        return row
    order = list(range(len(row["choices"])))
    random.Random(f"{seed}/{row['id']}").shuffle(order)
    answer = LETTERS[order.index(LETTERS.index(row["answer"]))]
    return {**row, "choices": [row["choices"][place] for place in order], "answer": answer}
