"""A batch of made-up tokens, maps and logits, as `redundancy` sees it, for tests of its metrics."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from redundancy.metrics.registry import METRICS, Metric
from redundancy.metrics.shown import Place, Shown
from redundancy.metrics.streams import Accumulator

IMAGES, CLASSES = 40, 7  # two groups of CKA
SIZE = (24, 48)  # of the images; patches are 12 x 16 pixels


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def a_batch(dtype: torch.dtype = torch.float64) -> Shown:
    """Layers of 6, 6 and 4 patches; blocks with prefix tokens, reduced keys, and windows."""
    common = normal(IMAGES, 6, 5, seed=1)  # so that layers resemble each other
    lengths = (1.5 * normal(IMAGES, 6, 1, seed=2)).exp()  # so that some patches stand out
    patches = {
        -1: common,
        0: lengths * (common + normal(IMAGES, 6, 5, seed=3)),
        1: normal(IMAGES, 4, 7, seed=4) + common.flatten(1)[:, :28].view(IMAGES, 4, 7),
    }
    shapes = {0: (1, 3, 8, 8), 1: (1, 3, 8, 8), 2: (1, 3, 8, 4), 3: (2, 2, 4, 4)}
    maps = {block: (2 * normal(IMAGES, *shape, seed=block)).softmax(-1) for block, shape in shapes.items()}
    places = {block: Place(2, SIZE, (2, 3)) for block in (0, 1, 2)} | {3: Place(0, SIZE, (2, 4))}
    labels = torch.randint(CLASSES, (IMAGES,), generator=torch.Generator().manual_seed(5))
    clues = 2 * torch.nn.functional.one_hot(labels, CLASSES).double()
    return Shown(
        SIZE,
        {layer: x.to(dtype) for layer, x in patches.items()},
        {block: a.to(dtype) for block, a in maps.items()},
        places,
        (clues / 3 + normal(IMAGES, CLASSES, seed=6)).to(dtype),
        (clues + normal(IMAGES, CLASSES, seed=7)).to(dtype),
        (clues[:, None] + normal(IMAGES, 6, CLASSES, seed=8)).to(dtype),
        labels,
    )


def some_images(shown: Shown, images: range) -> Shown:
    part = slice(images.start, images.stop)
    assert shown.features is not None and shown.patch_logits is not None and shown.labels is not None
    return replace(
        shown,
        patches={layer: x[part] for layer, x in shown.patches.items()},
        maps={block: a[part] for block, a in shown.maps.items()},
        logits=shown.logits[part],
        features=shown.features[part],
        patch_logits=shown.patch_logits[part],
        labels=shown.labels[part],
    )


def accumulated(metric: Metric, *batches: Shown) -> Accumulator:
    accumulator: Accumulator = metric.function()
    for batch in batches:
        accumulator.update(batch)
    accumulator.close()
    return accumulator


def value(name: str, *args: Any) -> list[float]:
    """What a metric's function says of a batch, or of a weight."""
    return np.atleast_1d(METRICS[name].function(*args)).tolist()
