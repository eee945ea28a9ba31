"""Adapter for one local file of rows: JSON Lines, a JSON list, or CSV. Image paths are relative to the file."""

import csv
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .columns import resolve_columns
from .schema import DataError, RowError, Source

SUFFIXES = (".jsonl", ".json", ".csv")


def read_table(path: Path) -> list[dict[str, Any] | RowError]:
    """Rows of the file as they stand there; a line that cannot be read is its error."""
    if path.suffix == ".csv":
        return _csv_rows(path)
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if path.suffix == ".json":
        return _json_list(content, path)
    return [_json_object(line, number) for number, line in enumerate(content.split(b"\n"), 1) if line.strip()]


def _csv_rows(path: Path) -> list[dict[str, Any] | RowError]:
    too_long = RowError("row", "has more cells than the header. Put quotes around a cell that holds a comma.")
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            return [too_long if None in row else row for row in csv.DictReader(file)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"'{path}' cannot be read as CSV in UTF-8 ({error}). Save it in that form.") from None


def _json_list(content: bytes, path: Path) -> list[dict[str, Any] | RowError]:
    try:
        rows = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"'{path}' is not JSON ({error}). Give a list of rows, or name JSON Lines `.jsonl`.") from None
    if not isinstance(rows, list):
        raise DataError(f"'{path}' holds a JSON {type(rows).__name__}. Give a list of rows.")
    return [row if isinstance(row, dict) else RowError("row", "is not a JSON object.") for row in rows]


def _json_object(line: bytes, number: int) -> dict[str, Any] | RowError:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return RowError("row", f"line {number} of the file is not JSON ({error}). Correct or remove it.")
    return row if isinstance(row, dict) else RowError("row", f"line {number} of the file is not a JSON object.")


def load_table(
    path: str | os.PathLike, *, columns: Mapping[str, str] | None = None, extra_columns: Sequence[str] = ()
) -> Source:
    """
    Reads a `.jsonl`, `.json` or `.csv` file.

    Args:
        path (`str` or `os.PathLike`): The file.
        columns (`Mapping`, *optional*): Our column name to theirs, where they differ.
        extra_columns (`Sequence[str]`, *optional*): Further columns to keep.
    """
    path = Path(path)
    rows = read_table(path)
    found = list(dict.fromkeys(name for row in rows if isinstance(row, dict) for name in row if name is not None))
    if not found and rows:
        raise next(iter(rows)).at(0, None, str(path))
    mapping = resolve_columns(found, columns, extra_columns, str(path)) if rows else {}
    return Source(
        name=str(path),
        rows=[_renamed(row, mapping, path.parent) for row in rows],
        extras={name: [row.get(name) if isinstance(row, dict) else None for row in rows] for name in extra_columns},
    )


def _renamed(row: dict[str, Any] | RowError, mapping: Mapping[str, str], folder: Path) -> dict[str, Any] | RowError:
    if isinstance(row, RowError):
        return row
    renamed = {ours: row.get(theirs) for ours, theirs in mapping.items()}
    if isinstance(renamed["image"], str) and renamed["image"].strip():
        renamed["image"] = os.path.abspath(folder / os.path.expanduser(renamed["image"].strip()))
    return renamed
