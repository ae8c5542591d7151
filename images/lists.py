"""Data sets that list their images and labels themselves: CIFAR-100, iNaturalist, scikit-learn's digits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image
from torchvision.datasets import CIFAR100

from errors import UserError
from images.found import Found, Samples, Texts

DIGITS_TRAIN = 1437  # of scikit-learn's 1,797 digits; the last 360 are for evaluation


def cifar(root: Path, is_train: bool) -> Found:
    """CIFAR-100 as its authors' archive unpacks."""
    try:
        found = CIFAR100(str(root), train=is_train, download=False)
    except RuntimeError as error:
        folder = root / CIFAR100.base_folder
        raise UserError(f"no intact CIFAR-100 in {folder}; unpack {CIFAR100.filename} in {root}") from error
    return Found(Samples(found.data, found.targets), found.classes, Image.fromarray)


def digits(is_train: bool, size: tuple[int, int]) -> Found:
    """scikit-learn's 8 x 8 handwritten digits, enlarged to height x width: a real task without a download."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError("--data-set DIGITS needs scikit-learn: pip install scikit-learn") from error
    bunch = load_digits()
    half = slice(DIGITS_TRAIN) if is_train else slice(DIGITS_TRAIN, None)
    pixels = (bunch.images[half] * (255 / 16)).round().astype("uint8")  # [N, 8, 8], was 0..16
    height, width = size
    images = [Image.fromarray(each).resize((width, height), Image.Resampling.BICUBIC) for each in pixels]
    pictures = np.stack([np.asarray(image.convert("RGB")) for image in images])  # [N, H, W, 3]
    return Found(Samples(pictures, bunch.target[half]), [str(name) for name in bunch.target_names], Image.fromarray)


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
    sources = Texts((str(root / place(name)) for name, _ in files))
    return Found(Samples(sources, [label for _, label in files]), list(labels))


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
