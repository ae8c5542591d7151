"""A table as a figure: a panel for each column, a row for each row; every seed is a dot."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from redundancy.presentation.styles import COLORS, FAINT, INK, drawable, in_style, new_figure, style
from tables.cells import Cell
from tables.evidence import read_report
from tables.numbers import Line
from tables.spec import Column, Table

MOST = 6  # panels
LETTER, PANEL_WIDTH, ROW, MARGIN = 0.058, 1.6, 0.21, 0.95  # inches
SHOWN, UNCLEAR = COLORS[0], INK
LETTERS = 48  # at most, of a row's label


def draw(table: Table, lines: Sequence[Line], path: Path, fingerprint: str) -> bool:
    """Write the figure as PNG.

    Args:
        fingerprint: of the numbers; it is kept in the file, so that one sees whether a figure is of these numbers.
    Returns:
        Whether there was anything to draw.
    """
    ran = [line for line in lines if line.runs]
    columns = _panels(table, ran)
    if not ran or not columns:
        return False
    with in_style():
        labels = [drawable(line.row.label, LETTERS) for line in ran]
        width = LETTER * max(map(len, labels)) + PANEL_WIDTH * len(columns)
        figure = new_figure(width, MARGIN + ROW * len(ran))
        panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
        for axes, column in zip(panels, columns, strict=True):
            _draw_panel(axes, column, ran)
        panels[0].set_yticks(range(len(ran)), labels)
        for label in panels[0].get_yticklabels():
            label.set_parse_math(False)
        panels[0].set_ylim(len(ran) - 0.4, -0.6)
        figure.legend(handles=_legend(columns), loc="outside lower center", ncols=4)
        figure.savefig(path, format="png", dpi=160, metadata={"Software": None, "Description": fingerprint})
    return True


def draw_layers(table: Table, cells: Sequence[Cell], path: Path, fingerprint: str) -> bool:
    """Write as PNG how the metrics of the reports go through the layers: a panel each, a curve for each drawn row.

    Args:
        fingerprint: as for `draw`.
    Returns:
        Whether there was anything to draw.
    """
    reports: dict[str, list[Any]] = {row: [] for row in table.drawn}
    for cell in cells:
        found = read_report(cell.path) if cell.row.name in reports and cell.finished else None
        if found is not None:
            reports[cell.row.name].append(found.findings)
    metrics = [name for name in table.metrics if _curves(reports, name)][:MOST]
    if not metrics:
        return False
    drawn = [row for row in table.drawn if reports[row]]
    with in_style():
        figure = new_figure(PANEL_WIDTH * 1.35 * len(metrics), 2.5)
        for axes, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
            curves = _curves(reports, metric)
            longest = max((labels for labels, _ in curves.values()), key=len)
            axes.set_xticks(range(0, len(longest), 3), longest[::3])
            for row, (labels, values) in curves.items():
                look = style(drawn.index(row))
                middle, spread = values.mean(axis=0), values.std(axis=0, ddof=1) if len(values) > 1 else 0
                axes.plot(range(len(labels)), middle, **look.line, marker=look.marker, markersize=2.8)
                axes.fill_between(range(len(labels)), middle - spread, middle + spread, color=look.color, alpha=0.2)
            axes.set_title(metric, parse_math=False)
            axes.set_xlabel("block")
        looks = [(style(place), drawable(table.row(row).label)) for place, row in enumerate(drawn)]
        handles = [Line2D([], [], **look.line, marker=look.marker, label=label) for look, label in looks]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
        figure.savefig(path, format="png", dpi=160, metadata={"Software": None, "Description": fingerprint})
    return True


def _curves(reports: Mapping[str, Sequence[Any]], metric: str) -> dict[str, tuple[list[str], np.ndarray]]:
    """Of a metric that runs over layers, or over layers and matrices: each row's layers, and [seeds, layers]."""
    curves = {}
    for row, findings in reports.items():
        own = [each[metric] for each in findings if metric in each]
        axes = [axis["name"] for axis in own[0]["axes"]] if own else []
        if axes in (["layer"], ["layer", "matrix"]):
            values = np.array([each["mean"] for each in own], dtype=np.float64)  # [seeds, layers] or [.., matrices]
            values = values.mean(axis=-1) if len(axes) == 2 else values
            labels = ["in" if label == "input" else label for label in own[0]["axes"][0]["labels"]]
            curves[row] = labels, values
    return curves


def _panels(table: Table, ran: Sequence[Line]) -> list[Column]:
    """The columns with numbers that vary; those with differences first to be kept, in the order of the table."""
    varied = [column for column in table.columns if len({_mean(line, column) for line in ran}) > 1]
    chosen = sorted(varied, key=lambda column: not column.difference)[:MOST]
    return [column for column in varied if column in chosen]


def _mean(line: Line, column: Column) -> float | None:
    summary = line.summaries[column.name]
    return summary.mean if summary is not None else None


def _draw_panel(axes: Axes, column: Column, ran: Sequence[Line]) -> None:
    """Dots for seeds, a stroke for the mean, a line for the interval of the difference to the baseline."""
    means = {line.row.name: _mean(line, column) for line in ran}
    for place, line in enumerate(ran):
        base = means.get(line.row.baseline)
        difference = line.differences[column.name]
        clear = difference is not None and not difference.includes_zero
        color = SHOWN if clear else UNCLEAR
        if difference is not None and base is not None and math.isfinite(difference.low):
            axes.plot([base + difference.low, base + difference.high], [place, place], color=color, linewidth=1.2)
        values = [*line.values[column.name].values()]
        axes.plot(values, [place] * len(values), "o", color=FAINT, markersize=2.6)
        mean = means[line.row.name]
        if mean is not None:
            axes.plot([mean], [place], "|", color=color, markersize=9, markeredgewidth=1.8)
    baselines = {line.row.baseline for line in ran} - {""}
    for name in baselines if len(baselines) == 1 else ():
        base = means.get(name)
        if base is not None:
            axes.axvline(base, color=FAINT, linewidth=0.8, linestyle=(0, (3, 2)), zorder=0)
    axes.set_xlim(*_limits([value for line in ran for value in line.values[column.name].values()]))
    axes.set_xlabel(drawable(column.label), parse_math=False)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.tick_params(axis="y", length=0)


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """Around all seeds, with room for intervals; wider ones are cut off, or they would hide the seeds."""
    low, high = min(values), max(values)
    room = 0.35 * (high - low or abs(high) or 1)
    return low - room, high + room


def _legend(columns: Sequence[Column]) -> list[Line2D]:
    handles = [
        Line2D([], [], color=FAINT, marker="o", linestyle="", markersize=2.6, label="a seed"),
        Line2D([], [], color=UNCLEAR, marker="|", linestyle="", markersize=9, markeredgewidth=1.8, label="mean"),
    ]
    if any(column.difference for column in columns):
        handles += [
            Line2D([], [], color=SHOWN, label="95 % interval of the difference, without 0"),
            Line2D([], [], color=UNCLEAR, label="with 0"),
        ]
    return handles
