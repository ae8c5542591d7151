"""A checkpoint becomes a model: what export, reports and transfer begin with."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from errors import UserError
from images.transforms import Preprocessing
from models import VARIANTS, build_model, check_name, pretrained_config
from models.remedies import install_remedies
from models.weights import StateDict, has_average, load_weights, model_weights, without_patch_head
from options.flags import sides
from state import checkpoint
from state.contents import check_description
from state.preprocessing import preprocessing_of
from state.saved_flags import flags_of

DROP_RATE = re.compile(r"(\w+_)?drop(_\w+)?_rate")  # arguments that change training alone


class Evaluated(NamedTuple):
    """A checkpoint's score, in percent, as its run last measured it; None where it did not.

    Attributes:
        model, ema: of the trained weights, and of their average.
        steps_ago: since then the weights were trained for so many steps.
        score: its name: that of classifiers, or of networks for segmentation.
    """

    model: float | None = None
    ema: float | None = None
    steps_ago: int = 0
    score: str = "top-1"


@dataclass(frozen=True)
class Trained:
    """A model with its trained weights.

    Attributes:
        name: the model's name in this project.
        backbone: the timm model.
        model_args: what its constructor takes besides the architecture's own values, without dropout rates.
        image_shape: channels, and height and width in pixels.
        preprocessing: what the weights take images to have gone through.
        weights: 'raw' or 'ema', the trained weights or their average.
        evaluated: what the run's last evaluation gave.
        class_names: in the order of the logits; none if the classes have no names.
        says_model: whether the checkpoint itself says which model it holds.
        remedies: what is built into the model, as --remedy has it.
    """

    name: str
    backbone: Any
    model_args: dict[str, Any]
    image_shape: tuple[int, int, int]
    preprocessing: Preprocessing
    weights: str
    evaluated: Evaluated
    class_names: Sequence[str] = ()
    says_model: bool = True
    remedies: Sequence[str] = ()


def read_trained(
    path: str,
    weights: str = "auto",
    *,
    model: str | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    input_size: int | Sequence[int] | None = None,
    num_classes: int | None = None,
    only_if_silent: bool = False,
    state: Any = None,
) -> Trained:
    """Build the model that a checkpoint describes, and load its weights, without those of a head for patches.

    Of a network for segmentation it is the backbone, without a classifier.

    The name, its arguments and the image size are those of the checkpoint's saved flags, and the number of classes
    is that of its head, unless given here.

    Args:
        path: a file or an https address.
        weights: 'raw', 'ema', or 'auto', which takes the EMA if there is one, unless the run found it worse than
            the trained weights.
        only_if_silent: of what is given here, what the checkpoint says itself does not count.
        state: what the file holds, if it is loaded already.
    Raises:
        UserError: no such file, a damaged one, one that does not say what it holds, or weights that do not fit.
    """
    _check_given(input_size, num_classes)
    state = checkpoint.load(path) if state is None else state
    check_description(state, path)
    evaluated = evaluation_of(state)
    use_ema = _uses_ema(state, weights, evaluated, path)
    saved = model_weights(state, path, ema=use_ema)
    segments = is_segmenters(saved)
    tensors = _plain_names(saved)
    flags = flags_of(state)
    given = {"model": model, "input_size": input_size, "model_kwargs": dict(model_kwargs or {})}
    flags = _filled(flags, given, only_if_silent)
    name = flags.get("model")
    if not name:
        raise UserError(
            f"{path} does not say which model it holds: give --model NAME, and --model-kwargs and --input-size if "
            "they were not the model's own"
        )
    check_name(name)
    options = dict(flags.get("model_kwargs") or {})
    size = flags.get("input_size") or _stock_input_size(name)
    channels = options.get("in_chans") or flags.get("in_chans") or 3
    if channels != 3:
        options["in_chans"] = channels
    shape = (channels, *sides(size))
    if segments:
        num_classes = 0
    elif num_classes is None and "num_classes" not in options:
        num_classes = _count_classes(name, tensors, path)
    if num_classes is not None:
        options["num_classes"] = num_classes
    backbone: Any = build_model(name, **{"img_size": size, **options})
    remedies = [str(text) for text in flags.get("remedy") or ()]
    install_remedies(backbone, remedies)
    advice = "Check --model, --model-kwargs, --input-size and --num-classes"
    load_weights(backbone, without_patch_head(backbone, tensors), path, advice)
    added = VARIANTS.get(name, (name, {}))[1]
    model_args = {key: value for key, value in {**added, **options}.items() if not DROP_RATE.fullmatch(key)}
    names = () if segments else class_names_of(flags, backbone.num_classes, path)
    images = preprocessing_of(state, path, name, shape)
    kind = "ema" if use_ema else "raw"
    says_model = bool(flags_of(state).get("model"))
    return Trained(name, backbone.eval(), model_args, shape, images, kind, evaluated, names, says_model, remedies)


def is_segmenters(weights: StateDict) -> bool:
    """Whether these are of a network for segmentation: heads, and a backbone without a classifier."""
    return any(name.startswith("decode_head.") for name in weights)


def _check_given(input_size: int | Sequence[int] | None, num_classes: int | None) -> None:
    smallest = None if input_size is None else min(sides(input_size))
    for flag, value in (("--input-size", smallest), ("--num-classes", num_classes)):
        if value is not None and value < 1:
            raise UserError(f"{flag} must be at least 1, not {value}")


def _filled(flags: Mapping[str, Any], given: Mapping[str, Any], only_if_silent: bool) -> dict[str, Any]:
    """A checkpoint's flags, with what else is given; that wins, or with `only_if_silent` it does not."""
    said = {name: flags[name] for name in given if flags.get(name)}
    wanted = {name: value for name, value in given.items() if value}
    first, second = (wanted, said) if only_if_silent else (said, wanted)
    kwargs = {**first.get("model_kwargs", {}), **second.get("model_kwargs", {})}
    return {**flags, **first, **second, "model_kwargs": kwargs}


def evaluation_of(state: Any) -> Evaluated:
    """What a checkpoint's log says of its weights; nothing if it holds no log of this project."""
    log = state.get("log") if isinstance(state, dict) else None
    try:
        last = json.loads(log[-1]) if log else {}
        score, key = ("mIoU", "test_miou") if "test_miou" in last else ("top-1", "test_acc1")
        model, ema = (None if last.get(name) is None else float(last[name]) for name in (key, f"ema_{key}"))
        return Evaluated(model, ema, int(state.get("step", 0)), score)
    except (ValueError, TypeError, LookupError, AttributeError):  # a log of something else
        return Evaluated()


def class_names_of(flags: Mapping[str, Any], num_classes: int, path: str) -> tuple[str, ...]:
    """The classes' names as the checkpoint's flags have them; none for '0', '1', ..., which are no names.

    Raises:
        UserError: there are names of more or fewer classes.
    """
    names = tuple(str(name) for name in flags.get("class_names") or ())
    if names and len(names) != num_classes:
        raise UserError(
            f"{path} has {len(names)} class names, but {num_classes} classes: correct its args' class_names"
        )
    return () if names == tuple(str(label) for label in range(num_classes)) else names


def _uses_ema(state: Any, weights: str, evaluated: Evaluated, path: str) -> bool:
    if weights == "ema" and not has_average(state):
        raise UserError(f"{path} holds no EMA: choose --weights raw or auto")
    if weights == "auto" and evaluated.model is not None:
        return has_average(state) and evaluated.ema is not None and evaluated.ema >= evaluated.model
    return has_average(state) and weights != "raw"


def _plain_names(tensors: StateDict) -> StateDict:
    """timm's own names, also where a whole DiverseViT was saved, whose backbone is one of its parts."""
    own = {name.removeprefix("backbone."): tensors[name] for name in tensors if name.startswith("backbone.")}
    return own or tensors


def _stock_input_size(name: str) -> Sequence[int]:
    """Height and width."""
    return tuple(pretrained_config(name).get("input_size", (3, 224, 224))[1:])


def _count_classes(name: str, tensors: StateDict, path: str) -> int:
    """The number of rows of the head's weight."""
    heads = pretrained_config(name).get("classifier") or "head"
    key = f"{heads if isinstance(heads, str) else heads[0]}.weight"
    if key not in tensors:
        raise UserError(
            f"{path} has no {key} to tell the number of classes of {name} by: check --model, or give --num-classes"
        )
    return int(tensors[key].shape[0])
