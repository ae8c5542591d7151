"""Data sets on tiny fixtures, transforms operation by operation, loaders over workers and epochs."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import random
import re
import signal
import struct
import subprocess
import sys
import time
import zlib
from argparse import Namespace
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from sklearn.datasets import load_digits
from timm.data import auto_augment
from timm.data.random_erasing import RandomErasing
from torch.utils.data import Dataset, Subset, get_worker_info
from torchvision.datasets import CIFAR100

import datasets
import utils
from datasets import (
    ImageError,
    SeededDataset,
    WorkerDied,
    build_dataset,
    build_eval_loader,
    build_train_loader,
    build_transform,
    load_image,
    name_dead_workers,
    posterize,
)
from samplers import Draw
from utils import Signals, UserError

ROOT = Path(__file__).parents[1]
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def make_args(**changes):
    """The command line's defaults, on digits at 16 pixels, with small batches."""
    defaults = {
        "data_set": "DIGITS",
        "data_path": None,
        "inat_category": "name",
        "input_size": 16,
        "color_jitter": 0.4,
        "aa": "rand-m9-mstd0.5-inc1",
        "train_interpolation": "bicubic",
        "reprob": 0.25,
        "remode": "pixel",
        "recount": 1,
        "resplit": False,
        "repeated_aug": True,
        "batch_size": 8,
        "grad_accum_steps": 1,
        "num_workers": 0,
        "pin_mem": True,
        "dist_eval": False,
        "skip_bad_images": False,
        "seed": 0,
    }
    return Namespace(**(defaults | changes))


def no_augmentation(**changes):
    """Only the crop is random."""
    return make_args(**({"aa": "none", "color_jitter": 0.0, "reprob": 0.0} | changes))


def photo(seed=0, width=50, height=40):
    """A smooth random image, so that resampling is well behaved."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def save_photo(path, seed=0, **size):
    path.parent.mkdir(parents=True, exist_ok=True)
    photo(seed, **size).save(path)


def to_tensor(image):
    """PIL image to normalised [3, H, W], without torchvision."""
    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)
    return (pixels.permute(2, 0, 1) - MEAN) / STD


def to_pixels(tensor):
    """The inverse of `to_tensor`: uint8 [H, W, 3]."""
    return ((tensor * STD + MEAN) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


# ------------------------------------------------------------------------------------------------------------
# ImageFolder


@pytest.fixture
def image_folder(tmp_path):
    """Two classes; 3 training and 1 validation images of each."""
    for label, name in enumerate(["cat", "dog"]):
        for number in range(3):
            save_photo(tmp_path / "train" / name / f"{number}.png", seed=10 * label + number)
        save_photo(tmp_path / "val" / name / "0.png", seed=10 * label + 5)
    return tmp_path


def imnet(root, **changes):
    return no_augmentation(data_set="IMNET", data_path=str(root), **changes)


def test_image_folder(image_folder):
    train, classes = build_dataset(True, imnet(image_folder))
    val, val_classes = build_dataset(False, imnet(image_folder))
    assert (len(train), len(val), classes, val_classes) == (6, 2, 2, 2)
    assert [label for _, label in train] == [0, 0, 0, 1, 1, 1]
    image, label = val[1]
    assert image.shape == (3, 16, 16) and image.dtype == torch.float32
    expected = to_tensor(photo(15).resize((16, 16), Image.Resampling.BICUBIC))
    torch.testing.assert_close(image, expected)
    assert label == 1


def test_train_new_is_preferred(image_folder):
    for name in ("cat", "dog"):
        save_photo(image_folder / "train_new" / name / "0.png")
    train, _ = build_dataset(True, imnet(image_folder))
    assert [path.split("/")[-3] for path, _ in train.samples] == ["train_new", "train_new"]


def test_evaluation_needs_no_training_folder(image_folder):
    (image_folder / "train").rename(image_folder / "elsewhere")
    assert len(build_dataset(False, imnet(image_folder))[0]) == 2
    with pytest.raises(UserError, match=r"no folder .*/train; --data-path must hold train/ and val/"):
        build_dataset(True, imnet(image_folder))


@pytest.mark.parametrize("is_train", [True, False])
def test_splits_must_agree_on_the_classes(image_folder, is_train):
    save_photo(image_folder / "val" / "emu" / "0.png")
    with pytest.raises(UserError, match=r"same class folders, but 1 are in only one of them, for example 'emu'"):
        build_dataset(is_train, imnet(image_folder))


def test_folders_without_images(image_folder, tmp_path):
    (image_folder / "train" / "cat" / "notes.txt").write_text("no image")
    for image in (image_folder / "train" / "cat").glob("*.png"):
        image.unlink()
    message = r"class folder .*/train/cat holds no images \(\.jpg, .*\); add some, or remove .* train/ and val/$"
    with pytest.raises(UserError, match=message):
        build_dataset(True, imnet(image_folder))
    for split in ("train", "val"):
        (image_folder / split / "ant").mkdir()
    with pytest.raises(UserError, match=r"class folder .*/val/ant holds no images"):
        build_dataset(False, imnet(image_folder))
    with pytest.raises(UserError, match=r"class folder .*/train/ant \(and 1 more\) holds no images"):
        build_dataset(True, imnet(image_folder))
    (tmp_path / "empty" / "val").mkdir(parents=True)
    with pytest.raises(UserError, match=r"cannot use .*/val: Couldn't find any class folder"):
        build_dataset(False, imnet(tmp_path / "empty"))


# ------------------------------------------------------------------------------------------------------------
# CIFAR-100


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """torchvision's layout with 5 training and 2 test images, and the checksums of just these files."""
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    generator = np.random.default_rng(0)
    contents = {
        split: {
            "data": generator.integers(0, 256, (count, 3072), dtype=np.uint8),
            "fine_labels": list(range(90, 90 + count)),
        }
        for split, count in [("train", 5), ("test", 2)]
    }
    contents["meta"] = {"fine_label_names": [f"class{index}" for index in range(100)]}
    checksum = {}
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content))
        checksum[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    monkeypatch.setattr(CIFAR100, "train_list", [["train", checksum["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", checksum["test"]]])
    monkeypatch.setattr(CIFAR100, "meta", CIFAR100.meta | {"md5": checksum["meta"]})
    return tmp_path, contents


def test_cifar(cifar):
    root, contents = cifar
    args = no_augmentation(data_set="CIFAR", data_path=root, input_size=32)
    train, classes = build_dataset(True, args)
    val, _ = build_dataset(False, args)
    assert (len(train), len(val), classes) == (5, 2, 100)
    assert [label for _, label in train] == [90, 91, 92, 93, 94]
    pixels = contents["test"]["data"][1].reshape(3, 32, 32).transpose(1, 2, 0)
    np.testing.assert_array_equal(to_pixels(val[1][0]), pixels)


def test_cifar_missing_or_damaged(cifar, tmp_path):
    args = no_augmentation(data_set="CIFAR", data_path=cifar[0])
    (cifar[0] / "cifar-100-python" / "test").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"no intact CIFAR-100 in .*/cifar-100-python; unpack cifar-100-python"):
        build_dataset(True, args)
    (tmp_path / "empty").mkdir()
    args.data_path = str(tmp_path / "empty")
    with pytest.raises(UserError, match=r"no intact CIFAR-100 in .*empty/cifar-100-python"):
        build_dataset(False, args)


# ------------------------------------------------------------------------------------------------------------
# iNaturalist

TAXA = [  # identifiers are not positions
    {"id": 30, "name": "Vulpes", "genus": "Fox", "kingdom": "Animalia"},
    {"id": 10, "name": "Quercus", "genus": "Oak", "kingdom": "Plantae"},
    {"id": 20, "name": "Robur", "genus": "Oak", "kingdom": "Plantae"},
]


def inat_split(split, year, taxa_of_images):
    images = [
        {"id": 100 + index, "file_name": f"train_val{year}/Group{taxon}/{taxon}/{split}{index}.jpg"}
        for index, taxon in enumerate(taxa_of_images)
    ]
    annotations = [{"image_id": 100 + index, "category_id": taxon} for index, taxon in enumerate(taxa_of_images)]
    # listed backwards: labels follow the order of the annotations, not of the images
    return {"images": images[::-1], "annotations": annotations}


@pytest.fixture(params=[(2018, "listed"), (2018, "flattened"), (2019, "listed"), (2019, "flattened")], ids=str)
def inat(request, tmp_path):
    year, layout = request.param
    (tmp_path / "categories.json").write_text(json.dumps(TAXA))
    for split, taxa in [("train", [20, 30, 10, 30]), ("val", [30, 10])]:
        content = inat_split(split, year, taxa)
        (tmp_path / f"{split}{year}.json").write_text(json.dumps(content))
        for image in content["images"]:
            top, group, taxon, name = image["file_name"].split("/")
            middle = [group, taxon] if layout == "listed" else [taxon]
            save_photo(tmp_path.joinpath(top, *middle, name))
    return no_augmentation(
        data_set="INAT" if year == 2018 else "INAT19", data_path=str(tmp_path), inat_category="name"
    )


def test_inaturalist(inat):
    train, classes = build_dataset(True, inat)
    val, val_classes = build_dataset(False, inat)
    assert classes == val_classes == 3
    # training annotations name 20, 30, 10: labels 0, 1, 2
    assert [label for _, label in train] == [1, 2, 1, 0]
    assert [label for _, label in val] == [2, 1]
    assert train[0][0].shape == (3, 16, 16)
    assert [path.split("/")[-1] for path, _ in val.samples] == ["val1.jpg", "val0.jpg"]


def test_inaturalist_coarser_labels(inat):
    inat.inat_category = "genus"
    train, classes = build_dataset(True, inat)
    assert classes == 2
    assert [label for _, label in train] == [1, 0, 1, 0]


def test_inaturalist_unknown_category(inat):
    inat.inat_category = "phylum"
    with pytest.raises(UserError, match=r"--inat-category phylum is not in the data; use genus, kingdom, name$"):
        build_dataset(True, inat)


def test_inaturalist_without_images_or_files(inat, tmp_path):
    year = 2018 if inat.data_set == "INAT" else 2019
    (tmp_path / f"train_val{year}").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"neither .*/Group30/30/train3.jpg nor .*\d/30/train3.jpg exists"):
        build_dataset(True, inat)
    file = tmp_path / f"val{year}.json"
    file.write_text(json.dumps({"images": [], "annotations": []}))
    with pytest.raises(UserError, match="list no images"):
        build_dataset(False, inat)
    file.write_text(json.dumps({"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": []}))
    with pytest.raises(UserError, match=rf"are not iNaturalist {year}'s: KeyError\(1\)"):
        build_dataset(False, inat)
    file.write_text("{")
    with pytest.raises(UserError, match=rf"cannot read .*val{year}.json"):
        build_dataset(False, inat)
    file.unlink()
    with pytest.raises(UserError, match=rf"cannot read .*val{year}.json"):
        build_dataset(False, inat)


# ------------------------------------------------------------------------------------------------------------
# Digits, and names and paths


def test_digits_are_scikit_learns():
    digits = load_digits()
    args = no_augmentation(input_size=8)
    train, classes = build_dataset(True, args)
    val, _ = build_dataset(False, args)
    assert (len(train), len(val), classes) == (1437, 360, 10)
    assert [label for _, label in train] + [label for _, label in val] == digits.target.tolist()
    for index in (0, 123, 359):
        levels = to_pixels(val[index][0]) * (16 / 255)  # [8, 8, 3]
        np.testing.assert_array_equal(levels.round(), np.stack([digits.images[1437 + index]] * 3, axis=-1))


@pytest.mark.parametrize("size", [32, 48])
def test_digits_are_enlarged_to_the_input_size(size):
    val, _ = build_dataset(False, no_augmentation(input_size=size))
    image, _ = val.samples[0]
    assert (image.mode, image.size) == ("RGB", (size, size))
    assert val[0][0].shape == (3, size, size)


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match="pip install scikit-learn"):
        build_dataset(True, make_args())


def test_unknown_data_set():
    with pytest.raises(UserError, match=r"--data-set INET is not one of CIFAR, .* Did you mean IMNET"):
        build_dataset(True, make_args(data_set="INET"))


@pytest.mark.parametrize("name", ["CIFAR", "IMNET", "INAT", "INAT19"])
def test_data_path_is_needed(name, tmp_path):
    with pytest.raises(UserError, match=f"--data-set {name} needs --data-path"):
        build_dataset(True, make_args(data_set=name))
    with pytest.raises(UserError, match=r"--data-path .*nowhere is not a folder"):
        build_dataset(True, make_args(data_set=name, data_path=tmp_path / "nowhere"))


# ------------------------------------------------------------------------------------------------------------
# Transforms


def names(transform):
    return [type(operation).__name__ for operation in transform.transforms]


def test_training_operations_at_224():
    transform = build_transform(True, make_args(data_set="IMNET", input_size=224))
    crop, flip, augment, _, normalize, erase = transform.transforms
    assert names(transform) == [
        "RandomResizedCropAndInterpolation",
        "RandomHorizontalFlip",
        "RandAugment",  # and no colour jitter beside it
        "MaybeToTensor",
        "Normalize",
        "RandomErasing",
    ]
    assert crop.size == (224, 224) and crop.scale == (0.08, 1.0) and crop.ratio == (3 / 4, 4 / 3)
    assert crop.interpolation.value == "bicubic"
    assert flip.p == 0.5
    assert augment.num_layers == 2 and len(augment.ops) == 15
    assert all(op.magnitude == 9 and op.magnitude_std == 0.5 and op.prob == 0.5 for op in augment.ops)
    assert all(op.hparams["img_mean"] == (124, 116, 104) for op in augment.ops)
    torch.testing.assert_close(normalize.mean, MEAN.flatten())
    torch.testing.assert_close(normalize.std, STD.flatten())
    assert (erase.probability, erase.mode, erase.max_count) == (0.25, "pixel", 1)


def test_training_operations_on_small_images():
    transform = build_transform(True, make_args(data_set="CIFAR", input_size=32))
    assert names(transform)[:3] == ["Resize", "RandomCrop", "RandomHorizontalFlip"]
    crop = transform.transforms[1]
    assert (crop.size, crop.padding) == ((32, 32), 4)


@pytest.mark.parametrize("off", ["none", "None", "", None])
def test_augmentation_off_leaves_colour_jitter(off):
    transform = build_transform(True, make_args(data_set="IMNET", aa=off, reprob=0.0))
    assert "RandAugment" not in names(transform) and "RandomErasing" not in names(transform)
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
        assert transform(photo(seed)).isfinite().all()


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
    args = make_args(data_set="IMNET", input_size=40, aa="rand-m14-mmax14-p1-inc1", reprob=0.0)
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
        assert {auto_augment.NAME_TO_OP[name] for name in datasets.POSTERIZE_OPS} == {posterize}
    assert ImageOps.posterize is before
    assert auto_augment.posterize is not posterize


# ------------------------------------------------------------------------------------------------------------
# Loaders


class Numbered(Dataset):
    """`count` images of ones; the label is the index."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return torch.ones(3, 8, 8), index


@pytest.fixture(scope="module")
def digits():
    """Training and validation digits with the full augmentation."""
    return build_dataset(True, make_args())[0], build_dataset(False, make_args())[0]


def global_random_state():
    return random.getstate(), torch.random.get_rng_state().tolist(), np.random.get_state()[1].tolist()


def labels_of(loader):
    return [label for _, labels in loader for label in labels.tolist()]


def build_loaders(args, train_set, val_set, world_size, rank):
    """Both loaders of one process, as main.py builds them."""
    return (
        build_train_loader(args, train_set, world_size, rank),
        build_eval_loader(args, val_set, world_size, rank),
    )


def some_batches(loader, count=3):
    """The first images of an epoch: [count, B, 3, S, S]."""
    batches = iter(loader)
    return torch.stack([next(batches)[0] for _ in range(count)])


def test_batches(digits):
    train, val = build_loaders(make_args(), *digits, world_size=1, rank=0)
    images, labels = next(iter(train))
    assert images.shape == (8, 3, 16, 16) and images.dtype == torch.float32
    assert labels.shape == (8,) and labels.dtype == torch.int64
    assert len(train) == 1437 // 256 * 256 // 8
    assert [len(labels) for _, labels in val] == [12] * 30  # batches of 1.5 x 8


@pytest.mark.parametrize("repeated_aug", [True, False])
def test_training_drops_the_incomplete_batch(repeated_aug):
    args = make_args(repeated_aug=repeated_aug, batch_size=48)
    loaders = [build_loaders(args, Numbered(600), Numbered(5), 3, rank)[0] for rank in range(3)]
    # 512 / 3 and 600 / 3 samples for each process
    assert [len(loader) for loader in loaders] == [3 if repeated_aug else 4] * 3
    copies = Counter(label for loader in loaders for label in labels_of(loader))
    assert set(copies.values()) == ({3} if repeated_aug else {1})


@pytest.mark.parametrize("repeated_aug", [True, False])
def test_set_epoch_and_seed_change_the_order(repeated_aug):
    def order(epoch, seed=0):
        args = make_args(repeated_aug=repeated_aug, seed=seed)
        train, _ = build_loaders(args, Numbered(300), Numbered(5), 1, 0)
        train.sampler.set_epoch(epoch)
        return labels_of(train)

    assert order(0) == order(0)
    assert order(1) != order(0)
    assert order(0, seed=5) != order(0)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
def test_exact_evaluation(world_size):
    def seen(dist_eval):
        args = make_args(dist_eval=dist_eval)
        loaders = [build_loaders(args, Numbered(256), Numbered(61), world_size, r)[1] for r in range(world_size)]
        return [labels_of(loader) for loader in loaders]

    assert sorted(label for labels in seen(dist_eval=True) for label in labels) == list(range(61))
    assert seen(dist_eval=False) == [list(range(61))] * world_size


def test_processes_augment_differently(digits):
    args = make_args(num_workers=1)
    batches = [next(iter(build_loaders(args, *digits, 3, rank)[0])) for rank in range(3)]
    (first, labels), (second, second_labels), (third, third_labels) = batches
    # the three copies of each image stand at the same place of the three ranks' batches
    assert torch.equal(labels, second_labels) and torch.equal(labels, third_labels)
    assert not torch.equal(first, second) and not torch.equal(second, third)


def test_data_sets_can_be_sent_to_spawned_workers(digits):
    train, _ = build_loaders(make_args(resplit=True, skip_bad_images=True), *digits, 1, 0)
    copy = pickle.loads(pickle.dumps(train.dataset))
    draw = Draw(7, 5, (0, 0, 5))
    assert torch.equal(copy[draw][0], train.dataset[draw][0])
    assert copy[draw][1] == train.dataset[draw][1]


def test_workers_leave_the_global_random_state_alone(digits):
    train, val = build_loaders(make_args(num_workers=2), *digits, 1, 0)
    before = global_random_state()
    some_batches(train)
    some_batches(val)
    assert global_random_state() == before


@pytest.mark.parametrize("aa", ["rand-m9-mstd0.5-inc1", "augmix-m5"])
def test_samples_drawn_in_this_process_leave_its_random_state_alone(aa):
    args = make_args(aa=aa, resplit=True, reprob=1.0)
    train, val = build_loaders(args, *(build_dataset(half, args)[0] for half in (True, False)), 1, 0)
    random.gauss(0, 1), np.random.randn(), torch.randn(1)  # each keeps a second draw of the pair for later
    before = random.getstate(), str(np.random.get_state()), torch.random.get_rng_state().tolist()
    iter(train)
    some_batches(train)
    some_batches(val)
    assert (random.getstate(), str(np.random.get_state()), torch.random.get_rng_state().tolist()) == before


def test_a_sample_that_fails_leaves_the_random_state_alone():
    before = global_random_state()
    with pytest.raises(IndexError):
        SeededDataset(LabelledDraws(2))[Draw(2, 0, (0, 0, 0))]
    assert global_random_state() == before


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("batch_size", [8, 7])
def test_resplit_leaves_the_first_half_unerased(num_workers, batch_size):
    args = make_args(resplit=True, reprob=1.0, num_workers=num_workers, batch_size=batch_size)
    train, val = build_loaders(args, Numbered(256), Numbered(20), 1, 0)
    for images, labels in train:
        erased = (images != 1).flatten(1).any(dim=1)
        assert erased.tolist() == [index >= batch_size // 2 for index in range(batch_size)]
        assert labels.shape == (batch_size,)
    assert all((images == 1).all() for images, _ in val)


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
def test_resplit_is_random_erasing_of_the_second_half(mode):
    args = make_args(resplit=True, reprob=0.6, remode=mode, recount=3)
    train, _ = build_loaders(args, Numbered(256), Numbered(20), 1, 0)
    erase = RandomErasing(0.6, mode=mode, max_count=3, num_splits=2, device="cpu")  # timm's own, of a whole batch
    for images, _ in train:
        random.seed(0)
        torch.manual_seed(0)
        expected = erase(torch.ones(8, 3, 8, 8))
        random.seed(0)
        torch.manual_seed(0)
        again = torch.stack([train.dataset.second_half(torch.ones(3, 8, 8), position) for position in range(8)])
        assert torch.equal(again, expected)
        assert (images[:4] == 1).all()


def test_resplit_takes_erasing_out_of_the_transform():
    assert "RandomErasing" not in names(build_transform(True, make_args(resplit=True, reprob=1.0)))


def test_pinned_memory_only_with_cuda(monkeypatch):
    for available in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda answer=available: answer)
        for wanted in (False, True):
            loaders = build_loaders(make_args(pin_mem=wanted), Numbered(256), Numbered(5), 1, 0)
            assert [loader.pin_memory for loader in loaders] == [available and wanted] * 2


@pytest.mark.parametrize(
    ("changes", "train", "val", "message"),
    [
        ({}, 255, 5, "give --no-repeated-aug"),
        (
            {"repeated_aug": False, "batch_size": 31},
            60,
            5,
            r"each process sees 30 training images .* one batch of 31; give a smaller --batch-size$",
        ),
        ({"batch_size": 129}, 300, 5, "each process sees 128 training images"),
        (
            {"batch_size": 43, "grad_accum_steps": 3},
            300,
            5,
            r"128 training .* one batch of 43 times --grad-accum-steps 3; give a smaller --batch-size$",
        ),
        ({"repeated_aug": False}, 0, 5, "each process sees 0 training images"),
        ({}, 256, 0, "validation set has no images"),
    ],
    ids=str,
)
def test_loaders_that_cannot_work(changes, train, val, message):
    with pytest.raises(UserError, match=message):
        build_loaders(make_args(**changes), Numbered(train), Numbered(val), 2, 0)


# ------------------------------------------------------------------------------------------------------------
# Pixels depend on seed, epoch and position alone


class LabelledDraws(Dataset):
    """The image is what the three global generators give next: [3, 1, 1]; the label is the index."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index >= self.count:
            raise IndexError(index)
        drawn = [random.random(), np.random.random(), torch.rand((), dtype=torch.float64).item()]
        return torch.tensor(drawn, dtype=torch.float64).view(3, 1, 1), index


EVERYTHING = [
    {},
    {"repeated_aug": False},
    {"aa": "augmix-m5", "color_jitter": 0.0},
    {"aa": "none"},
    {"resplit": True, "reprob": 0.7, "recount": 2},
    {"resplit": True, "reprob": 0.7, "remode": "rand", "repeated_aug": False, "batch_size": 7},
]


def epoch_of(args, train_set, epoch=1, start=0, world_size=1, rank=0, batches=None):
    """Batches of one pass of a loader made anew."""
    loader = build_train_loader(args, train_set, world_size, rank)
    loader.sampler.set_epoch(epoch, start)
    iterator = iter(loader)
    return [batch for batch, _ in zip(iterator, range(batches or len(loader)), strict=False)]


def assert_same_batches(these, those):
    assert len(these) == len(those) > 0
    for (images, labels), (others, other_labels) in zip(these, those, strict=True):
        assert torch.equal(images, others) and torch.equal(labels, other_labels)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")  # more than there are cores
@pytest.mark.parametrize("changes", EVERYTHING, ids=str)
def test_batches_do_not_depend_on_the_number_of_workers(changes):
    args = make_args(**{"input_size": 40, "reprob": 0.5} | changes)
    train_set = Subset(build_dataset(True, args)[0], range(300))
    batches = []
    for num_workers in (0, 1, 3):
        args.num_workers = num_workers
        utils.seed_everything(num_workers)  # what the process drew before must not matter either
        batches.append(epoch_of(args, train_set, batches=8))
    assert_same_batches(batches[0], batches[1])
    assert_same_batches(batches[0], batches[2])
    assert len({image.numpy().tobytes() for images, _ in batches[0] for image in images}) == 8 * args.batch_size


@pytest.mark.parametrize("changes", EVERYTHING, ids=str)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_epoch_continued_in_the_middle_gives_the_same_batches(changes, num_workers):
    args = make_args(**{"input_size": 24, "reprob": 0.5, "batch_size": 16} | changes)
    train_set = Subset(build_dataset(True, args)[0], range(300))
    whole = epoch_of(args, train_set)
    args.num_workers = num_workers
    assert_same_batches(epoch_of(args, train_set, start=11 * args.batch_size), whole[11:])


@pytest.mark.parametrize("repeated_aug", [True, False])
def test_a_start_counts_for_one_pass_and_leaves_the_length_alone(repeated_aug):
    args = make_args(repeated_aug=repeated_aug, batch_size=24)
    loader = build_train_loader(args, LabelledDraws(300), 1, 0)
    assert len(loader) == (10 if repeated_aug else 12)
    loader.sampler.set_epoch(3, start=len(loader) * 24)
    assert list(loader) == []
    assert len(list(loader)) == len(loader)
    loader.sampler.set_epoch(3, start=48)
    assert len(loader) == (10 if repeated_aug else 12)
    assert len(list(loader)) == len(loader) - 2


def test_every_epoch_seed_process_and_copy_draws_its_own():
    """All three generators: no value of one turns up again in any other sample."""
    passes = [
        epoch_of(make_args(seed=seed), LabelledDraws(300), epoch, world_size=2, rank=rank)
        for seed, epoch, rank in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1), (1, 0, 0), (1, 0, 1)]
    ]
    drawn = torch.cat([images for batches in passes for images, _ in batches]).flatten(1)  # [samples, 3]
    assert drawn.shape == (6 * 128, 3)
    for generator in drawn.T:
        assert len(generator.unique()) == len(generator)
        assert 0.4 < generator.mean() < 0.6 and 0.25 < generator.std() < 0.33  # uniform, though from near seeds
        successive = torch.corrcoef(torch.stack([generator[:-1], generator[1:]]))[0, 1]
        assert successive.abs() < 0.15  # four standard deviations


def test_copies_of_an_image_in_one_process_are_augmented_differently(digits):
    images, labels = next(iter(build_train_loader(make_args(), digits[0], 1, 0)))
    assert labels[0] == labels[1] == labels[2]  # the copies stand in a row
    assert len({image.numpy().tobytes() for image in images[:3]}) == 3


def test_seeding_leaves_accelerators_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("the GPUs' streams were seeded"))
    SeededDataset(LabelledDraws(2))[Draw(1, 0, (0, 0, 0))]


# ------------------------------------------------------------------------------------------------------------
# Damaged images


@pytest.mark.parametrize("num_workers", [0, 2])
def test_damaged_image_is_named_in_one_line(image_folder, num_workers):
    path = image_folder / "val" / "dog" / "0.png"
    path.write_bytes(path.read_bytes()[:200])
    args = imnet(image_folder, num_workers=num_workers)
    val, _ = build_dataset(False, args)
    _, loader = build_loaders(args, Numbered(256), val, 1, 0)
    with pytest.raises(UserError) as caught:
        list(loader)
    message = str(caught.value)
    assert message.startswith(f"cannot decode image {path}: ")
    assert message.endswith("; repair or remove the file")
    assert "\n" not in message


def jpeg(**options):
    file = io.BytesIO()
    photo().save(file, "JPEG", quality=95, **options)
    return file.getvalue()


def png_claiming(width, height):
    """A PNG whose header promises a size, with next to no pixels behind it."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    )


def damaged_avif():
    """An AVIF that does not say where its pixels are."""
    Image.init()
    if "AVIF" not in Image.SAVE:
        return b"\0\0\0 ftypavif"  # a Pillow that cannot identify the whole one either
    file = io.BytesIO()
    photo().save(file, "AVIF")
    return file.getvalue().replace(b"iloc", b"none")


UNREADABLE = {
    "empty": (b"", "cannot identify image file"),
    "text": (b"This is no image.\n", "cannot identify image file"),
    "header only": (b"\x89PNG\r\n\x1a\n\0\0\0", "cannot identify|Truncated"),
    "truncated": (jpeg()[:-400], "truncated"),
    "enormous": (png_claiming(60_000, 50_000), r"3000000000 pixels\) exceeds limit"),
    "fewer pixels than promised": (png_claiming(60, 50), "truncated"),
    "damaged AVIF": (damaged_avif(), "Failed to decode|cannot identify"),
}


@pytest.mark.parametrize(("content", "reason"), UNREADABLE.values(), ids=UNREADABLE)
def test_files_that_cannot_be_decoded(tmp_path, content, reason):
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    with pytest.raises(
        ImageError, match=rf"^cannot decode image {path}: .*({reason}).*; repair or remove the file$"
    ):
        load_image(str(path))


@pytest.mark.parametrize(
    ("limit", "outcome"),
    [
        (
            999,
            pytest.raises(ImageError, match=r"a.png: .*2000 pixels\) exceeds limit of 1998 .*decompression bomb"),
        ),
        (1000, pytest.warns(Image.DecompressionBombWarning, match="exceeds limit of 1000")),  # Pillow's own
        (2000, nullcontext()),
    ],
    ids=str,
)
def test_enormous_images(tmp_path, monkeypatch, limit, outcome):
    """Up to Pillow's limit images are read, up to twice of it as well, with Pillow's warning."""
    photo().save(tmp_path / "a.png")  # 50 x 40
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with outcome:
        assert load_image(str(tmp_path / "a.png")).size == (50, 40)


def test_missing_file(tmp_path):
    with pytest.raises(ImageError, match=r"cannot decode image .*/b.png: .*No such file"):
        load_image(str(tmp_path / "b.png"))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_every_image_mode_becomes_rgb(tmp_path, mode):
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    photo().convert(mode).save(path)
    image = load_image(str(path))
    assert (image.mode, image.size) == ("RGB", (50, 40))


def test_cmyk_jpeg(tmp_path):
    photo().convert("CMYK").save(tmp_path / "a.jpg", quality=100, subsampling=0)
    error = np.asarray(load_image(str(tmp_path / "a.jpg"))).astype(int) - np.asarray(photo())
    assert np.abs(error).max() < 12


def test_sixteen_bit_grey(tmp_path):
    levels = np.linspace(0, 65535, 2000).astype(np.uint16).reshape(40, 50)
    for name, pixels in [("a.png", levels), ("little.tif", levels), ("big.tif", levels.astype(">u2"))]:
        Image.fromarray(pixels).save(tmp_path / name)
        loaded = np.asarray(load_image(str(tmp_path / name)))
        np.testing.assert_array_equal(loaded, np.stack([levels // 256] * 3, axis=-1))


@pytest.mark.parametrize("transparency", [3, bytes(range(256))], ids=["one entry", "all entries"])
def test_palette_with_transparency(tmp_path, transparency):
    image = photo().convert("P")
    image.save(tmp_path / "a.png", transparency=transparency)
    np.testing.assert_array_equal(np.asarray(load_image(str(tmp_path / "a.png"))), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("damaged", [False, True])
def test_exif_is_ignored(tmp_path, damaged):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    content = exif.tobytes()
    content = content[:14] + b"\xff" * 20 if damaged else content
    (tmp_path / "a.jpg").write_bytes(jpeg(exif=content))
    (tmp_path / "plain.jpg").write_bytes(jpeg())
    with pytest.warns(UserWarning, match="Corrupt EXIF data") if damaged else nullcontext():  # Pillow's own
        loaded = load_image(str(tmp_path / "a.jpg"))
    assert loaded.size == (50, 40)
    np.testing.assert_array_equal(np.asarray(loaded), np.asarray(load_image(str(tmp_path / "plain.jpg"))))


def test_files_are_read_by_content_not_name(tmp_path):
    photo().save(tmp_path / "a.jpg", "PNG")
    np.testing.assert_array_equal(np.asarray(load_image(str(tmp_path / "a.jpg"))), np.asarray(photo()))


# ------------------------------------------------------------------------------------------------------------
# --skip-bad-images


BAD = (0, 100, 299)


@pytest.fixture
def damaged_folder(tmp_path):
    """300 training images of one class, of which the BAD, the first and the last among them, are no images."""
    for number in range(300):
        save_photo(tmp_path / "train" / "a" / f"{number:03}.bmp", seed=number, width=8, height=8)
    for number in BAD:
        (tmp_path / "train" / "a" / f"{number:03}.bmp").write_bytes(b"damaged")
    return tmp_path


def indices_of(batches, root):
    """Which file each image is, by its pixels."""
    numbers = {}
    for path in (root / "train" / "a").iterdir():
        if path.stat().st_size > 10:
            numbers[np.asarray(Image.open(path)).tobytes()] = int(path.stem)
    images = torch.cat([images for images, _ in batches])
    return [numbers[to_pixels(image).tobytes()] for image in images]


def skipping(root, monkeypatch, **changes):
    """Arguments and training set of the damaged folder; the images come out as they are stored."""
    changes = {"input_size": 8, "repeated_aug": False, "batch_size": 10, "skip_bad_images": True} | changes
    args = imnet(root, **changes)
    monkeypatch.setattr(datasets, "build_transform", lambda is_train, args: build_transform(False, args))
    return args, build_dataset(True, args)[0]


def positions_of_bad_images(loader, epoch, start=0):
    """Where the epoch asks for images that cannot be read; the next pass begins at `start`."""
    loader.sampler.set_epoch(epoch, start)
    positions = [draw.position for draw in loader.sampler if draw.image in BAD]
    loader.sampler.set_epoch(epoch, start)
    return positions


@pytest.mark.parametrize("start", [0, 150])
@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_bad_images_are_replaced_by_the_next(damaged_folder, monkeypatch, capfd, num_workers, start):
    args, train_set = skipping(damaged_folder, monkeypatch, num_workers=num_workers)
    loader = build_train_loader(args, train_set, 1, 0)
    order = [draw.image for draw in loader.sampler][start:]
    bad = positions_of_bad_images(loader, 0, start)
    assert len(bad) == (3 if start == 0 else 2)
    next_readable = {0: 1, 100: 101, 299: 1}  # after 299 comes 0, which is bad as well
    assert indices_of(loader, damaged_folder) == [next_readable.get(index, index) for index in order]
    assert loader.dataset.replaced.nonzero()[:, 0].tolist() == bad
    list(loader)
    assert loader.dataset.replaced.shape == (300,) and loader.dataset.replaced.sum() == 3
    lines = capfd.readouterr().err.splitlines()
    # two workers may meet 0 at the same moment, on its own and after 299
    assert sorted({line.split()[4].split("/")[-1] for line in lines}) == ["000.bmp:", "100.bmp:", "299.bmp:"]
    assert len(lines) == 3 or num_workers == 2
    assert all(line.startswith("warning: cannot decode image ") for line in lines)


def test_all_copies_of_a_bad_image_are_replaced_and_counted(damaged_folder, monkeypatch):
    args, train_set = skipping(damaged_folder, monkeypatch, repeated_aug=True, num_workers=2, batch_size=2)
    loader = build_train_loader(args, train_set, 1, 0)
    seen = []
    for epoch in range(3):
        loader.dataset.replaced.zero_()
        bad = positions_of_bad_images(loader, epoch)
        list(loader)
        assert loader.dataset.replaced.nonzero()[:, 0].tolist() == bad
        seen += bad
    assert len(seen) >= 3


@pytest.mark.parametrize("repeated_aug", [True, False])
def test_replaced_images_are_augmented_alike_by_any_worker_and_from_any_start(damaged_folder, repeated_aug):
    changes = {"data_set": "IMNET", "data_path": damaged_folder, "input_size": 24, "reprob": 0.5, "batch_size": 16}
    args = make_args(**changes, skip_bad_images=True, repeated_aug=repeated_aug)
    train_set, _ = build_dataset(True, args)
    loader = build_train_loader(args, train_set, 1, 0)
    bad = positions_of_bad_images(loader, 3)
    assert bad[0] < 6 * 16 < bad[-1] < len(loader) * 16
    whole = list(loader)
    for num_workers in (0, 2):
        args.num_workers = num_workers
        assert_same_batches(epoch_of(args, train_set, epoch=3), whole)
        assert_same_batches(epoch_of(args, train_set, epoch=3, start=6 * 16), whole[6:])


def test_nothing_is_replaced_without_the_flag():
    assert build_train_loader(make_args(), Numbered(256), 1, 0).dataset.replaced.shape == (0,)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_too_many_bad_images_in_a_row(damaged_folder, monkeypatch, num_workers):
    """Nine in a row are replaced, ten are not."""
    for number in range(200, 209):
        (damaged_folder / "train" / "a" / f"{number}.bmp").write_bytes(b"damaged")
    args, train_set = skipping(damaged_folder, monkeypatch, num_workers=num_workers)
    list(build_train_loader(args, train_set, 1, 0))
    (damaged_folder / "train" / "a" / "209.bmp").write_bytes(b"damaged")
    message = r"^--skip-bad-images gives up after 10 bad images in a row: cannot decode image .*/209.bmp: [^\n]*$"
    with pytest.raises(ImageError, match=message):
        list(build_train_loader(args, train_set, 1, 0))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_bad_images_are_errors_unless_they_are_to_be_skipped(damaged_folder, monkeypatch, num_workers):
    args, train_set = skipping(damaged_folder, monkeypatch, skip_bad_images=False, num_workers=num_workers)
    with pytest.raises(ImageError, match=r"^cannot decode [^\n]*; repair or remove the file, or give --skip-bad-i"):
        list(build_train_loader(args, train_set, 1, 0))


def test_evaluation_never_skips(damaged_folder):
    (damaged_folder / "train").rename(damaged_folder / "val")
    args = imnet(damaged_folder, skip_bad_images=True)
    val, _ = build_dataset(False, args)
    with pytest.raises(ImageError, match=r"repair or remove the file$"):
        list(build_eval_loader(args, val, 1, 0))


# ------------------------------------------------------------------------------------------------------------
# Workers that die


class Deadly(Numbered):
    """Kills the worker that is asked for the last image."""

    def __init__(self, count, death):
        super().__init__(count)
        self.death = death

    def __getitem__(self, index):
        if index == self.count - 1:
            assert get_worker_info() is not None
            self.death()
        return super().__getitem__(index)


def kill_itself():
    os.kill(os.getpid(), signal.SIGKILL)


def exit_at_once():
    os._exit(3)


@pytest.mark.parametrize("pause", [0.0, 0.05], ids=["in the loader", "anywhere"])
@pytest.mark.parametrize("death", [kill_itself, exit_at_once])
def test_dead_workers_are_named(death, pause):
    loader = build_train_loader(make_args(num_workers=2, repeated_aug=False), Deadly(256, death), 1, 0)
    with pytest.raises(WorkerDied) as caught, name_dead_workers():
        for _ in loader:
            time.sleep(pause)
    message = str(caught.value)
    # torch's loader may find the worker gone before the signal is handled, and then knows no reason
    reason = "(is killed by signal: Killed|exited unexpectedly)"
    assert re.match(rf"a data loading worker died: {reason}[^\n]*$", message)
    assert "fewer --num_workers" in message and "/dev/shm" in message
    assert isinstance(caught.value, utils.LocalError)


@pytest.mark.parametrize(
    "error", [RuntimeError("out of memory"), ConnectionResetError(104, "reset by peer")], ids=repr
)
def test_other_errors_pass(monkeypatch, error):
    monkeypatch.setattr(datasets, "SIGNAL_SECONDS", 0.01)
    with pytest.raises(type(error)) as caught, name_dead_workers():
        raise error
    assert caught.value is error


def test_the_reason_may_be_the_cause_of_the_error():
    """The signal came while the loader waited."""
    first = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    with pytest.raises(WorkerDied, match=r"died: is killed by signal: Killed\. Often"), name_dead_workers():
        raise RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly") from first


def test_a_connection_that_breaks_before_the_death_is_known():
    def torch_reports(signum, frame):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    previous = signal.signal(signal.SIGALRM, torch_reports)
    try:
        with pytest.raises(WorkerDied, match=r"worker died: is killed by signal: Killed\."), name_dead_workers():
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            raise ConnectionResetError(104, "Connection reset by peer")
    finally:
        signal.signal(signal.SIGALRM, previous)


# ------------------------------------------------------------------------------------------------------------
# Signals that ask the run to stop


class Blocked(Numbered):
    """The label says whether this process blocks the signals."""

    def __getitem__(self, index):
        return torch.ones(3, 8, 8), set(Signals.NAMES) <= signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_only_workers_block_the_signals():
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert not before & set(Signals.NAMES)
    for num_workers in (0, 2):
        for loader in build_loaders(make_args(num_workers=num_workers), Blocked(256), Blocked(24), 1, 0):
            assert set(labels_of(loader)) == {num_workers > 0}
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


SIGNALLED = """
import os
import signal
import sys
import threading
from multiprocessing import resource_tracker


def signal_the_group():
    while not done.wait(0.01):
        os.killpg(0, signal.SIGTERM)


if __name__ == "__main__":
    from datasets import SteadyLoader
    from utils import Signals

    resource_tracker.ensure_running()  # some Pythons unblock SIGTERM when they start it
    loader = SteadyLoader(range(100), batch_size=10, num_workers=2, multiprocessing_context=sys.argv[1])
    done = threading.Event()
    with Signals() as signals:
        thread = threading.Thread(target=signal_the_group)
        thread.start()
        print(sum(len(batch) for batch in loader), "samples, signalled:", signals.received)
        done.set()
        thread.join()
    unfinished = iter(loader)
    next(unfinished)
    raise KeyError("a mistake")
"""


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_workers_outlast_signals_to_their_group_but_not_their_parent(tmp_path, method):
    """Signals come from the workers' start to their end; then the process ends in the middle of a pass."""
    script = tmp_path / "script.py"
    script.write_text(SIGNALLED)
    run = subprocess.Popen(
        [sys.executable, "-W", "ignore", str(script), method],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = run.communicate(timeout=120)  # until all processes that hold the pipes have ended
    finally:
        run.kill()
    assert output == "100 samples, signalled: True\n", errors
    assert run.returncode == 1 and errors.splitlines()[-1] == "KeyError: 'a mistake'"
    assert errors.count("Traceback") == 1
