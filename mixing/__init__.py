"""How images and their labels are mixed.

A scheme is a `Mixing`: one file here, a line in build.SCHEMES, and, where its loss reads something else than the
model's own head, a class in models/heads.py. The flags name the modes, so nothing heavy is imported in this file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor


MODES = ("batch", "pair", "elem")  # what is drawn once: for a batch, for each pair of partners, for each image


class Labels(Protocol):
    """The labels of a mixed batch, as the cross-entropy of the images takes them.

    A scheme's own labels have more besides, for the measures that take labels.

    Attributes:
        own: [B], the class of each image before it was mixed.
        smoothing: label smoothing e.
        mixed: whether images of this run are mixed at all.
        floor: what a probability is raised by before its logarithm is taken, where images are mixed; 0 for none.
    """

    @property
    def own(self) -> Tensor: ...

    @property
    def smoothing(self) -> float: ...

    @property
    def mixed(self) -> bool: ...

    @property
    def floor(self) -> float: ...

    def dense(self, num_classes: int, dtype: torch.dtype = ...) -> Tensor:
        """The images' labels as probabilities.  [B, K]"""

    def repeat(self, times: int) -> Labels:
        """The labels of a batch that holds all its images so many times, one batch after the other."""


class Mixing(Protocol):
    """Mixes batches.

    Attributes:
        random: where all its random numbers come from; a checkpoint keeps its state.
    """

    random: np.random.RandomState

    def __call__(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Any]:
        """Images [B, C, H, W] and class indices [B] -> mixed images [B, C, H, W] and their labels."""
