"""Adapter for a local folder of images with `metadata.jsonl` or `metadata.csv`, as in Hugging Face's imagefolder.

```
photos/metadata.jsonl     {"file_name": "7.jpg", "question": "...", "answer": "..."}
photos/7.jpg
```

With splits, each is a subfolder of this form: `photos/train/metadata.jsonl`, `photos/test/metadata.jsonl`.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from .schema import DataError, Source
from .tables import load_table

METADATA = ("metadata.jsonl", "metadata.csv")


def find_metadata(folder: str | os.PathLike) -> dict[str | None, Path]:
    """Metadata files by split; the key is `None` where the folder itself is the set."""
    folder = Path(folder)
    for name in METADATA:
        if (folder / name).is_file():
            return {None: folder / name}
    return {sub.parent.name: sub for name in METADATA[::-1] for sub in sorted(folder.glob(f"*/{name}"))}


def load_folder(
    folder: str | os.PathLike,
    *,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
    extra_columns: Sequence[str] = (),
) -> Source:
    """
    Reads a folder with metadata.

    Args:
        folder (`str` or `os.PathLike`): The folder.
        split (`str`, *optional*): The subfolder to take; not needed where there is one set only.
        columns (`Mapping`, *optional*): Our column name to theirs; `image` is `file_name` unless said otherwise.
        extra_columns (`Sequence[str]`, *optional*): Further columns to keep.
    """
    path = pick_split(find_metadata(folder), split, str(folder))
    return load_table(path, columns={"image": "file_name", **(columns or {})}, extra_columns=extra_columns)


def pick_split(splits: Mapping[str | None, object], split: str | None, source: str) -> object:
    """The asked split of a source, or its only one. A source without splits is `train`, as the Hub has it."""
    names = sorted(name or "train" for name in splits)
    wanted = split or (names[0] if len(names) == 1 else None)
    if wanted is None:
        raise DataError(f"{source} has the splits {', '.join(names)}. Say which one to use with `split`.")
    if wanted not in names:
        raise DataError(f"{source} has no split `{wanted}`. It has {', '.join(names) or 'none'}.")
    return splits.get(wanted, splits.get(None))
