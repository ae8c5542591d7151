"""The maps that a head reads: which layers of a timm model they are from, and for which image sizes there are any.

`find_maps` tries the model on a blank image, so it needs no list of families: what timm's `forward_intermediates`
gives is used, and what it does not give is refused. Hooks on the blocks fire in there as in `forward`.

Legend: B images, C channels, D width of a map, L blocks, h x w pixels of a map, H x W of an image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import BAD_ARGUMENT, UserError, reason
from models import build_model

MAPS = 4  # that UperNet reads
Size = tuple[int, int]  # height, width


@dataclass(frozen=True)
class Maps:
    """Where a backbone's maps are.

    Attributes:
        layers: a map each: the block of a plain ViT, the stage of a hierarchical model.
        widths: D of the maps.
        hierarchical: whether the maps have different sizes.
        whole: height and width of which images must be multiples; others are padded below and to the right.
        only: the one image size that the model takes, if its positions are made for one; smaller images are padded.
        normed: whether the model's own final norm is applied.
    """

    layers: tuple[int, ...]
    widths: tuple[int, ...]
    hierarchical: bool
    whole: Size
    only: Size | None = None
    normed: bool = False

    def __call__(self, backbone: Any, images: Tensor) -> list[Tensor]:
        """[B, C, H, W] -> [B, D_i, h_i, w_i] of every layer.

        The blocks after the last layer are not run. Maps of padded images cover the padding too, see `cropped`.

        Raises:
            UserError: the backbone does not take images of this size.
        """
        return self._read(backbone, self._padded(images))

    def _read(self, backbone: Any, images: Tensor) -> list[Tensor]:
        layers = sorted(set(self.layers))
        found = backbone.forward_intermediates(
            images, indices=layers, norm=self.normed, stop_early=True, intermediates_only=True
        )
        by_layer = dict(zip(layers, found, strict=True))
        return [by_layer[layer] for layer in self.layers]

    def covered(self, size: Sequence[int]) -> Size:
        """The height and width to which an image of this size is padded.

        Raises:
            UserError: the backbone does not take images of this size.
        """
        if self.only is None:
            pairs = zip(size, self.whole, strict=True)
            # not by rounded_up: torch.export would understand it so well that it refuses images of one patch
            height, width = (side + -side % multiple for side, multiple in pairs)
            return height, width
        if size[0] > self.only[0] or size[1] > self.only[1]:
            raise UserError(
                f"this backbone takes images of {_shown(self.only)} pixels alone, not {_shown(size)}: predict in "
                "windows of that size, or choose a family of any size (ViT, EVA, Swin)"
            )
        return self.only

    def cropped(self, logits: Tensor, size: Sequence[int]) -> Tensor:
        """Logits without those of the padding alone, for images of this height and width.

        A pixel of the logits that lies partly in the padding stays, so their size is rounded up, as that of the
        reference's maps is.
        """
        pairs = zip(size, logits.shape[-2:], self.covered(size), strict=True)
        height, width = (cells - (covered - side) * cells // covered for side, cells, covered in pairs)
        return logits.narrow(-2, 0, height).narrow(-1, 0, width)

    def _padded(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        below, right = (to - side for to, side in zip(self.covered((height, width)), (height, width), strict=True))
        return F.pad(images, (0, right, 0, below))  # always: an export would remember a branch


def build_backbone(name: str, image_size: Size, **overrides: Any) -> nn.Module:
    """A timm model that takes images of any size, if its family can, with untrained weights.

    Position tables are made for `image_size`; ViTs, EVA and Swin interpolate or extend them to other sizes.

    Raises:
        UserError: as `models.build_model`.
    """
    sized: dict[str, Any] = {"img_size": image_size, **overrides}
    try:
        return build_model(name, dynamic_img_size=True, **sized)
    except UserError as error:
        if "'dynamic_img_size'" not in str(error):
            raise
        return build_model(name, **sized)


def find_maps(
    backbone: Any, image_size: Size, layers: Sequence[int] | None = None, last: bool = False, in_chans: int = 3
) -> Maps:
    """Where a backbone's maps are.

    Args:
        image_size: that the backbone must take.
        layers: blocks of a plain ViT, or stages; by default the ends of the four quarters of the blocks (2, 5, 8
            and 11 of 12), or the last four stages.
        last: instead the last layer alone, after the model's own final norm where that is one of maps.
        in_chans: channels of images.
    Raises:
        UserError: the model gives no maps, has other layers, or does not take such images.
    """
    name = type(backbone).__name__
    strides = _strides(backbone)
    plain = len(set(strides)) == 1
    if layers is None:
        layers = [len(strides) - 1] if last else _default_layers(strides, name)
    unit = "blocks" if plain else "stages"
    if not last and len(layers) != MAPS:
        raise UserError(f"UperNet reads {MAPS} maps: name {MAPS} {unit} of {name} as layers, not {len(layers)}")
    outside = [layer for layer in layers if not 0 <= layer < len(strides)]
    if outside:
        raise UserError(f"{name} has {unit} 0 to {len(strides) - 1}, and no {outside[0]}: choose other layers")
    if list(layers) != sorted(layers):
        raise UserError(f"the layers {', '.join(map(str, layers))} are not in their order: sort them")
    multiples = [_patch(backbone, strides[0])] if plain else [(side, side) for side in (strides[0], strides[-1])]
    norms = [True, False] if last else [False]  # some families assert that their maps have no norm
    maps = Maps(tuple(layers), (), hierarchical=not plain, whole=multiples[0])
    candidates = [replace(maps, whole=whole, normed=normed) for whole in multiples for normed in norms]
    return _tried(backbone, candidates, image_size, in_chans)


def _strides(backbone: Any) -> list[int]:
    """Pixels of an image to a pixel of each layer's map."""
    info = getattr(backbone, "feature_info", None)
    if not hasattr(backbone, "forward_intermediates") or not info:
        raise UserError(
            f"{type(backbone).__name__} gives no maps: timm has no forward_intermediates for it; choose another "
            "backbone, e.g. a ViT, EVA, Swin or PVT"
        )
    return [int(layer["reduction"]) for layer in info]


def _patch(backbone: Any, stride: int) -> Size:
    """Height and width of a plain ViT's patches; its layers' stride is the longer side."""
    size = getattr(getattr(backbone, "patch_embed", None), "patch_size", None)
    if isinstance(size, (tuple, list)) and max(size) == stride:
        return int(size[0]), int(size[1])
    return stride, stride


def _default_layers(strides: list[int], name: str) -> list[int]:
    count = len(strides)
    if len(set(strides)) == 1:
        return [max(quarter * count // MAPS - 1, 0) for quarter in range(1, MAPS + 1)]
    if count < MAPS:
        raise UserError(
            f"UperNet reads the maps of {MAPS} stages, and {name} has {count}: choose another backbone, or --head "
            "linear"
        )
    return list(range(count - MAPS, count))


# ------------------------------------------------------------------------------------------------------------
# Trying a blank image


def _tried(backbone: Any, candidates: list[Maps], image_size: Size, in_chans: int) -> Maps:
    """The first candidate that works at this size and at another; else the first that works at this size."""
    failure: BaseException | None = None
    fixed: Maps | None = None
    for maps in candidates:
        size = maps.covered(image_size)
        try:
            shapes = _shapes(backbone, maps, size, in_chans)
        except BAD_ARGUMENT as error:
            failure = failure or error
            continue
        maps = replace(maps, widths=tuple(shape[1] for shape in shapes))
        other = size[0] + maps.whole[0], size[1] + 2 * maps.whole[1]
        try:
            _shapes(backbone, maps, other, in_chans)
        except BAD_ARGUMENT:
            fixed = fixed or replace(maps, only=size)
            continue
        return maps
    if fixed is not None:
        return fixed
    assert failure is not None
    raise UserError(
        f"{type(backbone).__name__} gives no maps of images of {_shown(image_size)} pixels: {reason(failure)}. "
        "Give another --crop-size, build the backbone for this one, or choose another"
    ) from failure


@torch.no_grad()
def _shapes(backbone: Any, maps: Maps, size: Size, in_chans: int) -> list[torch.Size]:
    """The shapes of the maps of a blank image.

    Raises:
        ValueError: they are no maps [1, D, h, w] of the whole image.
    """
    with _evaluating(backbone):
        found = maps._read(backbone, _blank(backbone, size, in_chans))
    strides = _strides(backbone)
    for layer, each in zip(maps.layers, found, strict=True):
        stride = (strides[layer], strides[layer]) if maps.hierarchical else maps.whole
        sides = zip(each.shape[-2:], size, stride, strict=True)
        if each.ndim != 4 or any(abs(cells - pixels / step) >= 1 for cells, pixels, step in sides):
            raise ValueError(f"layer {layer} gives {list(each.shape)}, not one cell for {_shown(stride)} pixels")
    return [each.shape for each in found]


def parameters_of_maps(backbone: Any, maps: Maps, image_size: Size, in_chans: int = 3) -> set[str]:
    """The names of the parameters on which the maps depend; the others would get no gradient.

    Without part are e.g. a final norm that is not applied, an attention pool, and blocks after the last layer.
    """
    named = {name: each for name, each in backbone.named_parameters() if each.requires_grad}
    with _evaluating(backbone), torch.enable_grad():
        found = maps(backbone, _blank(backbone, image_size, in_chans))
        gradients = torch.autograd.grad([each.sum() for each in found], list(named.values()), allow_unused=True)
    return {name for name, gradient in zip(named, gradients, strict=True) if gradient is not None}


def _blank(backbone: nn.Module, size: Size, in_chans: int) -> Tensor:
    parameter = next(backbone.parameters())
    return torch.zeros(1, in_chans, *size, device=parameter.device, dtype=parameter.dtype)


@contextmanager
def _evaluating(backbone: nn.Module) -> Iterator[None]:
    """Evaluation mode; each module is then in the mode that it was in."""
    modes = [(module, module.training) for module in backbone.modules()]
    backbone.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _shown(size: Sequence[int]) -> str:
    return " x ".join(map(str, size))
