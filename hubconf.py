"""torch.hub entry points: the reference's model names.

torch.hub.load("path/to/this/folder", "deit_small_patch16_224_diverse", source="local", num_classes=100)
"""

from __future__ import annotations

from collections.abc import Callable as _Callable
from typing import Any as _Any

import timm as _timm
from torch import nn as _nn

from errors import UserError as _UserError
from models import build_model as _build_model
from models.backbones import REFERENCE_NAMES as _REFERENCE_NAMES
from models.backbones import VARIANTS as _VARIANTS

dependencies = ["torch", "timm", "numpy"]


def _entry_point(name: str) -> _Callable[..., _nn.Module]:
    def build(pretrained: bool = False, **kwargs: _Any) -> _nn.Module:
        if not pretrained:
            return _build_model(name, **kwargs)
        if name in _VARIANTS:
            raise _UserError(f"no weights of {name} are published: load a checkpoint of your own into it")
        return _timm.create_model(name, pretrained=True, **kwargs)

    base, overrides = _VARIANTS.get(name, (name, {}))
    changes = "".join(f", {key} {value}" for key, value in overrides.items())
    build.__name__ = name
    build.__doc__ = f"""{base}{changes}.

    Args:
        pretrained: load DeiT's published ImageNet-1k weights through timm; only for names without additions.
        kwargs: arguments of the model's constructor, e.g. num_classes, img_size, drop_path_rate.
    """
    return build


globals().update({_name: _entry_point(_name) for _name in sorted(_REFERENCE_NAMES)})
