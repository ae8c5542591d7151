"""Transforms of images and masks: the crop's rule, alignment, distributions, colours and determinism."""

from __future__ import annotations

import colorsys
import random
from collections import Counter
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from torchvision import tv_tensors
from torchvision.transforms import v2

from segmentation import transforms
from segmentation.transforms import (
    RECIPES,
    ClassRatioCrop,
    PadTo,
    PhotometricDistortion,
    RandomFit,
    Recipe,
    Training,
    Whole,
    fitted,
    saturated,
)
from utils import seed_generators


def pair(mask: np.ndarray) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
    """An image whose red is its mask, green its column and blue its row."""
    rows, columns = np.indices(mask.shape)
    pixels = np.stack([mask, columns, rows]).astype(np.uint8)
    return tv_tensors.Image(torch.from_numpy(pixels)), tv_tensors.Mask(torch.from_numpy(mask))


def blocks(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A mask of large areas of few classes, some ignored."""
    small = np.random.default_rng(seed).choice([0, 0, 0, 1, 7, 255], (height // 8 + 1, width // 8 + 1))
    return np.kron(small, np.ones((8, 8), int))[:height, :width].astype(np.uint8)


# ------------------------------------------------------------------------------------------------------------
# The crop


def is_mixed(crop: np.ndarray) -> bool:
    """The rule in plain loops: more than one class, and none with 75 % or more of what is labelled."""
    counts: dict[int, int] = {}
    for row in crop.tolist():
        for label in row:
            if label != 255:
                counts[label] = counts.get(label, 0) + 1
    total = sum(counts.values())
    return len(counts) > 1 and all(count / total < 0.75 for count in counts.values())


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ({0: 3, 1: 1}, False),  # exactly 75 %
        ({0: 74, 1: 26}, True),
        ({0: 76, 1: 24}, False),
        ({4: 100}, False),
        ({255: 100}, False),
        ({0: 2, 1: 1, 255: 97}, True),  # what is ignored does not count
        ({0: 3, 1: 1, 255: 97}, False),
        ({0: 1, 254: 1}, True),
    ],
)
def test_the_rule_of_the_crop(counts, expected):
    labels = np.repeat(list(counts), list(counts.values())).astype(np.uint8)[None]
    assert is_mixed(labels) == expected
    assert ClassRatioCrop((4, 4)).is_mixed(torch.from_numpy(labels)) == expected


@pytest.mark.parametrize("seed", range(40))
def test_crops_are_drawn_by_the_rule(seed):
    """The same places as a loop that draws, looks, and draws again; the eleventh is taken as it is."""
    mask = blocks(60, 50, seed % 4)
    height, width = [(24, 20), (16, 50), (60, 10), (12, 12)][seed % 4]
    torch.manual_seed(seed)
    image, labels = ClassRatioCrop((height, width))(*pair(mask))
    torch.manual_seed(seed)
    for _ in range(11):
        top = int(torch.randint(0, 60 - height + 1, ())) if height < 60 else 0
        left = int(torch.randint(0, 50 - width + 1, ())) if width < 50 else 0
        expected = mask[top : top + height, left : left + width]
        if is_mixed(expected):
            break
    np.testing.assert_array_equal(labels, expected)
    np.testing.assert_array_equal(image[0], expected)
    assert (int(image[1, 0, 0]), int(image[2, 0, 0])) == (left, top)


@pytest.mark.parametrize(("mask", "drawn"), [(np.zeros((9, 9), np.uint8), 11), (np.indices((9, 9))[0] % 2, 1)])
def test_how_often_a_crop_is_drawn(mask, drawn):
    with mock.patch.object(v2.RandomCrop, "__call__", autospec=True, side_effect=v2.RandomCrop.__call__) as crop:
        ClassRatioCrop((4, 4))(*pair(mask.astype(np.uint8)))
    assert crop.call_count == drawn


def test_every_place_is_drawn_alike():
    """Rows and columns of a crop's corner are uniform: each of 6 places 1/6 of 3,000 times, within 5 deviations."""
    crop, (image, mask) = ClassRatioCrop((5, 4)), pair((np.indices((10, 9)).sum(0) % 2).astype(np.uint8))
    torch.manual_seed(0)
    corners = [crop(image, mask)[0][1:, 0, 0].tolist() for _ in range(3000)]
    for counts in (Counter(column for column, _ in corners), Counter(row for _, row in corners)):
        assert sorted(counts) == list(range(6))
        assert max(abs(count - 500) for count in counts.values()) < 5 * (3000 * 5 / 36) ** 0.5


# ------------------------------------------------------------------------------------------------------------
# Sizes


@pytest.mark.parametrize(
    ("size", "box", "expected"),
    [
        ((512, 683), (2048, 512), (512, 683)),
        ((683, 512), (2048, 512), (683, 512)),  # upright: the box turns
        ((300, 400), (2048, 512), (512, 683)),
        ((100, 1000), (2048, 512), (205, 2048)),  # the longer side is the limit
        ((1024, 2048), (2049, 1025), (1025, 2049)),
        ((1024, 2048), (1024, 512), (512, 1024)),
        ((1, 9000), (2048, 512), (1, 2048)),
    ],
)
def test_sizes_that_fit(size, box, expected):
    assert fitted(*size, box) == expected


def test_images_are_resized_by_a_uniform_factor():
    """The factor is between the ratios, uniform, and keeps the shape; a mask follows its image."""
    fit, mask = RandomFit((40, 20), (0.5, 2.0)), blocks(15, 30)
    torch.manual_seed(0)
    widths = []
    for _ in range(400):
        image, labels = fit(*pair(mask))
        assert image.shape[1:] == labels.shape and labels.dtype == torch.uint8
        assert abs(labels.shape[1] - 2 * labels.shape[0]) <= 1
        widths.append(labels.shape[1])
    assert min(widths) in (20, 21) and max(widths) in (78, 79, 80)
    assert abs(np.mean(widths) - 50) < 5 * 60 / 12**0.5 / 20


def test_masks_take_the_nearest_pixel_and_images_are_interpolated():
    """As OpenCV resizes: pixel centres for images, without antialiasing; floor(x s) for masks.

    torch rounds bytes after the rows and again after the columns, so it may be off by 1/2 + 1/2.
    """
    mask = np.random.default_rng(0).integers(0, 256, (13, 17), np.uint8)
    image, labels = pair(mask)
    factor = 0.7
    with mock.patch.object(transforms, "uniform", return_value=factor):
        image, labels = RandomFit((17, 13), (0.5, 2.0))(image, labels)
    height, width = labels.shape
    assert (height, width) == fitted(13, 17, (int(17 * factor), int(13 * factor)))
    rows = [int(row * 13 / height) for row in range(height)]
    columns = [int(column * 17 / width) for column in range(width)]
    np.testing.assert_array_equal(labels, mask[np.ix_(rows, columns)])
    for row in range(height):
        y = (row + 0.5) * 13 / height - 0.5
        for column in range(width):
            x = (column + 0.5) * 17 / width - 0.5
            expected = sum(
                mask[min(max(j, 0), 12), min(max(i, 0), 16)] * (1 - abs(y - j)) * (1 - abs(x - i))
                for j in (int(np.floor(y)), int(np.floor(y)) + 1)
                for i in (int(np.floor(x)), int(np.floor(x)) + 1)
            )
            assert abs(int(image[0, row, column]) - expected) <= 1.01


@pytest.mark.parametrize(("channels", "mean"), [(3, (0.485, 0.456, 0.406)), (1, (0.5,))])
def test_padding(channels, mean):
    """On the right and at the bottom: the mean colour, and nothing to learn."""
    image = tv_tensors.Image(torch.full((channels, 3, 4), 9, dtype=torch.uint8))
    mask = tv_tensors.Mask(torch.ones(3, 4, dtype=torch.uint8))
    padded, labels = PadTo((5, 6), mean)(image, mask)
    assert padded.shape == (channels, 5, 6) and labels.shape == (5, 6)
    outside = torch.ones(5, 6, dtype=torch.bool)
    outside[:3, :4] = False
    assert (labels[outside] == 255).all() and (labels[~outside] == 1).all() and (padded[:, ~outside] == 9).all()
    for channel in range(channels):
        assert (padded[channel][outside] == round(255 * mean[channel])).all()
    assert PadTo((3, 4), mean)(image, mask)[0] is image


# ------------------------------------------------------------------------------------------------------------
# Colours


def hsv(pixel) -> tuple[float, float, float]:
    return colorsys.rgb_to_hsv(*(int(each) / 255 for each in pixel))


def colours(seed: int = 0, count: int = 400) -> tv_tensors.Image:
    """Random colours, greys, black and white, as an image [3, 1, N]."""
    pixels = np.random.default_rng(seed).integers(0, 256, (3, 1, count), np.uint8)
    pixels[:, :, :20] = pixels[:1, :, :20]
    pixels[:, :, 20:22] = [[[0, 255]]] * 3
    return tv_tensors.Image(torch.from_numpy(pixels))


@pytest.mark.parametrize("factor", [0.5, 0.8, 1.0, 1.2, 1.5])
def test_saturation_is_that_of_hsv(factor):
    """Against Python's colorsys: S times the factor, at most 1; H and V stay."""
    image = colours()
    result = saturated(image, factor)
    assert result.dtype == torch.uint8
    for before, after in zip(image[:, 0].T.tolist(), result[:, 0].T.tolist(), strict=True):
        hue, saturation, value = hsv(before)
        expected = colorsys.hsv_to_rgb(hue, min(1.0, factor * saturation), value)
        assert max(abs(255 * e - a) for e, a in zip(expected, after, strict=True)) <= 0.5 + 1e-3


def draws(**fixed):
    """Fix the draws: which coins fall so, and the numbers, in order."""
    coins, numbers = iter(fixed.get("coins", ())), iter(fixed.get("numbers", ()))
    return (
        mock.patch.object(transforms, "coin", lambda: next(coins)),
        mock.patch.object(transforms, "uniform", lambda low, high: next(numbers)),
    )


def test_each_distortion_is_its_equation():
    """Brightness adds and contrast multiplies; both are cut to whole numbers of 0 to 255, as in the reference."""
    image, mask = colours(1), tv_tensors.Mask(torch.zeros(1, 400, dtype=torch.uint8))
    pixels = np.asarray(image, np.float64)
    for coins, numbers, expected in (
        ((True, False, False, False, False), (-31.4,), pixels - 31.4),
        ((False, True, True, False, False), (1.37,), pixels * 1.37),
        ((False, False, False, False, True), (0.61,), pixels * 0.61),
        ((False, False, False, False, False), (), pixels),
    ):
        coin, number = draws(coins=coins, numbers=numbers)
        with coin, number:
            result, same = PhotometricDistortion()(image, mask)
        expected = np.clip(expected, 0, 255)
        np.testing.assert_array_equal(np.asarray(result), expected.astype(np.float32).astype(np.uint8))
        assert same is mask and isinstance(result, tv_tensors.Image)


def test_hue_is_turned_by_up_to_18_of_180():
    """Against Python's colorsys; whole steps from -18 to 17, each as often as the others."""
    image, mask = colours(2, 60), tv_tensors.Mask(torch.zeros(1, 60, dtype=torch.uint8))
    torch.manual_seed(0)
    turns = Counter()
    for _ in range(400):
        coin, number = draws(coins=(False, False, False, True, False))
        with coin, number:
            result, _ = PhotometricDistortion()(image, mask)
        errors = {}
        for turn in range(-20, 21):
            expected = [
                colorsys.hsv_to_rgb((h + turn / 180) % 1, s, v) for h, s, v in map(hsv, image[:, 0].T.tolist())
            ]
            errors[turn] = np.abs(255 * np.array(expected).T - np.asarray(result)[:, 0]).max()
        best = min(errors, key=errors.get)
        assert errors[best] <= 1.01
        turns[best] += 1
    assert min(turns) == -18 and max(turns) == 17 and len(turns) == 36
    assert max(turns.values()) < 400 / 36 + 5 * (400 / 36) ** 0.5


def test_how_often_colours_are_distorted():
    """Each operation half of the time, contrast first as often as last; numbers fill their ranges."""
    image, mask = colours(3, 30), tv_tensors.Mask(torch.zeros(1, 30, dtype=torch.uint8))
    calls: list[str] = []
    drawn: dict[tuple[float, float], list[float]] = {}

    def noting(name, function):
        return lambda *args: calls.append(name) or function(*args)

    def uniform(low, high, draw=transforms.uniform):
        drawn.setdefault((low, high), []).append(draw(low, high))
        return drawn[low, high][-1]

    orders = Counter()
    torch.manual_seed(0)
    with (
        mock.patch.object(transforms.F, "adjust_brightness", noting("contrast", transforms.F.adjust_brightness)),
        mock.patch.object(transforms.F, "adjust_hue", noting("hue", transforms.F.adjust_hue)),
        mock.patch.object(transforms, "saturated", noting("saturation", saturated)),
        mock.patch.object(transforms, "uniform", uniform),
    ):
        for _ in range(2000):
            calls.clear()
            PhotometricDistortion()(image, mask)
            orders[tuple(calls)] += 1
    deviation = 5 * (2000 * 0.25) ** 0.5
    for name in ("contrast", "saturation", "hue"):
        assert abs(sum(count for order, count in orders.items() if name in order) - 1000) < deviation
    assert abs(len(drawn[-32, 32]) - 1000) < deviation
    both = Counter(order[0] == "contrast" for order in orders.elements() if {"contrast", "hue"} <= set(order))
    assert abs(both[True] - both[False]) < 5 * both.total() ** 0.5
    assert not any(
        order.index("saturation") > order.index("hue") for order in orders if {"saturation", "hue"} <= set(order)
    )
    for (low, high), numbers in drawn.items():
        assert low <= min(numbers) < low + 0.02 * (high - low) and high - 0.02 * (high - low) < max(numbers) <= high


# ------------------------------------------------------------------------------------------------------------
# All of it


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe(name):
    recipe = RECIPES[name]
    mask = blocks(90, 120) if name != "DIGITS" else blocks(64, 64)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*mask.shape, 3), np.uint8))
    pixels, labels = Training(recipe)(image, mask)
    assert pixels.shape == (3, *recipe.crop) and labels.shape == recipe.crop
    assert pixels.dtype == labels.dtype == torch.uint8
    assert type(pixels) is type(labels) is torch.Tensor and pixels.is_contiguous()
    assert set(labels.unique().tolist()) <= {0, 1, 7, 255}
    whole = Whole(recipe)(image)
    expected = mask.shape if recipe.test_fit is None else fitted(*mask.shape, recipe.test_fit)
    assert whole.shape == (3, *expected) and type(whole) is torch.Tensor


SMALL = Recipe((40, 48), (96, 64), (80, 40))


def test_image_and_mask_stay_together():
    """Red is the mask: where both were cropped, mirrored and padded, it still is; colours are left alone here."""
    mask = blocks(70, 90)
    rows, columns = np.indices(mask.shape)
    image = Image.fromarray(np.stack([mask, columns, rows], axis=-1).astype(np.uint8))
    transform = Training(SMALL._replace(train_fit=None, crop=(40, 120), distort=False))
    mirrored = 0
    for seed in range(300):
        torch.manual_seed(seed)
        pixels, labels = transform(image, mask)
        assert pixels.shape == (3, 40, 120)
        inside = pixels[0] != 124  # the padding's red
        assert inside[:, :90].all() and not inside[:, 90:].any()
        np.testing.assert_array_equal(pixels[0][:, :90], labels[:, :90])
        steps = np.diff(pixels[1][:, :90].to(torch.int64))
        mirrored += int((steps == -1).all())
        assert (steps == -1).all() or (steps == 1).all()
    assert abs(mirrored - 150) < 5 * 75**0.5


def test_resized_masks_lie_over_their_images():
    """Resized by any factor: where an image of 0 and 200 is flat around a pixel, its mask has the same number."""
    mask = np.where(blocks(50, 70) == 0, 0, 200).astype(np.uint8)
    image = Image.fromarray(np.repeat(mask[..., None], 3, axis=-1))
    transform = Training(SMALL._replace(crop=(30, 30), distort=False))
    for seed in range(30):
        torch.manual_seed(seed)
        pixels, labels = transform(image, mask)
        low, high = ndimage.minimum_filter(pixels[0], 5), ndimage.maximum_filter(pixels[0], 5)
        flat = (low == high) & np.isin(low, (0, 200))
        assert flat.mean() > 0.2
        np.testing.assert_array_equal(labels.numpy()[flat], pixels[0].numpy()[flat])


@pytest.mark.parametrize("channels", [1, 3])
def test_equal_seeds_give_equal_examples(channels):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8))
    mask, transform = blocks(50, 70), Training(SMALL, channels)
    made = []
    for entropy in ((1, 2), (1, 2), (1, 3)):
        seed_generators(entropy)
        pixels, labels = transform(image, mask)
        assert pixels.shape == (channels, 40, 48)
        made.append((pixels.numpy().tobytes(), labels.numpy().tobytes()))
    assert made[0] == made[1] != made[2]
    states = random.getstate(), np.random.get_state()[1].tobytes()
    transform(image, mask)
    assert states == (
        random.getstate(),
        np.random.get_state()[1].tobytes(),
    )  # torch's generator alone is drawn from


def test_grey_images():
    """With one channel: the grey that Pillow makes, to 1 of 255; a test image keeps its shape."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 20, 3), np.uint8))
    whole = Whole(SMALL._replace(test_fit=None), channels=1)(image)
    assert whole.shape == (1, 30, 20)
    assert np.abs(whole[0].numpy().astype(int) - np.asarray(image.convert("L"), int)).max() <= 1
    assert Whole(SMALL, channels=1)(image).shape == (1, *fitted(30, 20, (80, 40)))
