"""GFSA: a map and an approximation of its K-th power."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from errors import UserError
from models.remedies.attending import Attend, MapRemedy, per_head

LARGEST = 1000  # power


class GFSA(MapRemedy):
    r"""Graph-filter-based self-attention: add the K-th power of the map, to first order in its steps.

        A' = A + b_h ((K - 1) (A A - A) + A)          o' = o + b_h ((K - 1) (A o - o) + o)

    b [H] starts at 0, where A' = A; it has no weight decay, as vectors have none. The right form needs no map, but
    attends a second time, to its own output. The paper's filter has three free weights (of I, A and A^K); its code
    for images has this one.

    Args:
        heads: H.
        order: K.
    Raises:
        UserError: K is out of range.
    Source: Choi et al., Graph Convolutions Enrich the Self-Attention in Transformers!, 2024 (arXiv 2312.04234).
    """

    name = "gfsa"
    keeps_rows = False

    def __init__(self, heads: int, *, order: int = 4) -> None:
        super().__init__(heads)
        if not 2 <= order <= LARGEST:
            raise UserError(f"--remedy gfsa:order={order}: the power of the map must be 2 to {LARGEST}")
        self.order = order
        self.lamb = nn.Parameter(torch.zeros(heads))

    def _filtered(self, once: Tensor, twice: Tensor) -> Tensor:
        added = torch.sub((self.order - 1) * twice, once, alpha=self.order - 2)
        return torch.addcmul(once, per_head(self.lamb, once), added)

    def on_map(self, attention: Tensor) -> Tensor:
        """A' of A [..., H, n, n].

        Raises:
            UserError: A is not square.
        """
        self._check(*attention.shape[-2:])
        return self._filtered(attention, attention @ attention)

    def attend(self, before: Attend, v: Tensor) -> Tensor:
        """o' of v [..., H, n, d]."""
        output = before(v)
        self._check(output.shape[-2], v.shape[-2])
        return self._filtered(output, before(output))

    def _check(self, queries: int, keys: int) -> None:
        if queries != keys:
            raise UserError(
                f"--remedy gfsa multiplies a map by itself, but here {queries} queries attend to {keys} keys: "
                "choose blocks whose keys are not reduced (gfsa@LAYERS), or another --model"
            )
