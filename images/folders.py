"""Data sets that are folders of images, or lists of them: ImageNet's form, CIFAR, iNaturalist, the digits."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image
from torchvision.datasets import CIFAR100, ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes

from errors import UserError
from images.decode import Found

DIGITS_TRAIN = 1437  # of scikit-learn's 1,797 digits; the last 360 are for evaluation


def image_folder(root: Path, is_train: bool) -> Found:
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
    compare_classes(train, val, dataset.classes, other_classes)
    empty = sorted(set(range(len(dataset.classes))) - set(dataset.targets))
    if empty:
        more = f" (and {len(empty) - 1} more)" if len(empty) > 1 else ""
        raise UserError(
            f"class folder {folder / dataset.classes[empty[0]]}{more} holds no images "
            f"({', '.join(IMG_EXTENSIONS)}); add some, or remove the folder from {train.name}/ and {val.name}/"
        )
    return Found(dataset.samples, len(dataset.classes))


def compare_classes(train: Path, val: Path, classes: Sequence[str], others: Sequence[str]) -> None:
    """Refuse halves with different class folders: their labels would mean different things."""
    differing = sorted(set(classes) ^ set(others))
    if differing:
        raise UserError(
            f"{train} and {val} must hold the same class folders, but {len(differing)} are in only one of "
            f"them, for example {differing[0]!r}"
        )


def cifar(root: Path, is_train: bool) -> Found:
    try:
        found = CIFAR100(str(root), train=is_train, download=False)
    except RuntimeError as error:
        folder = root / CIFAR100.base_folder
        raise UserError(f"no intact CIFAR-100 in {folder}; unpack {CIFAR100.filename} in {root}") from error
    return Found(list(zip(found.data, found.targets, strict=True)), 100, Image.fromarray)


def digits(is_train: bool, size: int) -> Found:
    """scikit-learn's 8 x 8 handwritten digits, enlarged to size x size: a real task without a download."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError("--data-set DIGITS needs scikit-learn: pip install scikit-learn") from error
    bunch = load_digits()
    half = slice(DIGITS_TRAIN) if is_train else slice(DIGITS_TRAIN, None)
    pixels = (bunch.images[half] * (255 / 16)).round().astype("uint8")  # [N, 8, 8], was 0..16
    images = [Image.fromarray(each).resize((size, size), Image.Resampling.BICUBIC) for each in pixels]
    samples = [
        (np.asarray(image.convert("RGB")), label)
        for image, label in zip(images, bunch.target[half].tolist(), strict=True)
    ]
    return Found(samples, 10, Image.fromarray)


def inaturalist(root: Path, is_train: bool, year: int, category: str) -> Found:
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
