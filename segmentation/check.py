"""--check-data for images with masks: read every pair of both halves once, and count the pixels of each class.

What cannot be read, masks of another size than their image and labels that are no class are listed, as check_data
lists images. Then the classes: pixels of each in both halves, and a warning for those that occur nowhere.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from torch.utils.data import Dataset

from check_data import Seen, conclude, list_bad, walk
from errors import reason, shown
from images.decode import ImageError
from images.tree import few
from program import Signals
from redundancy.presentation.wording import padded, width
from samplers import ShardSampler
from segmentation.images import SegmentedImages
from segmentation.masks import class_counts
from utils import broadcast_object, gather_to_main, print_main, rank, world_size

Read = TypeVar("Read")
NAME = 40  # letters of a class's name


class Looked(NamedTuple):
    """What is known of one pair.

    Attributes:
        fault: what is wrong with it; '' if nothing is.
        pixels: of each class, and at last those ignored: int64 [K + 1]; zeros if the mask cannot be read.
    """

    fault: str
    pixels: np.ndarray


class LookedPairs(Dataset[Looked]):
    """Each image with its mask, looked at."""

    def __init__(self, images: SegmentedImages) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Looked:
        faults: list[str] = []
        image = _attempt(faults, lambda: self.images.read_image(index))
        mask = _attempt(faults, lambda: self.images.read_mask(index))
        if image is not None and mask is not None:
            _attempt(faults, lambda: self.images.check_sizes(index, image, mask))
        classes = len(self.images.pairs.classes)
        pixels = np.zeros(classes + 1, np.int64) if mask is None else class_counts(mask, classes)
        return Looked("; also: ".join(faults), pixels)


def _attempt(faults: list[str], read: Callable[[], Read]) -> Read | None:
    """What is read; None if it cannot be, and why is added to the faults."""
    try:
        return read()
    except ImageError as error:
        faults.append(reason(error))
        return None


def check_pairs(halves: Mapping[str, SegmentedImages], workers: int, seconds: float) -> None:
    """Read all pairs, by all processes together; what is found is printed by the main one.

    Args:
        halves: 'training' and 'validation', of the same classes.
        workers: of each process.
        seconds: that a worker is waited for, as `--dist-timeout`.
    Raises:
        UserError: some cannot be read, and are listed on stdout.
        Interrupted: a signal came first; what was found until then is listed.
    """
    with Signals() as signals:
        looked = [_look(half, LookedPairs(images), workers, signals, seconds) for half, images in halves.items()]
        gathered = gather_to_main(looked)
    total = broadcast_object(lambda: list_bad(seen for every in gathered for seen, _ in every))
    counts = " and ".join(f"{len(images):,} {half}" for half, images in halves.items())
    if gathered:
        classes = next(iter(halves.values())).pairs.classes
        pixels = {half: sum(every[k][1] for every in gathered) for k, half in enumerate(halves)}
        print_main(table(classes, pixels))
        if not total.stopped:
            for line in warnings(classes, pixels):
                print(line, file=sys.stderr, flush=True)
    conclude(total, counts, "pairs of image and mask")


def _look(half: str, pairs: LookedPairs, workers: int, signals: Signals, seconds: float) -> tuple[Seen, np.ndarray]:
    """This process's share of a half: its faults, and its pixels, int64 [K + 1]."""
    share = ShardSampler(pairs, world_size(), rank())
    pixels = np.zeros(len(pairs.images.pairs.classes) + 1, np.int64)
    faults: set[str] = set()
    count = 0
    for looked in walk(half, pairs, share, workers, signals, seconds):
        count += 1
        faults.add(looked.fault)
        pixels += looked.pixels
    return Seen(frozenset(faults - {""}), count, count < len(share)), pixels


def table(classes: Sequence[str], pixels: Mapping[str, np.ndarray]) -> str:
    """Pixels of each class, and its share of the labelled ones, in columns.

    Args:
        classes: K names.
        pixels: half -> int64 [K + 1], at last those ignored.
    """
    names = ["class", *(shown(name, NAME) for name in classes), "ignored"]
    columns = [names, ["label", *map(str, range(len(classes))), ""]]
    for half, counts in pixels.items():
        labelled = max(1, int(counts[:-1].sum()))
        columns.append([f"{half} pixels", *(f"{count:,}" for count in counts)])
        columns.append(["share", *(f"{100 * count / labelled:.2f} %" for count in counts[:-1]), ""])
    widths = [max(map(width, column)) for column in columns]
    lines = [
        "  ".join(
            padded(cell, size, right=place > 0) for place, (cell, size) in enumerate(zip(row, widths, strict=True))
        )
        for row in zip(*columns, strict=True)
    ]
    return "\n".join(line.rstrip() for line in lines)


def warnings(classes: Sequence[str], pixels: Mapping[str, np.ndarray]) -> list[str]:
    """A line for the classes that occur nowhere, and for each half one for those that it alone lacks.

    Args:
        classes, pixels: as in `table`.
    """
    present = {half: counts[: len(classes)] > 0 for half, counts in pixels.items()}
    anywhere = np.any(list(present.values()), axis=0)
    absent = {"mask": ~anywhere} | {f"{half} mask": anywhere & ~has for half, has in present.items()}
    lines = []
    for which, missing in absent.items():
        names = [name for name, gone in zip(classes, missing, strict=True) if gone]
        if names:
            lines.append(
                f"warning: no {which} that was read has {len(names)} of {len(classes)} classes: {few(names)}"
            )
    return lines
