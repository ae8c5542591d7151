"""Attention level: the items are the H heads of a block, each its flattened attention map."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regularizers.level import Level

if TYPE_CHECKING:
    from torch import Tensor


def items(attention: Tensor, prefix_tokens: int) -> Tensor:
    """Heads of a block's attention, prefix tokens included.  [..., H, n, m] -> [..., H, n * m]

    A plain ViT's leading dimension is the image; windowed attention has its windows there as well, so a term is
    the mean over images and windows.
    """
    return attention.flatten(-2)


ATTENTION = Level(
    name="attn",
    meaning="the heads of a block, each its flattened attention map",
    source="attention",
    items=items,
    shape="heads x map",
    default_layers={"set": "0", "pair": "first:last"},
)
