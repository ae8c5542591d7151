"""Masks: from the numbers in a PNG file to classes 0 to K - 1, and the colours in which classes are shown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from errors import UserError, shown
from images.decode import ImageError, read_file

IGNORED = 255  # what is not to be learnt, and counts in no score, whatever number a data set gives it
MOST_CLASSES = 255  # a mask is uint8, and one of its numbers is IGNORED
NUMBERS = 1 << 16  # that a mask's file can hold
UNKNOWN = 256  # no class, and not ignored
# Pillow spreads the numbers of grey PNGs of 2 and 4 bits over 0 to 255: what it calls their pixels -> the step
SPREAD = {"L;2": 85, "L;4": 17}
PNG_ONLY = "make it a PNG of palette or grey pixels whose numbers are the classes"


def load_numbers(path: str) -> np.ndarray:
    """The numbers in a mask's file as they are stored: uint8 or uint16 [H, W].

    Of a palette PNG these are the indices, not the colours. Grey PNGs may have 1 to 16 bits.

    Raises:
        ImageError: the file cannot be read, or it is a picture in colours, or no PNG, which may have lost numbers.
    """
    return read_file(path, lambda image: _numbers(image, path))


def _numbers(image: Any, path: str) -> np.ndarray:
    if image.format != "PNG":
        raise ImageError(f"mask {path} is a {image.format} file, which may not keep numbers: {PNG_ONLY}")
    step = SPREAD.get(str(image.tile[0][3]) if image.tile else "", 1)
    if image.mode in ("1", "L", "P"):
        return np.asarray(image).astype(np.uint8) // np.uint8(step)
    if image.mode in ("I", "I;16"):
        return np.asarray(image).astype(np.uint16)
    raise ImageError(f"mask {path} is a picture in colours ({image.mode}), not of class numbers: {PNG_ONLY}")


class MaskReader:
    """Reads masks of one data set, and translates their numbers.

    Args:
        meaning: number in a file -> class, or IGNORED.
        advice: what to do about a number that is not among them.
    """

    def __init__(self, meaning: Mapping[int, int], advice: str = "correct or remove the mask") -> None:
        self.known = tuple(sorted(meaning))
        self.advice = advice
        self._table = np.full(NUMBERS, UNKNOWN, np.uint16)
        for number, label in meaning.items():
            self._table[number] = label

    def __call__(self, path: str) -> np.ndarray:
        """The classes of a mask, uint8 [H, W]: 0 to K - 1 or IGNORED.

        Raises:
            ImageError: it cannot be read, or holds a number without a meaning.
        """
        numbers = load_numbers(path)
        labels = self._table[numbers]  # [H, W]
        unknown = labels == UNKNOWN
        if unknown.any():
            row, column = (int(place) for place in np.argwhere(unknown)[0])
            raise ImageError(
                f"mask {path} has the label {numbers[row, column]} in row {row + 1}, column {column + 1}; "
                f"{spans(self.known)} are known: {self.advice}"
            )
        return labels.astype(np.uint8)


def spans(numbers: Sequence[int]) -> str:
    """Numbers in rising order: '0 to 18, 255'."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(first) if first == last else f"{first} to {last}" for first, last in parts)


def plain_meaning(classes: int, ignore_label: int = IGNORED, reduce_zero_label: bool = False) -> dict[int, int]:
    """Number n is class n; with `reduce_zero_label` class n - 1, and 0 is ignored. `ignore_label` always is.

    plain_meaning(2) == {0: 0, 1: 1, 255: 255}
    plain_meaning(2, reduce_zero_label=True) == {0: 255, 1: 0, 2: 1, 255: 255}

    Args:
        classes: their number K.
        ignore_label: as it stands in the files.
    """
    first = int(reduce_zero_label)
    meaning = {first + label: label for label in range(classes)}
    return meaning | dict.fromkeys([0] * first + [ignore_label], IGNORED)


def largest_label(paths: Iterable[str], ignore_label: int, reduce_zero_label: bool) -> int:
    """The largest class in many masks; -1 if all of their pixels are ignored.

    Raises:
        ImageError: one cannot be read.
    """
    largest = -1
    for path in paths:
        numbers = load_numbers(path)
        known = numbers[numbers != ignore_label]
        if known.size:
            largest = max(largest, int(known.max()) - int(reduce_zero_label))
    return largest


def palette(classes: int) -> np.ndarray:
    """A colour for each class, uint8 [K, 3]: Pascal VOC's, which are far apart for neighbouring numbers.

    Bits 0, 3, 6, ... of the class are the highest bits of red, bits 1, 4, 7 of green, bits 2, 5 of blue.
    """
    labels = np.arange(classes)
    colours = np.zeros((classes, 3), np.uint8)
    for channel in range(3):
        for place in range(3 - channel // 2):
            colours[:, channel] |= ((labels >> (3 * place + channel) & 1) << (7 - place)).astype(np.uint8)
    return colours


def read_names(path: str | Path) -> list[str]:
    """The names of classes in a text file, one a line.

    Raises:
        UserError: it cannot be read, or a name is missing or stands there twice.
    """
    where = shown(str(path))
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").rstrip().splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the names of classes in {where}: {error}") from error
    names = [line.strip() for line in lines]
    first: dict[str, int] = {}
    for number, name in enumerate(names, 1):
        if not name:
            raise UserError(f"line {number} of {where} is empty; it must hold one name of a class in each line")
        if name in first:
            raise UserError(
                f"lines {first[name]} and {number} of {where} are both {shown(name)}; names must differ"
            )
        first[name] = number
    if not names:
        raise UserError(f"{where} holds no names of classes; it must hold one in each line")
    if len(names) > MOST_CLASSES:
        raise UserError(f"{where} holds {len(names)} names; there can be {MOST_CLASSES} classes at most")
    return names


def class_counts(mask: np.ndarray, classes: int) -> np.ndarray:
    """Pixels of each class in a mask, and in the last place of those ignored: int64 [K + 1]."""
    counts = np.bincount(mask.ravel(), minlength=IGNORED + 1)
    return np.append(counts[:classes], counts[IGNORED])


def save_mask(path: str | Path, labels: Any, colours: np.ndarray) -> None:
    """Write a mask as a palette PNG: shown in the classes' colours, read as their numbers.

    Args:
        path: of the file.
        labels: integers [H, W], 0 to K - 1 or IGNORED.
        colours: uint8 [K, 3], see `palette`.
    """
    image = Image.fromarray(np.asarray(labels).astype(np.uint8))
    table = np.full((256, 3), 224, np.uint8)  # light grey, also for what is ignored
    table[: len(colours)] = colours
    image.putpalette(table.tobytes())
    image.save(path, format="PNG", optimize=True)
