"""The report of an evaluation: `report.json` for programs, `report.md` and `report.html` for people."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..records import RecordError, read_rollouts, read_run, write_atomically, write_json
from .extractors import EXTRACTORS
from .html_report import write_html
from .metrics import Metrics
from .tables import markdown_table, percent, report_tables

REPORT_JSON = "report.json"
REPORT_MD = "report.md"
# What the report repeats from the record of the run, so that a number is never read without it.
FROM_RUN = (
    "max_pixels", "min_pixels", "decoding", "bad_rows", "prompts_fingerprint", "protocol_version", "seed", "model",
    "dataset", "split", "commit", "dirty", "n_expected", "protocol", "left_out", "num_samples", "shuffle_choices",
    "official", "view_decoding",
)  # fmt: skip


def build_report(
    records: Iterable[Mapping[str, Any]], run: Mapping[str, Any], official: str | None = None
) -> dict[str, Any]:
    """
    Scores rollout records and puts the conditions of the run beside the figures.

    Args:
        records (`Iterable[Mapping]`):
            Rollout records, read once and not kept.
        run (`Mapping`):
            The record of the run. Conditions are looked up in it and then in its `config`.
        official (`str`, *optional*):
            An extractor of [`mgpo_trl.evaluation.extractors`] to score with as well; that of the run by default.

    Returns:
        `dict`: `accuracy`, `n`, `by_category`, `valid_ratio`, `status`, `crop_area`, `coverage`, `hit_rate`, the
        conditions `max_pixels`, `min_pixels`, `num_rounds`, `decoding`, `bad_rows`, `prompts_fingerprint`,
        `protocol_version`, `commit` and more. What is not known is `None`.
    """
    official = official or value_of(run, "official")
    metrics = Metrics(official)
    for record in records:
        metrics.add(record)
    summary = metrics.summary()
    conditions = {name: value_of(run, name) for name in FROM_RUN} | {"official": official}
    conditions["bad_rows"] = conditions["bad_rows"] or []
    asked = value_of(run, "num_rounds")
    if asked not in (None, summary["num_rounds"]):
        raise RecordError(
            f"The rollouts have {summary['num_rounds']} rounds, the run record says {asked}. They belong to different "
            "runs; give each run its own directory."
        )
    return {**summary, **conditions}


def value_of(run: Mapping[str, Any], name: str) -> Any:
    """An entry of a run's record, or of its configuration; `None` where neither has it."""
    return run[name] if name in run else (run.get("config") or {}).get(name)


def write_report(directory: str | os.PathLike, report: Mapping[str, Any]) -> Path:
    """Writes `report.json` and `report.md` into `directory` and returns the path of the former."""
    directory = Path(directory)
    write_atomically(directory / REPORT_MD, format_report(report).encode(errors="backslashreplace"))
    write_json(directory / REPORT_JSON, report)
    return directory / REPORT_JSON


def rescore(directory: str | os.PathLike, official: str | None = None) -> dict[str, Any]:
    """
    Scores the rollouts of a run again, without its model, and writes the report in its three forms.

    Args:
        directory (`str` or `os.PathLike`): Directory with `run.json` and `rollouts.jsonl`.
        official (`str`, *optional*): See [`build_report`].

    Returns:
        `dict`: the report.
    """
    run = read_run(directory)
    report = build_report(read_rollouts(Path(directory)), run, official)
    write_report(directory, report)
    write_html(directory, title(report), _notes(report), report, run)
    return report


def format_report(report: Mapping[str, Any]) -> str:
    """The report in Markdown. The title carries n, the pixel cap and the decoding."""
    lines = [f"# {title(report)}", "", *(line for note in _notes(report) for line in (note, ""))]
    for table in report_tables(report):
        lines += [*markdown_table(table), ""]
    prompts = f"Prompts `{report['prompts_fingerprint']}`, protocol {report['protocol_version']}"
    lines.append(f"{prompts}, {_commit(report)}.")
    return "\n".join(lines) + "\n"


def title(report: Mapping[str, Any]) -> str:
    """One line with the main figure and everything it depends on."""
    accuracy = report["accuracy"]
    rounds = f"{report['num_rounds']} round{'s' * (report['num_rounds'] != 1)}"
    n = f"n = {report['n']}"
    if report["bad_rows"]:
        n += f", {len(report['bad_rows'])} bad rows left out"
    samples = report.get("num_samples") or 1
    conditions = [n, pixels(report), said_decoding(report["decoding"]), *([f"Avg@{samples}"] if samples > 1 else [])]
    conditions.append(rounds if report.get("protocol") in (None, "direct", "mgpo") else report["protocol"])
    if report.get("view_decoding") not in (None, "exact"):
        conditions.append(f"views decoded as {report['view_decoding']}")
    if report.get("shuffle_choices") is not None:
        conditions.append(f"choices shuffled, seed {report['shuffle_choices']}")
    return f"{percent(accuracy['strict'], accuracy['stderr']['strict'])} strict ({', '.join(conditions)})"


def pixels(report: Mapping[str, Any]) -> str:
    """The pixel cap of a report or run, for a title."""
    cap = report["max_pixels"]
    if cap is None:
        return "pixel cap not recorded"
    tokens, rest = divmod(cap, 28 * 28)
    return f"max_pixels {cap:,}" + (f" = {tokens}x28x28" if rest == 0 else "")


def said_decoding(decoding: Any) -> str:
    """How answers were decoded, for a title."""
    if decoding is None:
        return "decoding not recorded"
    if isinstance(decoding, Mapping) and decoding.get("mode") == "greedy":
        return "greedy"
    if isinstance(decoding, Mapping):
        return ", ".join(f"{name} {value}" for name, value in decoding.items())
    return str(decoding)


def _notes(report: Mapping[str, Any]) -> list[str]:
    notes = []
    expected = report.get("n_expected")
    if expected is not None and expected != report["n"]:
        notes.append(f"Not finished: {report['n']} of {expected} rollouts.")
    if report["n_questions"] != report["n"]:
        notes.append(f"{report['n_questions']} questions; standard errors allow for several rollouts of one question.")
    if report["n_clusters"] != report["n_questions"]:
        notes.append(f"{report['n_clusters']} groups of questions (by image); standard errors are clustered by them.")
    if report.get("left_out"):
        notes.append(f"{report['left_out']} rows without target boxes cannot be played with an oracle crop.")
    if report.get("protocol") not in (None, "direct", "mgpo"):
        notes.append("Grounding figures are of the boxes that the model named, not of the regions that came back.")
    if report.get("official"):
        notes.append(f"`official` is {EXTRACTORS[report['official']][1]}. It is looser than `strict`.")
    if report["bad_rows"]:
        notes.append(f"{len(report['bad_rows'])} bad rows of the data set were skipped; `{REPORT_JSON}` lists them.")
    return notes


def _commit(report: Mapping[str, Any]) -> str:
    if report["commit"] is None:
        return "commit not known"
    return f"commit {report['commit'][:12]}" + (" with local changes" if report["dirty"] else "")
