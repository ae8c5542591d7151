"""The numbers of a report as tables: text for a terminal, CSV for programs, LaTeX for papers."""

from __future__ import annotations

import csv
import io
import math
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from itertools import product
from typing import NamedTuple

import numpy as np

from errors import shown
from redundancy.finding import Assessed, Finding
from redundancy.metrics.registry import METRICS
from redundancy.presentation import compare, wording
from redundancy.presentation.compare import Estimate

Groups = Mapping[str, list[Assessed]]
LABEL = 40  # characters of a label in a column's head


class Cell(NamedTuple):
    """What a summary says of one label in one metric."""

    value: Estimate
    difference: Estimate | None  # to the first label; none for itself
    gap: str  # why there is no value


class Row(NamedTuple):
    metric: str
    cells: dict[str, Cell]


def findings(models: Iterable[Assessed], name: str) -> list[Finding]:
    """Those of one metric."""
    return [model.findings[name] for model in models if name in model.findings]


def measured(models: list[Assessed], name: str) -> list[Finding]:
    """Those of one metric, of all seeds; none if one of them lacks it, so that no seed is left out of a mean."""
    found = findings(models, name)
    return found if len(found) == len(models) else []


def gap(models: Iterable[Assessed], name: str) -> str:
    """Why some models of a label have nothing to show for a metric."""
    return "; ".join(dict.fromkeys(model.gaps[name] for model in models if name in model.gaps))


def summary(groups: Groups) -> list[Row]:
    """One row for each metric."""
    rows = []
    first = next(iter(groups.values()), [])
    for name in wording.names(model for models in groups.values() for model in models):
        cells = {}
        base = measured(first, name)
        for label, models in groups.items():
            found = measured(models, name)
            difference = None if models is first else compare.difference(found, base)
            cells[label] = Cell(compare.estimate(found), difference, gap(models, name))
        rows.append(Row(name, cells))
    return rows


def with_summary(rows: Iterable[Row]) -> list[Row]:
    """Without the metrics that no single number stands for, such as spectra."""
    return [row for row in rows if row.metric not in METRICS or METRICS[row.metric].summary != "none"]


def note(rows: list[Row]) -> str:
    """What the standard errors are taken over."""
    cells = [cell for row in rows for cell in row.cells.values() if math.isfinite(cell.value.value)]
    known = [cell.difference for cell in cells if cell.difference and math.isfinite(cell.difference.value)]
    return wording.note([cell.value for cell in cells], known, next(iter(rows[0].cells), "") if rows else "")


# ------------------------------------------------------------------------------------------------------------
# Text


def text(groups: Groups) -> str:
    """The summary as a Markdown table whose columns are aligned, and what its errors are."""
    rows = with_summary(summary(groups))
    others = list(groups)[1:]
    heads = ["metric", *map(_in_cell, groups), *(f"{_in_cell(label)}: difference" for label in others)]
    lines = [heads] + [_line(row, others) for row in rows]
    columns = [max(3, *map(wording.width, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * columns[0], *("-" * (size - 1) + ":" for size in columns[1:])]
    joined = ["| " + " | ".join(_aligned(line, columns)) + " |" for line in (heads, rule, *lines[1:])]
    starred = (
        ["* more than two standard errors."] if any("*" in cell for line in lines[1:] for cell in line) else []
    )
    return "\n".join([*joined, "", " ".join([note(rows), *starred])])


def _line(row: Row, others: list[str]) -> list[str]:
    values = [wording.estimated(cell.value) for cell in row.cells.values()]
    return [_in_cell(row.metric), *values, *(_difference(row.cells[label].difference) for label in others)]


def _difference(estimate: Estimate | None) -> str:
    if estimate is None:
        return wording.NOTHING
    return wording.estimated(estimate, sign=True) + (" *" if estimate.clear else "")


def _aligned(line: list[str], columns: list[int]) -> Iterator[str]:
    for place, (cell, size) in enumerate(zip(line, columns, strict=True)):
        yield wording.padded(cell, size, right=place > 0)


def _in_cell(words: str) -> str:
    return shown(words, LABEL).replace("|", r"\|")


# ------------------------------------------------------------------------------------------------------------
# CSV


def numbers_csv(groups: Groups) -> str:
    """Every number in a row of its own: label, which of its seeds, metric, the place on each axis, the number."""
    every = [(label, seed, model) for label, models in groups.items() for seed, model in enumerate(models, 1)]
    names = wording.names(model for _, _, model in every)
    axes = dict.fromkeys(
        axis for _, _, model in every for each in model.findings.values() for axis in _columns(each)
    )

    def rows() -> Iterator[list[object]]:
        yield ["label", "seed", "metric", *axes, "mean", "error", "count", "gap"]
        for name, (label, seed, model) in product(names, every):
            if name in model.gaps:
                yield [label, seed, name, *("" for _ in axes), "", "", 0, model.gaps[name]]
            if name in model.findings:
                yield from ([label, seed, name, *cells, ""] for cells in _places(model.findings[name], list(axes)))

    return _csv(rows())


def _columns(finding: Finding) -> list[str]:
    """The names of its axes; the second of one name is 'layer_2'."""
    names = [axis.name for axis in finding.axes]
    return [f"{name}_{names[:k].count(name) + 1}" if name in names[:k] else name for k, name in enumerate(names)]


def _places(finding: Finding, axes: list[str]) -> Iterator[list[object]]:
    """The cells of each number from its place on all axes of the report to its count."""
    columns = [axes.index(name) for name in _columns(finding)]
    for place in np.ndindex(finding.mean.shape):
        labels = [""] * len(axes)
        for column, axis, k in zip(columns, finding.axes, place, strict=True):
            labels[column] = axis.labels[k]
        error = "" if finding.error is None else _exact(finding.error[place])
        yield [*labels, _exact(finding.mean[place]), error, finding.count]


def summary_csv(groups: Groups) -> str:
    """The summary, one label of one metric in a row, with what each standard error is taken over."""
    parts = ("", "_error", "_over", "_count")
    heads = [*(f"value{part}" for part in parts), *(f"difference{part}" for part in parts)]
    rows: list[list[object]] = [["metric", "label", *heads, "clear", "gap"]]
    for row in with_summary(summary(groups)):
        for label, cell in row.cells.items():
            rows.append([row.metric, label, *_exactly(cell.value), *_exactly(cell.difference)])
            rows[-1] += [int(cell.difference.clear) if cell.difference else "", cell.gap]
    return _csv(rows)


def _exactly(estimate: Estimate | None) -> list[object]:
    if estimate is None:
        return [""] * 4
    return [_exact(estimate.value), _exact(estimate.error), estimate.basis, estimate.size or ""]


def _exact(value: float) -> str:
    return repr(float(value)) if math.isfinite(value) else ""


def _csv(rows: Iterable[list[object]]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------------------------
# LaTeX

SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",
} | {char: f"\\{char}" for char in "&%$#_{}"}


def latex(groups: Groups) -> str:
    """The summary as a tabular that needs no package and fits on a page. Differences are to the first label."""
    rows = with_summary(summary(groups))
    heads = ["Metric"]
    for place, label in enumerate(groups):
        heads += [escape_latex(shown(label, LABEL)), *(["difference"] if place else [])]
    lines = [
        f"% {_ascii(note(rows))}",
        r"{\footnotesize\setlength{\tabcolsep}{3pt}",
        rf"\begin{{tabular}}{{l{'r' * (len(heads) - 1)}}}",
        r"\hline",
    ]
    lines.append(_latex_line(heads))
    for title, names in wording.by_level(row.metric for row in rows).items():
        lines.append(rf"\hline \multicolumn{{{len(heads)}}}{{l}}{{\textit{{{title}}}}} \\")
        lines += [_latex_row(row) for row in rows if row.metric in names]
    return "\n".join([*lines, r"\hline", r"\end{tabular}}", ""])


def _latex_row(row: Row) -> str:
    cells = [rf"\texttt{{{escape_latex(row.metric)}}}"]
    for place, cell in enumerate(row.cells.values()):
        cells.append(_math(wording.estimated(cell.value)))
        cells += [_latex_difference(cell.difference)] if place else []
    return _latex_line(cells)


def _latex_line(cells: list[str]) -> str:
    return " & ".join(cells) + r" \\"


def _latex_difference(estimate: Estimate | None) -> str:
    if estimate is None or not math.isfinite(estimate.value):
        return ""
    return _math(wording.estimated(estimate, sign=True), bold=estimate.clear)


def _math(text: str, *, bold: bool = False) -> str:
    if text == wording.NOTHING:
        return "--"
    text = text.replace(wording.MINUS, "-").replace(wording.PLUS_MINUS, r"\pm")
    text = re.sub(r"e([+-])0*(\d+)", lambda power: rf" \cdot 10^{{{power[1].strip('+')}{power[2]}}}", text)
    return rf"$\mathbf{{{text}}}$" if bold else f"${text}$"


def escape_latex(text: str) -> str:
    """A text that LaTeX prints as it is. Letters that its default fonts lack are written as their number."""
    return "".join(SPECIAL.get(char, char) if _is_plain(char) else f"U+{ord(char):04X}" for char in text)


def _is_plain(char: str) -> bool:
    """Whether it is ASCII, or an accented Latin letter that every LaTeX since 2018 reads."""
    parts = unicodedata.normalize("NFD", char)
    return (char.isascii() and char.isprintable()) or (ord(char) < 256 and len(parts) == 2 and parts[0].isascii())


def _ascii(text: str) -> str:
    """For a comment."""
    return text.replace(wording.PLUS_MINUS, "+-").encode("ascii", "backslashreplace").decode().replace("\n", " ")
