"""How a metric's function is called with what a batch shows."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from redundancy.metrics.patches import by_shape
from redundancy.metrics.registry import Metric
from redundancy.metrics.shown import Shown


class Group(NamedTuple):
    """Inner products [B, W, l H, l H] of the heads of l blocks, and the places of these among all blocks."""

    places: list[int]
    products: Tensor


def values_of(metric: Metric, shown: Shown) -> Tensor:
    """A metric's numbers of every image of a batch.  [B, *axes]"""
    function = metric.function
    if shown.heads and metric.of_products is not None:
        return _of_products(metric, metric.of_products, shown)
    if metric.takes == "output":
        return torch.as_tensor(function(shown))
    if metric.takes == "all patches":
        return torch.as_tensor(function(list(shown.patches.values())))
    if metric.takes == "all maps":
        return torch.as_tensor(function(list(shown.maps.values())))
    if metric.takes == "patches":
        columns = [function(x) for x in shown.patches.values()]
    elif metric.takes == "patches and input":
        first, *_ = shown.patches.values()
        columns = [function(x, first) for x in shown.patches.values()]
    elif metric.takes == "maps":
        columns = [function(a) for a in shown.maps.values()]
    else:
        columns = [function(a, shown.places[block]) for block, a in shown.maps.items()]
    return torch.stack([column.cpu().double() for column in columns], dim=1)


def _of_products(metric: Metric, function: Callable[..., Tensor], shown: Shown) -> Tensor:
    """The same of a metric of maps, where inner products of heads are all that is known of most blocks."""
    if metric.takes == "all maps":
        return function(_groups(shown), len(shown.attending))
    columns = []
    for block in shown.attending:
        products = shown.products(block)
        columns.append(metric.function(shown.maps[block]) if products is None else function(products))
    return torch.stack([column.cpu().double() for column in columns], dim=1)


def _groups(shown: Shown) -> list[Group]:
    """The blocks whose heads can be compared, together: those with maps of one size."""
    place = {block: number for number, block in enumerate(shown.attending)}
    groups = [Group([place[block] for block in blocks], products) for blocks, products in shown.heads.items()]
    mapped = list(shown.maps)
    for same in by_shape(list(shown.maps.values())):
        heads = torch.cat([shown.maps[mapped[each]].flatten(-2) for each in same], dim=2)  # [B, W, l * H, n * m]
        groups.append(Group([place[mapped[each]] for each in same], heads @ heads.mT))
    return groups
