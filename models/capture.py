"""The wrapper that owns the hooks, and what one forward pass shows to the regularizers.

Legend: B images, P patches, T prefix tokens, N = P + T tokens, D width, H heads, L blocks, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.adapters import Layout, find_layout
from utils import BAD_ARGUMENT, UserError

INPUT = -1  # index of the tokens entering block 0


@dataclass(frozen=True)
class Needs:
    """What an objective wants to see.

    Attributes:
        tokens: block indices whose output tokens are wanted; -1 is the input of block 0.
        attention: block indices whose attention map is wanted.
        weights: block indices whose W_q, W_k and W_v are wanted; they are read, no hook is needed.
        patch_logits: whether every patch is to be classified.
    """

    tokens: frozenset[int] = frozenset()
    attention: frozenset[int] = frozenset()
    weights: frozenset[int] = frozenset()
    patch_logits: bool = False

    def __or__(self, other: Needs) -> Needs:
        return Needs(
            self.tokens | other.tokens,
            self.attention | other.attention,
            self.weights | other.weights,
            self.patch_logits or other.patch_logits,
        )

    def __bool__(self) -> bool:
        return bool(self.tokens or self.attention or self.weights or self.patch_logits)


class Captured(NamedTuple):
    """What one forward pass shows. A NamedTuple, so that DDP and compile find the tensors in it.

    Attributes:
        logits: [B, K], the model's own prediction; the class token's while a distilled student is in training.
        dist_logits: [B, K], the distillation token's prediction, from a distilled student in training.
        patch_logits: [B, P, K] = head(norm(h_last)), if asked for.
        tokens: block index -> [B, N, D], the block's output; -1 is the input of block 0.
        attention: block index -> [B, H, N, N], after the softmax, before dropout.
        prefix_tokens: T, how many of the N tokens come before the patches.
    """

    logits: Tensor
    dist_logits: Tensor | None
    patch_logits: Tensor | None
    tokens: dict[int, Tensor]
    attention: dict[int, Tensor]
    prefix_tokens: int


class DiverseViT(nn.Module):
    """An unmodified timm model with hooks on exactly what is needed; without needs, any timm model as it is.

    Hooks are registered once, here, before compile, DDP and the EMA's copy. They store nothing unless a forward
    pass that asks for it is under way, so no tensor outlives its step and gradient checkpointing's
    recomputation stores nothing. Blocks whose map is wanted leave the fused attention kernel, which never
    materialises it: for good where training wants it, for that pass alone where only a measurement does.

    Args:
        backbone: a timm model.
        needs: what every training pass captures.
        measured: what other passes may ask for besides.
    Raises:
        UserError: the backbone does not have what is needed.
    """

    backbone: Any  # an nn.Module; timm's parts of it have no common type

    def __init__(self, backbone: nn.Module, needs: Needs = Needs(), measured: Needs = Needs()) -> None:
        super().__init__()
        self.backbone = backbone
        self.needs = needs
        hooked = needs | measured
        self.layout = find_layout(backbone) if hooked else None
        self.prefix_tokens = self.layout.prefix_tokens if self.layout else 0
        self._wanted = Needs()
        self._sink: dict[tuple[str, int], Tensor] = {}
        if self.layout:
            self._install_hooks(self.layout, hooked)

    def projections(self, block: int) -> tuple[Tensor, Tensor, Tensor]:
        """W_q, W_k, W_v of a block, each [D_out, D_in], as views of the parameters."""
        assert self.layout is not None
        return self.layout.projections(block)

    def _install_hooks(self, layout: Layout, hooked: Needs) -> None:
        for index in sorted(hooked.weights):
            layout.projections(index)  # raises now, not in the first step
        if hooked.patch_logits and not self._classifies_tokens():
            raise UserError(
                f"{layout.name} pools its tokens with attention or has no linear head, so patch.mixing cannot "
                "classify single patches; drop patch.mixing or choose a class-token or average-pooled model"
            )
        for index in sorted(hooked.tokens):
            if index == INPUT:
                layout.blocks[0].register_forward_pre_hook(self._before_blocks)
            else:
                layout.blocks[index].register_forward_hook(partial(self._after_block, index))
        for index in sorted(hooked.attention):
            attention, dropout = layout.attention_dropout(index)
            if index in self.needs.attention:
                attention.fused_attn = False
            dropout.register_forward_pre_hook(partial(self._before_dropout, index))

    def _classifies_tokens(self) -> bool:
        pooled_by_attention = getattr(self.backbone, "attn_pool", None) is not None
        has_parts = all(hasattr(self.backbone, part) for part in ("forward_head", "head", "head_drop", "fc_norm"))
        return has_parts and isinstance(self.backbone.head, nn.Linear) and not pooled_by_attention

    def _store(self, kind: str, index: int, value: Tensor) -> None:
        if index in (self._wanted.tokens if kind == "tokens" else self._wanted.attention):
            self._sink[kind, index] = value

    def _before_blocks(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._store("tokens", INPUT, args[0])

    def _after_block(self, index: int, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self._store("tokens", index, output)

    def _before_dropout(self, index: int, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._store("attention", index, args[0])

    def _caught(self, kind: str, indices: frozenset[int]) -> dict[int, Tensor]:
        missing = [index for index in indices if (kind, index) not in self._sink]
        if missing:
            raise UserError(
                f"{type(self.backbone).__name__} never showed its {kind} at block {missing[0]}: the hook there "
                "did not fire, so no term can use it"
            )
        return {index: self._sink[kind, index] for index in sorted(indices)}

    @contextmanager
    def _watching(self, needs: Needs) -> Iterator[None]:
        """Let the hooks store what is needed, and forget it afterwards."""
        assert self.layout is not None
        only_now = [self.layout.attention_dropout(i)[0] for i in needs.attention - self.needs.attention]
        fused = [attention.fused_attn for attention in only_now]
        self._wanted = needs
        for attention in only_now:
            attention.fused_attn = False
        try:
            yield
        finally:
            self._wanted, self._sink = Needs(), {}
            for attention, was in zip(only_now, fused, strict=True):
                attention.fused_attn = was

    def _patch_logits(self, features: Tensor) -> Tensor:
        """Every patch token through the model's own final norms and head.  [B, N, D] -> [B, P, K]"""
        patches = features[:, self.prefix_tokens :]  # [B, P, D]; forward_features has applied the final norm
        return self.backbone.head(self.backbone.head_drop(self.backbone.fc_norm(patches)))

    def forward(self, images: Tensor, needs: Needs | None = None) -> Captured:
        """Classify images, and show what is needed.

        Args:
            images: [B, 3, S, S].
            needs: what to capture; None is what training captures, `Needs()` nothing but the logits.
        """
        needs = self.needs if needs is None else needs
        if not needs:
            return Captured(*_split(self.backbone(images)), None, {}, {}, self.prefix_tokens)
        with self._watching(needs):
            if needs.patch_logits:
                features = self.backbone.forward_features(images)  # [B, N, D]
                outputs = self.backbone.forward_head(features)
                patch_logits = self._patch_logits(features)
            else:
                outputs, patch_logits = self.backbone(images), None
            tokens = self._caught("tokens", needs.tokens)
            attention = self._caught("attention", needs.attention)
        return Captured(*_split(outputs), patch_logits, tokens, attention, self.prefix_tokens)

    @torch.no_grad()
    def check(self, image_size: int, num_classes: int, needs: Needs) -> None:
        """Try a blank image, so that what cannot work is refused before training.

        Raises:
            UserError: the model does not take such images or returns other logits, or what is captured is not
                what the terms take it for: P patches after T prefix tokens, softmax maps between all N tokens.
        """
        name, was_training = type(self.backbone).__name__, self.training
        blank = torch.zeros(2, 3, image_size, image_size, device=next(self.parameters()).device)
        self.eval()
        try:
            captured = self(blank, needs=needs)
        except BAD_ARGUMENT as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(
                f"{name} cannot take images of 3 x {image_size} x {image_size} pixels: {reason}. "
                "Check --input-size and --model-kwargs"
            ) from error
        finally:
            self.train(was_training)
        if captured.logits.shape != (2, num_classes):
            raise UserError(
                f"{name} returns {list(captured.logits.shape[1:])} numbers an image, the data has {num_classes} "
                "classes: leave num_classes and the head out of --model-kwargs"
            )
        if self.layout is not None:
            _check_captured(captured, self.layout, image_size)


def _check_captured(captured: Captured, layout: Layout, image_size: int) -> None:
    height, width = layout.patch_size
    expected = layout.prefix_tokens + (image_size // height) * (image_size // width)  # N
    for index, tokens in captured.tokens.items():
        if tokens.ndim != 3 or tokens.shape[1] != expected:
            raise UserError(
                f"patch terms take the tokens of {layout.name} at layer {index} for [B, {expected}, D], "
                f"but they are {list(tokens.shape)}: this family keeps its patches elsewhere and is not supported"
            )
    for index, attention in captured.attention.items():
        rows = attention.float().sum(dim=-1)
        square = attention.ndim == 4 and attention.shape[2:] == (expected, expected)
        if not (square and torch.allclose(rows, torch.ones_like(rows), atol=1e-2)):
            raise UserError(
                f"attention terms take the map of {layout.name} at block {index} for a softmax [B, H, N, N] with "
                f"N = {expected}, but it is {list(attention.shape)}, or its rows do not sum to 1: this family's "
                "attention is not supported; use patch or weight terms"
            )


def _split(outputs: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
    """(logits, None), or the distilled pair (logits, dist_logits)."""
    return outputs if isinstance(outputs, tuple) else (outputs, None)
