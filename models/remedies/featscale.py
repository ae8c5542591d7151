"""FeatScale: the mean of the tokens that attention returns, and the rest of them, scaled apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from errors import UserError
from models.layout import Layout
from models.remedies.attending import refuse, settle


class FeatScale(nn.Module):
    r"""Weigh the mean over tokens and the deviation from it by two vectors.

        y' = (1 + c s) m + (1 + c t) (y - m),   m = 1/N sum_i y_i

    y [B, N, D] is what the attention module returns, projection included, before the residual sum; in windows, the
    tokens of a window. s and t [D] start at 0, where y' = y; they have no weight decay. c = 2, since the original's
    code adds them twice; `paper` is c = 1, as its equation has it.

    Args:
        width: D.
        paper: c = 1.
    Source: Wang et al., Anti-Oversmoothing in Deep Vision Transformers via the Fourier Domain Analysis, 2022
        (arXiv 2203.05962).
    """

    name = "featscale"

    def __init__(self, width: int, *, paper: bool = False) -> None:
        super().__init__()
        self.factor = 1.0 if paper else 2.0
        self.lamb1 = nn.Parameter(torch.zeros(width))  # s, of the mean
        self.lamb2 = nn.Parameter(torch.zeros(width))  # t, of the rest

    @classmethod
    def install(cls, layout: Layout, blocks: Sequence[int], **options: Any) -> None:
        """Put one behind each attention of these blocks.

        Raises:
            UserError: a block that is one with its attention, or keeps channels before pixels.
        """
        for block in blocks:
            for attention in layout.attentions(block):
                if attention is layout.blocks[block]:
                    refuse(layout, block, cls.name, "its attention and MLP return one sum")
                if layout.channels_first(block):
                    refuse(layout, block, cls.name, "its tokens are a grid [B, D, h, w]")
                remedy = cls(layout.weights(block, ["proj"])[0].shape[-2], **options)
                settle(attention, cls.name, remedy)
                attention.register_forward_hook(remedy.after_attention)

    def after_attention(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """y' of y [B, N, D] or [B, h, w, D].

        Raises:
            UserError: the attention returns something else besides.
        """
        if not isinstance(output, Tensor):
            raise UserError(
                f"--remedy featscale: {type(module).__name__} returns more than its tokens, which this remedy "
                "cannot scale: choose another --model"
            )
        tokens = tuple(range(1, output.ndim - 1))
        mean = output.mean(dim=tokens, keepdim=True)  # [B, 1, D]
        return output + self.factor * (self.lamb1 * mean + self.lamb2 * (output - mean))
