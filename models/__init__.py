"""Models: stock timm vision transformers, and the wrapper that shows their inside to the regularizers."""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg, is_model, list_models
from torch import nn

from errors import BAD_ARGUMENT, UserError, did_you_mean, reason, shown
from models.backbones import REFERENCE_NAMES, VARIANTS, reference_init
from models.capture import DiverseViT
from models.captured import Captured, Needs
from models.layout import Layout, find_layout

__all__ = [
    "VARIANTS",
    "Captured",
    "DiverseViT",
    "Layout",
    "Needs",
    "build_model",
    "check_name",
    "find_layout",
    "pretrained_config",
]


def check_name(name: str) -> None:
    """Raise a UserError with the nearest names if timm knows no model of this name."""
    architecture = name.partition(".")[0]  # timm writes 'model.pretrained_tag'
    if ":" not in name and not is_model(architecture):  # 'local-dir:...' and 'hf-hub:...' are timm's to find
        raise UserError(
            f"unknown model {name!r}.{did_you_mean(architecture, list_models())} "
            "timm.list_models() lists all of them"
        )


def pretrained_config(name: str) -> dict[str, Any]:
    """What timm says of a model's weights: mean, std, crop_pct, classifier, ...; {} where it knows none.

    Raises:
        UserError: unknown name, or a folder or repository that cannot be read.
    """
    if ":" in name:  # the description lies with the weights
        with torch.random.fork_rng(devices=[]):
            return dict(build_model(name).pretrained_cfg)  # type: ignore[arg-type]
    architecture, _, tag = name.partition(".")
    base = VARIANTS.get(architecture, (architecture, {}))[0]
    config = _stock_config(f"{base}.{tag}" if tag else base)
    return config.to_dict() if config is not None else {}


def _stock_config(name: str) -> Any:
    """timm's own description of a model; None for a name with a source."""
    try:
        return get_pretrained_cfg(name)
    except RuntimeError as error:  # an unknown tag
        raise UserError(f"{shown(name)} cannot be built: {reason(error)}") from error


def build_model(name: str, *, img_size: int | None = None, **overrides: Any) -> nn.Module:
    """Build a timm model by name, with untrained weights.

    Args:
        name: any name that timm knows, among them the reference's (`models.backbones.VARIANTS`).
        img_size: passed on to models of a fixed input size; the others take images as they come.
        overrides: keyword arguments of the model's constructor, e.g. num_classes, drop_path_rate, depth.
    Raises:
        UserError: unknown name, or an argument that this model's constructor does not take.
    """
    check_name(name)
    own = _stock_config(name)
    if img_size is not None and (own is None or own.fixed_input_size):
        overrides = {"img_size": img_size, **overrides}
    try:
        try:
            backbone = timm.create_model(name, pretrained=False, **overrides)
        except TypeError as error:
            if own is not None or "'img_size'" not in str(error):
                raise
            del overrides["img_size"]  # the model of a folder or a repository turns out to take any size
            backbone = timm.create_model(name, pretrained=False, **overrides)
    except BAD_ARGUMENT as error:
        given = ", ".join(f"{key}={value!r}" for key, value in overrides.items())
        how = f" with {given}" if given else ""
        raise UserError(f"{name} cannot be built{how}: {reason(error)}") from error
    if name.partition(".")[0] in REFERENCE_NAMES and getattr(backbone, "cls_token", None) is not None:
        reference_init(backbone)
    return backbone
