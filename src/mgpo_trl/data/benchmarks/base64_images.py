"""
Tables whose images are base64 text, read a few rows at a time: memory stays flat however long the table is.

The usual loaders hold a whole Parquet or TSV file in memory while they convert it. Here the rows are decoded one by
one into a cache file of the `datasets` library, which is memory-mapped; an unchanged table is not read again.
"""

import base64
import binascii
import csv
import hashlib
import os
import re
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from ..fields import DataError
from ..huggingface import is_saved

DIGEST = "digest"
"""Column with the digest of an image's bytes; `None` where they are no valid base64."""
WRITTEN_AT_ONCE = 4
"""Rows that are held before they are written."""
_OTHER_SIZE = re.compile(r"\d+k")
_HEAD = re.compile(r"\s*data:[\w/+.-]*;base64,")


def decoded_image(text: Any) -> dict[str, Any]:
    """The image in a base64 text, `{"image": {"bytes", "path"}, "digest"}`; both `None` where it is not valid."""
    try:
        data = base64.b64decode("".join(_HEAD.sub("", text or "", count=1).split()), validate=True)
    except (binascii.Error, ValueError, TypeError):
        data = b""
    digest = hashlib.sha256(data).hexdigest()[:16] if data else None
    return {"image": {"bytes": data, "path": None} if data else None, DIGEST: digest}


def stream_base64(path: Path, column: str, mark: str | None = None, limit: int | None = None):
    """
    A `datasets.Dataset` of a local Parquet or TSV table with its base64 column decoded.

    Args:
        path (`Path`): A `.parquet` or `.tsv` file, or a directory of such files; Parquet counts first.
        column (`str`): The column of base64 text.
        mark (`str`, *optional*): What names of files have in common where a directory holds sets of several sizes.
        limit (`int`, *optional*): Read the first rows only.

    Raises:
        `DataError`: the directory holds another size only.

    Returns:
        `datasets.Dataset` with the images as `{"bytes", "path"}` under `column`, and their `digest`; `None` where the
        path is no such table, or the column holds no text.
    """
    from datasets import Dataset, Image, Value

    files = _tables(path, mark)
    features = _features(files[0]) if files else {}
    if column not in features or features[column] != Value("string"):
        return None
    features = {**features, column: Image(decode=False), DIGEST: Value("string")}
    tables = [(str(file), os.path.getsize(file), os.path.getmtime(file)) for file in files]
    return Dataset.from_generator(
        _rows,
        features=_as_features(features),
        gen_kwargs={"tables": [tables], "column": column, "limit": limit},
        writer_batch_size=WRITTEN_AT_ONCE,
    )


def _tables(path: Path, mark: str | None) -> list[Path]:
    if path.is_file():
        return [path] if path.suffix in (".parquet", ".tsv") else []
    if is_saved(path):
        return []
    found = sorted(path.rglob("*.parquet")) or sorted(path.rglob("*.tsv"))
    marked = [file for file in found if mark is not None and mark in file.name]
    if mark is not None and not marked and any(_OTHER_SIZE.search(file.name) for file in found):
        names = ", ".join(file.name for file in found[:8])
        raise DataError(f"'{path}' has no table with `{mark}` in its name, only {names}. Give the other set.")
    return marked or found


def _features(file: Path) -> dict[str, Any]:
    """Columns and their types; the cells of a TSV file are text."""
    from datasets import Features, Value

    if file.suffix == ".tsv":
        with open(file, encoding="utf-8-sig", newline="") as opened:
            return {name: Value("string") for name in next(csv.reader(opened, delimiter="\t"), [])}
    import pyarrow.parquet as pq

    found = dict(Features.from_arrow_schema(pq.read_schema(file)))
    return {name: Value("string") if feature == Value("large_string") else feature for name, feature in found.items()}


def _as_features(features: dict[str, Any]):
    from datasets import Features

    return Features(features)


def _rows(tables: list, column: str, limit: int | None) -> Iterator[dict[str, Any]]:
    found = (row for path, *_ in tables[0] for row in _table_rows(path))
    for row in islice(found, limit):
        image = decoded_image(row[column])
        yield {**row, column: image["image"], DIGEST: image[DIGEST]}


def _table_rows(path: str) -> Iterator[dict[str, Any]]:
    return _tsv_rows(path) if path.endswith(".tsv") else _parquet_rows(path)


def _parquet_rows(path: str) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path, pre_buffer=False, memory_map=True) as file:
        for batch in file.iter_batches(batch_size=2):
            yield from batch.to_pylist()


def _tsv_rows(path: str) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # a cell holds a whole image
    with open(path, encoding="utf-8-sig", newline="") as file:
        yield from csv.DictReader(file, delimiter="\t")
