"""Attention level: the items are the H heads of a block, each its flattened attention map."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from models.capture import Captured

FIRST = 0  # '@first' is block 0
DEFAULT_LAYERS = {"set": "0", "pair": "first:last"}
DEFAULT_ARGUMENTS: Mapping[str, Mapping[str, Any]] = {}


def items(captured: Captured, layer: int) -> Tensor:
    """Heads of a block's attention, prefix tokens included.  [..., H, n, m] -> [..., H, n * m]

    A plain ViT's leading dimension is the image; windowed attention has its windows there as well, so a term is
    the mean over images and windows.
    """
    return captured.attention[layer].flatten(-2)
