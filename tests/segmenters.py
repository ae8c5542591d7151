"""Tiny segmenters with random values everywhere, and a bilinear resize pixel by pixel, for several test files."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from segmentation.features import build_backbone
from segmentation.network import Segmenter, build_segmenter

CLASSES = 7
TINY = {"patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 3}
SWIN = {"patch_size": 4, "embed_dim": 8, "depths": (1, 1, 1, 2), "num_heads": (1, 1, 2, 2), "window_size": 4}
SMALL = {"channels": 8, "auxiliary_channels": 6}


def segmenter(name: str = "deit_tiny_patch16_224", size: int = 64, seed: int = 0, **options: Any) -> Segmenter:
    torch.manual_seed(seed)
    backbone = build_backbone(name, (size, size), **(SWIN if "swin" in name else TINY))
    heads = {} if options.get("head") == "linear" else SMALL
    return randomised(build_segmenter(backbone, CLASSES, image_size=(size, size), **heads, **options))


def randomised(model: Any, seed: int = 0) -> Any:
    """The model in float64, with random values wherever torch starts from a constant."""
    generator = torch.Generator().manual_seed(seed)
    model.double()
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.endswith("running_var"):
                value.uniform_(0.5, 1.5, generator=generator)
            elif value.is_floating_point() and (value.ndim == 1 or name.startswith("decode_head.conv_seg")):
                value.add_(0.3 * torch.randn(value.shape, generator=generator, dtype=torch.float64))
    return model


def images(*size: int, batch: int = 2, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, *size, generator=generator, dtype=torch.float64)


def bilinear(features: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear resize of [D, h, w] without aligned corners, pixel by pixel."""
    _, h, w = features.shape
    out = np.zeros((len(features), *size))
    for row in range(size[0]):
        for column in range(size[1]):
            y, x = max((row + 0.5) * h / size[0] - 0.5, 0), max((column + 0.5) * w / size[1] - 0.5, 0)
            top, left = int(y), int(x)
            below, right, v, u = min(top + 1, h - 1), min(left + 1, w - 1), y - top, x - left
            upper = (1 - u) * features[:, top, left] + u * features[:, top, right]
            lower = (1 - u) * features[:, below, left] + u * features[:, below, right]
            out[:, row, column] = (1 - v) * upper + v * lower
    return out
