"""What is wanted of a forward pass, and what it shows.

Legend: B images, P patches, T prefix tokens, N = P + T tokens, D width, H heads, L blocks, K classes, R regions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from models.attentions import Blocks

Weights = Callable[[int, Sequence[str]], list[Tensor]]  # block, kinds -> its matrices of these kinds, [m, n, d]


@dataclass(frozen=True)
class Needs:
    """What an objective wants to see.

    Attributes:
        tokens: block indices whose output tokens are wanted; -1 is the input of block 0, -2 the patch embeddings
            before their positions are added, and L, the number of blocks, the final features.
        attention: block indices whose attention map is wanted.
        heads: blocks, one or two, the inner products of whose heads' maps are wanted: (3,) or (0, 11). Where they
            cannot be had without the maps, the maps take their place.
        wide: whether these are to be added up in float64.
        weights: blocks and matrices that are wanted, e.g. (0, 'q'); they are read, no hook is needed.
        patch_logits: whether every patch is to be classified.
    """

    tokens: frozenset[int] = frozenset()
    attention: frozenset[int] = frozenset()
    weights: frozenset[tuple[int, str]] = frozenset()
    patch_logits: bool = False
    heads: frozenset[Blocks] = frozenset()
    wide: bool = False

    def __or__(self, other: Needs) -> Needs:
        return Needs(
            self.tokens | other.tokens,
            self.attention | other.attention,
            self.weights | other.weights,
            self.patch_logits or other.patch_logits,
            self.heads | other.heads,
            self.wide or other.wide,
        )

    def __bool__(self) -> bool:
        return bool(self.tokens or self.attention or self.weights or self.patch_logits or self.heads)

    @property
    def attending(self) -> frozenset[int]:
        """The blocks of whose attention something is wanted."""
        return self.attention | {block for blocks in self.heads for block in blocks}

    def without(self, can_serve: Callable[[Blocks], bool]) -> Needs:
        """The same, with maps in place of inner products of blocks that cannot be served.

        A block that forms its map for anything forms it for all that is wanted of it.
        """
        heads, maps = self.heads, self.attention
        while True:
            heads = frozenset(blocks for blocks in heads if can_serve(blocks) and maps.isdisjoint(blocks))
            more = self.attention | {block for blocks in self.heads - heads for block in blocks}
            if more == maps:
                return Needs(self.tokens, maps, self.weights, self.patch_logits, heads, self.wide)
            maps = more


NOTHING = Needs()


class PatchLoss(NamedTuple):
    """The mean, a scalar, over so many patches of an image."""

    value: Tensor
    patches: int


class Captured(NamedTuple):
    """What one forward pass shows. A NamedTuple, so that DDP and compile find the tensors in it.

    Attributes:
        logits: [B, K], the model's own prediction; the class token's while a distilled student is in training.
        dist_logits: [B, K], the distillation token's prediction, from a distilled student in training.
        patch_logits: [B, P, K], every patch of the last block through the patches' head, if asked for; of a head
            that mixes regions [B, R, K].
        tokens: block index -> [B, N, D], the block's output; -1 is the input of block 0, -2 the patch embeddings
            [B, P, D] before their positions are added, L the final features, final norm included.
        attention: block index -> [..., H, n, m], after the softmax, before dropout. For a plain ViT this is
            [B, H, N, N]; windows come before the heads, [B * windows, H, n, n] or [B, windows, H, n, n]; reduced
            keys make m < n; XCiT's maps are between the channels of a head, not between tokens.
        prefix_tokens: block index -> T, how many of the N tokens come before the patches.
        products: blocks -> the inner products of their heads' maps, G of `models.products`: [..., H, H] of one
            block, [..., 2 H, 2 H] of two.
        patch_loss: in place of patch_logits, the mean over all patches of what is minimised of theirs.
    """

    logits: Tensor
    dist_logits: Tensor | None
    patch_logits: Tensor | None
    tokens: dict[int, Tensor]
    attention: dict[int, Tensor]
    prefix_tokens: dict[int, int]
    products: Mapping[Blocks, Tensor] = {}
    patch_loss: PatchLoss | None = None
