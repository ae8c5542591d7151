"""A timm vision transformer of any family as one list of blocks, with what is wanted of each.

`find_layout` looks at the model itself, never at its name; `models.adapters` knows what differs between families.

Legend: B images, P patches, T prefix tokens, N = P + T tokens, D width, H heads, L blocks, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from torch import Tensor, nn

from errors import UserError
from layers import EMBED, layer_name
from models.adapters import (
    NORMS,
    MapTap,
    attentions_of,
    channels_first,
    find_blocks,
    first_with_prefix,
    made_of_convolutions,
    map_tap,
    matrices_of,
)

INPUT = -1  # index of the tokens entering block 0


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
                f"patches are labelled by {self.name}.feature_info, which the model lacks: drop the terms that "
                "take labels (patch.mixing, patch.region_mixing), or choose another --model"
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
        if channels_first(self.blocks[block], raw):
            tokens = raw.flatten(2).mT  # [B, D, h, w] -> [B, N, D]
            rest = tokens.mT.view(raw.shape)
        else:
            tokens = raw.flatten(1, 2)  # [B, h, w, D] -> [B, N, D]
            rest = tokens.view(raw.shape)
        return tokens, (*value[:stream], rest, *value[stream + 1 :]) if several else rest

    def channels_first(self, block: int) -> bool:
        """Whether a block takes its tokens as a grid [B, D, h, w]."""
        return made_of_convolutions(attentions_of(self.blocks[block])[0])

    # ------------------------------------------------------------------------------------------------------
    # Norms

    def norms(self, block: int) -> list[Any]:
        """The norms of a block's tokens, in the order of their attributes; not those inside attention and MLP."""
        module = self.blocks[block]
        branches = [*getattr(module, "attns", ()), *getattr(module, "ffns", ())]
        found = [getattr(module, name, None) for name in NORMS] + [branch.norm for branch in branches]
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
        return attentions_of(self.blocks[block])

    def map_taps(self, block: int) -> list[MapTap]:
        """Where a block's softmax map can be seen; several places where attentions run side by side.

        Raises:
            UserError: nowhere.
        """
        attentions = attentions_of(self.blocks[block])
        taps = [tap for tap in map(map_tap, attentions) if tap is not None]
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
        found = matrices_of(self.blocks[block])
        for kind in matrices:
            if kind not in found:
                attention, *_ = attentions_of(self.blocks[block])
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
            blocks = tuple(find_blocks(getattr(owner, name, None)))
            if blocks:
                return Layout(backbone, blocks, first_with_prefix(owner, len(blocks)), owner)
    raise UserError(
        f"{type(backbone).__name__} is not a vision transformer that diversity terms know: looked for blocks with "
        "attention (attn, attn_out, attns or in_proj) in its blocks, layers, stages and network; train it without "
        "regularizers, or choose a ViT"
    )
