"""HR-Bench 4K and 8K: 200 images, each question in four cyclic orders of its options (800 rows a split).

A source row:

```python
{"index": 3, "question": "What color is the umbrella?", "answer": "D", "category": "single", "A": "Red", "B": "Blue",
 "C": "Green", "D": "White", "cycle_category": "...", "image": "<base64 of a JPEG>"}
```

The score is the mean over the four orders, which are not independent: rows of one image are one `group`, by a digest
of its bytes. Whether `index` numbers rows or questions is not verified; it is only part of the id.
"""

from pathlib import Path
from typing import Any

from .common import Benchmark, Row


def _read(row: Row, folder: Path) -> dict[str, Any]:
    return {
        "question": row["question"],
        "choices": [row[letter] for letter in "ABCD"],
        "answer": row["answer"],
        "category": row["category"],
    }


BENCHMARKS = [
    Benchmark(
        name=f"hrbench-{size}",
        hub_id="DreamMr/HR-Bench",
        config="hrbench_version_split",
        split=f"hrbench_{size}",
        image="image",
        ids=("index", "cycle_category"),
        files=size,
        base64=True,
        read=_read,
        required=("question", "answer", "category", "A", "B", "C", "D", "image", "index"),
        official="hrbench",
    )
    for size in ("4k", "8k")
]
