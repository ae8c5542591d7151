"""What makes classes of feature maps: UperNet's head, the auxiliary head, a linear head, and their loss.

The heads of segmentation_models_pytorch (UPerNetDecoder) and transformers (UperNetHead) compute the same function,
once the parameters are renamed. They have no dropout before the classifier, other names than mmseg's checkpoints,
and, in the first, a LayerNorm on every map that cannot be left out; each costs a package of its own. So the head is
written here, with mmseg's names, and tests/test_segmentation_network.py compares it with transformers'.

Legend: B images, C channels, D width of a map, K classes, h x w pixels of a map, H x W of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regularizers.primitives import full_precision


def resize(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear, without aligned corners.  [B, D, h, w] -> [B, D, *size]"""
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)


Number = TypeVar("Number", int, Tensor)


def rounded_up(number: Number, by: int) -> Number:
    """number / by, rounded up, for numbers from 1. (Not as -(-n // by): ONNX rounds towards zero.)"""
    return (number - 1) // by + 1


class AdaptiveMean(nn.AdaptiveAvgPool2d):
    r"""Mean over s x s cells of a map, which can be exported for images of any size.

        y = A_h x A_w^T,   A_n [s, n] = 1 / length of cell i from floor(i n / s) to ceil((i + 1) n / s), else 0

    torch computes this by itself, but exports loops over the cells of one size.

    Args:
        cells: s.
    """

    def __init__(self, cells: int) -> None:
        super().__init__(cells)
        self.cells = cells

    def forward(self, features: Tensor) -> Tensor:
        """[B, D, h, w] -> [B, D, s, s]"""
        if not torch.compiler.is_exporting():
            return super().forward(features)
        height, width = features.shape[-2:]
        return self._means(height, features) @ features @ self._means(width, features).mT

    def _means(self, length: int, like: Tensor) -> Tensor:
        """A_n, [s, n]"""
        cell = torch.arange(self.cells, device=like.device)[:, None]
        first, last = cell * length // self.cells, rounded_up((cell + 1) * length, self.cells)
        place = torch.arange(length, device=like.device)
        return ((first <= place) & (place < last)).to(like.dtype) / (last - first)


class ConvNormReLU(nn.Module):
    """A convolution that keeps the size of its map, batch norm and ReLU.  [B, D, h, w] -> [B, C, h, w]

    Weights start as mmcv's do: normal, of the deviation that keeps the size of gradients (He et al. 2015).
    """

    def __init__(self, width: int, channels: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, channels, kernel, padding=kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, features: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(features)))


class UperHead(nn.Module):
    r"""UperNet: pyramid pooling of the last map, and a feature pyramid down to the first.

        p   = conv3([x_3, up(conv1(pool_1 x_3)), ..., up(conv1(pool_6 x_3))])
        y_3 = p,   y_i = conv1(x_i) + up(y_{i+1}),   i = 2, 1, 0
        logits = W dropout(conv3([conv3(y_0), up(conv3(y_1)), up(conv3(y_2)), up(p)])) + b

    Every conv is a convolution without bias, batch norm and ReLU; `up` is `resize` to the size of the map that it
    meets, `pool_s` the adaptive mean over s x s cells.

    Args:
        widths: D of the maps, the largest map first.
        classes: K.
        channels: C.
        dropout: of whole channels, before the classifier.
        scales: of the pyramid pooling.
    Source: Xiao et al., Unified Perceptual Parsing for Scene Understanding, 2018; names as in mmseg.
    """

    def __init__(
        self,
        widths: Sequence[int],
        classes: int,
        channels: int = 512,
        dropout: float = 0.1,
        scales: Sequence[int] = (1, 2, 3, 6),
    ) -> None:
        super().__init__()
        *lower, top = widths
        self.conv_seg = nn.Conv2d(channels, classes, 1)
        self.dropout = nn.Dropout2d(dropout)
        self.psp_modules = nn.ModuleList(
            nn.Sequential(AdaptiveMean(scale), ConvNormReLU(top, channels, 1)) for scale in scales
        )
        self.bottleneck = ConvNormReLU(top + len(scales) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(ConvNormReLU(width, channels, 1) for width in lower)
        self.fpn_convs = nn.ModuleList(ConvNormReLU(channels, channels, 3) for _ in lower)
        self.fpn_bottleneck = ConvNormReLU(len(widths) * channels, channels, 3)
        start_classifier(self.conv_seg)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """[B, D_i, h_i, w_i] of every map -> logits [B, K, h_0, w_0]"""
        *lower, top = features
        pooled = [resize(pool(top), top.shape[-2:]) for pool in self.psp_modules]  # [B, C, h_3, w_3] each
        pyramid = self.bottleneck(torch.cat([top, *pooled], dim=1))
        levels = [pyramid]
        for lateral, features_below in zip(reversed(self.lateral_convs), reversed(lower), strict=True):
            below = lateral(features_below)
            levels.insert(0, below + resize(levels[0], below.shape[-2:]))
        levels = [conv(level) for conv, level in zip(self.fpn_convs, levels[:-1], strict=True)] + [pyramid]
        size = levels[0].shape[-2:]
        joined = torch.cat([levels[0], *(resize(level, size) for level in levels[1:])], dim=1)
        logits: Tensor = self.conv_seg(self.dropout(self.fpn_bottleneck(joined)))
        return logits


class FCNHead(nn.Module):
    """One 3 x 3 convolution with batch norm and ReLU, dropout and a classifier, on one of the maps.

    Args:
        width: D of that map.
        classes: K.
        channels: C.
        dropout: of whole channels, before the classifier.
        reads: index of the map.
    Source: Long et al., Fully Convolutional Networks for Semantic Segmentation, 2015; names as in mmseg.
    """

    def __init__(self, width: int, classes: int, channels: int = 256, dropout: float = 0.1, reads: int = 2) -> None:
        super().__init__()
        self.reads = reads
        self.conv_seg = nn.Conv2d(channels, classes, 1)
        self.dropout = nn.Dropout2d(dropout)
        self.convs = nn.Sequential(ConvNormReLU(width, channels, 3))
        start_classifier(self.conv_seg)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """[B, D_i, h_i, w_i] of every map -> logits [B, K, h, w], as large as the map that it reads"""
        logits: Tensor = self.conv_seg(self.dropout(self.convs(features[self.reads])))
        return logits


class LinearHead(nn.Module):
    """Batch norm and a linear classifier on each patch of the last map: what the features say by themselves.

    Source: Oquab et al., DINOv2, 2023, linear segmentation; names as in its code.
    """

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(width)
        self.conv_seg = nn.Conv2d(width, classes, 1)
        start_classifier(self.conv_seg)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """[B, D, h, w] of the last map -> logits [B, K, h, w]"""
        logits: Tensor = self.conv_seg(self.bn(features[-1]))
        return logits


def start_classifier(layer: nn.Conv2d) -> None:
    """Draw the weights of a classifier as mmseg does: normal with deviation 0.01, biases 0."""
    nn.init.normal_(layer.weight, std=0.01)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def pixel_cross_entropy(logits: Tensor, masks: Tensor, ignore_label: int = 255) -> Tensor:
    r"""Cross-entropy of every pixel, as a mean over all of them; those that are ignored count as 0.

        L = - 1/(B H W) sum_p [y_p != ignore] log softmax(up(z))_{p, y_p}

    In at least float32. Dividing by all pixels, not by the labelled ones, is the reference's choice: an image with
    few labels weighs little.

    Args: logits z [B, K, h, w]; masks y [B, H, W], labels of any integer type.  Returns: scalar.
    """
    upsampled = resize(full_precision(logits), masks.shape[-2:])  # [B, K, H, W]
    total = F.cross_entropy(upsampled, masks.long(), ignore_index=ignore_label, reduction="sum")
    return total / masks.numel()
