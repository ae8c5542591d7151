"""Statistics of a report: what a label's models say together, and how far labels are apart.

A label with one model varies over images, one with several over its seeds. Nothing is known about the error where
neither is: weights of one model, or a single seed against several.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from redundancy.finding import Axis, Finding

Basis = Literal["images", "seeds", "unpaired", ""]
NAN = float("nan")
ROUNDING = 1e-12  # relative to the numbers: a smaller difference is none


class Estimate(NamedTuple):
    """A number and its standard error: over `size` images or seeds (`basis`); NaN where it is unknown."""

    value: float
    error: float
    size: int
    basis: Basis

    @property
    def clear(self) -> bool:
        """Whether it is more than two standard errors away from 0."""
        return abs(self.value) > 2 * self.error


class Curve(NamedTuple):
    """The numbers of one label over the axes of a metric, NaN where there is a gap.

    Attributes:
        axes: as in `Finding`.
        mean: [*axes], over seeds.
        spread: [*axes], standard deviation over seeds; of one model the standard error over images.
        seeds: models that went into it.
    """

    axes: tuple[Axis, ...]
    mean: np.ndarray
    spread: np.ndarray
    seeds: int


def estimate(findings: Sequence[Finding]) -> Estimate:
    """The summary of one label: of its only model, or the mean of its seeds, if all of them have a number."""
    if not findings or not all(math.isfinite(finding.summary) for finding in findings):
        return Estimate(NAN, NAN, 0, "")
    if len(findings) == 1:
        (one,) = findings
        has_error = math.isfinite(one.summary_error)
        return Estimate(one.summary, one.summary_error, one.count, "images" if has_error else "")
    values = np.array([finding.summary for finding in findings])  # [S]
    return Estimate(float(values.mean()), _standard_error(values), len(values), "seeds")


def difference(of: Sequence[Finding], to: Sequence[Finding]) -> Estimate:
    """Summary of one label minus that of another, with its standard error.

    Of two single models with a number per image, images are paired, but for those that lack a number in either:
    `basis` is 'images'. It is 'unpaired' where only the two errors are known. Two labels with several seeds each
    are independent ('seeds').
    """
    left, right = estimate(of), estimate(to)
    value = left.value - right.value
    if abs(value) <= ROUNDING * max(abs(left.value), abs(right.value)):
        value = 0.0
    if {left.basis, right.basis} == {"seeds"}:
        return Estimate(value, math.hypot(left.error, right.error), left.size + right.size, "seeds")
    if "seeds" in (left.basis, right.basis) or not math.isfinite(value):
        return Estimate(value, NAN, 0, "")
    paired = _paired(of[0], to[0])
    if len(paired) > 1:
        return Estimate(float(paired.mean()), _standard_error(paired), len(paired), "images")
    if left.basis and right.basis:
        return Estimate(value, math.hypot(left.error, right.error), min(left.size, right.size), "unpaired")
    return Estimate(value, NAN, 0, "")


def curve(findings: Sequence[Finding]) -> Curve:
    """The numbers of one label, with their spread. The findings have the same axes, see `Report.groups`."""
    first = findings[0]
    if len(findings) == 1:
        unknown = np.full_like(first.mean, np.nan)
        return Curve(first.axes, first.mean, unknown if first.error is None else first.error, 1)
    stack = np.stack([finding.mean for finding in findings])  # [S, *axes]
    known = np.isfinite(stack)
    count = known.sum(axis=0)  # [*axes]
    mean = np.where(count > 0, np.where(known, stack, 0).sum(axis=0) / np.maximum(count, 1), np.nan)
    squares = np.where(known, stack - mean, 0) ** 2
    spread = np.where(count > 1, np.sqrt(squares.sum(axis=0) / np.maximum(count - 1, 1)), np.nan)
    return Curve(first.axes, mean, spread, len(findings))


def _paired(a: Finding, b: Finding) -> np.ndarray:
    """Differences of the images that have a number in both; none if the images are not the same ones.  -> [n]"""
    if a.per_image is None or b.per_image is None or len(a.per_image) != len(b.per_image):
        return np.empty(0)
    if a.images is not None and b.images is not None and not np.array_equal(a.images, b.images):
        return np.empty(0)
    differences = np.asarray(a.per_image, dtype=np.float64) - np.asarray(b.per_image, dtype=np.float64)
    return differences[np.isfinite(differences)]


def _standard_error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values)))
