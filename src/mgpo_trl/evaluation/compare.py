"""Two results on the same questions: `eval.py --compare A B`. Needs records, no model."""

import os
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..records import RecordError, question_id, read_rollouts, read_run, write_atomically, write_json
from .metrics import cluster_of, score_record
from .paired import PairedDifference
from .report import FROM_RUN, pixels, said_decoding, value_of
from .tables import Table, markdown_table, percent

CONDITIONS = ("max_pixels", "min_pixels", "decoding", "prompts_fingerprint", "shuffle_choices", "num_samples")
"""What should be equal for a difference to mean the model, or the protocol, alone."""


def compare_runs(first: str | os.PathLike, second: str | os.PathLike) -> dict[str, Any]:
    """
    Compare two result directories question by question.

    Args:
        first (`str` or `os.PathLike`), second (`str` or `os.PathLike`): Directories with `run.json` and
            `rollouts.jsonl`.

    Returns:
        `dict`: For `strict` and `flexible` the difference first - second with its standard error, 95 % interval and
        McNemar's exact p; `by_category`; `differing` conditions; `unpaired` rollouts of each.

    Raises:
        RecordError: No rollout is in both, or one question has another answer in each.
    """
    known = {record["id"]: _facts(record) for record in read_rollouts(Path(second))}
    totals = {mode: PairedDifference() for mode in ("strict", "flexible")}
    categories: dict[str, PairedDifference] = defaultdict(PairedDifference)
    accuracies = {mode: [0, 0] for mode in totals}
    unpaired = 0
    for record in read_rollouts(Path(first)):
        other = known.pop(record["id"], None)
        if other is None:
            unpaired += 1
            continue
        facts = _facts(record)
        _check_same_question(record["id"], facts, other)
        for mode, total in totals.items():
            total.add(facts["cluster"], facts[mode], other[mode])
            accuracies[mode][0] += facts[mode]
            accuracies[mode][1] += other[mode]
        if record.get("category") is not None:
            categories[record["category"]].add(facts["cluster"], facts["strict"], other["strict"])
    n = totals["strict"].summary()["n"]
    if n == 0:
        raise RecordError(f"No rollout of '{first}' is in '{second}'. Compare two results on the same questions.")
    runs = [read_run(directory) for directory in (first, second)]
    return {
        "first": str(first),
        "second": str(second),
        "n": n,
        **{
            mode: {"first": accuracies[mode][0] / n, "second": accuracies[mode][1] / n, **total.summary()}
            for mode, total in totals.items()
        },
        "by_category": {name: categories[name].summary() for name in sorted(categories)},
        "differing": _differing(runs),
        "unpaired": {"first": unpaired, "second": len(known)},
        "runs": [{name: value_of(run, name) for name in (*FROM_RUN, "protocol")} for run in runs],
    }


def write_comparison(directory: str | os.PathLike, comparison: Mapping[str, Any]) -> None:
    """Write `compare.json` and `compare.md`."""
    write_json(Path(directory) / "compare.json", comparison)
    write_atomically(Path(directory) / "compare.md", format_comparison(comparison).encode(errors="backslashreplace"))


def format_comparison(comparison: Mapping[str, Any]) -> str:
    """The comparison in Markdown."""
    strict = comparison["strict"]
    lines = [f"# {signed(strict)} strict ({_title_conditions(comparison)})", ""]
    lines += [f"A: `{comparison['first']}`", "", f"B: `{comparison['second']}`", ""]
    for name, values in comparison["differing"].items():
        lines += [f"**`{name}` differs: {values[0]} and {values[1]}.**", ""]
    if any(comparison["unpaired"].values()):
        first, second = comparison["unpaired"].values()
        lines += [f"**Not in both, and left out: {first} rollouts of A, {second} of B.**", ""]
    lines += [*markdown_table(_totals_table(comparison)), ""]
    if comparison["by_category"]:
        lines += [*markdown_table(_category_table(comparison["by_category"])), ""]
    return "\n".join(lines)


def signed(summary: Mapping[str, Any]) -> str:
    """A difference in points with its interval: `+4.2 points [+1.0, +7.4]`."""
    text = f"{100 * summary['difference']:+.1f} points"
    interval = summary["interval_95"]
    return text if interval is None else f"{text} [{100 * interval[0]:+.1f}, {100 * interval[1]:+.1f}]"


def _facts(record: Mapping[str, Any]) -> dict[str, Any]:
    score = score_record(record)
    question = (record["question"], record.get("choices"), record["answer"])
    cluster = cluster_of(record, question_id(record["id"]))
    return {"strict": score.strict, "flexible": score.flexible, "question": question, "cluster": cluster}


def _check_same_question(identity: str, first: Mapping, second: Mapping) -> None:
    if first["question"] != second["question"]:
        raise RecordError(
            f"The rollout '{identity}' asks {first['question']!r} in one result and {second['question']!r} in the "
            "other. Compare two results on the same questions, with the choices in the same order."
        )


def _differing(runs: list[Mapping]) -> dict[str, list]:
    pairs = {name: [value_of(run, name) for run in runs] for name in CONDITIONS}
    return {name: values for name, values in pairs.items() if values[0] != values[1]}


def _title_conditions(comparison: Mapping) -> str:
    run = comparison["runs"][0]
    parts = [f"A - B, n = {comparison['n']}"]
    parts += [text for name, text in (("max_pixels", pixels(run)), ("decoding", said_decoding(run["decoding"])))
              if name not in comparison["differing"]]  # fmt: skip
    return ", ".join(parts)


def _totals_table(comparison: Mapping) -> Table:
    header = ["A", "B", "A - B (95 %)", "stderr", "only A right", "only B right", "McNemar p"]
    return Table("accuracy", header, [_row(mode, comparison[mode], both=True) for mode in ("strict", "flexible")])


def _category_table(by_category: Mapping) -> Table:
    header = ["n", "A - B (95 %)", "stderr", "only A right", "only B right", "McNemar p"]
    return Table("category", header, [_row(name, summary, both=False) for name, summary in by_category.items()])


def _row(name: str, summary: Mapping, both: bool) -> list[str]:
    lead = [percent(summary["first"]), percent(summary["second"])] if both else [str(summary["n"])]
    stderr = "-" if summary["stderr"] is None else f"{100 * summary['stderr']:.1f}"
    counts = [str(summary["only_first"]), str(summary["only_second"]), f"{summary['mcnemar_p']:.3g}"]
    return [name, *lead, signed(summary), stderr, *counts]
