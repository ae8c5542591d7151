"""Patch level: the items are the P patch embeddings of a block, and the per-patch mixing loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from errors import UserError
from regularizers.measures import full_precision, in_chunks

if TYPE_CHECKING:
    from mixing.mixup import Labels
    from models.capture import Captured

FIRST = -1  # '@first' is the input of block 0
DEFAULT_LAYERS = {"set": "last", "pair": "first:last", "gradient": "last"}
DEFAULT_ARGUMENTS: Mapping[str, Mapping[str, Any]] = {"so": {"normalize": True}, "cno": {"normalize": True}}


def items(captured: Captured, layer: int) -> Tensor:
    """Patch embeddings of a block's output, or of block 0's input (-1), without prefix tokens.  [B, P, D]"""
    return captured.tokens[layer][:, captured.prefix_tokens[layer] :]


def gradients(captured: Captured, layer: int, label_loss: Tensor) -> Tensor:
    """Gradient of the label loss at each patch embedding, differentiable once more.  [B, P, D]

    The loss is first scaled by its number of patch embeddings: gradient diversity does not change, and
    half-precision gradients do not underflow.

    Raises:
        UserError: the label loss does not depend on these tokens.
    """
    tokens = captured.tokens[layer]  # [B, N, D]
    scale = tokens.shape[0] * tokens.shape[1]
    (gradient,) = torch.autograd.grad(label_loss * scale, tokens, create_graph=True, allow_unused=True)
    if gradient is None:
        raise UserError(
            f"the label loss does not depend on the captured tokens of layer {layer}, so patch.gradient_diversity "
            "has no gradient there: models that are compiled, or in DDP with static_graph=True, hand out copies"
        )
    return gradient[:, captured.prefix_tokens[layer] :]


def mixing(patch_logits: Tensor, labels: Labels) -> Tensor:
    r"""Cross-entropy of every patch against its own soft label, mean over images and patches.

        R = 1/(B P) sum_bp CE_bp
        CE_bp = -(1 - e) (w_p log q_own + (1 - w_p) log q_partner) - e mean_k log q_k

    q is the softmax of the patch's K logits, e the label smoothing and w_p the share of patch p that shows the
    image's own class. The second line is the cross-entropy with the dense label e/K + (1 - e) (w_p 1_own + (1 -
    w_p) 1_partner), which is never built; nor are the log-probabilities, but for some patches at a time.

    Args: patch_logits [B, P, K], any precision; computed in at least float32.
    Returns: scalar. The papers' sum over patches is P times it.
    Range: [0, inf); log K where all classes are equally likely.
    Rewards: patches that say themselves which class they show.
    Cost: O(P K); again in the backward pass. And the model's head on every patch. Keeps nothing but the input.
    Source: [C22], mixing loss, after [G21].
    Use: the recipe's term inside the label loss; it also lets the label reach the last block's patches.
    """
    classes = torch.stack([labels.own, labels.partner], dim=1)[:, None]  # [B, 1, 2]
    classes = classes.expand(-1, patch_logits.shape[1], -1).flatten(0, 1)  # [B * P, 2]
    shares = torch.stack([labels.patch_weight, 1 - labels.patch_weight], dim=2).flatten(0, 1)  # [B * P, 2]
    return _CrossEntropy.apply(patch_logits.flatten(0, 1), classes, shares, labels.smoothing).mean()


class _CrossEntropy(torch.autograd.Function):
    """`mixing` patch by patch: CE of logits [N, K] with two classes [N, 2] and their shares [N, 2].  -> [N]

    It keeps the logits as they are. Besides, only the gradient is as large as they are; with q recomputed, it is

        dCE/dlogit_k = q_k - e/K - (1 - e) (w 1_own + (1 - w) 1_partner)_k
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, classes: Tensor, shares: Tensor, smoothing: float) -> Tensor:
        ctx.save_for_backward(logits, classes, shares)
        ctx.smoothing = smoothing
        values = []
        for some, chosen, parts in zip(*in_chunks(logits, classes, shares), strict=True):
            log_q = full_precision(some).log_softmax(dim=1)  # [n, K]
            hit = (parts * log_q.gather(1, chosen)).sum(dim=1)  # [n]
            values.append(-((1 - smoothing) * hit + smoothing * log_q.mean(dim=1)))
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        logits, classes, shares = ctx.saved_tensors
        by_logits, start = torch.empty_like(logits), 0
        for some, chosen, parts, factor in zip(*in_chunks(logits, classes, shares, gradient), strict=True):
            q = full_precision(some).softmax(dim=1)  # [n, K]
            hit = ((1 - ctx.smoothing) * parts).to(q.dtype)  # [n, 2]
            by_some = (q - ctx.smoothing / q.shape[1]).scatter_add(1, chosen, -hit)
            by_logits[start : start + len(some)] = by_some * factor[:, None]
            start += len(some)
        return by_logits, None, None, None
