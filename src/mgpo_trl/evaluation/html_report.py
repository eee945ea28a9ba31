"""`report.html`: the tables of the report, charts, and a gallery of every rollout, in one file without requests."""

import html
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..gallery import PictureReader, Section, card_of, write_page
from ..records import question_id, read_rollouts
from .charts import ChartData, bar_chart, category_bars
from .metrics import cluster_of, score_record
from .tables import Table, report_tables

REPORT_HTML = "report.html"


def write_html(
    directory: str | os.PathLike, title: str, notes: list[str], report: Mapping[str, Any], run: Mapping[str, Any]
) -> Path:
    """
    Write `report.html` for a result directory. Records are read one at a time; pictures are not kept.

    Args:
        directory (`str` or `os.PathLike`): Holds `rollouts.jsonl`, and `pictures.jsonl` where there are pictures.
        title (`str`): Heading of the page: the main figure and its conditions.
        notes (`list[str]`): Sentences that must be read with the figures.
        report (`Mapping`): The report.
        run (`Mapping`): The record of the run, shown as it is.

    Returns:
        `Path`: The file.
    """
    directory = Path(directory)
    data = ChartData()
    for record in read_rollouts(directory):
        data.add(cluster_of(record, question_id(record["id"])), score_record(record))
    sections = [
        Section("Figures", "".join(map(_note, notes)) + _tables(report)),
        Section("Charts", _charts(data, report)),
        Section("Conditions", _conditions(run)),
    ]
    path = directory / REPORT_HTML
    write_page(path, title, sections, _cards(directory))
    return path


def _cards(directory: Path) -> Iterator:
    pictures = PictureReader(directory)
    for record in read_rollouts(directory):
        yield card_of(record), pictures(record["id"])


def _note(note: str) -> str:
    return f'<p class="note">{html.escape(note)}</p>'


def _tables(report: Mapping[str, Any]) -> str:
    return f'<div class="tables">{"".join(map(_table, report_tables(report)))}</div>'


def _table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in (table.title, *table.header))
    rows = [
        "<tr>" + "".join(f"<td>{html.escape(cell.strip('`'))}</td>" for cell in row) + "</tr>" for row in table.rows
    ]
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _charts(data: ChartData, report: Mapping[str, Any]) -> str:
    charts = [
        ("Strict accuracy by category, ± standard error", category_bars(report["by_category"])),
        ("Strict accuracy by area of the crop, ± standard error", data.area_bars()),
        ("Rollouts by share of the target that the crop covers", data.coverage_bars()),
    ]
    drawn = [bar_chart(caption, bars) for caption, bars in charts if bars]
    return f'<div class="charts">{"".join(drawn)}</div>' if drawn else "<p>No boxes and no categories to chart.</p>"


def _conditions(run: Mapping[str, Any]) -> str:
    text = html.escape(json.dumps(run, indent=2, ensure_ascii=False))
    return f"<details><summary>The record of the run, run.json</summary><pre>{text}</pre></details>"
