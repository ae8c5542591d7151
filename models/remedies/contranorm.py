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
from models.layout import Layout
from models.remedies.attending import refuse, settle

EPS = 1e-12
COLDEST = 1e-6  # temperature


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
        if scale < 0 or tau < COLDEST or (positive and scale == 0):
            raise UserError(
                f"--remedy contranorm: scale={scale:g} must not be negative (above 0 with positive), tau={tau:g} "
                f"at least {COLDEST}"
            )
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
        if self.scale_param is None:
            if self.scale == 0:
                return x
            return self._sum(x, 1 + self.scale if self.identity else 1.0, -self.scale)
        mean = self._sum(x, 0.0, 1.0)
        scale = self.scale_param.exp() if self.positive else self.scale_param  # [D]
        return scale * (x - mean) if self.identity else x - scale * mean

    def _sum(self, x: Tensor, own: float, share: float) -> Tensor:
        """own x + share n, of x [B, N, D]."""
        if self.fused_attn and not self.dual and x.shape[-2] > x.shape[-1]:  # u u^T would be larger than x
            u = F.normalize(x, dim=-1, eps=EPS)[:, None]  # [B, 1, N, D]
            return own * x + share * F.scaled_dot_product_attention(u, u, x[:, None], scale=1 / self.tau)[:, 0]
        summed: Tensor = _Sum.apply(x, own, share, self.tau, self.dual)
        return summed


class _Sum(torch.autograd.Function):
    r"""own x + share n of x [B, N, D], with five products where autograd takes six and fused attention seven.

    u u^T = C is symmetric, so one product is enough for its gradient. With n = M x and g the gradient at the sum,

        dx = own g + share M^T g + (G - diag(c)) u / |x|,   G = dC + dC^T,   c_i = sum_j G_ij C_ij

    It keeps x and C. Products are in C's precision, which is half under autocast.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, own: float, share: float, tau: float, dual: bool) -> Tensor:
        u = x / _lengths(x)
        cosines = u @ u.mT
        ctx.save_for_backward(x, cosines)
        ctx.options = own, share, tau, dual
        softmax = _softmax(cosines, tau, x.dtype)
        mixed = softmax + softmax.mT if dual else softmax
        return _add_product(x.clone(), mixed, x, cosines.dtype, own, share)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        x, cosines = ctx.saved_tensors
        own, share, tau, dual = ctx.options
        low = cosines.dtype
        lengths = _lengths(x)
        u = x / lengths
        if torch.is_grad_enabled():  # this pass is differentiated itself, and x is not seen through what was saved
            cosines = u.to(low) @ u.to(low).mT
        softmax = _softmax(cosines, tau, x.dtype)
        mixed = softmax + softmax.mT if dual else softmax
        at_mixed = (gradient.to(low) @ x.to(low).mT).to(x.dtype)
        at_softmax = at_mixed + at_mixed.mT if dual else at_mixed
        at_cosines = torch.ops.aten._softmax_backward_data(at_softmax, softmax, -1, x.dtype)
        both = at_cosines + at_cosines.mT  # G, but for share / tau
        along = (both * cosines).sum(dim=-1) * (lengths[..., 0] > EPS)
        across = torch.diagonal_scatter(both, torch.diagonal(both, dim1=-2, dim2=-1) - along, dim1=-2, dim2=-1)
        at_x = _add_product(gradient.clone(), mixed.mT, gradient, low, own, share)
        at_x = _add_product(at_x, across * (share / tau / lengths), u, low)
        return at_x, None, None, None, None


def _softmax(cosines: Tensor, tau: float, dtype: torch.dtype) -> Tensor:
    """P of C."""
    return (cosines if tau == 1 else cosines / tau).softmax(dim=-1, dtype=dtype)


def _add_product(x: Tensor, a: Tensor, b: Tensor, low: torch.dtype, own: float = 1.0, share: float = 1.0) -> Tensor:
    """own x + share a b in the place of x; x, b [B, N, D], a [B, N, N], the product in precision `low`."""
    if low == x.dtype == a.dtype == b.dtype:
        return x.baddbmm_(a, b, beta=own, alpha=share)
    return x.mul_(own).add_(a.to(low) @ b.to(low), alpha=share)


def _lengths(x: Tensor) -> Tensor:
    """max(|x_i|, 1e-12).  [B, N, D] -> [B, N, 1]"""
    return x.norm(dim=-1, keepdim=True).clamp_min(EPS)


def _width(norm: nn.Module) -> int:
    """D of a norm."""
    weight: Any = getattr(norm, "weight", None)
    if weight is not None:
        return int(weight.shape[-1])
    shape: Any = norm.normalized_shape
    return int(shape[-1])
