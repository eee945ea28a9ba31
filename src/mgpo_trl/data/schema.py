"""One row of a data set, whatever it came from.

A canonical row, as `load_rows` gives it:

```python
{"id": "7", "image": {"bytes": None, "path": "/photos/7.jpg"}, "question": "What is on the red card?",
 "choices": ["a dog", "a cat"], "answer": "B", "target_boxes": [[900, 600, 1500, 1100]], "category": "cards",
 "group": None}
```

`choices`, `target_boxes`, `category` and `group` may be `None`; with choices the answer is a letter. Rows of one
`group` are not independent (they show the same image, say): confidence intervals are clustered by it. Images stay
paths or encoded bytes. Target boxes are in pixels of the original, after its EXIF orientation is applied.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from .fields import (
    DataError,
    RowError,
    answer_of,
    boxes_of,
    check_inside,
    choices_of,
    image_of,
    image_size,
    optional_text,
    required_text,
)

COLUMNS = ("id", "image", "question", "choices", "answer", "target_boxes", "category", "group")
REQUIRED = ("image", "question", "answer")
PROGRESS_FROM = 1000
CHECK_THREADS = 8


@dataclass(frozen=True)
class Source:
    """Rows as an adapter found them, columns already named as in `COLUMNS`."""

    name: str
    """What error messages and records call it."""
    rows: Sequence[Mapping[str, Any] | RowError]
    """Rows with our column names, not checked yet. A row that could not even be read is its error."""
    images: Any = None
    """A `datasets.Dataset` with the one column `image`; `None` where the rows hold paths."""
    extras: Any = None
    """Further columns to keep, by name: a `datasets.Dataset` or lists."""


def normalise_row(
    row: Mapping[str, Any], *, index: int, source: str = "data", check_images: bool | str = True
) -> dict[str, Any]:
    """
    Checks one row and brings it into the canonical form.

    Args:
        row (`Mapping`):
            A row with the columns of `COLUMNS`; `choices`, `target_boxes`, `category`, `group` and `id` are optional.
        index (`int`):
            Position of the row, counted from 0. It also is the id of a row that has none.
        source (`str`, *optional*, defaults to `"data"`):
            Where the row came from, for messages.
        check_images (`bool` or `str`, *optional*, defaults to `True`):
            `True` or `"header"` opens the file and reads its size, `"full"` decodes every pixel, `False` or `"none"`
            looks at no file.

    Returns:
        `dict`: the canonical row.

    Raises:
        `RowError`: names source, row and field, the value, and what to do.
    """
    identity = None
    try:
        identity = optional_text(row, "id") or str(index)
        choices = choices_of(row.get("choices"))
        canonical = {
            "id": identity,
            "image": image_of(row.get("image")),
            "question": required_text(row, "question", "Give every row a question."),
            "choices": choices,
            "answer": answer_of(row, choices),
            "target_boxes": boxes_of(row.get("target_boxes")),
            "category": optional_text(row, "category"),
            "group": optional_text(row, "group"),
        }
        size = image_size(canonical["image"], check_images)
        check_inside(canonical["target_boxes"], size)
        return canonical
    except RowError as error:
        raise error.at(index, identity, source) from None


def iter_checked(
    rows: Sequence[Mapping[str, Any] | RowError],
    *,
    source: str = "data",
    check_images: bool | str = True,
    keep: Callable[[dict], dict] = dict,
) -> Iterator[dict[str, Any] | RowError]:
    """
    Yields the canonical row or the error of every row, in order. Files are opened by several threads at once.

    Args:
        rows (`Sequence`): Rows, or a `datasets.Dataset`.
        source (`str`, *optional*, defaults to `"data"`): Where they came from.
        check_images (`bool` or `str`, *optional*, defaults to `True`): See [`normalise_row`].
        keep (`Callable`, *optional*): What to keep of a canonical row.
    """

    def check(index: int) -> dict[str, Any] | RowError:
        row = rows[index]
        if isinstance(row, RowError):
            return row.at(index, row.id, source)
        try:
            return keep(normalise_row(row, index=index, source=source, check_images=check_images))
        except RowError as error:
            return error

    pool = ThreadPoolExecutor(max_workers=min(CHECK_THREADS, 4 * (os.cpu_count() or 1)))
    try:
        yield from _unique_ids(_with_progress(pool.map(check, range(len(rows))), len(rows)), source)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _with_progress(results: Iterator, total: int) -> Iterator:
    if total <= PROGRESS_FROM:
        return results
    from tqdm.auto import tqdm

    return tqdm(results, total=total, desc="Checking rows", unit="row")


def _unique_ids(results: Iterator[dict | RowError], source: str) -> Iterator[dict | RowError]:
    first: dict[str, int] = {}
    for index, result in enumerate(results):
        if isinstance(result, dict) and first.setdefault(result["id"], index) != index:
            reason = f"is the id of row {first[result['id']]} already. Give every row its own, or drop the column."
            yield RowError("id", reason, index, result["id"], source)
        else:
            yield result


def check_rows(
    rows: Sequence[Mapping[str, Any] | RowError],
    *,
    skip_bad_rows: bool = False,
    source: str = "data",
    check_images: bool | str = True,
    keep: Callable[[dict], dict] = dict,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """
    Checks all rows.

    Args:
        rows (`Sequence`): Rows, or a `datasets.Dataset`.
        skip_bad_rows (`bool`, *optional*, defaults to `False`): List bad rows instead of stopping at the first.
        source (`str`, *optional*, defaults to `"data"`): Where they came from, for messages.
        check_images (`bool` or `str`, *optional*, defaults to `True`): See [`normalise_row`].
        keep (`Callable`, *optional*): What to keep of a canonical row.

    Returns:
        `tuple`: the canonical rows, and the bad ones as `{"row", "id", "field", "reason"}`.

    Raises:
        `RowError`: the first bad row, unless they are skipped.
        `DataError`: there are no rows, or all of them are bad.
    """
    if len(rows) == 0:
        raise DataError(f"{source} has no rows. Give a data set with at least one.")
    good, bad = [], []
    with closing(iter_checked(rows, source=source, check_images=check_images, keep=keep)) as results:
        for result in results:
            if not isinstance(result, RowError):
                good.append(result)
            elif skip_bad_rows:
                bad.append(result.as_dict())
            else:
                raise result
    if not good:
        first = bad[0]
        raise DataError(
            f"All {len(bad)} rows of {source} are bad; the first, row {first['row']}, field `{first['field']}`: "
            f"{first['reason']}"
        )
    return good, bad
