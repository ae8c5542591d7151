"""What classifies every patch: the heads that `DiverseViT` may be built with.

A head is made once, from the layout of a backbone, and is no module. If it has parameters, it attaches its module
to the backbone, e.g. `layout.backbone.patch_head = nn.Linear(...)`. Then optimizer, EMA, checkpoints, DDP and FSDP
treat it like any other layer.

Legend: B images, P patches, T prefix tokens, N = P + T tokens, D width, K classes, R regions.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from errors import UserError
from models.layout import Layout

PATCH_HEAD = "patch_head"  # the attribute of a backbone under which a head's own layer stands


class PatchHead(Protocol):
    """Makes patch logits of a model's final features.

    Args:
        layout: of the backbone.
    Attributes:
        joint: whether it classifies whole images where it gets no labels, [B, 1, K]. An evaluation then reports,
            beside the model's own accuracy, that of both predictions together.
    Raises:
        UserError: it cannot work with this backbone.
    """

    joint: bool

    def __init__(self, layout: Layout) -> None: ...

    @staticmethod
    def attach(backbone: Any) -> None:
        """Give a timm model the layers that this head needs beside the model's own, unless it has them."""

    def __call__(self, features: Tensor, labels: Any = None) -> Tensor:
        """The logits of every patch.

        Args:
            features: what forward_features returns, final norm included: [B, N, D], [B, h, w, D] or [B, D, h, w].
            labels: those of the mixed images, if there are any, for a head that mixes regions.
        Returns: [B, P, K], patches row by row; or [B, R, K], the regions that the labels name.
        """


class OwnHead:
    """Every patch as the model's own head would classify an image of this one patch.

    The pooled token of such an image is the patch itself, or for attention pooling the pool's own function of it.
    So class-token, average- and map-pooled models are all served by their `forward_head`.

    Raises:
        UserError: the head cannot classify single patches.
    """

    joint = False

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

    @staticmethod
    def attach(backbone: Any) -> None:
        """It needs no layer."""

    def __call__(self, features: Tensor, labels: Any = None) -> Tensor:
        """Patch logits, whatever the labels; see `PatchHead`."""
        prefix = self.layout.final_prefix_tokens
        patches = self.layout.final_tokens(features)[:, prefix:]  # [B, P, D]
        alone = patches.flatten(0, 1)  # [B * P, D]
        if features.ndim == 3:
            alone = alone.unsqueeze(1).expand(-1, prefix + 1, -1)  # [B * P, T + 1, D]
        elif self.layout.grid_is_channels_first:
            alone = alone[:, :, None, None]  # [B * P, D, 1, 1]
        else:
            alone = alone[:, None, None]  # [B * P, 1, 1, D]
        logits = self.layout.backbone.forward_head(alone)
        logits = logits[0] if isinstance(logits, tuple) else logits  # a distilled student: the class token's head
        return logits.unflatten(0, patches.shape[:2])


class RegionHead:
    r"""A second linear head, `patch_head`, of the patches of a region: Patch Diversification's.

        f_r = (sum_p m_rp z_p / P) P / (sum_p m_rp + 1e-4),   logits_r = W dropout(f_r) + b

    z_p is patch p in the final features [B, P, D], and m_rp is 1 in region r, else 0. W [K, D] starts as a normal
    of deviation 0.02, cut at +-2, b as 0. Dropout is that of the backbone's own head (timm's `drop_rate`), drawn
    anew.

    Without labels there is one region, the whole image, and f is the mean of all patches.

    Args:
        layout: of the backbone, which gets the layer unless it has it.
    Raises:
        UserError: the model does not classify, or does not say how wide its features are.
    Source: Gong et al., Vision Transformers with Patch Diversification, 2021, and its code.
    """

    joint = True

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        if not all(hasattr(layout.backbone, part) for part in ("forward_features", "forward_head")):
            raise UserError(
                f"patch.region_mixing reads final features, but {layout.name} has no forward_features and "
                "forward_head; drop patch.region_mixing"
            )
        self.attach(layout.backbone)

    @staticmethod
    def attach(backbone: Any) -> None:
        """Give a timm model its `patch_head`, unless it has one."""
        if getattr(backbone, PATCH_HEAD, None) is not None:
            return
        width, classes = getattr(backbone, "num_features", 0), getattr(backbone, "num_classes", 0)
        if not (width and classes):
            raise UserError(
                f"patch.region_mixing needs a classifier of its own, but {type(backbone).__name__} does not say "
                "how wide its features are, or has no classes; drop patch.region_mixing"
            )
        layer = nn.Linear(width, classes)
        nn.init.trunc_normal_(layer.weight, std=0.02)
        nn.init.zeros_(layer.bias)
        setattr(backbone, PATCH_HEAD, layer.to(next(backbone.parameters())))

    def __call__(self, features: Tensor, labels: Any = None) -> Tensor:
        """Logits of each region [B, R, K]; without labels of the whole image [B, 1, K]. See `PatchHead`.

        Args:
            labels: with `regions` [R, P], 1 where a patch is in a region (mixing/patch_grid.py).
        """
        patches = self.layout.final_tokens(features)[:, self.layout.final_prefix_tokens :]  # [B, P, D]
        if labels is None:
            regions = patches.mean(dim=1, keepdim=True)  # [B, 1, D]
        else:
            counts = labels.regions.sum(dim=1)[:, None]  # [R, 1]
            regions = torch.matmul(labels.regions.to(patches.dtype), patches) / (counts + 1e-4)  # [B, R, D]
        dropout = self._dropout()
        logits: Tensor = self.layout.part(PATCH_HEAD)(regions if dropout is None else dropout(regions))
        return logits

    def _dropout(self) -> nn.Module | None:
        """The dropout before the backbone's own classifier; None if it has none."""
        for found in (self.layout.part("head_drop"), getattr(self.layout.part("head"), "drop", None)):
            if isinstance(found, nn.Module):
                return found
        return None
