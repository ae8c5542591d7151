"""What was found: the numbers of one metric, of one model, and examples to look at."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np


class Axis(NamedTuple):
    """One dimension of a finding: 'layer' ('input', '0', '1', ...), 'matrix' ('q', ..., 'fc2'), ..."""

    name: str
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Finding:
    """The numbers of one metric, of one model. NaN is a gap: there the metric is undefined.

    Attributes:
        axes: of the numbers; none for a single one.
        mean: [*axes], float64: mean over images, or what the metric makes of all of them.
        error: [*axes], standard error over images; NaN where it is unknown, None where images play no part.
        count: images that went into it; 0 where images play no part.
        summary: the one number that stands for all of them (see `Metric.summary`); NaN if there is none.
        summary_error: its standard error over images, NaN where it is unknown.
        per_image: [N], the summary of each image in the order in which they were drawn, for differences between
            models on the same images; None where one image's number does not exist.
        images: [N], of each of them a number that tells it from others; None if they are not known.
        note: what a reader has to know besides, e.g. how many neighbours were asked.
    """

    axes: tuple[Axis, ...]
    mean: np.ndarray
    error: np.ndarray | None = None
    count: int = 0
    summary: float = float("nan")
    summary_error: float = float("nan")
    per_image: np.ndarray | None = None
    images: np.ndarray | None = None
    note: str = ""


@dataclass(frozen=True)
class Example:
    """What one model makes of one image.

    Attributes:
        image: uint8 [H, W, 3], as the model sees it, before normalisation.
        title: the image's class, if it is known.
        grid: rows and columns of patches at the last block.
        patch: row and column of the patch that the others are compared with.
        cosine: [rows, columns], cosine of each patch to that one in the last block; None if it shows no patches.
        heads: [H, rows, columns], the attention of that patch to the others in each head of the last block,
            averaged over no one; None if the model shows no map, or none between all patches.
    """

    image: np.ndarray
    title: str
    grid: tuple[int, int]
    patch: tuple[int, int]
    cosine: np.ndarray | None = None
    heads: np.ndarray | None = None


@dataclass(frozen=True)
class Assessed:
    """One model, measured. Several of one label are seeds of one run.

    Attributes:
        label: what figures call it.
        about: what it is: source, weights ('raw', 'ema', 'pretrained', ...), parameters, image size,
            preprocessing, checksum, ...; every value is text or a number.
        findings: metric -> what was found.
        gaps: metric -> why it has nothing to show for this model.
        examples: images with what the model makes of them.
    """

    label: str
    about: dict[str, Any]
    findings: dict[str, Finding]
    gaps: dict[str, str] = field(default_factory=dict)
    examples: list[Example] = field(default_factory=list)
