"""The report of an evaluation: `report.json` for programs, `report.md` for people. Needs records, no model."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..records import RecordError, read_rollouts, read_run, write_atomically, write_json
from .metrics import Metrics
from .tables import markdown_table, percent, report_tables

REPORT_JSON = "report.json"
REPORT_MD = "report.md"
# What the report repeats from the record of the run, so that a number is never read without it.
FROM_RUN = (
    "max_pixels", "min_pixels", "decoding", "bad_rows", "prompts_fingerprint", "protocol_version", "seed", "model",
    "dataset", "split", "commit", "dirty", "n_expected",
)  # fmt: skip


def build_report(records: Iterable[Mapping[str, Any]], run: Mapping[str, Any]) -> dict[str, Any]:
    """
    Scores rollout records and puts the conditions of the run beside the figures.

    Args:
        records (`Iterable[Mapping]`):
            Rollout records, read once and not kept.
        run (`Mapping`):
            The record of the run. Conditions are looked up in it and then in its `config`.

    Returns:
        `dict`: `accuracy`, `n`, `by_category`, `valid_ratio`, `status`, `crop_area`, `coverage`, `hit_rate`, the
        conditions `max_pixels`, `min_pixels`, `num_rounds`, `decoding`, `bad_rows`, `prompts_fingerprint`,
        `protocol_version`, `commit` and more. What is not known is `None`.
    """
    metrics = Metrics()
    for record in records:
        metrics.add(record)
    summary = metrics.summary()
    conditions = {name: _from_run(run, name) for name in FROM_RUN}
    conditions["bad_rows"] = conditions["bad_rows"] or []
    asked = _from_run(run, "num_rounds")
    if asked not in (None, summary["num_rounds"]):
        raise RecordError(
            f"The rollouts have {summary['num_rounds']} rounds, the run record says {asked}. They belong to different "
            "runs; give each run its own directory."
        )
    return {**summary, **conditions}


def _from_run(run: Mapping[str, Any], name: str) -> Any:
    return run[name] if name in run else (run.get("config") or {}).get(name)


def write_report(directory: str | os.PathLike, report: Mapping[str, Any]) -> Path:
    """Writes `report.json` and `report.md` into `directory` and returns the path of the former."""
    directory = Path(directory)
    write_atomically(directory / REPORT_MD, format_report(report).encode(errors="backslashreplace"))
    write_json(directory / REPORT_JSON, report)
    return directory / REPORT_JSON


def rescore(directory: str | os.PathLike) -> dict[str, Any]:
    """
    Scores the rollouts of a run again, without its model, and writes the report.

    Args:
        directory (`str` or `os.PathLike`): Directory with `run.json` and `rollouts.jsonl`.

    Returns:
        `dict`: the report.
    """
    report = build_report(read_rollouts(Path(directory)), read_run(directory))
    write_report(directory, report)
    return report


def format_report(report: Mapping[str, Any]) -> str:
    """The report in Markdown. The title carries n, the pixel cap and the decoding."""
    lines = [f"# {title(report)}", "", *_notes(report)]
    for table in report_tables(report):
        lines += [*markdown_table(table), ""]
    prompts = f"Prompts `{report['prompts_fingerprint']}`, protocol {report['protocol_version']}"
    lines.append(f"{prompts}, {_commit(report)}.")
    return "\n".join(lines) + "\n"


def title(report: Mapping[str, Any]) -> str:
    """One line with the main figure and everything it depends on."""
    accuracy = report["accuracy"]
    rounds = f"{report['num_rounds']} round{'s' * (report['num_rounds'] != 1)}"
    conditions = [f"n = {report['n']}", _pixels(report), _decoding(report["decoding"]), rounds]
    return f"{percent(accuracy['strict'], accuracy['stderr']['strict'])} strict ({', '.join(conditions)})"


def _pixels(report: Mapping[str, Any]) -> str:
    cap = report["max_pixels"]
    if cap is None:
        return "pixel cap not recorded"
    tokens, rest = divmod(cap, 28 * 28)
    return f"max_pixels {cap:,}" + (f" = {tokens}x28x28" if rest == 0 else "")


def _decoding(decoding: Any) -> str:
    if decoding is None:
        return "decoding not recorded"
    if isinstance(decoding, Mapping):
        return ", ".join(f"{name} {value}" for name, value in decoding.items())
    return str(decoding)


def _notes(report: Mapping[str, Any]) -> list[str]:
    notes = []
    expected = report.get("n_expected")
    if expected is not None and expected != report["n"]:
        notes.append(f"**Not finished: {report['n']} of {expected} rollouts.**")
    if report["n_questions"] != report["n"]:
        notes.append(f"{report['n_questions']} questions; standard errors allow for several rollouts of one question.")
    if report["bad_rows"]:
        notes.append(f"{len(report['bad_rows'])} bad rows of the data set were skipped; `{REPORT_JSON}` lists them.")
    return [line for note in notes for line in (note, "")]


def _commit(report: Mapping[str, Any]) -> str:
    if report["commit"] is None:
        return "commit not known"
    return f"commit {report['commit'][:12]}" + (" with local changes" if report["dirty"] else "")
