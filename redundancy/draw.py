"""Which images are looked at."""

from __future__ import annotations

import numpy as np


def draw(available: int, wanted: int, seed: int) -> np.ndarray:
    """Places of the images that are measured, in the order in which they are: a random one, without repetition."""
    return np.random.default_rng(seed).permutation(available)[:wanted]
