"""Means over seeds, and differences between rows that are paired by seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

LEVEL = 0.95
ROUNDING = 1e-12  # relative to the numbers: a smaller spread is none


class Summary(NamedTuple):
    """Of one row in one column.

    Attributes:
        mean: over seeds.
        deviation: standard deviation over seeds, with n - 1; NaN of one seed.
        seeds: n, those that have a number.
    """

    mean: float
    deviation: float
    seeds: int


class Difference(NamedTuple):
    """Of a row to its baseline in one column.

    Attributes:
        mean: of the differences seed by seed.
        low, high: their interval; NaN of one seed, or where all differences are equal.
        seeds: that both rows have.
    """

    mean: float
    low: float
    high: float
    seeds: int

    @property
    def includes_zero(self) -> bool:
        """Whether the interval does: nothing is shown, in either direction. So it is where there is no interval."""
        return not (self.low > 0 or self.high < 0)


def summarise(values: Sequence[float]) -> Summary | None:
    """Mean and standard deviation; None of nothing."""
    if not values:
        return None
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
    return Summary(float(np.mean(values)), deviation, len(values))


def paired(values: Mapping[int, float], baseline: Mapping[int, float]) -> Difference | None:
    r"""Mean difference of seeds that both have, with Student's interval of 95 %.

        d_s = x_s - b_s,   mean(d) +- t_{0.975, n - 1} sd(d) / sqrt(n)

    A seed draws the initial weights and the order of images of both rows, so their numbers are paired by it. The
    interval is right for differences that are normal, whatever their variance. It says nothing of other data or
    models.

    Args:
        values, baseline: numbers by seed.
    Returns:
        None where no seed has both.
    """
    from scipy import stats  # which training does not need

    seeds = sorted(values.keys() & baseline.keys())
    if not seeds:
        return None
    differences = np.array([values[seed] - baseline[seed] for seed in seeds])
    mean, count = float(differences.mean()), len(seeds)
    if count < 2:
        return Difference(mean, math.nan, math.nan, count)
    error = float(differences.std(ddof=1)) / math.sqrt(count)
    if error <= ROUNDING * max(map(abs, [*values.values(), *baseline.values()])):
        return Difference(mean, math.nan, math.nan, count)  # all equal: nothing is known of how they vary
    reach = float(stats.t.ppf((1 + LEVEL) / 2, count - 1)) * error
    return Difference(mean, mean - reach, mean + reach, count)
