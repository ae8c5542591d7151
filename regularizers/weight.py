"""Weight level: the items are the neurons (rows) of a block's matrices, by default W_q, W_k and W_v."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

FIRST = 0  # '@first' is block 0
DEFAULT_LAYERS = {"set": "all"}
# The reference's power iteration for weights starts from uniform probes and divides without an epsilon.
DEFAULT_ARGUMENTS: Mapping[str, Mapping[str, Any]] = {"cno": {"distribution": "uniform", "eps": 0.0}}

DEFAULT_MATRICES = ("q", "k", "v")

Weights = Callable[[int, Sequence[str]], list[Tensor]]  # block, kinds -> its matrices of these kinds, [m, n, d]


def items(weights: Weights, layers: Iterable[int], matrices: Sequence[str] = DEFAULT_MATRICES) -> list[Tensor]:
    """The matrices of the blocks, stacked by shape so that a measure runs once for all of them.

    The order within a stack is block by block, and within a block that of `matrices`.

    Returns: tensors [M, n, d], one per distinct shape; M matrices of n neurons.
    """
    stacks: dict[torch.Size, list[Tensor]] = {}
    for layer in layers:
        for some in weights(layer, matrices):  # [m, n, d]
            stacks.setdefault(some.shape[1:], []).append(some)
    return [torch.cat(stack) for stack in stacks.values()]
