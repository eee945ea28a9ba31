"""What the benchmarks share: the conditions of a run, and its result file."""

import json
import platform
from datetime import UTC, datetime
from pathlib import Path

from mgpo_trl.records.run import git_state, library_versions

RESULTS = Path(__file__).parent / "results"


def conditions(command: list[str]) -> dict:
    """Where and with what a figure was measured."""
    commit, dirty = git_state()
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(command),
        "commit": commit,
        "dirty": dirty,
        "machine": f"{platform.machine()}, {cores()} cores, {platform.system()}",
        "versions": library_versions(),
    }


def cores() -> int:
    """Processor cores that this process may use."""
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def write_result(name: str, result: dict) -> Path:
    """Write `results/NAME.json`."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return path


def peak_mb() -> int:
    """
    Largest resident memory of this process so far, in MB. `getrusage` would carry over the peak of the process that
    started this one. Linux only.
    """
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) // 1024
