"""A data set without a download: scikit-learn's handwritten digits on canvases, each pixel with its label."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageColor

from images.lists import digits

CANVASES = {True: 800, False: 100}  # of the training half, of the other
CELL = 32  # pixels of the side of a quarter
SIZE = 2 * CELL  # of a canvas's side
DIGITS = (3, 4)  # on a canvas, at least and at most
SIDES = (24, 32)  # of a digit in pixels
INK = 64  # of 255, from which on a pixel belongs to the digit
CLASSES = ("background", *map(str, range(10)))
# Black, then ten colours that are easily told apart (Tableau's)
COLOURS = ["#000000", "#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd"]
COLOURS += ["#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf"]
PALETTE = np.array([ImageColor.getrgb(colour) for colour in COLOURS], np.uint8)


def canvases(is_train: bool, count: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N, 64, 64, 3], white ink on black, and masks uint8 [N, 64, 64]: 0, or 1 + the digit.

    Three or four quarters of a canvas hold a digit each, 24 to 32 pixels high and wide, at a random place. A pixel
    is a digit's where its ink, enlarged by bicubic interpolation, is at least 64 of 255. The first 1,437 digits are
    for training, the last 360 for evaluation. Canvas i depends on the half and on i alone.

    Args:
        is_train: which half.
        count: how many; by default 800 for training, 100 for evaluation.
    Raises:
        UserError: scikit-learn is not installed.
    """
    samples = digits(is_train, (8, 8)).samples
    pictures = [samples[number] for number in range(len(samples))]
    drawn = [_draw(index, is_train, pictures) for index in range(CANVASES[is_train] if count is None else count)]
    images, masks = (np.stack(each) for each in zip(*drawn, strict=True))
    return np.repeat(images[..., None], 3, axis=-1), masks


def _draw(index: int, is_train: bool, pictures: list[tuple[np.ndarray, int]]) -> tuple[np.ndarray, np.ndarray]:
    """One canvas, uint8 [H, W], and its mask."""
    random = np.random.default_rng([index, int(is_train)])
    canvas, mask = np.zeros((SIZE, SIZE), np.uint8), np.zeros((SIZE, SIZE), np.uint8)
    for quarter in random.permutation(4)[: random.integers(DIGITS[0], DIGITS[1] + 1)]:
        pixels, label = pictures[random.integers(len(pictures))]
        side = int(random.integers(SIDES[0], SIDES[1] + 1))
        row, column = np.array(divmod(int(quarter), 2)) * CELL + random.integers(0, CELL - side + 1, 2)
        place = slice(row, row + side), slice(column, column + side)
        ink = np.asarray(Image.fromarray(pixels[..., 0]).resize((side, side), Image.Resampling.BICUBIC))
        canvas[place] = ink
        mask[place] = np.where(ink >= INK, 1 + label, 0)
    return canvas, mask
