"""Transforms operation by operation, against Pillow and timm."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pictures import make_args, names, no_augmentation, photo, to_pixels, to_tensor
from PIL import Image, ImageOps
from timm.data import auto_augment

import transforms
from transforms import build_transform, posterize
from utils import UserError

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
        ({"input_size": 0}, "--input-size 0 is not a size"),
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
