"""How well masks are predicted: mIoU and its kin, counted over a whole set and all processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from errors import UserError, shown
from utils import all_reduce


@dataclass(frozen=True)
class Result:
    """What was counted; nan where a class occurs nowhere.

    Attributes:
        names: of the K classes.
        iou: [K], |predicted and true| / |predicted or true|, in pixels of the whole set.
        accuracy: [K], |predicted and true| / |true|.
        pixels: [K], how many pixels have the class in truth.
        all_accuracy: share of labelled pixels that are predicted rightly.
    """

    names: tuple[str, ...]
    iou: np.ndarray
    accuracy: np.ndarray
    pixels: np.ndarray
    all_accuracy: float

    @property
    def mean_iou(self) -> float:
        """mIoU: the mean over classes that occur, in truth or in a prediction."""
        return _mean(self.iou)

    @property
    def mean_accuracy(self) -> float:
        """The mean accuracy of the classes that occur in truth."""
        return _mean(self.accuracy)

    def rows(self) -> list[tuple[str, float, float, float]]:
        """(class, IoU, accuracy, share of the labelled pixels) of every class."""
        shares = self.pixels / max(self.pixels.sum(), 1)
        columns = zip(self.names, self.iou, self.accuracy, shares, strict=True)
        return [(name, float(iou), float(accuracy), float(share)) for name, iou, accuracy, share in columns]

    def table(self) -> str:
        """All classes as text, in percent: columns are aligned, and '-' stands for a class that occurs nowhere."""
        header = ("class", "IoU", "accuracy", "pixels")
        cells = [(shown(name, 40), *map(_percent, numbers)) for name, *numbers in self.rows()]
        cells.append(("mean", _percent(self.mean_iou), _percent(self.mean_accuracy), ""))
        cells.append(("all pixels", "", _percent(self.all_accuracy), ""))
        widths = [max(len(row[i]) for row in (header, *cells)) for i in range(len(header))]
        lines = []
        for name, *numbers in (header, *cells):
            right = (number.rjust(width) for number, width in zip(numbers, widths[1:], strict=True))
            lines.append("  ".join([name.ljust(widths[0]), *right]).rstrip())
        return "\n".join(lines)


class Confusion:
    """Counts pixels in torchmetrics' confusion matrix: integers, so that any order and any split gives the same.

        scores = Confusion(["cat", "dog"])
        for image, mask in samples:
            scores.add(predict(image), mask)
        print(scores.result().table())

    The ratios are taken here, in float64: torchmetrics' Jaccard index takes them in float32, which rounds counts
    above 2^24, and has 0 where a class occurs nowhere.

    Args:
        names: of the K classes.
        ignore_label: pixels of this label in truth are not counted.
        device: where the counts are.
    Raises:
        UserError: torchmetrics is not installed.
    """

    def __init__(self, names: Sequence[str], ignore_label: int = 255, device: torch.device | str = "cpu") -> None:
        self.names = tuple(names)
        self.ignore_label = ignore_label
        self._matrix = _confusion_matrix(len(names), ignore_label).to(device)

    def add(self, predicted: Tensor, mask: Tensor) -> None:
        """Count one image, or several of one size.

        Args: predicted and mask [..., H, W], class numbers of any integer type; predicted in 0 to K - 1.
        """
        device = self._matrix.device
        self._matrix.update(predicted.to(device).long().flatten(), mask.to(device).long().flatten())

    def result(self) -> Result:
        """What was counted by all processes together; each of them has to ask."""
        confusion = all_reduce(self._matrix.confmat.clone()).cpu().numpy()  # [K, K], true x predicted
        right, true, predicted = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
        with np.errstate(invalid="ignore"):  # 0 / 0 is nan: the class occurs nowhere
            iou, accuracy = right / (true + predicted - right), right / true
            all_accuracy = float(right.sum() / true.sum())
        return Result(self.names, iou, accuracy, true, all_accuracy)


def _confusion_matrix(classes: int, ignore_label: int) -> Any:
    try:
        from torchmetrics.classification import MulticlassConfusionMatrix
    except ImportError as error:
        raise UserError("scores of masks are counted by torchmetrics: pip install torchmetrics") from error
    # what is added was checked before: looking at it would wait for the device at every image
    return MulticlassConfusionMatrix(classes, ignore_index=ignore_label, validate_args=False, sync_on_compute=False)


def _mean(values: np.ndarray) -> float:
    """Over what is no nan; nan if nothing is left."""
    there = values[~np.isnan(values)]
    return float(there.mean()) if len(there) else float("nan")


def _percent(value: float) -> str:
    return "-" if np.isnan(value) else f"{100 * value:.2f}"
