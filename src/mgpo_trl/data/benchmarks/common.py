"""What the adapters of published sets share: opening a copy, and rows that are read one at a time."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..fields import DataError, RowError
from ..folder import pick_split
from ..huggingface import FORMATS, embedded_images, is_embeddable, load_dataset_of
from ..schema import Source
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
    """Column with the image itself, or with its bytes or base64 text. `None`: `read` gives the path, under `image`."""
    required: tuple[str, ...] = ()
    """Columns without which the copy is another data set."""
    extras: tuple[str, ...] = ()
    """Keys of what `read` returns that are kept as further columns."""
    open: Callable[[Path], Any] | None = None
    """Opens a local copy that is no Parquet, Arrow or TSV; returns a `datasets.Dataset`."""
    snapshot: bool = False
    """Whether the files of the repository are needed, not only its table."""
    official: str | None = None
    """Name of the scoring script that its authors use, see [`mgpo_trl.evaluation.extractors`]."""


def load_benchmark(benchmark: Benchmark, path: str | None = None, split: str | None = None) -> Source:
    """
    Open a published set without decoding an image.

    Args:
        benchmark ([`Benchmark`]): Which one.
        path (`str`, *optional*): A local copy: Parquet, Arrow, TSV, a directory of them, or the repository's files.
        split (`str`, *optional*): A split other than the usual one.

    Raises:
        `DataError`: The copy is missing, cannot be read, or is another data set.
    """
    folder = Path(path).expanduser() if path else None
    if folder is None and benchmark.snapshot:
        folder = _snapshot(benchmark)
    data = _open(benchmark, folder, split)
    name = benchmark.name if path is None else f"{benchmark.name}:{path}"
    if missing := [column for column in benchmark.required if column not in data.column_names]:
        raise DataError(
            f"{name} has no column `{missing[0]}`, only {', '.join(data.column_names) or 'none'}: it is not "
            f"{benchmark.hub_id}. Give a copy of that repository."
        )
    base = folder.parent if folder and folder.is_file() else folder or Path()
    images, digests = _images(data, benchmark)
    rows = _Rows(data, benchmark, base, images, digests)
    extras = {
        key: [row.get(key) if isinstance(row, dict) else None for row in rows.texts()] for key in benchmark.extras
    }
    return Source(name, rows, images, extras or None)


def _snapshot(benchmark: Benchmark) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(benchmark.hub_id, repo_type="dataset"))
    except Exception as error:  # the Hub client raises many types
        raise DataError(
            f"The files of {benchmark.hub_id} cannot be fetched ({type(error).__name__}). Check the connection, or "
            f"give a local copy: `{benchmark.name}:PATH`."
        ) from error


def _open(benchmark: Benchmark, folder: Path | None, split: str | None):
    if folder is None:
        spec = benchmark.hub_id + (f":{benchmark.config}" if benchmark.config else "")
        return load_dataset_of(spec, split or benchmark.split)
    if not folder.exists():
        raise DataError(f"There is no '{folder}'. Give a copy of {benchmark.hub_id}, or `{benchmark.name}` alone.")
    if benchmark.open is not None:
        return benchmark.open(folder)
    if benchmark.image and (data := stream_base64(folder, benchmark.image)) is not None:
        return data
    loaded = load_dataset_of(str(folder), None)
    if not isinstance(loaded, dict):
        return loaded
    return pick_split(loaded, split or (benchmark.split if benchmark.split in loaded else None), str(folder))


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
        return embedded_images(data, column), None
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
        heavy = [benchmark.image, DIGEST] if images is not None else []
        self._data = data.select_columns([name for name in data.column_names if name not in heavy])
        self._benchmark, self._folder, self._images, self._digests = benchmark, folder, images, digests

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        row = self._read(index)
        if isinstance(row, RowError) or self._images is None:
            return row
        image = self._images[index]["image"]
        if self._digests is not None and self._digests[index] is None:
            return RowError("image", f"column `{self._benchmark.image}` holds no valid base64. Replace the row.")
        return {**row, "image": image}

    def texts(self) -> Iterator[dict[str, Any] | RowError]:
        """Every row without its image."""
        return (self._read(index) for index in range(len(self)))

    def _read(self, index: int) -> dict[str, Any] | RowError:
        try:
            row = self._benchmark.read(self._data[index], self._folder)
        except RowError as error:
            return error
        if self._digests is not None:
            row = {"group": self._digests[index], **row}
        return row


def folder_path(folder: Path, name: Any, field: str = "image") -> str:
    """Absolute path of a file that a row names relative to the copy's folder."""
    if not isinstance(name, str) or not name.strip():
        raise RowError(field, f"names no file ({name!r}). Give every row the path of its image.")
    return os.path.abspath(folder / name.strip())


__all__ = ["FORMATS", "Benchmark", "RowError", "folder_path", "load_benchmark"]
