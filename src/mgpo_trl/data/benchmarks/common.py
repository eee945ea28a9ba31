"""What the adapters of published sets share: opening a copy, and rows that are read one at a time."""

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..fields import DataError, RowError
from ..folder import pick_split
from ..huggingface import FORMATS, embedded_images, is_embeddable, load_dataset_of
from ..schema import COLUMNS, Source
from .base64_images import DIGEST, WRITTEN_AT_ONCE, decoded_image, stream_base64

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Benchmark:
    """How one published set becomes rows of ours."""

    name: str
    """What the command line calls it."""
    hub_id: str
    """Repository of the data set."""
    split: str
    """The split that is used unless another is asked for."""
    read: Callable[[Row, Path], dict[str, Any]]
    """Source row and folder of the copy -> our columns without the image; raises `RowError`."""
    config: str | None = None
    """Configuration of the repository."""
    image: str | None = None
    """Column with the image itself, its bytes or base64 text. Where it is none of these, `read` gives the path, under
    `image`."""
    required: tuple[str, ...] = ()
    """Columns without which the copy is another data set."""
    ids: tuple[str, ...] = ()
    """Columns that together are the id of a row, those of them that it has; the position where it has none."""
    train_split: str | None = None
    """The split to train on, where it is another."""
    files: str | None = None
    """A part of the names of its files, where a directory holds several sets."""
    extras: tuple[str, ...] = ()
    """Keys of what `read` returns that are kept as further columns."""
    open: Callable[[Path], Any] | None = None
    """Opens a local copy that is no Parquet, Arrow or TSV; returns a `datasets.Dataset`."""
    snapshot: bool = False
    """Whether the files of the repository are needed, not only its table."""
    base64: bool = False
    """Whether the images are base64 text."""
    official: str | None = None
    """Name of the scoring script that its authors use, see [`mgpo_trl.evaluation.extractors`]."""


def load_benchmark(
    benchmark: Benchmark,
    path: str | None = None,
    split: str | None = None,
    *,
    columns: Mapping[str, str] | None = None,
    extra_columns: Sequence[str] = (),
    limit: int | None = None,
) -> Source:
    """
    Open a published set without decoding an image.

    Args:
        benchmark ([`Benchmark`]): Which one.
        path (`str`, *optional*): A local copy: Parquet, Arrow, TSV, a directory of them, or the repository's files.
        split (`str`, *optional*): A split other than the usual one.
        columns (`Mapping`, *optional*): A column's name on the card to its name in this copy, where they differ.
        extra_columns (`Sequence[str]`, *optional*): Further columns of the set to keep.
        limit (`int`, *optional*): Open the first rows only.

    Raises:
        `DataError`: The copy is missing, cannot be read, or is another data set.
    """
    folder = Path(path).expanduser() if path else None
    if folder is None and benchmark.snapshot:
        folder = _snapshot(benchmark)
    name = benchmark.name if path is None else f"{benchmark.name}:{path}"
    data = _open(benchmark, folder, split, limit)
    data = data.select(range(min(len(data), limit or len(data))))
    data = _named_as_on_the_card(data, columns or {}, name)
    if missing := [column for column in benchmark.required if column not in data.column_names]:
        raise DataError(
            f"{name} has no column `{missing[0]}`, only {', '.join(data.column_names) or 'none'}: it is not "
            f"{benchmark.hub_id}. Give a copy of that repository."
        )
    base = folder.parent if folder and folder.is_file() else folder or Path()
    images, digests = _images(data, benchmark)
    rows = _Rows(data, benchmark, base, images, digests)
    return Source(name, rows, images, {**_kept_columns(data, benchmark, extra_columns, name), **rows.extras()})


def _named_as_on_the_card(data, columns: Mapping[str, str], name: str):
    for ours, theirs in columns.items():
        if theirs not in data.column_names:
            found = ", ".join(data.column_names)
            raise DataError(f"{name} has no column `{theirs}`, only {found}. Name one of these.")
        if ours != theirs:
            data = data.remove_columns([ours] if ours in data.column_names else []).rename_column(theirs, ours)
    return data


def _kept_columns(data, benchmark: Benchmark, names: Sequence[str], source: str) -> dict[str, list]:
    names = [name for name in names if name not in benchmark.extras]  # these come by themselves
    if unknown := [name for name in names if name not in data.column_names]:
        raise DataError(
            f"There is no column `{unknown[0]}` in {source}, only {', '.join(data.column_names)}. Name one of these."
        )
    if clash := [name for name in names if name in COLUMNS]:
        raise DataError(f"`extra_columns` names `{clash[0]}`, which is one of ours. Take it out of `extra_columns`.")
    return {name: data[name][:] for name in names}


def _snapshot(benchmark: Benchmark) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(benchmark.hub_id, repo_type="dataset"))
    except Exception as error:  # the Hub client raises many types
        raise DataError(
            f"The files of {benchmark.hub_id} cannot be fetched ({type(error).__name__}). Check the connection, or "
            f"give a local copy: `{benchmark.name}:PATH`."
        ) from error


def _open(benchmark: Benchmark, folder: Path | None, split: str | None, limit: int | None):
    if folder is None:
        spec = benchmark.hub_id + (f":{benchmark.config}" if benchmark.config else "")
        # A row group is all 800 rows in one published file: 5 GB of text, where a batch of a few rows does.
        options = {"batch_size": WRITTEN_AT_ONCE} if benchmark.base64 else {}
        return load_dataset_of(spec, split or benchmark.split, **options)
    if not folder.exists():
        raise DataError(f"There is no '{folder}'. Give a copy of {benchmark.hub_id}, or `{benchmark.name}` alone.")
    if benchmark.open is not None:
        return benchmark.open(folder)
    if benchmark.base64 and (data := stream_base64(folder, benchmark.image, benchmark.files, limit)) is not None:
        return data
    loaded = load_dataset_of(str(folder), None)
    if not isinstance(loaded, dict):
        return loaded
    one_split = benchmark.train_split in (None, benchmark.split)
    if len(loaded) == 1 and (folder.is_file() or (one_split and split is None)):  # loaders call it "train"
        return next(iter(loaded.values()))
    return pick_split(loaded, split or benchmark.split, str(folder))


def _images(data, benchmark: Benchmark):
    """
    The embedded images as one column that stays on disk, and for each a digest of its bytes where it was base64;
    `(None, None)` where rows hold paths.
    """
    column = benchmark.image
    if column is None or column not in data.column_names:
        return None, None
    if DIGEST in data.column_names:
        return embedded_images(data, column), data[DIGEST]
    if is_embeddable(data.features[column]):
        images = embedded_images(data, column)
        # A column of that name may be there and empty, where the rows hold paths in another.
        return (images, None) if any((images[0]["image"] or {}).values()) else (None, None)
    if not benchmark.base64:
        return None, None
    from datasets import Features, Image, Value

    decoded = data.select_columns([column]).map(
        lambda row: decoded_image(row[column]),
        remove_columns=[column],
        features=Features({"image": Image(decode=False), DIGEST: Value("string")}),
        writer_batch_size=WRITTEN_AT_ONCE,
        desc=f"{benchmark.name}: decoding base64",
    )
    return decoded.select_columns(["image"]), decoded[DIGEST]


class _Rows(Sequence):
    """Rows of the set in our columns, read one at a time; a bad one is its error."""

    def __init__(self, data, benchmark: Benchmark, folder: Path, images, digests):
        from datasets import ClassLabel

        heavy = [benchmark.image, DIGEST] if images is not None else []
        self._data = data.select_columns([name for name in data.column_names if name not in heavy])
        self._benchmark, self._folder, self._images, self._digests = benchmark, folder, images, digests
        self._labels = {name: kind for name, kind in self._data.features.items() if isinstance(kind, ClassLabel)}
        self._part = range(len(data))

    def __len__(self) -> int:
        return len(self._part)

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):  # as lazy as the whole: a list would hold the images
            part = copy.copy(self)
            part._part = self._part[index]
            return part
        index = self._part[index]
        row = self._read(index)
        if isinstance(row, RowError) or self._images is None:
            return row
        if self._digests is not None and self._digests[index] is None:
            said = f"column `{self._benchmark.image}` holds no valid base64. Replace the row."
            return RowError("image", said, index, row["id"])
        return {**row, "image": self._images[index]["image"]}

    def extras(self) -> dict[str, list]:
        """The further columns that `read` makes; `None` where it refuses the row."""
        names = self._benchmark.extras
        made = [self._read(index) for index in self._part] if names else []
        return {name: [row.get(name) if isinstance(row, dict) else None for row in made] for name in names}

    def _read(self, index: int) -> dict[str, Any] | RowError:
        found = self._data[index]
        for name, labels in self._labels.items():
            found[name] = None if found[name] is None else labels.int2str(found[name])
        if self._images is not None and self._benchmark.extras:  # which may depend on the size of the image
            found[self._benchmark.image] = self._images[index]["image"]
        parts = [str(found[name]) for name in self._benchmark.ids if found.get(name) not in (None, "")]
        identity = "/".join(parts) or str(index)
        try:
            row = {"id": identity, **self._benchmark.read(found, self._folder)}
        except RowError as error:
            return RowError(error.field, error.reason, index, identity)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            said = f"is not laid out as a row of `{self._benchmark.name}` ({type(error).__name__}: {error})."
            return RowError("row", said, index, identity)
        return row if self._digests is None else {"group": self._digests[index], **row}


def folder_path(folder: Path, name: Any, field: str = "image") -> str:
    """Absolute path of a file that a row names relative to the copy's folder."""
    if not isinstance(name, str) or not name.strip():
        raise RowError(field, f"names no file ({name!r}). Give every row the path of its image.")
    return os.path.abspath(folder / name.strip())


__all__ = ["FORMATS", "Benchmark", "RowError", "folder_path", "load_benchmark"]
