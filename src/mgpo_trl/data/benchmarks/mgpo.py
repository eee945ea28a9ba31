"""The data of the MGPO paper: 21,690 training samples of MME-RealWorld, 1,919 + 191 samples for evaluation.

A source row, in the layout with the image embedded; in the other one `image_path` names a file instead:

```python
{"prompt": "<image> ...", "image": {"bytes": b"...", "path": None}, "image_path": "MME_RealWorld/1.jpg",
 "question": "What is the number on the bus?", "choices": "(A) 12\\n(B) 21\\n(C) 7\\n(D) 70\\n(E) Not there",
 "data_source": "Perception/OCR in the Wild", "answer": "A"}
```

Where the right letter stands is not verified. It is taken from the first of `answer`, `ground_truth`, `label` and
`reward_model["ground_truth"]` that a row has; a row with none of them is a bad row that names its columns. The
category is `data_source`. Paths are relative to the local copy and need `mgpo-train:PATH`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..fields import from_json_text
from .common import Benchmark, Row, RowError, folder_path
from .mme_realworld import short_category

ANSWER_COLUMNS = ("answer", "ground_truth", "label")


def _read(row: Row, folder: Path) -> dict[str, Any]:
    read = {
        "question": str(row["question"] or "").replace("<image>", "").strip(),
        "choices": row["choices"],
        "answer": _answer(row),
        "category": short_category(row.get("data_source")),
        "group": row.get("image_path"),
    }
    if path := row.get("image") or row.get("image_path"):  # embedded images are a column of their own by now
        read["image"] = folder_path(folder, path)
    return read


def _answer(row: Row) -> Any:
    reward_model = from_json_text(row.get("reward_model"))
    in_model = reward_model.get("ground_truth") if isinstance(reward_model, Mapping) else None
    found = [row.get(name) for name in ANSWER_COLUMNS] + [in_model]
    answer = next((value for value in found if value is not None), None)
    if answer is None:
        raise RowError(
            "answer",
            f"is in none of {', '.join(ANSWER_COLUMNS)} and reward_model.ground_truth; the row has {sorted(row)}. "
            "Copy the right letter into a column `answer`.",
        )
    return answer


BENCHMARKS = [
    Benchmark(
        name=name,
        hub_id=f"xinyu1205/{repository}",
        split="train",
        image="image",
        ids=("id", "index"),
        read=_read,
        required=("question", "choices"),
        official="mme-realworld",
    )
    for name, repository in (
        ("mgpo-train", "mme_realworld_train_21690"),
        ("mgpo-eval", "mme_realworld_lite_1919_vstar_191_sum_2110"),
    )
]
