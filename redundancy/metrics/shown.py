"""What one batch of images shows of a model, in the form that metrics take it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from models.layout import INPUT


class Place(NamedTuple):
    """Where the tokens of an attention map lie in the image.

    Attributes:
        prefix: tokens before the patches.
        size: height and width of the image in pixels.
        grid: rows and columns of the patches in the whole image; None if they are none.
        window: rows and columns of a window, if the model says; else windows are squares.
    """

    prefix: int
    size: tuple[int, int]
    grid: tuple[int, int] | None
    window: tuple[int, int] | None = None


def grid_of(count: int, size: tuple[float, float]) -> tuple[int, int] | None:
    """Rows and columns of that many patches in a rectangle of this height and width; None if they make no grid."""
    height, width = size
    rows = round(math.sqrt(count * height / width)) if count > 0 else 0
    if not rows or count % rows:
        return None
    columns = count // rows
    return (rows, columns) if abs(columns - rows * width / height) < 1 else None


@dataclass(frozen=True)
class Shown:
    """A batch.

    Attributes:
        size: height and width of the images in pixels.
        patches: layer -> the patch tokens of its output, [B, P, D]; -1 is the input of block 0.
        maps: block -> its softmax maps, [B, W, H, n, m], W windows of an image (1 if there are none).
        places: block -> where the tokens of its maps lie.
        logits: [B, K].
        features: [B, D], what the classifier reads; None if that could not be seen.
        patch_logits: [B, P, K]; None if patches cannot be classified.
        labels: [B]; None if there are none.
        grids: layer -> rows and columns of its patches; None if they are none.
        heads: blocks -> the inner products of their heads' maps, [B, W, H, H] of one block, [B, W, l H, l H] of l,
            where they are all that is wanted of attention. Blocks that cannot do without their map are in `maps`.
    """

    size: tuple[int, int]
    patches: dict[int, Tensor]
    maps: dict[int, Tensor]
    places: dict[int, Place]
    logits: Tensor
    features: Tensor | None = None
    patch_logits: Tensor | None = None
    labels: Tensor | None = None
    grids: dict[int, tuple[int, int] | None] = field(default_factory=dict)
    heads: Mapping[tuple[int, ...], Tensor] = field(default_factory=dict)

    def products(self, *blocks: int) -> Tensor | None:
        """The inner products [B, W, k H, k H] of the heads of k of the blocks; None if these are not known."""
        for known, found in self.heads.items():
            if set(blocks) <= set(known):
                count = found.shape[-1] // len(known)  # H, since their maps have one size
                rows = torch.cat([torch.arange(count) + count * known.index(block) for block in blocks])
                rows = rows.to(found.device)
                return found[..., rows[:, None], rows]
        return None

    @property
    def attending(self) -> list[int]:
        """The blocks that show their heads."""
        return sorted({*self.maps, *(block for blocks in self.heads for block in blocks)})


def layer_label(layer: int) -> str:
    """What a layer is called: 'input', '0', '1', ..."""
    return "input" if layer == INPUT else str(layer)
