"""Attention level: the items are the H heads of a block, each its flattened N x N attention map."""

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
    """Heads of a block's attention, prefix tokens included.  [B, H, N, N] -> [B, H, N * N]"""
    return captured.attention[layer].flatten(2)
