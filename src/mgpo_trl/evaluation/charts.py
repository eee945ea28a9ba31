"""Charts of a report as inline SVG: bars with standard errors. Colours come from the page's style sheet."""

import html
from collections.abc import Sequence
from dataclasses import dataclass

from .metrics import ClusterMean, RecordScore

AREA_EDGES = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)
"""Edges of the bins of crop area, as shares of the original."""
COVERAGE_BINS = 10
ROW, WIDTH, LABEL = 24, 460, 150


@dataclass(frozen=True)
class Bar:
    """One bar."""

    label: str
    """What it is about."""
    value: float
    """Between 0 and 1."""
    stderr: float | None
    """Its standard error, where it has one."""
    text: str
    """What stands behind it."""


class ChartData:
    """Running figures of the charts; keeps a few numbers a cluster."""

    def __init__(self) -> None:
        self._by_area = [ClusterMean() for _ in AREA_EDGES[1:]]
        self._coverage = [0] * COVERAGE_BINS

    def add(self, cluster: str, score: RecordScore) -> None:
        """Count one rollout."""
        if score.crop_area is not None:
            place = sum(score.crop_area > edge for edge in AREA_EDGES[1:-1])
            self._by_area[place].add(cluster, score.strict)
        if score.coverage is not None:
            self._coverage[min(int(score.coverage * COVERAGE_BINS), COVERAGE_BINS - 1)] += 1

    def area_bars(self) -> list[Bar]:
        """Strict accuracy by the area of the crop; bins without rollouts are left out."""
        names = [f"{100 * low:g} to {100 * high:g} %" for low, high in zip(AREA_EDGES, AREA_EDGES[1:], strict=False)]
        return [
            Bar(name, mean.mean, mean.stderr, f"{100 * mean.mean:.0f} %, n = {mean.n}")
            for name, mean in zip(names, self._by_area, strict=True)
            if mean.n
        ]

    def coverage_bars(self) -> list[Bar]:
        """Share of rollouts by the share of the target that the crop covers; empty where no target is known."""
        total = sum(self._coverage)
        step = 100 // COVERAGE_BINS
        return [
            Bar(f"{step * place} to {step * (place + 1)} %", count / total, None, str(count))
            for place, count in enumerate(self._coverage)
            if total
        ]


def category_bars(by_category) -> list[Bar]:
    """Strict accuracy by category."""
    return [
        Bar(name, entry["strict"], entry["stderr"]["strict"], f"{100 * entry['strict']:.0f} %, n = {entry['n']}")
        for name, entry in by_category.items()
    ]


def bar_chart(caption: str, bars: Sequence[Bar]) -> str:
    """The bars as a figure in HTML, one a row; the error bars are one standard error to each side."""
    height = ROW * len(bars)
    scale = WIDTH - LABEL - 110
    rows = [_row(bar, number * ROW, scale) for number, bar in enumerate(bars)]
    axis = f'<line class="axis" x1="{LABEL}" y1="0" x2="{LABEL}" y2="{height}"/>'
    return (
        f'<figure><figcaption>{html.escape(caption)}</figcaption><svg class="chart" role="img" '
        f'aria-label="{html.escape(caption)}" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}">'
        f"{''.join(rows)}{axis}</svg></figure>"
    )


def _row(bar: Bar, top: int, scale: int) -> str:
    label = bar.label if len(bar.label) <= 22 else bar.label[:21] + "…"
    middle, length = top + ROW / 2, scale * bar.value
    error = ""
    reach = length
    if bar.stderr is not None:
        low, high = LABEL + max(0.0, length - scale * bar.stderr), LABEL + min(scale, length + scale * bar.stderr)
        error = f'<line class="error" x1="{low:.1f}" y1="{middle}" x2="{high:.1f}" y2="{middle}"/>'
        reach = high - LABEL
    return (
        f'<text x="{LABEL - 8}" y="{middle + 4}" text-anchor="end">{html.escape(label)}'
        f"<title>{html.escape(bar.label)}</title></text>"
        f'<rect class="bar" x="{LABEL}" y="{top + 5}" width="{length:.1f}" height="{ROW - 10}"/>{error}'
        f'<text class="soft" x="{LABEL + reach + 8:.1f}" y="{middle + 4}">{html.escape(bar.text)}</text>'
    )
