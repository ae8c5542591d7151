"""Patch Diversification's mix: a rectangle of whole patches keeps the image, the rest is another image's.

A batch first goes through Mixup or CutMix as the flags say. Then image i of what comes out is mixed with image
order_i, where `order` is a random permutation of the batch, so that images may be their own partners. All draws
come from one generator.

Source: Gong et al., Vision Transformers with Patch Diversification, 2021, and its code. The order of its draws is
kept: share, length, top, left, permutation.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mixing import mixup


class Rectangle(NamedTuple):
    """Rows [top, bottom) and columns [left, right) of the grid of patches; none if one of the two is empty."""

    top: int
    bottom: int
    left: int
    right: int


class Labels(NamedTuple):
    """Soft labels of a batch of B images with P patches, of which a rectangle is the image's own.

    With y_b what Mixup and CutMix made the label of image b, its label is r y_b + (1 - r) y_order(b), r = `rate`.

    Attributes:
        first: the labels after Mixup and CutMix.
        order: [B], which image is the partner of each.
        regions: [2, P], 1 where a patch is the image's own, and 1 where it is its partner's; row by row.
    """

    first: mixup.Labels
    order: Tensor
    regions: Tensor

    @property
    def own(self) -> Tensor:
        """[B], the class of each image before anything was mixed."""
        return self.first.own

    @property
    def smoothing(self) -> float:
        """Label smoothing e."""
        return self.first.smoothing

    @property
    def mixed(self) -> bool:
        """Images are always mixed."""
        return True

    @property
    def floor(self) -> float:
        """1e-8: the published code takes log(1e-8 + probability)."""
        return 1e-8

    @property
    def shares(self) -> Tensor:
        """[2], r and 1 - r: how much of the patches each region has."""
        return self.regions.mean(dim=1)

    def of_regions(self, num_classes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """The labels of what each region shows, as probabilities.  [B, 2, K]"""
        own = self.first.dense(num_classes, dtype)  # [B, K]
        return torch.stack([own, own[self.order]], dim=1)

    def dense(self, num_classes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """The images' labels as probabilities.  [B, K]"""
        return (self.of_regions(num_classes, dtype) * self.shares.to(dtype)[:, None]).sum(dim=1)

    def repeat(self, times: int) -> Labels:
        """The labels of a batch that holds all its images so many times, one batch after the other."""
        batch = len(self.order)
        order = torch.cat([self.order + number * batch for number in range(times)])
        return Labels(self.first.repeat(times), order, self.regions)


class PatchGrid:
    """Draws how to mix each batch, mixes it, and labels images and regions.

    Args:
        patch_size: height and width of a patch in pixels.
        seed: of all draws.
        options: the other keyword arguments of `Mixup`, which comes first.
    Raises:
        UserError: a value out of range.
        ValueError: no patch size.
    """

    def __init__(self, *, patch_size: tuple[int, int] | None = None, seed: int = 0, **options: Any) -> None:
        if patch_size is None:
            raise ValueError("PatchGrid mixes whole patches: give their size")
        self.patch_size = patch_size
        self.mixup = mixup.Mixup(**options, seed=seed)
        self.random: np.random.RandomState = self.mixup.random

    def __call__(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Labels]:
        """Mix a batch.

        Args: images [B, C, H, W], targets [B].
        Returns: images [B, C, H, W], and their labels.
        Raises:
            UserError: an odd batch while Mixup or CutMix is on.
        """
        images, labels = self.mixup(images, targets)
        return self.mix(images, labels, *self.draw(len(images), *self.grid(images)))

    def grid(self, images: Tensor) -> tuple[int, int]:
        """Rows and columns of whole patches in images [B, C, H, W]."""
        return images.shape[-2] // self.patch_size[0], images.shape[-1] // self.patch_size[1]

    def draw(self, batch: int, rows: int, columns: int) -> tuple[Rectangle, list[int]]:
        """Draw a rectangle of about a uniform share of the patches, and a partner for each image.

        Of P = rows columns patches it is to have a = floor(P l), l uniform. Its length (in rows) is uniform from 1
        to max(1, min(rows, a) - 1), its width a // length; where that is more than there are columns, the width is
        all of them and the length a // columns. Its place is uniform. With a = 0 it is empty.

        Returns: the rectangle, and a permutation of 0 .. batch - 1.
        """
        area = int(rows * columns * self.random.beta(1.0, 1.0))
        length = int(self.random.randint(1, max(1, min(rows, area) - 1) + 1))
        width = area // length
        if width > columns:
            length, width = area // columns, columns
        top = int(self.random.randint(0, max(0, rows - length) + 1))
        left = int(self.random.randint(0, max(0, columns - width) + 1))
        order = self.random.permutation(batch).tolist()
        return Rectangle(top, top + length, left, left + width), order

    def mix(
        self, images: Tensor, labels: mixup.Labels, rectangle: Rectangle, order: list[int]
    ) -> tuple[Tensor, Labels]:
        """Mix a batch as told.

        Pixels beyond the last whole patch stay the image's own.

        Args: images [B, C, H, W], their labels, the patches that stay the image's own, and its partner.
        """
        rows, columns = self.grid(images)
        own = torch.zeros(rows, columns)  # [rows, columns]
        own[rectangle.top : rectangle.bottom, rectangle.left : rectangle.right] = 1
        regions = torch.stack([own, 1 - own]).flatten(1).to(torch.promote_types(images.dtype, torch.float32))
        regions = mixup.to_device(regions, images.device)  # [2, P]
        partner = mixup.to_device(torch.tensor(order), images.device)  # [B]
        mixed = images[partner]
        (height, width), (top, bottom, left, right) = self.patch_size, rectangle
        kept = slice(top * height, bottom * height), slice(left * width, right * width)
        mixed[..., kept[0], kept[1]] = images[..., kept[0], kept[1]]
        mixed[..., rows * height :, :] = images[..., rows * height :, :]
        mixed[..., columns * width :] = images[..., columns * width :]
        return mixed, Labels(labels, partner, regions)
