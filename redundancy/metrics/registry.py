"""What a metric is: a documented function, or a class where one image's number is not enough, and its registration.

A metric says how it is called (`takes`), how it is shown, and in its docstring all that a reader of a number needs:
the equation, where in the layer it is taken, what is normalised, the range, where it is undefined, the source. The
report prints these beside the numbers. To add a metric, write it in the file of its level under `@metric(...)`, and
its test; nothing else changes.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np

from errors import UserError, did_you_mean

Takes = Literal[
    "patches", "patches and input", "all patches", "maps", "maps and place", "all maps", "weight", "output", "set"
]
Summary = Literal["last", "mean", "median", "pairs", "value", "none"]
Needs = Literal["tokens", "attention", "weights", "patch logits", "labels", "classes", "features"]
Function = TypeVar("Function", bound=Callable[..., Any])

LEVELS = {"patch": "patches", "attn": "attention", "weight": "weights", "output": "output"}
SECTIONS = ("Where", "Normalised", "Range", "Undefined", "Source")
# How a summary is made, in words.
SUMMARIES: dict[Summary, str] = {
    "last": "the last layer's number",
    "mean": "the mean of all",
    "median": "the median of all",
    "pairs": "the mean over pairs of different layers",
    "value": "the number itself",
    "none": "none",
}
NEEDED: dict[str, tuple[Needs, ...]] = {
    **dict.fromkeys(("patches", "patches and input", "all patches"), ("tokens",)),
    **{"maps": ("attention",), "maps and place": ("attention", "tokens"), "all maps": ("attention",)},
    "weight": ("weights",),
}
METRICS: dict[str, Metric] = {}


class Text(NamedTuple):
    """A metric's docstring, taken apart.

    Attributes:
        title: its first sentence.
        equation: the indented lines after it.
        remarks: what is said besides.
        sections: Where, Normalised, Range, Undefined, Source.
    """

    title: str
    equation: str
    remarks: str
    sections: dict[str, str]


@dataclass(frozen=True)
class Metric:
    """A metric.

    Attributes:
        name: 'LEVEL.NAME', as in `--metrics`.
        function: what it is, see `metric`.
        takes: what the function is given.
        label: of an axis, with the unit.
        summary: which one number stands for all of its numbers: that of the last block, the mean or median of all,
            the mean of all pairs of different layers, the number itself, or none.
        limits: of an axis; None where the numbers decide.
        redundant: which end of the range is the redundant one: 'high', 'low' or '' where neither is.
        cheap: whether it is logged while training (`--monitor-redundancy`).
        needs: what it cannot do without: what a model shows of itself, the images' 'labels', or 'classes', that the
            model's are the data's, or the 'features' that its classifier reads.
        text: its docstring.
        along: of a metric that gives numbers in a row, what they run over, and the first one's number.
        of_products: of a metric of maps, the same from the inner products of their heads, so that no map is needed:
            of a block's [B, W, H, H] -> [B]; of one that takes all maps, of `values.Group`s and L -> [B, L, L].
    """

    name: str
    function: Callable[..., Any]
    takes: Takes
    label: str
    summary: Summary
    limits: tuple[float | None, float | None]
    redundant: Literal["high", "low", ""]
    cheap: bool
    needs: tuple[Needs, ...]
    text: Text
    along: tuple[str, int] | None = None
    of_products: Callable[..., Any] | None = None

    @property
    def level(self) -> str:
        return self.name.partition(".")[0]

    def summarised(self, values: np.ndarray) -> np.ndarray:
        """The one number that stands for values [..., *axes of a finding]; NaN where there is none.  -> [...]"""
        if self.summary == "value":
            return values
        if self.summary == "last":
            return values[..., -1]
        if self.summary == "pairs":
            return nanmean(values[..., ~np.eye(values.shape[-1], dtype=bool)])
        if self.summary == "median":  # of weights
            return np.median(values[~np.isnan(values)]) if not np.isnan(values).all() else np.array(np.nan)
        if self.summary == "mean":
            return nanmean(values.reshape(-1) if self.takes == "weight" else values)
        return np.full((), np.nan)


def nanmean(values: np.ndarray) -> np.ndarray:
    """The mean over the last axis of what is a number; NaN if nothing is."""
    known = ~np.isnan(values)
    count = known.sum(axis=-1)
    sums = np.where(known, values, 0).sum(axis=-1)
    return np.where(count > 0, sums / np.maximum(count, 1), np.nan)


def metric(
    name: str,
    *,
    takes: Takes,
    label: str,
    summary: Summary,
    limits: tuple[float | None, float | None] = (None, None),
    redundant: Literal["high", "low", ""] = "",
    cheap: bool = False,
    needs: tuple[Needs, ...] = (),
    along: tuple[str, int] | None = None,
    of_products: Callable[..., Any] | None = None,
) -> Callable[[Function], Function]:
    """Register what follows as a metric.

    Args:
        takes: what it is given, and returns for each image of a batch:
            'patches': a block's [B, P, D] -> [B];
            'patches and input': the same, and the patches that enter block 0, [B, P, D] twice -> [B];
            'all patches': those of all layers, a list of [B, P, D] -> [B, L, L];
            'maps': a block's attention [B, W, H, n, m], W windows of an image (1 if there are none) -> [B];
            'maps and place': the same, and a `shown.Place` -> [B];
            'all maps': a list of [B, W, H, n, m] -> [B, L, L];
            'weight': a `weights.Weight` -> a number, or numbers in a row;
            'output': a `shown.Shown` -> [B];
            'set': it is a class with `update(shown)`, `merge(other)` and `finding()`, see `accumulate.Accumulator`.
        label, summary, limits, redundant, cheap, along, of_products: see `Metric`.
        needs: besides what `takes` says.
    Raises:
        ValueError: the name is taken, of no level, or the docstring lacks a section.
    """

    def register(function: Function) -> Function:
        if name in METRICS or name.partition(".")[0] not in LEVELS:
            raise ValueError(f"{name}: taken, or of no level ({', '.join(LEVELS)})")
        text = read_text(name, inspect.getdoc(function))
        every = (*NEEDED.get(takes, ()), *needs)
        METRICS[name] = Metric(
            *(name, function, takes, label, summary, limits, redundant, cheap, every, text, along, of_products)
        )
        return function

    return register


def read_text(name: str, docstring: str | None) -> Text:
    """Take a docstring apart.

    Raises:
        ValueError: it lacks the equation or a section.
    """
    head, *rest = re.split(rf"^({'|'.join(SECTIONS)}): ", docstring or "", flags=re.MULTILINE)
    sections = {key: " ".join(text.split()) for key, text in zip(rest[::2], rest[1::2], strict=True)}
    paragraphs = [part for part in re.split(r"\n\s*\n", head) if part.strip()]
    equation = next((part for part in paragraphs[1:] if part.startswith("    ")), "")
    missing = [section for section in SECTIONS if section not in sections] + ([] if equation else ["equation"])
    if missing:
        raise ValueError(f"{name}: the docstring lacks {', '.join(missing)}")
    remarks = [" ".join(part.split()) for part in paragraphs[1:] if part is not equation and "Args:" not in part]
    return Text(" ".join(paragraphs[0].split()), textwrap.dedent(equation).rstrip(), " ".join(remarks), sections)


def choose(names: Sequence[str] | None) -> list[Metric]:
    """The metrics of these names, or of these levels, each once, level by level; all if there are no names.

    Raises:
        UserError: an unknown name, with the nearest ones.
    """
    table = sorted(METRICS.values(), key=lambda each: list(LEVELS).index(each.level))
    if not names:
        return table
    for name in names:
        if name not in METRICS and name not in LEVELS:
            known = [*LEVELS, *(each.name for each in table)]
            hint = did_you_mean(name, known)
            raise UserError(f"--metrics {name}: there is no such metric or level.{hint} Known: {', '.join(known)}")
    return [each for each in table if each.name in names or each.level in names]
