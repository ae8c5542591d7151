"""Mixup and CutMix of a batch with its own reverse, with one soft label per image and one per patch.

Image i is mixed with image B - 1 - i (the batch flipped), so the batch is even. Labels stay compact: two class
indices per image and one weight per image and patch; no dense [B, P, K] tensor is ever built.

Sources: Zhang et al., mixup, 2018; Yun et al., CutMix, 2019; the recipe of DeiT; Chen et al. 2022 for the
per-patch labels. The random draws come in the reference's order from a generator of our own.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from errors import UserError
from mixing import MODES


class Mix(NamedTuple):
    """How an image is mixed: with a box (CutMix: its pixels are the partner's), else by weight (Mixup).

    Attributes:
        weight: lambda, the share of the image's own class; with a box, 1 - (box area) / (image area).
        box: rows [top, bottom) and columns [left, right) as (top, bottom, left, right), or None.
    """

    weight: float
    box: tuple[int, int, int, int] | None = None


UNMIXED = Mix(1.0)


class Labels(NamedTuple):
    """Soft labels of a batch of B images with P patches.

    The label of image b is weight_b own_b + (1 - weight_b) partner_b, smoothed to e/K + (1 - e) on a class;
    that of its patch p the same with patch_weight_bp.

    Attributes:
        own, partner: [B], class indices.
        weight: [B], share of the own class in the image; float64 where the device has it, so that it and
            1 - weight are rounded once, as DeiT rounds them.
        patch_weight: [B, P], share of the own class in each patch.
        smoothing: e.
        mixed: whether images of this run are mixed at all.
    """

    own: Tensor
    partner: Tensor
    weight: Tensor
    patch_weight: Tensor
    smoothing: float
    mixed: bool

    @property
    def floor(self) -> float:
        """0: the cross-entropy takes the logarithm of the probabilities as they are."""
        return 0.0

    def repeat(self, times: int) -> Labels:
        """The labels of a batch that holds all its images so many times, one batch after the other."""
        own, partner, weight = (each.repeat(times) for each in (self.own, self.partner, self.weight))
        return Labels(own, partner, weight, self.patch_weight.repeat(times, 1), self.smoothing, self.mixed)

    def dense(self, num_classes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """The images' labels as probabilities.  [B, K]"""
        off = self.smoothing / num_classes

        def smoothed(label: Tensor) -> Tensor:
            blank = torch.full((len(label), num_classes), off, dtype=dtype, device=label.device)
            return blank.scatter_(1, label[:, None], 1 - self.smoothing + off)  # [B, K]

        weight = self.weight[:, None]  # [B, 1]
        return smoothed(self.own) * weight.to(dtype) + smoothed(self.partner) * (1 - weight).to(dtype)


class Mixup:
    """Draws how to mix each batch, mixes it, and labels images and patches.

    Args:
        mixup_alpha: Mixup's Beta parameter; 0 switches Mixup off.
        cutmix_alpha: CutMix's Beta parameter; 0 switches CutMix off.
        cutmix_minmax: (min, max) share of the image's sides for the CutMix box; overrides cutmix_alpha.
        prob: probability of mixing at all, per batch (per pair, per image).
        switch_prob: probability of CutMix when both are on.
        mode: 'batch' draws once a batch, 'pair' once for each pair of partners, 'elem' for each image.
        smoothing: label smoothing e.
        patch_size: height and width of a patch in pixels; None labels no patches (P = 0).
        seed: of the draws, which are this object's own.
    Raises:
        UserError: a value out of range.
    """

    def __init__(
        self,
        mixup_alpha: float = 0.8,
        cutmix_alpha: float = 1.0,
        cutmix_minmax: tuple[float, float] | None = None,
        prob: float = 1.0,
        switch_prob: float = 0.5,
        mode: str = "batch",
        smoothing: float = 0.1,
        patch_size: tuple[int, int] | None = None,
        seed: int = 0,
    ) -> None:
        if mode not in MODES:
            raise UserError(f"--mixup-mode {mode!r}: choose one of {', '.join(MODES)}")
        for name, value in (("--mixup-prob", prob), ("--mixup-switch-prob", switch_prob)):
            if not 0 <= value <= 1:
                raise UserError(f"{name} {value} is not between 0 and 1")
        if not 0 <= smoothing < 1:
            raise UserError(f"--smoothing {smoothing} must be at least 0 and less than 1")
        if not (0 <= mixup_alpha < np.inf and 0 <= cutmix_alpha < np.inf):
            raise UserError("--mixup and --cutmix must be finite and not negative; 0 switches them off")
        if cutmix_minmax is not None and not 0 <= cutmix_minmax[0] < cutmix_minmax[1] <= 1:
            raise UserError(
                f"--cutmix-minmax {cutmix_minmax}: give two shares of the image's side, 0 <= min < max <= 1"
            )
        self.mixup_alpha = mixup_alpha
        self.cutmix_alpha = 1.0 if cutmix_minmax is not None else cutmix_alpha
        self.cutmix_minmax = cutmix_minmax
        self.prob = prob
        self.switch_prob = switch_prob
        self.mode = mode
        self.smoothing = smoothing
        self.patch_size = patch_size
        self.random = np.random.RandomState(seed)

    @property
    def active(self) -> bool:
        """Whether images are mixed at all."""
        return self.prob > 0 and (self.mixup_alpha > 0 or self.cutmix_alpha > 0)

    def __call__(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Labels]:
        """Mix a batch.

        Args: images [B, C, H, W], targets [B].
        Returns: images [B, C, H, W], and their labels.
        Raises:
            UserError: an odd batch while mixing is on.
        """
        height, width = images.shape[-2:]
        return self.mix(images, targets, self.draw(len(images), height, width))

    # ---------------------------------------------------------------------------------------------- draws

    def draw(self, batch: int, height: int, width: int) -> list[Mix]:
        """Draw how to mix a batch: one Mix for all ('batch' mode), or one for each of its images."""
        if not self.active:
            return [UNMIXED]
        if batch % 2:
            raise UserError(
                f"a batch of {batch} images cannot be mixed in pairs: choose an even --batch-size, "
                "or switch mixing off with --mixup 0 --cutmix 0"
            )
        if self.mode == "batch":
            return [self._draw_one(height, width)]
        if self.mode == "elem":
            return [self._draw_one(height, width) for _ in range(batch)]
        half = [self._draw_one(height, width) for _ in range(batch // 2)]
        return half + half[::-1]

    def _draw_one(self, height: int, width: int) -> Mix:
        if self.prob < 1 and self.random.rand() >= self.prob:
            return UNMIXED
        both = self.mixup_alpha > 0 and self.cutmix_alpha > 0
        cutmix = self.random.rand() < self.switch_prob if both else self.cutmix_alpha > 0
        alpha = self.cutmix_alpha if cutmix else self.mixup_alpha
        weight = float(self.random.beta(alpha, alpha))
        if not cutmix:
            return Mix(weight)
        box = self._draw_box(weight, height, width)
        top, bottom, left, right = box
        return Mix(1 - (bottom - top) * (right - left) / (height * width), box)

    def _draw_box(self, weight: float, height: int, width: int) -> tuple[int, int, int, int]:
        """A box of area 1 - weight around a uniform centre, clipped to the image; or within cutmix_minmax."""
        if self.cutmix_minmax is not None:
            low, high = self.cutmix_minmax
            rows = self.random.randint(int(height * low), max(int(height * high), int(height * low) + 1))
            columns = self.random.randint(int(width * low), max(int(width * high), int(width * low) + 1))
            top = self.random.randint(0, height - rows + 1)
            left = self.random.randint(0, width - columns + 1)
            return top, top + rows, left, left + columns
        side = np.sqrt(1 - weight)
        half_rows, half_columns = int(height * side) // 2, int(width * side) // 2
        row, column = self.random.randint(height), self.random.randint(width)
        return (
            max(row - half_rows, 0),
            min(row + half_rows, height),
            max(column - half_columns, 0),
            min(column + half_columns, width),
        )

    # ---------------------------------------------------------------------------------------------- mixing

    def mix(self, images: Tensor, targets: Tensor, mixes: list[Mix]) -> tuple[Tensor, Labels]:
        """Mix a batch as told.

        Args: images [B, C, H, W], targets [B], mixes: one for all images, or one each.
        """
        batch, _, height, width = images.shape
        partner = targets.flip(0)
        weight = to_device(torch.tensor([mix.weight for mix in mixes], dtype=torch.float64), images.device)
        patch_weight = self._patch_weight(mixes, height, width).to(torch.promote_types(images.dtype, torch.float32))
        patch_weight = to_device(patch_weight, images.device)  # [1 or B, P]
        labels = Labels(
            *(targets, partner, weight.expand(batch), patch_weight.expand(batch, -1)), self.smoothing, self.active
        )
        if all(mix == UNMIXED for mix in mixes):
            return images, labels
        flipped = images.flip(0)
        if len(mixes) == 1:
            return _mix_all(images, flipped, mixes[0]), labels
        blend = torch.tensor([1.0 if mix.box else mix.weight for mix in mixes], dtype=torch.float64)
        blend = to_device(blend, images.device)[:, None, None, None]
        blended = images * blend.to(images.dtype) + flipped * (1 - blend).to(images.dtype)
        inside = _inside(to_device(_boxes(mixes), images.device), height, width)[:, None]  # [B, 1, H, W]
        return torch.where(inside, flipped, blended), labels

    def _patch_weight(self, mixes: list[Mix], height: int, width: int) -> Tensor:
        """Share of each patch's pixels that are the image's own; Mixup's weight everywhere.  [1 or B, P], float64

        Patches are in row-major order. Pixels beyond the last whole patch belong to none.
        """
        if self.patch_size is None:
            return torch.zeros(1, 0, dtype=torch.float64)
        ph, pw = self.patch_size
        top, bottom, left, right = (edge[:, None] for edge in _boxes(mixes).unbind(1))  # [1 or B, 1]
        rows = _overlap(top, bottom, ph, height // ph)  # [1 or B, P rows], pixels of each patch row in the box
        columns = _overlap(left, right, pw, width // pw)  # [1 or B, P columns]
        covered = (rows[:, :, None] * columns[:, None, :]).flatten(1) / (ph * pw)  # [1 or B, P]
        unboxed = torch.tensor([[1.0 if mix.box else mix.weight] for mix in mixes], dtype=torch.float64)
        return unboxed - covered  # of which one is 1 or the other 0


def to_device(numbers: Tensor, device: torch.device) -> Tensor:
    """Host numbers onto a device without making the host wait for it; float64 becomes float32 on MPS."""
    if device.type == "mps" and numbers.dtype == torch.float64:
        numbers = numbers.float()
    return numbers.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else numbers.to(device)


def _boxes(mixes: list[Mix]) -> Tensor:
    """(top, bottom, left, right) of each, empty where there is no box.  [1 or B, 4], float64"""
    return torch.tensor([mix.box or (0, 0, 0, 0) for mix in mixes], dtype=torch.float64)


def _overlap(start: Tensor, end: Tensor, patch: int, count: int) -> Tensor:
    """How many of each patch's pixels lie in [start, end), along one axis.  [n, 1] -> [n, count]"""
    first = torch.arange(count, device=start.device) * patch  # [count]
    return (torch.minimum(first + patch, end) - torch.maximum(first, start)).clamp(min=0)


def _inside(boxes: Tensor, height: int, width: int) -> Tensor:
    """Which pixels lie in each image's box.  [B, 4] -> [B, H, W]"""
    top, bottom, left, right = (edge[:, None] for edge in boxes.unbind(1))  # [B, 1]
    y, x = torch.arange(height, device=boxes.device), torch.arange(width, device=boxes.device)
    return ((y >= top) & (y < bottom))[:, :, None] & ((x >= left) & (x < right))[:, None, :]


def _mix_all(images: Tensor, flipped: Tensor, mix: Mix) -> Tensor:
    """Mix every image of the batch in the same way; `flipped` is used up."""
    if mix.box is None:
        return (images * mix.weight).add_(flipped.mul_(1 - mix.weight))
    top, bottom, left, right = mix.box
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = flipped[:, :, top:bottom, left:right]
    return mixed
