"""Adding up over images, in memory that does not grow with their number, and the same however they are split.

An accumulator takes batches (`update`), is told that no more come (`close`), takes over what another one has seen
(`merge`), and says what was found (`finding`). Merged in the order of the images, several give what one gives that
has seen all of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from redundancy.finding import Axis, Finding
from redundancy.metrics.registry import Metric
from redundancy.metrics.shown import Shown

GROUP = 32  # images that are compared with each other
SMALLEST = 4  # a group of fewer has no unbiased estimate


class Accumulator(ABC):
    """What adds a metric up over images."""

    @abstractmethod
    def update(self, shown: Shown) -> None:
        """Take a batch."""

    def close(self) -> None:  # noqa: B027  (most have nothing to do)
        """Nothing more comes in this process."""

    @abstractmethod
    def merge(self, other: Any) -> None:
        """Take what another one, closed like this one, has seen of the images that come next."""

    @abstractmethod
    def finding(self) -> Finding:
        """What was found."""


def axis_of(name: str, labels: Iterable[str]) -> Axis:
    return Axis(name, tuple(labels))


class Moments:
    """Mean and standard error of numbers [*shape], one for each image, in float64. NaNs are left out.

    Batches are merged by their means and squared deviations, so that no digits cancel.
    Source: Chan, Golub and LeVeque 1983.
    """

    def __init__(self) -> None:
        self.count = np.zeros(())
        self.mean = np.zeros(())
        self.squares = np.zeros(())  # sum of squared deviations from the mean

    def add(self, values: np.ndarray) -> None:
        """Add numbers [B, *shape]."""
        known = ~np.isnan(values)
        count = known.sum(axis=0).astype(float)
        mean = np.where(known, values, 0).sum(axis=0) / np.maximum(count, 1)
        squares = np.where(known, values - mean, 0) ** 2
        self._merge(count, mean, squares.sum(axis=0))

    def merge(self, other: Moments) -> None:
        self._merge(other.count, other.mean, other.squares)

    def _merge(self, count: np.ndarray, mean: np.ndarray, squares: np.ndarray) -> None:
        both = np.maximum(self.count + count, 1)
        difference = mean - self.mean
        self.squares = self.squares + squares + difference**2 * self.count * count / both
        self.mean = self.mean + difference * count / both
        self.count = self.count + count

    def means(self) -> np.ndarray:
        """NaN where there was no number."""
        return np.where(self.count > 0, self.mean, np.nan)

    def errors(self) -> np.ndarray:
        """Standard errors of the means; NaN where there were fewer than two numbers."""
        variance = self.squares / np.maximum(self.count - 1, 1)
        return np.where(self.count > 1, np.sqrt(variance / np.maximum(self.count, 1)), np.nan)


class ImageMeans(Accumulator):
    """Adds up a metric that is one number, or one for each layer or pair of layers, of each image.

    Args:
        metric: says which number of an image stands for all of them.
        axes: of its numbers.
        values: makes of a batch its numbers, [B, *axes].
    """

    def __init__(
        self, metric: Metric, axes: tuple[Axis, ...], values: Callable[[Shown], Tensor] | None = None
    ) -> None:
        self.metric, self.axes, self._values = metric, axes, values
        self.moments, self.summaries = Moments(), Moments()
        self.images: list[np.ndarray] = []

    def update(self, shown: Shown) -> None:
        assert self._values is not None
        self.add(self._values(shown).detach().cpu().double().numpy())

    def close(self) -> None:
        self._values = None  # which need not reach other processes

    def add(self, values: np.ndarray) -> None:
        """Add numbers [B, *axes]."""
        summary = np.stack([self.metric.summarised(image) for image in values])  # [B]
        self.moments.add(values)
        self.summaries.add(summary)
        self.images.append(summary)

    def merge(self, other: ImageMeans) -> None:
        self.moments.merge(other.moments)
        self.summaries.merge(other.summaries)
        self.images += other.images

    def finding(self) -> Finding:
        return Finding(
            self.axes,
            self.moments.means(),
            self.moments.errors(),
            int(self.moments.count.max(initial=0)),
            float(self.summaries.means()),
            float(self.summaries.errors()),
            np.concatenate(self.images),
        )


class Singular:
    """The singular values of a matrix whose rows arrive one after the other; at most 3 D rows are kept."""

    def __init__(self) -> None:
        self.rows = torch.zeros(0, 0, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Add rows [n, D]."""
        for some in rows.detach().cpu().double().split(rows.shape[1]):
            self.rows = torch.cat([self.rows, some]) if len(self.rows) else some
            if len(self.rows) > 2 * self.rows.shape[1]:
                self.rows = torch.linalg.qr(self.rows, mode="r").R

    def merge(self, other: Singular) -> None:
        if len(other.rows):
            self.add(other.rows)

    def values(self) -> np.ndarray:
        """Largest first; NaN if a row is not finite."""
        if not self.rows.isfinite().all():
            return np.full(min(self.rows.shape), np.nan)
        return torch.linalg.svdvals(self.rows).numpy()


class Groups(Accumulator):
    """Compares all layers on groups of images: GROUP of them in their order, and the rest, at least SMALLEST.

    So that the rest is never smaller, a group is taken when SMALLEST more images are there. A subclass says what a
    group gives.
    """

    def __init__(self) -> None:
        self.layers: list[int] = []
        self.values: list[np.ndarray] = []  # of each group, [L, L]
        self.sizes: list[int] = []  # of each group
        self.count = 0
        self._waiting: list[list[Tensor]] = []  # of each batch, each layer's [b, P * D]
        self._images = 0  # that wait

    @abstractmethod
    def of_group(self, layers: Sequence[Tensor]) -> np.ndarray:
        """What all pairs of layers give, each [n, d].  -> [L, L]"""

    def update(self, shown: Shown) -> None:
        self.layers = list(shown.patches)
        self.count += len(shown.logits)
        self._waiting.append([x.flatten(1) for x in shown.patches.values()])
        self._images += len(shown.logits)
        while self._images >= GROUP + SMALLEST:
            self._take(GROUP)

    def _take(self, size: int) -> None:
        """Make a group of the first images that wait."""
        layers = [torch.cat([batch[place] for batch in self._waiting]) for place in range(len(self.layers))]
        self.values.append(self.of_group([x[:size] for x in layers]))
        self.sizes.append(size)
        self._waiting = [[x[size:] for x in layers]]
        self._images -= size

    def close(self) -> None:
        """Make a group of the rest; fewer than SMALLEST in all make none."""
        if self._images >= SMALLEST:
            self._take(self._images)
        self._waiting, self._images = [], 0

    def merge(self, other: Groups) -> None:
        self.layers = self.layers or other.layers
        self.values += other.values
        self.sizes += other.sizes
        self.count += other.count


def shares(images: int, processes: int) -> list[range]:
    """Neighbouring images for each process, so that groups are those that one process makes."""
    groups = max(1, (images - SMALLEST) // GROUP + 1)  # the last one has the rest
    begun = [-(-groups * done // processes) for done in range(processes + 1)]
    ends = [images if count == groups else GROUP * count for count in begun]
    return [range(first, last) for first, last in pairwise(ends)]


def draw(available: int, wanted: int, seed: int) -> np.ndarray:
    """Places of the images that are measured, in the order in which they are: a random one, without repetition."""
    return np.random.default_rng(seed).permutation(available)[:wanted]
