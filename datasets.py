"""Data sets, transforms and loaders: everything between files on disk and batches [B, 3, S, S].

The recipe is DeiT's: random resized crop, RandAugment and random erasing, all from timm. What is added here
is reading folders and JSON files, checks whose messages a user can act on, and separate random streams.

Augmentation runs in workers that every epoch starts anew, seeded from the loader's own generator: equal seeds
give equal batches, each epoch draws afresh, and the process's global state is not touched. To continue a run
exactly, save and restore `loader.generator.get_state()`. With `--num_workers 0` there is no worker to seed,
and augmentation draws from the global state of python, numpy and torch.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, auto_augment, create_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, SequentialSampler, default_collate
from torchvision import transforms
from torchvision.datasets import CIFAR100, ImageFolder
from torchvision.datasets.folder import find_classes

from samplers import RASampler, ShardSampler
from utils import LocalError, UserError, did_you_mean

DATA_SETS = ("CIFAR", "IMNET", "INAT", "INAT19", "DIGITS")
SMALL_INPUT = 32  # up to this size images are cropped with padding, not rescaled
DIGITS_TRAIN = 1437  # of scikit-learn's 1,797 digits; the last 360 are for evaluation
POSTERIZE_OPS = ("Posterize", "PosterizeIncreasing", "PosterizeOriginal")

Transform = Callable[[Image.Image], Tensor]
Sample = tuple[str | Image.Image, int]  # an image or its path, label
MapDataset = Any  # a torch Dataset with a length, which torch's type leaves out


# ------------------------------------------------------------------------------------------------------------
# Images


class ImageError(LocalError):
    """An image file that cannot be decoded; the message names it.

    A DataLoader worker's exception is rebuilt in the main process as `type(error)(traceback)`, a text that
    ends in 'datasets.ImageError: message'. The constructor keeps the message alone, so it reads the same from
    a worker as from the main process.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition(f"{__name__}.ImageError: ")[2].strip())


def load_image(path: str) -> Image.Image:
    """Decode an image file to RGB.

    Raises:
        ImageError: the file is missing, damaged or no image.
    """
    try:
        with open(path, "rb") as file:
            return Image.open(file).convert("RGB")
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise ImageError(f"cannot decode image {path}: {error}; repair or remove the file") from error


class LabelledImages(Dataset[tuple[Tensor, int]]):
    """A list of images, in memory or by path, with their labels: yields (image [3, S, S], label)."""

    def __init__(self, samples: Sequence[Sample], transform: Transform) -> None:
        self.samples = samples
        self.transform = transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.samples[index]
        return self.transform(load_image(image) if isinstance(image, str) else image), label


# ------------------------------------------------------------------------------------------------------------
# Data sets


def build_dataset(is_train: bool, args: Namespace) -> tuple[MapDataset, int]:
    """The training or the evaluation half of `--data-set`.

    Returns: the data set, yielding (image [3, S, S], label), and its number of classes.
    Raises:
        UserError: unknown name, missing or malformed files, or augmentation flags that do not work.
    """
    if args.data_set not in DATA_SETS:
        hint = did_you_mean(args.data_set, DATA_SETS)
        raise UserError(f"--data-set {args.data_set} is not one of {', '.join(DATA_SETS)}.{hint}")
    transform = build_transform(is_train, args)
    if args.data_set == "DIGITS":
        return LabelledImages(_digits(is_train, args.input_size), transform), 10
    if not args.data_path:
        raise UserError(f"--data-set {args.data_set} needs --data-path, the folder that holds the data")
    root = Path(args.data_path).expanduser()
    if not root.is_dir():
        raise UserError(f"--data-path {args.data_path} is not a folder; give the folder that holds the data")
    if args.data_set == "CIFAR":
        return _cifar(root, is_train, transform), 100
    if args.data_set == "IMNET":
        return _image_folder(root, is_train, transform)
    year = 2018 if args.data_set == "INAT" else 2019
    samples, num_classes = _inaturalist(root, is_train, year, args.inat_category)
    return LabelledImages(samples, transform), num_classes


def _image_folder(root: Path, is_train: bool, transform: Transform) -> tuple[ImageFolder, int]:
    """`train` (or `train_new`) and `val`, each with one folder per class."""
    train, val = root / "train", root / "val"
    if (root / "train_new").is_dir():
        train = root / "train_new"
    folder, other = (train, val) if is_train else (val, train)
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; --data-path must hold train/ and val/ with a folder per class")
    try:
        dataset = ImageFolder(str(folder), transform, loader=load_image)
        other_classes = find_classes(other)[0] if other.is_dir() else dataset.classes
    except FileNotFoundError as error:
        raise UserError(f"cannot use {folder}: {error}") from error
    if other_classes != dataset.classes:
        differing = sorted(set(other_classes) ^ set(dataset.classes))
        raise UserError(
            f"{train} and {val} must hold the same class folders, but {len(differing)} are in only one of "
            f"them, for example {differing[0]!r}"
        )
    return dataset, len(dataset.classes)


def _cifar(root: Path, is_train: bool, transform: Transform) -> CIFAR100:
    try:
        return CIFAR100(str(root), train=is_train, transform=transform, download=False)
    except RuntimeError as error:
        folder = root / CIFAR100.base_folder
        raise UserError(f"no intact CIFAR-100 in {folder}; unpack {CIFAR100.filename} in {root}") from error


def _digits(is_train: bool, size: int) -> list[Sample]:
    """scikit-learn's 8 x 8 handwritten digits, enlarged to size x size: a real task without a download."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError("--data-set DIGITS needs scikit-learn: pip install scikit-learn") from error
    digits = load_digits()
    half = slice(DIGITS_TRAIN) if is_train else slice(DIGITS_TRAIN, None)
    pixels = (digits.images[half] * (255 / 16)).round().astype("uint8")  # [N, 8, 8], was 0..16
    images = [Image.fromarray(each).resize((size, size), Image.Resampling.BICUBIC) for each in pixels]
    return [
        (image.convert("RGB"), label) for image, label in zip(images, digits.target[half].tolist(), strict=True)
    ]


def _inaturalist(root: Path, is_train: bool, year: int, category: str) -> tuple[list[Sample], int]:
    """Samples of one split, and the number of classes, from iNaturalist's annotation files.

    The label of an image is the position of its `category` (kingdom, ..., name) among the distinct ones, in
    order of first appearance in the training annotations.
    """
    train = _read_json(root / f"train{year}.json")
    split = train if is_train else _read_json(root / f"val{year}.json")
    try:
        taxa = {taxon["id"]: taxon for taxon in _read_json(root / "categories.json")}
        known = set.intersection(*map(set, taxa.values())) - {"id"}
        if category not in known:
            raise UserError(f"--inat-category {category} is not in the data; use {', '.join(sorted(known))}")
        labels: dict[str, int] = {}
        for annotation in train["annotations"]:
            labels.setdefault(taxa[annotation["category_id"]][category], len(labels))
        taxon_of = {each["image_id"]: taxa[each["category_id"]] for each in split["annotations"]}
        files = [(image["file_name"], labels[taxon_of[image["id"]][category]]) for image in split["images"]]
    except (KeyError, TypeError) as error:
        raise UserError(f"the JSON files in {root} are not iNaturalist {year}'s: {error!r}") from error
    if not files:
        raise UserError(f"the JSON files in {root} list no images; download them again")
    place = _inaturalist_layout(root, files[0][0])
    return [(str(root / place(name)), label) for name, label in files], len(labels)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}, which --data-set INAT and INAT19 need: {error}") from error


def _flattened(name: str) -> str:
    """DeiT's layout drops the second folder: train_val2018/Plantae/7477/a.jpg -> train_val2018/7477/a.jpg."""
    parts = PurePosixPath(name).parts
    return str(PurePosixPath(*parts[:1], *parts[2:]))


def _inaturalist_layout(root: Path, name: str) -> Callable[[str], str]:
    """Where files lie under `root`, decided by one of them: as listed, or in DeiT's layout."""
    for place in (str, _flattened):
        if (root / place(name)).is_file():
            return place
    raise UserError(f"neither {root / name} nor {root / _flattened(name)} exists; unpack the images there")


# ------------------------------------------------------------------------------------------------------------
# Transforms


def build_transform(is_train: bool, args: Namespace) -> transforms.Compose:
    """DeiT's transform: PIL image -> normalised float32 [3, S, S], S = `--input-size`.

    Training: random resized crop, horizontal flip (not for digits: a mirrored one is another symbol), `--aa`,
    which switches colour jitter off, as in timm, else colour jitter; normalise; random erasing.
    Evaluation: shorter side to int(256/224 S), bicubic; centre crop; normalise.
    Up to S = 32 all images are first brought to S x S (nothing to do for CIFAR at 32); then training crops
    randomly out of 4 pixels of padding, and evaluation takes the whole.

    Raises:
        UserError: a flag has a value that timm cannot use.
    """
    size, bicubic = args.input_size, transforms.InterpolationMode.BICUBIC
    if size < 1:
        raise UserError(f"--input-size {size} is not a size in pixels; give a positive number")
    to_size = transforms.Resize((size, size), bicubic)  # leaves an image of this size alone
    if is_train:
        transform = _train_transform(args)
        if size <= SMALL_INPUT:
            transform.transforms[:1] = [to_size, transforms.RandomCrop(size, padding=4)]
        return transform
    crop = [transforms.Resize(int(256 / 224 * size), bicubic), transforms.CenterCrop(size)]
    normalize = transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    return transforms.Compose([*([to_size] if size <= SMALL_INPUT else crop), transforms.ToTensor(), normalize])


def _train_transform(args: Namespace) -> transforms.Compose:
    """timm's training transform; its random crop comes first."""
    policy = None if (args.aa or "none").lower() == "none" else args.aa
    _check_augmentation(args, policy)
    auto_augment.NAME_TO_OP.update(dict.fromkeys(POSTERIZE_OPS, posterize))
    try:
        return create_transform(
            args.input_size,
            is_training=True,
            hflip=0.0 if args.data_set == "DIGITS" else 0.5,
            color_jitter=args.color_jitter,
            auto_augment=policy,
            interpolation=args.train_interpolation,
            re_prob=0.0 if args.resplit else args.reprob,  # --resplit erases in the collated batch
            re_mode=args.remode,
            re_count=args.recount,
        )
    except (AssertionError, LookupError, ValueError) as error:
        raise UserError(
            f"--aa {args.aa} is not an augmentation timm knows ({error!r}); "
            "use for example rand-m9-mstd0.5-inc1, augmix-m3, original or none"
        ) from error


def _check_augmentation(args: Namespace, policy: str | None) -> None:
    """Refuse what timm would refuse without naming the flag, or only in the middle of an epoch."""
    resampling = ["random", "nearest", "bilinear", "bicubic"]
    if policy is None:
        resampling += ["box", "hamming", "lanczos"]  # Pillow cannot rotate or shear with these
    choices = ", ".join(resampling)
    if args.train_interpolation not in resampling:
        raise UserError(f"--train-interpolation {args.train_interpolation} cannot be used; use {choices}")
    if args.remode.lower() not in ("const", "rand", "pixel"):
        raise UserError(f"--remode {args.remode} cannot fill an erased box; use const, rand or pixel")
    if not 0 <= args.reprob <= 1:
        raise UserError(f"--reprob {args.reprob} is not a probability; give a number from 0 to 1")
    if args.recount < 1:
        raise UserError(f"--recount {args.recount} erases nothing; give at least 1, or --reprob 0")
    if args.color_jitter is not None and args.color_jitter < 0:
        raise UserError(f"--color-jitter {args.color_jitter} is negative; give 0 for none")


def posterize(image: Image.Image, bits: int, **unused: Any) -> Image.Image:
    """Keep the `bits` highest bits of each channel; none leave black.

    At magnitude 10 timm asks for 0 bits, and beyond for fewer. Pillow drew that black until version 13 made
    it an error. This replaces timm's operation in its table of operations by name; Pillow is left alone.
    """
    return auto_augment.posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)


class ErasingCollate:
    """`--resplit`: collate a batch, then random-erase its second half, so that the first stays clean.

    B samples (image [3, S, S], label) become images [B, 3, S, S], erased from B // 2 on, and labels [B].
    """

    def __init__(self, probability: float, mode: str, max_count: int) -> None:
        self.erase = RandomErasing(probability, mode=mode, max_count=max_count, num_splits=2, device="cpu")

    def __call__(self, samples: list[tuple[Tensor, int]]) -> list[Tensor]:
        images, labels = default_collate(samples)
        return [self.erase(images), labels]


# ------------------------------------------------------------------------------------------------------------
# Loaders


def build_train_loader(args: Namespace, dataset: MapDataset, world_size: int, rank: int) -> DataLoader[Any]:
    """This process's training batches: `--batch-size` images each, shuffled, the incomplete last one dropped.

    The loader's sampler has `set_epoch`.

    Raises:
        UserError: the set is too small for `--batch-size` or for repeated augmentation.
    """
    sampler: RASampler | DistributedSampler[Any]
    if args.repeated_aug:
        sampler = RASampler(dataset, world_size, rank, seed=args.seed)
    else:
        sampler = DistributedSampler(dataset, world_size, rank, shuffle=True, seed=args.seed)
    if len(sampler) < args.batch_size:
        raise UserError(
            f"each process sees {len(sampler)} training images per epoch, fewer than one batch of "
            f"{args.batch_size}; give a smaller --batch-size"
        )
    collate = ErasingCollate(args.reprob, args.remode, args.recount) if args.resplit else None
    return _loader(
        args, dataset, rank, batch_size=args.batch_size, sampler=sampler, drop_last=True, collate_fn=collate
    )


def build_eval_loader(args: Namespace, dataset: MapDataset, world_size: int, rank: int) -> DataLoader[Any]:
    """This process's evaluation batches: 1.5 times `--batch-size` images each, nothing dropped.

    With `--dist-eval` the processes share the set without overlap, else each sees all of it.

    Raises:
        UserError: the set is empty.
    """
    if len(dataset) == 0:
        raise UserError("the validation set has no images; check --data-path")
    shard = ShardSampler(dataset, world_size, rank) if args.dist_eval else SequentialSampler(dataset)
    return _loader(args, dataset, rank, batch_size=int(1.5 * args.batch_size), sampler=shard)


def _loader(args: Namespace, dataset: MapDataset, rank: int, **options: Any) -> DataLoader[Any]:
    """A loader that draws from a generator of its own."""
    return DataLoader(
        dataset,
        num_workers=args.num_workers,
        pin_memory=args.pin_mem and torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(args.seed + rank),
        **options,
    )
