"""3-Augment, the augmentation of DeiT III, beside the crop: its operations in its order, with its random draws.

Source: Touvron, Cord and Jégou, DeiT III: Revenge of the ViT, 2022, and its code.
"""

from __future__ import annotations

import random
from typing import Any

from PIL import Image, ImageFilter, ImageOps
from torchvision import transforms


def operations(color_jitter: float) -> list[Any]:
    """Grey, solarised or blurred, each as likely; then brightness, contrast and saturation, by up to that share."""
    jitter = [transforms.ColorJitter(color_jitter, color_jitter, color_jitter)] if color_jitter else []
    return [transforms.RandomChoice([grey, solarised, blurred]), *jitter]


def grey(image: Image.Image) -> Image.Image:
    """The three channels alike."""
    _draw()
    return image.convert("L").convert("RGB")


def solarised(image: Image.Image) -> Image.Image:
    """Values from 128 on inverted."""
    _draw()
    return ImageOps.solarize(image)


def blurred(image: Image.Image) -> Image.Image:
    """By a Gaussian of a radius from 0.1 to 2 pixels."""
    _draw()
    return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


def _draw() -> None:
    """DeiT draws here whether to do it at all, with probability 1."""
    random.random()
