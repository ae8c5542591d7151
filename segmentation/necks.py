"""From a backbone's maps to those that a head reads: a LayerNorm on each, and sizes for those that have but one.

Legend: B images, C channels, D width of a map, h x w pixels of a map.
"""

from __future__ import annotations

from collections.abc import Sequence

from timm.layers import LayerNorm2d
from torch import Tensor, nn

from errors import UserError, did_you_mean
from segmentation.features import Maps
from segmentation.heads import resize, rounded_up

SCALES = ((4, 1), (2, 1), (1, 1), (1, 2))  # of the four maps of a plain ViT, as fractions


class Neck(nn.Module):
    """A LayerNorm over the channels of each pixel of each map: all that a hierarchical backbone needs.

    Args:
        widths: D of the maps.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.norms = nn.ModuleList(LayerNorm2d(width) for width in widths)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """[B, D_i, h_i, w_i] of every map -> what the head reads, as many"""
        return [norm(features) for norm, features in zip(self.norms, maps, strict=True)]


class ScaleNeck(Neck):
    """Four maps of one size become x4, x2, x1 and x1/2: bilinear without aligned corners, x1/2 too.

    There the sides are rounded up; of even sides this is the mean of each 2 x 2 pixels.
    """

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """[B, D, h, w] of four maps -> [B, D, 4h, 4w], [B, D, 2h, 2w], [B, D, h, w], [B, D, h/2, w/2]"""
        pairs = zip(super().forward(maps), SCALES, strict=True)
        return [_scaled(features, scale) for features, scale in pairs]


class MultiLevelNeck(Neck):
    """The same sizes, between a 1 x 1 convolution before the resize and a 3 x 3 convolution after it.

    Source: mmseg's MultiLevelNeck, with its names; it has no LayerNorm, and rounds x1/2 down.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__(widths)
        self.lateral_convs = nn.ModuleList(_Convolution(width, 1) for width in widths)
        self.convs = nn.ModuleList(_Convolution(width, 3) for width in widths)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """[B, D, h, w] of four maps -> [B, D, 4h, 4w], [B, D, 2h, 2w], [B, D, h, w], [B, D, h/2, w/2]"""
        normed = super().forward(maps)
        steps = zip(normed, self.lateral_convs, self.convs, SCALES, strict=True)
        return [conv(_scaled(lateral(features), scale)) for features, lateral, conv, scale in steps]


class DeconvNeck(Neck):
    """The same sizes by learned steps: 2 x 2 transposed convolutions, and a 2 x 2 max-pool.

        x4: deconv, batch norm, GELU, deconv    x2: deconv    x1: nothing    x1/2: max-pool, sides rounded up

    Source: Bao et al., BEiT, 2021, its segmentation code.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__(widths)
        first, second, _, _ = widths
        self.resizes = nn.ModuleList(
            [
                nn.Sequential(_doubling(first), nn.BatchNorm2d(first), nn.GELU(), _doubling(first)),
                _doubling(second),
                nn.Identity(),
                nn.MaxPool2d(2, ceil_mode=True),
            ]
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """[B, D, h, w] of four maps -> [B, D, 4h, 4w], [B, D, 2h, 2w], [B, D, h, w], [B, D, h/2, w/2]"""
        return [step(features) for step, features in zip(self.resizes, super().forward(maps), strict=True)]


NECKS: dict[str, type[Neck]] = {"scale": ScaleNeck, "multilevel": MultiLevelNeck, "deconv": DeconvNeck}


def build_neck(name: str, maps: Maps) -> Neck:
    """The neck of this name for plain ViTs; hierarchical backbones have norms alone.

    Raises:
        UserError: an unknown name, or one that a hierarchical backbone has no use for.
    """
    if name not in NECKS:
        raise UserError(f"unknown neck {name!r}.{did_you_mean(name, NECKS)} There are {', '.join(NECKS)}")
    if maps.hierarchical:
        if name != "scale":
            raise UserError(f"--neck {name} makes sizes for plain ViTs; this backbone has four: drop --neck")
        return Neck(maps.widths)
    return NECKS[name](maps.widths)


class _Convolution(nn.Module):
    """A convolution with a bias, under the name `conv`, that keeps the width and size of its map."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, kernel, padding=kernel // 2)

    def forward(self, features: Tensor) -> Tensor:
        convolved: Tensor = self.conv(features)
        return convolved


def _doubling(width: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(width, width, kernel_size=2, stride=2)


def _scaled(features: Tensor, scale: tuple[int, int]) -> Tensor:
    """[B, D, h, w] -> [B, D, scale h, scale w], rounded up"""
    times, over = scale
    if times == over:
        return features
    height, width = features.shape[-2:]
    return resize(features, (rounded_up(height * times, over), rounded_up(width * times, over)))
