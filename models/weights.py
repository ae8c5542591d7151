"""Weights from a checkpoint into a model, exactly or for fine-tuning."""

from __future__ import annotations

import math
import re
from typing import Any

from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from errors import UserError
from models.sharding import like

StateDict = dict[str, Tensor]

HEADS = ("head.weight", "head_dist.weight")
ADVICE = "Check --model, --input-size and --data-set; --finetune accepts another head and image size"


def model_weights(checkpoint: Any, path: str, ema: bool = False) -> StateDict:
    """The weights in a checkpoint: under 'model' (or 'model_ema'), 'state_dict', or the file itself.

    Raises:
        UserError: there are none.
    """
    candidates = ["model_ema"] if ema else ["model", "state_dict"]
    found = checkpoint
    if isinstance(checkpoint, dict):
        found = next((checkpoint[key] for key in candidates if key in checkpoint), checkpoint)
    if not isinstance(found, dict) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise UserError(f"{path} holds no model weights: expected a dict of tensors under 'model' or by itself")
    prefixes = re.compile(r"^(module\.|_orig_mod\.)+")  # left by DDP and torch.compile
    return {prefixes.sub("", str(key)): value for key, value in found.items()}


def load_weights(model: nn.Module, weights: StateDict, path: str, advice: str = ADVICE) -> None:
    """Load weights that must fit exactly.

    Args:
        model: the model.
        weights: its state dict.
        path: where they are from, for the message.
        advice: what the message tells the user to do.
    Raises:
        UserError: a parameter is missing, unknown, or of another shape; the message names the first of them.
    """
    own = model.state_dict()
    missing = [name for name in own if name not in weights]
    unknown = [name for name in weights if name not in own]
    shapes = [name for name in own if name in weights and own[name].shape != weights[name].shape]
    if missing or unknown or shapes:
        problems = []
        if shapes:
            name = shapes[0]
            classes = " (classes, features)" if name in HEADS else ""
            there, here = list(weights[name].shape), list(own[name].shape)
            problems.append(f"{name} is {there}{classes} there and {here} in the model")
        if missing:
            problems.append(f"{len(missing)} parameters are missing, first {missing[0]}")
        if unknown:
            problems.append(f"{len(unknown)} are unknown to the model, first {unknown[0]}")
        raise UserError(f"{path} does not fit {type(model).__name__}: {'; '.join(problems)}. {advice}")
    model.load_state_dict({name: like(own[name], value) for name, value in weights.items()})


def load_for_finetuning(model: nn.Module, weights: StateDict, path: str) -> list[str]:
    """Load weights of the same architecture, with another number of classes or image size.

    A head of another shape keeps its fresh initialisation; position embeddings are interpolated (bicubic).

    Returns:
        The names of the parameters that were not loaded.
    Raises:
        UserError: the weights are not this architecture's.
    """
    own, weights = model.state_dict(), dict(weights)
    heads = [*HEADS, *(name.replace("weight", "bias") for name in HEADS)]
    for name in [name for name in heads if name in own]:
        if name in weights and weights[name].shape != own[name].shape:
            del weights[name]
    position = weights.get("pos_embed")
    if position is not None and "pos_embed" in own and position.shape[1] != own["pos_embed"].shape[1]:
        prefix = own["pos_embed"].shape[1] - model.patch_embed.num_patches  # type: ignore[union-attr]
        grid = list(model.patch_embed.grid_size)  # type: ignore[union-attr, arg-type]
        side = math.isqrt(max(position.shape[1] - int(prefix), 0))
        if side**2 != position.shape[1] - int(prefix):
            raise UserError(
                f"{path} has {position.shape[1]} position embeddings, which are no square grid after this model's "
                f"{prefix} prefix tokens: choose the model that the weights were trained with"
            )
        weights["pos_embed"] = resample_abs_pos_embed(
            position, new_size=grid, num_prefix_tokens=int(prefix), antialias=False
        )
    not_loaded = [name for name in own if name not in weights]
    fresh = {name: own[name] for name in not_loaded if name.startswith("head")}
    load_weights(model, {**weights, **fresh}, path)
    return not_loaded
