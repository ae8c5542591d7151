"""Predictions against loops in numpy: windows, scales, flips, and what is in memory meanwhile."""

from __future__ import annotations

import weakref
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from segmenters import bilinear
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from errors import UserError
from segmentation import inference
from segmentation.heads import resize
from segmentation.inference import SCALES, Predictor

CLASSES = 5


class Tiny(nn.Module):
    """Logits at a third of the image's size, rounded up, that depend on a neighbourhood and on the place in it."""

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("weight", torch.randn(classes, 3, 5, 5, generator=generator, dtype=torch.float64))

    def forward(self, images: Tensor) -> Tensor:
        mixed = torch.nn.functional.conv2d(images, self.weight.to(images), stride=3, padding=2)
        ramp = torch.linspace(-1, 2, mixed.shape[-1], dtype=images.dtype)
        return mixed + ramp * torch.arange(mixed.shape[1]).view(-1, 1, 1)


def image(height: int, width: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, height, width, generator=generator, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------------
# A statement of the rules in numpy


def naive_logits(model: nn.Module, picture: np.ndarray, window: Any, stride: Any) -> np.ndarray:
    """The mean of the logits of all windows, as large as the picture: pixel by pixel."""
    _, height, width = picture.shape
    window = window or (height, width)
    down, right = stride or window
    total, count = np.zeros((CLASSES, height, width)), np.zeros((height, width))
    top = 0
    while True:
        bottom = min(top + window[0], height)
        first_row = max(bottom - window[0], 0)
        left = 0
        while True:
            end = min(left + window[1], width)
            first = max(end - window[1], 0)
            crop = picture[:, first_row:bottom, first:end]
            logits = model(torch.from_numpy(crop.copy())[None])[0].numpy()
            total[:, first_row:bottom, first:end] += bilinear(logits, crop.shape[1:])
            count[first_row:bottom, first:end] += 1
            if end == width:
                break
            left += right
        if bottom == height:
            break
        top += down
    return total / count


def naive(model: nn.Module, picture: np.ndarray, size: tuple[int, int], predict: Predictor) -> np.ndarray:
    """The mean of probabilities over scales and flips, [K, *size]."""
    _, height, width = picture.shape
    total, views = np.zeros((CLASSES, *size)), 0
    for scale in predict.scales:
        scaled = bilinear(picture, (int(height * scale + 0.5), int(width * scale + 0.5)))
        for flipped in (False, True)[: 1 + predict.flip]:
            seen = scaled[:, :, ::-1] if flipped else scaled
            logits = bilinear(naive_logits(model, seen, predict.window, predict.stride), size)
            exponents = np.exp(logits - logits.max(axis=0))
            probabilities = exponents / exponents.sum(axis=0)
            total += probabilities[:, :, ::-1] if flipped else probabilities
            views += 1
    return total / views


@pytest.mark.parametrize("size", [(17, 23), (11, 9), (30, 41)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"flip": True},
        {"window": (8, 8), "stride": (5, 5)},
        {"window": (8, 10), "stride": (8, 7), "batch": 1},
        {"window": (7, 40)},  # wider than the image; no stride
        {"window": (50, 50), "stride": (20, 20)},
        {"scales": (0.5, 1.0, 1.25), "flip": True},
        {"window": (9, 8), "stride": (4, 5), "scales": (0.75, 1.75), "flip": True, "batch": 3},
    ],
)
def test_predictions_are_those_of_a_loop(
    options: dict[str, Any], size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, picture, predict = Tiny(), image(17, 23), Predictor(**options)
    expected = naive(model, picture.numpy(), size, predict)
    best = np.sort(expected, axis=0)
    assert np.mean(best[-1] - best[-2] > 1e-9) == 1  # no pixel is a matter of rounding
    for elements in (CLASSES * 3 * 41, 2**22):  # bands of a few rows, and one band
        monkeypatch.setattr(inference, "ELEMENTS", elements)
        found = predict(model, picture, size)
        assert found.dtype == torch.uint8
        np.testing.assert_array_equal(found.numpy(), expected.argmax(axis=0))


@pytest.mark.parametrize("size", [(17, 23), (40, 31), (6, 50)])
def test_bands_are_the_logits_of_the_loop(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only their largest."""
    model, picture = Tiny(), image(17, 23)
    predict = Predictor(window=(8, 9), stride=(6, 5))
    monkeypatch.setattr(inference, "ELEMENTS", CLASSES * 4 * 50)
    for flipped in (False, True):
        seen = picture.flip(-1) if flipped else picture
        view = predict._view(model, picture, 1.0, flipped)
        bands = list(view.bands(size))
        assert [first for first, _ in bands] == list(np.cumsum([0] + [len(band[0]) for _, band in bands])[:-1])
        found = torch.cat([band for _, band in bands], dim=1).numpy()
        expected = bilinear(naive_logits(model, seen.numpy(), (8, 9), (6, 5)), size)
        np.testing.assert_allclose(found, expected[..., ::-1] if flipped else expected, rtol=1e-10, atol=1e-10)


def test_a_whole_image_is_resized_as_torch_does_it() -> None:
    picture, model = image(32, 48).float(), Tiny()
    expected = resize(model(picture[None]), (32, 48)).argmax(dim=1)[0]
    assert (Predictor()(model, picture, (32, 48)) == expected).double().mean() > 0.999  # up to rounding


def test_half_precision_is_added_up_in_float32() -> None:
    seen: list[torch.dtype] = []

    class Half(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(images.dtype)
            return Tiny()(images).bfloat16()

    view = Predictor(window=(8, 8))._view(Half(), image(16, 16), 1.0, False)
    assert {band.dtype for _, band in view.bands((16, 16))} == {torch.float32}


def test_many_classes_need_more_than_a_byte() -> None:
    found = Predictor()(Tiny(300), image(9, 9), (9, 9))
    assert found.dtype == torch.int64 and int(found.max()) > 255


def test_windows_cover_the_image_and_stay_inside() -> None:
    for length in range(1, 40):
        for window in range(1, length + 1):
            for stride in range(1, window + 1):
                starts = inference._starts(length, window, stride)
                assert starts[0] == 0 and starts[-1] == length - window
                assert all(0 < b - a <= stride for a, b in pairwise(starts))


def test_windows_come_in_batches() -> None:
    batches: list[int] = []

    def model(images: Tensor) -> Tensor:
        batches.append(len(images))
        return Tiny()(images)

    Predictor(window=(8, 8), stride=(8, 8), batch=4)(model, image(24, 24), (24, 24))
    assert batches == [4, 4, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": (8, 8), "stride": (9, 8)}, "8 x 8 pixels with a stride of 9 x 8 leave gaps"),
        ({"window": (8, 8), "stride": (0, 8)}, "choose a stride from 1"),
        ({"stride": (8, 8)}, "a stride is of sliding windows: give their size"),
        ({"scales": ()}, "positive numbers"),
        ({"scales": (1.0, 0.0)}, "positive numbers"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Predictor(**options)


# ------------------------------------------------------------------------------------------------------------
# Memory


class Peak(TorchDispatchMode):
    """The largest number of bytes that tensors made inside have at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for each in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(each, Tensor) and each.untyped_storage()._cdata not in self._known:
                storage = each.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                self._known.add(key)
                self.now += size
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._gone, key, size)
        return result

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


@pytest.mark.parametrize(
    ("options", "full_sizes"),
    [
        ({}, 0),
        ({"window": (96, 96), "stride": (64, 64)}, 0),
        ({"window": (96, 96), "stride": (64, 64), "scales": SCALES, "flip": True}, 1),
    ],
)
def test_at_most_one_sum_is_as_large_as_the_image(
    options: dict[str, Any], full_sizes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the windows' own logits, of a ninth of the pixels here, and some bands."""
    classes, height, width = 20, 192, 256
    full = 4 * classes * height * width
    monkeypatch.setattr(inference, "ELEMENTS", classes * 4 * width)
    model, picture = Tiny(classes), image(height, width).float()
    with Peak() as peak:
        Predictor(**options)(model, picture, (height, width))
    largest = max(options.get("scales", (1.0,))) ** 2
    overlap = 2.25 if "window" in options else 1
    windows = 2 * full * largest * overlap / 9  # a view's logits, and for a moment those of the next
    assert full_sizes * full < peak.most < full_sizes * full + windows + 0.4 * full
