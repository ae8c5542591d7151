"""ContraNorm: each token leaves those that resemble it, before it is normalised."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d, use_fused_attn
from torch import Tensor, nn

from errors import UserError
from models.adapters import Layout
from models.remedies.attending import refuse, settle


class ContraNorm(nn.Module):
    r"""Take a weighted mean of the tokens away from each of them, before a layer norm.

        x' = x - s n            n = softmax(u u^T / T) x,   u_i = x_i / max(|x_i|, 1e-12)

    With `dual` n has the softmax over the other dimension besides: (P + P^T) x. With `identity`
    x' = (1 + s) x - s n. With `learnable` s is one number a channel, with `positive` besides its logarithm is
    learnt; with `identity` and `learnable` the original's code computes x' = s x - s n. Such an s has no weight
    decay. With s = 0 nothing is changed.

    Args:
        width: D.
        scale: s, or where it starts.
        tau: T, the temperature.
        dual, identity, learnable, positive: see above.
    Raises:
        UserError: a negative scale, a temperature that is not positive, or `positive` without `learnable`.
    Source: Guo et al., ContraNorm: A Contrastive Learning Perspective on Oversmoothing and Beyond, 2023
        (arXiv 2303.06562).
    """

    name = "contranorm"

    def __init__(
        self,
        width: int,
        *,
        scale: float = 0.1,
        tau: float = 1.0,
        dual: bool = False,
        identity: bool = False,
        learnable: bool = False,
        positive: bool = False,
    ) -> None:
        super().__init__()
        if scale < 0 or tau <= 0 or (positive and scale == 0):
            raise UserError(f"--remedy contranorm: scale={scale:g} must not be negative, tau={tau:g} above 0")
        if positive and not learnable:
            raise UserError("--remedy contranorm: positive is for a learnable scale: add learnable")
        self.scale, self.tau = scale, tau
        self.dual, self.identity, self.positive = dual, identity, positive
        self.fused_attn = use_fused_attn()  # timm's name and switch
        start = math.log(scale) if positive else scale
        self.scale_param = nn.Parameter(torch.full((width,), start)) if learnable else None

    @classmethod
    def install(cls, layout: Layout, blocks: Sequence[int], **options: Any) -> None:
        """Put one before each norm of these blocks; before the model's final one too, if they include the last.

        Raises:
            UserError: a block without layer norms of tokens.
        """
        norms: list[nn.Module] = []
        for block in blocks:
            found = layout.norms(block)
            if not found:
                refuse(layout, block, cls.name, "it has no layer norm of its tokens")
            if any(isinstance(norm, LayerNorm2d) for norm in found):
                refuse(layout, block, cls.name, "its norms take a grid [B, D, h, w]")
            norms += found
        if layout.depth - 1 in blocks:
            norms += layout.final_norms
        for norm in norms:
            remedy = cls(_width(norm), **options)
            settle(norm, cls.name, remedy)
            norm.register_forward_pre_hook(remedy.before_norm)

    def before_norm(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The norm's input [B, N, D] or [B, h, w, D], changed; one vector an image is left as it is."""
        x: Tensor = args[0]
        if x.ndim < 3:
            return args
        tokens = x.flatten(1, -2)  # [B, N, D]
        return self(tokens).view(x.shape), *args[1:]

    def forward(self, x: Tensor) -> Tensor:
        """x' of x [B, N, D]."""
        if self.scale == 0 and self.scale_param is None:
            return x
        mean = self._mean(x)
        if self.scale_param is None:
            return (1 + self.scale) * x - self.scale * mean if self.identity else x - self.scale * mean
        scale = self.scale_param.exp() if self.positive else self.scale_param  # [D]
        return scale * x - scale * mean if self.identity else x - scale * mean

    def _mean(self, x: Tensor) -> Tensor:
        """n of x [B, N, D]."""
        u = F.normalize(x, dim=-1)  # [B, N, D]
        if self.fused_attn and not self.dual:
            one = u[:, None]  # [B, 1, N, D]
            return F.scaled_dot_product_attention(one, one, x[:, None], scale=1 / self.tau)[:, 0]
        weight = (u @ u.mT / self.tau).softmax(dim=-1)  # [B, N, N], of a symmetric matrix
        return (weight + weight.mT if self.dual else weight) @ x


def _width(norm: nn.Module) -> int:
    """D of a norm."""
    weight: Any = getattr(norm, "weight", None)
    if weight is not None:
        return int(weight.shape[-1])
    shape: Any = norm.normalized_shape
    return int(shape[-1])
