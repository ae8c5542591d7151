"""Metrics of attention: the softmax maps of a block, before dropout, prefix tokens included unless said otherwise.

Each number is one image's: the mean over its heads, queries and, where attention is windowed, windows.

Shapes: B images, W windows of an image (1 where there are none), H heads, n queries, m keys, L blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from redundancy.metrics.patches import by_shape, no_pairs, undefined_where
from redundancy.metrics.registry import metric
from redundancy.metrics.shown import Place, grid_of
from regularizers import of_products
from regularizers.measures import pairwise_cosines
from regularizers.primitives import unit

if TYPE_CHECKING:
    from redundancy.metrics.values import Group


def cosine_abs_of_products(g: Tensor) -> Tensor:
    """`cosine_abs` from inner products [B, W, H, H].  -> [B]"""
    values = of_products.pairwise_cosines(g).mean(dim=1)
    return undefined_where(torch.full_like(values, g.shape[-1] < 2, dtype=torch.bool), values)


def across_of_products(groups: Sequence[Group], blocks: int) -> Tensor:
    """`across` from the inner products of the heads of blocks with maps of one size, group by group."""
    first = groups[0].products
    found = first.new_full((len(first), blocks, blocks), torch.nan)
    for places, products in groups:
        rows = torch.tensor(places, device=found.device)
        for image in range(len(found)):
            among = of_products.cosines(products[image]).abs().clamp(max=1)  # [W, l * H, l * H]
            found[image, rows[:, None], rows] = _means_between(among, len(places))
    return found


@metric(
    "attn.cosine_abs",
    takes="maps",
    label="mean |cos|",
    summary="mean",
    limits=(0, 1),
    redundant="high",
    cheap=True,
    of_products=cosine_abs_of_products,
)
def cosine_abs(a: Tensor) -> Tensor:
    """Mean |cosine| between different heads of a block.

        M = 1/(H (H - 1)) sum_{g != h} |<u_g, u_h>|,   u_h the direction of the flattened map A_h

    The same function as `--measure attn.pairwise_cosine`. Softmax has no negative entries, so |cos| is cos.

    Args: a [B, W, H, n, m].
    Returns: [B].
    Where: the softmax map of a block, before dropout; windows are compared one by one.
    Normalised: each head's whole map to length 1; nothing is centred.
    Range: [0, 1]; 1 where all heads have the same map, up to a factor.
    Undefined: a single head.
    Source: Chen et al. 2022 (arXiv 2203.06345).
    """
    heads = a.flatten(-2)  # [B, W, H, n * m]
    return undefined_where(no_pairs(heads), pairwise_cosines(heads).mean(dim=1))


@metric(
    "attn.across",
    takes="all maps",
    label="mean |cos|",
    summary="pairs",
    limits=(0, 1),
    redundant="high",
    of_products=across_of_products,
)
def across(blocks: Sequence[Tensor]) -> Tensor:
    """Mean |cosine| between the heads of one block and those of another.

        M_lm = 1/H^2 sum_gh |<u_g(l), u_h(m)>|;   M_ll without g = h, as in `attn.cosine_abs`

    Args: blocks, L tensors [B, W, H, n, m].
    Returns: [B, L, L].
    Where: the softmax maps of two blocks, before dropout; windows are compared one by one.
    Normalised: each head's whole map to length 1; nothing is centred.
    Range: [0, 1]; 1 where all heads of both blocks have the same map, up to a factor.
    Undefined: blocks whose maps have different shapes; on the diagonal, a single head.
    Source: Chen et al. 2022 (arXiv 2203.06345); Zhou et al. 2021 (arXiv 2103.11886), similarity across blocks.
    """
    found = blocks[0].new_full((len(blocks[0]), len(blocks), len(blocks)), torch.nan)
    for same in by_shape(blocks):
        rows = torch.tensor(same, device=found.device)
        for image in range(len(found)):
            stacked = torch.stack([blocks[place][image].flatten(-2) for place in same], dim=1)  # [W, l, H, n * m]
            found[image, rows[:, None], rows] = _between_blocks(stacked)
    return found


def _between_blocks(heads: Tensor) -> Tensor:
    """Mean |cos| between the heads of every two of l blocks; heads [W, l, H, d].  -> [l, l]"""
    u = unit(heads.flatten(1, 2))  # [W, l * H, d]
    return _means_between((u @ u.mT).abs().clamp(max=1), heads.shape[1])


def _means_between(among: Tensor, blocks: int) -> Tensor:
    """Means over windows and heads of |cos| among the heads of l blocks, [W, l * H, l * H].  -> [l, l]"""
    count = among.shape[-1] // blocks
    by_block = among.view(len(among), blocks, count, blocks, count)
    sums = by_block.sum(dim=(2, 4)).mean(dim=0)  # [l, l]
    selves = torch.diagonal(among.mean(dim=0)).view(blocks, count)
    pairs = torch.full_like(sums, count * count).fill_diagonal_(count * (count - 1))
    return torch.where(pairs > 0, (sums - torch.diag(selves.sum(dim=1))) / pairs, torch.nan)


@metric(
    "attn.entropy",
    takes="maps",
    label="entropy (nats)",
    summary="mean",
    limits=(0, None),
    redundant="high",
    cheap=True,
)
def entropy(a: Tensor) -> Tensor:
    """Mean entropy of the queries' attention: over how many keys it is spread, as a logarithm.

        M = mean over heads and queries of  -sum_j A_ij log A_ij

    Args: a [B, W, H, n, m].
    Returns: [B], nats.
    Where: the softmax map of a block, before dropout; all queries and keys, prefix tokens included.
    Normalised: a query's row sums to 1 by itself.
    Range: [0, log m]; log m where attention is uniform.
    Undefined: maps with negative entries.
    Source: Shannon 1948; for heads of vision transformers, Zhai et al. 2023 (arXiv 2303.06296).
    """
    values = torch.special.entr(a).sum(dim=-1).flatten(1).mean(dim=1)
    return undefined_where(~values.isfinite(), values)


@metric("attn.std", takes="maps", label="standard deviation", summary="mean", limits=(0, None), redundant="low")
def std(a: Tensor) -> Tensor:
    """Standard deviation of the scores in a head's map: the smaller, the more it smooths.

        M = mean over heads of  sqrt( 1/(n m) sum_ij (A_ij - 1/m)^2 )

    1/m is the mean of every row.

    Args: a [B, W, H, n, m].
    Returns: [B].
    Where: the softmax map of a block, before dropout; all queries and keys, prefix tokens included.
    Normalised: nothing, so it falls with the number of keys: compare maps of equal size only.
    Range: [0, sqrt(m - 1)/m]; 0 where attention is uniform.
    Undefined: never.
    Source: Chen et al. 2022 (arXiv 2203.06345).
    """
    return (a - 1 / a.shape[-1]).square().mean(dim=(-2, -1)).sqrt().flatten(1).mean(dim=1)


@metric("attn.to_uniform", takes="maps", label="total variation", summary="mean", limits=(0, 1), redundant="low")
def to_uniform(a: Tensor) -> Tensor:
    """Distance of the queries' attention to uniform attention, which gives every query the same mean of all values.

        M = mean over heads and queries of  1/2 sum_j |A_ij - 1/m|

    Args: a [B, W, H, n, m].
    Returns: [B].
    Where: the softmax map of a block, before dropout; all queries and keys, prefix tokens included.
    Normalised: a query's row sums to 1 by itself.
    Range: [0, 1 - 1/m]; 0 where attention is uniform, the upper end where each query looks at one key.
    Undefined: never.
    Source: total variation distance.
    """
    return (a - 1 / a.shape[-1]).abs().sum(dim=-1).flatten(1).mean(dim=1) / 2


@metric("attn.distance", takes="maps and place", label="pixels", summary="mean", limits=(0, None))
def distance(a: Tensor, place: Place) -> Tensor:
    """Mean attention distance: how far away in the image a patch looks, in pixels.

        M = mean over heads and patches i of  sum_j A'_ij |r_i - r_j|,   A'_ij = A_ij / sum_k A_ik

    r are the middles of patches in pixels, k runs over patches. Reduced keys lie on a coarser grid of the same
    image. In windows only differences of places count, so shifted windows are as good as others.

    Args: a [B, W, H, n, m]; place, where its tokens lie.
    Returns: [B], pixels of the images that the model takes.
    Where: the softmax map of a block, before dropout, from patches to patches; prefix tokens left out.
    Normalised: the attention of a patch to the patches sums to 1.
    Range: [0, diagonal of the image).
    Undefined: maps that are not between patches on a grid (cross-covariance attention), or with negative entries;
        patches that look at prefix tokens alone are left out.
    Source: Dosovitskiy et al. 2021 (arXiv 2010.11929), figure 7.
    """
    distances = _distances(a.shape[1], a.shape[-2], a.shape[-1], place)
    if distances is None:
        return a.new_full(a.shape[:1], torch.nan)
    n, m = distances.shape
    between = a[..., a.shape[-2] - n :, a.shape[-1] - m :]  # patches to patches
    weights = between.sum(dim=-1)  # [B, W, H, n]
    along = (between * distances.to(a)).sum(dim=-1) / weights.clamp_min(torch.finfo(a.dtype).tiny)
    along = along.masked_fill(weights == 0, torch.nan)
    return undefined_where((a < 0).flatten(1).any(dim=1), along.flatten(1).nanmean(dim=1))


def _distances(windows: int, queries: int, keys: int, place: Place) -> Tensor | None:
    """Distances in pixels between the patches of a map, [n, m] without prefix tokens; None if they are no grid."""
    if place.grid is None:
        return None
    height, width = place.size
    rows, columns = place.grid
    pitch = height / rows, width / columns
    if windows > 1:
        said = place.window is not None and place.window[0] * place.window[1] == queries
        side = place.window if said else grid_of(queries, (1, 1))
        if side is None or keys != queries:
            return None
        return torch.cdist(middles(side, pitch), middles(side, pitch))
    if queries - place.prefix != rows * columns:
        return None
    reduced = grid_of(keys - place.prefix, place.grid)
    if reduced is None:
        return None
    return torch.cdist(middles(place.grid, pitch), middles(reduced, (height / reduced[0], width / reduced[1])))


def middles(grid: tuple[int, int], pitch: tuple[float, float]) -> Tensor:
    """The middles of a grid's cells, row by row, in pixels; float64 [rows * columns, 2]."""
    axes = [
        (torch.arange(count, dtype=torch.float64) + 0.5) * step for count, step in zip(grid, pitch, strict=True)
    ]
    return torch.cartesian_prod(*axes).view(-1, 2)
