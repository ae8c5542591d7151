"""Preprocessing follows the weights: which mean, deviation and crop the images of a run go through, or a teacher's.

What a flag says holds. Else a checkpoint of this project, of the reference or of DeiT was trained as its own flags
say, and other weights as timm says of the model; DeiT's models are prepared for as DeiT does it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from errors import UserError, shown
from images.transforms import SMALL_INPUT, Preprocessing, of_channels, preprocessing
from models import pretrained_config
from options.config import Resolved
from options.flags import CROP_MODES, INTERPOLATIONS, Args, shape_of
from state import checkpoint
from state.saved_flags import flags_of
from utils import print_main

FIELDS = Preprocessing._fields  # each is a flag
DEITS = ""  # no other source than DeiT's own code


def follow_weights(args: Resolved, state: Any = None) -> Resolved:
    """The flags, with the preprocessing of the weights that a run starts from; a line says it, if not DeiT's.

    Args:
        state: the checkpoint of `--resume`, loaded, if there is one.
    Raises:
        UserError: weights from two places, a file that cannot be read, or values that cannot be used.
    """
    if args.pretrained and args.finetune:
        raise UserError("--pretrained and --finetune both say what weights to start from: drop one of the two")
    if state is not None:
        said, source = said_by_file(state, args.resume, args.model, shape_of(args))
    elif args.finetune:
        said, source = said_by_file(checkpoint.load(args.finetune), args.finetune, args.model, shape_of(args))
    elif args.pretrained:
        said, source = said_by_timm(args.model, shape_of(args))
    else:
        said, source = {}, DEITS
    given = [name for name in FIELDS if getattr(args, name) is not None]
    args = replace(args, **{name: value for name, value in said.items() if name not in given})
    flags = f"; --{', --'.join(given).replace('_', '-')} as given" if given else ""
    whole = preprocessing(args)
    if source or given:
        print_main(f"preprocessing: {whole}{f' (of {source})' if source else ''}{flags}")
    return args


def preprocessing_of(state: Any, path: str, model: str, image_shape: tuple[int, int, int]) -> Preprocessing:
    """What the weights in a checkpoint take images to have gone through.

    Args:
        state: the checkpoint, loaded.
        path: of it, for messages.
        model: its name.
        image_shape: channels, height and width.
    Raises:
        UserError: the checkpoint's flags have values that cannot be.
    """
    said, _ = said_by_file(state, path, model, image_shape)
    channels, *size = image_shape
    return preprocessing(replace(Args(input_size=size, in_chans=channels), **said))


def said_by_file(
    state: Any, path: str, model: str, image_shape: tuple[int, int, int]
) -> tuple[dict[str, Any], str]:
    """Which of FIELDS a checkpoint says, without those that it leaves to DeiT's defaults; and a source.

    Raises:
        UserError: it has values that cannot be used.
    """
    flags = flags_of(state)
    own = {name: flags[name] for name in FIELDS if flags.get(name) is not None}
    for name, value in own.items():
        if not _can_be(name, value):
            raise UserError(f"{path} was trained with {name} {shown(repr(value))}, which cannot be used")
    own |= _of_channels(own, image_shape[0])
    if "data_set" in flags:  # ours, the reference's or DeiT's
        return own, path if own else DEITS
    said, source = said_by_timm(model, image_shape)
    return said | own, path if own else source


def _is_finite(value: Any) -> bool:
    return isinstance(value, float | int) and math.isfinite(value)


def _can_be(name: str, value: Any) -> bool:
    """Whether a value from a file is one of the flag's."""
    if name in ("mean", "std"):
        numbers = isinstance(value, (list, tuple)) and len(value) in (1, 3)
        return numbers and all(_is_finite(number) and (number > 0 or name == "mean") for number in value)
    if name == "crop_pct":
        return isinstance(value, float | int) and 0.01 <= value <= 1
    return value in (CROP_MODES if name == "crop_mode" else INTERPOLATIONS)


def _of_channels(said: Mapping[str, Any], channels: int) -> dict[str, list[float]]:
    """Mean and deviation, if they are said, of as many channels as the images have."""
    return {name: list(of_channels(said[name], channels)) for name in ("mean", "std") if name in said}


def said_by_timm(model: str, image_shape: tuple[int, int, int]) -> tuple[dict[str, Any], str]:
    """What timm says of a model's weights; nothing of DeiT's, and nothing of crops of small images, taken whole."""
    config: Mapping[str, Any] = {} if model.startswith("deit_") else pretrained_config(model)
    names = FIELDS[:2] if max(image_shape[1:]) <= SMALL_INPUT else FIELDS
    said = {name: config[name] for name in names if config.get(name) is not None}
    said |= _of_channels(said, image_shape[0])
    return said, f"{model} in timm" if said else DEITS
