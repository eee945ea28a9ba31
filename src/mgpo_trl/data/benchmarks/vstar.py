"""V* Bench: 191 questions about small things in large photographs, and two mirrors of it.

A source row of the original, and the JSON file beside its image:

```python
{"image": "direct_attributes/sa_4690.jpg", "text": "What is the material of the glove?\\n(A) rubber\\n(B) cotton\\n"
 "Answer with the option's letter from the given choices directly.", "category": "direct_attributes", "label": "A",
 "question_id": 0}
# direct_attributes/sa_4690.json
{"question": "What is the material of the glove?", "target_object": ["glove"], "bbox": [[564, 142, 155, 157]],
 "options": ["The material of the glove is rubber.", "The material of the glove is cotton."]}
```

`bbox` is x, y, width, height in pixels of the original image: the boxes give free grounding metrics and oracle crops.
The JSON lists the right option FIRST, so the order of the choices is always that of `text`. A row whose `label` and
JSON contradict each other is a bad row. The options of the JSON are whole sentences (not verified: all of them), so
the two contradict each other where the first one has the words of another choice and not those of the labelled one.

Mirrors: `vstar-lmms` (`image`, `text`, `category`, `label`, `question_id`) and `vstar-ohjoonhee` (`image`, `category`,
`question_id`, `question`, `choices`, `answer` as an index), both with embedded images and without boxes.
"""

import json
import re
from pathlib import Path
from typing import Any

from ...answers import split_question
from ..fields import DataError
from ..huggingface import load_dataset_of
from .common import Benchmark, Row, RowError, folder_path

QUESTIONS = "test_questions.jsonl"


def _from_text(row: Row) -> dict[str, Any]:
    question, choices = split_question(str(row["text"] or ""))
    if choices is None:
        raise RowError("text", f"holds no lettered options: {str(row['text'])[:80]!r}. Give the text of the original.")
    return {"question": question, "choices": choices, "answer": row["label"], "category": row["category"]}


def _read(row: Row, folder: Path) -> dict[str, Any]:
    path = folder_path(folder, row["image"])
    read = {**_from_text(row), "image": path, "group": str(row["image"])}
    beside = Path(path).with_suffix(".json")
    if beside.is_file():
        facts = _facts(beside)
        _check_label(facts, read)
        read["target_boxes"] = _boxes(facts, beside)
    return read


def _facts(beside: Path) -> dict[str, Any]:
    try:
        facts = json.loads(beside.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RowError("target_boxes", f"cannot be read from '{beside}' ({error}). Fetch the file again.") from None
    if not isinstance(facts, dict):
        raise RowError("target_boxes", f"cannot be read from '{beside}', which is no JSON object. Fetch it again.")
    return facts


def _boxes(facts: dict, beside: Path) -> list[list[float]] | None:
    boxes = facts.get("bbox") or []
    try:
        return [[x, y, x + w, y + h] for x, y, w, h in boxes] or None
    except (TypeError, ValueError):
        raise RowError("target_boxes", f"is {boxes} in '{beside}', where x, y, width, height are expected.") from None


def _check_label(facts: dict, read: dict) -> None:
    place = "ABCDEFGHIJ".find(str(read["answer"]).strip().upper()[:1])
    if not facts.get("options") or not 0 <= place < len(read["choices"]):
        return
    stated, right = read["choices"][place], facts["options"][0]
    others = [choice for number, choice in enumerate(read["choices"]) if number != place and _says(right, choice)]
    if others and not _says(right, stated):
        raise RowError(
            "answer",
            f"is {read['answer']!r} = {stated!r} by `label`, but the JSON beside the image puts {right!r} first, "
            "which is the right one there. Correct one of the two.",
        )


def _says(sentence: Any, choice: str) -> bool:
    """Whether a sentence has the words of a choice, in one piece."""
    words, wanted = (" ".join(re.findall(r"\w+", str(text).casefold())) for text in (sentence, choice))
    return f" {wanted} " in f" {words} "


def _read_ohjoonhee(row: Row, folder: Path) -> dict[str, Any]:
    return {name: row[name] for name in ("question", "choices", "answer", "category")}


def _open(folder: Path):
    questions = folder if folder.is_file() else folder / QUESTIONS
    if not questions.is_file():
        raise DataError(f"'{folder}' has no {QUESTIONS}. Give the folder with the files of the repository.")
    return load_dataset_of(questions, "train")


IDS = ("category", "question_id")
"""Numbers of the two categories may overlap."""
BENCHMARKS = [
    Benchmark(
        name="vstar",
        hub_id="craigwu/vstar_bench",
        split="test",
        ids=IDS,
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
        ids=IDS,
        image="image",
        read=lambda row, folder: _from_text(row),
        required=("image", "text", "category", "label", "question_id"),
        official="vstar",
    ),
    Benchmark(
        name="vstar-ohjoonhee",
        hub_id="ohjoonhee/vstar_bench",
        split="test",
        ids=IDS,
        image="image",
        read=_read_ohjoonhee,
        required=("image", "category", "question_id", "question", "choices", "answer"),
        official="vstar",
    ),
]
