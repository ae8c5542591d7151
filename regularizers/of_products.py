"""Measures of heads from the inner products of their maps, without the maps.

Each function is its namesake in measures.py, written in the Gram matrix G = X X^T of the items instead of the items
X: the same equation, range and source. Those of sets take G [..., n, n]; those of pairs the Gram matrix
[..., 2 n, 2 n] of the items of the first layer, then those of the second.

    <u_i, u_j> = G_ij / (l_i l_j),   l_i = max(sqrt(G_ii), 1e-8)

What a measure needs besides, such as `cno:inverse`'s products of columns, is not in G: it keeps the maps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from regularizers.measures import draw_probes
from regularizers.primitives import EPS
from regularizers.specs import Spec

OfProducts = Callable[[Tensor], Tensor]


def of_products(spec: Spec) -> OfProducts | None:
    """The measure of a spec as a function of inner products; None if they are not enough."""
    function = MEASURES.get(spec.measure)
    arguments = spec.arguments
    if function is None or arguments.pop("inverse", False):
        return None
    return partial(function, **arguments)


def cosines(g: Tensor) -> Tensor:
    """<u_i, u_j> of all pairs.  [..., n, n] -> [..., n, n]"""
    lengths = torch.diagonal(g, dim1=-2, dim2=-1).sqrt().clamp_min(EPS)  # [..., n]
    return g / (lengths[..., :, None] * lengths[..., None, :])


def _between(g: Tensor) -> Tensor:
    """<u_i, v_j> of items of the first layer and of the second.  [..., 2 n, 2 n] -> [..., n, n]"""
    n = g.shape[-1] // 2
    return cosines(g)[..., :n, n:]


def cosine(g: Tensor, *, absolute: bool = False) -> Tensor:
    """1/n^2 sum_ij <u_i, u_j>, or of absolute values."""
    return cosines(g).abs().mean() if absolute else cosines(g).mean()


def pairwise_cosine(g: Tensor) -> Tensor:
    """1/(n (n - 1)) sum_{i != j} |<u_i, u_j>|."""
    return pairwise_cosines(g).mean()


def pairwise_cosines(g: Tensor) -> Tensor:
    """`pairwise_cosine` of every set.  [..., n, n] -> [...]"""
    n, among = g.shape[-1], cosines(g).abs()
    others = among.sum(dim=(-2, -1)) - torch.diagonal(among, dim1=-2, dim2=-1).sum(dim=-1)
    return others / max(n * (n - 1), 1)


def cosine_cross(g: Tensor, *, absolute: bool = False) -> Tensor:
    """1/n^2 sum_ij <u_i, v_j>, or of absolute values."""
    return _between(g).abs().mean() if absolute else _between(g).mean()


def contrastive(g: Tensor, *, tau: float = 1.0) -> Tensor:
    """1/n sum_i softplus((m_i - s_ii) / tau)."""
    s = _between(g)  # [..., n, n]
    n, own = s.shape[-1], torch.diagonal(s, dim1=-2, dim2=-1)  # [..., n]
    if n == 1:
        return 0 * own.sum()
    return F.softplus((s.sum(dim=-1) - n * own) / ((n - 1) * tau)).mean()


def _twice_normalised(g: Tensor) -> Tensor:
    """The inner products of x / sqrt(|x|^2 + 1e-8), applied twice.  [..., n, n] -> [..., n, n]"""
    squares = torch.diagonal(g, dim1=-2, dim2=-1)  # |x_i|^2, [..., n]
    factors = 1 / ((squares + EPS) * (squares / (squares + EPS) + EPS)).sqrt()
    return g * (factors[..., :, None] * factors[..., None, :])


def mhs(g: Tensor) -> Tensor:
    """- min { 2 - 2 <u_i, u_j> : i > j, not 0 }, summed over ties."""
    distance = 2 - 2 * _twice_normalised(g)  # [..., n, n], squared
    counts = torch.ones(distance.shape[-2:], dtype=torch.bool, device=g.device).tril(-1) & (distance > 0)
    nearest = distance.masked_fill(~counts, torch.inf).amin(dim=(-2, -1), keepdim=True)
    return -distance.where(counts & (distance == nearest), 0.0).sum(dim=(-2, -1)).mean()


def mgd(g: Tensor) -> Tensor:
    """- log det( exp(-(2 - 2 U U^T)) + 1e-6 I ); G in float64, since the determinant magnifies rounding."""
    kernel = torch.exp(-(2 - 2 * _twice_normalised(g.double())))  # [..., n, n]
    jitter = 1e-6 * torch.eye(kernel.shape[-1], dtype=kernel.dtype, device=kernel.device)
    return -torch.logdet(kernel + jitter).mean()


def so(g: Tensor, *, normalize: bool = False) -> Tensor:
    """|| G - I ||_F^2."""
    g = cosines(g) if normalize else g
    identity = torch.eye(g.shape[-1], dtype=g.dtype, device=g.device)
    return (g - identity).square().sum(dim=(-2, -1)).mean()


def cno(
    g: Tensor,
    *,
    normalize: bool = False,
    distribution: Literal["normal", "uniform"] = "normal",
    eps: float = 1e-6,
) -> Tensor:
    """(lambda_max - lambda_min)^2, by the same power iterations from the same probes."""
    g = cosines(g) if normalize else g
    probe, other = (vector.mT for vector in draw_probes(g, distribution))  # [..., 1, n]
    y = probe @ g
    largest = _along(y, g) / _divisor(y, eps)
    u = other @ g - largest * other
    difference = (_along(u, g) - largest * _along(u)) / _divisor(u, eps)
    return difference.square().mean()


def _along(v: Tensor, g: Tensor | None = None) -> Tensor:
    """v G v^T, or v v^T.  [..., 1, n] -> [..., 1, 1]"""
    return ((v if g is None else v @ g) * v).sum(dim=-1, keepdim=True)


def _divisor(v: Tensor, eps: float) -> Tensor:
    """v v^T + eps, never 0."""
    return (_along(v) + eps).clamp_min(torch.finfo(v.dtype).tiny)


MEASURES: Mapping[str, Callable[..., Tensor]] = {
    function.__name__: function
    for function in (cosine, pairwise_cosine, cosine_cross, contrastive, mhs, mgd, so, cno)
}
WIDE = ("mgd",)  # those that take G in float64
