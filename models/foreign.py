"""Weights of another head, image size or source, made to fit a model by what timm knows of it.

timm's modules have a `checkpoint_filter_fn`, which brings the names of published files to timm's own and resizes
relative position tables; `pretrained_cfg["classifier"]` names the heads. What these leave is resampled here.
"""

from __future__ import annotations

import inspect
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import (
    resample_abs_pos_embed,
    resample_abs_pos_embed_nhwc,
    resize_rel_pos_bias_table_levit,
    to_2tuple,
)
from timm.models import is_model, model_entrypoint
from torch import Tensor, nn

from errors import BAD_ARGUMENT, UserError, reason

StateDict = dict[str, Tensor]

FILTERS = ("checkpoint_filter_fn", "checkpoint_filter_fn_classifier")  # as timm's modules call them
TOKENS = ("cls_token", "dist_token", "reg_token")  # the prefix tokens' parameters


def classifiers(model: nn.Module) -> list[str]:
    """The names of the layers that classify: of distilled models two."""
    said = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    names = [said] if isinstance(said, str) else list(said)
    if not names and hasattr(model, "get_classifier"):
        found: Any = model.get_classifier()  # type: ignore[operator]
        parts = found if isinstance(found, tuple) else (found,)
        names = [name for name, module in model.named_modules() if any(module is part for part in parts)]
    return names


def first_convolutions(model: nn.Module) -> list[str]:
    """The names of the layers that take the images, as far as they are convolutions."""
    said = (getattr(model, "pretrained_cfg", None) or {}).get("first_conv") or ()
    modules = dict(model.named_modules())
    names = [said] if isinstance(said, str) else list(said)
    return [name for name in names if isinstance(modules.get(name), nn.Conv2d)]


def second_heads(model: nn.Module) -> list[str]:
    """What a model may have beside its own head, and another one of the same kind may lack: head_dist, aux_head."""
    return ["head_dist", *(name.partition(".")[0] for name in classifiers(model)[1:])]


# ------------------------------------------------------------------------------------------------------------
# Names


def timms_names(model: nn.Module, weights: StateDict, path: str) -> StateDict:
    """The weights by the names of timm's model, with relative position tables of its size.

    Raises:
        UserError: the weights are not this architecture's.
    """
    convert = _filter_of(model)
    if convert is None:
        return dict(weights)
    try:
        with warnings.catch_warnings():
            # How timm resizes tables is deprecated and slow, as torch tells it; a user can do nothing about it.
            warnings.filterwarnings("ignore", category=UserWarning, module="timm.layers.interpolate")
            return dict(convert(dict(weights), model))
    except BAD_ARGUMENT as error:
        raise UserError(
            f"{path} does not fit {type(model).__name__}, timm cannot convert it ({reason(error)}): choose the "
            "model that the weights were trained with"
        ) from error


def renamed(model: nn.Module, weights: StateDict, path: str) -> StateDict:
    """The weights by the names of timm's model, if timm knows them by others; their sizes are as they were."""
    if weights.keys() == model.state_dict().keys():
        return weights
    try:
        there = timms_names(model, weights, path)
    except UserError:  # another architecture's: whoever loads them says what does not fit
        return weights
    return {name: weights.get(name, value) for name, value in there.items()}


def _filter_of(model: nn.Module) -> Callable[[StateDict, nn.Module], StateDict] | None:
    """What timm does to published weights of a model; None if nothing."""
    for module in _modules_of(model):
        for name in FILTERS:
            found = getattr(module, name, None)
            if found is None:
                continue
            if "adapt_layer_scale" in inspect.signature(found).parameters:  # DeiT III's gamma_1 is ls1.gamma
                return partial(found, adapt_layer_scale=True)
            return found
    return None


def _modules_of(model: nn.Module) -> Iterator[Any]:
    """timm's modules that know a model: of its name, and of its class."""
    architecture = (getattr(model, "pretrained_cfg", None) or {}).get("architecture") or ""
    if is_model(architecture):
        yield sys.modules[model_entrypoint(architecture).__module__]
    yield sys.modules[type(model).__module__]


# ------------------------------------------------------------------------------------------------------------
# Sizes


def fit_positions(
    model: nn.Module, weights: StateDict, path: str, antialias: bool, trained_size: Sequence[int] = ()
) -> StateDict:
    """The weights with `pos_embed` [1, T + P, D] of the model's grid and prefix tokens.

    The patches' part is interpolated (bicubic). Where only the weights have a distillation token, its row is left
    out; where only the model has one, its row is the model's own.

    Args:
        trained_size: height and width of the images that the weights were trained on, if that is known; else
            they were square.
    Raises:
        UserError: the positions are neither a grid of such images nor a square one.
    """
    own, there = _parameter(model, "pos_embed"), weights.get("pos_embed")
    if own is None or there is None or own.ndim != 3 or there.ndim != 3:
        return weights
    grid = _grid(model, own.shape[1])
    here = own.shape[1] - grid[0] * grid[1]  # T
    has, had = _parameter(model, "dist_token") is not None, "dist_token" in weights
    before = here - int(has) + int(had) if here else 0
    trained = _trained_grid(model, there.shape[1] - before, trained_size)
    if own.shape[1] == there.shape[1] and trained in (grid, None):
        return weights
    if trained is None:
        raise UserError(
            f"{path} has {there.shape[1]} position embeddings, which are no square grid after this model's "
            f"{before} prefix tokens: choose the model that the weights were trained with"
        )
    prefix, patches = there[:, :before], there[:, before:]  # [1, T', D], [1, P', D]
    if here and has and not had:
        prefix = torch.cat([prefix[:, :1], own[:, 1:2].to(prefix), prefix[:, 1:]], dim=1)
    elif here and had and not has:
        prefix = torch.cat([prefix[:, :1], prefix[:, 2:]], dim=1)
    fitting = torch.cat([prefix, patches], dim=1)  # [1, T + P', D]
    fitting = resample_abs_pos_embed(
        fitting, new_size=grid, old_size=trained, num_prefix_tokens=here, antialias=antialias
    )
    return {**weights, "pos_embed": fitting}


def _parameter(model: nn.Module, name: str) -> Tensor | None:
    found = getattr(model, name, None)
    return found if isinstance(found, Tensor) else None


def _grid(model: nn.Module, positions: int) -> list[int]:
    """The patches' rows and columns, of a model with that many position embeddings."""
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if grid is None:
        grid = [math.isqrt(positions)] * 2  # hiera, which has no prefix tokens
    return list(grid)


def _trained_grid(model: nn.Module, patches: int, size: Sequence[int]) -> list[int] | None:
    """Rows and columns of that many patches, in images of that size or in square ones; None if there are none."""
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if size and patch is not None:
        grid = [pixels // of_patch for pixels, of_patch in zip(size, to_2tuple(patch), strict=True)]
        if grid[0] * grid[1] == patches:
            return grid
    side = math.isqrt(max(patches, 0))
    return [side, side] if side and side**2 == patches else None


def resample(name: str, there: Tensor, here: Tensor, antialias: bool) -> Tensor:
    """A parameter of the weights in the shape of the model's, if it is one of positions; else as it is.

    Position embeddings [1, h, w, D] and LeViT's biases [H, h w], of which h and w change.
    """
    last = name.rpartition(".")[2]
    if there.ndim == here.ndim == 4 and last == "pos_embed" and there.shape[-1] == here.shape[-1]:
        return resample_abs_pos_embed_nhwc(there, new_size=list(here.shape[1:3]), antialias=antialias)
    if there.ndim == here.ndim == 2 and last == "attention_biases" and _are_squares(there, here):
        table = resize_rel_pos_bias_table_levit(there.T, here.T.shape)  # [h w, H]
        return table.T.contiguous()
    return there


def _are_squares(there: Tensor, here: Tensor) -> bool:
    """Whether both are [H, n n] with one H."""
    squares = all(math.isqrt(each.shape[1]) ** 2 == each.shape[1] for each in (there, here))
    return squares and there.shape[0] == here.shape[0]
