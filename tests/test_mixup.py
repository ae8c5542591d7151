"""Mixed images and soft labels, for images and for patches, against counted pixels and against timm's Mixup."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import reference
import timm.data.mixup as timm_mixup
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from errors import UserError
from mixing import MODES
from mixing.mixup import UNMIXED, Labels, Mix, Mixup

CLASSES = 7


@pytest.fixture
def global_numpy() -> Iterator[None]:
    """timm draws from numpy's global generator; put that back as it was."""
    state = np.random.get_state()
    yield
    np.random.set_state(state)


def make_batch(
    size: int = 4, height: int = 12, width: int = 12, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 3, height, width, generator=generator, dtype=torch.float64).to(dtype)
    return images, torch.randint(CLASSES, (size,), generator=generator)


def check_against_pixels(
    images: Tensor,
    targets: Tensor,
    mixes: list[Mix],
    mixed: Tensor,
    labels: Labels,
    patch_size: tuple[int, int] | None,
    smoothing: float,
    atol: float = 1e-12,
) -> None:
    """Images, image labels and patch labels of a mixed batch, by the naive mask of each image's own pixels."""
    size, _, height, width = images.shape
    each = mixes if len(mixes) == size else mixes * size
    for b, (weight, box) in enumerate(each):
        partner = size - 1 - b
        expected = reference.mixed_image(images[b], images[partner], weight, box)
        torch.testing.assert_close(mixed[b], expected, rtol=0, atol=atol)
        assert labels.own[b] == targets[b] and labels.partner[b] == targets[partner]
        own_share = reference.image_weight(height, width, weight, box)
        assert labels.weight[b].item() == pytest.approx(own_share, abs=atol)
        dense = reference.soft_label(int(targets[b]), int(targets[partner]), own_share, smoothing, CLASSES)
        assert labels.dense(CLASSES, torch.float64)[b].tolist() == pytest.approx(dense, abs=atol)
        if patch_size is not None:
            patch_weights = reference.patch_weights(height, width, patch_size, weight, box)
            assert labels.patch_weight[b].tolist() == pytest.approx(patch_weights, abs=atol)
    assert labels.smoothing == smoothing


# ------------------------------------------------------------------------------------------------------------
# Mixing as told


@st.composite
def told(draw: st.DrawFn) -> tuple[tuple[int, int, int], tuple[int, int] | None, list[Mix], float]:
    """A batch's size, a patch size (which need not divide the image), how to mix, and smoothing."""
    size, height, width = draw(st.sampled_from([2, 4])), draw(st.integers(3, 9)), draw(st.integers(3, 9))
    patch = draw(st.none() | st.tuples(st.integers(1, height), st.integers(1, width)))

    def mix() -> Mix:
        if draw(st.booleans()):
            return Mix(draw(st.sampled_from([0.0, 0.25, 0.7, 1.0])))
        top, bottom = sorted(draw(st.tuples(st.integers(0, height), st.integers(0, height))))
        left, right = sorted(draw(st.tuples(st.integers(0, width), st.integers(0, width))))
        return Mix(1 - (bottom - top) * (right - left) / (height * width), (top, bottom, left, right))

    mixes = [mix() for _ in range(draw(st.sampled_from([1, size])))]
    return (size, height, width), patch, mixes, draw(st.sampled_from([0.0, 0.1]))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(problem=told())
def test_mixing_as_told(
    problem: tuple[tuple[int, int, int], tuple[int, int] | None, list[Mix], float],
) -> None:
    shape, patch_size, mixes, smoothing = problem
    images, targets = make_batch(*shape)
    before = images.clone()
    mixed, labels = Mixup(smoothing=smoothing, patch_size=patch_size).mix(images, targets, mixes)
    check_against_pixels(images, targets, mixes, mixed, labels, patch_size, smoothing)
    assert torch.equal(images, before)  # the caller's images are not touched


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("height", "width", "patch_size"), [(12, 12, (4, 4)), (13, 10, (3, 4)), (7, 16, (7, 5))])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mixup_alpha": 0.0},
        {"cutmix_alpha": 0.0},
        {"prob": 0.5},
        {"cutmix_minmax": (0.2, 0.8), "switch_prob": 1.0},
        {"smoothing": 0.0},
    ],
    ids=str,
)
def test_mixing_as_drawn(
    mode: str, height: int, width: int, patch_size: tuple[int, int], options: dict[str, Any]
) -> None:
    """A call mixes as a twin with the same seed draws."""
    options = {"mode": mode, "patch_size": patch_size, **options}
    mixup, twin = Mixup(seed=3, **options), Mixup(seed=3, **options)
    for seed in range(4):
        images, targets = make_batch(4, height, width, seed)
        before = images.clone()
        mixed, labels = mixup(images, targets)
        mixes = twin.draw(4, height, width)
        check_against_pixels(images, targets, mixes, mixed, labels, patch_size, options.get("smoothing", 0.1))
        assert labels.mixed and torch.equal(images, before)


@pytest.mark.parametrize("mode", MODES)
def test_patch_weights_average_to_the_image_weight(mode: str) -> None:
    """Where patches tile the image, the patches' own pixels are the image's."""
    mixup = Mixup(mode=mode, patch_size=(4, 3), seed=1)
    for seed in range(10):
        _, labels = mixup(*make_batch(6, 12, 12, seed))
        torch.testing.assert_close(labels.patch_weight.mean(dim=1), labels.weight, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{"cutmix_alpha": 0.0}, {"mixup_alpha": 0.0}], ids=["mixup", "cutmix"])
def test_dtypes(mode: str, dtype: torch.dtype, options: dict[str, float]) -> None:
    """Images keep their dtype; image weights are float64, patch weights float32, or float64 as their images."""
    mixed, labels = Mixup(mode=mode, patch_size=(4, 4), seed=1, **options)(*make_batch(dtype=dtype))
    assert mixed.dtype == dtype
    assert labels.weight.dtype == torch.float64
    assert labels.patch_weight.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert labels.dense(CLASSES).dtype == torch.float32
    assert labels.dense(CLASSES, torch.float64).dtype == torch.float64


@pytest.mark.parametrize("mode", MODES)
def test_float32_is_the_float64_result_rounded(mode: str) -> None:
    images, targets = make_batch()
    wide = Mixup(mode=mode, patch_size=(4, 4), seed=5)
    narrow = Mixup(mode=mode, patch_size=(4, 4), seed=5)
    for _ in range(6):
        (expected, labels64), (mixed, labels32) = wide(images, targets), narrow(images.float(), targets)
        torch.testing.assert_close(mixed, expected.float(), rtol=1e-6, atol=1e-6)
        assert torch.equal(labels32.weight, labels64.weight)
        assert torch.equal(labels32.patch_weight, labels64.patch_weight.float())


def test_patches_of_a_224_pixel_image_at_16() -> None:
    """A box by hand: rows 8 to 40, columns 16 to 20."""
    images, targets = make_batch(2, 224, 224)
    box = (8, 40, 16, 20)
    _, labels = Mixup(patch_size=(16, 16)).mix(images, targets, [Mix(1 - 32 * 4 / 224**2, box)])
    weights = labels.patch_weight[0].view(14, 14)
    assert weights[0, 1] == weights[2, 1] == 1 - 8 * 4 / 256  # half a patch high
    assert weights[1, 1] == 1 - 16 * 4 / 256
    assert (weights == 1).sum() == 14 * 14 - 3


@pytest.mark.parametrize("patch_size", [(4, 4), (5, 3), None])
def test_labels_are_compact(patch_size: tuple[int, int] | None) -> None:
    """No [B, P, K]: two class indices per image, one weight per image and patch."""
    images, targets = make_batch(6, 12, 13)
    _, labels = Mixup(patch_size=patch_size, mode="elem")(images, targets)
    count = (12 // patch_size[0]) * (13 // patch_size[1]) if patch_size else 0
    shapes = {name: getattr(labels, name).shape for name in ("own", "partner", "weight", "patch_weight")}
    assert shapes == {"own": (6,), "partner": (6,), "weight": (6,), "patch_weight": (6, count)}
    assert sum(isinstance(part, Tensor) for part in labels) == 4
    assert labels.dense(CLASSES).shape == (6, CLASSES)


# ------------------------------------------------------------------------------------------------------------
# Draws


def draws(count: int = 400, height: int = 32, width: int = 48, **options: Any) -> list[Mix]:
    mixup = Mixup(seed=7, **options)
    return [mix for _ in range(count) for mix in mixup.draw(4, height, width)]


@pytest.mark.parametrize(
    ("options", "boxes"),
    [
        ({"mixup_alpha": 0.0}, 1.0),
        ({"cutmix_alpha": 0.0}, 0.0),
        ({"switch_prob": 0.0}, 0.0),
        ({"switch_prob": 1.0}, 1.0),
        ({"switch_prob": 0.0, "mixup_alpha": 0.0}, 1.0),  # nothing to switch to
        ({"switch_prob": 1.0, "cutmix_alpha": 0.0}, 0.0),
        ({"mixup_alpha": 0.0, "cutmix_alpha": 0.0, "cutmix_minmax": (0.2, 0.8)}, 1.0),
        ({"switch_prob": 0.0, "cutmix_minmax": (0.2, 0.8)}, 0.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("mode", MODES)
def test_mixup_or_cutmix_alone(options: dict[str, Any], boxes: float, mode: str) -> None:
    mixes = draws(50, mode=mode, **options)
    assert all((mix.box is not None) == bool(boxes) for mix in mixes)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("switch_prob", [0.2, 0.5])
def test_share_of_cutmix(mode: str, switch_prob: float) -> None:
    mixes = draws(mode=mode, switch_prob=switch_prob)
    independent = len(mixes) / 2 if mode == "pair" else len(mixes)
    share = sum(mix.box is not None for mix in mixes) / len(mixes)
    assert abs(share - switch_prob) < 4 * math.sqrt(switch_prob * (1 - switch_prob) / independent)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("prob", [0.2, 0.5])
def test_probability_of_mixing(mode: str, prob: float) -> None:
    """Per batch, per pair, per image. A Mixup weight of exactly 1 has probability 0."""
    mixes = draws(mode=mode, prob=prob, cutmix_alpha=0.0)
    independent = len(mixes) / 2 if mode == "pair" else len(mixes)
    share = sum(mix != UNMIXED for mix in mixes) / len(mixes)
    assert abs(share - prob) < 4 * math.sqrt(prob * (1 - prob) / independent)


@pytest.mark.parametrize("options", [{"prob": 0.0}, {"mixup_alpha": 0.0, "cutmix_alpha": 0.0}], ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [1, 3, 4])
def test_inactive_mixing_leaves_any_batch_as_it_is(size: int, mode: str, options: dict[str, float]) -> None:
    mixup = Mixup(mode=mode, patch_size=(4, 4), **options)
    images, targets = make_batch(size)
    mixed, labels = mixup(images, targets)
    assert not mixup.active and not labels.mixed
    assert torch.equal(mixed, images) and torch.equal(labels.own, targets)
    assert labels.weight.tolist() == [1.0] * size
    assert labels.patch_weight.tolist() == [[1.0] * 9] * size


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_that_happens_to_stay_unmixed_still_has_soft_labels(mode: str) -> None:
    mixup = Mixup(mode=mode, prob=1e-9, patch_size=(4, 4))
    images, targets = make_batch()
    mixed, labels = mixup(images, targets)
    assert labels.mixed and torch.equal(mixed, images)
    assert (labels.weight == 1).all() and (labels.patch_weight == 1).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [1, 5])
def test_an_odd_batch_is_refused_with_advice(size: int, mode: str) -> None:
    with pytest.raises(UserError, match=rf"batch of {size} images .* even --batch-size.*--mixup 0 --cutmix 0"):
        Mixup(mode=mode)(*make_batch(size))


@pytest.mark.parametrize("alpha", [0.2, 0.8, 2.0])
def test_mixup_weights_follow_the_beta_distribution(alpha: float) -> None:
    """Beta(a, a): mean 1/2, variance 1 / (4 (2 a + 1))."""
    weights = np.array([mix.weight for mix in draws(1500, mode="elem", mixup_alpha=alpha, cutmix_alpha=0.0)])
    variance = 1 / (4 * (2 * alpha + 1))
    assert weights.mean() == pytest.approx(0.5, abs=4 * math.sqrt(variance / len(weights)))
    assert weights.var() == pytest.approx(variance, rel=0.08)


@pytest.mark.parametrize("minmax", [None, (0.2, 0.8), (0.0, 1.0), (0.25, 0.3)])
def test_boxes(minmax: tuple[float, float] | None) -> None:
    """Inside the image, their weight is their true area, and their sides within the limits."""
    for weight, box in draws(height=32, width=48, mixup_alpha=0.0, cutmix_minmax=minmax):
        assert box is not None
        top, bottom, left, right = box
        assert 0 <= top <= bottom <= 32 and 0 <= left <= right <= 48
        assert weight == pytest.approx(1 - (bottom - top) * (right - left) / (32 * 48), abs=1e-15)
        if minmax is not None:
            assert int(32 * minmax[0]) <= bottom - top <= max(32 * minmax[1], int(32 * minmax[0]))
            assert int(48 * minmax[0]) <= right - left <= max(48 * minmax[1], int(48 * minmax[0]))


@pytest.mark.parametrize("minmax", [None, (0.2, 0.8), (0.5, 0.9)])
def test_boxes_reach_every_edge_of_the_image(minmax: tuple[float, float] | None) -> None:
    boxes = np.array([mix.box for mix in draws(1000, height=16, width=16, mixup_alpha=0.0, cutmix_minmax=minmax)])
    assert boxes.min(axis=0).tolist()[::2] == [0, 0]
    assert boxes.max(axis=0).tolist()[1::2] == [16, 16]


def test_partners_share_their_draw_in_pair_mode_alone() -> None:
    pair = Mixup(mode="pair", seed=2).draw(8, 32, 32)
    assert pair == pair[::-1] and len(set(pair)) == 4
    elem = Mixup(mode="elem", seed=2).draw(8, 32, 32)
    assert len(elem) == len(set(elem)) == 8
    assert len(Mixup(mode="batch", seed=2).draw(8, 32, 32)) == 1


def test_pair_mode_swaps_the_box() -> None:
    """What image i loses to its partner, the partner loses to it."""
    images, targets = make_batch(6)
    mixed, _ = Mixup(mode="pair", mixup_alpha=0.0, seed=4)(images, targets)
    torch.testing.assert_close(mixed + mixed.flip(0), images + images.flip(0))


def test_draws_are_its_own(global_numpy: None) -> None:
    """Equal seeds, equal draws, whatever the global generators do; and those are left alone."""
    first, second, other = Mixup(seed=1, mode="elem"), Mixup(seed=1, mode="elem"), Mixup(seed=2, mode="elem")
    batch = make_batch(dtype=torch.float32)
    numpy_state, torch_state = np.random.get_state(), torch.random.get_rng_state()
    mixed = [first(*batch)[0] for _ in range(5)]
    assert all(np.array_equal(a, b) for a, b in zip(numpy_state, np.random.get_state(), strict=True))
    assert torch.equal(torch_state, torch.random.get_rng_state())
    np.random.seed(0)
    torch.manual_seed(0)
    assert all(torch.equal(a, second(*batch)[0]) for a in mixed)
    assert not any(torch.equal(a, other(*batch)[0]) for a in mixed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "half"}, "--mixup-mode 'half': choose one of batch, pair, elem"),
        ({"prob": -0.1}, "--mixup-prob -0.1 is not between 0 and 1"),
        ({"prob": 1.1}, "--mixup-prob 1.1"),
        ({"prob": math.nan}, "--mixup-prob nan"),
        ({"switch_prob": 2}, "--mixup-switch-prob 2 is not between 0 and 1"),
        ({"smoothing": -1}, "--smoothing -1 must be at least 0 and less than 1"),
        ({"smoothing": 1.0}, "--smoothing 1.0 must be at least 0 and less than 1"),
        ({"mixup_alpha": -0.8}, "not negative; 0 switches them off"),
        ({"cutmix_alpha": -1.0}, "--mixup and --cutmix"),
        ({"mixup_alpha": math.nan}, "--mixup"),
        ({"cutmix_alpha": math.nan}, "--mixup and --cutmix"),
        ({"mixup_alpha": math.inf}, "--mixup"),
        ({"cutmix_minmax": (0.8, 0.2)}, r"--cutmix-minmax \(0.8, 0.2\): give two shares"),
        ({"cutmix_minmax": (0.5, 0.5)}, "--cutmix-minmax"),
        ({"cutmix_minmax": (-0.1, 0.5)}, "0 <= min < max <= 1"),
        ({"cutmix_minmax": (0.5, 1.5)}, "--cutmix-minmax"),
        ({"cutmix_minmax": (math.nan, 0.5)}, "--cutmix-minmax"),
    ],
)
def test_invalid_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Mixup(**options)


# ------------------------------------------------------------------------------------------------------------
# timm


@pytest.mark.parametrize("mode", MODES)
def test_dense_labels_are_timms(mode: str) -> None:
    mixup = Mixup(mode=mode, seed=6, smoothing=0.1)
    for seed in range(6):
        images, targets = make_batch(seed=seed, dtype=torch.float32)
        _, labels = mixup(images, targets)
        expected = timm_mixup.mixup_target(targets, CLASSES, labels.weight[:, None], 0.1)
        torch.testing.assert_close(labels.dense(CLASSES), expected.float(), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(labels.dense(CLASSES).sum(dim=1), torch.ones(4))


@pytest.mark.parametrize("prob", [0.5, 1.0])
@pytest.mark.parametrize(
    "alphas", [(0.8, 1.0), (0.8, 0.0), (0.0, 1.0)], ids=["mixup and cutmix", "mixup", "cutmix"]
)
def test_batch_mode_is_timms(prob: float, alphas: tuple[float, float], global_numpy: None) -> None:
    """From the same random numbers, the same images and labels, bit for bit.

    Except boxes with an odd side: DeiT's timm, and so the reference, rounds half of it down on both sides of
    the centre; today's timm rounds it up below and to the right.
    """
    compared = 0
    for seed in range(60):
        images, targets = make_batch(seed=seed, dtype=torch.float32)
        ours = Mixup(*alphas, prob=prob, seed=seed)
        theirs = timm_mixup.Mixup(*alphas, prob=prob, num_classes=CLASSES)
        if prob == 1:
            ours.random.rand()  # timm draws whether to mix even if it always does
        state = np.random.RandomState()
        state.set_state(ours.random.get_state())
        np.random.seed(seed)
        expected, dense = theirs(images.clone(), targets)
        mixed, labels = ours(images, targets)
        if odd_box(state, prob, alphas):
            continue
        compared += 1
        assert torch.equal(mixed, expected) and torch.equal(labels.dense(CLASSES), dense)
    assert compared >= 10


def odd_box(random: np.random.RandomState, prob: float, alphas: tuple[float, float]) -> bool:
    """Whether the next draw is a CutMix whose unclipped side is an odd number of the 12 pixels."""
    if prob < 1 and random.rand() >= prob:
        return False
    if not (alphas[1] > 0 and (alphas[0] == 0 or random.rand() < 0.5)):
        return False
    return int(12 * np.sqrt(1 - random.beta(alphas[1], alphas[1]))) % 2 == 1


def test_odd_boxes_round_down_as_in_the_reference() -> None:
    """A side of 2 h or 2 h + 1 pixels covers [centre - h, centre + h), clipped."""
    for seed in range(200):
        mixup, random = Mixup(0.0, 1.0, seed=seed), np.random.RandomState(seed)
        ((_, box),) = mixup.draw(2, 15, 22)
        side = np.sqrt(1 - random.beta(1.0, 1.0))
        row, column = random.randint(15), random.randint(22)
        expected = []
        for centre, length in ((row, 15), (column, 22)):
            half = int(length * side) // 2
            inside = [pixel for pixel in range(length) if centre - half <= pixel < centre + half]
            expected += [len(inside), inside[0] if inside else None]
        assert box is not None
        top, bottom, left, right = box
        assert bottom - top == expected[0] and right - left == expected[2]
        if expected[0] and expected[2]:
            assert (top, left) == (expected[1], expected[3])


def test_minmax_boxes_are_timms(global_numpy: None) -> None:
    """From the same random numbers, the same box: uniform over all places inside the image."""
    for seed in range(40):
        ours = Mixup(cutmix_minmax=(0.2, 0.8), mixup_alpha=0.0, seed=seed)
        np.random.seed(seed)
        np.random.beta(1.0, 1.0)  # a weight that the box's area replaces
        ((_, box),) = ours.draw(4, 24, 32)
        assert box == tuple(int(edge) for edge in timm_mixup.rand_bbox_minmax((3, 24, 32), (0.2, 0.8)))


@pytest.mark.parametrize("mode", ["pair", "elem"])
def test_mixing_is_timms_when_told_the_same(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    size, half = 6, 3
    for seed in range(10):
        images, targets = make_batch(size, seed=seed)
        mixes = Mixup(mode=mode, seed=seed).draw(size, 12, 12)
        drawn = mixes[:half] if mode == "pair" else mixes
        told = iter([mix for mix in drawn if mix.box is not None and mix.weight != 1])
        weights, is_box = np.array([m.weight for m in drawn]), np.array([m.box is not None for m in drawn])

        def params(self: Any, count: int, answer: tuple[Any, Any] = (weights, is_box)) -> tuple[Any, Any]:
            assert count == len(answer[0])
            return answer

        def box_and_weight(*_: Any, told: Iterator[Mix] = told, **__: Any) -> tuple[Any, float]:
            weight, box = next(told)
            return box, weight

        monkeypatch.setattr(timm_mixup.Mixup, "_params_per_elem", params)
        monkeypatch.setattr(timm_mixup, "cutmix_bbox_and_lam", box_and_weight)
        theirs = timm_mixup.Mixup(0.8, 1.0, mode=mode, num_classes=CLASSES)
        expected, dense = theirs(images.clone(), targets)
        mixed, labels = Mixup(mode=mode).mix(images, targets, mixes)
        torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(labels.dense(CLASSES, torch.float64), dense, rtol=1e-6, atol=1e-7)
