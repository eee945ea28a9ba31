"""One entrance for every source: find the adapter, check the rows, and build one `datasets.Dataset`."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from .benchmarks import find_benchmark, load_benchmark
from .folder import find_metadata, load_folder, pick_split
from .huggingface import FORMATS, is_hub_id, is_saved, load_huggingface
from .image_check import CHECKS
from .schema import COLUMNS, DataError, Source, check_rows
from .tables import SUFFIXES, load_table


@dataclass(frozen=True)
class LoadedRows:
    """A checked data set."""

    dataset: Any
    """A `datasets.Dataset` of canonical rows; its `image` column is `datasets.Image(decode=False)`."""
    bad_rows: list[dict[str, Any]]
    """Rows that were skipped, as `{"row", "id", "field", "reason"}`, for the record."""
    source: str
    """Where the rows came from."""


def load_rows(
    spec: Any,
    *,
    split: str | None = None,
    skip_bad_rows: bool = False,
    limit: int | None = None,
    check_images: bool | str = True,
    columns: Mapping[str, str] | None = None,
    extra_columns: Sequence[str] = (),
) -> LoadedRows:
    """
    Loads a data set of images with questions and answers.

    Args:
        spec (`str`, `os.PathLike` or `datasets.Dataset`):
            A `.jsonl`, `.json` or `.csv` file with image paths relative to it; a folder of images with
            `metadata.jsonl` or `metadata.csv`; a directory written by `save_to_disk`; a file or directory of Parquet
            or Arrow; a Hub id `owner/name[:config]`; a published set, `vstar` or `vstar:PATH` (see
            [`mgpo_trl.data.benchmarks`]); or a data set in memory.
        split (`str`, *optional*):
            The split, where the source has several. A source without splits counts as `"train"`.
        skip_bad_rows (`bool`, *optional*, defaults to `False`):
            Skip bad rows and list them in `bad_rows`, instead of stopping at the first.
        limit (`int`, *optional*):
            Use only the first `limit` rows of the source.
        check_images (`bool` or `str`, *optional*, defaults to `True`):
            `True` or `"header"` opens every image and reads its size; a file that is cut off behind its header is only
            found when it is used. `"full"` decodes every image. `False` or `"none"` opens none.
        columns (`Mapping[str, str]`, *optional*):
            Our column name to theirs, where they differ: `{"choices": "options"}`. Of a published set, the name on its
            card to the one in your copy.
        extra_columns (`Sequence[str]`, *optional*):
            Further columns to keep, for instance for a reward function. Others are left out.

    Returns:
        [`LoadedRows`]

    Raises:
        `DataError`: the source cannot be read, is empty, lacks a column, or has bad rows only.
        `RowError`: a bad row, see [`~mgpo_trl.data.schema.normalise_row`].
    """
    if limit is not None and limit < 1:
        raise DataError(f"`limit` must be at least 1, got {limit}. Leave it out to use every row.")
    if check_images not in CHECKS:
        raise DataError(f"`check_images` must be one of {list(CHECKS)}, got {check_images!r}.")
    source = _open(spec, split, columns, extra_columns, limit)
    if limit is not None:
        source = _first(source, limit)
    dataset, bad = _checked_dataset(source, skip_bad_rows, check_images)
    return LoadedRows(dataset, bad, source.name)


def _open(
    spec: Any,
    split: str | None,
    columns: Mapping[str, str] | None,
    extra_columns: Sequence[str],
    limit: int | None,
) -> Source:
    options = {"columns": columns, "extra_columns": extra_columns}
    if not isinstance(spec, (str, os.PathLike)):
        return load_huggingface(spec, split=split, **options)
    if isinstance(spec, str) and (found := find_benchmark(spec)):
        return load_benchmark(*found, split, limit=limit, **options)
    path = Path(spec).expanduser()
    if path.is_file() and path.suffix in SUFFIXES:
        pick_split({None: path}, split, str(spec))
        return load_table(path, **options)
    if path.is_dir() and not is_saved(path) and find_metadata(path):
        return load_folder(path, split=split, **options)
    if path.is_file() and path.suffix in FORMATS or path.is_dir() and _readable_directory(path):
        return load_huggingface(path, split=split, **options)
    if not path.exists() and is_hub_id(str(spec)):
        return load_huggingface(str(spec), split=split, **options)
    raise DataError(_no_adapter(path))


def _readable_directory(path: Path) -> bool:
    return is_saved(path) or any(next(path.rglob(f"*{suffix}"), None) for suffix in FORMATS)


def _no_adapter(path: Path) -> str:
    accepted = (
        f"Give a {', '.join((*SUFFIXES, *FORMATS))} file, a folder with metadata.jsonl or metadata.csv, a directory "
        "written by `save_to_disk`, or a Hub id `owner/name`."
    )
    if not path.exists():
        return f"There is no '{path}'. {accepted}"
    held = sorted(entry.name for entry in islice(path.iterdir(), 20)) if path.is_dir() else [path.name]
    return f"'{path}' is not a data set that can be read; it holds {', '.join(held[:8]) or 'nothing'}. {accepted}"


def _first(source: Source, limit: int) -> Source:
    rows = source.rows[:limit]
    extras = source.extras
    if isinstance(extras, dict):
        extras = {name: values[:limit] for name, values in extras.items()}
    elif extras is not None:
        extras = extras.select(range(len(rows)))
    images = source.images.select(range(len(rows))) if source.images is not None else None
    return replace(source, rows=rows, images=images, extras=extras)


def _checked_dataset(source: Source, skip_bad_rows: bool, check_images: bool | str) -> tuple[Any, list[dict]]:
    """One data set of the checked texts and, beside them, the untouched images: no image is copied."""
    from datasets import concatenate_datasets

    embedded = source.images is not None
    good, bad = check_rows(
        source.rows,
        skip_bad_rows=skip_bad_rows,
        source=source.name,
        check_images=check_images,
        keep=_without_image if embedded else dict,
    )
    skipped = {entry["row"] for entry in bad}
    remaining = iter(good)
    texts = [{} if index in skipped else next(remaining) for index in range(len(source.rows))]
    parts = [_text_columns(texts, embedded), *([source.images] if embedded else []), *_extra_columns(source)]
    dataset = concatenate_datasets(parts, axis=1)
    if skipped:
        dataset = dataset.select([index for index in range(len(texts)) if index not in skipped])
    return dataset.select_columns([*COLUMNS, *(name for name in dataset.column_names if name not in COLUMNS)]), bad


def _without_image(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "image"}


def _text_columns(rows: list[dict[str, Any]], embedded: bool) -> Any:
    from datasets import Dataset, Features, Image, List, Value

    text = Value("string")
    features = {
        "id": text, "image": Image(decode=False), "question": text, "choices": List(text), "answer": text,
        "target_boxes": List(List(Value("float64"))), "category": text, "group": text,
    }  # fmt: skip
    if embedded:
        del features["image"]
    return Dataset.from_dict({name: [row.get(name) for row in rows] for name in features}, features=Features(features))


def _extra_columns(source: Source) -> list[Any]:
    from datasets import Dataset

    if not isinstance(source.extras, dict):
        return [] if source.extras is None else [source.extras]
    parts = []
    for name, values in source.extras.items():
        try:
            parts.append(Dataset.from_dict({name: values}))
        except Exception as error:  # Arrow's errors have no common type
            said = str(error).splitlines()[0]
            raise DataError(f"Extra column `{name}` of {source.name} mixes types ({said}). Give it one.") from error
    return parts
