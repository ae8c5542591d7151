"""Measures that take labels, from the patches' features and the linear layer that classifies them: without logits.

Each function is its namesake in measures.py with logits z_p = W x_p + b: the same equation, range and source.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from errors import UserError
from regularizers.measures import labels_of_patches
from regularizers.primitives import full_precision

if TYPE_CHECKING:
    from mixing.mixup import Labels
    from models.heads import Linear

MAX_ELEMENTS = 2**19  # of the logits that are there at a time on a CPU, about: 2 MiB in float32
MAX_ELEMENTS_ON_DEVICE = 2**25  # where launching a kernel costs more than memory: 128 MiB in float32
LEAST = 320  # patches at a time: products with fewer are slower, and each part reads and writes W's gradient
FLOAT16_LIMIT = 6e4  # no product of float16 may be larger


def mixing(linear: Linear, labels: Labels) -> Tensor:
    """1/(B P) sum_bp CE_bp, under autocast with the layer's products in its precision.

    The logits of some patches are there at a time, once: the loss is linear in the gradient that comes back to it,
    so the gradients at x, W and b are made in the same pass, and only multiplied later. A second derivative, or a
    second backward pass, is refused.

    Returns: scalar, in at least float32.
    """
    features, weight, bias = linear
    kind, differentiated = features.device.type, torch.is_grad_enabled()
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else features.dtype
    options = labels.smoothing, dtype, differentiated
    return _MeanCrossEntropy.apply(features.flatten(0, 1), weight, bias, *labels_of_patches(labels), *options)


OF_FEATURES: Mapping[str, Callable[[Linear, Any], Tensor]] = {"mixing": mixing}


class _MeanCrossEntropy(torch.autograd.Function):
    """`mixing` of features [N, D], with two classes [N, 2] and their shares [N, 2].  -> scalar

    Logits stand upright, [K, n]: on CPUs W X^T is a third faster than X W^T.
    """

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        classes: Tensor,
        shares: Tensor,
        smoothing: float,
        dtype: torch.dtype,
        differentiated: bool,
    ) -> Tensor:
        sums = [
            torch.zeros_like(each, dtype=full_precision(each[:0]).dtype)
            if differentiated and each is not None and each.requires_grad
            else None
            for each in (features, weight, bias)
        ]
        total = features.new_zeros((), dtype=full_precision(features[:0]).dtype)
        start, count = 0, len(features)
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        with torch.autocast(features.device.type, enabled=False):
            for some, chosen, parts in _in_parts(features, classes, shares, classes_of=weight):
                some, chosen, parts = some.to(dtype), chosen.mT, parts.mT  # [n, D], [2, n], [2, n]
                logits = weight @ some.mT if bias is None else torch.addmm(bias[:, None], weight, some.mT)  # [K, n]
                logits = full_precision(logits)
                likely = logits.gather(0, chosen)  # [2, n]
                mean = logits.mean(dim=0) if smoothing else 0.0  # [n]
                q, log_sum = _softmax_(logits)
                loss = log_sum - (1 - smoothing) * (parts * likely).sum(dim=0) - smoothing * mean  # [n]
                total += loss.sum() / count
                if any(each is not None for each in sums):
                    hits = ((1 - smoothing) * parts).to(q.dtype)
                    by_logits = q.sub_(smoothing / len(q)).scatter_add_(0, chosen, -hits)
                    _add(sums, slice(start, start + len(some)), some, weight, by_logits, 1 / count)
                start += len(some)
        ctx.save_for_backward(*sums)
        ctx.is_spent = False  # a backward pass multiplies them in place
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() or ctx.is_spent:
            raise UserError("mixing of features is differentiated once, not twice: take --explicit-terms")
        ctx.is_spent = True
        found = [None if each is None else each.mul_(gradient) for each in ctx.saved_tensors]
        return *found, None, None, None, None, None


def _in_parts(*tensors: Tensor, classes_of: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of equal length, split alike, so that the logits of a part bound the memory."""
    limit = MAX_ELEMENTS if classes_of.device.type == "cpu" else MAX_ELEMENTS_ON_DEVICE
    count, most = len(tensors[0]), max(LEAST, limit // len(classes_of))
    rows = math.ceil(count / max(1, round(count / most)))  # parts of equal length, and none of a few rows
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)


def _softmax_(logits: Tensor) -> tuple[Tensor, Tensor]:
    """In place of the logits [K, n] their softmax over classes, and log sum_k exp z_k.  -> [K, n], [n]"""
    largest = logits.amax(dim=0)  # [n]
    powers = logits.sub_(largest).exp_()
    sums = powers.sum(dim=0)
    return powers.mul_(1 / sums), largest + sums.log()


def _add(
    sums: list[Tensor | None], rows: slice, some: Tensor, weight: Tensor, by_logits: Tensor, factor: float
) -> None:
    """Add the part of some features [n, D] to the gradients at features, weight and bias; by_logits [K, n]."""
    by_features, by_weight, by_bias = sums
    narrow = by_logits.to(weight.dtype)
    if by_features is not None:
        by_features[rows] = (narrow.mT @ weight).to(by_features.dtype) * factor  # float16 would lose digits
    if by_weight is not None and narrow.dtype == by_weight.dtype:
        by_weight.addmm_(narrow, some, alpha=factor)
    elif by_weight is not None:
        shrink = _shrink(some)
        by_weight += (narrow @ (some * shrink).to(some.dtype)) * (factor / shrink)
    if by_bias is not None:
        by_bias += by_logits.sum(dim=1) * factor


def _shrink(some: Tensor) -> Tensor | float:
    """What features [n, D] are to be multiplied by, so that no sum of them overflows in float16."""
    if some.dtype != torch.float16:
        return 1.0
    return (FLOAT16_LIMIT / (len(some) * some.abs().amax().float()).clamp_min(1.0)).clamp_max(1.0)
