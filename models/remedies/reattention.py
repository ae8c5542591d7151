"""Re-attention: the maps of all heads, mixed and normalised."""

from __future__ import annotations

from torch import Tensor, nn

from models.remedies.attending import MapRemedy


class ReAttention(MapRemedy):
    r"""Let each head use a mixture of all heads' maps.

        A'_h = BatchNorm_h( sum_g W_hg A_g + c_h ),   after attention dropout

    W [H, H, 1, 1] is a 1 x 1 convolution over the heads with its default initialisation, so the first A' is no
    longer A. It has weight decay, the rest has none. There is no form without the map.

    Args:
        heads: H.
    Source: Zhou et al., DeepViT: Towards Deeper Vision Transformer, 2021 (arXiv 2103.11886).
    """

    name = "reattention"
    needs_map = True
    keeps_rows = False
    keeps_statistics = True
    not_recomputed = "would count its batch norm's statistics twice"

    def __init__(self, heads: int) -> None:
        super().__init__(heads)
        self.reatten_matrix = nn.Conv2d(heads, heads, 1)
        self.var_norm = nn.BatchNorm2d(heads)
        self.used = nn.Identity()  # where the map that is used can be seen

    def on_dropped(self, attention: Tensor) -> Tensor:
        """A' of A [..., H, n, m]."""
        maps = attention.flatten(0, -4)  # [B, H, n, m]
        mixed: Tensor = self.used(self.var_norm(self.reatten_matrix(maps)).view(attention.shape))
        return mixed
