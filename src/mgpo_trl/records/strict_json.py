"""Strict JSON: what a run writes can be read by any parser, and holds no secret."""

import dataclasses
import enum
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_SECRET_KEY = re.compile(r"(hub|auth|access|api)[_-]?(token|key)$|password$|secret$", re.IGNORECASE)
_SECRET_VALUE = re.compile(r"\bhf_[A-Za-z0-9]{16,}")


class RecordError(ValueError):
    """A record on disk that cannot be read, or that must not be written over or continued."""


def to_json(value: Any) -> Any:
    """Plain JSON value for `value`: NaN and infinities become `None`, secrets are masked, the unknown becomes text."""
    if value is None or isinstance(value, (bool, int)) and not isinstance(value, enum.Enum):
        return value
    if isinstance(value, enum.Enum):
        return to_json(value.value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, str):
        return _SECRET_VALUE.sub("<token>", value)
    if isinstance(value, Mapping):
        return {str(k): "<masked>" if v and _SECRET_KEY.search(str(k)) else to_json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted((to_json(item) for item in value), key=str)
    return _other_to_json(value)


def _other_to_json(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_json({f.name: getattr(value, f.name) for f in dataclasses.fields(value)})
    for convert in ("tolist", "item"):  # numpy and torch arrays and scalars, without importing either
        if callable(getattr(value, convert, None)) and not isinstance(value, type):
            return to_json(getattr(value, convert)())
    return to_json(str(value))


def dumps(value: Any, indent: int | None = None) -> bytes:
    """`value` as strict JSON in UTF-8, see [`to_json`]."""
    clean = to_json(value)
    try:
        return json.dumps(clean, allow_nan=False, ensure_ascii=False, indent=indent).encode()
    except UnicodeEncodeError:  # a lone surrogate in what a model wrote: only escaped JSON can carry it
        return json.dumps(clean, allow_nan=False, indent=indent).encode()


def mask_command(words: Sequence[str]) -> list[str]:
    """The words of a command line, without the values of `--hub_token X`, `--hub_token=X` and their like."""
    masked: list[str] = []
    for word in map(str, words):
        name, equals, _ = word.partition("=")
        if masked and _is_secret_option(masked[-1]):
            word = "<masked>"
        elif equals and _is_secret_option(name):
            word = f"{name}=<masked>"
        masked.append(word)
    return masked


def _is_secret_option(word: str) -> bool:
    return word.startswith("--") and _SECRET_KEY.search(word) is not None


def write_atomically(path: str | os.PathLike, content: bytes) -> None:
    """Writes a file so that a reader, or a kill, finds the old content or the new one and nothing between."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes `value` as strict, indented JSON in one step."""
    write_atomically(path, dumps(value, indent=2) + b"\n")
