"""Adding up: however the images are split, and between however many processes, the numbers are the same."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from naive_metrics import groups_of
from shown_batch import IMAGES, a_batch, accumulated, some_images

import redundancy.assessment  # noqa: F401  (registers all metrics)
from redundancy.finding import Finding
from redundancy.metric import METRICS, Metric
from redundancy.patches import CKA, hsic
from redundancy.streams import Accumulator, Moments, shares

of_sets = [each for each in METRICS.values() if each.takes == "set"]


# ------------------------------------------------------------------------------------------------------------
# Shares of several processes


@given(st.integers(0, 400), st.integers(1, 12))
@example(0, 3)
@example(3, 2)
@example(35, 2)
@example(36, 2)
@example(68, 2)
def test_shares_make_the_groups_that_one_process_makes(images: int, processes: int) -> None:
    parts = shares(images, processes)
    assert len(parts) == processes
    assert [image for part in parts for image in part] == list(range(images))
    groups = [[part[image] for image in group] for part in parts for group in groups_of(len(part))]
    assert groups == [list(group) for group in groups_of(images)]
    sizes = [len(part) for part in parts if len(part)]
    assert not sizes or max(sizes) - min(sizes) <= 64  # 32, and what the last group has besides


@pytest.mark.parametrize("processes", [2, 3, 5])
@pytest.mark.parametrize("metric", of_sets, ids=[each.name for each in of_sets])
def test_merged_shares_equal_one_pass(metric: Metric, processes: int) -> None:
    shown = a_batch()
    merged: Accumulator | None = None
    for share in shares(IMAGES, processes):
        batches = [range(first, min(first + 7, share.stop)) for first in range(share.start, share.stop, 7)]
        accumulator = accumulated(metric, *(some_images(shown, batch) for batch in batches))
        if merged is None:
            merged = accumulator
        else:
            merged.merge(accumulator)
    assert merged is not None
    assert_same(merged.finding(), accumulated(metric, shown).finding())


def assert_same(found: Finding, expected: Finding) -> None:
    assert (found.axes, found.count) == (expected.axes, expected.count)
    np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-9)
    assert found.error is not None and expected.error is not None
    np.testing.assert_allclose(found.error, expected.error, rtol=1e-7)


def test_groups_are_those_of_the_order() -> None:
    shown = a_batch()
    accumulator = accumulated(METRICS["patch.cka"], *(some_images(shown, range(i, i + 1)) for i in range(IMAGES)))
    assert isinstance(accumulator, CKA)
    layers = [x.flatten(1) for x in shown.patches.values()]
    expected = [hsic([x[:32] for x in layers]), hsic([x[32:] for x in layers])]
    np.testing.assert_allclose(np.stack(accumulator.values), np.stack(expected), rtol=1e-10)


# ------------------------------------------------------------------------------------------------------------
# Means and standard errors


numbers = st.lists(st.one_of(st.floats(-1, 1), st.just(math.nan)), max_size=20)


@given(st.lists(numbers, max_size=6), st.integers(0, 5), st.sampled_from([0.0, 1e6]))
@example([[1.0], [], [math.nan, 2.0]], 1, 0.0)
@example([[math.nan]], 0, 0.0)
def test_moments_are_those_of_all_numbers(batches: list[list[float]], first: int, offset: float) -> None:
    """Also where the first batches come from another process, and where the mean is large."""
    one, other = Moments(), Moments()
    for place, batch in enumerate(batches):
        (one if place < first else other).add(offset + np.array(batch)[:, None] * [1, 2])
    one.merge(other)
    known = offset + np.array([each for batch in batches for each in batch if not math.isnan(each)])[:, None] * [
        1,
        2,
    ]
    mean = known.mean(axis=0) if len(known) else [math.nan] * 2
    error = known.std(axis=0, ddof=1) / math.sqrt(len(known)) if len(known) > 1 else [math.nan] * 2
    np.testing.assert_allclose(np.broadcast_to(one.means(), 2), mean, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(np.broadcast_to(one.errors(), 2), error, rtol=1e-6, atol=1e-9)
