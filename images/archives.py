"""Images inside tar files: where they are, so that each can be read by itself, in any order and by any process."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import IO, NamedTuple

from PIL import Image
from timm.data import create_dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from errors import UserError
from images.decode import Found, Sample, decode
from images.folders import compare_classes
from utils import broadcast_object, print_main


class Stored(NamedTuple):
    """An image inside a tar file: the bytes from `offset` on."""

    path: str
    offset: int
    size: int
    name: str

    def open(self) -> IO[bytes]:
        """The image's bytes. The tar file is opened for them alone: processes can share no position in it."""
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return io.BytesIO(file.read(self.size))


def find_in_folders(path: Path) -> tuple[list[tuple[Stored, int]], list[str]]:
    """The images of a tar file of folders, or of one tar file per class; their labels, and the classes' names.

    timm finds them. Of large files it keeps what it found in a file beside them, where it may.

    Raises:
        UserError: no tar file, or not of this form.
    """
    try:
        reader = create_dataset("", root=str(path), cache_tarinfo=_may_cache(path.parent)).reader
    except (OSError, ValueError, AssertionError, EOFError, tarfile.TarError, pickle.PickleError) as error:
        raise UserError(f"cannot read {path}: {error}; it must hold one folder of images per class") from error
    classes = sorted(reader.class_name_to_idx)  # folders' order, also below; timm has class10 after class2
    if "" in classes:
        raise UserError(f"{path} holds images that are in no folder; it must hold one folder of images per class")
    labels = {reader.class_name_to_idx[name]: label for label, name in enumerate(classes)}
    samples: list[tuple[Stored, int]] = []
    for (member, _, inner), target in zip(reader.samples, reader.targets, strict=True):
        offset = member.offset_data + (inner.offset_data if inner is not None else 0)
        name = f"{inner.name}/{member.name}" if inner is not None else member.name
        samples.append((Stored(str(path), offset, member.size, name), labels[int(target)]))
    return sorted(samples, key=lambda sample: (sample[1], sample[0].name)), classes


def _may_cache(folder: Path) -> bool | None:
    """timm's own choice, by size, where the folder can be written to."""
    return None if os.access(folder, os.W_OK) else False


def find_in_shards(paths: Sequence[Path]) -> list[tuple[Stored, int]]:
    """The images of WebDataset's shards, in their order, with their labels.

    What belongs to a sample has one name up to the first dot: `key.jpg` (or another image), and `key.cls`, a class
    index as text. Other members are left alone.

    Raises:
        UserError: no tar file, a label that is no index, or a sample that is not one image and one label.
    """
    samples: list[tuple[Stored, int]] = []
    for path in paths:
        try:
            images, labels = _images_and_labels(path)
        except (OSError, EOFError, tarfile.TarError) as error:
            raise UserError(
                f"cannot read the shard {path}: {error}; shards are tar files, not compressed"
            ) from error
        for key in images.keys() ^ labels.keys():
            lack = f"{images[key].name} without {key}.cls" if key in images else f"{key}.cls without an image"
            raise UserError(f"the shard {path} has {lack}; a sample is an image and its class index")
        samples += [(image, labels[key]) for key, image in images.items()]
    return samples


def _images_and_labels(path: Path) -> tuple[dict[str, Stored], dict[str, int]]:
    """What a shard holds, by key."""
    images: dict[str, Stored] = {}
    labels: dict[str, int] = {}
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            folder, _, base = member.name.rpartition("/")
            stem, _, kind = base.partition(".")
            key = f"{folder}/{stem}".lstrip("/")
            file = tar.extractfile(member) if kind.lower() == "cls" else None
            if file is not None and key not in labels:
                content = file.read()
                if not content.strip().isdigit():
                    raise UserError(
                        f"the label {member.name} in the shard {path} is {content!r}, not a class index"
                    )
                labels[key] = int(content)
            elif f".{kind.lower()}" in IMG_EXTENSIONS and member.isfile() and key not in images:
                images[key] = Stored(str(path), member.offset_data, member.size, member.name)
            elif f".{kind.lower()}" in (".cls", *IMG_EXTENSIONS) and member.isfile():
                raise UserError(f"the shard {path} has {key} twice; a sample is one image and its class index")
    return images, labels


# ------------------------------------------------------------------------------------------------------------
# Halves of data sets


def load_stored(image: Stored) -> Image.Image:
    """Decode an image inside a tar file, as `load_image` does."""
    return decode(image.open, f"{image.path}:{image.name}")


def tar(root: Path, is_train: bool) -> Found:
    """`train.tar` and `val.tar`: each holds one folder, or one tar file, of images per class."""
    train, val = root / "train.tar", root / "val.tar"
    path = train if is_train else val
    if not path.is_file():
        raise UserError(f"no file {path}; --data-path must hold train.tar and val.tar with a folder per class")
    samples, classes = _tar_index(path)
    if is_train and val.is_file():  # the other way round an evaluation would read all of train.tar
        compare_classes(train, val, classes, _tar_index(val)[1])
    return Found(samples, len(classes), load_stored)


@cache
def _tar_index(path: Path) -> tuple[list[Sample], list[str]]:
    """What is in a tar file; the main process looks for all."""
    index: tuple[list[Sample], list[str]] = broadcast_object(lambda: find_in_folders(path))
    return index


def shards(root: Path, is_train: bool) -> Found:
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
