"""What timm itself has against redundancy, put into a model that is built already: under timm's own names.

So weights of a stock model can be loaded first, and timm builds the same model by `arguments`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from timm.layers import Attention, DiffAttention, LayerScale
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from errors import UserError
from models.adapters import remedies_of
from models.layout import Layout
from models.remedies.attending import refuse

MOST = 1024  # registers


class LayerScaling:
    r"""Scale what each branch of a block adds, channel by channel: x + g f(x).

    g [D] starts at `init`; it has no weight decay. It can be folded into the branch's last layer.

    Args:
        init: where g starts. At 1 the model is the stock model.
    Source: Touvron et al., Going deeper with Image Transformers, 2021 (arXiv 2103.17239).
    """

    name = "layerscale"

    @classmethod
    def install(cls, layout: Layout, blocks: Sequence[int], *, init: float = 1e-5) -> None:
        """Put them into the places that timm's blocks have for them.

        Raises:
            UserError: a block that has none, or has them already.
        """
        for block in blocks:
            places = list(_branches(layout.blocks[block]))
            if not places:
                kind = type(layout.blocks[block]).__name__
                refuse(layout, block, cls.name, f"timm's {kind} has no place for it")
            for end, owner, attribute in places:
                before = getattr(owner, attribute)
                if not (before is None or type(before) is nn.Identity):
                    refuse(layout, block, cls.name, "it scales its branches already")
                scale = LayerScale(_last(end).weight.shape[0], init_values=init)
                setattr(owner, attribute, scale.gamma if before is None else scale)


def fold_layer_scale(layout: Layout, blocks: Sequence[int]) -> None:
    """Multiply the scales into the branches' last layers; the model computes the same without them."""
    for block in blocks:
        for end, owner, attribute in list(_branches(layout.blocks[block])):
            scale = getattr(owner, attribute)
            native = isinstance(scale, LayerScale)
            layer = _last(end)
            with torch.no_grad():
                gamma = scale.gamma if native else scale  # [n]
                layer.weight.mul_(gamma[:, None])
                if layer.bias is not None:
                    layer.bias.mul_(gamma)
            setattr(owner, attribute, nn.Identity() if native else None)


def _branches(block: Any) -> Iterator[tuple[Any, Any, str]]:
    """(attention or MLP, owner and attribute of its scale) of the blocks that timm has a place for it in."""
    for branch in (*getattr(block, "attns", ()), *getattr(block, "ffns", ())):
        yield branch[1], branch, "ls"
    if hasattr(block, "in_split"):
        return  # attention and MLP have one scale, for their sum
    for end, names in (("attn", ("ls1", "gamma_1")), ("mlp", ("ls2", "gamma_2"))):
        for name in names:
            if hasattr(block, name):
                yield getattr(block, end), block, name


def _last(end: Any) -> Any:
    """The last layer of an attention or an MLP."""
    return end.proj if hasattr(end, "proj") else end.fc2


class Registers:
    r"""Give the model further tokens beside the class token, which no one reads in the end.

    They start as a truncated normal with deviation 0.02, with no position of their own. As in timm, they have no
    weight decay.

    Args:
        count: how many.
    Source: Darcet et al., Vision Transformers Need Registers, 2024 (arXiv 2309.16588).
    """

    name = "registers"
    of_blocks = False

    @classmethod
    def install(cls, layout: Layout, blocks: Sequence[int], *, count: int = 4) -> None:
        """Put them between the class token and the patches.

        Raises:
            UserError: fewer than one, or a model without a place for them.
        """
        if not 1 <= count <= MOST:
            raise UserError(f"--remedy registers:count={count}: give 1 to {MOST}")
        backbone: Any = layout.backbone
        if type(backbone) not in (VisionTransformer, Eva):
            raise UserError(
                f"--remedy registers: timm's {layout.name} has no place for them: choose another --model"
            )
        if backbone.reg_token is not None:
            there = backbone.reg_token.shape[1]
            raise UserError(f"--remedy registers: this {layout.name} has {there} already, choose another --model")
        token = torch.empty(1, count, backbone.embed_dim)
        backbone.reg_token = nn.Parameter(nn.init.trunc_normal_(token, std=0.02))
        before = backbone.num_prefix_tokens
        backbone.num_reg_tokens = count
        backbone.num_prefix_tokens = before + count
        if backbone.pos_embed is not None and not backbone.no_embed_class:
            old = backbone.pos_embed.detach()  # [1, T + P, D]
            zeros = old.new_zeros(1, count, old.shape[2])
            backbone.pos_embed = nn.Parameter(torch.cat([old[:, :before], zeros, old[:, before:]], dim=1))
        for module in backbone.modules():
            if module is not backbone and getattr(module, "num_prefix_tokens", None) == before:
                module.num_prefix_tokens = before + count  # rotary attention, dropout of patches


class Differential:
    r"""The difference of two maps in place of one.

        o = (softmax(q_1 k_1^T) - l softmax(q_2 k_2^T)) v (1 - l_0), normalised per head

    Queries and keys of a head are split into two; the projections stay, l and the norm of each head are new.
    Vectors have no weight decay.

    Source: Ye et al., Differential Transformer, 2024 (arXiv 2410.05258); timm's DiffAttention.
    """

    name = "differential"

    @classmethod
    def install(cls, layout: Layout, blocks: Sequence[int]) -> None:
        """Put timm's DiffAttention in the place of its Attention, with the same projections.

        Raises:
            UserError: another kind of attention, or heads of odd width.
        """
        for block in blocks:
            for owner, attention in _plain_attentions(layout, block, cls.name):
                if attention.head_dim % 2:
                    refuse(layout, block, cls.name, f"heads of width {attention.head_dim} cannot be split in two")
                if type(attention.q_norm) is not nn.Identity:
                    refuse(layout, block, cls.name, "its queries and keys are normalised already")
                new = DiffAttention(
                    attention.attn_dim,
                    num_heads=attention.num_heads,
                    qkv_bias=attention.qkv.bias is not None,
                    proj_bias=attention.proj.bias is not None,
                    attn_drop=attention.attn_drop.p,
                    proj_drop=attention.proj_drop.p,
                    depth=block,
                )
                new.qkv, new.proj = attention.qkv, attention.proj
                owner.attn = new


class QKNorm:
    r"""Normalise queries and keys, each over the width of a head, before their product.

    The norms are of the block's own kind. Their parameters have no weight decay.

    Source: Henry et al., Query-Key Normalization for Transformers, 2020 (arXiv 2010.04245); as layer norms:
        Dehghani et al., Scaling Vision Transformers to 22 Billion Parameters, 2023 (arXiv 2302.05442).
    """

    name = "qk_norm"

    @classmethod
    def install(cls, layout: Layout, blocks: Sequence[int]) -> None:
        """Put norms into the places that timm's attention has for them.

        Raises:
            UserError: an attention that has none, or is normalised already.
        """
        for block in blocks:
            for attention in layout.attentions(block):
                places = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
                if not all(type(place) is nn.Identity for place in places):
                    why = "has no place for it" if None in places else "normalises queries and keys already"
                    refuse(layout, block, cls.name, f"timm's {type(attention).__name__} {why}")
                kind: Any = type(layout.norms(block)[0])
                for name in ("q_norm", "k_norm"):
                    setattr(attention, name, kind(attention.head_dim, eps=layout.norms(block)[0].eps))


def _plain_attentions(layout: Layout, block: int, name: str) -> list[tuple[Any, Any]]:
    """(owner, attention) of a block whose attention is timm's plain one.

    Raises:
        UserError: it is another one.
    """
    module: Any = layout.blocks[block]
    owners = list(getattr(module, "attns", ())) or [module]
    for owner in owners:
        attention = getattr(owner, "attn", None)
        if attention is not None and remedies_of(attention):
            refuse(layout, block, name, "its attention is changed by another remedy already")
        if type(attention) is not Attention or attention.gate is not None:
            kind = type(attention or module).__name__
            refuse(layout, block, name, f"it takes the place of timm's Attention, and here is {kind}")
    return [(owner, owner.attn) for owner in owners]


def arguments(name: str, options: Mapping[str, Any], backbone: nn.Module) -> dict[str, Any]:
    """What timm's constructor is told to build a model with this remedy; {} if it cannot be told."""
    if name == Registers.name:
        return {"num_reg_tokens" if isinstance(backbone, Eva) else "reg_tokens": options.get("count", 4)}
    told: dict[str, dict[str, Any]] = {Differential.name: {"attn_layer": "diff"}, QKNorm.name: {"qk_norm": True}}
    return told.get(name, {})
