"""Weight level: the items are the neurons (rows) of W_q, W_k and W_v of a block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

FIRST = 0  # '@first' is block 0
DEFAULT_LAYERS = {"set": "all"}
# The reference's power iteration for weights starts from uniform probes and divides without an epsilon.
DEFAULT_ARGUMENTS: Mapping[str, Mapping[str, Any]] = {"cno": {"distribution": "uniform", "eps": 0.0}}

Projections = Callable[[int], tuple[Tensor, Tensor, Tensor]]  # block -> W_q, W_k, W_v, each [n, d]


def items(projections: Projections, layers: Iterable[int]) -> list[Tensor]:
    """W_q, W_k, W_v of the blocks, stacked by shape so that a measure runs once for all of them.

    The order within a stack is block by block, q then k then v.

    Returns: tensors [M, n, d], one per distinct shape; M matrices of n neurons.
    """
    stacks: dict[torch.Size, list[Tensor]] = {}
    for layer in layers:
        for matrix in projections(layer):
            stacks.setdefault(matrix.shape, []).append(matrix)
    return [torch.stack(matrices) for matrices in stacks.values()]
