"""Patch Diversification's mix and its labels: the rule enumerated case by case, pixels and classes one by one."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import reference
import torch
from scipy import stats
from torch import Tensor

from errors import UserError
from losses import cross_entropy
from mixing import mixup
from mixing.patch_grid import Labels, PatchGrid, Rectangle
from regularizers.measures import region_mixing
from utils import set_streams, streams

CLASSES = 7


def batch_of(size: int = 4, height: int = 12, width: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 3, height, width, generator=generator, dtype=torch.float64)
    return images, torch.randint(CLASSES, (size,), generator=generator)


def cells(rectangle: Rectangle, rows: int, columns: int) -> list[list[int]]:
    """1 where a patch of the grid lies in the rectangle."""
    top, bottom, left, right = rectangle
    return [[int(top <= r < bottom and left <= c < right) for c in range(columns)] for r in range(rows)]


# ------------------------------------------------------------------------------------------------------------
# Draws


@pytest.mark.parametrize("grid", [(4, 4), (7, 7), (14, 14), (3, 6), (6, 3)])
def test_rectangles_have_the_probabilities_of_the_rule(grid: tuple[int, int]) -> None:
    """A chi-square test of 20,000 draws; rare rectangles count together, and none is impossible."""
    expected = reference.rectangles(*grid)
    assert sum(expected.values()) == pytest.approx(1)
    mixing, count = PatchGrid(patch_size=(1, 1), seed=7), 20_000
    found = Counter(tuple(mixing.draw(2, *grid)[0]) for _ in range(count))
    assert set(found) <= set(expected)
    common = {key for key, chance in expected.items() if chance * count >= 8}
    observed = [found[key] for key in common]
    awaited = [expected[key] * count for key in common]
    rest = count - sum(awaited)
    if rest > 1e-6:
        observed.append(count - sum(observed))
        awaited.append(rest)
    assert len(observed) > 10
    assert stats.chisquare(observed, awaited).pvalue > 1e-3


def test_the_share_is_about_uniform_and_an_area_of_0_leaves_nothing() -> None:
    """Where length times width is less than the area, the mask's share is what it really has."""
    mixing = PatchGrid(patch_size=(1, 1), seed=1)
    drawn = [mixing.draw(2, 14, 14)[0] for _ in range(2000)]
    shares = np.array([(b - t) * (r - le) / 196 for t, b, le, r in drawn])
    assert 0.4 < shares.mean() < 0.5 and shares.min() == 0 and shares.max() < 1
    assert all(t >= 0 and b <= 14 and le >= 0 and r <= 14 for t, b, le, r in drawn)
    one = PatchGrid(patch_size=(4, 4), seed=1).draw(2, 1, 1)[0]
    assert one.left == one.right  # a grid of one patch has area 0


def test_the_order_of_draws_is_share_length_top_left_permutation() -> None:
    """From one generator, after those of Mixup and CutMix."""
    mixing, seed = PatchGrid(patch_size=(4, 4), mixup_alpha=0.0, switch_prob=0.0, seed=5), 5
    twin = np.random.RandomState(seed)
    for _ in range(50):
        images, targets = batch_of(6, 40, 40)
        _, labels = mixing(images, targets)
        weight = twin.beta(1.0, 1.0)  # CutMix: its box, then its centre
        side = np.sqrt(1 - weight)
        half, row, column = int(40 * side) // 2, twin.randint(40), twin.randint(40)
        box = max(row - half, 0), min(row + half, 40), max(column - half, 0), min(column + half, 40)
        area = int(100 * twin.beta(1.0, 1.0))
        length = twin.randint(1, max(1, min(10, area) - 1) + 1)
        width = area // length
        if width > 10:
            length, width = area // 10, 10
        top, left = twin.randint(0, max(0, 10 - length) + 1), twin.randint(0, max(0, 10 - width) + 1)
        assert labels.order.tolist() == twin.permutation(6).tolist()
        own = cells(Rectangle(top, top + length, left, left + width), 10, 10)
        assert labels.regions[0].tolist() == np.ravel(own).tolist()
        assert labels.first.weight[0].item() == 1 - (box[1] - box[0]) * (box[3] - box[2]) / 1600
    assert mixing.random is mixing.mixup.random


def test_a_checkpoints_stream_repeats_the_mixes() -> None:
    mixing, device = PatchGrid(patch_size=(4, 4), seed=3), torch.device("cpu")
    mixing(*batch_of())
    before = streams(device, mixing.random)
    first = mixing(*batch_of())
    set_streams(before, device, mixing.random)
    again = mixing(*batch_of())
    assert torch.equal(first[0], again[0]) and torch.equal(first[1].order, again[1].order)


# ------------------------------------------------------------------------------------------------------------
# Images and labels


@pytest.mark.parametrize("cutmix", [0.0, 1.0])
@pytest.mark.parametrize(("height", "width", "patch"), [(12, 12, (4, 4)), (13, 10, (3, 4)), (8, 16, (4, 2))])
def test_images_and_labels_are_mixed_as_drawn(
    height: int, width: int, patch: tuple[int, int], cutmix: float
) -> None:
    """Pixel by pixel and class by class, as a twin with the same seed draws."""
    options: dict[str, Any] = {"mixup_alpha": 0.0, "cutmix_alpha": cutmix, "seed": 2}
    mixing, first = PatchGrid(patch_size=patch, **options), mixup.Mixup(**options)
    twin = PatchGrid(patch_size=patch, **options)
    for seed in range(12):
        images, targets = batch_of(4, height, width, seed)
        before = images.clone()
        mixed, labels = mixing(images, targets)
        once, once_labels = first(images, targets)
        twin.mixup(images, targets)
        rectangle, order = twin.draw(4, *twin.grid(images))
        first.random.set_state(twin.random.get_state())
        own = cells(rectangle, height // patch[0], width // patch[1])
        assert torch.equal(mixed, reference.grid_mixed(once, order, own, patch))
        assert torch.equal(images, before)  # the caller's images are not touched
        assert labels.order.tolist() == order and torch.equal(labels.own, targets)
        assert labels.regions.tolist() == [np.ravel(own).tolist(), (1 - np.ravel(own)).tolist()]
        share = np.mean(own)
        dense = once_labels.dense(CLASSES, torch.float64)
        torch.testing.assert_close(labels.shares, torch.tensor([share, 1 - share]).double(), rtol=0, atol=1e-12)
        expected = share * dense + (1 - share) * dense[order]
        torch.testing.assert_close(labels.dense(CLASSES, torch.float64), expected, rtol=0, atol=1e-12)
        assert labels.mixed and labels.smoothing == 0.1 and labels.dense(CLASSES).dtype == torch.float32


def test_odd_batches_are_mixed_unless_cutmix_is_on() -> None:
    assert PatchGrid(patch_size=(4, 4), mixup_alpha=0.0, cutmix_alpha=0.0)(*batch_of(3))[0].shape == (3, 3, 12, 12)
    with pytest.raises(UserError, match="a batch of 3 images cannot be mixed in pairs"):
        PatchGrid(patch_size=(4, 4))(*batch_of(3))
    with pytest.raises(UserError, match="--smoothing 2"):
        PatchGrid(patch_size=(4, 4), smoothing=2)
    with pytest.raises(ValueError, match="give their size"):
        PatchGrid()


def test_labels_of_a_batch_that_is_repeated() -> None:
    images, targets = batch_of()
    _, labels = PatchGrid(patch_size=(4, 4), seed=4)(images, targets)
    twice = labels.repeat(2)
    assert twice.order.tolist() == [*labels.order.tolist(), *(4 + labels.order).tolist()]
    assert torch.equal(twice.dense(CLASSES), labels.dense(CLASSES).repeat(2, 1))
    assert torch.equal(twice.of_regions(CLASSES), labels.of_regions(CLASSES).repeat(2, 1, 1))


# ------------------------------------------------------------------------------------------------------------
# Losses


def labelled(smoothing: float = 0.1, seed: int = 6) -> tuple[Labels, list[list[int]]]:
    """Labels of a batch of 4, and which patches of 3 x 3 are an image's own."""
    mixing = PatchGrid(patch_size=(4, 4), smoothing=smoothing, seed=seed)
    _, labels = mixing(*batch_of(seed=seed))
    return labels, labels.regions[0].reshape(3, 3).int().tolist()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("seed", range(4))
def test_region_mixing_is_the_loops(smoothing: float, seed: int) -> None:
    """Also where a label is 0, and where a probability is as good as 0."""
    labels, own = labelled(smoothing, seed)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, 2, CLASSES, generator=generator, dtype=torch.float64)
    logits[0, 0, 0] = 60.0
    dense = labels.first.dense(CLASSES, torch.float64).tolist()
    expected = reference.region_mixing(logits.tolist(), dense, labels.order.tolist(), own)
    assert region_mixing(logits, labels).item() == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.gradcheck(lambda z: region_mixing(z, labels), logits.requires_grad_())
    half = region_mixing(logits.detach().bfloat16(), labels)
    assert half.dtype == torch.float32
    assert torch.equal(half, region_mixing(logits.detach().bfloat16().float(), labels))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_has_the_labels_floor(smoothing: float) -> None:
    labels, _ = labelled(smoothing)
    logits = torch.randn(4, CLASSES, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logits[1, 2] = 80.0  # the others are below the floor
    dense = labels.dense(CLASSES, torch.float64).tolist()
    expected = reference.floored_cross_entropy(logits.tolist(), dense)
    assert labels.floor == 1e-8
    assert cross_entropy(logits, labels).item() == pytest.approx(expected, rel=1e-12)
    assert labels.first.floor == 0 and cross_entropy(logits, labels.first) > cross_entropy(logits, labels) / 2
