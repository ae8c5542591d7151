"""The data set of a loader: images with their masks, decoded by index, then transformed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from images.decode import ImageError
from images.transforms import Box
from segmentation.sets import Pairs

Decoded = tuple[Image.Image, np.ndarray]  # RGB, and uint8 [H, W]


class SegmentedImages(Dataset[tuple[Tensor, Tensor, list[Box]]]):
    """Images with their masks. Reading a pair and transforming it are two steps: many views may follow one decode.

    Args:
        pairs: half of a data set.
        train: makes uint8 [C, h, w] and uint8 [h, w] of a decoded pair, at random; see transforms.Training.
        test: makes uint8 [C, h, w] of an image; see transforms.Whole.
    Attributes:
        samples: for `images.found.digest`; their labels are 0.
        pairs: as given.
    """

    def __init__(
        self,
        pairs: Pairs,
        train: Callable[[Any, np.ndarray], tuple[Tensor, Tensor]],
        test: Callable[[Any], Tensor],
    ) -> None:
        self.pairs = pairs
        self.samples = pairs.samples
        self._train, self._test = train, test

    def __len__(self) -> int:
        return len(self.samples)

    def decode(self, index: int) -> tuple[Decoded, int]:
        """An image RGB and its mask, uint8 [H, W], ready for the transform; and 0, since no class is the image's.

        Raises:
            ImageError: one of them cannot be read, they differ in size, or the mask holds numbers of no class.
        """
        image, mask = self.read_image(index), self.read_mask(index)
        self.check_sizes(index, image, mask)
        return (image, mask), 0

    def read_image(self, index: int) -> Image.Image:
        """An image alone, RGB; see `decode`."""
        return self.pairs.read_image(self.samples[index][0])

    def read_mask(self, index: int) -> np.ndarray:
        """A mask alone, uint8 [H, W]; see `decode`."""
        return self.pairs.read_mask(self.pairs.masks[index])

    def check_sizes(self, index: int, image: Image.Image, mask: np.ndarray) -> None:
        """Refuse a mask of another size than its image.

        Raises:
            ImageError: it is.
        """
        if mask.shape != (image.height, image.width):
            drawn, taken = self.pairs.name(self.pairs.masks[index]), self.pairs.name(self.samples[index][0])
            raise ImageError(
                f"mask {drawn} has {mask.shape[1]} x {mask.shape[0]} pixels, but its image {taken} has "
                f"{image.width} x {image.height}: make them the same, or remove both"
            )

    def example(self, decoded: Decoded, label: int) -> tuple[Tensor, Tensor]:
        """A training example, uint8 [C, h, w] and uint8 [h, w].

        It draws from torch's global generator, which the caller has seeded. `label` is what `decode` gave.
        """
        return self._train(*decoded)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, list[Box]]:
        """What evaluation takes: the image resized, uint8 [C, h, w], its own mask, uint8 [H, W], and no boxes.

        Raises:
            ImageError: as in `decode`.
        """
        (image, mask), _ = self.decode(index)
        return self._test(image), torch.from_numpy(np.array(mask)), []
