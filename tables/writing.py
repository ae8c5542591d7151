"""A table for people and programs: Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import io
import math
import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from redundancy.presentation.tables import escape_latex
from tables.numbers import Line
from tables.spec import NO_SPREAD, Column, Published, Table
from tables.statistics import Difference, Summary

MINUS, PLUS_MINUS, NOTHING, ZERO = "−", "±", "–", "°"  # noqa: RUF001
HEADING = 14  # letters in a line of LaTeX's headings
WIDE = 10  # columns from which LaTeX gets a smaller type
NOT_RUN, FAILED = "not run", "failed"


def decimal(value: float, digits: int, sign: bool = False) -> str:
    """A number with so many digits behind the point, and a real minus."""
    text = f"{value:{'+' if sign else ''},.{digits}f}"
    return text.replace("-", MINUS) if float(text.replace(",", "")) else text.lstrip("+-")


@dataclass(frozen=True)
class Layout:
    """A table as it is shown: the columns that have a number or could have one, and the notes beneath.

    Attributes:
        published: the columns in which others published something.
        notes: by the sources' names, in the order in which they are first cited: their numbers.
    """

    table: Table
    lines: Sequence[Line]
    published: tuple[Column, ...]
    notes: dict[str, int]

    @property
    def some_run(self) -> bool:
        """Whether any row is one that is run here."""
        return any(line.row.config for line in self.lines)

    @property
    def some_missing(self) -> bool:
        """Whether rows differ in how many of their seeds are there."""
        ran = [line for line in self.lines if line.row.config]
        return len({(line.runs, line.row.seeds) for line in ran}) > 1 or any(
            0 < each.runs < each.row.seeds for each in ran
        )

    def heads(self) -> list[str]:
        """The columns' headings."""
        heads = ["", "seeds"] if self.some_missing else [""]
        for column in self.table.measured if self.some_run else ():
            heads.append(column.label)
            if column.difference:
                heads.append("difference")
        heads += [f"published {column.label}" for column in self.published]
        return heads

    def cells(self, line: Line) -> list[str]:
        """A row's cells behind its label, in plain text; citations are [1], [2]."""
        cells = []
        if self.some_missing:
            cells.append(f"{line.runs} of {line.row.seeds}" if line.row.config else NOTHING)
        for column in self.table.measured if self.some_run else ():
            cells.append(self._measured(line, column))
            if column.difference:
                cells.append(_difference(line.differences[column.name], column.digits, line.summaries[column.name]))
        return cells + [self._cited(line, column) for column in self.published]

    def _measured(self, line: Line, column: Column) -> str:
        summary = line.summaries[column.name]
        if summary is None:
            if line.failed and not line.runs:
                return FAILED
            return NOTHING if line.runs or not line.row.config else NOT_RUN
        partly = f" ({summary.seeds} of {line.runs})" if summary.seeds != line.runs else ""
        spread = column.value not in NO_SPREAD
        return _mean(summary, column.digits, spread) + partly

    def _cited(self, line: Line, column: Column) -> str:
        found = [f"{value:,.12g} [{self.notes[each.source]}]" for value, each in line.published(column)]
        return ", ".join(found) or NOTHING

    def remarks(self) -> list[str]:
        """What the numbers are, in sentences."""
        if not self.some_run:
            return []
        seeds = sorted({line.runs for line in self.lines if line.runs})
        many = f" {seeds[0]}" if len(seeds) == 1 else ""
        what = "One seed." if seeds == [1] else f"Mean {PLUS_MINUS} standard deviation over{many} seeds."
        remarks = [what]
        baselines = dict.fromkeys(line.row.baseline for line in self.lines if line.row.baseline)
        if baselines and any(column.difference for column in self.table.columns):
            labels = " or ".join(f"'{self.table.row(name).label}'" for name in baselines)
            remarks.append(
                f"Differences are to {labels}, seed by seed, with Student's 95 % interval. "
                f"{ZERO}: the interval includes 0, so no difference is shown."
            )
        return remarks

    def sources(self) -> Iterable[tuple[int, str, str, str]]:
        """The footnotes: number, text, link, and what one should know."""
        for name, number in self.notes.items():
            source = self.table.sources[name]
            second = "Not the paper that trained the model. " if source.second_hand else ""
            yield number, source.text, source.link, f"{second}{source.note}".strip()


def lay_out(table: Table, lines: Sequence[Line]) -> Layout:
    """Decide what is shown."""
    published = tuple(column for column in table.columns if any(line.published(column) for line in lines))
    cited: list[Published] = [each for line in lines for column in published for _, each in line.published(column)]
    names = dict.fromkeys(each.source for each in cited)
    return Layout(table, lines, published, {name: k for k, name in enumerate(names, 1)})


def _mean(summary: Summary, digits: int, spread: bool) -> str:
    shown = spread and not math.isnan(summary.deviation)
    return decimal(summary.mean, digits) + (f" {PLUS_MINUS} {decimal(summary.deviation, digits)}" if shown else "")


def _difference(difference: Difference | None, digits: int, summary: Summary | None) -> str:
    if difference is None:
        return NOTHING
    text = decimal(difference.mean, digits, sign=True)
    if summary is not None and difference.seeds != summary.seeds:
        text += f" ({difference.seeds} pairs)"
    if math.isnan(difference.low):
        return f"{text} {ZERO}"
    interval = f"[{decimal(difference.low, digits, sign=True)}, {decimal(difference.high, digits, sign=True)}]"
    return f"{text} {interval}" + (f" {ZERO}" if difference.includes_zero else "")


# ------------------------------------------------------------------------------------------------------------
# Markdown


def markdown(layout: Layout, command: str, provenance: str) -> str:
    """The table with its title, its notes, the command that makes it, and where its numbers come from."""
    table = layout.table
    heads = layout.heads()
    parts = [f"# {table.title}"]
    parts += [table.caption] if table.caption else []
    rule = "|".join(["---", *("--:" for _ in heads[1:])])
    rows = ["| " + " | ".join(_cell(head) for head in heads) + " |", f"|{rule}|"]
    group = ""
    for line in layout.lines:
        if line.row.group != group:
            group = line.row.group
            rows += ["| " + " | ".join([f"*{_cell(group)}*", *("" for _ in heads[1:])]) + " |"] if group else []
        rows.append("| " + " | ".join([_cell(line.row.label), *layout.cells(line)]) + " |")
    parts.append("\n".join(rows))
    parts += [" ".join(layout.remarks())] if layout.remarks() else []
    notes = [
        f"[{number}] {f'[{text}]({link})' if link else text}.{f' {note}' if note else ''}"
        for number, text, link, note in layout.sources()
    ]
    parts += ["\n\n".join(notes)] if notes else []
    parts += [f"```bash\n{command}\n```", *([provenance] if provenance else [])]
    return "\n\n".join(parts) + "\n"


def _cell(text: str) -> str:
    """A text that Markdown shows as it is."""
    return re.sub(r"([\\|*<`\[\]])", r"\\\1", text)


# ------------------------------------------------------------------------------------------------------------
# LaTeX


def latex(layout: Layout) -> str:
    """The table as a tabular that needs no package; notes are comments above it and lines below it."""
    heads = layout.heads()
    size = r"\footnotesize" if len(heads) < WIDE else r"\scriptsize"
    lines = [f"% {_ascii(layout.table.title)}. {_ascii(' '.join(layout.remarks()))}".rstrip()]
    lines += [
        rf"{{{size}\setlength{{\tabcolsep}}{{3pt}}",
        rf"\begin{{tabular}}{{l{'r' * (len(heads) - 1)}}}",
        r"\hline",
    ]
    lines += [" & ".join(map(_tex_heading, heads)) + r" \\", r"\hline"]
    group = ""
    for line in layout.lines:
        if line.row.group != group:
            group = line.row.group
            heading = rf"\multicolumn{{{len(heads)}}}{{l}}{{\textit{{{_tex(group)}}}}} \\"
            lines.append(heading if group else r"\hline")
        lines.append(" & ".join([_tex(line.row.label), *map(_tex, layout.cells(line))]) + r" \\")
    lines += [r"\hline", r"\end{tabular}", ""]
    for number, text, link, note in layout.sources():
        where = f", {_tex(link)}" if link else ""
        lines.append(rf"\noindent [{number}] {_tex(text)}{where}. {_tex(note)}".rstrip() + r"\par")
    return "\n".join([*lines, "}", ""])


def _tex_heading(text: str) -> str:
    """A column's heading, broken into lines where it is wider than most numbers below it."""
    parts = [_tex(part) for part in textwrap.wrap(text, HEADING)]
    if len(parts) < 2:
        return "".join(parts)
    return r"\begin{tabular}[b]{@{}r@{}}" + r" \\ ".join(parts) + r"\end{tabular}"


SYMBOLS = {MINUS: "$-$", PLUS_MINUS: r"$\pm$", NOTHING: "--", ZERO: r"$^\circ$"}


def _tex(text: str) -> str:
    """A text that LaTeX prints as it is."""
    found = "".join(SYMBOLS.get(char) or escape_latex(char) for char in text)
    return f"{{}}{found}" if found.startswith(("[", "*")) else found  # which a line's end before it would take


def _ascii(text: str) -> str:
    for sign, plain in ((MINUS, "-"), (PLUS_MINUS, "+-"), (NOTHING, "-"), (ZERO, "o")):
        text = text.replace(sign, plain)
    return text.encode("ascii", "backslashreplace").decode()


# ------------------------------------------------------------------------------------------------------------
# CSV


def summary_csv(layout: Layout) -> str:
    """A row and a column of the table in each line, with all digits."""
    heads = [
        "row",
        "label",
        "group",
        "column",
        "mean",
        "deviation",
        "seeds",
        "difference",
        "low",
        "high",
        "pairs",
        "published",
    ]
    rows: list[list[object]] = [[*heads]]
    for line in layout.lines:
        for column in layout.table.columns:
            summary, difference = line.summaries[column.name], line.differences[column.name]
            published = "; ".join(f"{value!r} ({each.source})" for value, each in line.published(column))
            if summary is None and not published and not line.row.config:
                continue
            rows.append([line.row.name, line.row.label, line.row.group, column.name])
            rows[-1] += [_exact(summary.mean), _exact(summary.deviation), summary.seeds] if summary else ["", "", 0]
            rows[-1] += [*map(_exact, difference[:3]), difference.seeds] if difference else ["", "", "", 0]
            rows[-1].append(published)
    return _csv(rows)


def seeds_csv(layout: Layout) -> str:
    """Every run's numbers, one run in a line."""
    names = [column.name for column in layout.table.measured]
    rows: list[list[object]] = [["row", "seed", *names]]
    for line in layout.lines:
        for seed in sorted({seed for numbers in line.values.values() for seed in numbers}):
            numbers = [line.values[name].get(seed) for name in names]
            rows.append([line.row.name, seed, *("" if value is None else _exact(value) for value in numbers)])
    return _csv(rows)


def _exact(value: float) -> str:
    return repr(float(value)) if math.isfinite(value) else ""


def _csv(rows: Iterable[list[object]]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    return buffer.getvalue()
