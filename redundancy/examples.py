"""Images to look at: what one model makes of them, patch by patch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from errors import UserError
from redundancy.finding import Example
from redundancy.metrics.shown import Shown
from regularizers.primitives import unit


@dataclass(frozen=True)
class Look:
    """What is looked at.

    Attributes:
        count: images, at most.
        patch: row and column of the patch that the others are compared with; None is the one in the middle.
        mean, std: by which the images were normalised, channel by channel; without them each image is stretched to
            its own range.
        names: of the classes.
    """

    count: int = 2
    patch: tuple[int, int] | None = None
    mean: Sequence[float] = ()
    std: Sequence[float] = ()
    names: Sequence[str] = ()


def look_at(shown: Shown, images: Tensor, look: Look, row_by_row: bool) -> list[Example]:
    """The first images of a batch.

    Args:
        images: [B, C, H, W], as the model gets them.
        row_by_row: whether patches stand in the order of the image.
    Raises:
        UserError: there is no such patch.
    """
    last = max(shown.patches, default=None)
    grid = shown.grids[last] if last is not None and row_by_row else None
    if grid is None:
        return []
    rows, columns = grid
    row, column = look.patch or (rows // 2, columns // 2)
    if not (0 <= row < rows and 0 <= column < columns):
        raise UserError(f"there is no patch {row} {column} in {rows} rows and {columns} columns of patches")
    height, width = shown.size
    found = []
    for place in range(min(look.count, len(images))):
        assert last is not None
        u = unit(shown.patches[last][place])  # [P, D]
        cosine = (u @ u[row * columns + column]).view(rows, columns)
        heads = _heads(shown, place, grid, row * columns + column)
        pixels = _pixels(images[place, :, :height, :width], look)
        found.append(Example(pixels, _title(shown, place, look), grid, (row, column), cosine.cpu().numpy(), heads))
    return found


def _heads(shown: Shown, place: int, grid: tuple[int, int], patch: int) -> np.ndarray | None:
    """The attention of a patch to all patches in each head of the last block; None if its map is another."""
    block = max(shown.maps, default=None)
    if block is None or shown.places[block].grid != grid:
        return None
    maps, prefix = shown.maps[block][place], shown.places[block].prefix  # [W, H, n, m]
    count = grid[0] * grid[1]
    if maps.shape[0] != 1 or maps.shape[-2:] != (prefix + count, prefix + count):
        return None
    return maps[0, :, prefix + patch, prefix:].unflatten(1, grid).cpu().numpy()


def _pixels(image: Tensor, look: Look) -> np.ndarray:
    """An image [C, H, W] before normalisation, uint8 [H, W, 3]."""
    image = image.detach().cpu().float()
    if look.mean and look.std:
        mean, std = (torch.tensor(numbers).view(-1, 1, 1) for numbers in (look.mean, look.std))
        image = image * std + mean
    else:
        image = (image - image.min()) / (image.max() - image.min()).clamp_min(1e-12)
    pixels = (255 * image).round().clamp(0, 255).byte().expand(3, -1, -1)
    return pixels.permute(1, 2, 0).numpy()


def _title(shown: Shown, place: int, look: Look) -> str:
    if shown.labels is None:
        return ""
    label = int(shown.labels[place])
    return look.names[label] if label < len(look.names) else str(label)
