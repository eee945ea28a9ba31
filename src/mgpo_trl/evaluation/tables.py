"""The tables of a report, as data: every rendering (Markdown, HTML) shows the same figures with the same rounding."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .metrics import Metrics

TASK_ORDER = ("OCR", "RS", "DT", "MO", "AD")
"""Columns of MME-RealWorld's table, in the order of its paper."""


@dataclass(frozen=True)
class Table:
    """Texts in rows and columns."""

    title: str
    """What the table is about, as a short heading; it is also its first column's header."""
    header: Sequence[str]
    """Names of the columns after the first."""
    rows: Sequence[Sequence[str]]
    """Each row: its name, then a text for each column."""


def report_tables(report: Mapping[str, Any]) -> list[Table]:
    """Every table of a report, in the order in which it is read."""
    tables = [_accuracy_table(report)]
    if table := _task_table(report["by_category"]):
        tables.append(table)
    if report.get("counting"):
        tables.append(_counting_table(report["counting"]))
    if report["valid_ratio"] is not None:
        tables.append(_grounding_table(report))
    tables.append(_turn_table(report))
    return tables


def markdown_table(table: Table) -> Iterator[str]:
    """Lines of the table in Markdown; a text that would break it is escaped."""
    yield _markdown_row([table.title, *table.header])
    yield "|" + "---|" * (1 + len(table.header))
    yield from map(_markdown_row, table.rows)


def percent(share: float | None, stderr: float | None = None) -> str:
    """A share between 0 and 1 as a percentage, with its standard error where it has one; `-` for `None`."""
    if share is None:
        return "-"
    return f"{100 * share:.1f} %" if stderr is None else f"{100 * share:.1f} ± {100 * stderr:.1f} %"


def _accuracy_table(report: Mapping[str, Any]) -> Table:
    modes = [mode for mode in ("strict", "flexible", "official") if mode in report["accuracy"]]
    rows = [_accuracy_row("all", {"n": report["n"], **report["accuracy"]}, modes)]
    rows += [_accuracy_row(name, entry, modes) for name, entry in report["by_category"].items()]
    names = [f"official ({report['official']})" if mode == "official" else mode for mode in modes]
    return Table("accuracy", ["n", *names], rows)


def _accuracy_row(name: str, entry: Mapping[str, Any], modes: Sequence[str]) -> list[str]:
    return [name, str(entry["n"]), *(percent(entry.get(mode), entry["stderr"].get(mode)) for mode in modes)]


def _task_table(by_category: Mapping[str, Any]) -> Table | None:
    """
    The table of MME-RealWorld's paper where categories read `Perception/OCR`: a row a task, a column a subtask, then
    the accuracy over all rows of the task and the mean of its subtasks. `None` for other categories.
    """
    cells: dict[str, dict[str, Mapping[str, Any]]] = {}
    for name, entry in by_category.items():
        task, slash, subtask = name.partition("/")
        if slash:
            cells.setdefault(task, {})[subtask] = entry
    if not cells:
        return None
    found = {subtask for row in cells.values() for subtask in row}
    subtasks = [name for name in TASK_ORDER if name in found] + sorted(found - set(TASK_ORDER))
    rows = [
        [task, *(percent(row[name]["strict"]) if name in row else "-" for name in subtasks), *_averages(row.values())]
        for task, row in sorted(cells.items())
    ]
    return Table("strict accuracy", [*subtasks, "all rows", "mean of subtasks"], rows)


def _averages(entries) -> list[str]:
    entries = list(entries)
    total = sum(entry["n"] for entry in entries)
    weighted = sum(entry["strict"] * entry["n"] for entry in entries) / total
    return [percent(weighted), percent(sum(entry["strict"] for entry in entries) / len(entries))]


def _counting_table(counting: Mapping[str, Any]) -> Table:
    error = "-" if counting["mae"] is None else f"{counting['mae']:.2f}"
    error += "" if counting["stderr"] is None else f" ± {counting['stderr']:.2f}"
    header = ["n", "mean absolute error", "answers without a number"]
    return Table("counting", header, [["all", str(counting["n"]), error, str(counting["no_number"])]])


def _grounding_table(report: Mapping[str, Any]) -> Table:
    names = ("valid boxes", "crop area", "target coverage", "hit rate")
    rows = [
        [name, percent(report[key], report["stderr"][key])] for name, key in zip(names, Metrics.GROUNDING, strict=True)
    ]
    rows += [[f"`{status}`", str(count)] for status, count in report["status"].items() if count]
    return Table("grounding", [""], rows)


def _turn_table(report: Mapping[str, Any]) -> Table:
    rows = [[str(turn["round"]), f"{turn['tokens']:.1f}", percent(turn["truncated"])] for turn in report["turns"]]
    return Table("turn", ["tokens (mean)", "cut off"], rows)


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"
