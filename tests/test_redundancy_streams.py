"""Adding up: however the images are split, and between however many processes, the numbers are the same."""

from __future__ import annotations

import math
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from naive_metrics import groups_of
from shown_batch import CLASSES, IMAGES, a_batch, accumulated, normal, some_images

from redundancy.finding import Finding
from redundancy.metrics.patches import CKA, hsic
from redundancy.metrics.registry import METRICS, Metric
from redundancy.metrics.shown import Shown
from redundancy.metrics.streams import Accumulator, ImageMeans, Moments, shares
from redundancy.metrics.values import values_of

of_images = [each for each in METRICS.values() if each.takes != "weight"]


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


def accumulator_of(metric: Metric, *batches: Shown) -> Accumulator:
    """Closed, after these batches."""
    if metric.takes == "set":
        return accumulated(metric, *batches)
    means = ImageMeans(metric, (), partial(values_of, metric))
    for batch in batches:
        means.update(batch)
    means.close()
    return means


@pytest.mark.parametrize("processes", [2, 3, 5])
@pytest.mark.parametrize("metric", of_images, ids=[each.name for each in of_images])
def test_merged_shares_equal_one_pass(metric: Metric, processes: int) -> None:
    shown = a_batch()
    merged: Accumulator | None = None
    for share in shares(IMAGES, processes):
        batches = [range(first, min(first + 7, share.stop)) for first in range(share.start, share.stop, 7)]
        accumulator = accumulator_of(metric, *(some_images(shown, batch) for batch in batches))
        if not batches:
            continue
        if merged is None:
            merged = accumulator
        else:
            merged.merge(accumulator)
    assert merged is not None
    assert_same(merged.finding(), accumulator_of(metric, shown).finding())


def assert_same(found: Finding, expected: Finding) -> None:
    assert (found.axes, found.count) == (expected.axes, expected.count)
    assert found.error is not None and expected.error is not None
    for name, tolerance in (("mean", 1e-9), ("error", 1e-7), ("summary", 1e-9), ("summary_error", 1e-7)):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=tolerance, atol=1e-12)
    assert (found.per_image is None) == (expected.per_image is None)
    if found.per_image is not None and expected.per_image is not None:
        np.testing.assert_allclose(found.per_image, expected.per_image, rtol=1e-9, atol=1e-12)


def test_one_broken_image_of_another_process() -> None:
    """It leaves no calibration error, but an accuracy of the others."""
    shown = a_batch()
    shown.logits[-1, 0] = math.nan
    halves = some_images(shown, range(32)), some_images(shown, range(32, IMAGES))
    for name, gap in (("output.calibration", True), ("output.top1", False)):
        one, other = (accumulator_of(METRICS[name], half) for half in halves)
        one.merge(other)
        assert np.isnan(one.finding().mean) == gap


@pytest.mark.parametrize("size", [1, 7, 200])
@pytest.mark.parametrize("images", [3, 4, 35, 36, 68, 75, 100])
def test_groups_are_those_of_the_order(images: int, size: int) -> None:
    layers = {0: normal(images, 2, 3), 1: normal(images, 1, 4, seed=1)}
    batches = [
        Shown((8, 8), {layer: x[first : first + size] for layer, x in layers.items()}, {}, {}, logits)
        for first, logits in zip(range(0, images, size), torch.zeros(images, 1).split(size), strict=True)
    ]
    accumulator = accumulated(METRICS["patch.cka"], *batches)
    assert isinstance(accumulator, CKA)
    flat = [x.flatten(1) for x in layers.values()]
    expected = [hsic([x[group.start : group.stop] for x in flat]) for group in groups_of(images)]
    assert len(accumulator.values) == len(expected)
    for found, values in zip(accumulator.values, expected, strict=True):
        np.testing.assert_allclose(found, values, rtol=1e-10)
    assert accumulator.finding().count == images


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


@pytest.mark.parametrize("metric", of_images, ids=[each.name for each in of_images])
def test_memory_does_not_grow_with_the_images(metric: Metric) -> None:
    """Of each image there stays one number, and the HSIC of its group; nearest neighbours need the features."""
    shown = a_batch()
    kept = [len(pickle.dumps(accumulator_of(metric, *[shown] * times))) for times in (4, 8)]
    of_image = (kept[1] - kept[0]) / (4 * IMAGES)
    assert of_image <= (8 + 4 * CLASSES + 20 if metric.name == "output.knn" else 20)
