"""Named variants: the reference's model names, and DeiT-B with 24 blocks, registered with timm.

A row of `VARIANTS` is a timm model and what differs from it. The suffix `_diverse` changes nothing but the name:
whether a run is diversified is said by its regularizers, not by its model. No transformer is forked here.
"""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.models import is_model, register_model
from torch import nn

from errors import UserError

_DEPTH_24 = {"depth": 24}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "deit_tiny_patch16_224_diverse": ("deit_tiny_patch16_224", {}),
    "deit_small_patch16_224_diverse": ("deit_small_patch16_224", {}),
    "deit_base_patch16_224_diverse": ("deit_base_patch16_224", {}),
    "deit_small_layer24_patch16_224": ("deit_small_patch16_224", _DEPTH_24),
    "deit_small_layer24_patch16_224_diverse": ("deit_small_patch16_224", _DEPTH_24),
    "deit_base_layer24_patch16_224": ("deit_base_patch16_224", _DEPTH_24),
    "deit_base_layer24_patch16_224_diverse": ("deit_base_patch16_224", _DEPTH_24),
}

# The reference's models; their class token starts as the reference's does.
REFERENCE_NAMES = frozenset(VARIANTS) | {base for base, _ in VARIANTS.values()}


def _register(name: str, base: str, overrides: dict[str, Any]) -> None:
    def entrypoint(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        if pretrained and overrides:
            raise UserError(f"there are no pretrained weights for {name}: build it with pretrained=False")
        return timm.create_model(base, pretrained=pretrained, **{**overrides, **kwargs})

    entrypoint.__name__ = name
    entrypoint.__doc__ = f"{base} with {overrides}" if overrides else f"{base} under the reference's name"
    register_model(entrypoint)


for _name, (_base, _overrides) in VARIANTS.items():
    if not is_model(_name):  # torch.hub may have loaded another copy of this file
        _register(_name, _base, _overrides)


def reference_init(backbone: nn.Module) -> None:
    """Draw the class token as the reference does: truncated normal with deviation 0.02 (timm: normal, 1e-6).

    Every other parameter already starts bit for bit as in the reference. The global random stream is left
    where it was.
    """
    with torch.random.fork_rng(devices=[]):
        nn.init.trunc_normal_(backbone.get_parameter("cls_token"), std=0.02)
