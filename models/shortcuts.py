"""Which attentions can do without their map: tried on an image, once with the maps and once without.

Legend: H heads, n queries, m keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.adapters import MapTap, remedies_of
from models.attentions import Attentions

Taps = Mapping[int, Sequence[MapTap]]  # block -> its attentions
Sizes = tuple[int, ...]  # of a block's map: H, of all attentions side by side, then (..., n, m)


class Trial(NamedTuple):
    """What was found.

    Attributes:
        attentions: serves the blocks that can do without their map.
        sizes: block -> the sizes of its map, also of the others.
    """

    attentions: Attentions
    sizes: dict[int, Sizes]


class _OfMap(NamedTuple):
    """Of a map [..., H, n, m] its sizes (..., n, m), and the inner products of its heads [..., H, H]."""

    sizes: tuple[int, ...]
    products: Tensor


@torch.no_grad()
def try_products(backbone: nn.Module, taps: Taps, image: Tensor) -> Trial:
    """Find the blocks whose inner products, from queries and keys, are those of the map.

    Args:
        backbone: whose attentions are in the fused kernel, if they ever are.
        image: [1, C, H, W]; not a blank one, on which different maps may be alike.
    """
    expected = _products_of_maps(backbone, taps, image)
    recomputes = any(getattr(part, "grad_checkpointing", False) for part in backbone.modules())
    attentions = Attentions(taps, recomputes)
    with attentions.watching([(block,) for block in taps]):
        backbone(image)
        found = dict(attentions.found)
    sizes = {block: _sizes(each) for block, each in expected.items()}
    same = [block for block, each in expected.items() if _agree(found.get((block,)), each)]
    attentions.keep({block: sizes[block] for block in same if not _may_change(taps[block])})
    return Trial(attentions, sizes)


def _products_of_maps(backbone: nn.Module, taps: Taps, image: Tensor) -> dict[int, list[_OfMap]]:
    """What the maps themselves give, attention by attention; each map is gone when the next one is made."""
    found: dict[int, list[_OfMap]] = {block: [] for block in taps}

    def note(block: int, tap: MapTap, module: nn.Module, args: tuple[Any, ...]) -> None:
        maps = tap.heads_first(args[0])  # [..., H, n, m]
        rows = maps.transpose(-3, -2)  # [..., n, H, m]: one sum over all n m would lose three digits of float32
        products = (rows @ rows.mT).sum(dim=-3)  # [..., H, H]
        found[block].append(_OfMap((*maps.shape[:-3], *maps.shape[-2:]), products))

    places = [(block, tap) for block, each in taps.items() for tap in each]
    handles = [tap.hooked.register_forward_pre_hook(partial(note, block, tap)) for block, tap in places]
    try:
        with forming_maps(tap.attention for _, tap in places):
            backbone(image)
    finally:
        for handle in handles:
            handle.remove()
    return found


@contextmanager
def forming_maps(attentions: Iterable[Any]) -> Iterator[None]:
    """With these attentions out of the fused kernel, if they are not out of it anyway."""
    before = [(attention, getattr(attention, "fused_attn", False)) for attention in attentions]
    for attention, _ in before:
        attention.fused_attn = False
    try:
        yield
    finally:
        for attention, was in before:
            attention.fused_attn = was


def _sizes(of_maps: Sequence[_OfMap]) -> Sizes:
    return (sum(each.products.shape[-1] for each in of_maps), *of_maps[0].sizes)


def _may_change(taps: Sequence[MapTap]) -> bool:
    """Whether a remedy may learn to change a block's maps, which it leaves as they are at first."""
    return any(remedies_of(tap.attention) for tap in taps)


def _agree(products: Tensor | None, expected: Sequence[_OfMap]) -> bool:
    """Whether inner products of all heads of a block are those of its maps, but for rounding.

    They may differ by a thousandth of what tells the maps from uniform ones, whose inner products are n / m: in an
    untrained model maps are nearly uniform, whatever the attention does.
    """
    if products is None or products.shape[-1] != _sizes(expected)[0]:
        return False
    start = 0
    for (*_, n, m), own in expected:  # attentions side by side
        heads = slice(start, start + own.shape[-1])
        part = products[..., heads, heads]
        rounding = 5e-5 if own.dtype in (torch.float32, torch.float64) else 1e-3
        apart = 1e-3 * (own - n / m).abs().max().item()
        if part.shape != own.shape or not torch.allclose(part, own.to(part.dtype), rtol=rounding, atol=apart):
            return False
        start = heads.stop
    return True
