"""From logits to a class for every pixel: whole images, sliding windows, several scales and flips.

What a head returns is small: for UperNet on a ViT a sixteenth of the image's pixels or fewer. So the logits of all
windows are kept as they come, and the image is put together in bands of rows: only the sum over several scales is
ever as large as classes x height x width, and a single view needs not even that.

Legend: C channels, K classes, h x w pixels of a window's logits, H x W of an image or of the mask that is wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from errors import UserError
from regularizers.primitives import full_precision
from segmentation.features import Size
from segmentation.heads import resize

ELEMENTS = 2**22  # of a band of logits [K, rows, W]: 16 MiB in float32
SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # the reference's, each with its flip

Model = Callable[[Tensor], Tensor]  # images [B, C, H, W] -> logits [B, K, h, w]


@dataclass(frozen=True)
class Predictor:
    """How a class is found for every pixel.

        predict = Predictor(window=(512, 512), stride=(341, 341))
        classes = predict(model, image, mask.shape)

    Logits are resized to the image, then to the mask, bilinear without aligned corners. Where windows overlap, the
    mean of their logits is taken. Of several scales and flips the softmax is averaged.

    Attributes:
        window: height and width of sliding windows; None is the whole image.
        stride: between windows, by default as large as they are. Those at the border are shifted inwards.
        scales: of the image, which is resized bilinear.
        flip: whether each scale is also seen from right to left.
        batch: how many windows the model sees at once.
    Raises:
        UserError: a stride that leaves gaps or has no windows, or a scale that is none.
    """

    window: Size | None = None
    stride: Size | None = None
    scales: Sequence[float] = (1.0,)
    flip: bool = False
    batch: int = 4

    def __post_init__(self) -> None:
        if not self.scales or min(self.scales) <= 0:
            raise UserError(f"the scales of an image are positive numbers, not {list(self.scales)}")
        if self.stride is None:
            return
        if self.window is None:
            raise UserError("a stride is of sliding windows: give their size, too")
        if not all(0 < stride <= side for stride, side in zip(self.stride, self.window, strict=True)):
            (height, width), (down, right) = self.window, self.stride
            raise UserError(
                f"windows of {height} x {width} pixels with a stride of {down} x {right} leave gaps: choose a "
                "stride from 1 to the window's size"
            )

    @torch.no_grad()
    def __call__(self, model: Model, image: Tensor, size: Sequence[int]) -> Tensor:
        """The class of every pixel.

        Args:
            model: in evaluation mode; its logits are of any size.
            image: [C, H, W], normalised, on the model's device.
            size: height and width of the mask.
        Returns: [*size], uint8 up to 256 classes, else int64.
        """
        views = [(scale, flipped) for scale in self.scales for flipped in (False, True)[: 1 + self.flip]]
        if len(views) == 1:  # needs no softmax, and no sum
            bands = self._view(model, image, *views[0]).bands(size)
            return torch.cat([_labels(band) for _, band in bands])
        total: Tensor | None = None  # [K, *size]
        for scale, flipped in views:
            for first, band in self._view(model, image, scale, flipped).bands(size):
                if total is None:
                    total = band.new_zeros(len(band), *size)
                total[:, first : first + band.shape[1]] += band.softmax(dim=0)
        assert total is not None
        return _labels(total)

    def _view(self, model: Model, image: Tensor, scale: float, flipped: bool) -> View:
        """The logits of all windows of an image at one scale, perhaps from right to left."""
        if scale != 1:
            scaled = [max(int(side * scale + 0.5), 1) for side in image.shape[-2:]]
            image = resize(image[None], scaled)[0]
        if flipped:
            image = image.flip(-1)
        size = image.shape[-2], image.shape[-1]
        window = self.window or size
        height, width = (min(side, whole) for side, whole in zip(window, size, strict=True))
        down, right = self.stride or window
        tops, lefts = _starts(size[0], height, down), _starts(size[1], width, right)
        corners = [(top, left) for top in tops for left in lefts]
        logits: list[Tensor] = []
        for at in range(0, len(corners), self.batch):
            some = corners[at : at + self.batch]
            crops = torch.stack([image[:, top : top + height, left : left + width] for top, left in some])
            logits += full_precision(model(crops)).unbind()
        return View(size, flipped, (height, width), corners, logits)


@dataclass(frozen=True)
class View:
    """An image as one list of windows, and the logits of each.

    Attributes:
        size: H and W of the image.
        flipped: whether it is seen from right to left.
        window: height and width of each window.
        corners: row and column of the upper left pixel of each.
        logits: [K, h, w] of each.
    """

    size: Size
    flipped: bool
    window: Size
    corners: list[tuple[int, int]]
    logits: list[Tensor]

    def bands(self, size: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """The logits as large as a mask of that height and width, in bands of rows, from left to right.

        Yields: the first row of a band, and the band [K, rows, W].
        """
        height, width = size
        rows = max(ELEMENTS // (len(self.logits[0]) * max(width, self.size[1])), 1)
        for first in range(0, height, rows):
            last = min(first + rows, height)
            if (height, width) == self.size:
                band = self.rows(first, last)
            else:
                top, bottom = _rows_read(self.size[0], height, first, last)
                band = _resized_rows(self.rows(top, bottom), top, self.size[0], (height, width), first, last)
            yield first, band.flip(-1) if self.flipped else band

    def rows(self, first: int, last: int) -> Tensor:
        """The image's logits in some rows: the mean of those of all windows.  [K, last - first, W]"""
        classes = len(self.logits[0])
        total = self.logits[0].new_zeros(classes, last - first, self.size[1])
        count = self.logits[0].new_zeros(last - first, self.size[1])
        height, width = self.window
        for (top, left), logits in zip(self.corners, self.logits, strict=True):
            start, stop = max(first, top), min(last, top + height)
            if start >= stop:
                continue
            part = _resized_rows(logits, 0, logits.shape[1], self.window, start - top, stop - top)
            total[:, start - first : stop - first, left : left + width] += part
            count[start - first : stop - first, left : left + width] += 1
        return total.div_(count)


def _starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows start that cover a length; those that would reach beyond it are shifted inwards."""
    count = max(length - window + stride - 1, 0) // stride + 1
    return [min(number * stride, length - window) for number in range(count)]


def _labels(scores: Tensor) -> Tensor:
    """The best class of every pixel.  [K, H, W] -> [H, W]"""
    best = scores.argmax(dim=0)
    return best.to(torch.uint8) if len(scores) <= 256 else best


# ------------------------------------------------------------------------------------------------------------
# Some rows of a bilinear resize


def _row_weights(length: int, resized: int, first: int, last: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each resized row: the row above it, the row below it, and how near it is to the second, 0 to 1."""
    place = (torch.arange(first, last, dtype=torch.float64) + 0.5) * length / resized - 0.5
    place = place.clamp(0, length - 1)
    above = place.long()
    return above, (above + 1).clamp(max=length - 1), place - above


def _rows_read(length: int, resized: int, first: int, last: int) -> tuple[int, int]:
    """The range of rows on which some resized rows depend."""
    above, below, _ = _row_weights(length, resized, first, last)
    return int(above[0]), int(below[-1]) + 1


def _resized_rows(maps: Tensor, top: int, length: int, size: Sequence[int], first: int, last: int) -> Tensor:
    """Rows first to last of `resize` to a height and width, equal up to rounding.

    Args: maps [K, h, w], rows `top` to `top + h` of all `length` rows.  Returns: [K, last - first, size[1]].
    """
    height, width = size
    if height == length:
        chosen = maps[:, first - top : last - top]
    else:
        above, below, share = _row_weights(length, height, first, last)
        upper, lower = (maps.index_select(1, (rows - top).to(maps.device)) for rows in (above, below))
        chosen = torch.lerp(upper, lower, share.to(maps)[:, None])  # [K, last - first, w]
    return chosen if chosen.shape[2] == width else resize(chosen[None], (last - first, width))[0]
