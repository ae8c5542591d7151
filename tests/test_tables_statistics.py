"""Means over seeds and paired differences, against scipy's own tests and by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from tables.statistics import paired, summarise

PLAIN = {0: 92.6, 1: 91.9, 2: 93.3, 3: 92.2, 4: 92.9}
DIVERSE = {0: 93.2, 1: 92.4, 2: 93.1, 3: 93.6, 4: 93.0}


def test_mean_and_deviation() -> None:
    """By hand: mean of 1, 2, 6 is 3, squares 4 + 1 + 9 over n - 1 = 2."""
    found = summarise([1.0, 2.0, 6.0])
    assert found is not None
    assert found.mean == 3 and found.deviation == pytest.approx(math.sqrt(7), rel=1e-12) and found.seeds == 3
    assert summarise([]) is None
    alone = summarise([5.0])
    assert alone is not None and alone.mean == 5 and math.isnan(alone.deviation)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_the_interval_is_that_of_the_paired_t_test(count: int) -> None:
    seeds = range(count)
    found = paired({seed: DIVERSE[seed] for seed in seeds}, {seed: PLAIN[seed] for seed in seeds})
    test = stats.ttest_rel([DIVERSE[seed] for seed in seeds], [PLAIN[seed] for seed in seeds])
    low, high = test.confidence_interval(0.95)
    assert found is not None and found.seeds == count
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-12)
    assert found.includes_zero == (test.pvalue > 0.05)


def test_fixed_numbers() -> None:
    """Differences 0.6, 0.5, -0.2, 1.4, 0.1: mean 0.48, variance 1.468 / 4; t of 4 degrees: 2.776445."""
    found = paired(DIVERSE, PLAIN)
    assert found is not None
    assert found.mean == pytest.approx(0.48, abs=1e-9)
    assert found.high - found.mean == pytest.approx(2.776445 * math.sqrt(0.367 / 5), abs=1e-6)
    assert found.includes_zero


def test_only_seeds_of_both_count() -> None:
    found = paired({0: 1.0, 2: 3.0, 7: 9.0}, {2: 1.0, 7: 6.0, 8: 0.0})
    assert found is not None and (found.mean, found.seeds) == (2.5, 2)
    assert paired({0: 1.0}, {1: 1.0}) is None


def test_one_seed_shows_nothing() -> None:
    found = paired({3: 95.0}, {3: 90.0})
    assert found is not None and found.mean == 5 and math.isnan(found.low) and found.includes_zero


def test_equal_differences_have_no_interval() -> None:
    """Three seeds that differ by one test image each say nothing of how much seeds differ; nor does rounding."""
    for values, baseline in (
        ({0: 2.0, 1: 3.0}, {0: 1.0, 1: 2.0}),
        ({k: 0.1 + 0.2 for k in range(3)}, dict.fromkeys(range(3), 0.3)),
    ):
        found = paired(values, baseline)
        assert found is not None and math.isnan(found.low) and math.isnan(found.high) and found.includes_zero


@pytest.mark.parametrize("count", [3, 5])
@pytest.mark.parametrize("spread", [0.1, 4.0])
def test_the_interval_covers_the_truth(count: int, spread: float) -> None:
    """Of 2,000 drawn experiments 93 to 97 % have the true difference inside, however much the seeds vary."""
    generator = np.random.default_rng(count)
    truth, inside = 0.7, 0
    for _ in range(2000):
        common = generator.normal(90, spread, count)  # what a seed does to both
        plain = common + generator.normal(0, 0.5, count)
        other = common + truth + generator.normal(0, 0.8, count)
        found = paired(dict(enumerate(other)), dict(enumerate(plain)))
        assert found is not None
        inside += found.low <= truth <= found.high
    assert 0.93 <= inside / 2000 <= 0.97


def test_pairing_takes_out_what_a_seed_does_to_both() -> None:
    generator = np.random.default_rng(0)
    common = generator.normal(0, 10, 5)
    plain, other = common + generator.normal(0, 0.1, 5), common + 1 + generator.normal(0, 0.1, 5)
    found = paired(dict(enumerate(other)), dict(enumerate(plain)))
    assert found is not None and not found.includes_zero
    assert stats.ttest_ind(other, plain).pvalue > 0.5
