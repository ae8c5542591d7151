"""Where a timm vision transformer keeps its blocks, attention maps, weights and prefix tokens.

`find_layout` looks at the model itself, never at its name. What differs between families is in the lower half of
this file: where the blocks are (`_find_blocks`), which module's input is the softmax map (`_map_tap`), how the
projections are called and fused (`_PROJECTIONS`, `_rows`), from which block on there are prefix tokens
(`_first_with_prefix`). To support another family, teach it there and add the family to tests/families.py.

Legend: B images, P patches, T prefix tokens, N = P + T tokens, D width, H heads, L blocks, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from errors import UserError
from layers import EMBED, layer_name

INPUT = -1  # index of the tokens entering block 0
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


@dataclass(frozen=True)
class Layout:
    """A vision transformer of any family, seen as one list of blocks.

    The stages of a hierarchical model follow each other in the list. Blocks in which only the class token attends
    (at the end of CaiT, XCiT and VOLO) and downsampling layers are not part of it.

    Attributes:
        backbone: the timm model.
        blocks: the transformer blocks, first to last.
        first_with_prefix: the first block whose tokens include the prefix tokens; L if none does.
        owner: the module that holds the blocks: the backbone, or an encoder in it.
    """

    backbone: Any
    blocks: tuple[nn.Module, ...]
    first_with_prefix: int
    owner: Any

    @property
    def name(self) -> str:
        """The model's class, for error messages."""
        return type(self.backbone).__name__

    @property
    def depth(self) -> int:
        """L, the number of blocks."""
        return len(self.blocks)

    def prefix_tokens(self, layer: int) -> int:
        """T, the tokens before the patches in a block's output; of the other layers see `layer_name`."""
        if layer == EMBED:
            return 0
        return self.final_prefix_tokens if max(layer, 0) >= min(self.first_with_prefix, self.depth) else 0

    def layer_name(self, layer: int) -> str:
        """What a layer of this model's tokens is called, see `layers.layer_name`."""
        return layer_name(layer, self.depth)

    @property
    def final_prefix_tokens(self) -> int:
        """T in the final features: class, distillation and register tokens."""
        declared = self.part("num_prefix_tokens")
        return int(declared) if declared is not None else int(self.part("cls_token") is not None)

    @property
    def patch_size(self) -> tuple[int, int]:
        """Height and width in pixels of a patch of the last block.

        Raises:
            UserError: the model does not say.
        """
        info = self.part("feature_info")
        size = info[-1]["reduction"] if info else None
        embedded = getattr(self.part("patch_embed"), "patch_size", None)
        if isinstance(embedded, (tuple, list)) and max(embedded) == size:  # timm's reduction is the longer side
            size = embedded
        if not size:
            raise UserError(
                f"patch.mixing labels patches by {self.name}.feature_info, which the model lacks; drop patch.mixing"
            )
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        return int(height), int(width)

    def grid(self, image_size: Sequence[int]) -> tuple[int, int]:
        """Rows and columns of the patches of the last block in images of this height and width.

        Raises:
            UserError: the model does not say how large a patch is.
        """
        (height, width), (patch_height, patch_width) = image_size, self.patch_size
        return height // patch_height, width // patch_width

    @property
    def patches_reach_label(self) -> bool:
        """Whether the label depends on the patch tokens of the last block, even without patch.mixing."""
        pooled_token = getattr(self.backbone, "global_pool", "avg") in ("token", "")
        return not pooled_token or self.prefix_tokens(self.depth - 1) == 0

    def part(self, name: str) -> Any:
        """An attribute of the backbone, or None."""
        return getattr(self.backbone, name, None)

    # ------------------------------------------------------------------------------------------------------
    # Tokens

    def expose_tokens(self, block: int, value: Any) -> tuple[Tensor, Any]:
        """The tokens [B, N, D] in what goes into, or comes out of, a block, and what is to go on in its place.

        Grids [B, h, w, D] and [B, D, h, w] are seen as [B, h * w, D]; the model goes on with a view of the same
        tensor, so that the gradient at the tokens is the whole gradient. The second value is None where nothing
        has to be put in place. The order of the patches is the model's own: row by row but in Hiera, which keeps
        those of a mask unit together.
        """
        several = isinstance(value, tuple)
        stream = 1 if several and hasattr(self.blocks[block], "attn_out") else 0  # TNT: (pixels, patches)
        raw: Tensor = value[stream] if several else value
        if raw.ndim != 4:
            return raw, None
        if _channels_first(self.blocks[block], raw):
            tokens = raw.flatten(2).mT  # [B, D, h, w] -> [B, N, D]
            rest = tokens.mT.view(raw.shape)
        else:
            tokens = raw.flatten(1, 2)  # [B, h, w, D] -> [B, N, D]
            rest = tokens.view(raw.shape)
        return tokens, (*value[:stream], rest, *value[stream + 1 :]) if several else rest

    def channels_first(self, block: int) -> bool:
        """Whether a block takes its tokens as a grid [B, D, h, w]."""
        return _made_of_convolutions(_attentions(self.blocks[block])[0])

    # ------------------------------------------------------------------------------------------------------
    # Norms

    def norms(self, block: int) -> list[Any]:
        """The norms of a block's tokens, in the order of their attributes; not those inside attention and MLP."""
        module = self.blocks[block]
        branches = [*getattr(module, "attns", ()), *getattr(module, "ffns", ())]
        found = [getattr(module, name, None) for name in _NORMS] + [branch.norm for branch in branches]
        return [norm for norm in found if norm is not None and type(norm) is not nn.Identity]

    @property
    def final_norms(self) -> list[Any]:
        """The norm after the last block, if it is one of tokens."""
        stages = getattr(self.owner, "stages", None)
        owners = (
            self.owner,
            self.backbone,
            stages[-1] if isinstance(stages, (nn.ModuleList, nn.Sequential)) else None,
        )
        found = (getattr(owner, "norm", None) for owner in owners)
        return [norm for norm in found if norm is not None and type(norm) is not nn.Identity][:1]

    @property
    def embedding(self) -> nn.Module:
        """What makes patch embeddings [B, P, D] of images, or a grid of them, before positions are added.

        Raises:
            UserError: the model has no such module.
        """
        found = self.part("patch_embed")
        if not isinstance(found, nn.Module):
            raise UserError(
                f"the layer embed is what patch_embed returns, which {self.name} lacks: choose first, the input of "
                "block 0, or another model"
            )
        return found

    def final_tokens(self, features: Any) -> Tensor:
        """The tokens [B, N, D] in the final features, which may be a grid [B, h, w, D] or [B, D, h, w].

        Raises:
            UserError: they are several sequences.
        """
        if not isinstance(features, Tensor):
            raise UserError(
                f"{self.name} has several sequences of final features, which patch terms do not know: drop "
                "patch.mixing and its kin, and the layer norm"
            )
        if features.ndim == 3:
            return features
        if self.grid_is_channels_first:
            return features.flatten(2).mT
        return features.flatten(1, 2)

    @property
    def grid_is_channels_first(self) -> bool:
        """Whether final features that are a grid are [B, D, h, w], not [B, h, w, D]."""
        return self.part("output_fmt") in (None, "NCHW")

    # ------------------------------------------------------------------------------------------------------
    # Attention maps

    def attentions(self, block: int) -> list[Any]:
        """A block's attention modules: one, several side by side, or the block itself if it is one."""
        return _attentions(self.blocks[block])

    def map_taps(self, block: int) -> list[MapTap]:
        """Where a block's softmax map can be seen; several places where attentions run side by side.

        Raises:
            UserError: nowhere.
        """
        attentions = _attentions(self.blocks[block])
        taps = [tap for tap in map(_map_tap, attentions) if tap is not None]
        if not taps or len(taps) < len(attentions):
            raise UserError(
                f"attention terms cannot see the map of {self.name} at block {block}: its "
                f"{type(attentions[0]).__name__} passes its softmax to no module that could be hooked (attn_drop, "
                "or proj_w after talking heads); use patch or weight terms with this model"
            )
        return taps

    # ------------------------------------------------------------------------------------------------------
    # Weights

    def weights(
        self, block: int, matrices: Sequence[str], whole: Callable[[Tensor], Tensor] | None = None
    ) -> list[Tensor]:
        """The weight matrices of some kinds in a block, in the order of the kinds; a row is a neuron.

        Views of the parameters, so gradients reach them. Fused projections are split into their parts, all of them
        at once. Blocks with attentions side by side have one matrix for each, gated MLPs have two fc1 (gate and
        value).

        Args:
            matrices: of 'q', 'k', 'v', 'proj' (after attention), 'fc1' and 'fc2' (of the MLP).
            whole: makes a whole tensor of a parameter that is kept in shards.
        Returns: tensors [m, n, d]: m matrices that follow each other in a parameter and are wanted in its order.
        Raises:
            UserError: the block has no such matrix.
        """
        found = _matrices(self.blocks[block])
        for kind in matrices:
            if kind not in found:
                attention, *_ = _attentions(self.blocks[block])
                raise UserError(
                    f"weight terms find no {kind} in block {block} of {self.name}: its {type(attention).__name__} "
                    f"and MLP have {', '.join(found) or 'no linear layers'}; choose other layers, or other "
                    "matrices as in weight.cno:fc1,fc2"
                )
        wanted = [matrix for kind in matrices for matrix in found[kind]]
        parts = {
            id(source): source.parts(whole(source.parameter) if whole else source.parameter) for source, _ in wanted
        }
        stacks: list[Tensor] = []
        for key, group in groupby(wanted, lambda matrix: id(matrix.source)):
            inside, numbers = parts[key], [number for _, number in group]
            if isinstance(inside, Tensor) and numbers == list(range(len(inside))):
                stacks.append(inside)
            else:
                stacks += [tuple(inside)[number][None] for number in numbers]
        return stacks


def find_layout(backbone: nn.Module) -> Layout:
    """Find a backbone's layout.

    Raises:
        UserError: no transformer blocks; the message names what was looked for.
    """
    for owner in (backbone, *backbone.children()):  # e.g. a classifier around an encoder
        for name in ("blocks", "layers", "stages", "network"):
            blocks = tuple(_find_blocks(getattr(owner, name, None)))
            if blocks:
                return Layout(backbone, blocks, _first_with_prefix(owner, len(blocks)), owner)
    raise UserError(
        f"{type(backbone).__name__} is not a vision transformer that diversity terms know: looked for blocks with "
        "attention (attn, attn_out, attns or in_proj) in its blocks, layers, stages and network; train it without "
        "regularizers, or choose a ViT"
    )


# ------------------------------------------------------------------------------------------------------------
# What differs between families


def _find_blocks(container: Any) -> Iterator[nn.Module]:
    """The modules with attention in a (nested) list of blocks or of stages that have `blocks`."""
    if not isinstance(container, (nn.Sequential, nn.ModuleList)):
        return
    for module in container:
        if _attentions(module):
            yield module
        elif isinstance(module, (nn.Sequential, nn.ModuleList)):
            yield from _find_blocks(module)
        else:
            yield from _find_blocks(getattr(module, "blocks", None))


def _attentions(block: nn.Module) -> list[Any]:
    """A block's attention modules: one, several side by side, or the block itself if all its inputs are fused."""
    for name in ("attn", "attn_out"):  # TNT's outer transformer, the one of the patches, is attn_out
        module = getattr(block, name, None)  # in convolutional networks attn may be squeeze-and-excitation
        if isinstance(module, nn.Module) and (_projections(module) or _map_tap(module)):
            return [module]
    if isinstance(getattr(block, "attns", None), nn.ModuleList):
        branches: Any = block.attns
        return [branch.attn for branch in branches]
    return [block] if hasattr(block, "in_proj") and hasattr(block, "in_split") else []


def _first_with_prefix(owner: nn.Module, depth: int) -> int:
    """The first block that sees the prefix tokens."""
    class_blocks = ("blocks_token_only", "cls_attn_blocks", "post_network")  # CaiT, XCiT, VOLO: after all blocks
    if any(getattr(owner, name, None) is not None for name in class_blocks):
        return depth
    return int(getattr(owner, "local_up_to_layer", 0))  # ConViT: after the gated blocks


def _map_tap(attention: nn.Module) -> MapTap | None:
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
_NORMS = ("norm1", "norm2", "norm3", "in_norm", "norm_out", "norm_mlp")

# Attribute of an attention module -> the parts that its rows are, in order.
_PROJECTIONS = {
    "qkv": "qkv",
    **{"qk": "qk", "kv": "kv"},
    **{"q": "q", "k": "k", "v": "v"},
    **{"q_proj": "q", "k_proj": "k", "v_proj": "v"},
}


def _matrices(block: nn.Module) -> dict[str, list[Matrix]]:
    """All weight matrices of a block by kind, in the order of MATRICES, as far as it has them."""
    parts = [_joint_matrices(block)] if hasattr(block, "in_split") else []
    parts += [_projections(attention) for attention in _attentions(block) if attention is not block]
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


def _channels_first(block: nn.Module, grid: Tensor) -> bool:
    """Whether a block's grid of tokens is [B, D, h, w], not [B, h, w, D]: D is the width that its values take."""
    attention = _attentions(block)[0]
    widths = [source.parameter.shape[1] for source, _ in _projections(attention).get("v", ())]
    if (grid.shape[1] in widths) != (grid.shape[3] in widths):
        return grid.shape[1] in widths
    return _made_of_convolutions(attention)


def _made_of_convolutions(attention: Any) -> bool:
    """Whether an attention's projections are 1 x 1 convolutions, of grids [B, D, h, w]."""
    fused = getattr(attention, "qkv", None)
    return isinstance(getattr(fused, "linear", fused), nn.Conv2d)
