"""Reports with made-up numbers, for tests of how they are shown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
from scipy import stats

from redundancy.finding import Assessed, Axis, Example, Finding
from redundancy.metrics.registry import METRICS, Metric, Text
from redundancy.report import Report

MATRICES = ("q", "k", "v", "proj", "fc1", "fc2")
IMAGES = 16
SECTIONS = {
    "Where": "output of each block, prefix tokens left out.",
    "Normalised": "each patch to length 1; a patch of zeros stays as it is.",
    "Range": "[0, 1]; 1 for patches on one line, 0 for orthogonal ones.",
    "Undefined": "with a single patch.",
    "Source": "Chen et al., The Principle of Diversity, CVPR 2022, arXiv 2203.06345.",
}
EQUATION = "R = 1/(n (n - 1)) sum_{i != j} |<u_i, u_j>|\nu_i = x_i / max(|x_i|, 1e-8)"
TITLES = {
    "patch.cosine_abs": "Mean absolute cosine between different patches",
    "patch.norm_ratio": "Largest token norm over the median",
    "patch.cka": "Debiased linear CKA between the patches of two layers",
    "attn.entropy": "Entropy of the attention of a token",
    "attn.across": "Mean absolute cosine between the heads of two layers",
    "weight.condition": "Largest singular value over the smallest",
    "weight.spectrum": "Singular values over the largest",
    "output.top1": "Images whose class is the first guess",
    "output.calibration": "Expected calibration error",
}
LIMITS = {
    "patch.cosine_abs": (0.0, 1.0),
    "patch.cka": (0.0, 1.0),
    "weight.spectrum": (0.0, 1.0),
    "weight.condition": (0.0, None),
}
SUMMARY = {"patch": "last", "attn": "last", "weight": "mean", "output": "value"}


def metrics() -> dict[str, Metric]:
    """Metrics as they are registered, without what computes them."""
    return {
        name: Metric(
            name,
            len,
            "patches",
            title.split()[-1] + " (unit)",
            SUMMARY[name.partition(".")[0]],
            LIMITS.get(name, (None, None)),
            "low" if name.startswith("attn.e") else "" if name.startswith("output") else "high",
            False,
            (),
            Text(title + ".", EQUATION, "With one patch there are no pairs.", SECTIONS),
        )
        for name, title in TITLES.items()
    }


@contextmanager
def registered() -> Iterator[None]:
    """They are the only ones; afterwards the others are back in their order."""
    before = dict(METRICS)
    METRICS.clear()
    METRICS.update(metrics())
    try:
        yield
    finally:
        METRICS.clear()
        METRICS.update(before)


def layers(depth: int, *, input_too: bool = True) -> Axis:
    return Axis("layer", (*(["input"] if input_too else []), *map(str, range(depth))))


def finding(axes: tuple[Axis, ...], rng: np.random.Generator, level: float = 0.5) -> Finding:
    """Random numbers with errors, the last of which is the summary."""
    shape = tuple(len(axis.labels) for axis in axes)
    per_image = level + 0.2 * rng.random(IMAGES)
    mean = level * (0.4 + 0.6 * rng.random(shape))
    error = np.full(shape, 0.02)
    spread = float(per_image.std(ddof=1) / np.sqrt(IMAGES))
    return Finding(axes, mean, error, IMAGES, float(per_image.mean()), spread, per_image)


def single(per_image: Iterable[float], *, paired: bool = True) -> Finding:
    """A finding of the images' numbers, as a metric makes it."""
    numbers = np.array(list(per_image))  # [N]
    known = numbers[~np.isnan(numbers)]
    return Finding(
        (),
        np.array(known.mean()),
        np.array(stats.sem(known)),
        len(known),
        float(known.mean()),
        float(stats.sem(known)),
        numbers if paired else None,
    )


def weights(axes: tuple[Axis, ...], rng: np.random.Generator) -> Finding:
    """No images play a part; a smaller matrix has fewer components."""
    shape = tuple(len(axis.labels) for axis in axes)
    mean = 10 ** (2 * rng.random(shape))
    if len(shape) == 3:
        mean = np.sort(mean / mean.max(), axis=-1)[..., ::-1].copy()
        mean[:, 3:, -3:] = np.nan
    return Finding(axes, mean, summary=float(np.nanmean(mean)))


def cka(axis: Axis, rng: np.random.Generator) -> Finding:
    near = np.exp(-np.abs(np.subtract.outer(np.arange(len(axis.labels)), np.arange(len(axis.labels)))) / 6)
    near[0, :] = np.nan
    return Finding((axis, axis), near, None, IMAGES, float(rng.random()), note="16 images in one batch.")


def example(rng: np.random.Generator, heads: int = 3, title: str = "tabby cat") -> Example:
    image = np.kron(rng.integers(40, 255, (4, 4, 3), dtype=np.uint8), np.ones((16, 16, 1), dtype=np.uint8))
    maps = rng.random((heads, 8, 8))
    return Example(image, title, (8, 8), (3, 4), 2 * rng.random((8, 8)) - 1, maps)


def model(
    label: str = "plain", *, seed: int = 0, depth: int = 12, examples: int = 2, level: float = 0.5
) -> Assessed:
    """All of these metrics but one, which is a gap, and a measure."""
    rng = np.random.default_rng(seed)
    outer, inner = layers(depth), layers(depth, input_too=False)
    matrix, component = Axis("matrix", MATRICES), Axis("component", tuple(map(str, range(1, 13))))
    findings = {
        "patch.cosine_abs": finding((outer,), rng, level),
        "patch.norm_ratio": finding((outer,), rng, level),
        "patch.cka": cka(outer, rng),
        "attn.across": finding((inner, inner), rng, level),
        "weight.condition": weights((inner, matrix), rng),
        "weight.spectrum": weights((inner, matrix, component), rng),
        "output.top1": finding((), rng, level),
        "output.calibration": finding((), rng, level),
        "patch.cosine:abs@all": finding((inner,), rng, level),
    }
    about = {"source": f"timm:{label}", "weights": "raw", "parameters": 22_050_664, "image size": "64 x 64"}
    pictures = [example(np.random.default_rng(k)) for k in range(examples)]
    return Assessed(label, about, findings, {"attn.entropy": "shows no maps between all patches"}, pictures)


ABOUT = {
    "command": "python -m redundancy plain diverse --data-set IMNET --output out",
    "revision": "0123abc",
    "versions": "torch 2.14, timm 1.0.31",
    "data": "IMNET, 16 images of its validation half",
    "seed": "0",
    "date": "2026-01-02",
}


def one_metric(label: str, finding: Finding, name: str = "patch.cosine_abs") -> Assessed:
    return Assessed(label, {}, {name: finding})


HARD_LABELS = (
    "<script>alert('x')</script> & \"quoted\"",
    "模型 – нечто שלום",  # noqa: RUF001
    "L" * 200,
    "a_b $x$ 100% #1 {c} ~^\\ |d|",
    "line\nbreak \x1b[31m\u202e",
)


def hard_report() -> Report:
    """Eight labels, with all that a label may hold; one has three seeds."""
    hard = [model(label, seed=k, level=0.3 + 0.05 * k) for k, label in enumerate(HARD_LABELS)]
    seeds = [model("three seeds", seed=20 + k) for k in range(3)]
    return report(*hard, *seeds, model("_m"), model("m", depth=30))


def report(*models: Assessed) -> Report:
    return Report(list(models), dict(ABOUT))
