"""What differs between families of timm's vision transformers: where each keeps its blocks, maps and weights.

These functions look at a module itself, never at its name. They say where the blocks are (`find_blocks`), which
module's input is the softmax map (`map_tap`), how projections are called and fused (`_PROJECTIONS`, `_rows`), and
from which block on there are prefix tokens (`first_with_prefix`). To support another family, teach it here and add
the family to tests/families.py. `models.layout` puts together what is found.

Legend: B images, P patches, T prefix tokens, N = P + T tokens, D width, H heads, L blocks, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

MATRICES = ("q", "k", "v", "proj", "fc1", "fc2")


class MapTap(NamedTuple):
    """A place where a softmax map can be seen.

    Attributes:
        attention: the module that computes the map; its flag `fused_attn`, if any, must be off.
        hooked: the module whose input is the map.
        order: of that input's dimensions in the form [..., H, n, m]; () if it has this form.
        between: 'tokens', or 'channels' for XCiT's cross-covariance maps [B, H, D / H, D / H].
    """

    attention: Any
    hooked: nn.Module
    order: tuple[int, ...] = ()
    between: Literal["tokens", "channels"] = "tokens"

    def heads_first(self, x: Tensor) -> Tensor:
        """The hooked module's input in the form [..., H, n, m]."""
        return permuted(x, self.order)

    @property
    def sums_to_one(self) -> bool:
        """Whether the rows of the map that is used sum to 1: remedies may change that."""
        return all(getattr(remedy, "keeps_rows", True) for remedy in remedies_of(self.attention))


def permuted(x: Tensor, order: Sequence[int]) -> Tensor:
    """A tensor with its dimensions in this order; () leaves them."""
    return x.permute(*order) if order else x


def inverse(order: Sequence[int]) -> list[int]:
    """The order that puts dimensions back."""
    return sorted(range(len(order)), key=order.__getitem__)


def remedies_of(module: nn.Module) -> list[nn.Module]:
    """What models/remedies has put into a module."""
    return list(getattr(module, "remedies", {}).values())


class Source(NamedTuple):
    """A parameter that holds one weight matrix, or several fused ones.

    Attributes:
        parameter: where their numbers are.
        parts: all its matrices, as views: [m, n, d] if they are alike and follow each other, else each [n, d].
    """

    parameter: Tensor
    parts: Callable[[Tensor], Tensor | tuple[Tensor, ...]]


class Matrix(NamedTuple):
    """A weight matrix [n, d]: a source's part with this number."""

    source: Source
    part: int


def find_blocks(container: Any) -> Iterator[nn.Module]:
    """The modules with attention in a (nested) list of blocks or of stages that have `blocks`."""
    if not isinstance(container, (nn.Sequential, nn.ModuleList)):
        return
    for module in container:
        if attentions_of(module):
            yield module
        elif isinstance(module, (nn.Sequential, nn.ModuleList)):
            yield from find_blocks(module)
        else:
            yield from find_blocks(getattr(module, "blocks", None))


def attentions_of(block: nn.Module) -> list[Any]:
    """A block's attention modules: one, several side by side, or the block itself if all its inputs are fused."""
    for name in ("attn", "attn_out"):  # TNT's outer transformer, the one of the patches, is attn_out
        module = getattr(block, name, None)  # in convolutional networks attn may be squeeze-and-excitation
        if isinstance(module, nn.Module) and (_projections(module) or map_tap(module)):
            return [module]
    if isinstance(getattr(block, "attns", None), nn.ModuleList):
        branches: Any = block.attns
        return [branch.attn for branch in branches]
    return [block] if hasattr(block, "in_proj") and hasattr(block, "in_split") else []


def first_with_prefix(owner: nn.Module, depth: int) -> int:
    """The first block that sees the prefix tokens."""
    class_blocks = ("blocks_token_only", "cls_attn_blocks", "post_network")  # CaiT, XCiT, VOLO: after all blocks
    if any(getattr(owner, name, None) is not None for name in class_blocks):
        return depth
    return int(getattr(owner, "local_up_to_layer", 0))  # ConViT: after the gated blocks


def map_tap(attention: nn.Module) -> MapTap | None:
    """Where the softmax map [..., H, n, m] of an attention module can be seen."""
    mixed, dropped = getattr(attention, "proj_w", None), getattr(attention, "attn_drop", None)
    for remedy in remedies_of(attention):
        used = getattr(remedy, "used", None)
        if isinstance(used, nn.Module):  # re-attention changes the map after dropout
            return MapTap(attention, used)
    if isinstance(mixed, nn.Linear) and hasattr(attention, "proj_l"):  # talking heads mix the softmax maps
        return MapTap(attention, mixed, (0, 3, 1, 2))  # [B, n, m, H]
    if not isinstance(dropped, nn.Module):
        return None
    if isinstance(getattr(attention, "attn", None), nn.Linear) and hasattr(
        attention, "unfold"
    ):  # outlook attention
        return MapTap(attention, dropped, (0, 2, 1, 3, 4))  # [B, H, windows, n, m]
    crossed = isinstance(getattr(attention, "temperature", None), nn.Parameter)  # cross-covariance attention
    return MapTap(attention, dropped, between="channels" if crossed else "tokens")


# What the norms of a block's tokens are called; TNT's are norm_out and norm_mlp.
NORMS = ("norm1", "norm2", "norm3", "in_norm", "norm_out", "norm_mlp")

# Attribute of an attention module -> the parts that its rows are, in order.
_PROJECTIONS = {
    "qkv": "qkv",
    **{"qk": "qk", "kv": "kv"},
    **{"q": "q", "k": "k", "v": "v"},
    **{"q_proj": "q", "k_proj": "k", "v_proj": "v"},
}


def matrices_of(block: nn.Module) -> dict[str, list[Matrix]]:
    """All weight matrices of a block by kind, in the order of MATRICES, as far as it has them."""
    parts = [_joint_matrices(block)] if hasattr(block, "in_split") else []
    parts += [_projections(attention) for attention in attentions_of(block) if attention is not block]
    parts += [_mlp_matrices(mlp) for mlp in _mlps(block)]
    found = {name: [matrix for part in parts for matrix in part.get(name, [])] for name in MATRICES}
    return {name: matrices for name, matrices in found.items() if matrices}


def _projections(attention: nn.Module) -> dict[str, list[Matrix]]:
    """W_q, W_k, W_v and the output projection of an attention module, as far as it has them."""
    found: dict[str, list[Matrix]] = {}
    for attribute, kinds in _PROJECTIONS.items():
        weight = _weight(getattr(attention, attribute, None))
        if attribute == "qkv" and getattr(attention, "use_global", False):
            kinds = "kv"  # GCViT's global blocks take their queries from outside
        if weight is not None:
            source = Source(weight, partial(_rows, attention, kinds))
            found |= {kind: [Matrix(source, number)] for number, kind in enumerate(kinds)}
    output = getattr(attention, "proj", None)
    weight = _weight(getattr(output, "ln", output))  # LeViT: an activation, then ln
    return found if weight is None else {**found, "proj": [_all_of(weight)]}


def _rows(attention: Any, kinds: str, weight: Tensor) -> Tensor | tuple[Tensor, ...]:
    """The rows of a projection, perhaps fused, that make q, k and v."""
    weight = weight.flatten(1)  # [n, d] or [n, d, 1, 1] -> [n, d]
    by_head = hasattr(attention, "val_dim") or getattr(attention, "head_first", False)  # LeViT; CoAtNet
    if not by_head or len(kinds) == 1:
        return weight.unflatten(0, (len(kinds), -1))
    per_head = weight.unflatten(0, (attention.num_heads, -1))  # [H, n / H, d]
    if hasattr(attention, "val_dim"):
        parts = per_head.split([attention.val_dim if kind == "v" else attention.key_dim for kind in kinds], dim=1)
    else:
        parts = per_head.chunk(len(kinds), dim=1)
    return tuple(part.flatten(0, 1) for part in parts)


def _mlps(block: Any) -> list[nn.Module]:
    """A block's MLPs: one, or several side by side."""
    if isinstance(getattr(block, "mlp", None), nn.Module):
        return [block.mlp]
    return [branch.mlp for branch in getattr(block, "ffns", ())]


def _mlp_matrices(mlp: nn.Module) -> dict[str, list[Matrix]]:
    """The first and second layers of an MLP; two first ones, gate and value, if it is gated."""
    names = {"fc1": ("fc1", "fc1_g", "fc1_x", "ln1"), "fc2": ("fc2", "ln2")}
    found = {
        kind: [weight for weight in (_weight(getattr(mlp, name, None)) for name in known) if weight is not None]
        for kind, known in names.items()
    }
    first, second = found["fc1"], found["fc2"]
    matrices = {kind: [_all_of(weight) for weight in weights] for kind, weights in found.items()}
    if len(first) == len(second) == 1 and first[0].shape[0] == 2 * second[0].shape[1]:
        halves = Source(first[0], partial(torch.unflatten, dim=0, sizes=(2, -1)))
        matrices["fc1"] = [Matrix(halves, 0), Matrix(halves, 1)]  # gate and value
    return matrices


def _joint_matrices(block: Any) -> dict[str, list[Matrix]]:
    """The matrices of a block whose attention and MLP run side by side through joint projections."""
    rows = block.in_split  # of fc1, q, k and v
    joint = Source(block.in_proj.weight, partial(torch.split, split_size_or_sections=rows))
    found = {kind: [Matrix(joint, number)] for number, kind in enumerate(("fc1", "q", "k", "v"))}
    if block.out_proj is not None:
        columns = Source(
            block.out_proj.weight, partial(torch.split, split_size_or_sections=[rows[3], rows[0]], dim=1)
        )
        proj, fc2 = Matrix(columns, 0), Matrix(columns, 1)
    else:
        proj, fc2 = _all_of(block.attn_out_proj.weight), _all_of(block.mlp_out_proj.weight)
    return {**found, "proj": [proj], "fc2": [fc2]}


def _weight(layer: Any) -> Tensor | None:
    """The weight of a linear layer, a 1 x 1 convolution, or one of them with a norm behind it."""
    layer = getattr(layer, "linear", layer)
    small = isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1))
    return layer.weight if small else None


def _all_of(weight: Tensor) -> Matrix:
    """The one matrix that a weight [n, d] or [n, d, 1, 1] is."""
    return Matrix(Source(weight, lambda weight: weight.flatten(1)[None]), 0)


def channels_first(block: nn.Module, grid: Tensor) -> bool:
    """Whether a block's grid of tokens is [B, D, h, w], not [B, h, w, D]: D is the width that its values take."""
    attention = attentions_of(block)[0]
    widths = [source.parameter.shape[1] for source, _ in _projections(attention).get("v", ())]
    if (grid.shape[1] in widths) != (grid.shape[3] in widths):
        return grid.shape[1] in widths
    return made_of_convolutions(attention)


def made_of_convolutions(attention: Any) -> bool:
    """Whether an attention's projections are 1 x 1 convolutions, of grids [B, D, h, w]."""
    fused = getattr(attention, "qkv", None)
    return isinstance(getattr(fused, "linear", fused), nn.Conv2d)
