"""How a metric's function is called with what a batch shows."""

from __future__ import annotations

import torch
from torch import Tensor

from redundancy.metrics.registry import Metric
from redundancy.metrics.shown import Shown


def values_of(metric: Metric, shown: Shown) -> Tensor:
    """A metric's numbers of every image of a batch.  [B, *axes]"""
    function = metric.function
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
