"""Checkpoints: written atomically, read without running code, in DeiT's keys.

A checkpoint is plain data (tensors, numbers, strings, lists, dicts): model, optimizer, lr_scheduler, epoch,
model_ema, scaler, args, max_acc. `model` and `model_ema` carry timm's own parameter names, so
`timm.create_model(..., checkpoint_path="checkpoint.pth")` (which takes the average, where there is one) and
`torch.load(..., weights_only=True)` read them.
"""

from __future__ import annotations

import argparse
import math
import os
import pickle
import re
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from utils import UserError

StateDict = dict[str, Tensor]

# What reading arbitrary bytes may raise besides OSError, found by fuzzing: tests/test_checkpoint.py
UNREADABLE = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    struct.error,
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    OverflowError,
    MemoryError,
)


def save(state: dict[str, Any], path: Path) -> None:
    """Write a checkpoint so that `path` holds either the old file or the new one, whole, at any moment.

    Raises:
        UserError: the disk is full, or the folder cannot be written to.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot save {path}: {error.strerror}; what was there before is still there") from error


def load(path: str) -> Any:
    """Read a checkpoint file, or download it from an https address. Nothing in it is executed.

    Checkpoints of the reference, whose `args` is an argparse.Namespace, are read too.

    Raises:
        UserError: no such file, or not a checkpoint.
    """
    with torch.serialization.safe_globals([argparse.Namespace]):
        try:
            if path.startswith("https://"):
                return torch.hub.load_state_dict_from_url(path, map_location="cpu", weights_only=True)
            return torch.load(path, map_location="cpu", weights_only=True)
        except OSError as error:
            raise UserError(f"cannot read the checkpoint {path}: {error}") from error
        except UNREADABLE as error:
            raise UserError(f"{path} is not a checkpoint, or a damaged one ({type(error).__name__})") from error


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


def load_weights(model: nn.Module, weights: StateDict, path: str) -> None:
    """Load weights that must fit exactly.

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
            problems.append(f"{name} is {list(weights[name].shape)} there and {list(own[name].shape)} in the model")
        if missing:
            problems.append(f"{len(missing)} parameters are missing, first {missing[0]}")
        if unknown:
            problems.append(f"{len(unknown)} are unknown to the model, first {unknown[0]}")
        raise UserError(
            f"{path} does not fit {type(model).__name__}: {'; '.join(problems)}. Check --model, --input-size and "
            "--data-set; --finetune accepts another head and image size"
        )
    model.load_state_dict(weights)


def load_for_finetuning(model: nn.Module, weights: StateDict, path: str) -> list[str]:
    """Load weights of the same architecture, with another number of classes or image size.

    A head of another shape keeps its fresh initialisation; position embeddings are interpolated (bicubic).

    Returns:
        The names of the parameters that were not loaded.
    Raises:
        UserError: the weights are not this architecture's.
    """
    own, weights = model.state_dict(), dict(weights)
    for name in [n for n in ("head.weight", "head.bias", "head_dist.weight", "head_dist.bias") if n in own]:
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
