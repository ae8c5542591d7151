"""Weights from a checkpoint into a model, exactly or for fine-tuning."""

from __future__ import annotations

import pickle
import re
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from safetensors import SafetensorError
from timm.models import adapt_input_conv, load_pretrained
from torch import Tensor, nn

from errors import BAD_ARGUMENT, UserError, reason, shown
from models.backbones import VARIANTS
from models.foreign import (
    StateDict,
    classifiers,
    first_convolutions,
    fit_positions,
    renamed,
    resample,
    second_heads,
    timms_names,
)
from models.heads import PATCH_HEAD
from models.sharding import like

SHOWN = 4  # names that a message lists
UNREADABLE = (*BAD_ARGUMENT, SafetensorError, pickle.UnpicklingError, EOFError)
ADVICE = "Check --model, --input-size and --data-set; --finetune accepts another head and image size"
# Where a checkpoint keeps its weights and their average: DeiT's keys, which are this project's, and timm's.
TRAINED, AVERAGED = ("model", "state_dict"), ("model_ema", "state_dict_ema")
OF_ONE_MODEL = "Choose the --model and --model-kwargs that the weights were trained with"


def has_average(checkpoint: Any) -> bool:
    """Whether a checkpoint holds a moving average of its weights besides the weights themselves."""
    return isinstance(checkpoint, dict) and any(checkpoint.get(key) is not None for key in AVERAGED)


def model_weights(checkpoint: Any, path: str, ema: bool = False) -> StateDict:
    """The weights in a checkpoint: under 'model' or timm's 'state_dict', or the file itself.

    Args:
        ema: their moving average instead, under 'model_ema' or timm's 'state_dict_ema'.
    Raises:
        UserError: there are none.
    """
    keys = AVERAGED if ema else TRAINED
    if ema and not has_average(checkpoint):
        raise UserError(f"{path} holds no EMA of its weights: take the weights themselves (raw)")
    found = checkpoint
    if isinstance(checkpoint, dict):
        found = next((checkpoint[key] for key in keys if checkpoint.get(key) is not None), checkpoint)
    if not isinstance(found, dict) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise UserError(f"{path} holds no model weights: expected a dict of tensors under 'model' or by itself")
    prefixes = re.compile(r"^(module\.|_orig_mod\.)+")  # left by DDP and torch.compile
    return {prefixes.sub("", str(key)): value for key, value in found.items()}


def load_weights(model: nn.Module, weights: StateDict, path: str, advice: str = ADVICE) -> None:
    """Load weights that must fit exactly; their names may be those of the architecture's published files.

    Args:
        model: the model.
        weights: its state dict.
        path: where they are from, for the message.
        advice: what the message tells the user to do.
    Raises:
        UserError: a parameter is missing, unknown, or of another shape; the message names the first of them.
    """
    own, weights = model.state_dict(), renamed(model, weights, path)
    missing = [name for name in own if name not in weights]
    unknown = [name for name in weights if name not in own]
    shapes = [name for name in own if name in weights and own[name].shape != weights[name].shape]
    if missing or unknown or shapes:
        problems = []
        if shapes:
            name = shapes[0]
            heads = [f"{head}.weight" for head in classifiers(model)]
            classes = " (classes, features)" if name in heads else ""
            there, here = list(weights[name].shape), list(own[name].shape)
            problems.append(f"{name} is {there}{classes} there and {here} in the model")
        if missing:
            problems.append(f"{len(missing)} parameters are missing, first {missing[0]}")
        if unknown:
            problems.append(f"{len(unknown)} are unknown to the model, first {unknown[0]}")
        for names, has in (
            (unknown, "--remedy {}, and the model is not"),
            (missing, "no --remedy {}, and the model is"),
        ):
            remedies = dict.fromkeys(name.partition(".remedies.")[2].partition(".")[0] for name in names)
            problems += [f"they are of a model with {has.format(name)}" for name in remedies if name]
        for names, has in (
            (unknown, "two heads, and the model has one"),
            (missing, "one head, and the model has two"),
        ):
            if any(name.startswith(f"{PATCH_HEAD}.") for name in names):
                problems.append(f"they are of a model with {has}: patch.region_mixing brings the second")
        raise UserError(f"{path} does not fit {type(model).__name__}: {'; '.join(problems)}. {advice}")
    model.load_state_dict({name: like(own[name], value) for name, value in weights.items()})


def without_patch_head(model: nn.Module, weights: StateDict) -> StateDict:
    """The weights without those of a head for patches (models/heads.py), where the model has no such head."""
    if hasattr(model, PATCH_HEAD):
        return weights
    return {name: value for name, value in weights.items() if not name.startswith(f"{PATCH_HEAD}.")}


class Adapted(NamedTuple):
    """What became of weights that did not fit a model in every tensor.

    Attributes:
        new: the model's parameters that keep their fresh initialisation.
        resampled: those that were brought to another size.
        dropped: of the weights, for which the model has no place: a second head, a distillation token.
    """

    new: list[str]
    resampled: list[str]
    dropped: list[str]

    def __str__(self) -> str:
        found = ((kind, getattr(self, kind)) for kind in self._fields)
        return "; ".join(f"{kind}: {_listed(names)}" for kind, names in found if names)


def _listed(names: Sequence[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def load_for_finetuning(
    model: nn.Module,
    weights: StateDict,
    path: str,
    antialias: bool = False,
    trained_size: Sequence[int] = (),
    optional: Collection[str] = (),
) -> Adapted:
    """Load weights of the same architecture, with another number of classes or image size, or without distillation.

    A head of another shape, and a distillation token or a head for patches that the weights do not have, keep their
    fresh initialisation.
    Position embeddings and tables are interpolated. A model of grey images takes the sum of the first convolution's
    weights over the colours, as timm does. The names may be those of the architecture's published files.

    Args:
        weights: a state dict, which is left as it is.
        antialias: for position embeddings, where the grid becomes smaller: timm does so, DeiT does not.
        trained_size: height and width of the images they were trained on, if that is known.
        optional: parameters of the model that the weights may lack.
    Raises:
        UserError: the weights are not this architecture's.
    """
    own = model.state_dict()
    there = timms_names(model, fit_positions(model, weights, path, antialias, trained_size), path)
    for name in first_convolutions(model):
        weight = there.get(f"{name}.weight")
        if weight is not None and weight.shape[1] == 3 != own[f"{name}.weight"].shape[1]:
            there[f"{name}.weight"] = adapt_input_conv(own[f"{name}.weight"].shape[1], weight)
    heads = {f"{head}.{part}" for head in (*classifiers(model), PATCH_HEAD) for part in ("weight", "bias")}
    second = tuple(f"{name}." for name in second_heads(model))
    for name in [name for name in own if name in there and there[name].shape != own[name].shape]:
        if name in heads:
            del there[name]
        else:
            there[name] = resample(name, there[name], own[name], antialias)

    def may_differ(name: str) -> bool:
        return name in heads or name == "dist_token" or name.startswith(second) or name in optional

    new = [name for name in own if name not in there and may_differ(name)]
    unread = "attn_pool."  # of SigLIP's weights, where the model pools otherwise
    dropped = [name for name in there if name not in own and (may_differ(name) or name.startswith(unread))]
    fitting = {name: value for name, value in there.items() if name not in dropped}
    load_weights(model, {**fitting, **{name: own[name] for name in new}}, path, OF_ONE_MODEL)
    resampled = [name for name in fitting if name in weights and weights[name].shape != fitting[name].shape]
    return Adapted(new, resampled, dropped)


def load_timms(model: nn.Module, name: str) -> Adapted:
    """Load the weights that timm has for a model, or that lie in the folder or repository of its name.

    What does not fit is made to, as in fine-tuning; positions are resampled as timm does it.

    Raises:
        UserError: there are none, they cannot be fetched or read, or they do not fit.
    """
    if VARIANTS.get(name.partition(".")[0], ("", {}))[1]:
        raise UserError(f"there are no pretrained weights for {name}: choose another --model, or drop --pretrained")
    config: Any = model.pretrained_cfg
    found: list[Any] = []

    def keep(weights: Any, _: nn.Module) -> StateDict:
        found.append(weights)
        return model.state_dict()  # nothing is loaded yet

    try:
        load_pretrained(model, config, num_classes=-1, in_chans=config["input_size"][0], filter_fn=keep)
    except UNREADABLE as error:
        raise UserError(f"--pretrained: no weights for {name}: {shown(reason(error), 400)}") from error
    if not found:
        raise UserError(f"--pretrained: timm has no weights of {name} by its own names: give --finetune FILE")
    return load_for_finetuning(model, model_weights(found[0], name), name, antialias=True)
