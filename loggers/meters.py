"""Running means of a run's terms, which stay on the device until somebody reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from utils import all_reduce


class Meters:
    """Running means that stay on the device until somebody reads them.

    `update` only enqueues device work; `means` and `global_means` wait for the device. Every update gives the same
    names in the same order.
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        self._sums: Tensor | None = None  # [names]
        self._count = 0

    def update(self, values: Mapping[str, Tensor]) -> None:
        """Add one value of each meter."""
        row = torch.stack([value.detach() for value in values.values()])  # [names]
        row = row if row.device.type == "mps" else row.double()  # float64 keeps long sums exact; MPS has none
        if self._sums is None:
            self._names = list(values)
            self._sums = torch.zeros_like(row)
        self._sums = self._sums.to(row.device) + row
        self._count += 1

    def means(self) -> dict[str, float]:
        """Mean of every meter on this process."""
        if self._sums is None:
            return {}
        return {name: total / self._count for name, total in zip(self._names, self._sums.tolist(), strict=True)}

    def global_means(self) -> dict[str, float]:
        """Mean of every meter over all processes."""
        if self._sums is None:
            return {}
        count = torch.full_like(self._sums[:1], self._count)
        *sums, updates = all_reduce(torch.cat([self._sums, count])).tolist()
        return {name: total / updates for name, total in zip(self._names, sums, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        """The sums as plain data."""
        sums = self._sums.cpu() if self._sums is not None else None
        return {"names": self._names, "sums": sums, "count": self._count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from such sums."""
        self._names, self._sums, self._count = list(state["names"]), state["sums"], int(state["count"])
