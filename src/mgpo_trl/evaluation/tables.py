"""The tables of a report, as data: every rendering (Markdown, HTML) shows the same figures with the same rounding."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .metrics import Metrics


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
    rows = [_accuracy_row("all", {"n": report["n"], **report["accuracy"]})]
    rows += [_accuracy_row(name, entry) for name, entry in report["by_category"].items()]
    return Table("accuracy", ["n", "strict", "flexible"], rows)


def _accuracy_row(name: str, entry: Mapping[str, Any]) -> list[str]:
    return [name, str(entry["n"]), *(percent(entry[mode], entry["stderr"][mode]) for mode in ("strict", "flexible"))]


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
