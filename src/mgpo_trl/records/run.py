"""`run.json`: what was asked for and by which code, written before the work starts."""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .strict_json import RecordError, mask_command, to_json, write_json

RUN_FILE = "run.json"
LIBRARIES = (
    "mgpo-trl", "torch", "trl", "transformers", "peft", "accelerate", "datasets", "pillow", "deepspeed", "bitsandbytes"
)  # fmt: skip
# Where and when a run happened, not what it computes: these may differ between a run and its continuation.
NOT_COMPARED = frozenset({"time", "command", "python", "platform", "versions", "commit", "dirty", "resumed"})


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def git_state() -> tuple[str | None, bool | None]:
    """Commit of the repository around the working directory and whether tracked files differ from it, else Nones."""
    commit = _git("rev-parse", "--verify", "HEAD")
    if commit is None:
        return None, None
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return commit, None if changes is None else bool(changes)


def library_versions() -> dict[str, str | None]:
    """Installed versions of `LIBRARIES`, `None` where one is absent. Imports none of them."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def run_record(
    config: Mapping[str, Any],
    *,
    prompts_fingerprint: str,
    max_pixels: int | None,
    min_pixels: int | None,
    seed: int | None,
    command: list[str] | str | None = None,
    **extra: Any,
) -> dict[str, Any]:
    """
    Describes a run before it starts: what was asked for, and by which code.

    Args:
        config (`Mapping`):
            The resolved configuration, defaults included.
        prompts_fingerprint (`str`):
            Fingerprint of the prompt template.
        max_pixels (`int` or `None`), min_pixels (`int` or `None`):
            The pixel budget of the view, as the processor applies it.
        seed (`int` or `None`):
            Seed of the run.
        command (`list[str]` or `str`, *optional*):
            The command line, `sys.argv` when not given.
        **extra:
            More entries of the record, such as `num_rounds`, `decoding`, `bad_rows`, `protocol_version`.

    Returns:
        `dict`: plain JSON values only; secrets are masked.
    """
    commit, dirty = git_state()
    own = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command if isinstance(command, str) else mask_command(sys.argv if command is None else command),
        "commit": commit,
        "dirty": dirty,
        "versions": library_versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "seed": seed,
        "max_pixels": max_pixels,
        "min_pixels": min_pixels,
        "prompts_fingerprint": prompts_fingerprint,
    }
    if clash := sorted((own.keys() | {"config", "resumed"}) & extra.keys()):
        raise RecordError(f"{clash} are filled in by `run_record` itself. Give the extra entries other names.")
    return to_json({**own, **extra, "config": config})


def read_run(path: str | os.PathLike) -> dict[str, Any]:
    """Reads the `run.json` at `path`, a file or the directory that holds it."""
    path = _run_file(path)
    try:
        record = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise RecordError(f"There is no '{path}'. Give the directory that a run was written to.") from None
    except ValueError as error:
        raise RecordError(f"'{path}' is not JSON ({error}). Delete it, or run into another directory.") from None
    if not isinstance(record, dict):
        raise RecordError(f"'{path}' holds {type(record).__name__} where a JSON object is expected.")
    return record


def _run_file(path: str | os.PathLike) -> Path:
    path = Path(path)
    return path if path.suffix == ".json" else path / RUN_FILE


def check_resumable(existing: Mapping[str, Any], new: Mapping[str, Any], ignore: Iterable[str] = ()) -> None:
    """
    Raises unless `new` asks for the same work as the `existing` record. Time, command line, machine, versions and
    commit may differ; they are noted under `resumed` instead.

    Args:
        existing (`Mapping`), new (`Mapping`):
            Two records of `run_record`.
        ignore (`Iterable[str]`, *optional*):
            Further keys that may differ, dotted where nested, such as `"config.batch_size"`.
    """
    ignore = NOT_COMPARED | set(ignore)
    differing = sorted(_differences(to_json(existing), to_json(new), ignore))
    if differing:
        shown = "; ".join(f"`{key}` was {_short(old)}, is now {_short(now)}" for key, old, now in differing)
        raise RecordError(
            f"The directory holds a run with another configuration: {shown}. Use the same configuration to continue "
            "that run, or another directory to start a new one."
        )


def _differences(existing: dict, new: dict, ignore: set[str], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    for key in existing.keys() | new.keys():
        name = prefix + key
        old, now = existing.get(key), new.get(key)
        if name in ignore or old == now:
            continue
        if isinstance(old, dict) and isinstance(now, dict):
            yield from _differences(old, now, ignore, f"{name}.")
        else:
            yield name, json.dumps(old), json.dumps(now)


def _short(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."


def write_run(
    path: str | os.PathLike, record: Mapping[str, Any], *, ignore: Iterable[str] = (), overwrite: bool = False
) -> dict[str, Any]:
    """
    Writes `run.json` in one step (never half). Where one stands already, it is continued: the first record is kept and
    a note of this start is added under `resumed`; a different configuration is refused.

    Args:
        path (`str` or `os.PathLike`):
            The directory, made if absent, or a path that ends in `.json`.
        record (`Mapping`):
            What `run_record` returned.
        ignore (`Iterable[str]`, *optional*):
            Keys that may differ from the record there, see [`check_resumable`].
        overwrite (`bool`, *optional*, defaults to `False`):
            Replace a record that stands there without comparing.

    Returns:
        `dict`: the record as it stands in the file.
    """
    path = _run_file(path)
    record = to_json(record)
    if path.exists() and not overwrite:
        existing = read_run(path)
        check_resumable(existing, record, ignore)
        note = {key: record.get(key) for key in ("time", "command", "commit", "dirty", "versions")}
        record = {**existing, "resumed": [*existing.get("resumed", []), note]}
    write_json(path, record)
    return record
