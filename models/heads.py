"""What classifies every patch: the heads that `DiverseViT` may be built with.

A head is made once, from the layout of a backbone, and is no module. If it has parameters, it attaches its module
to the backbone, e.g. `layout.backbone.patch_head = nn.Linear(...)`. Then optimizer, EMA, checkpoints, DDP and FSDP
treat it like any other layer.

Legend: B images, P patches, T prefix tokens, N = P + T tokens, D width, K classes, R regions.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from errors import UserError
from models.layout import Layout

PATCH_HEAD = "patch_head"  # the attribute of a backbone under which a head's own layer stands


class Linear(NamedTuple):
    """Features, and the linear layer that classifies them.

    Attributes:
        features: x, [B, P, D].
        weight: W, [K, D].
        bias: b, [K], or None.
    """

    features: Tensor
    weight: Tensor
    bias: Tensor | None


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

    def find_linear(self, features: Tensor) -> None:
        """Find out, from some features, whether `linear` can take this head apart."""

    def linear(self, features: Tensor) -> Linear | None:
        """What a linear layer makes the logits [B, P, K] of, and the layer; None if that is not all there is."""

    def __call__(self, features: Tensor, labels: Any = None) -> Tensor:
        """The logits of every patch.

        Args:
            features: what forward_features returns, final norm included: [B, N, D], [B, h, w, D] or [B, D, h, w].
            labels: those of the mixed images, if there are any, for a head that mixes regions.
        Returns: [B, P, K], patches row by row; or [B, R, K], the regions that the labels name.
        """


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """With all modules in training or evaluation mode; afterwards each is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


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
        self._linear: dict[bool, bool] = {}  # training mode -> whether a linear layer comes last in it
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
        alone, shape = self._alone(features)
        return _first(self.layout.backbone.forward_head(alone)).unflatten(0, shape)

    def _alone(self, features: Tensor) -> tuple[Tensor, torch.Size]:
        """Each patch as the final features of an image of this one patch, and (B, P)."""
        prefix = self.layout.final_prefix_tokens
        patches = self.layout.final_tokens(features)[:, prefix:]  # [B, P, D]
        alone = patches.flatten(0, 1)  # [B * P, D]
        if features.ndim == 3:
            alone = alone.unsqueeze(1).expand(-1, prefix + 1, -1)  # [B * P, T + 1, D]
        elif self.layout.grid_is_channels_first:
            alone = alone[:, :, None, None]  # [B * P, D, 1, 1]
        else:
            alone = alone[:, None, None]  # [B * P, 1, 1, D]
        return alone, patches.shape[:2]

    @property
    def _classifier(self) -> Any:
        found = self.layout.part("get_classifier")
        return _first(found()) if found is not None else None

    def find_linear(self, features: Tensor) -> None:
        """Try whether what forward_head returns is what a linear layer returns, in both modes; see `PatchHead`."""
        takes = inspect.signature(self.layout.backbone.forward_head).parameters
        if type(self._classifier) is nn.Linear and "pre_logits" in takes:
            self._linear = {training: self._ends_linear(features, training) for training in (True, False)}

    @torch.no_grad()
    def _ends_linear(self, features: Tensor, training: bool) -> bool:
        backbone, seen = self.layout.backbone, []
        alone, _ = self._alone(features)
        handle = self._classifier.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
        devices = [alone.device] if alone.is_cuda else []
        try:
            with in_mode(backbone, training), torch.random.fork_rng(devices):
                torch.manual_seed(0)  # of dropout
                returned = _first(backbone.forward_head(alone))
                torch.manual_seed(0)
                read = backbone.forward_head(alone, pre_logits=True)
        finally:
            handle.remove()
        return len(seen) == 1 and seen[0][1] is returned and torch.equal(seen[0][0], read)

    def linear(self, features: Tensor) -> Linear | None:
        """The features that the model's last layer reads of each patch, and this layer; see `PatchHead`."""
        if not self._linear.get(self.layout.backbone.training):
            return None
        alone, shape = self._alone(features)
        read = self.layout.backbone.forward_head(alone, pre_logits=True)  # [B * P, D]
        return Linear(read.unflatten(0, shape), self._classifier.weight, self._classifier.bias)


def _first(found: Any) -> Any:
    """Of a distilled student, which has two classifiers, that of the class token."""
    return found[0] if isinstance(found, tuple) else found


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

    def find_linear(self, features: Tensor) -> None:
        """Nothing: there are few regions, and their logits are small."""

    def linear(self, features: Tensor) -> None:
        """Its logits are those of regions."""

    def _dropout(self) -> nn.Module | None:
        """The dropout before the backbone's own classifier; None if it has none."""
        for found in (self.layout.part("head_drop"), getattr(self.layout.part("head"), "drop", None)):
            if isinstance(found, nn.Module):
                return found
        return None
