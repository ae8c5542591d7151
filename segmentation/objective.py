"""What a step of segmentation minimises, and batch norm over all processes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from losses import LabelLoss
from regularizers.diversity import Term
from regularizers.primitives import full_precision
from segmentation.heads import pixel_cross_entropy
from utils import world_size

if TYPE_CHECKING:
    from models.captured import Captured


class PixelLoss(LabelLoss):
    r"""What the masks ask of a prediction, as named terms.

        L = CE(decode head) + a CE(auxiliary head)

    CE is `pixel_cross_entropy`.

    Args:
        ignore_label: of pixels that count nowhere.
        auxiliary: a; the term is there if the network has that head.
    """

    def __init__(self, ignore_label: int = 255, auxiliary: float = 0.4) -> None:
        super().__init__()
        self.ignore_label, self.auxiliary = ignore_label, auxiliary

    def __call__(self, captured: Captured, labels: Any, teacher_logits: Tensor | None = None) -> dict[str, Term]:
        """The terms 'ce' and 'auxiliary' of masks [B, H, W]."""
        terms = {"ce": Term(pixel_cross_entropy(captured.logits, labels, self.ignore_label), 1.0)}
        if captured.dist_logits is not None:
            value = pixel_cross_entropy(captured.dist_logits, labels, self.ignore_label)
            terms["auxiliary"] = Term(value, self.auxiliary)
        return terms


class Unmixed:
    """A Mixing that mixes nothing: crops go to the network as they are, and their masks are their labels."""

    def __init__(self) -> None:
        self.random = np.random.RandomState(0)  # never asked; a checkpoint holds every mixing's

    def __call__(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return images, targets


class SyncBatchNorm(nn.BatchNorm2d):
    r"""Batch norm whose mean and variance are those of the pixels of all processes.

        y = g (x - m) / sqrt(v + e) + b,    m = 1/n sum x,    v = 1/n sum (x - m)^2

    torch's own needs a CUDA device; this one runs anywhere, so that runs of any number of processes are one run.
    Gradients flow through the sums of all processes. Parameters and buffers are those of `nn.BatchNorm2d`.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W], of any size in each process."""
        if not self.training:
            return super().forward(x)
        assert self.momentum is not None and self.running_mean is not None and self.running_var is not None
        own = full_precision(x)
        count = own.new_full((1,), own.numel() / own.shape[1])
        *sums, total = all_reduce(torch.cat([own.sum(dim=(0, 2, 3)), count])).split([own.shape[1], 1])
        mean = sums[0] / total  # [C]
        centred = own - mean[:, None, None]
        variance = all_reduce(centred.square().sum(dim=(0, 2, 3))) / total  # [C]
        with torch.no_grad():
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            unbiased = variance * total / (total - 1)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


def synchronised(network: nn.Module) -> nn.Module:
    """The network with batch norm over all processes, in place; as it is, if there is one."""
    if world_size() == 1 or not dist.is_initialized():
        return network
    if next(network.parameters()).device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(network)
    for parent in [*network.modules()]:
        for name, child in [*parent.named_children()]:
            if type(child) is nn.BatchNorm2d:
                replaced = SyncBatchNorm(child.num_features, child.eps, child.momentum)
                replaced.load_state_dict(child.state_dict())
                setattr(parent, name, replaced)
    return network
