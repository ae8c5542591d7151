"""Data sets: from files on disk, by a list of what there is, to decoded images and labels.

What is here is reading folders, tar files, tables and JSON files, and checks whose messages a user can act on. What
happens to a decoded image is in transforms.py; how images become batches is in loaders.py.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import IO, Any, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import CIFAR100, ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes

from archives import Stored, find_in_folders, find_in_shards
from transforms import Box, build_transform, to_bytes
from utils import BAD_ARGUMENT, LocalError, UserError, broadcast_object, did_you_mean, print_main


class Names(tuple[str, ...]):
    """Choices of `--data-set`. A name with a slash is let through: its prefix is looked at when it is opened."""

    def __contains__(self, name: object) -> bool:
        return "/" in str(name) or super().__contains__(name)


DATA_SETS = Names(["CIFAR", "IMNET", "INAT", "INAT19", "DIGITS", "tar", "wds/FOLDER", "hfds/NAME"])
STREAMS = ("tfds/", "hfids/")  # timm's other sources of data
EVALUATION_SPLITS = ("validation", "val", "test")  # of a Hugging Face set: the first that it has
DIGITS_TRAIN = 1437  # of scikit-learn's 1,797 digits; the last 360 are for evaluation

Example = tuple[Tensor, int, list[Box]]  # uint8 [3, S, S], label, boxes to erase
Sample = tuple[Any, int]  # what an image can be read from, label


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
    return _decode(lambda: open(path, "rb"), path)


def _decode(open_file: Callable[[], IO[bytes]], name: str) -> Image.Image:
    try:
        with open_file() as file:
            return _to_rgb(Image.open(file))
    except (OSError, SyntaxError, ValueError, EOFError, RuntimeError, Image.DecompressionBombError) as error:
        reason = "unknown format" if isinstance(error, UnidentifiedImageError) else error
        raise ImageError(f"cannot decode image {name}: {reason}; repair or remove the file") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        image.load()  # `convert` would copy it
        return image
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours; Pillow warns about the direct way
    return image.convert("RGB")


class LabelledImages(Dataset[Example]):
    """Images with their labels. Reading one and transforming it are two steps: many views may follow one decode.

    Args:
        samples: of each image what `read` takes, and its label.
        transform: makes uint8 [3, S, S] of a decoded image.
        read: decodes an image.
        as_bytes: `--fast-resize`: decoded images are uint8 [3, H, W], not PIL images.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        transform: Callable[[Any], Tensor],
        read: Callable[[Any], Image.Image] = load_image,
        as_bytes: bool = False,
    ) -> None:
        self.samples = samples
        self.transform = transform
        self.read = read
        self.as_bytes = as_bytes

    def __len__(self) -> int:
        return len(self.samples)

    def decode(self, index: int) -> tuple[Any, int]:
        """An image, ready for the transform, and its label."""
        source, label = self.samples[index]
        image = self.read(source)
        return to_bytes(image) if self.as_bytes else image, label

    def __getitem__(self, index: int) -> Example:
        """The image transformed, uint8 [3, S, S], its label, and no boxes to erase: what evaluation takes."""
        image, label = self.decode(index)
        return self.transform(image), label, []


# ------------------------------------------------------------------------------------------------------------
# Data sets


class Found(NamedTuple):
    """Half of a data set: its samples, how many classes it has, and how its images are read."""

    samples: Sequence[Sample]
    num_classes: int
    read: Callable[[Any], Image.Image] = load_image


def build_dataset(is_train: bool, args: Namespace) -> tuple[LabelledImages, int]:
    """The training or the evaluation half of `--data-set`, and its number of classes.

    Raises:
        UserError: unknown name, missing or malformed files, or augmentation flags that do not work.
    """
    transform = build_transform(is_train, args)
    found = _find(is_train, args)
    return LabelledImages(found.samples, transform, found.read, args.fast_resize), found.num_classes


def _find(is_train: bool, args: Namespace) -> Found:
    name = args.data_set
    if name == "DIGITS":
        return _digits(is_train, args.input_size)
    if name.startswith("hfds/"):
        return _hugging_face(name, is_train, args.data_path)
    if name.startswith(STREAMS):
        raise UserError(
            f"--data-set {name} is a stream, and its images have no positions, which repeated augmentation, exact "
            "continuation and exact evaluation need: unpack it into folders (IMNET) or a tar file of them (tar)"
        )
    if name not in list(DATA_SETS) and not name.startswith("wds/"):
        raise UserError(f"--data-set {name} is not one of {', '.join(DATA_SETS)}.{did_you_mean(name, DATA_SETS)}")
    if not args.data_path:
        raise UserError(f"--data-set {name} needs --data-path, the folder that holds the data")
    root = Path(args.data_path).expanduser()
    if not root.is_dir():
        raise UserError(f"--data-path {args.data_path} is not a folder; give the folder that holds the data")
    if name.startswith("wds/"):
        return _shards(root / name.removeprefix("wds/"), is_train)
    if name == "CIFAR":
        return _cifar(root, is_train)
    if name == "IMNET":
        return _image_folder(root, is_train)
    if name == "tar":
        return _tar(root, is_train)
    return _inaturalist(root, is_train, 2018 if name == "INAT" else 2019, args.inat_category)


def _image_folder(root: Path, is_train: bool) -> Found:
    """`train` (or `train_new`) and `val`, each with one folder per class."""
    train, val = root / "train", root / "val"
    if (root / "train_new").is_dir():
        train = root / "train_new"
    folder, other = (train, val) if is_train else (val, train)
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; --data-path must hold train/ and val/ with a folder per class")
    try:
        dataset = ImageFolder(str(folder), allow_empty=True)
        other_classes = find_classes(other)[0] if other.is_dir() else dataset.classes
    except FileNotFoundError as error:
        raise UserError(f"cannot use {folder}: {error}") from error
    _compare_classes(train, val, dataset.classes, other_classes)
    empty = sorted(set(range(len(dataset.classes))) - set(dataset.targets))
    if empty:
        more = f" (and {len(empty) - 1} more)" if len(empty) > 1 else ""
        raise UserError(
            f"class folder {folder / dataset.classes[empty[0]]}{more} holds no images "
            f"({', '.join(IMG_EXTENSIONS)}); add some, or remove the folder from {train.name}/ and {val.name}/"
        )
    return Found(dataset.samples, len(dataset.classes))


def _compare_classes(train: Path, val: Path, classes: Sequence[str], others: Sequence[str]) -> None:
    """Refuse halves with different class folders: their labels would mean different things."""
    differing = sorted(set(classes) ^ set(others))
    if differing:
        raise UserError(
            f"{train} and {val} must hold the same class folders, but {len(differing)} are in only one of "
            f"them, for example {differing[0]!r}"
        )


def _cifar(root: Path, is_train: bool) -> Found:
    try:
        cifar = CIFAR100(str(root), train=is_train, download=False)
    except RuntimeError as error:
        folder = root / CIFAR100.base_folder
        raise UserError(f"no intact CIFAR-100 in {folder}; unpack {CIFAR100.filename} in {root}") from error
    return Found(list(zip(cifar.data, cifar.targets, strict=True)), 100, Image.fromarray)


def _digits(is_train: bool, size: int) -> Found:
    """scikit-learn's 8 x 8 handwritten digits, enlarged to size x size: a real task without a download."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError("--data-set DIGITS needs scikit-learn: pip install scikit-learn") from error
    digits = load_digits()
    half = slice(DIGITS_TRAIN) if is_train else slice(DIGITS_TRAIN, None)
    pixels = (digits.images[half] * (255 / 16)).round().astype("uint8")  # [N, 8, 8], was 0..16
    images = [Image.fromarray(each).resize((size, size), Image.Resampling.BICUBIC) for each in pixels]
    samples = [
        (np.asarray(image.convert("RGB")), label)
        for image, label in zip(images, digits.target[half].tolist(), strict=True)
    ]
    return Found(samples, 10, Image.fromarray)


def _inaturalist(root: Path, is_train: bool, year: int, category: str) -> Found:
    """One split of iNaturalist, from its annotation files.

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
    return Found([(str(root / place(name)), label) for name, label in files], len(labels))


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
# Tar files, and Hugging Face's data sets


def load_stored(image: Stored) -> Image.Image:
    """Decode an image inside a tar file, as `load_image` does."""
    return _decode(image.open, f"{image.path}:{image.name}")


def _tar(root: Path, is_train: bool) -> Found:
    """`train.tar` and `val.tar`: each holds one folder, or one tar file, of images per class."""
    train, val = root / "train.tar", root / "val.tar"
    path = train if is_train else val
    if not path.is_file():
        raise UserError(f"no file {path}; --data-path must hold train.tar and val.tar with a folder per class")
    samples, classes = _tar_index(path)
    if is_train and val.is_file():  # the other way round an evaluation would read all of train.tar
        _compare_classes(train, val, classes, _tar_index(val)[1])
    return Found(samples, len(classes), load_stored)


@cache
def _tar_index(path: Path) -> tuple[list[Sample], list[str]]:
    """What is in a tar file; the main process looks for all."""
    index: tuple[list[Sample], list[str]] = broadcast_object(lambda: find_in_folders(path))
    return index


def _shards(root: Path, is_train: bool) -> Found:
    """WebDataset's shards: tar files with 'train', or with 'val', in their name or folder, also deeper."""
    half = "train" if is_train else "val"
    samples = _shard_index(root, half)
    if not samples:
        raise UserError(f"no shards with images in {root}: tar files with {half!r} in their name or folder")
    labels = {label for _, label in samples}
    if is_train:
        unknown = {label for _, label in _shard_index(root, "val")} - labels
        if unknown:
            raise UserError(f"the val shards in {root} have images of class {min(unknown)}, the train shards none")
    return Found(samples, max(labels) + 1, load_stored)


@cache
def _shard_index(root: Path, half: str) -> list[Sample]:
    """What is in the shards of one half; the main process looks for all."""

    def find() -> list[tuple[Stored, int]]:
        names = {path: str(path.relative_to(root)).lower() for path in sorted(root.rglob("*.tar"))}
        for path, name in names.items():
            if "train" in name and "val" in name:
                raise UserError(f"{path} has both 'train' and 'val' in its name or folder: rename it")
        paths = [path for path, name in names.items() if half in name]
        if len(paths) > 1:
            print_main(f"reading the headers of {len(paths)} {half} shards")
        return find_in_shards(paths)

    index: list[Sample] = broadcast_object(find)
    return index


def _hugging_face(name: str, is_train: bool, root: str | None) -> Found:
    """`hfds/NAME`: its split `train`, and for evaluation the first of EVALUATION_SPLITS that it has."""
    source = name.removeprefix("hfds/"), root, ("train",) if is_train else EVALUATION_SPLITS
    opened: list[Table] = []
    broadcast_object(lambda: opened.append(Table(*source)))  # the main process fills the package's cache first
    table = opened[0] if opened else Table(*source)
    return Found(table.samples, table.num_classes, table.read)


class Table:
    """A split of a Hugging Face data set with the columns `image` and `label`.

    Args:
        name: as the package's load_dataset takes it: of a data set on the hub, or a folder.
        root: the package's cache; its usual one if None.
        splits: the first that there is will be read.
    """

    def __init__(self, name: str, root: str | None, splits: Sequence[str]) -> None:
        self.source = name, root, splits
        with hugging_face():
            if find_spec("datasets") is None:
                raise UserError(f"--data-set hfds/{name} needs Hugging Face's package: pip install datasets")
            try:
                self.reader = _open_split(name, root, splits)
                labels = list(self.reader.dataset[self.reader.label_key])
            except BAD_ARGUMENT as error:
                reason = " ".join(str(error).split()) or type(error).__name__
                raise UserError(f"cannot read --data-set hfds/{name}: {reason}") from error
        self.num_classes = len(self.reader.class_to_idx)
        if not self.num_classes or not all(label in range(self.num_classes) for label in labels):
            raise UserError(f"--data-set hfds/{name} is not labelled by named classes; use another data set")
        self.samples = list(enumerate(labels))

    def __reduce__(self) -> tuple[type[Table], tuple[Any, ...]]:
        return Table, self.source  # a worker that is not forked opens it again

    def read(self, row: int) -> Image.Image:
        """Decode the image of a row."""

        def read() -> IO[bytes]:
            with hugging_face():
                file: IO[bytes] = self.reader[row][0]
            return file

        return _decode(read, f"{row} of hfds/{self.source[0]}")


def _open_split(name: str, root: str | None, splits: Sequence[str]) -> Any:
    from timm.data.readers.reader_hfds import ReaderHfds

    for split in splits[:-1]:
        try:
            return ReaderHfds(name, root=root, split=split)
        except ValueError as error:
            if "Unknown split" not in str(error):
                raise
    return ReaderHfds(name, root=root, split=splits[-1])


@contextmanager
def hugging_face() -> Iterator[None]:
    """Inside, `import datasets` finds Hugging Face's package; outside, this file, which has the same name."""
    ours, path = sys.modules.pop(__name__), sys.path[:]
    sys.path[:] = [folder for folder in path if not _is_here(folder)]
    sys.modules.update(_THEIRS)
    try:
        yield
    finally:
        if __name__ in sys.modules:
            _THEIRS[__name__] = sys.modules[__name__]
        sys.modules[__name__] = ours
        sys.path[:] = path


_THEIRS: dict[str, ModuleType] = {}  # Hugging Face's package, once it is imported


@cache
def _is_here(folder: str) -> bool:
    return Path(folder).resolve() == Path(__file__).resolve().parent
