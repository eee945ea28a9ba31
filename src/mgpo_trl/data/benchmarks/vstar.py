"""V* Bench: 191 questions about small things in large photographs, and two mirrors of it.

A source row of the original, and the JSON file beside its image:

```python
{"image": "direct_attributes/sa_4690.jpg", "text": "What is the material of the glove?\\n(A) rubber\\n(B) cotton\\n"
 "Answer with the option's letter from the given choices directly.", "category": "direct_attributes", "label": "A",
 "question_id": 0}
# direct_attributes/sa_4690.json
{"question": "What is the material of the glove?", "options": ["rubber", "cotton"], "target_object": ["glove"],
 "bbox": [[1500, 900, 60, 45]]}
```

`bbox` is x, y, width, height in pixels of the original image: the boxes give free grounding metrics and oracle crops.
The JSON lists the right option FIRST, so the order of the choices is always that of `text`; a row whose `label` does
not name the JSON's first option is a bad row.

Mirrors: `vstar-lmms` (`image`, `text`, `category`, `label`, `question_id`) and `vstar-ohjoonhee` (`image`, `category`,
`question_id`, `question`, `choices`, `answer` as an index), both with embedded images and without boxes.
"""

import json
from pathlib import Path
from typing import Any

from ...answers import split_question
from ..fields import DataError
from .common import Benchmark, Row, RowError, folder_path

QUESTIONS = "test_questions.jsonl"


def _from_text(row: Row) -> dict[str, Any]:
    question, choices = split_question(str(row["text"] or ""))
    if choices is None:
        raise RowError("text", f"holds no lettered options: {str(row['text'])[:80]!r}. Give the text of the original.")
    return {
        "id": str(row["question_id"]),
        "question": question,
        "choices": choices,
        "answer": row["label"],
        "category": row["category"],
    }


def _read(row: Row, folder: Path) -> dict[str, Any]:
    path = folder_path(folder, row["image"])
    read = {**_from_text(row), "image": path, "group": str(row["image"])}
    # Ids of the two categories may overlap, the names of the images do not.
    read["id"] = f"{row['category']}/{row['question_id']}"
    beside = Path(path).with_suffix(".json")
    if beside.is_file():
        facts = json.loads(beside.read_text(encoding="utf-8"))
        _check_label(facts, read)
        read["target_boxes"] = [[x, y, x + w, y + h] for x, y, w, h in facts.get("bbox") or []] or None
    return read


def _check_label(facts: dict, read: dict) -> None:
    options = facts.get("options")
    place = "ABCDEFGHIJ".find(str(read["answer"]).strip().upper()[:1])
    stated = read["choices"][place] if 0 <= place < len(read["choices"]) else None
    if options and stated is not None and _plain(stated) != _plain(options[0]):
        raise RowError(
            "answer",
            f"is {read['answer']!r} = {stated!r} by `label`, but the JSON beside the image puts {options[0]!r} first, "
            "which is the right one there. Correct one of the two.",
        )


def _plain(text: str) -> str:
    return " ".join(str(text).lower().split()).strip(" .")


def _read_ohjoonhee(row: Row, folder: Path) -> dict[str, Any]:
    return {
        "id": f"{row['category']}/{row['question_id']}",
        "question": row["question"],
        "choices": row["choices"],
        "answer": row["answer"],
        "category": row["category"],
    }


def _open(folder: Path):
    from datasets import load_dataset

    questions = folder if folder.is_file() else folder / QUESTIONS
    if not questions.is_file():
        raise DataError(f"'{folder}' has no {QUESTIONS}. Give the folder with the files of the repository.")
    return load_dataset("json", data_files=str(questions), split="train")


BENCHMARKS = [
    Benchmark(
        name="vstar",
        hub_id="craigwu/vstar_bench",
        split="test",
        read=_read,
        required=("image", "text", "category", "label", "question_id"),
        open=_open,
        snapshot=True,
        official="vstar",
    ),
    Benchmark(
        name="vstar-lmms",
        hub_id="lmms-lab-encoder/vstar-bench",
        split="test",
        image="image",
        read=lambda row, folder: _from_text(row),
        required=("image", "text", "category", "label", "question_id"),
        official="vstar",
    ),
    Benchmark(
        name="vstar-ohjoonhee",
        hub_id="ohjoonhee/vstar_bench",
        split="test",
        image="image",
        read=_read_ohjoonhee,
        required=("image", "category", "question_id", "question", "choices", "answer"),
        official="vstar",
    ),
]
