"""Weight level: the items are the neurons (rows) of a block's matrices, by default W_q, W_k and W_v."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regularizers.level import Level

if TYPE_CHECKING:
    from torch import Tensor


def items(weights: Tensor, prefix_tokens: int) -> Tensor:
    """Neurons of matrices that are alike.  [m, n, d] -> [m, n, d]"""
    return weights


WEIGHT = Level(
    name="weight",
    meaning="the neurons (rows) of a block's weight matrices",
    source="weights",
    items=items,
    shape="neurons x width",
    default_layers={"set": "all"},
    # The reference's power iteration for weights starts from uniform probes and divides without an epsilon.
    default_arguments={"cno": {"distribution": "uniform", "eps": 0.0}},
    matrices={
        "q": "queries",
        "k": "keys",
        "v": "values",
        "proj": "the attention's output projection",
        "fc1": "the MLP's first layer",
        "fc2": "the MLP's second layer",
    },
    default_matrices=("q", "k", "v"),
)
