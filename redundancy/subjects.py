"""What is measured: from a word of the command line to a model with its weights.

A word is [LABEL=]NAME or [LABEL=]FILE. Names are timm's, among them hf-hub:NAME and local-dir:FOLDER; files are
checkpoints of this project, of timm or of DeiT, also behind an https address.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from errors import UserError, shown
from images.transforms import Preprocessing
from models import build_model, check_name, pretrained_config
from models.weights import load_timms
from options.flags import Args, sides
from state.preprocessing import preprocessing_of
from state.trained import read_trained

FILES = (".pth", ".pt", ".tar", ".safetensors", ".bin", ".ckpt")


@dataclass(frozen=True)
class Subject:
    """A model that is asked for.

    Attributes:
        label: what figures call it; several of one label are seeds of one run.
        source: a name, a file or an address.
    """

    label: str
    source: str

    @property
    def is_file(self) -> bool:
        return is_file(self.source)


@dataclass(frozen=True)
class Loaded:
    """A model that is there.

    Attributes:
        backbone: the timm model, in evaluation mode.
        image_shape: channels, height and width that it takes.
        preprocessing: what its images go through.
        class_names: of its classes, if they have names.
        says_model: whether it is a checkpoint that says itself which model it holds.
        about: for the report.
    """

    backbone: Any
    image_shape: tuple[int, int, int]
    preprocessing: Preprocessing
    class_names: Sequence[str]
    says_model: bool
    about: dict[str, Any]


def is_file(source: str) -> bool:
    """Whether a word means a checkpoint and not a name."""
    return source.startswith("https://") or source.endswith(FILES) or os.path.isfile(source)


def find_subjects(words: Sequence[str]) -> list[Subject]:
    """The models that are asked for, each with its label.

    Without a label a name is its own. A file is called by its folder if it is a checkpoint of a run, else by its
    own name, or by the whole word where that would be another one's label.

    Raises:
        UserError: no such file, an unknown name, or the same model twice under one label.
    """
    split = [_split(word) for word in words]
    proposed = [label or _own_label(source) for label, source in split]
    taken = Counter(proposed)
    subjects = [
        Subject(label or (own if taken[own] == 1 else source), source)
        for (label, source), own in zip(split, proposed, strict=True)
    ]
    seen: set[tuple[str, str]] = set()
    for subject in subjects:
        same = os.path.realpath(subject.source) if os.path.isfile(subject.source) else subject.source
        if (subject.label, same) in seen:
            raise UserError(f"{shown(subject.source)} is given twice as {shown(subject.label)}: drop one of them")
        seen.add((subject.label, same))
        _check(subject)
    return subjects


def _split(word: str) -> tuple[str, str]:
    """(label, source); no label where there is none, or where the '=' belongs to a path or an address."""
    if os.path.exists(word):
        return "", word
    ends = [place for place, letter in enumerate(word) if letter == "="]
    for end in ends:
        if end and os.path.isfile(word[end + 1 :]):
            return word[:end], word[end + 1 :]
    label, equals, source = word.partition("=")
    if not equals or "/" in label or ":" in label:
        return "", word
    if not label or not source:
        raise UserError(f"{shown(word)} is not [LABEL=]NAME_OR_CHECKPOINT: one side of the '=' is empty")
    return label, source


def _own_label(source: str) -> str:
    if not is_file(source):
        return source
    path = Path(source)
    return path.parent.resolve().name if path.stem.startswith("checkpoint") else path.stem


def _check(subject: Subject) -> None:
    """Refuse what does not exist, before anything is measured."""
    source = subject.source
    if subject.is_file:
        if not source.startswith("https://") and not os.path.isfile(source):
            raise UserError(f"{shown(source)}: no such file (and not an https address)")
    elif os.path.isdir(source):
        raise UserError(
            f"{shown(source)} is a folder: give a checkpoint in it, or local-dir:{shown(source)} if it is an export"
        )
    elif "/" in source and ":" not in source:
        raise UserError(f"{shown(source)}: no such file, and no name of timm's")
    else:
        check_name(source)


def load(
    subject: Subject, args: Args, pretrained: bool, model: str | None, size: Any, num_classes: int | None = None
) -> Loaded:
    """Build a subject's model and load its weights.

    Args:
        args: the flags.
        pretrained: whether names get timm's weights.
        model: for checkpoints that do not say it, like args.model_kwargs and `size`.
        size: the image size that is asked for, if one is.
        num_classes: of checkpoints.
    Raises:
        UserError: it cannot be built, or its weights cannot be read, do not fit, or are not finite.
    """
    if subject.is_file:
        loaded = _load_file(subject.source, args, model, size, num_classes)
    else:
        loaded = _load_name(subject.source, args, pretrained, size)
    for name, tensor in loaded.backbone.state_dict().items():
        if not tensor.isfinite().all():
            raise UserError(f"{shown(subject.source)} has diverged: its weights are not finite, e.g. {name}")
    return loaded


def _load_file(path: str, args: Args, model: str | None, size: Any, num_classes: int | None) -> Loaded:
    trained = read_trained(
        path,
        args.weights,
        model=model,
        model_kwargs=args.model_kwargs,
        input_size=size,
        num_classes=num_classes,
        only_if_silent=True,
    )
    about = {"model": trained.name, "weights": f"{path} ({trained.weights})"}
    if trained.remedies:
        about["remedies"] = ", ".join(trained.remedies)
    if not path.startswith("https://"):
        about["sha256"] = checksum(path)
    shape, images, names = trained.image_shape, trained.preprocessing, trained.class_names
    return Loaded(trained.backbone, shape, images, names, trained.says_model, about)


def _load_name(name: str, args: Args, pretrained: bool, size: Any) -> Loaded:
    torch.manual_seed(args.seed)
    config = pretrained_config(name)
    chosen = sides(size) if size else tuple(config.get("input_size", (3, 224, 224))[1:])
    backbone: Any = build_model(name, **{"img_size": chosen if size else None, **args.model_kwargs})
    if pretrained:
        try:
            load_timms(backbone, name)
        except UserError as error:
            said = str(error).rstrip(".")
            raise UserError(f"{said}; --no-pretrained measures {shown(name)} untrained") from error
    shape = (args.model_kwargs.get("in_chans", 3), *chosen)
    about = {"model": name, "weights": "timm's" if pretrained else f"untrained (seed {args.seed})"}
    names = tuple(config.get("label_names") or ())
    return Loaded(backbone.eval(), shape, preprocessing_of(None, name, name, shape), names, False, about)


def checksum(path: str) -> str:
    """SHA-256 of a file, as sha256sum prints it."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(2**20), b""):
            digest.update(block)
    return digest.hexdigest()
