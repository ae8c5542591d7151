"""The figures of a report, drawn with matplotlib but without pyplot: no window, no state, any thread.

What a metric's numbers run over decides how they are drawn: nothing: dots; layers: curves; layers and layers: maps;
layers and matrices: a panel of curves per matrix; layers, matrices and components: a panel per matrix for a first,
a middle and a last layer. `styles.py` says how they look.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, NullLocator

from redundancy.finding import Finding
from redundancy.metrics.registry import METRICS
from redundancy.presentation import compare, wording
from redundancy.presentation.compare import Curve
from redundancy.presentation.styles import (
    FAINT,
    INK,
    MAP_LABEL,
    ROW_LABEL,
    Drawing,
    Style,
    add_legend,
    add_title,
    drawable,
    in_style,
    new_figure,
    say_nothing,
    style,
)

Found = Mapping[str, Sequence[Finding]]  # of one metric: label -> its seeds' findings
Limits = tuple[float | None, float | None]
WIDTH, HEIGHT = 4.3, 2.9  # inches: readable across a phone, and in a column of a paper
ROW = 0.26  # inches, of a label among dots
FEW, SOME = 24, 8  # markers of a curve, ticks of an axis, at most
DECADES = 50  # the ratio from which on an axis without limits is logarithmic


class Picture(NamedTuple):
    """A figure of one metric.

    Attributes:
        name: of its files.
        title: what it shows of the metric, e.g. 'first block'; '' if all.
        words: what it shows, for those who cannot see it.
        figure: with title and legend, which `styles.Drawing.bare` takes away.
    """

    name: str
    title: str
    words: str
    figure: Drawing


def draw(name: str, found: Found, labels: Sequence[str]) -> list[Picture]:
    """The figures of one metric; none if no label has numbers, or these run over more than three axes.

    Args:
        name: the metric's.
        found: labels without findings are left out.
        labels: all labels of the report, so that each keeps its style.
    """
    found = {label: findings for label, findings in found.items() if findings}
    if not found:
        return []
    curves = {label: compare.curve(findings) for label, findings in found.items()}
    axes = next(iter(curves.values())).axes
    looks = {label: style(labels.index(label)) for label in curves}
    with in_style():
        if len(axes) == 3:
            return list(_spectra(name, curves, looks))
        if len(axes) == 2 and axes[0].name == axes[1].name:
            figure = _maps(name, curves)
        elif len(axes) == 2:
            figure = _panels(name, curves, looks)
        elif len(axes) == 1:
            figure = _curves(name, curves, looks)
        elif not axes:
            figure = _dots(name, found, looks)
        else:
            return []
        add_title(figure, wording.title(name))
        return [Picture(wording.file_name(name), "", _words(name, curves), figure)]


def _words(name: str, curves: Mapping[str, Curve]) -> str:
    """'Title. a: 0.1 (input) to 0.9 (11); b: ...'."""
    parts = [f"{label}: {_ends(curve)}" for label, curve in curves.items()]
    return f"{wording.title(name)}. {'; '.join(parts)}"


def _ends(curve: Curve) -> str:
    if curve.mean.ndim == 1 and curve.mean.size:
        first, last = (f"{wording.number(curve.mean[k])} ({curve.axes[0].labels[k]})" for k in (0, -1))
        return f"{first} to {last}"
    known = curve.mean[np.isfinite(curve.mean)]
    if not known.size:
        return "no numbers"
    return (
        wording.number(known[0])
        if known.size == 1
        else " to ".join(map(wording.number, (known.min(), known.max())))
    )


# ------------------------------------------------------------------------------------------------------------
# Numbers without axes


def _dots(name: str, found: Found, looks: Mapping[str, Style]) -> Drawing:
    """A dot with an error bar for each label, and a small one for each of its seeds."""
    figure = new_figure(WIDTH, 0.75 + ROW * len(found))
    axes = figure.subplots()
    for row, (label, findings) in enumerate(found.items()):
        estimate = compare.estimate(findings)
        look = looks[label]
        if len(findings) > 1:
            seeds = [finding.summary for finding in findings]
            axes.plot(seeds, [row] * len(seeds), "|", color=look.color, alpha=0.6, markersize=7)
        error = estimate.error if np.isfinite(estimate.error) else None
        axes.errorbar(
            estimate.value, row, xerr=error, color=look.color, marker=look.marker, capsize=2.5, markersize=5
        )
    axes.set_yticks(range(len(found)), [drawable(label, ROW_LABEL) for label in found])
    for tick in axes.get_yticklabels():
        tick.set_parse_math(False)
    axes.set_ylim(len(found) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.12)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(wording.axis_label(name))
    if not any(np.isfinite(finding.summary) for findings in found.values() for finding in findings):
        say_nothing(axes)
    return figure


# ------------------------------------------------------------------------------------------------------------
# Curves


def _curves(name: str, curves: Mapping[str, Curve], looks: Mapping[str, Style]) -> Drawing:
    figure = new_figure(WIDTH, HEIGHT)
    axes = figure.subplots()
    _plot(axes, curves, looks)
    _ticks(axes, _longest(curves), 0)
    axes.set_ylabel(wording.axis_label(name))
    _limit(axes, name, curves)
    add_legend(figure, looks)
    return figure


def _panels(name: str, curves: Mapping[str, Curve], looks: Mapping[str, Style]) -> Drawing:
    """A panel per matrix, two in a row."""
    matrices = _longest(curves, 1).axes[1].labels

    def fill(axes: Axes, matrix: str) -> None:
        parts = {
            label: _taken(curve, 1, matrix) for label, curve in curves.items() if matrix in curve.axes[1].labels
        }
        _plot(axes, parts, looks, most=FEW // 3)
        _ticks(axes, _longest(parts), 0, most=5)

    return _small_multiples(name, matrices, fill, curves, looks)


def _spectra(name: str, curves: Mapping[str, Curve], looks: Mapping[str, Style]) -> Iterator[Picture]:
    """Of each label's first, middle and last layer: a panel per matrix, its components from left to right."""
    depth = max(len(curve.axes[0].labels) for curve in curves.values())
    whats = ("only",) if depth == 1 else ("first", "last") if depth == 2 else ("first", "middle", "last")
    for what in whats:
        at = {label: _taken(curve, 0, _layer(curve, what)) for label, curve in curves.items()}
        picture = _panels_of_components(name, at, looks)
        layers = dict.fromkeys(_layer(curve, what) for curve in curves.values())
        title = f"{what} {next(iter(curves.values())).axes[0].name}: {wording.listed(list(layers))}"
        add_title(picture, f"{wording.title(name)} ({title})")
        yield Picture(f"{wording.file_name(name)}.{what}", title, f"{title}. {_words(name, at)}", picture)


def _panels_of_components(name: str, curves: Mapping[str, Curve], looks: Mapping[str, Style]) -> Drawing:
    matrices = _longest(curves, 0).axes[0].labels

    def fill(axes: Axes, matrix: str) -> None:
        parts = {
            label: _taken(curve, 0, matrix) for label, curve in curves.items() if matrix in curve.axes[0].labels
        }
        for label, part in parts.items():
            axes.plot([int(place) for place in part.axes[0].labels], part.mean, **looks[label].line)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_xlabel(next(iter(parts.values())).axes[0].name)

    return _small_multiples(name, matrices, fill, curves, looks)


def _small_multiples(
    name: str,
    panels: Sequence[str],
    fill: Callable[[Axes, str], None],
    curves: Mapping[str, Curve],
    looks: Mapping[str, Style],
) -> Drawing:
    """Panels of one scale, two in a row, each with its name."""
    rows = -(-len(panels) // 2)
    figure = new_figure(WIDTH, 0.5 + 1.35 * rows)
    grid = figure.subplots(rows, 2, sharey=True, squeeze=False)
    for axes, panel in zip(grid.flat, panels, strict=False):
        fill(axes, panel)
        axes.set_title(panel, loc="left")
        if axes.get_subplotspec().rowspan.stop < rows and len(panels) > 2:
            axes.set_xlabel("")
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    _limit(grid[0, 0], name, curves)
    figure.supylabel(wording.axis_label(name))
    add_legend(figure, looks)
    return figure


def _plot(axes: Axes, curves: Mapping[str, Curve], looks: Mapping[str, Style], *, most: int = FEW) -> None:
    """Lines with their bands. A gap is a gap; a number between two gaps is a marker, with its error."""
    for label, curve in curves.items():
        look = looks[label]
        x = np.arange(len(curve.mean))
        known = np.isfinite(curve.mean)
        alone = known & ~np.r_[False, known[:-1]] & ~np.r_[known[1:], False]
        marked = alone | (x % -(-len(x) // most) == 0)
        axes.plot(x, curve.mean, **look.line, marker=look.marker, markevery=list(np.flatnonzero(marked)))
        banded = np.isfinite(curve.spread) & known
        low, high = curve.mean - curve.spread, curve.mean + curve.spread
        axes.fill_between(x, low, high, where=banded, color=look.color, alpha=0.18, lw=0)
        at = np.flatnonzero(alone & banded)
        axes.errorbar(at, curve.mean[at], curve.spread[at], fmt="none", ecolor=look.color)
    if not any(np.isfinite(curve.mean).any() for curve in curves.values()):
        say_nothing(axes)


def _longest(curves: Mapping[str, Curve], axis: int = 0) -> Curve:
    """The one with most places on an axis: its labels are those of the ticks."""
    return max(curves.values(), key=lambda curve: len(curve.axes[axis].labels))


def _taken(curve: Curve, axis: int, label: str) -> Curve:
    """The numbers at one place of an axis."""
    k = curve.axes[axis].labels.index(label)
    mean, spread = (np.take(each, k, axis=axis) for each in (curve.mean, curve.spread))
    return Curve((*curve.axes[:axis], *curve.axes[axis + 1 :]), mean, spread, curve.seeds)


def _layer(curve: Curve, what: str) -> str:
    """The name of the first, middle or last layer."""
    labels = curve.axes[0].labels
    return labels[{"middle": (len(labels) - 1) // 2, "last": -1}.get(what, 0)]


def _ticks(axes: Axes, curve: Curve, axis: int, *, most: int = SOME) -> None:
    """Few enough to be read."""
    name, labels = curve.axes[axis]
    places = range(0, len(labels), -(-len(labels) // most))
    axes.set_xticks(places, [labels[k] for k in places])
    axes.set_xlim(-0.5, len(labels) - 0.5) if len(labels) < 3 else axes.margins(x=0.03)
    axes.set_xlabel(name)


def _limit(axes: Axes, name: str, curves: Mapping[str, Curve]) -> None:
    """The range of the metric; a logarithmic axis where it has no end and the numbers span decades."""
    low, high = METRICS[name].limits if name in METRICS else (None, None)
    known = np.concatenate([curve.mean[np.isfinite(curve.mean)].ravel() for curve in curves.values()])
    if high is None and known.size and known.min() > 0 and known.max() > DECADES * known.min():
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(NullLocator())
        return
    pad = 0.02 * (high - low) if low is not None and high is not None else 0.0
    axes.set_ylim(None if low is None else low - pad, None if high is None else high + pad)


# ------------------------------------------------------------------------------------------------------------
# Maps


def _maps(name: str, curves: Mapping[str, Curve]) -> Drawing:
    """A map for each label, two in a row, and one colour scale for all. Gaps are hatched."""
    columns = min(2, len(curves))
    rows = -(-len(curves) // columns)
    figure = new_figure(WIDTH, 0.2 + rows * (1.72 if columns == 2 else 2.9))
    grid = figure.subplots(rows, columns, squeeze=False)
    low, high = _range(name, curves)
    for axes, (label, curve) in zip(grid.flat, curves.items(), strict=False):
        if not np.isfinite(curve.mean).all():
            axes.patch.set(hatch="////", edgecolor=FAINT, linewidth=0)
        image = axes.imshow(
            np.ma.masked_invalid(curve.mean),
            vmin=low,
            vmax=high,
            cmap="viridis",
            origin="lower",
            interpolation="nearest",
        )
        _ticks(axes, curve, 1, most=4 if columns == 2 else SOME)
        places = axes.get_xticks()
        axes.set_yticks(places, [curve.axes[0].labels[int(k)] for k in places])
        axes.set(xlim=(-0.5, curve.mean.shape[1] - 0.5), ylim=(-0.5, curve.mean.shape[0] - 0.5))
        axes.set_ylabel(curve.axes[0].name)
        axes.grid(visible=False)
        axes.set_title("", loc="left").set_parse_math(False)
        axes.set_title(drawable(label, MAP_LABEL), loc="left")
    for axes in grid.flat[len(curves) :]:
        axes.set_visible(False)
    bar = figure.colorbar(image, ax=grid, shrink=0.8, aspect=20 * rows, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(color=INK)
    bar.set_label(wording.axis_label(name))
    return figure


def _range(name: str, curves: Mapping[str, Curve]) -> tuple[float, float]:
    """Of the colours: the metric's own, or that of the numbers."""
    low, high = METRICS[name].limits if name in METRICS else (None, None)
    known = np.concatenate([curve.mean[np.isfinite(curve.mean)].ravel() for curve in curves.values()])
    ends = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
    return (ends[0] if low is None else low, ends[1] if high is None else high)


def save(figure: Drawing, stem: str) -> None:
    """Write STEM.svg, STEM.png and STEM.pdf, the same bytes each time."""
    with in_style(), figure.settled():
        figure.savefig(f"{stem}.svg", metadata={"Date": None, "Creator": None}, dpi=200)
        figure.savefig(f"{stem}.png", metadata={"Software": None}, dpi=200)
        figure.savefig(f"{stem}.pdf", metadata={"CreationDate": None, "Creator": None, "Producer": None}, dpi=200)
