"""Images and their masks: the door to all data sets of segmentation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from errors import UserError, did_you_mean, shown
from images.decode import load_image
from images.found import Samples, Texts, traits
from segmentation.digits import CLASSES, PALETTE, canvases
from segmentation.layouts import LAYOUTS, SETS, Files, Options
from segmentation.masks import IGNORED, MaskReader, palette
from utils import broadcast_object

DATA_SETS = (*SETS, "DIGITS")


class WithMasks(Sequence[Any]):
    """What images can be read from; `images.found.digest` of it tells other masks, too.

    Args:
        images: a sequence of sources, or an array [N, ...].
        masks: the same of their masks.
    """

    def __init__(self, images: Sequence[Any] | np.ndarray, masks: Sequence[Any] | np.ndarray) -> None:
        self.images, self.masks = images, masks

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Any) -> Any:
        return self.images[index]

    def arrays(self) -> list[np.ndarray]:
        """What makes them differ from others."""
        return [*traits(self.images), *traits(self.masks)]


class Pairs(NamedTuple):
    """Half of a data set.

    Attributes:
        samples: what images can be read from; all labels are 0.
        masks: what the mask of each can be read from.
        classes: their names, in the order of their labels; '0', '1', ... where the data has none.
        palette: uint8 [K, 3], a colour for each class.
        read_mask: makes uint8 [H, W] of a mask's source: classes 0 to K - 1, or `ignore_label`; raises an
            ImageError that names it.
        read_image: makes an RGB image of a source; raises likewise.
        name: what to call a source in a message.
        ignore_label: what is not to be learnt.
    """

    samples: Samples
    masks: Sequence[Any] | np.ndarray
    classes: Sequence[str]
    palette: np.ndarray
    read_mask: Callable[[Any], np.ndarray]
    read_image: Callable[[Any], Image.Image] = load_image
    name: Callable[[Any], str] = str
    ignore_label: int = IGNORED


def find_pairs(name: str, root: str | Path, is_train: bool, options: Options = Options()) -> Pairs:  # noqa: B008
    """One half of `--data-set`; the main process looks for the files. All processes must ask together.

    FOLDER without names reads all masks of both halves, to know the largest label.

    Raises:
        UserError: unknown name, folders or files that are not there or do not belong together, no images, other
            options than the set takes.
    """
    if name not in DATA_SETS:
        raise UserError(
            f"--data-set {shown(name)} is not one of {', '.join(DATA_SETS)}.{did_you_mean(name, DATA_SETS)}"
        )
    if name != "FOLDER" and (options.ignore_label is not None or options.reduce_zero_label):
        flag = "--reduce-zero-label" if options.reduce_zero_label else "--ignore-label"
        raise UserError(f"{flag} is for --data-set FOLDER, not {name}, whose labels are known: drop it")
    if name == "DIGITS":
        images, masks = canvases(is_train)
        return Pairs(
            samples=_unlabelled(WithMasks(images, masks)),
            masks=masks,
            classes=_named(name, CLASSES, options),
            palette=PALETTE,
            read_image=Image.fromarray,
            read_mask=np.asarray,
            name=_canvas,
        )
    top = Path(root).expanduser()
    if not root or not top.is_dir():
        raise UserError(f"--data-path {shown(str(root))} is not a folder; {LAYOUTS[name]}")
    files: Files = broadcast_object(lambda: SETS[name](top, is_train, options))
    prefix = f"{files.top}/"
    sources, drawn = Texts(files.images, prefix), Texts(files.masks, prefix)
    return Pairs(
        samples=_unlabelled(WithMasks(sources, drawn)),
        masks=drawn,
        classes=_named(name, files.classes, options),
        palette=palette(len(files.classes)) if files.palette is None else files.palette,
        read_mask=MaskReader(files.meaning, files.advice),
    )


def _unlabelled(sources: Sequence[Any]) -> Samples:
    return Samples(sources, np.zeros(len(sources), np.int32))


def _canvas(source: np.ndarray) -> str:
    return f"canvas of {source.shape[1]} x {source.shape[0]} pixels"


def _named(name: str, classes: Sequence[str], options: Options) -> list[str]:
    given = options.class_names or classes
    if len(given) != len(classes):
        raise UserError(f"{len(given)} names of classes are given, but {name} has {len(classes)} classes")
    return list(given)
