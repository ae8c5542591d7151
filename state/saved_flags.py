"""The flags that a checkpoint holds, in this project's names, whoever wrote it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any


def flags_of(state: Any) -> dict[str, Any]:
    """The flags in a checkpoint under 'args'; {} if it holds none.

    Those of timm, DeiT and the reference are an argparse.Namespace. timm's are told by `img_size`.
    """
    saved = state.get("args") if isinstance(state, dict) else None
    flags = vars(saved) if isinstance(saved, argparse.Namespace) else saved
    if not isinstance(flags, Mapping):
        return {}
    return _of_timm(flags) if "img_size" in flags else dict(flags)


def _of_timm(flags: Mapping[str, Any]) -> dict[str, Any]:
    """What timm's train.py saves: None or "" where nothing was given, input_size as C H W, gp for the model."""
    said = {name: value for name, value in flags.items() if value is not None and value != ""}
    shape = said.pop("input_size", None)
    if isinstance(shape, (list, tuple)) and len(shape) == 3:
        said["in_chans"], *said["input_size"] = shape
    elif "img_size" in said:
        said["input_size"] = said["img_size"]
    if "gp" in said and isinstance(said.get("model_kwargs", {}), Mapping):
        said["model_kwargs"] = {"global_pool": said["gp"], **said.get("model_kwargs", {})}
    return said
