"""The report as one page of HTML: no scripts, nothing from elsewhere; for light and dark, phones and paper.

All text that comes from outside goes through `document.text`, which escapes it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from errors import escaped, shown
from redundancy.metrics.registry import METRICS, SECTIONS, SUMMARIES
from redundancy.presentation import inline, tables, wording
from redundancy.presentation.document import about_list, document, scrolling, text
from redundancy.presentation.figures import Picture
from redundancy.presentation.pictures import Gallery
from redundancy.presentation.styles import PAGE_COLORS, Style, style
from redundancy.presentation.tables import Cell, Groups, Row

NAME = 40  # letters of a label in a sentence
LONG = 32  # letters from which on a cell may break
READING = (
    "A band around a curve is one standard deviation over seeds; where a label has one model, the standard error "
    "over images. A gap in a curve, or a hatched cell of a map, is a number that is undefined there."
)
# Of the markers of `styles.MARKERS`, in a box from -4 to 4
SHAPES = {
    "o": "M-3 0a3 3 0 1 0 6 0a3 3 0 1 0-6 0",
    "s": "M-3-3H3V3H-3Z",
    "^": "M0-3.4L3.4 3H-3.4Z",
    "D": "M0-3.8L3.8 0L0 3.8L-3.8 0Z",
    "v": "M0 3.4L3.4-3H-3.4Z",
    "P": "M-1.2-3.6H1.2V-1.2H3.6V1.2H1.2V3.6H-1.2V1.2H-3.6V-1.2H-1.2Z",
    "X": "M-3.4-2L-2-3.4L0-1.4L2-3.4L3.4-2L1.4 0L3.4 2L2 3.4L0 1.4L-2 3.4L-3.4 2L-1.4 0Z",
}


def render(groups: Groups, about: Mapping[str, Any], pictures: Mapping[str, Sequence[Picture]]) -> str:
    """The page. The pictures lose their titles and legends.

    Args:
        groups: see `Report.groups`.
        about: see `Report`.
        pictures: metric -> its figures.
    """
    rows = tables.summary(groups)
    gallery = Gallery(groups)
    levels = wording.by_level(row.metric for row in rows)
    by_name = {row.metric: row for row in rows}
    sections = {
        "models": ("Models", _models(groups)),
        "summary": ("Summary", _summary(tables.with_summary(rows), groups)),
    }
    for level, names in levels.items():
        parts = [_metric(by_name[name], pictures.get(name, ()), groups) for name in names]
        sections[level] = (level.capitalize(), "\n".join([_legend(groups), *parts]))
    sections["examples"] = ("Examples", gallery.render())
    sections["gaps"] = ("What is missing", _gaps(groups))
    sections["provenance"] = ("Provenance", about_list(about))
    return document(_title(list(groups)), _lede(groups, about), sections, gallery.images())


def _prose(words: str) -> str:
    """Of a docstring: what is between backticks is code."""
    return re.sub("`([^`]+)`", r"<code>\1</code>", text(words))


def _short(label: str) -> str:
    return escape(shown(label, NAME))


def _title(labels: Sequence[str]) -> str:
    if len(labels) > 3:
        return f"Redundancy in {len(labels)} models"
    return "Redundancy in " + wording.listed([_short(label) for label in labels])


def _lede(groups: Groups, about: Mapping[str, Any]) -> str:
    """What is compared, with what."""
    parts = ["How alike are the patches, attention heads and weights inside a vision transformer?"]
    counts = [finding.count for models in groups.values() for one in models for finding in one.findings.values()]
    images = max(counts, default=0)
    if images:
        parts.append(f"Measured on {text(about.get('data') or wording.counted(images, 'image'))}.")
    if len(groups) > 1:
        parts.append(f"Differences are to <b>{_short(next(iter(groups)))}</b>.")
    seeds = [f"{_short(label)} ({len(models)} seeds)" for label, models in groups.items() if len(models) > 1]
    if seeds:
        parts.append(f"Means over seeds: {wording.listed(seeds)}.")
    return f'<p class="lede">{" ".join(parts)}</p>'


# ------------------------------------------------------------------------------------------------------------
# Models, legend, gaps, provenance


def _models(groups: Groups) -> str:
    """What differs between the models as a table, what they have in common below it."""
    every = [(label, seed, model) for label, models in groups.items() for seed, model in enumerate(models, 1)]
    keys = dict.fromkeys(key for _, _, model in every for key in model.about)
    said = {key: {str(model.about.get(key, "")) for _, _, model in every} for key in keys}
    common = {key: every[0][2].about[key] for key in keys if len(said[key]) == 1 and key in every[0][2].about}
    varied = [key for key in keys if key not in common]
    heads = "".join(f'<th scope="col">{text(key)}</th>' for key in varied)
    lines = []
    for label, seed, model in every:
        name = _swatched(label, list(groups)) + (f" <small>seed {seed}</small>" if len(groups[label]) > 1 else "")
        cells = "".join(_cell(model.about.get(key, wording.NOTHING)) for key in varied)
        lines.append(f'<tr><th scope="row">{name}</th>{cells}</tr>')
    table = (
        f'<table><thead><tr><th scope="col">Model</th>{heads}</tr></thead><tbody>{"".join(lines)}</tbody></table>'
    )
    alike = (
        f"<h3>{'The same for all' if len(every) > 1 else 'What it is'}</h3>{about_list(common)}" if common else ""
    )
    return scrolling(table, "Models") + alike


def _cell(value: Any) -> str:
    if isinstance(value, (int, float)):
        return f'<td class="number">{text(value)}</td>'
    kind = ' class="long"' if len(str(value)) > LONG else ""
    return f"<td{kind}>{text(value)}</td>"


def _legend(groups: Groups) -> str:
    labels = list(groups)
    items = "".join(f"<li>{_swatched(label, labels)}</li>" for label in labels)
    return f'<ul class="legend" aria-label="Legend">{items}</ul>'


def _swatched(label: str, labels: Sequence[str]) -> str:
    """A label behind its line and marker."""
    return f'<span class="label">{_swatch(style(labels.index(label)))}<span>{text(label)}</span></span>'


def _swatch(look: Style) -> str:
    color = PAGE_COLORS.get(look.color, look.color)
    dashes = f' stroke-dasharray="{" ".join(f"{1.5 * each:g}" for each in look.dashes)}"' if look.dashes else ""
    line = f'<path d="M-14 0H14" stroke="{color}" stroke-width="1.8"{dashes}/>'
    mark = f'<path d="{SHAPES[look.marker]}" fill="{color}"/>'
    return f'<svg class="swatch" viewBox="-14 -5 28 10" aria-hidden="true">{line}{mark}</svg>'


def _gaps(groups: Groups) -> str:
    """Each label's reasons, each with its metrics."""
    items = []
    for label, models in groups.items():
        reasons: dict[str, dict[str, None]] = {}
        for name, reason in ((name, reason) for model in models for name, reason in model.gaps.items()):
            reasons.setdefault(reason, {})[name] = None
        for reason, names in reasons.items():
            listed = ", ".join(f"<code>{text(name)}</code>" for name in names)
            items.append(f"<li><b>{text(label)}</b>: {text(reason)} ({listed})</li>")
    return f'<ul class="gaps">{"".join(items)}</ul>' if items else ""


# ------------------------------------------------------------------------------------------------------------
# The summary


def _summary(rows: list[Row], groups: Groups) -> str:
    labels = list(groups)
    heads = "".join(f'<th scope="col">{_swatched(label, labels)}</th>' for label in labels)
    bodies = []
    for level, names in wording.by_level(row.metric for row in rows).items():
        head = f'<tr class="level"><th scope="rowgroup" colspan="{len(labels) + 2}">{level.capitalize()}</th></tr>'
        lines = "".join(_summary_row(row) for row in rows if row.metric in names)
        bodies.append(f"<tbody>{head}{lines}</tbody>")
    table = (
        f'<table class="summary"><thead><tr><th scope="col">Metric</th><th scope="col">Redundant</th>{heads}</tr>'
        f"</thead>{''.join(bodies)}</table>"
    )
    key = (
        "Below a value is its difference, <b>bold</b> where it is more than two standard errors. "
        '<b class="more">▲</b> is more redundant, <b class="less">▼</b> less.'
        if len(labels) > 1
        else ""
    )
    notes = (f"{key} {text(tables.note(rows))}", READING)
    return scrolling(table, "Summary") + "".join(f'<p class="how">{words}</p>' for words in notes)


def _summary_row(row: Row) -> str:
    name = f'<a href="#{_anchor(row.metric)}">{text(wording.title(row.metric))}</a>'
    code = "" if wording.title(row.metric) == row.metric else f"<code>{text(row.metric)}</code>"
    end = wording.redundant(row.metric)
    cells = "".join(_summary_cell(cell, end) for cell in row.cells.values())
    return f'<tr><th scope="row">{name}{code}</th><td>{end or wording.NOTHING}</td>{cells}</tr>'


def _summary_cell(cell: Cell, end: str) -> str:
    if not math.isfinite(cell.value.value):
        why = f'<span class="gap">{text(cell.gap)}</span>' if cell.gap else ""
        return f'<td class="number">{wording.NOTHING}{why}</td>'
    value = f"<span>{wording.estimated(cell.value)}</span>"
    if cell.difference is None or not math.isfinite(cell.difference.value):
        return f'<td class="number">{value}</td>'
    words = wording.estimated(cell.difference, sign=True)
    if not cell.difference.clear:
        return f'<td class="number">{value}<span class="difference">{words}</span></td>'
    more = (cell.difference.value > 0) == (end == "high")
    kind, mark, what = ("more", "▲", "more redundant") if more else ("less", "▼", "less redundant")
    if not end:
        kind, mark, what = "", "", "clear"
    mark = f'<span class="{kind}" role="img" aria-label="{what}">{mark}</span> ' if mark else ""
    return f'<td class="number">{value}<b class="difference {kind}">{mark}{words}</b></td>'


# ------------------------------------------------------------------------------------------------------------
# A metric


def _metric(row: Row, pictures: Sequence[Picture], groups: Groups) -> str:
    """Its figures, and beside or below them how its numbers were made."""
    name, anchor = row.metric, _anchor(row.metric)
    drawn = []
    for picture in pictures:
        drawing = inline.svg(picture.figure, wording.file_name(picture.name), escaped(picture.words), list(groups))
        caption = f"<figcaption>{text(picture.title)}</figcaption>" if picture.title else ""
        drawn.append(f"<figure>{drawing}{caption}</figure>")
    figures = f'<div class="figures">{"".join(drawn)}</div>' if drawn else ""
    missing = "".join(
        f'<p class="gap"><b>{text(label)}</b>: {text(cell.gap)}</p>'
        for label, cell in row.cells.items()
        if cell.gap
    )
    notes = _notes(name, groups)
    head = f'<h3 id="{anchor}-head">{text(wording.title(name))}</h3>'
    code = "" if wording.title(name) == name else f"<code>{text(name)}</code>"
    kind = "metric many" if len(drawn) > 1 else "metric"
    return (
        f'<article class="{kind}" id="{anchor}" aria-labelledby="{anchor}-head">{head}{code}\n'
        f'<div class="beside">{figures}<div class="made">{_made(name)}{notes}{missing}</div></div></article>'
    )


def _anchor(name: str) -> str:
    return "metric-" + wording.file_name(name)


def _made(name: str) -> str:
    """The equation, and what a reader has to know of it."""
    if name not in METRICS:
        return "<p>A measure of <code>--list-regularizers</code>, which says how it is computed.</p>"
    metric = METRICS[name]
    sections = {key: metric.text.sections[key] for key in SECTIONS if key in metric.text.sections}
    if metric.redundant:
        sections = {"Redundant": f"the {metric.redundant} end."} | sections
    if metric.summary not in ("value", "none"):
        sections["Summary"] = f"{SUMMARIES[metric.summary]}."
    lines = "".join(f"<div><dt>{key}</dt><dd>{_prose(words)}</dd></div>" for key, words in sections.items())
    remarks = f"<p>{_prose(metric.text.remarks)}</p>" if metric.text.remarks else ""
    return f'<pre class="equation">{text(metric.text.equation)}</pre>{remarks}<dl>{lines}</dl>'


def _notes(name: str, groups: Groups) -> str:
    """What the findings say besides, each note once."""
    notes: dict[str, list[str]] = {}
    for label, models in groups.items():
        for finding in tables.findings(models, name):
            if finding.note and label not in notes.setdefault(finding.note, []):
                notes[finding.note].append(label)
    return "".join(f"<p>{_note(words, labels, len(groups))}</p>" for words, labels in notes.items())


def _note(words: str, labels: Iterable[str], count: int) -> str:
    labels = list(labels)
    return (
        text(words)
        if len(labels) == count
        else f"{wording.listed([_short(label) for label in labels])}: {text(words)}"
    )
