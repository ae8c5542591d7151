"""Small images and the flags that data needs."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import asdict

import numpy as np
import torch
from PIL import Image

from options.flags import Args

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def make_args(**changes):
    """The command line's defaults, on digits at 16 pixels, with small batches."""
    small = {"data_set": "DIGITS", "input_size": 16, "batch_size": 8, "num_workers": 0, "dist_eval": False}
    return Namespace(**(asdict(Args()) | small | changes))


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
    """PIL image to bytes [3, H, W], without torchvision."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def to_pixels(tensor):
    """An image, bytes or normalised [3, H, W], as bytes [H, W, 3]."""
    if tensor.dtype != torch.uint8:
        tensor = ((tensor * STD + MEAN) * 255).round().to(torch.uint8)
    return tensor.permute(1, 2, 0).numpy()


def imnet(root, **changes):
    return no_augmentation(data_set="IMNET", data_path=str(root), **changes)


def names(transform):
    """Of a transform's operations."""
    return [type(operation).__name__ for operation in transform.transforms]
