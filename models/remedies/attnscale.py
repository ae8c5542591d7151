"""AttnScale: the map's deviation from uniform attention, scaled."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.remedies.attending import Attend, MapRemedy, per_head


class AttnScale(MapRemedy):
    r"""Scale what a map has beyond the mean of all values, which alone survives in the limit of many blocks.

        A' = 1/m + (1 + w_h) (A - 1/m)          o' = o + w_h (o - mean_j v_j)

    w [H] starts at 0, where A' = A; it has no weight decay, as vectors have none. The right form needs no map.

    Args:
        heads: H.
    Source: Wang et al., Anti-Oversmoothing in Deep Vision Transformers via the Fourier Domain Analysis, 2022
        (arXiv 2203.05962).
    """

    name = "attnscale"

    def __init__(self, heads: int) -> None:
        super().__init__(heads)
        self.lamb = nn.Parameter(torch.zeros(heads))

    def on_map(self, attention: Tensor) -> Tensor:
        """A' of A [..., H, n, m]."""
        return attention + per_head(self.lamb, attention) * (attention - 1 / attention.shape[-1])

    def attend(self, before: Attend, v: Tensor) -> Tensor:
        """o' of v [..., H, m, d]."""
        output = before(v)  # [..., H, n, d]
        return output + per_head(self.lamb, output) * (output - v.mean(dim=-2, keepdim=True))
