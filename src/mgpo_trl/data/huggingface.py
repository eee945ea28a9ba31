"""Adapter for what the `datasets` library reads: a Hub id, a saved data set, local Parquet or Arrow files."""

import copy
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .columns import resolve_columns
from .folder import pick_split
from .schema import DataError, Source

FORMATS = {".parquet": "parquet", ".arrow": "arrow"}
_HUB_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?")


def is_saved(path: Path) -> bool:
    """Whether `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote the directory."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def is_hub_id(spec: str) -> bool:
    """Whether `spec` reads as `owner/name` or `owner/name:config`."""
    return _HUB_ID.fullmatch(spec) is not None and Path(spec).suffix not in (*FORMATS, ".jsonl", ".json", ".csv")


def load_huggingface(
    spec: Any,
    *,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
    extra_columns: Sequence[str] = (),
) -> Source:
    """
    Opens a data set with the `datasets` library, without decoding an image.

    Args:
        spec (`str`, `os.PathLike` or `datasets.Dataset`): A Hub id `owner/name[:config]`, a directory written by
            `save_to_disk`, a directory or file of Parquet or Arrow, or a data set in memory.
        split (`str`, *optional*): The split; not needed where there is only one.
        columns (`Mapping`, *optional*): Our column name to theirs.
        extra_columns (`Sequence[str]`, *optional*): Further columns to keep.
    """
    from datasets import Dataset, DatasetDict

    loaded = spec if isinstance(spec, (Dataset, DatasetDict)) else load_dataset_of(spec, split)
    name = "the data set in memory" if loaded is spec else str(spec)
    splits = loaded if isinstance(loaded, DatasetDict) else {None: loaded}
    # What `load_dataset` returned for a split expression such as "train[:10]" is that split already.
    data = loaded if isinstance(loaded, Dataset) and _is_loader(spec) and split else pick_split(splits, split, name)
    data = data.with_format(None)
    if len(data) == 0:
        return Source(name, [])
    found = data.column_names
    mapping = resolve_columns(found, columns, extra_columns, name)
    base = Path(spec).parent if _is_path(spec) and Path(spec).is_file() else Path(spec) if _is_path(spec) else Path()
    images = _image_column(data, mapping["image"], base, name)
    extras = data.select_columns(list(extra_columns)) if extra_columns else None
    return Source(name, _Rows(data, mapping, images), images, extras)


def _is_path(spec: Any) -> bool:
    return isinstance(spec, (str, os.PathLike)) and Path(spec).exists()


def _is_loader(spec: Any) -> bool:
    return isinstance(spec, (str, os.PathLike)) and not is_saved(Path(spec))


def load_dataset_of(spec: str | os.PathLike, split: str | None, **options: Any) -> Any:
    """
    A Hub id, a saved data set, a table, or a directory of Parquet or Arrow, through the `datasets` library; `options`
    go to the loader of a Hub id.
    """
    from datasets import load_dataset, load_from_disk

    path, found = Path(spec), _HUB_ID.fullmatch(str(spec))
    try:
        if is_saved(path):
            return load_from_disk(str(path))
        if path.is_file():
            return load_dataset(FORMATS.get(path.suffix, "json"), data_files=str(path), split=split)
        if path.is_dir():
            return load_dataset(str(path), split=split)
        return load_dataset(found["name"], found["config"], split=split, **options)
    except Exception as error:  # `datasets` and the Hub client raise many types; all mean that there is no data
        said = str(error).strip().splitlines()
        raise DataError(
            f"'{spec}' cannot be loaded ({type(error).__name__}: {said[0] if said else 'no message'}). Give a local "
            "path that exists, or check the Hub id, its configuration, the split and the connection."
        ) from error


def _image_column(data: Any, column: str, base: Path, name: str) -> Any:
    """The image column alone, named `image`, as references that are not decoded."""
    from datasets import Dataset, Features, Image, Value

    images = data.select_columns([column])
    feature = images.features[column]
    if isinstance(feature, Value) and "string" in feature.dtype:
        paths = [None if path is None else os.path.abspath(base / path) for path in images[column]]
        return Dataset.from_dict({"image": paths}, features=Features({"image": Image(decode=False)}))
    if not is_embeddable(feature):
        raise DataError(
            f"The column `{column}` of {name} holds {feature}. Give one image a row: a path, the bytes of a file, or "
            "an Image column."
        )
    return embedded_images(data, column)


def is_embeddable(feature: Any) -> bool:
    """Whether a column of this type holds images themselves: an Image column, bytes, or `{"bytes", "path"}`."""
    from datasets import Image, Value

    binary = isinstance(feature, Value) and "binary" in feature.dtype
    struct = isinstance(feature, dict) and {"bytes", "path"} >= feature.keys()
    return binary or struct or isinstance(feature, Image)


def embedded_images(data: Any, column: str) -> Any:
    """The images of a column as the one column `image`, not decoded."""
    from datasets import Image

    images = data.select_columns([column])
    images = images if column == "image" else images.rename_column(column, "image")
    return images.cast_column("image", Image(decode=False))


class _Rows(Sequence):
    """Rows of a data set with our column names, read one at a time; class labels as their names."""

    def __init__(self, data: Any, mapping: Mapping[str, str], images: Any):
        from datasets import ClassLabel

        texts = {ours: theirs for ours, theirs in mapping.items() if ours != "image"}
        self._data, self._texts, self._images = data.select_columns(list(texts.values())), texts, images
        self._labels = {k: data.features[v] for k, v in texts.items() if isinstance(data.features[v], ClassLabel)}
        self._part = range(len(data))

    def __len__(self) -> int:
        return len(self._part)

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):  # as lazy as the whole: a list would hold the images
            part = copy.copy(self)
            part._part = self._part[index]
            return part
        index = self._part[index]
        found = self._data[index]
        row = {ours: found[theirs] for ours, theirs in self._texts.items()}
        for ours, labels in self._labels.items():
            row[ours] = None if row[ours] is None else labels.int2str(row[ours])
        return {**row, "image": self._images[index]["image"]}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))
