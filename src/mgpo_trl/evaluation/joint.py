"""The report over several protocols on the same questions: accuracies side by side, and what the crop was worth."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..records import question_id, read_rollouts, write_atomically, write_json
from .compare import signed
from .metrics import cluster_of, score_record
from .paired import PairedDifference
from .protocols import UTILITIES
from .report import pixels, said_decoding
from .tables import Table, markdown_table, percent

JOINT = "protocols"


def joint_report(directory: str | os.PathLike, reports: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """
    Put the protocols of one evaluation side by side.

    Args:
        directory (`str` or `os.PathLike`): Holds one result directory for each protocol.
        reports (`Mapping`): The report of each protocol by its name.

    Returns:
        `dict`: `protocols` (accuracy, standard errors, n, hit rate of each) and `crop_utility`: for each pair of
        [`~mgpo_trl.evaluation.protocols.UTILITIES`] that was played the paired difference in strict accuracy, over
        the questions that are in both.
    """
    results = {name: _results(Path(directory) / name) for name in reports}
    shared = ("max_pixels", "min_pixels", "decoding", "seed", "model", "dataset", "commit", "num_samples")
    conditions = {key: next(iter(reports.values()))[key] for key in shared}
    kept = ("accuracy", "n", "n_clusters", "valid_ratio", "hit_rate", "left_out", "bad_rows")
    return {
        **conditions,
        "protocols": {name: {key: report[key] for key in kept} for name, report in reports.items()},
        "crop_utility": {
            f"{first} - {second}": _difference(results[first], results[second])
            for first, second in UTILITIES
            if first in results and second in results
        },
    }


def write_joint(directory: str | os.PathLike, joint: Mapping[str, Any]) -> None:
    """Write `protocols.json` and `protocols.md`."""
    write_json(Path(directory) / f"{JOINT}.json", joint)
    write_atomically(Path(directory) / f"{JOINT}.md", format_joint(joint).encode(errors="backslashreplace"))


def format_joint(joint: Mapping[str, Any]) -> str:
    """The joint report in Markdown."""
    conditions = [pixels(joint), said_decoding(joint["decoding"])]
    if (joint["num_samples"] or 1) > 1:
        conditions.append(f"Avg@{joint['num_samples']}")
    lines = [f"# {', '.join(joint['protocols'])} ({', '.join(conditions)})", ""]
    for table in _tables(joint):
        lines += [*markdown_table(table), ""]
    return "\n".join(lines)


def _results(directory: Path) -> dict[str, tuple[str, bool]]:
    """Cluster and strict result of every rollout, by id."""
    return {
        record["id"]: (cluster_of(record, question_id(record["id"])), score_record(record).strict)
        for record in read_rollouts(directory)
    }


def _difference(first: Mapping, second: Mapping) -> dict[str, Any]:
    pairs = PairedDifference()
    for identity in first.keys() & second.keys():
        cluster, right = first[identity]
        pairs.add(cluster, right, second[identity][1])
    return pairs.summary()


def _tables(joint: Mapping[str, Any]) -> Sequence[Table]:
    rows = []
    for name, entry in joint["protocols"].items():
        accuracy = entry["accuracy"]
        left_out = [f"{entry['left_out']} rows left out"] if entry["left_out"] else []
        n = ", ".join([str(entry["n"]), *left_out])
        rows.append([name, n, *(percent(accuracy[mode], accuracy["stderr"][mode]) for mode in ("strict", "flexible"))])
    utility = [
        [name, str(entry["n"]), signed(entry), f"{entry['mcnemar_p']:.3g}"]
        for name, entry in joint["crop_utility"].items()
        if entry["n"]
    ]
    tables = [Table("protocol", ["n", "strict", "flexible"], rows)]
    if utility:
        tables.append(Table("crop utility", ["n", "difference in strict accuracy (95 %)", "McNemar p"], utility))
    return tables
