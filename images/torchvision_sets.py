"""torchvision's small data sets under timm's names: `torch/cifar10`, `torch/fashion_mnist`, ..."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torchvision import datasets as torchvision_datasets

from errors import BAD_ARGUMENT, UserError, did_you_mean, reason
from images.found import Found, Samples
from options.flags import Args
from utils import broadcast_object

# timm's names -> torchvision's classes. All hold their images in memory, and have two halves.
SETS: Mapping[str, type[Any]] = {
    "cifar10": torchvision_datasets.CIFAR10,
    "cifar100": torchvision_datasets.CIFAR100,
    "mnist": torchvision_datasets.MNIST,
    "fashion_mnist": torchvision_datasets.FashionMNIST,
    "kmnist": torchvision_datasets.KMNIST,
    "qmnist": torchvision_datasets.QMNIST,
}
OTHERWISE = {
    "imagenet": "--data-set IMNET",
    "image_folder": "--data-set IMNET",
    "folder": "--data-set IMNET",
    "inaturalist": "--data-set INAT or INAT19",
    "inat": "--data-set INAT or INAT19",
}


def torchvision_set(root: Path, is_train: bool, args: Args) -> Found:
    """`torch/NAME` in `--data-path`; `--download` fetches what is missing there.

    Raises:
        UserError: no such set, or it is not there and cannot be downloaded.
    """
    name = args.data_set.removeprefix("torch/").lower()
    if name in OTHERWISE:
        raise UserError(f"--data-set {args.data_set} has another reader here: use {OTHERWISE[name]}")
    if name not in SETS:
        raise UserError(
            f"--data-set {args.data_set} is none of torch/{', torch/'.join(SETS)}.{did_you_mean(name, SETS)}"
        )
    open_set = partial(_open, name, str(root), is_train)
    broadcast_object(lambda: open_set(args.download) and None)  # the main process fetches it for all
    found = open_set(False)
    pixels, labels = found.data, np.asarray(found.targets)
    labels = labels[:, 0] if labels.ndim == 2 else labels  # QMNIST's first column is the digit
    inside = labels.min(initial=0) >= 0 and labels.max(initial=0) < len(found.classes)
    if len(pixels) != len(labels) or not inside:
        raise UserError(
            f"--data-set {args.data_set} in {root} is damaged: {len(pixels)} images, {len(labels)} labels "
            f"{'' if inside else 'beyond the classes '}in one half; remove it, and give --download"
        )
    samples = Samples(np.asarray(pixels), labels)  # [N, H, W] or [N, H, W, 3]
    return Found(samples, [str(label) for label in found.classes], _read, partial(_name, args.data_set))


def _open(name: str, root: str, is_train: bool, download: bool) -> Any:
    try:
        return SETS[name](root, train=is_train, download=download)
    except (OSError, *BAD_ARGUMENT) as error:
        if download:
            raise UserError(
                f"--data-set torch/{name} cannot be downloaded to {root}: {reason(error)}; fetch it elsewhere, and "
                "put it there"
            ) from error
        raise UserError(
            f"--data-set torch/{name} is not in {root}, or is damaged ({reason(error)}): give --download, or put "
            "it there"
        ) from error


def _read(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels).convert("RGB")


def _name(data_set: str, pixels: object) -> str:
    return f"an image of {data_set}"
