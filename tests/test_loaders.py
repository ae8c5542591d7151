"""Loaders over workers, epochs and restarts: which samples, which pixels, and what happens when things break."""

from __future__ import annotations

import gc
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import forks
import numpy as np
import pytest
import torch
from pictures import imnet, make_args, save_photo, to_pixels
from PIL import Image
from processes import PATIENCE
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from timm.data.random_erasing import RandomErasing
from torch.utils.data import get_worker_info
from torchvision import transforms

import datasets
import loaders
import utils
import workers
from datasets import build_dataset
from errors import UserError
from images.decode import ImageError
from images.transforms import Box, build_transform
from loaders import DeviceLoader, SeededDataset, build_eval_loader, build_train_loader, collate, erase, normalise
from program import STOPPING
from samplers import Draw
from utils import seed_generators
from workers import WorkerDied, default_workers, name_dead_workers

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
BYTE = 7  # of all pixels of a Numbered image


# ------------------------------------------------------------------------------------------------------------
# Loaders


class Numbered:
    """`count` images, all bytes the same; the label is the index."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def decode(self, index):
        return torch.full((3, 8, 8), BYTE, dtype=torch.uint8), index

    def transform(self, image):
        return image

    def example(self, decoded, label):
        return self.transform(decoded), label

    def __getitem__(self, index):
        image, label = self.decode(index)
        return self.transform(image), label, []


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
        build_train_loader(args, train_set, world_size, rank, CPU),
        build_eval_loader(args, val_set, world_size, rank, CPU),
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
        train.set_epoch(epoch)
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
    copy = pickle.loads(pickle.dumps(train.loader.dataset))
    draw = Draw(7, 5, 5, (0, 0, 5))
    assert torch.equal(copy[draw][0], train.loader.dataset[draw][0])
    assert copy[draw][1] == train.loader.dataset[draw][1]


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
        SeededDataset(LabelledDraws(2))[Draw(2, 0, 0, (0, 0, 0))]
    assert global_random_state() == before


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("batch_size", [8, 7])
def test_resplit_leaves_the_first_half_unerased(num_workers, batch_size):
    args = make_args(resplit=True, reprob=1.0, num_workers=num_workers, batch_size=batch_size)
    train, val = build_loaders(args, Numbered(256), Numbered(20), 1, 0)
    plain = normalise(torch.full((3, 8, 8), BYTE, dtype=torch.uint8))
    for images, labels in train:
        erased = (images != plain).flatten(1).any(dim=1)
        assert erased.tolist() == [index >= batch_size // 2 for index in range(batch_size)]
        assert labels.shape == (batch_size,)
    assert all((images == plain).all() for images, _ in val)


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
def test_resplit_is_random_erasing_of_the_second_half(mode):
    args = make_args(resplit=True, reprob=0.6, remode=mode, recount=3)
    train, _ = build_loaders(args, Numbered(256), Numbered(20), 1, 0)
    whole = RandomErasing(0.6, mode=mode, max_count=3, num_splits=2, device="cpu")  # timm's own, of a batch
    for seed in range(20):
        random.seed(seed)
        torch.manual_seed(seed)
        expected = whole(torch.ones(8, 3, 9, 9))
        random.seed(seed)
        torch.manual_seed(seed)
        boxes = [train.loader.dataset.erase((3, 9, 9), position) for position in range(8)]
        batch = collate([(torch.zeros(3, 9, 9), 0, drawn) for drawn in boxes])
        images = torch.ones(8, 3, 9, 9)
        erase(images, batch.boxes, batch.noise)
        assert torch.equal(images, expected)


def test_pinned_memory_only_for_cuda(monkeypatch):
    def init(self, loader, device, exchange=None, colours=None):
        self.loader = loader

    monkeypatch.setattr(DeviceLoader, "__init__", init)  # there may be no such device
    for device in ("cpu", "cuda", "mps"):
        for wanted in (False, True):
            args = make_args(pin_mem=wanted)
            train = build_train_loader(args, Numbered(256), 1, 0, torch.device(device))
            val = build_eval_loader(args, Numbered(5), 1, 0, torch.device(device))
            assert [train.loader.pin_memory, val.loader.pin_memory] == [device == "cuda" and wanted] * 2


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


class LabelledDraws(Numbered):
    """The image is what the three global generators give next: float64 [3, 1, 1]; the label is the index."""

    def decode(self, index):
        if index >= self.count:
            raise IndexError(index)
        return None, index

    def transform(self, image):
        drawn = [random.random(), np.random.random(), torch.rand((), dtype=torch.float64).item()]
        return torch.tensor(drawn, dtype=torch.float64).view(3, 1, 1)


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
    loader = build_train_loader(args, train_set, world_size, rank, CPU)
    loader.set_epoch(epoch, start)
    return list(islice(loader, batches))


def first_digits(args, count=300):
    train_set, _ = build_dataset(True, args)
    train_set.samples = train_set.samples[:count]
    return train_set


def assert_same_batches(these, those):
    assert len(these) == len(those) > 0
    for (images, labels), (others, other_labels) in zip(these, those, strict=True):
        assert torch.equal(images, others) and torch.equal(labels, other_labels)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")  # more than there are cores
@pytest.mark.parametrize("changes", EVERYTHING, ids=str)
def test_batches_do_not_depend_on_the_number_of_workers(changes):
    args = make_args(**{"input_size": 40, "reprob": 0.5} | changes)
    train_set = first_digits(args)
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
    train_set = first_digits(args)
    whole = epoch_of(args, train_set)
    args.num_workers = num_workers
    assert_same_batches(epoch_of(args, train_set, start=11 * args.batch_size), whole[11:])


@pytest.mark.parametrize("repeated_aug", [True, False])
def test_a_start_counts_for_one_pass_and_leaves_the_length_alone(repeated_aug):
    args = make_args(repeated_aug=repeated_aug, batch_size=24)
    loader = build_train_loader(args, LabelledDraws(300), 1, 0, CPU)
    assert len(loader) == (10 if repeated_aug else 12)
    loader.set_epoch(3, start=len(loader) * 24)
    assert list(loader) == []
    assert len(list(loader)) == len(loader)
    loader.set_epoch(3, start=48)
    assert len(loader) == (10 if repeated_aug else 12)
    assert len(list(loader)) == len(loader) - 2


def test_every_epoch_seed_process_and_copy_draws_its_own():
    """All three generators: no value of one turns up again in any other sample."""
    drawn = []
    for seed, epoch, rank in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1), (1, 0, 0), (1, 0, 1)]:
        loader = build_train_loader(make_args(seed=seed), LabelledDraws(300), 2, rank, CPU)
        loader.set_epoch(epoch)
        drawn += [batch.images for batch in loader.loader]
    drawn = torch.cat(drawn).flatten(1)  # [samples, 3]
    assert drawn.shape == (6 * 128, 3)
    for generator in drawn.T:
        assert len(generator.unique()) == len(generator)
        assert 0.4 < generator.mean() < 0.6 and 0.25 < generator.std() < 0.33  # uniform, though from near seeds
        successive = torch.corrcoef(torch.stack([generator[:-1], generator[1:]]))[0, 1]
        assert successive.abs() < 0.15  # four standard deviations


def test_copies_of_an_image_in_one_process_are_augmented_differently(digits):
    images, labels = next(iter(build_train_loader(make_args(), digits[0], 1, 0, CPU)))
    assert labels[0] == labels[1] == labels[2]  # the copies stand in a row
    assert len({image.numpy().tobytes() for image in images[:3]}) == 3


def test_seeding_leaves_accelerators_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("the GPUs' streams were seeded"))
    SeededDataset(LabelledDraws(2))[Draw(1, 0, 0, (0, 0, 0))]


# ------------------------------------------------------------------------------------------------------------
# The reference's pipeline, pixel for pixel


def reference_transform(args):
    """timm's transform as DeiT uses it: normalised and erased, image by image; `--resplit` is not in it."""
    whole = create_transform(
        args.input_size,
        is_training=True,
        hflip=0.0 if args.data_set == "DIGITS" else 0.5,
        color_jitter=args.color_jitter,
        auto_augment=None if args.aa == "none" else args.aa,
        interpolation=args.train_interpolation,
        re_prob=args.reprob,
        re_mode=args.remode,
        re_count=args.recount,
    )
    if args.input_size <= 32:
        to_size = transforms.Resize((args.input_size, args.input_size), transforms.InterpolationMode.BICUBIC)
        whole.transforms[:1] = [to_size, transforms.RandomCrop(args.input_size, padding=4)]
    return whole


def reference_sample(image, transform, draw):
    """(bytes [3, S, S] before normalising, float32 [3, S, S] at the end), decoded for this sample alone."""
    to_float = next(i for i, step in enumerate(transform.transforms) if "ToTensor" in type(step).__name__)
    for steps in (transform.transforms[:to_float], transform.transforms):
        seed_generators(draw.entropy)
        result = image.convert("RGB")
        for step in steps:
            result = step(result)
        yield transforms.functional.pil_to_tensor(result) if isinstance(result, Image.Image) else result


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """260 JPEGs of different shapes in two classes."""
    root = tmp_path_factory.mktemp("photos")
    for number in range(260):
        save_photo(
            root / "train" / "ab"[number % 2] / f"{number:03}.jpg",
            number,
            width=60 + number % 50,
            height=90 - number % 40,
        )
    return root


REFERENCE = [
    {"input_size": 224, "batch_size": 32},
    {"input_size": 64, "aa": "none"},
    {"input_size": 64, "aa": "augmix-m5", "remode": "rand", "recount": 3, "reprob": 0.8},
    {"input_size": 64, "train_interpolation": "random", "remode": "const", "reprob": 1.0},
    {"input_size": 64, "repeated_aug": False, "seed": 5, "num_workers": 2},
    {"input_size": 32, "reprob": 0.6},
]


@pytest.mark.parametrize("changes", REFERENCE, ids=str)
def test_pixels_are_the_reference_pipelines(photos, changes):
    args = make_args(data_set="IMNET", data_path=photos, **{"batch_size": 24} | changes)
    train_set, _ = build_dataset(True, args)
    loader = build_train_loader(args, train_set, 1, 0, CPU)
    loader.set_epoch(2)
    draws, transform, erased = iter(list(loader.loader.sampler)), reference_transform(args), 0
    for (batch, (images, labels)), _ in zip(zip(loader.loader, loader, strict=True), range(3), strict=False):
        assert batch.images.dtype == torch.uint8 and images.dtype == torch.float32
        for pixels, image, label in zip(batch.images, images, labels, strict=True):
            draw = next(draws)
            path, expected_label = train_set.samples[draw.image]
            with Image.open(path) as file:
                before, after = reference_sample(file, transform, draw)
            assert torch.equal(pixels, before) and label == expected_label
            assert (image - after).abs().max() <= 1e-6
            erased += not torch.equal(normalise(before), after)
    assert erased > 0 or args.reprob == 0


def test_evaluation_pixels_are_the_reference_pipelines(photos):
    (photos / "val").symlink_to(photos / "train")
    args = make_args(data_set="IMNET", data_path=photos, input_size=64)
    val_set, _ = build_dataset(False, args)
    steps = [transforms.Resize(73, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(64)]
    steps += [transforms.ToTensor(), transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)]
    images = torch.cat([images for images, _ in build_eval_loader(args, val_set, 1, 0, CPU)])
    for (path, _), image in zip(val_set.samples, images, strict=True):
        assert torch.equal(image, transforms.Compose(steps)(datasets.load_image(path)))


# ------------------------------------------------------------------------------------------------------------
# One decode for copies in a row


class Counted(Numbered):
    """Counts how often each image is decoded."""

    def __init__(self, count):
        super().__init__(count)
        self.decoded = []

    def decode(self, index):
        self.decoded.append(index)
        return super().decode(index)


@pytest.mark.parametrize(("repeated_aug", "decodes"), [(True, 8 + 8 + 8), (False, 3 * 24)])
def test_copies_in_a_row_are_decoded_once(repeated_aug, decodes):
    images = Counted(300)
    epoch_of(make_args(repeated_aug=repeated_aug, batch_size=24), images, batches=3)
    assert len(images.decoded) == decodes and len(set(images.decoded)) == decodes


@pytest.mark.parametrize("changes", [*EVERYTHING, {"fast_resize": True}], ids=str)
def test_decoding_once_changes_no_pixel(photos, changes):
    """A batch at a time, against a sample at a time."""
    args = make_args(data_set="IMNET", data_path=photos, **{"input_size": 48, "reprob": 0.5} | changes)
    samples = build_train_loader(args, build_dataset(True, args)[0], 1, 0, CPU).loader
    draws = list(samples.sampler)[:12]
    together = samples.dataset.__getitems__(draws)
    for draw, (image, label, boxes) in zip(draws, together, strict=True):
        alone = samples.dataset[draw]
        assert torch.equal(alone[0], image) and alone[1] == label and len(alone[2]) == len(boxes)
        assert all(torch.equal(one.noise, other.noise) for one, other in zip(alone[2], boxes, strict=True))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_grouped_epoch_continued_in_the_middle_gives_the_same_batches(num_workers):
    args = make_args(group_repeats=True, batch_size=16, reprob=0.5)
    train_set = first_digits(args, 800)
    for rank in range(3):
        args.num_workers = 0
        whole = epoch_of(args, train_set, world_size=3, rank=rank)
        args.num_workers = num_workers
        assert_same_batches(epoch_of(args, train_set, start=7 * 16, world_size=3, rank=rank), whole[7:])


# ------------------------------------------------------------------------------------------------------------
# Several processes


def test_grouping_changes_no_global_batch_of_real_processes(tmp_path):
    """1, 2, 4 and 8 processes gather every batch: the same pixels and labels, however they are placed."""
    run = forks.run(1, "tests/grouped_batches.py", str(tmp_path / "store"), env=os.environ)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.split() == ["1", "2", "4", "8"]


def test_exchanged_samples_are_those_of_the_reference_in_its_order(tmp_path):
    """2, 3 and 4 processes, each with its own loader and with an exchange: every batch is equal bit for bit."""
    for label in ("a", "b"):
        for number in range(160):
            save_photo(tmp_path / "train" / label / f"{number:03}.bmp", seed=number, width=8, height=8)
        for number in (3, 4, 90):
            (tmp_path / "train" / label / f"{number:03}.bmp").write_bytes(b"damaged")
    run = forks.run(1, "tests/exchanged_batches.py", str(tmp_path / "store"), str(tmp_path), env=os.environ)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.split() == ["2", "3", "4"]


# ------------------------------------------------------------------------------------------------------------
# Batches on the device


def examples(count=5, size=6):
    """Random images, of which every other is erased twice, once over the other box."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, size, size, 3), generator=generator, dtype=torch.uint8).permute(0, 3, 1, 2)
    boxes = [
        Box(0, 1, torch.randn(3, 2, 4, generator=generator)),
        Box(1, 2, torch.randn(3, 3, 1, generator=generator)),
    ]
    return [(image, number, boxes if number % 2 else []) for number, image in enumerate(images)]


def erased_one_by_one(samples):
    images = torch.stack([normalise(image) for image, _, _ in samples])
    for image, (_, _, boxes) in zip(images, samples, strict=True):
        for top, left, noise in boxes:
            for row in range(noise.shape[1]):
                for column in range(noise.shape[2]):
                    image[:, top + row, left + column] = noise[:, row, column]
    return images


def test_a_batch_is_a_few_flat_tensors():
    batch = collate(examples())
    assert [tensor.dtype for tensor in batch] == [torch.uint8, torch.int64, torch.int64, torch.float32]
    assert batch.images.shape == (5, 3, 6, 6) and batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.labels.tolist() == [0, 1, 2, 3, 4]
    assert batch.boxes.tolist() == [[n, *box] for n in (1, 3) for box in ([0, 1, 2, 4], [1, 2, 3, 1])]
    assert batch.noise.shape == (2 * 3 * (2 * 4 + 3 * 1),)
    untouched = collate(examples()[:1])
    assert untouched.boxes.shape == (0, 5) and untouched.noise.shape == (0,)


def test_normalised_bytes_are_torchvisions():
    image = torch.arange(256, dtype=torch.uint8).view(16, 16, 1).expand(16, 16, 3).numpy()
    expected = transforms.functional.to_tensor(image)
    transforms.functional.normalize(expected, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, inplace=True)
    pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)
    assert torch.equal(normalise(pixels), expected) and normalise(pixels).is_contiguous()


def test_images_on_the_device_are_normalised_and_erased():
    loader = DeviceLoader([collate(examples()), collate(examples(3))], CPU)
    batches = list(loader)
    assert len(loader) == len(batches) == 2
    for (images, labels), count in zip(batches, (5, 3), strict=True):
        assert torch.equal(images, erased_one_by_one(examples(count))) and images.is_contiguous()
        assert labels.tolist() == list(range(count))


class FakeStream:
    """Stands for a CUDA stream: notes what is asked of it."""

    def __init__(self, notes, name):
        self.notes, self.name = notes, name

    def wait_stream(self, other):
        self.notes.append(f"{self.name} waits for {other.name}")

    def record_event(self):
        self.notes.append("event")
        return sum(note == "event" for note in self.notes)

    def wait_event(self, event):
        self.notes.append(f"{self.name} waits for event {event}")


@pytest.mark.parametrize("count", [0, 1, 3])
def test_the_next_batch_is_placed_before_one_is_handed_over(monkeypatch, count):
    """The order of things, with stand-ins for CUDA's streams."""
    notes = []
    main, side = FakeStream(notes, "main"), FakeStream(notes, "side")
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda tensor, stream: notes.append(f"kept for {stream.name}")
    )
    loader = DeviceLoader([collate(examples(number + 1)) for number in range(count)], CPU)
    for number, (images, _) in enumerate(loader._ahead(iter(loader.loader))):
        assert torch.equal(images, erased_one_by_one(examples(number + 1)))
        notes.append(f"step {number + 1}")

    def step(number):
        return [f"main waits for event {number}", *["kept for main"] * 2, f"step {number}"]

    expected = {0: [], 1: ["event", *step(1)], 3: ["event", "event", *step(1), "event", *step(2), *step(3)]}
    assert notes == ["side waits for main", *expected[count]]


@pytest.mark.gpu
def test_batches_on_a_gpu(photos):
    """Those of the CPU, also while the GPU is busy with the batches before, and writes to them."""
    cuda = torch.device("cuda", torch.cuda.current_device())
    args = make_args(
        data_set="IMNET", data_path=photos, input_size=224, batch_size=24, reprob=0.8, recount=2, num_workers=2
    )
    train_set, _ = build_dataset(True, args)
    kept = []
    for images, labels in build_train_loader(args, train_set, 1, 0, cuda):
        assert images.device == labels.device == cuda and images.is_contiguous()
        torch.cuda._sleep(20_000_000)
        kept.append((images.clone(), labels.clone()))
        images.zero_()
    expected = list(build_train_loader(args, train_set, 1, 0, CPU))
    assert len(kept) == len(expected)
    for (images, labels), (exact, exact_labels) in zip(kept, expected, strict=True):
        assert (images.cpu() - exact).abs().max() <= 1e-6 and torch.equal(labels.cpu(), exact_labels)


# ------------------------------------------------------------------------------------------------------------
# How many workers


@pytest.mark.parametrize(
    ("cores", "env", "workers"),
    [
        (64, {}, 10),
        (4, {}, 4),
        (64, {"LOCAL_WORLD_SIZE": "8"}, 8),
        (16, {"LOCAL_WORLD_SIZE": "8"}, 2),
        (4, {"LOCAL_WORLD_SIZE": "8"}, 1),
        (64, {"SLURM_CPUS_PER_TASK": "6"}, 6),
        (8, {"SLURM_CPUS_PER_TASK": "16"}, 8),
        (64, {"SLURM_CPUS_PER_TASK": "32", "LOCAL_WORLD_SIZE": "4"}, 8),
    ],
    ids=str,
)
def test_workers_are_no_more_than_cores(monkeypatch, cores, env, workers):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)))
    assert default_workers(env) == workers
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert default_workers(env) == workers


def test_a_given_number_of_workers_is_taken(monkeypatch):
    monkeypatch.setattr(loaders, "default_workers", lambda: 3)
    for given, taken in ((None, 3), (0, 0), (25, 25)):
        monkeypatch.setattr(loaders, "SteadyLoader", lambda dataset, **options: options)
        options = build_eval_loader(make_args(num_workers=given), Numbered(5), 1, 0, CPU).loader
        assert options["num_workers"] == taken


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
    args = imnet(root, single_class=True, **changes)
    monkeypatch.setattr(datasets, "build_transform", lambda is_train, args: build_transform(False, args))
    return args, build_dataset(True, args)[0]


def positions_of_bad_images(loader, epoch, start=0):
    """Where the epoch asks for images that cannot be read; the next pass begins at `start`."""
    loader.set_epoch(epoch, start)
    positions = [draw.position for draw in loader.loader.sampler if draw.image in BAD]
    loader.set_epoch(epoch, start)
    return positions


@pytest.mark.parametrize("start", [0, 150])
@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_bad_images_are_replaced_by_the_next(damaged_folder, monkeypatch, capfd, num_workers, start):
    args, train_set = skipping(damaged_folder, monkeypatch, num_workers=num_workers)
    loader = build_train_loader(args, train_set, 1, 0, CPU)
    order = [draw.image for draw in loader.loader.sampler][start:]
    bad = positions_of_bad_images(loader, 0, start)
    assert len(bad) == (3 if start == 0 else 2)
    next_readable = {0: 1, 100: 101, 299: 1}  # after 299 comes 0, which is bad as well
    assert indices_of(loader, damaged_folder) == [next_readable.get(index, index) for index in order]
    assert loader.replaced.nonzero()[:, 0].tolist() == bad
    list(loader)
    assert loader.replaced.shape == (300,) and loader.replaced.sum() == 3
    lines = capfd.readouterr().err.splitlines()
    # two workers may meet 0 at the same moment, on its own and after 299
    assert sorted({line.split()[4].split("/")[-1] for line in lines}) == ["000.bmp:", "100.bmp:", "299.bmp:"]
    assert len(lines) == 3 or num_workers == 2
    assert all(line.startswith("warning: cannot decode image ") for line in lines)


def test_all_copies_of_a_bad_image_are_replaced_and_counted(damaged_folder, monkeypatch):
    args, train_set = skipping(damaged_folder, monkeypatch, repeated_aug=True, num_workers=2, batch_size=2)
    loader = build_train_loader(args, train_set, 1, 0, CPU)
    seen = []
    for epoch in range(3):
        loader.replaced.zero_()
        bad = positions_of_bad_images(loader, epoch)
        list(loader)
        assert loader.replaced.nonzero()[:, 0].tolist() == bad
        seen += bad
    assert len(seen) >= 3


@pytest.mark.parametrize("repeated_aug", [True, False])
def test_replaced_images_are_augmented_alike_by_any_worker_and_from_any_start(damaged_folder, repeated_aug):
    changes = {"data_set": "IMNET", "data_path": damaged_folder, "input_size": 24, "reprob": 0.5, "batch_size": 16}
    args = make_args(**changes, single_class=True, skip_bad_images=True, repeated_aug=repeated_aug)
    train_set, _ = build_dataset(True, args)
    loader = build_train_loader(args, train_set, 1, 0, CPU)
    bad = positions_of_bad_images(loader, 3)
    assert bad[0] < 6 * 16 < bad[-1] < len(loader) * 16
    whole = list(loader)
    for num_workers in (0, 2):
        args.num_workers = num_workers
        assert_same_batches(epoch_of(args, train_set, epoch=3), whole)
        assert_same_batches(epoch_of(args, train_set, epoch=3, start=6 * 16), whole[6:])


def test_nothing_is_replaced_without_the_flag():
    assert build_train_loader(make_args(), Numbered(256), 1, 0, CPU).replaced.shape == (0,)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_too_many_bad_images_in_a_row(damaged_folder, monkeypatch, num_workers):
    """Nine in a row are replaced, ten are not."""
    for number in range(200, 209):
        (damaged_folder / "train" / "a" / f"{number}.bmp").write_bytes(b"damaged")
    args, train_set = skipping(damaged_folder, monkeypatch, num_workers=num_workers)
    list(build_train_loader(args, train_set, 1, 0, CPU))
    (damaged_folder / "train" / "a" / "209.bmp").write_bytes(b"damaged")
    message = r"^--skip-bad-images gives up after 10 bad images in a row: cannot decode image .*/209.bmp: [^\n]*$"
    with pytest.raises(ImageError, match=message):
        list(build_train_loader(args, train_set, 1, 0, CPU))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_bad_images_are_errors_unless_they_are_to_be_skipped(damaged_folder, monkeypatch, num_workers):
    args, train_set = skipping(damaged_folder, monkeypatch, skip_bad_images=False, num_workers=num_workers)
    with pytest.raises(ImageError, match=r"^cannot decode [^\n]*; repair or remove the file, or give --skip-bad-i"):
        list(build_train_loader(args, train_set, 1, 0, CPU))


def test_evaluation_never_skips(damaged_folder):
    (damaged_folder / "train").rename(damaged_folder / "val")
    args = imnet(damaged_folder, single_class=True, skip_bad_images=True)
    val, _ = build_dataset(False, args)
    with pytest.raises(ImageError, match=r"repair or remove the file$"):
        list(build_eval_loader(args, val, 1, 0, CPU))


# ------------------------------------------------------------------------------------------------------------
# Workers that die


class Deadly(Numbered):
    """Kills the worker that is asked for the last image."""

    def __init__(self, count, death):
        super().__init__(count)
        self.death = death

    def decode(self, index):
        if index == self.count - 1:
            assert get_worker_info() is not None
            self.death()
        return super().decode(index)


def kill_itself():
    os.kill(os.getpid(), signal.SIGKILL)


def exit_at_once():
    os._exit(3)


@pytest.fixture
def leaked_files():
    """Where torch's report of a death interrupts its own look at open files, one stays open: it is closed here."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.mark.usefixtures("leaked_files")
@pytest.mark.parametrize("pause", [0.0, 0.05], ids=["in the loader", "anywhere"])
@pytest.mark.parametrize("death", [kill_itself, exit_at_once])
def test_dead_workers_are_named(death, pause):
    loader = build_train_loader(make_args(num_workers=2, repeated_aug=False), Deadly(256, death), 1, 0, CPU)
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
    monkeypatch.setattr("workers.SIGNAL_SECONDS", 0.01)
    with pytest.raises(type(error)) as caught, name_dead_workers():
        raise error
    assert caught.value is error


@pytest.mark.usefixtures("leaked_files")
@pytest.mark.parametrize(
    ("death", "reason"),
    [(kill_itself, "is killed by signal: Killed"), (exit_at_once, "exited unexpectedly with exit code 3")],
)
def test_a_death_whose_signal_is_lost(monkeypatch, death, reason):
    """What torch raises while an object is deleted goes nowhere; the connection has broken all the same."""
    monkeypatch.setattr("workers.SIGNAL_SECONDS", 0.01)
    loader = build_train_loader(make_args(num_workers=2, repeated_aug=False), Deadly(256, death), 1, 0, CPU)
    with pytest.raises(WorkerDied, match=rf"^a data loading worker died: {reason}\. Often"), name_dead_workers():
        try:
            for _ in loader:
                pass
        except RuntimeError:  # torch's report, which the program never hears
            for worker in workers.WORKERS:
                worker.join(0.5)
            raise ConnectionResetError(104, "Connection reset by peer") from None


@pytest.mark.parametrize("batches", [1, None], ids=["left early", "read to the end"])
def test_workers_are_asked_only_while_they_work(batches):
    """Later torch ends them, if need be with a signal."""
    loader = build_train_loader(make_args(num_workers=2, repeated_aug=False), Numbered(256), 1, 0, CPU)
    workers.WORKERS.clear()
    read = iter(loader)
    next(read)
    assert len(workers.WORKERS) == 2 and all(worker.is_alive() for worker in workers.WORKERS)
    for _ in islice(read, batches):
        pass
    del read
    gc.collect()
    assert not list(workers.WORKERS)


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

    def decode(self, index):
        image, _ = super().decode(index)
        return image, set(STOPPING) <= signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_only_workers_block_the_signals():
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert not before & set(STOPPING)
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
    from workers import SteadyLoader
    from program import Signals

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
        output, errors = run.communicate(timeout=PATIENCE)  # until all processes that hold the pipes have ended
    finally:
        run.kill()
    assert output == "100 samples, signalled: True\n", errors
    assert run.returncode == 1 and errors.splitlines()[-1] == "KeyError: 'a mistake'"
    assert errors.count("Traceback") == 1


LEAVES = """
import multiprocessing.connection
import os
import torch
from workers import SteadyLoader


def leave(*args):
    os._exit(3)


multiprocessing.connection.answer_challenge = leave  # in the handshake in which a batch is handed over
next(iter(SteadyLoader(torch.arange(100), batch_size=10, num_workers=1)))
"""


def test_a_reader_that_goes_away_while_a_batch_is_handed_over_is_no_traceback():
    """As a second Ctrl-C makes it: what the worker has to say would stand under the run's own message."""
    run = subprocess.run(
        [sys.executable, "-c", LEAVES],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,  # until the worker is gone too
        text=True,
    )
    assert (run.returncode, run.stdout, run.stderr) == (3, "", "")
