"""What --predictions writes: a coloured mask for each evaluation image, and a page of some of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from errors import UserError, reason
from images.found import Texts
from segmentation.images import SegmentedImages
from segmentation.masks import save_mask
from segmentation.page import Scores, Shown, render
from segmentation.scores import Result
from segmentation.sets import WithMasks
from utils import broadcast_object, gather_to_main, write_atomically

PAGE, MASKS = "predictions.html", "masks"


class Predictions:
    """Writes masks as they come, and the page at the end.

    Args:
        folder: where.
        images: of the evaluation half.
        pictures: how many are on the page, evenly spaced.
    Raises:
        UserError: the folder cannot be written to.
    """

    def __init__(self, folder: Path, images: SegmentedImages, pictures: int) -> None:
        self.folder, self.images = folder, images
        self.chosen = evenly(len(images), pictures)
        self._shown: list[tuple[int, Shown]] = []
        try:
            (folder / MASKS).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write to --predictions {folder}: {reason(error)}") from error

    def add(self, index: int, predicted: Tensor) -> None:
        """An image's predicted classes [H, W].

        Raises:
            UserError: its mask cannot be written.
        """
        labels = predicted.cpu().numpy().astype(np.uint8)
        path = self.folder / MASKS / f"{name_of(self.images, index)}.png"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_mask(path, labels, self.images.pairs.palette)
        except OSError as error:
            raise UserError(f"cannot write {path}: {reason(error)}") from error
        if index in self.chosen:
            (image, truth), _ = self.images.decode(index)
            shown = Shown(name_of(self.images, index), np.asarray(image), truth, {"network": labels})
            self._shown.append((index, shown))

    def write_page(self, title: str, result: Result, about: Mapping[str, Any]) -> Path:
        """The page of the chosen images of all processes, which must ask together.

        Raises:
            UserError: it cannot be written.
        """
        gathered = gather_to_main(self._shown)
        path = self.folder / PAGE

        def write() -> None:
            every = sorted((pair for each in gathered for pair in each), key=lambda pair: pair[0])
            shown = [each for _, each in every]
            total = {
                "mIoU": result.mean_iou,
                "mean accuracy": result.mean_accuracy,
                "pixels right": result.all_accuracy,
            }
            scores = Scores(total, {"IoU": result.iou, "accuracy": result.accuracy})
            classes, palette = self.images.pairs.classes, self.images.pairs.palette
            text = render(title, shown, {"network": scores}, classes, palette, about)
            try:
                write_atomically(path, lambda file: file.write(text.encode()))
            except OSError as error:
                raise UserError(f"cannot write {path}: {reason(error)}") from error

        broadcast_object(write)
        return path


def evenly(images: int, pictures: int) -> frozenset[int]:
    """The numbers of so many images, evenly spaced."""
    count = min(pictures, images)
    return frozenset(images * place // count for place in range(count))


def name_of(images: SegmentedImages, index: int) -> str:
    """An image's path below the folder of all of them, or its number; without an ending."""
    sources = images.pairs.samples.sources
    paths = sources.images if isinstance(sources, WithMasks) else sources
    if not isinstance(paths, Texts):
        return f"{index:05d}"
    return str(Path(paths[index].removeprefix(paths.prefix)).with_suffix(""))
