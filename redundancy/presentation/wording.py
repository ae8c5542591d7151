"""How a report says things: numbers with their errors, names of metrics, lists of labels."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Sequence

from errors import shown
from redundancy.finding import Assessed
from redundancy.metrics.registry import LEVELS, METRICS
from redundancy.presentation.compare import Estimate

MINUS, PLUS_MINUS, NOTHING = "−", "±", "–"  # noqa: RUF001
BASES = {
    "images": "over images, where a label is one model",
    "seeds": "over seeds (sd/√s), where a label has several",
}
DIFFERENCES = {
    "images": "over images, paired",
    "unpaired": "of both labels, taken as independent (unpaired)",
    "seeds": "of both labels, over seeds",
    "": "unknown where none is given",
}


def names(models: Iterable[Assessed]) -> list[str]:
    """The metrics that a report speaks of, level by level: those registered in their order, then the others."""
    said = {name: None for model in models for name in (*model.findings, *model.gaps)}
    known = [name for name in METRICS if name in said] + [name for name in said if name not in METRICS]
    return [name for members in by_level(known).values() for name in members]


def by_level(metrics: Iterable[str]) -> dict[str, list[str]]:
    """Title of a level -> its metrics."""
    levels: dict[str, list[str]] = {title: [] for title in LEVELS.values()}
    for name in metrics:
        levels.setdefault(LEVELS.get(name.partition(".")[0], "other"), []).append(name)
    return {title: members for title, members in levels.items() if members}


def title(name: str) -> str:
    """What a metric is, in a line; its name if nothing else is known."""
    return METRICS[name].text.title.rstrip(".") if name in METRICS else name


def axis_label(name: str) -> str:
    return METRICS[name].label if name in METRICS else name


def redundant(name: str) -> str:
    """Which end of the range is the redundant one: 'high', 'low' or ''."""
    return METRICS[name].redundant if name in METRICS else ""


def listed(words: Sequence[str]) -> str:
    """'a', 'a and b', 'a, b and c'."""
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1]))) if words else ""


def counted(count: int, word: str) -> str:
    """'1 image', '2 images'."""
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def file_name(name: str) -> str:
    """A metric's name for files and anchors: 'patch.cosine:abs@all' -> 'patch.cosine-abs+all'."""
    return re.sub(r"[^A-Za-z0-9._+]+", "-", name.replace("@", "+"))


# ------------------------------------------------------------------------------------------------------------
# Numbers


def number(value: float, decimals: int | None = None, *, sign: bool = False) -> str:
    """A number with a real minus; four digits unless the decimals are given."""
    if not math.isfinite(value):
        return NOTHING
    plus = "+" if sign else ""
    text = f"{value:{plus}.4g}" if decimals is None else f"{value:{plus}.{decimals}f}"
    return text.replace("-", MINUS)


def estimated(estimate: Estimate, *, sign: bool = False) -> str:
    """'0.312 ± 0.014': two digits of the error, and the value as far as they go; '–' if there is no number."""
    if not math.isfinite(estimate.error) or estimate.error <= 0:
        return number(estimate.value, sign=sign)
    decimals = 1 - math.floor(math.log10(estimate.error))
    if decimals > 6 or abs(estimate.value) >= 1e6:
        return f"{number(estimate.value, sign=sign)} {PLUS_MINUS} {number(float(f'{estimate.error:.2g}'))}"
    error = f"{estimate.error:.{max(decimals, 0)}f}"
    return f"{number(estimate.value, max(decimals, 0), sign=sign)} {PLUS_MINUS} {error}"


def note(values: Iterable[Estimate], differences: Iterable[Estimate], first: str) -> str:
    """What the standard errors of a table are taken over."""
    values, differences = list(values), list(differences)
    bases = [words for basis, words in BASES.items() if any(value.basis == basis for value in values)]
    parts = [f"{PLUS_MINUS} is the standard error {listed(bases)}." if bases else "No standard errors are known."]
    kinds = [words for basis, words in DIFFERENCES.items() if any(each.basis == basis for each in differences)]
    if kinds:
        parts.append(f"Differences are to {shown(first, 40)}; their standard error is {', or '.join(kinds)}.")
    return " ".join(parts)


# ------------------------------------------------------------------------------------------------------------
# Text in columns


def width(text: str) -> int:
    """Columns of a terminal that a text takes: East Asian characters two, combining ones none."""
    wide = sum(unicodedata.east_asian_width(char) in "WF" for char in text)
    return len(text) + wide - sum(unicodedata.combining(char) > 0 for char in text)


def padded(text: str, columns: int, *, right: bool = False) -> str:
    space = " " * (columns - width(text))
    return space + text if right else text + space
