"""Patch level: the items are the P patch embeddings of a block, or of what stands before and after all blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regularizers.level import Level

if TYPE_CHECKING:
    from torch import Tensor


def items(tokens: Tensor, prefix_tokens: int) -> Tensor:
    """Patch embeddings, without prefix tokens.  [B, N, D] -> [B, P, D]"""
    return tokens[:, prefix_tokens:]


PATCH = Level(
    name="patch",
    meaning="the patch embeddings of a block",
    source="tokens",
    items=items,
    shape="patches x width",
    first=-1,
    ends=True,
    own_layers={"context": "embed:norm"},
    default_layers={"set": "last", "pair": "first:last", "gradient": "last", "labels": "last"},
    default_arguments={"so": {"normalize": True}, "cno": {"normalize": True}},
)
