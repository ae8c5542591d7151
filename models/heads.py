"""What classifies every patch: the heads that `DiverseViT` may be built with.

A head is made once, from the layout of a backbone, and is no module. If it has parameters, it attaches its module
to the backbone, e.g. `layout.backbone.patch_head = nn.Linear(...)`. Then optimizer, EMA, checkpoints, DDP and FSDP
treat it like any other layer.

Legend: B images, P patches, T prefix tokens, N = P + T tokens, D width, K classes.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from errors import UserError
from models.adapters import Layout


class PatchHead(Protocol):
    """Makes patch logits of a model's final features.

    Args:
        layout: of the backbone.
    Raises:
        UserError: it cannot work with this backbone.
    """

    def __init__(self, layout: Layout) -> None: ...

    def __call__(self, features: Tensor, labels: Any = None) -> Tensor:
        """The logits of every patch.

        Args:
            features: what forward_features returns, final norm included: [B, N, D], [B, h, w, D] or [B, D, h, w].
            labels: those of the mixed images, if there are any, for a head that mixes regions.
        Returns: [B, P, K], patches row by row.
        """


class OwnHead:
    """Every patch as the model's own head would classify an image of this one patch.

    The pooled token of such an image is the patch itself, or for attention pooling the pool's own function of it.
    So class-token, average- and map-pooled models are all served by their `forward_head`.

    Raises:
        UserError: the head cannot classify single patches.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        head, pool = layout.part("head"), layout.part("attn_pool")
        reason = None
        if not all(hasattr(layout.backbone, part) for part in ("forward_features", "forward_head")):
            reason = "has no forward_features and forward_head"
        elif isinstance(head, nn.Module) and any(isinstance(m, _BatchNorm) for m in head.modules()):
            reason = "has batch normalisation in its head, whose statistics patches would change"
        elif getattr(pool, "pos_embed", None) is not None:
            reason = "adds position embeddings when it pools"
        if reason:
            raise UserError(
                f"patch.mixing cannot classify single patches: {layout.name} {reason}; drop patch.mixing"
            )

    def __call__(self, features: Tensor, labels: Any = None) -> Tensor:
        """Patch logits, whatever the labels; see `PatchHead`."""
        prefix = self.layout.final_prefix_tokens
        if not isinstance(features, Tensor):
            raise UserError(
                f"patch.mixing: {self.layout.name} has several sequences of final features; drop patch.mixing"
            )
        if features.ndim == 3:
            patches = features[:, prefix:]  # [B, P, D]
            alone = patches.flatten(0, 1).unsqueeze(1).expand(-1, prefix + 1, -1)  # [B * P, T + 1, D]
        elif self.layout.part("output_fmt") in (None, "NCHW"):
            patches = features.flatten(2).mT  # [B, P, D]
            alone = patches.flatten(0, 1)[:, :, None, None]  # [B * P, D, 1, 1]
        else:
            patches = features.flatten(1, 2)  # [B, P, D]
            alone = patches.flatten(0, 1)[:, None, None]  # [B * P, 1, 1, D]
        logits = self.layout.backbone.forward_head(alone)
        logits = logits[0] if isinstance(logits, tuple) else logits  # a distilled student: the class token's head
        return logits.unflatten(0, patches.shape[:2])
