"""Inner products of attention maps, added up from queries and keys: the maps themselves are never there.

    A_h = softmax(s Q_h K_h^T + M_h)                    [n, m] of head h, before dropout
    G_gh = sum_ij A_g[i, j] A_h[i, j]                   the Gram matrix of the flattened maps

The sum runs over tiles, of some windows or images and some rows of queries. A tile is computed where it is needed,
once for G and once more for the gradient. Nothing larger than a tile is made, and nothing but Q, K and M is kept.
With g the gradient at G,

    dA_h = sum_f (g + g^T)_hf A_f,   dS_h = A_h (dA_h - rowsum(A_h dA_h))
    dQ_h = s dS_h K_h,   dK_h = s dS_h^T Q_h,   dM_h = dS_h, summed over what M is broadcast along

Where the attention's own product A V is made from the same tiles, its gradient at A_h is added to dA_h.

Legend: C images or windows, H heads, n queries, m keys, d width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

MAX_ELEMENTS = 2**19  # of a tile on a CPU: 2 MiB in float32, which its caches hold
MAX_ELEMENTS_ON_DEVICE = 2**25  # where launching a kernel costs more than memory, or each tile is compiled


class Attended(NamedTuple):
    """What a call of scaled_dot_product_attention attends with.

    Attributes:
        q: queries [C, H, n, d].
        k: keys [C, H, m, d].
        scale: s, of the scores.
        mask: M, added to the scores, or of booleans, true where a query sees a key; it broadcasts to [C, H, n, m].
    """

    q: Tensor
    k: Tensor
    scale: float
    mask: Tensor | None = None

    def map(self, sets: slice, rows: slice) -> Tensor:
        """A tile of the softmax maps, as the attention computes them itself: in at least float32.  [c, H, t, m]"""
        scores = (self.q[sets, :, rows] * self.scale) @ self.k[sets].mT  # [c, H, t, m]
        if self.mask is not None:
            mask = self.mask.expand(*self.q.shape[:-1], self.k.shape[-2])[sets, :, rows]
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        return scores.softmax(dim=-1, dtype=_at_least_float32(scores))


def inner_products(calls: Sequence[Attended], wide: bool = False) -> Tensor:
    """G of the heads of all these attentions, one after the other.

    Args:
        calls: of attentions with the same C, n and m.
        wide: multiply and add up in float64, for measures that magnify rounding.
    Returns: [C, sum of H, sum of H], in at least float32.
    """
    found, _ = _Attend.apply(
        [call.scale for call in calls], wide, None, *(part for call in calls for part in _parts(call))
    )
    return found


def attend(call: Attended, v: Tensor, wide: bool = False) -> tuple[Tensor, Tensor]:
    """What scaled_dot_product_attention returns, and G, from the same tiles.

    Args:
        v: values [C, H, m, e].
        wide: see `inner_products`.
    Returns: A V [C, H, n, e]; G [C, H, H].
    """
    found, attended = _Attend.apply([call.scale], wide, v, *_parts(call))
    return attended, found


class _Attend(torch.autograd.Function):
    """G, and A V if there is a V, with the gradient of the module's docstring."""

    @staticmethod
    def forward(
        ctx: Any, scales: Sequence[float], wide: bool, v: Tensor | None, *parts: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        ctx.save_for_backward(v, *parts)
        ctx.scales = scales
        calls = _calls(scales, parts)
        q, heads = calls[0].q, sum(call.q.shape[1] for call in calls)
        dtype = torch.float64 if wide else _at_least_float32(q)
        found = q.new_zeros(len(q), heads, heads, dtype=dtype)  # [C, H, H]
        attended = None if v is None else v.new_empty(*q.shape[:-1], v.shape[-1])  # [C, H, n, e]
        with torch.autocast(q.device.type, enabled=False):
            for sets, rows in _tiles(calls):
                maps = _joined([call.map(sets, rows) for call in calls])  # [c, H, t, m]
                if v is not None and attended is not None:
                    attended[sets, :, rows] = maps.to(v.dtype) @ v[sets]
                flat = maps.flatten(2).to(dtype)
                found[sets] += flat @ flat.mT
        return found, attended

    @staticmethod
    def backward(ctx: Any, by_found: Tensor, by_attended: Tensor | None) -> tuple[Tensor | None, ...]:
        v, *parts = ctx.saved_tensors
        calls = _calls(ctx.scales, parts)
        heads = [call.q.shape[1] for call in calls]
        both = by_found + by_found.mT  # [C, H, H]
        sums = [_zeros(each, want) for each, want in zip((v, *parts), ctx.needs_input_grad[2:], strict=True)]
        with torch.autocast(both.device.type, enabled=False):
            for sets, rows in _tiles(calls):
                maps = [call.map(sets, rows) for call in calls]
                joined = _joined(maps)  # [c, H, t, m]
                by_maps = (both[sets] @ joined.flatten(2).to(both.dtype)).view(joined.shape).to(joined.dtype)
                if v is not None and by_attended is not None:
                    by_maps = by_maps + by_attended[sets, :, rows] @ v[sets].mT
                    if sums[0] is not None:
                        sums[0][sets] += joined.to(v.dtype).mT @ by_attended[sets, :, rows]
                for number, by_map in enumerate(by_maps.split(heads, dim=1)):
                    by_scores = torch.ops.aten._softmax_backward_data(by_map, maps[number], -1, joined.dtype)
                    _add(sums[3 * number + 1 : 3 * number + 4], calls[number], by_scores, sets, rows)
        gradients = [
            None if each is None else each.to(own.dtype) for each, own in zip(sums, (v, *parts), strict=True)
        ]
        return None, None, *gradients


def _add(sums: Sequence[Tensor | None], call: Attended, by_scores: Tensor, sets: slice, rows: slice) -> None:
    """Add a tile's part to the gradients at q, k and the mask; by_scores [c, H, t, m]."""
    by_q, by_k, by_mask = sums
    narrow = by_scores.to(call.q.dtype)
    if by_q is not None:
        by_q[sets, :, rows] = (narrow @ call.k[sets]) * call.scale
    if by_k is not None:
        by_k[sets] += narrow.mT @ (call.q[sets, :, rows] * call.scale)
    if by_mask is not None:
        every = slice(None)
        tile = (sets, every, rows, every)[-by_mask.ndim :]
        place = tuple(own if size > 1 else every for own, size in zip(tile, by_mask.shape, strict=True))
        part = by_mask[place]
        part += by_scores.sum_to_size(part.shape)


def _zeros(tensor: Tensor | None, wanted: bool) -> Tensor | None:
    """Where a gradient is added up, in at least float32, if it is wanted."""
    if tensor is None or not wanted:
        return None
    return torch.zeros_like(tensor, dtype=_at_least_float32(tensor))


def _at_least_float32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _joined(maps: Sequence[Tensor]) -> Tensor:
    """The heads of all, one after the other."""
    return torch.cat(list(maps), dim=1) if len(maps) > 1 else maps[0]


def _parts(call: Attended) -> tuple[Tensor, Tensor, Tensor | None]:
    return call.q, call.k, call.mask


def _calls(scales: Sequence[float], parts: Sequence[Tensor | None]) -> list[Attended]:
    """What was taken apart into q, k and mask, call by call."""
    triples = zip(scales, parts[::3], parts[1::3], parts[2::3], strict=True)
    return [Attended(q, k, scale, mask) for scale, q, k, mask in triples if q is not None and k is not None]


def _tiles(calls: Sequence[Attended]) -> Iterator[tuple[slice, slice]]:
    """Parts of the images or windows, and of their rows, that bound the elements of a tile."""
    count, _, n, _ = calls[0].q.shape
    row = calls[0].k.shape[-2] * max(call.q.shape[1] for call in calls)  # elements of a query's rows in all heads
    in_cache = calls[0].q.device.type == "cpu" and not torch.compiler.is_compiling()
    limit = MAX_ELEMENTS if in_cache else MAX_ELEMENTS_ON_DEVICE
    rows = min(n, max(1, limit // row))
    sets = max(1, limit // (row * rows))
    for start in range(0, count, sets):
        for first in range(0, n, rows):
            yield slice(start, start + sets), slice(first, first + rows)
