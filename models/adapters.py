"""Where a timm vision transformer keeps its blocks, attention map, projections and prefix tokens.

`find_layout` looks at the model itself, never at its name. To support another family, teach it here and add the
family to tests/test_models.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from utils import UserError


@dataclass(frozen=True)
class Layout:
    """A plain (single-scale) vision transformer: `blocks[i].attn` with a softmax map and fused q/k/v weights.

    Attributes:
        name: the model's class, for error messages.
        blocks: the transformer blocks, first to last.
        prefix_tokens: T, the tokens before the patches (class, distillation, registers).
        patch_size: height and width of a patch in pixels.
        pools_patches: whether the head sees the patch tokens of the last block (average pooling and the like).
    """

    name: str
    blocks: tuple[nn.Module, ...]
    prefix_tokens: int
    patch_size: tuple[int, int]
    pools_patches: bool

    def attention_dropout(self, block: int) -> tuple[Any, nn.Module]:
        """The attention module of a block, and its dropout, whose input is the softmax map [B, H, N, N].

        Raises:
            UserError: the block has no such dropout, so its map cannot be seen.
        """
        attention = getattr(self.blocks[block], "attn", None)
        dropout = getattr(attention, "attn_drop", None)
        if attention is None or not isinstance(dropout, nn.Module):
            raise UserError(
                f"attention terms need blocks[{block}].attn.attn_drop, which {self.name} does not have; "
                "use patch or weight terms with this model"
            )
        return attention, dropout

    def projections(self, block: int) -> tuple[Tensor, Tensor, Tensor]:
        """W_q, W_k, W_v of a block, each [D_out, D_in]; a row is a neuron.

        Views of the parameters, so gradients reach them.

        Raises:
            UserError: the block keeps its projections neither fused (qkv) nor apart (q_proj, k_proj, v_proj).
        """
        attention = getattr(self.blocks[block], "attn", None)
        fused = getattr(attention, "qkv", None)
        if isinstance(fused, nn.Linear):
            q, k, v = fused.weight.chunk(3, dim=0)
            return q, k, v
        apart = [getattr(attention, f"{name}_proj", None) for name in "qkv"]
        if all(isinstance(linear, nn.Linear) for linear in apart):
            q, k, v = (linear.weight for linear in apart if linear is not None)
            return q, k, v
        raise UserError(
            f"weight terms need blocks[{block}].attn.qkv, or q_proj, k_proj and v_proj, as nn.Linear; "
            f"{self.name} has neither"
        )


def find_layout(backbone: nn.Module) -> Layout:
    """Find a backbone's layout.

    Raises:
        UserError: the model is not a plain vision transformer; the message names what was looked for.
    """
    name = type(backbone).__name__
    blocks = getattr(backbone, "blocks", None)
    patch_size = getattr(getattr(backbone, "patch_embed", None), "patch_size", None)
    prefix = getattr(backbone, "num_prefix_tokens", None)
    blocks = tuple(blocks) if isinstance(blocks, (nn.Sequential, nn.ModuleList)) else ()
    plain = len(blocks) > 0 and all(hasattr(block, "attn") for block in blocks)
    if not (plain and patch_size and isinstance(prefix, int)):
        raise UserError(
            f"{name} is not a plain vision transformer: diversity terms look for blocks[i].attn, "
            "patch_embed.patch_size and num_prefix_tokens; train it without regularizers, or choose a ViT"
        )
    height, width = patch_size if isinstance(patch_size, (tuple, list)) else (patch_size, patch_size)
    pools_patches = getattr(backbone, "global_pool", "token") not in ("token", "")
    return Layout(name, blocks, prefix, (int(height), int(width)), pools_patches)
