"""MME-RealWorld and MME-RealWorld-Lite: real photographs, five options each, of which (E) says that it is not there.

A source row:

```python
{"index": 17, "bytes": "<base64 of a JPEG>", "question": "What is the phone number on the sign?",
 "multi-choice options": ["(A) 123", "(B) 132", "(C) 213", "(D) 231", "(E) The image does not feature the content."],
 "answer": "B", "category": "Perception/OCR", "l2-category": "phone"}
```

`category` gives the table of the paper: Perception or Reasoning, and within it OCR, RS (remote sensing), DT (diagrams
and tables), MO (monitoring), AD (autonomous driving). The exact spelling of the second part is not verified: the names
below are read as their abbreviation, others stay as they are. Rows that show the same bytes are one `group`.

The MGPO training set is taken from the full set, so after training on it only Lite is clean, and Lite may share
images: see [`mgpo_trl.data.build_mgpo_train`].
"""

from pathlib import Path
from typing import Any

from .common import Benchmark, Row

SUBTASKS = {
    "ocr with complex context": "OCR", "ocr in the wild": "OCR", "ocr": "OCR", "remote sensing": "RS", "rs": "RS",
    "diagram and table": "DT", "diagrams and tables": "DT", "dt": "DT", "monitoring": "MO", "video monitoring": "MO",
    "mo": "MO", "autonomous driving": "AD", "ad": "AD",
}  # fmt: skip
"""Names of the subtasks, in small letters, and their abbreviations."""


def short_category(category: Any) -> Any:
    """`"Perception/Remote Sensing"` as `"Perception/RS"`; what is not known stays."""
    if not isinstance(category, str) or "/" not in category:
        return category
    task, subtask = category.split("/", 1)
    return f"{task}/{SUBTASKS.get(subtask.strip().lower().replace('_', ' '), subtask)}"


def _read(row: Row, folder: Path) -> dict[str, Any]:
    return {
        "question": row["question"],
        "choices": row["multi-choice options"],
        "answer": row["answer"],
        "category": short_category(row["category"]),
    }


BENCHMARKS = [
    Benchmark(
        name=name,
        hub_id=f"yifanzhang114/{repository}",
        split="train",
        image="bytes",
        ids=("index",),
        base64=True,
        read=_read,
        required=("index", "bytes", "question", "multi-choice options", "answer", "category"),
        official="mme-realworld",
    )
    for name, repository in (
        ("mme-realworld", "MME-RealWorld-Lmms-eval"),
        ("mme-realworld-lite", "MME-RealWorld-lite-lmms-eval"),
    )
]
