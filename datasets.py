"""Data sets, transforms and loaders: everything between files on disk and batches [B, 3, S, S].

The recipe is DeiT's: random resized crop, RandAugment and random erasing, all from timm. What is added here
is reading folders and JSON files, checks whose messages a user can act on, and separate random streams.

The pixels of a training sample depend on the image, `--seed`, the epoch and the sample's position in it, and on
nothing else: SeededDataset seeds python, numpy and torch for each. Neither the number of workers nor a restart in
the middle of an epoch changes a batch, and the process's global random state is not touched.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import re
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.util import Finalize
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, auto_augment, create_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, SequentialSampler, get_worker_info
from torchvision import transforms
from torchvision.datasets import CIFAR100, ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes

from samplers import Draw, RASampler, ResumableSampler, ShardSampler
from utils import LocalError, Signals, UserError, did_you_mean

DATA_SETS = ("CIFAR", "IMNET", "INAT", "INAT19", "DIGITS")
SMALL_INPUT = 32  # up to this size images are cropped with padding, not rescaled
DIGITS_TRAIN = 1437  # of scikit-learn's 1,797 digits; the last 360 are for evaluation
BAD_IN_A_ROW = 10  # --skip-bad-images gives up after so many
SIGNAL_SECONDS = 5  # until the death of a worker is known, at most
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
    """Decode an image file, whatever its name ends in, to RGB.

    Grey, palette and CMYK images are converted; transparency is dropped; of 16 bits the upper 8 are kept (Pillow
    alone would clip them to white). EXIF is ignored, so that a photo marked as rotated stays as it is stored, as in
    torchvision.

    Raises:
        ImageError: the file is missing, empty, truncated, otherwise damaged or no image, or claims more than twice
            Pillow's MAX_IMAGE_PIXELS.
    """
    try:
        with open(path, "rb") as file:
            return _to_rgb(Image.open(file))
    except (OSError, SyntaxError, ValueError, EOFError, RuntimeError, Image.DecompressionBombError) as error:
        raise ImageError(f"cannot decode image {path}: {error}; repair or remove the file") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours; Pillow warns about the direct way
    return image.convert("RGB")


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
        dataset = ImageFolder(str(folder), transform, loader=load_image, allow_empty=True)
        other_classes = find_classes(other)[0] if other.is_dir() else dataset.classes
    except FileNotFoundError as error:
        raise UserError(f"cannot use {folder}: {error}") from error
    if other_classes != dataset.classes:
        differing = sorted(set(other_classes) ^ set(dataset.classes))
        raise UserError(
            f"{train} and {val} must hold the same class folders, but {len(differing)} are in only one of "
            f"them, for example {differing[0]!r}"
        )
    empty = sorted(set(range(len(dataset.classes))) - set(dataset.targets))
    if empty:
        more = f" (and {len(empty) - 1} more)" if len(empty) > 1 else ""
        raise UserError(
            f"class folder {folder / dataset.classes[empty[0]]}{more} holds no images "
            f"({', '.join(IMG_EXTENSIONS)}); add some, or remove the folder from {train.name}/ and {val.name}/"
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


class SecondHalfErasing:
    """`--resplit`: random-erase the second half of each batch of B, from B // 2 on; the first stays clean.

    Called with an image [3, S, S] and its position in the epoch; erases in place, with timm's RandomErasing.
    """

    def __init__(self, batch_size: int, probability: float, mode: str, max_count: int) -> None:
        self.batch_size = batch_size
        self.erase = RandomErasing(probability, mode=mode, max_count=max_count, device="cpu")

    def __call__(self, image: Tensor, position: int) -> Tensor:
        in_first_half = position % self.batch_size < self.batch_size // 2
        return image if in_first_half else self.erase(image)


# ------------------------------------------------------------------------------------------------------------
# Samples that depend on seed, epoch and position alone


@contextmanager
def seeded(entropy: Sequence[int]) -> Iterator[None]:
    """Seed python's, numpy's and torch's (CPU) global generators inside, and put their states back afterwards.

    numpy's SeedSequence makes 128 well mixed bits of `entropy`. python and numpy take all of them, torch's
    generator can take 32: of a million samples some share torch's stream, but none share python's or numpy's.

    A loader's worker draws random numbers for nothing else, so there the states are left as they are.
    """
    in_worker = get_worker_info() is not None
    torch_generator = torch.default_generator  # torch.manual_seed would seed the accelerators as well
    if not in_worker:
        states = random.getstate(), np.random.get_state(), torch_generator.get_state()
    words = np.random.SeedSequence(entropy).generate_state(4)  # uint32
    random.seed(words.tobytes())
    np.random.seed(words)
    torch_generator.manual_seed(int(words[0]))
    try:
        yield
    finally:
        if not in_worker:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch_generator.set_state(states[2])


class SeededDataset(Dataset[tuple[Tensor, int]]):
    """A training set whose samples are asked for by Draw: the same Draw gives the same pixels, in any process.

    Args:
        dataset: yields (image [3, S, S], label) by index.
        second_half: `--resplit`'s erasing, or None.
        skip_bad: replace an image that raises ImageError by the next one that can be read (after the last comes the
            first), and name each once on stderr. Else the error is passed on, with advice.
        positions: samples of this process in an epoch.

    Attributes:
        replaced: bool [positions], which samples of the running epoch stand in for a bad image. Workers set it.
    """

    def __init__(
        self,
        dataset: MapDataset,
        second_half: SecondHalfErasing | None = None,
        skip_bad: bool = False,
        positions: int = 0,
    ) -> None:
        self.dataset = dataset
        self.second_half = second_half
        self.skip_bad = skip_bad
        # In memory that this process shares with the loader's workers
        self.replaced = torch.zeros(positions if skip_bad else 0, dtype=torch.bool).share_memory_()
        self._named = torch.zeros(len(dataset) if skip_bad else 0, dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, draw: Draw) -> tuple[Tensor, int]:
        """The sample (image [3, S, S], label).

        Raises:
            ImageError: the image cannot be decoded; with `skip_bad`, nor can the BAD_IN_A_ROW - 1 after it.
        """
        with seeded(draw.entropy):
            image, label = self._read(draw)
            if self.second_half is not None:
                image = self.second_half(image, draw.position)
        return image, label

    def _read(self, draw: Draw) -> tuple[Tensor, int]:
        try:
            return self.dataset[draw.image]
        except ImageError as error:
            if not self.skip_bad:
                raise ImageError(f"{error}, or give --skip-bad-images") from error
            self.replaced[draw.position] = True
            return self._read_next(draw.image, error)

    def _read_next(self, index: int, error: ImageError) -> tuple[Tensor, int]:
        """The first image after a bad one that can be read."""
        for _ in range(1, BAD_IN_A_ROW):
            self._name(index, error)
            index = (index + 1) % len(self)
            try:
                return self.dataset[index]
            except ImageError as another:
                error = another
        raise ImageError(f"--skip-bad-images gives up after {BAD_IN_A_ROW} bad images in a row: {error}") from error

    def _name(self, index: int, error: ImageError) -> None:
        if not self._named[index]:
            self._named[index] = True
            print(f"warning: {error}. The next one that can be read takes its place", file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------------------
# Loaders


class WorkerDied(LocalError):
    """A loader's worker process ended without an exception of its own, for example killed for lack of memory."""


@contextmanager
def name_dead_workers() -> Iterator[None]:
    """Turn torch's report of a worker that died into a WorkerDied with advice.

    It belongs around everything that runs while loaders do: torch learns of the death from a signal, and raises
    wherever the process happens to be, not only in the loader. A worker that dies while it hands over a batch
    breaks a connection first; then the signal is awaited. Where the signal comes while the loader waits, torch says
    only that a worker exited, and the reason stands in the error's cause.
    """
    try:
        try:
            yield
        except (ConnectionError, EOFError):
            time.sleep(SIGNAL_SECONDS)  # where torch's handler of the signal raises
            raise
    except RuntimeError as error:
        report = r"DataLoader worker \(pid.*?\) ((?:is killed by|exited unexpectedly)[^.]*)"
        death = re.match(report, str(error.__cause__)) or re.match(report, str(error))
        if death is None:
            raise
        raise WorkerDied(
            f"a data loading worker died: {death[1]}. Often memory or /dev/shm is full (look at dmesg, "
            "df -h /dev/shm): give fewer --num_workers, a smaller --batch-size or more memory"
        ) from error


def build_train_loader(args: Namespace, dataset: MapDataset, world_size: int, rank: int) -> DataLoader[Any]:
    """This process's training batches: `--batch-size` images each, shuffled, the incomplete last one dropped.

    The loader's sampler is a ResumableSampler: `loader.sampler.set_epoch(epoch, start)`. Its data set is a
    SeededDataset: `loader.dataset.replaced`.

    Raises:
        UserError: the set is too small for one step, or for repeated augmentation.
    """
    order: RASampler | DistributedSampler[Any]
    if args.repeated_aug:
        order = RASampler(dataset, world_size, rank, seed=args.seed)
    else:
        order = DistributedSampler(dataset, world_size, rank, shuffle=True, seed=args.seed)
    if len(order) < args.batch_size * args.grad_accum_steps:
        times = f" times --grad-accum-steps {args.grad_accum_steps}" if args.grad_accum_steps > 1 else ""
        raise UserError(
            f"each process sees {len(order)} training images per epoch, fewer than one batch of "
            f"{args.batch_size}{times}; give a smaller --batch-size"
        )
    second_half = None
    if args.resplit:
        second_half = SecondHalfErasing(args.batch_size, args.reprob, args.remode, args.recount)
    samples = SeededDataset(dataset, second_half, args.skip_bad_images, len(order))
    sampler = ResumableSampler(order)
    return _loader(args, samples, rank, batch_size=args.batch_size, sampler=sampler, drop_last=True)


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


class SteadyLoader(DataLoader[Any]):
    """A DataLoader whose workers do not hear SIGTERM and SIGUSR1, which ask a run to stop.

    Such a signal often reaches all processes of a run, and the main one needs its workers until the last step is
    saved. They start with the signals blocked, and keep that.

    What else ends a worker by SIGTERM has to kill it: torch, if it does not end by itself, and multiprocessing at
    the end of this process, which would wait for ever. There `end_workers` comes first.
    """

    def __init__(self, dataset: MapDataset, **options: Any) -> None:
        super().__init__(dataset, **options)
        Finalize(None, end_workers, exitpriority=0)

    def __iter__(self) -> Any:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, Signals.NAMES)
        try:
            batches = super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for process in _daemons():
            process.terminate = process.kill  # type: ignore[method-assign]
        return batches


def end_workers() -> None:
    """Kill the workers of passes that the end of this process leaves unfinished."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # where torch would report their deaths
    for process in _daemons():
        process.kill()


def _daemons() -> list[multiprocessing.process.BaseProcess]:
    """The processes that end with this one: all loaders' workers."""
    return [process for process in multiprocessing.active_children() if process.daemon]


def _loader(args: Namespace, dataset: MapDataset, rank: int, **options: Any) -> SteadyLoader:
    """A loader with a generator of its own, without which each pass would draw from the global one."""
    return SteadyLoader(
        dataset,
        num_workers=args.num_workers,
        pin_memory=args.pin_mem and torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(args.seed + rank),
        **options,
    )
