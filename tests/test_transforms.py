"""Transforms operation by operation, against Pillow and timm."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pictures import make_args, names, no_augmentation, photo, to_pixels, to_tensor
from PIL import Image, ImageOps
from timm.data import auto_augment, create_transform
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation

from errors import UserError
from images import transforms
from images.decode import ImageError
from images.transforms import (
    Erasing,
    FastCrop,
    build_transform,
    check_sides,
    posterize,
    preprocessing,
    resized_pixels,
    to_bytes,
    to_image,
)
from options.flags import sides

# ------------------------------------------------------------------------------------------------------------
# Transforms


def test_training_operations_at_224():
    transform = build_transform(True, make_args(data_set="IMNET", input_size=224))
    crop, flip, augment, _ = transform.transforms
    assert names(transform) == [
        "RandomResizedCropAndInterpolation",
        "RandomHorizontalFlip",
        "RandAugment",  # and no colour jitter beside it
        "PILToTensor",  # normalising and erasing come on the device
    ]
    assert crop.size == (224, 224) and crop.scale == (0.08, 1.0) and crop.ratio == (3 / 4, 4 / 3)
    assert crop.interpolation.value == "bicubic"
    assert flip.p == 0.5
    assert augment.num_layers == 2 and len(augment.ops) == 15
    assert all(op.magnitude == 9 and op.magnitude_std == 0.5 and op.prob == 0.5 for op in augment.ops)
    assert all(op.hparams["img_mean"] == (124, 116, 104) for op in augment.ops)


def test_training_operations_on_small_images():
    transform = build_transform(True, make_args(data_set="CIFAR", input_size=32))
    assert names(transform)[:3] == ["Resize", "RandomCrop", "RandomHorizontalFlip"]
    crop = transform.transforms[1]
    assert (crop.size, crop.padding) == ((32, 32), 4)


@pytest.mark.parametrize("off", ["none", "None", "", None])
def test_augmentation_off_leaves_colour_jitter(off):
    transform = build_transform(True, make_args(data_set="IMNET", aa=off))
    assert "RandAugment" not in names(transform)
    (jitter,) = [each for each in transform.transforms if type(each).__name__ == "ColorJitter"]
    assert jitter.brightness == jitter.contrast == jitter.saturation == pytest.approx((0.6, 1.4))
    assert jitter.hue is None


@pytest.mark.parametrize("size", [16, 64])
def test_digits_are_never_mirrored(size):
    assert "RandomHorizontalFlip" not in names(build_transform(True, make_args(input_size=size)))


def test_small_crop_is_a_window_of_the_padded_image():
    transform = build_transform(True, no_augmentation(input_size=20))
    image = photo(width=20, height=20)
    padded = np.pad(np.asarray(image), ((4, 4), (4, 4), (0, 0)))
    windows = {padded[top : top + 20, left : left + 20].tobytes() for top in range(9) for left in range(9)}
    drawn = {to_pixels(transform(image)).tobytes() for _ in range(50)}
    assert len(drawn) > 10 and drawn <= windows


def test_training_takes_any_image_size_at_small_inputs():
    transform = build_transform(True, make_args(data_set="IMNET", input_size=32))
    for width, height in [(6, 9), (300, 20)]:
        assert transform(photo(width=width, height=height)).shape == (3, 32, 32)


@pytest.mark.parametrize("size", [48, 224])
def test_evaluation_at_large_inputs(size):
    image = photo(width=300, height=400)
    shorter = int(256 / 224 * size)
    longer = int(shorter * 400 / 300)
    resized = image.resize((shorter, longer), Image.Resampling.BICUBIC)
    left, top = round((shorter - size) / 2), round((longer - size) / 2)
    expected = to_tensor(resized.crop((left, top, left + size, top + size)))
    torch.testing.assert_close(build_transform(False, make_args(input_size=size))(image), expected)


def test_evaluation_leaves_small_images_of_the_right_size_alone():
    image = photo(width=32, height=32)
    torch.testing.assert_close(build_transform(False, make_args(input_size=32))(image), to_tensor(image))


def crop_at(size, **changes):
    return preprocessing(make_args(input_size=size, **changes))


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("size", [24, 64, [64, 96]], ids=str)
def test_grey_images(size, fast):
    """Evaluation begins with Pillow's grey, as timm's does; training, augmented in colours, ends with it."""
    image, args = photo(), make_args(input_size=size, in_chans=1, fast_resize=fast)
    given = to_bytes(image) if fast else image
    timms = create_transform(
        (1, *sides(size)), use_prefetcher=True, **(WHOLE if size == 24 else {"interpolation": "bicubic"})
    )
    expected = torch.as_tensor(np.asarray(timms(image.convert("L"))))
    found = build_transform(False, args)(given)
    assert found.shape == expected.shape == (1, *sides(size))
    assert (found.int() - expected.int()).abs().max() <= (2 if fast else 0)
    random.seed(3), torch.manual_seed(3), np.random.seed(3)
    coloured = build_transform(True, make_args(input_size=size, fast_resize=fast))(given)
    random.seed(3), torch.manual_seed(3), np.random.seed(3)
    grey = build_transform(True, args)(given)
    as_image = Image.fromarray(coloured.permute(1, 2, 0).numpy())
    assert torch.equal(grey[0], torch.from_numpy(np.array(as_image.convert("L"))))


WHOLE = {"crop_pct": 1.0, "crop_mode": "squash", "interpolation": "bicubic"}  # what small images go through
CROPS = [
    {},
    {"crop_pct": 0.9},
    {"crop_pct": 1.0, "crop_mode": "squash"},
    {"crop_pct": 0.95, "crop_mode": "squash", "interpolation": "bilinear"},
    {"crop_pct": 1.0, "crop_mode": "center", "interpolation": "lanczos"},
    {"crop_pct": 0.5, "interpolation": "nearest"},
]


@pytest.mark.parametrize("crop", CROPS, ids=str)
@pytest.mark.parametrize("size", [16, 64, 72, 224, [64, 96], [150, 70], [30, 12]], ids=str)
@pytest.mark.parametrize(("width", "height"), [(300, 400), (97, 61)])
def test_evaluation_is_timms(size, crop, width, height):
    """The same bytes as timm's transform with the same words; without words, DeiT's or all of a small image."""
    said = {"crop_pct": 224 / 256, "crop_mode": "center", "interpolation": "bicubic"}
    if np.max(size) <= 32:
        said |= {"crop_pct": 1.0, "crop_mode": "squash"}
    timms = create_transform((3, *sides(size)), use_prefetcher=True, **said | crop)
    image = photo(width=width, height=height)
    transformed = build_transform(False, make_args(input_size=size, **crop))(image)
    assert torch.equal(transformed, torch.as_tensor(np.asarray(timms(image))))
    assert crop_at(size, **crop)[2:] == tuple((said | crop).values())


@pytest.mark.parametrize("crop", [crop for crop in CROPS if "bi" in crop.get("interpolation", "bi")], ids=str)
def test_fast_evaluation_with_other_crops(crop):
    """torch's resizing is within one of Pillow's; the crop is the same."""
    image, args = photo(width=300, height=400), {"input_size": 64, **crop}
    exact = build_transform(False, make_args(**args))(image)
    fast = build_transform(False, make_args(**args, fast_resize=True))(to_bytes(image))
    assert (exact.int() - fast.int()).abs().max() <= 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"mean": [0.5, 0.5]},
            "--mean 0.5 0.5 cannot be used: it takes one number, or three, of red, green and blue",
        ),
        (
            {"std": [0.5, 0.5, 0.5], "in_chans": 1},
            "--std 0.5 0.5 0.5 cannot be used: it takes one number with --in-chans 1",
        ),
        ({"mean": [0.5, 0.5, float("nan")]}, "--mean 0.5 0.5 nan cannot be used"),
        ({"std": [1.0, 1.0, 1.0, 1.0]}, "--std 1 1 1 1 cannot be used"),
        ({"std": [0.5, 0.0, 0.5]}, "--std 0.5 0 0.5 has a deviation that is not positive"),
        ({"crop_mode": "border"}, "--crop-mode border cannot be used; use center, squash"),
        ({"interpolation": "random"}, "--interpolation random cannot be used; use nearest, bilinear"),
        (
            {"interpolation": "lanczos", "fast_resize": True},
            "lanczos cannot be used with --fast-resize; use bilinear",
        ),
    ],
)
def test_preprocessing_that_cannot_be_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        preprocessing(make_args(**changes))


THIN = [(1, 10_000), (10_000, 1), (1, 1), (1, 3), (3, 100_000), (100_000, 3)]


@pytest.mark.parametrize("is_train", [True, False])
@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("size", [16, 32, 64])
def test_thin_images(size, fast, is_train, monkeypatch):
    """Training crops even the thinnest; evaluation takes what `check_sides` lets pass."""
    transform = build_transform(is_train, no_augmentation(data_set="IMNET", input_size=size, fast_resize=fast))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000_000)
    refused = set()
    for width, height in THIN:
        try:
            check_sides(lambda: "a.png", width, height, (size, size), crop_at(size))
        except ImageError:
            refused.add((width, height))
        if is_train or (width, height) not in refused:
            image = Image.new("RGB", (width, height), (9, 9, 9))
            for _ in range(20 if is_train and size > 32 and width * height < 10_000 else 1):
                assert transform(to_bytes(image) if fast else image).shape == (3, size, size)
    long = {(1, 10_000), (10_000, 1), (3, 100_000), (100_000, 3)}
    assert refused == (long if size > 32 else set())


@pytest.mark.parametrize(("width", "height"), [(300, 400), (400, 300), (7, 5000), (5000, 7), (50, 50), (1, 999)])
@pytest.mark.parametrize("size", [64, 224, [64, 224], [100, 40]], ids=str)
@pytest.mark.parametrize("crop_pct", [None, 0.5, 1.0])
def test_resized_pixels_are_those_that_the_evaluation_makes(size, width, height, crop_pct):
    resize = build_transform(False, make_args(input_size=size, crop_pct=crop_pct)).transforms[0]
    made = resize(Image.new("L", (width, height)))
    assert resized_pixels(width, height, sides(size), crop_at(size, crop_pct=crop_pct)) == made.width * made.height


@pytest.mark.parametrize(
    ("width", "height", "size"), [(10_000, 1, 224), (1, 10_000, 384), (2, 89_000_000 // 2, 16), (1, 2_000_000, 64)]
)
def test_too_thin_images_are_refused(monkeypatch, width, height, size):
    message = rf"^cannot decode image a.png: it is too thin, {width} x {height}: .*; repair or remove the file$"
    with pytest.raises(ImageError, match=message):
        check_sides(lambda: "a.png", width, height, (size, size), crop_at(size))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # how Pillow's own limit is lifted
    check_sides(lambda: "a.png", width, height, (size, size), crop_at(size))


@pytest.mark.parametrize("size", [16, 32, 224, 384])
def test_ordinary_images_are_not_too_thin(size):
    for pair in [(500, 375), (1, 1), (20_000, 4000), (4000, 20_000), (3000, 100)]:
        check_sides(lambda: "a.png", *pair, (size, size), crop_at(size))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"aa": "rnd-m9"}, "--aa rnd-m9 is not an augmentation timm knows"),
        ({"aa": "rand-z9"}, "--aa rand-z9 is not"),
        ({"aa": "rand-m9.5"}, "--aa rand-m9.5 is not"),
        ({"aa": "augmix-q1"}, "--aa augmix-q1 is not"),
        ({"remode": "noise"}, "--remode noise cannot fill an erased box; use const, rand or pixel"),
        ({"remode": "noise", "reprob": 0.0}, "--remode noise"),
        ({"reprob": 1.5}, "--reprob 1.5 is not a probability"),
        ({"recount": 0}, "--recount 0 erases nothing"),
        ({"color_jitter": -0.1}, "--color-jitter -0.1 is negative"),
        ({"train_interpolation": "cubic"}, "--train-interpolation cubic cannot be used; use random, nearest"),
        ({"train_interpolation": "lanczos"}, "--train-interpolation lanczos cannot be used"),
    ],
    ids=str,
)
def test_flags_that_cannot_work(changes, message):
    with pytest.raises(UserError, match=message):
        build_transform(True, make_args(**changes))


@pytest.mark.parametrize("mode", ["random", "nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("policy", ["rand-m10-n15-mstd0.5-inc1", "augmix-m5", "originalr", "none"])
def test_policies_run_with_every_interpolation(policy, mode):
    args = make_args(data_set="IMNET", aa=policy, train_interpolation=mode, input_size=40)
    transform = build_transform(True, args)
    for seed in range(10):
        assert transform(photo(seed)).shape == (3, 40, 40)


def test_sharper_crops_without_augmentation():
    args = no_augmentation(data_set="IMNET", train_interpolation="lanczos", input_size=40)
    assert build_transform(True, args)(photo()).shape == (3, 40, 40)


# ------------------------------------------------------------------------------------------------------------
# Posterize, which Pillow 13 refuses at 0 bits


@pytest.mark.parametrize("bits", range(-2, 9))
def test_posterize_is_a_bit_mask(bits):
    mask = 0xFF & ~((1 << (8 - max(bits, 0))) - 1)
    np.testing.assert_array_equal(np.asarray(posterize(photo(), bits)), np.asarray(photo()) & mask)


def test_posterize_at_the_highest_magnitudes():
    args = make_args(data_set="IMNET", input_size=40, aa="rand-m14-mmax14-p1-inc1")
    for magnitude, bits in [(10, 0), (14, -1), (5, 2)]:
        (augment,) = [t for t in build_transform(True, args).transforms if type(t).__name__ == "RandAugment"]
        (operation,) = [op for op in augment.ops if op.name == "PosterizeIncreasing"]
        operation.magnitude = magnitude
        expected = ImageOps.posterize(photo(), bits) if bits > 0 else Image.new("RGB", photo().size)
        np.testing.assert_array_equal(np.asarray(operation(photo())), np.asarray(expected))


def test_posterize_guard_is_idempotent_and_leaves_pillow_alone():
    before = ImageOps.posterize
    for _ in range(2):
        build_transform(True, make_args())
        assert {auto_augment.NAME_TO_OP[name] for name in transforms.POSTERIZE_OPS} == {posterize}
    assert ImageOps.posterize is before
    assert auto_augment.posterize is not posterize


# ------------------------------------------------------------------------------------------------------------
# Random erasing: drawn here, done later


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
@pytest.mark.parametrize("count", [1, 3])
def test_boxes_are_timms_random_erasing(mode, count):
    """Same pixels, and all random streams end where they would."""
    whole, ours = RandomErasing(0.6, mode=mode, max_count=count, device="cpu"), Erasing(0.6, mode, count)
    erased = 0
    for seed in range(50):
        random.seed(seed), torch.manual_seed(seed)
        expected = whole(torch.ones(3, 20, 30))
        left = random.getstate(), torch.get_rng_state().tolist()
        random.seed(seed), torch.manual_seed(seed)
        image = torch.ones(3, 20, 30)
        for top, left_edge, noise in ours(image.shape, position=0):
            image[:, top : top + noise.shape[1], left_edge : left_edge + noise.shape[2]] = noise
        assert torch.equal(image, expected)
        assert (random.getstate(), torch.get_rng_state().tolist()) == left
        erased += not torch.equal(image, torch.ones(3, 20, 30))
    assert 15 < erased < 45


# ------------------------------------------------------------------------------------------------------------
# --fast-resize


def textured(seed=0, width=477, height=405):
    """Edges and noise at all scales."""
    generator = np.random.default_rng(seed)
    pixels = sum(
        np.asarray(
            Image.fromarray(generator.integers(0, 256, (size, size, 3), dtype=np.uint8)).resize((width, height))
        )
        * (1 / 6)
        for size in (4, 8, 16, 32, 64, 128)
    )
    return Image.fromarray(((pixels - 128) * 2.5 + 128).clip(0, 255).astype(np.uint8))


def difference(fast, exact):
    return (fast.int() - exact.int()).abs().float()


def test_bytes_and_back():
    image = photo()
    pixels = to_bytes(image)
    np.testing.assert_array_equal(pixels.permute(1, 2, 0).numpy(), np.asarray(image))
    for each in (pixels, pixels.contiguous()):
        np.testing.assert_array_equal(np.asarray(to_image(each)), np.asarray(image))


def resampled(pixels, size, mode="bicubic"):
    """--fast-resize's formula, as it is meant."""
    image = pixels[None].contiguous(memory_format=torch.channels_last)
    return F.interpolate(image, size=size, mode=mode, antialias=True)[0]


SHAPES = [(1, 1), (1, 9), (3, 2), (33, 31), (256, 256), (256, 300), (405, 477), (500, 333), (40, 900), (1100, 60)]


@pytest.mark.parametrize("shape", [*SHAPES, *((width, height) for height, width in SHAPES[5:])], ids=str)
def test_fast_resize_is_torchs_resampling_byte_for_byte(shape):
    """Also of tall, wide and tiny images: the shorter side to `side`, the longer rounded down; or a square."""
    height, width = shape
    pixels = to_bytes(textured(width=width, height=height))
    for size in (16, 32, 48, 224):
        resize, *_ = build_transform(False, make_args(input_size=size, fast_resize=True)).transforms
        side = size if size <= 32 else int(size * 256 / 224)
        longer = side if size <= 32 else int(side * max(shape) / min(shape))
        wanted = (side, longer) if height <= width else (longer, side)
        expected = pixels if wanted == shape else resampled(pixels, wanted)
        for each in (pixels, pixels.contiguous()):
            assert torch.equal(resize(each), expected)


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_fast_crop_is_torchs_resampling_byte_for_byte(mode):
    for seed, shape in enumerate(SHAPES[1:]):
        pixels, crop = to_bytes(textured(seed, *shape)), FastCrop(64, interpolation=mode)
        random.seed(seed)
        top, left, height, width = crop.get_params(pixels, crop.scale, crop.ratio)
        random.seed(seed)
        expected = resampled(pixels[:, top : top + height, left : left + width], (64, 64), mode)
        assert torch.equal(to_tensor(crop(pixels)), expected)


@pytest.mark.parametrize("mode", ["bicubic", "bilinear", "random"])
@pytest.mark.parametrize("size", [(477, 405), (60, 500), (40, 30)], ids=str)
def test_fast_crop_draws_as_timms_and_is_near(mode, size):
    image = textured(width=size[0], height=size[1])
    exact, fast = RandomResizedCropAndInterpolation(96, interpolation=mode), FastCrop(96, interpolation=mode)
    for seed in range(30):
        random.seed(seed)
        expected = to_tensor(exact(image))
        left = random.getstate()
        random.seed(seed)
        cropped = to_tensor(fast(to_bytes(image)))
        assert random.getstate() == left
        assert difference(cropped, expected).max() <= 16 and difference(cropped, expected).mean() < 0.1


@pytest.mark.parametrize("size", [17, 32, 48, 224])
@pytest.mark.parametrize("shape", [(300, 400), (401, 223), (32, 32), (17, 17), (50, 33)], ids=str)
def test_fast_evaluation_is_near(size, shape):
    image = textured(width=shape[0], height=shape[1])
    exact = build_transform(False, make_args(input_size=size))(image)
    fast = build_transform(False, make_args(input_size=size, fast_resize=True))(to_bytes(image))
    assert fast.shape == exact.shape == (3, size, size) and fast.dtype == torch.uint8
    assert difference(fast, exact).max() <= 16 and difference(fast, exact).mean() < 0.1


@pytest.mark.parametrize("size", [32, 96])
def test_fast_training_draws_as_the_exact_one(size):
    """The resize is another; flip and RandAugment get the same numbers, and the streams end where they would."""
    args = {"data_set": "IMNET", "input_size": size}
    exact, fast = (build_transform(True, make_args(**args, fast_resize=each)) for each in (False, True))
    assert names(exact)[2:] == names(fast)[-len(names(exact)) + 2 :]
    far = 0
    for seed in range(40):
        ends = []
        for transform, image in ((exact, photo(seed)), (fast, to_bytes(photo(seed)))):
            random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
            ends.append(
                (transform(image), random.getstate(), np.random.get_state()[2], torch.get_rng_state().tolist())
            )
        assert ends[0][1:] == ends[1][1:]
        far += difference(ends[0][0], ends[1][0]).mean() > 1  # operations with thresholds magnify a step
    assert far <= 3


def test_fast_resize_is_bilinear_or_bicubic():
    for mode in ("nearest", "lanczos"):
        with pytest.raises(
            UserError, match=f"--train-interpolation {mode} cannot be used; use random, bilinear, bi"
        ):
            build_transform(True, no_augmentation(train_interpolation=mode, fast_resize=True))
