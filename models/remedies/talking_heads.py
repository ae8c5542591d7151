"""Talking heads: linear maps between the heads, before and after the softmax."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from models.layout import Layout
from models.remedies.attending import MapRemedy, refuse


class TalkingHeads(MapRemedy):
    r"""Mix the heads' scores before the softmax, and their maps after it.

        A'_h = sum_g V_hg softmax( sum_f W_gf S_f )_g

    W and V [H, H] have no bias. They start as the identity, where A' = A; with `random` as Patch Diversification's
    code has them, from a truncated normal with deviation 0.02. They have weight decay. There is no form without the
    map.

    Args:
        heads: H.
        random: start from random numbers.
    Source: Shazeer et al., Talking-Heads Attention, 2020 (arXiv 2003.02436).
    """

    name = "talking_heads"
    needs_map = True
    keeps_rows = False

    def __init__(self, heads: int, *, random: bool = False) -> None:
        super().__init__(heads)
        self.proj_pre = nn.Linear(heads, heads, bias=False)
        self.proj_post = nn.Linear(heads, heads, bias=False)
        for layer in (self.proj_pre, self.proj_post):
            if random:
                nn.init.trunc_normal_(layer.weight, std=0.02)
            else:
                nn.init.eye_(layer.weight)

    @classmethod
    def install(cls, layout: Layout, blocks: Sequence[int], **options: Any) -> None:
        """Put one into each attention of these blocks.

        Raises:
            UserError: it is not defined there.
        """
        for block in blocks:
            for attention in layout.attentions(block):
                kind = type(attention).__name__
                if hasattr(attention, "proj_l"):
                    refuse(layout, block, cls.name, f"the heads of {kind} talk already")
                if _is_shifted(layout.blocks[block]):
                    refuse(layout, block, cls.name, "its shifted windows mask scores, and masks must not be mixed")
                if hasattr(attention, "gating_param"):
                    refuse(layout, block, cls.name, f"the map of {kind} is made of two softmaxes")
        super().install(layout, blocks, **options)

    def on_scores(self, scores: Tensor) -> Tensor:
        """The mixed scores [..., H, n, m]."""
        return _mixed(scores, self.proj_pre)

    def on_map(self, attention: Tensor) -> Tensor:
        """A' of the softmax of the mixed scores, [..., H, n, m]."""
        return _mixed(attention, self.proj_post)


def _is_shifted(block: nn.Module) -> bool:
    """Whether a block's windows are shifted, so that tokens from opposite borders lie in one."""
    shift: Any = getattr(block, "shift_size", 0)
    return any(shift) if isinstance(shift, (tuple, list)) else bool(shift)


def _mixed(x: Tensor, layer: nn.Linear) -> Tensor:
    """A linear layer over the heads.  [..., H, n, m] -> the same"""
    mixed: Tensor = layer(x.movedim(-3, -1)).movedim(-1, -3)
    return mixed
