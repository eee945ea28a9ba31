"""`rollouts.jsonl`: one rollout a line, appended as it is finished, safe against a kill at any moment."""

import json
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .strict_json import RecordError, dumps

try:
    import fcntl
except ImportError:  # not on Windows: there, nothing stops two writers on one file
    fcntl = None

logger = logging.getLogger(__name__)

ROLLOUTS_FILE = "rollouts.jsonl"
LOCK_WAIT_S = 5.0

_SAMPLE_SUFFIX = re.compile(r"/sample-\d+$")


def sample_id(question_id: str, sample: int) -> str:
    """Id of the `sample`-th rollout of one question: `sample_id("q7", 2)` is `"q7/sample-2"`."""
    return f"{question_id}/sample-{sample}"


def question_id(record_id: str) -> str:
    """The question that a rollout id belongs to: `"q7"` for both `"q7"` and `"q7/sample-2"`."""
    return _SAMPLE_SUFFIX.sub("", record_id)


class RolloutWriter:
    """
    Appends rollout records to a JSON Lines file. When `write` has returned, the record survives the death of the
    process.

    Opening a file cuts off a half-written last line. The file is locked, so that two processes cannot mix their lines.

    Args:
        path (`str` or `os.PathLike`):
            The file, or its directory; made if absent.
        unique (`bool`, *optional*, defaults to `True`):
            Refuse an id that is in the file already.
        fsync (`bool`, *optional*, defaults to `False`):
            Also survive a power cut, at the cost of a disk flush a record.

    Example:

    ```python
    with RolloutWriter("out/rollouts.jsonl") as writer:
        for rollout in rollouts:
            if rollout.id not in writer.seen:
                writer.write(rollout.to_record())
    ```
    """

    def __init__(self, path: str | os.PathLike, *, unique: bool = True, fsync: bool = False):
        self.path = rollouts_file(path)
        self._unique, self._fsync = unique, fsync
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            self._lock()
            self._drop_half_line()
            self.seen: set[str] = seen_ids(self.path) if unique else set()
        except BaseException:
            self.close()
            raise

    def _lock(self) -> None:
        deadline = time.monotonic() + LOCK_WAIT_S  # a killed run's workers may live for a moment
        while fcntl is not None:
            try:
                return fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise RecordError(
                        f"Another process is writing to '{self.path}'. Wait for it, or use another directory."
                    ) from None
                time.sleep(0.1)

    def _drop_half_line(self) -> None:
        size = os.fstat(self._fd).st_size
        end = _end_of_last_line(self._fd, size)
        if end < size:
            logger.warning("Dropping a half-written last line (%d bytes) from '%s'.", size - end, self.path)
            os.ftruncate(self._fd, end)

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one record. Raises `RecordError` where its id is missing or recorded already."""
        identity = record.get("id")
        if not isinstance(identity, str) or not identity:
            raise RecordError(f"A rollout record needs a non-empty text `id`, got {identity!r}.")
        if self._unique and identity in self.seen:
            raise RecordError(f"The rollout '{identity}' is in '{self.path}' already. Skip the ids in `writer.seen`.")
        self._append(dumps(record) + b"\n")
        if self._fsync:
            os.fsync(self._fd)
        if self._unique:
            self.seen.add(identity)

    def _append(self, line: bytes) -> None:
        start = os.fstat(self._fd).st_size
        rest = memoryview(line)
        try:
            while rest:
                rest = rest[os.write(self._fd, rest) :]
        except BaseException:  # a full disk, an interrupt: the next record must not continue half a line
            os.ftruncate(self._fd, start)
            raise

    def close(self) -> None:
        """Closes the file and gives the lock back. May be called twice."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def __enter__(self) -> "RolloutWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def rollouts_file(path: str | os.PathLike) -> Path:
    """The rollouts file for `path`: itself where it ends in `.jsonl`, else `rollouts.jsonl` in that directory."""
    path = Path(path)
    return path if path.suffix == ".jsonl" else path / ROLLOUTS_FILE


def _end_of_last_line(fd: int, size: int, block: int = 1 << 16) -> int:
    """Offset just after the last newline of the file, 0 where there is none."""
    end = size
    while end > 0:
        start = max(0, end - block)
        newline = os.pread(fd, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


def read_rollouts(path: str | os.PathLike) -> Iterator[dict[str, Any]]:
    """
    Yields the records of a rollouts file one at a time. A half-written last line is skipped.

    Args:
        path (`str` or `os.PathLike`):
            The file, or the directory that holds `rollouts.jsonl`.
    """
    path = rollouts_file(path)
    if not path.is_file():
        raise RecordError(f"There are no rollouts at '{path}'. Give the directory that a run was written to.")
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                logger.warning("Skipping the half-written last line of '%s'.", path)
            elif line.strip():
                yield _parse_line(line, number, path)


def _parse_line(line: bytes, number: int, path: Path) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise RecordError(f"Line {number} of '{path}' is not JSON ({error}). Remove that line to continue.") from None
    if not isinstance(record, dict) or not isinstance(record.get("id"), str):
        raise RecordError(f"Line {number} of '{path}' is not a rollout record with an `id`. Remove it to continue.")
    return record


def seen_ids(path: str | os.PathLike) -> set[str]:
    """Ids of the rollouts recorded so far, empty where the file does not exist yet."""
    path = rollouts_file(path)
    return {record["id"] for record in read_rollouts(path)} if path.exists() else set()
