"""A table as a figure: a panel for each column, a row for each row; every seed is a dot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from redundancy.presentation.styles import COLORS, FAINT, INK, drawable, in_style, new_figure
from tables.numbers import Line
from tables.spec import Column, Table

MOST = 5  # panels
LABEL_WIDTH, PANEL_WIDTH, ROW, MARGIN = 1.6, 1.75, 0.21, 0.95  # inches
SHOWN, UNCLEAR = COLORS[0], INK
LETTERS = 32  # of a row's label


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
        figure = new_figure(LABEL_WIDTH + PANEL_WIDTH * len(columns), MARGIN + ROW * len(ran))
        panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
        for axes, column in zip(panels, columns, strict=True):
            _draw_panel(axes, column, ran)
        panels[0].set_yticks(range(len(ran)), [drawable(line.row.label, LETTERS) for line in ran])
        for label in panels[0].get_yticklabels():
            label.set_parse_math(False)
        panels[0].set_ylim(len(ran) - 0.4, -0.6)
        figure.legend(handles=_legend(columns), loc="outside lower center", ncols=4)
        figure.savefig(path, format="png", dpi=160, metadata={"Software": None, "Description": fingerprint})
    return True


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
    axes.set_xlabel(drawable(column.label), parse_math=False)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.tick_params(axis="y", length=0)


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
