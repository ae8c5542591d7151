"""The metrics of redundancy/ from the equations in their docstrings, with numpy, scipy and scikit-learn.

Nothing here is shared with redundancy/: tests/test_redundancy_metrics.py compares the two, on all images at once.
A function takes what one image shows (`of_images` says what that is for each metric), a weight matrix, or `Seen`.

Shapes: N images, P patches, D width, W windows, H heads, n queries, m keys, K classes, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.linalg
import scipy.stats
from scipy.spatial.distance import cdist, pdist
from sklearn.decomposition import PCA
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

Array = np.ndarray
NAIVE: dict[str, Callable[..., Any]] = {}


def naive(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        NAIVE[name] = function
        return function

    return register


class Seen(NamedTuple):
    """What a model shows of N images, see `redundancy.metrics.shown.Shown`, as float64 arrays."""

    size: tuple[int, int]
    patches: dict[int, Array]
    maps: dict[int, Array]
    places: dict[int, Any]
    logits: Array
    features: Array
    patch_logits: Array
    labels: Array


def as_seen(shown: Any) -> Seen:
    def numbers(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: numbers(each) for key, each in value.items()}
        return value.detach().double().numpy() if isinstance(value, Tensor) else value

    seen = Seen(*(numbers(getattr(shown, name)) for name in Seen._fields))
    return seen._replace(labels=seen.labels.astype(int))


def of_images(name: str, takes: str, seen: Seen) -> Array:
    """The numbers of every image of a metric that is one image's.  [N, *axes]"""
    return np.array([_of_image(NAIVE[name], takes, seen, image) for image in range(len(seen.logits))])


def _of_image(function: Callable[..., Any], takes: str, seen: Seen, image: int) -> Any:
    patches = [x[image] for x in seen.patches.values()]
    maps = [a[image] for a in seen.maps.values()]
    if takes == "output":
        return function(seen.logits[image], seen.labels[image], seen.patch_logits[image])
    if takes == "patches":
        return [function(x) for x in patches]
    if takes == "patches and input":
        return [function(x, patches[0]) for x in patches]
    if takes == "maps":
        return [function(a) for a in maps]
    if takes == "maps and place":
        return [function(a, *place) for a, place in zip(maps, seen.places.values(), strict=True)]
    layers = patches if takes == "all patches" else maps
    return [[function(x, y, i == j) for j, y in enumerate(layers)] for i, x in enumerate(layers)]


def cosines(x: Array) -> Array:
    """Of all pairs of different rows."""
    return 1 - pdist(x, "cosine")


# ------------------------------------------------------------------------------------------------------------
# Patches


@naive("patch.cosine_abs")
def cosine_abs(x: Array) -> float:
    return np.abs(cosines(x)).mean()


@naive("patch.cosine")
def cosine(x: Array) -> float:
    return cosines(x).mean()


@naive("patch.mean_energy")
def mean_energy(x: Array) -> float:
    residual = sum(np.sum((row - x.mean(axis=0)) ** 2) for row in x)
    return 1 - residual / sum(np.sum(row**2) for row in x)


@naive("patch.effective_rank")
def effective_rank(x: Array) -> float:
    return np.exp(scipy.stats.entropy(scipy.linalg.svdvals(x)))


@naive("patch.norm_outliers")
def norm_outliers(x: Array) -> float:
    lengths = [math.sqrt(row @ row) for row in x]
    return sum(length > 3 * np.median(lengths) for length in lengths) / len(x)


@naive("patch.norm_ratio")
def norm_ratio(x: Array) -> float:
    lengths = [math.sqrt(row @ row) for row in x]
    return max(lengths) / np.median(lengths)


@naive("patch.to_input")
def to_input(x: Array, first: Array) -> float:
    return by_patch(x, first, False)


@naive("patch.by_patch")
def by_patch(x: Array, y: Array, same: bool) -> float:
    if x.shape != y.shape:
        return math.nan
    return 1 - np.mean([pdist(np.stack(pair), "cosine") for pair in zip(x, y, strict=True)])


@naive("patch.rankme")
def rankme(seen: Seen) -> Array:
    found = []
    for x in seen.patches.values():
        s = scipy.linalg.svdvals(np.stack([image.mean(axis=0) for image in x]))
        p = s / s.sum() + 1e-7
        found.append(math.exp(-sum(each * math.log(each) for each in p)))
    return np.array(found)


def groups_of(images: int) -> list[range]:
    """32 images each, but that the last group has 4 to 35."""
    groups, first = [], 0
    while images - first >= 4:
        size = 32 if images - first >= 36 else images - first
        groups.append(range(first, first + size))
        first += size
    return groups


def hsic(x: Array, y: Array) -> float:
    """HSIC_1 of n rows, uncentred, as its docstring has it."""
    n, one = len(x), np.ones(len(x))
    k, m = (matrix @ matrix.T * (1 - np.eye(n)) for matrix in (x, y))
    sums = (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
    return (np.trace(k @ m) + sums - 2 / (n - 2) * one @ k @ m @ one) / (n * (n - 3))


@naive("patch.cka")
def cka(seen: Seen) -> tuple[Array, Array]:
    """With its standard error: of a function of the means of (h_lm, h_ll, h_mm), from their covariance."""
    layers = [x.reshape(len(x), -1) for x in seen.patches.values()]
    groups = groups_of(len(seen.logits))
    weights = [len(group) * (len(group) - 3) for group in groups]
    mean, error = np.zeros((2, len(layers), len(layers)))
    for i, x in enumerate(layers):
        for j, y in enumerate(layers):
            pairs = [(x[group], y[group]) for group in groups]
            h = np.array([[hsic(a, b), hsic(a, a), hsic(b, b)] for a, b in pairs])  # [G, 3]
            both, one, other = mean_h = np.average(h, axis=0, weights=weights)
            mean[i, j] = both / math.sqrt(one * other)
            slope = np.array([1, -both / one / 2, -both / other / 2]) / math.sqrt(one * other)
            spread = sum(
                (w / sum(weights)) ** 2 * np.outer(g - mean_h, g - mean_h) for w, g in zip(weights, h, strict=True)
            )
            variance = slope @ spread @ slope * len(h) / (len(h) - 1) if len(h) > 1 else math.nan
            error[i, j] = math.sqrt(max(variance, 0))
    return mean, error


# ------------------------------------------------------------------------------------------------------------
# Attention


def over_rows(value: Callable[[Array], float], a: Array) -> float:
    """Mean of a function of a query's attention.  a [W, H, n, m]"""
    return np.mean([value(row) for window in a for head in window for row in head])


@naive("attn.cosine_abs")
def heads_cosine(a: Array) -> float:
    return np.mean([np.abs(cosines(window.reshape(len(window), -1))).mean() for window in a])


@naive("attn.across")
def across(a: Array, b: Array, same: bool) -> float:
    if a.shape != b.shape:
        return math.nan
    if same:
        return heads_cosine(a)
    flat = [(one.reshape(len(one), -1), other.reshape(len(other), -1)) for one, other in zip(a, b, strict=True)]
    return np.mean([np.abs(1 - cdist(one, other, "cosine")) for one, other in flat])


@naive("attn.entropy")
def entropy(a: Array) -> float:
    return over_rows(lambda row: -sum(each * math.log(each) for each in row if each > 0), a)


@naive("attn.std")
def std(a: Array) -> float:
    return np.mean([np.std(head) for window in a for head in window])  # the mean of all scores is 1/m


@naive("attn.to_uniform")
def to_uniform(a: Array) -> float:
    return over_rows(lambda row: sum(abs(each - 1 / len(row)) for each in row) / 2, a)


@naive("attn.distance")
def distance(
    a: Array, prefix: int, size: tuple[int, int], grid: tuple[int, int], window: tuple[int, int] | None = None
) -> float:
    windows, _, n, m = a.shape
    pitch = size[0] / grid[0], size[1] / grid[1]
    if windows > 1:
        queries = keys = middles(window or (math.isqrt(n), math.isqrt(n)), pitch)
    else:
        queries = middles(grid, pitch)
        coarse = likest(m - prefix, grid)
        keys = middles(coarse, (size[0] / coarse[0], size[1] / coarse[1]))
    found = []
    for head in a.reshape(-1, n, m):
        for query, row in zip(queries, head[prefix:], strict=True):
            away = [math.dist(query, key) for key in keys]
            found.append(np.average(away, weights=row[prefix:]))
    return np.mean(found)


def middles(grid: tuple[int, int], pitch: tuple[float, float]) -> list[tuple[float, float]]:
    return [((i + 0.5) * pitch[0], (j + 0.5) * pitch[1]) for i in range(grid[0]) for j in range(grid[1])]


def likest(count: int, grid: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of so many cells, in proportions as near to a grid's as can be."""
    possible = [(rows, count // rows) for rows in range(1, count + 1) if count % rows == 0]
    return min(possible, key=lambda each: abs(math.log(each[0] / each[1] * grid[1] / grid[0])))


# ------------------------------------------------------------------------------------------------------------
# Weights


@naive("weight.cosine_abs")
def rows_cosine(w: Array) -> float:
    return np.abs(cosines(w)).mean()


@naive("weight.condition")
def condition(w: Array) -> float:
    number = np.linalg.cond(w)
    return number if number < 1 / (max(w.shape) * np.finfo(np.float32).eps) else math.nan


@naive("weight.stable_rank")
def stable_rank(w: Array) -> float:
    return (np.linalg.norm(w) / np.linalg.norm(w, 2)) ** 2


@naive("weight.spectrum")
def spectrum(w: Array) -> Array:
    s = scipy.linalg.svdvals(w)
    return s / s.max()


@naive("weight.reconstruction")
def reconstruction(w: Array) -> Array:
    whole = np.linalg.norm(w - w.mean(axis=0))
    errors = [1.0]
    for rank in range(1, min(w.shape) + 1):
        pca = PCA(rank, svd_solver="full").fit(w)
        errors.append(np.linalg.norm(w - pca.inverse_transform(pca.transform(w))) / whole)
    return np.array(errors)


def rank_for(w: Array, share: float) -> int:
    held = PCA(svd_solver="full").fit(w).explained_variance_ratio_.cumsum()
    return next(rank for rank, energy in enumerate(held, start=1) if energy >= share)


@naive("weight.rank_90")
def rank_90(w: Array) -> int:
    return rank_for(w, 0.90)


@naive("weight.rank_95")
def rank_95(w: Array) -> int:
    return rank_for(w, 0.95)


@naive("weight.rank_99")
def rank_99(w: Array) -> int:
    return rank_for(w, 0.99)


# ------------------------------------------------------------------------------------------------------------
# Output


def hit(scores: Array, label: int, count: int) -> float:
    best = sorted(range(len(scores)), key=lambda k: -scores[k])[:count]
    return 100.0 if label in best else 0.0


@naive("output.top1")
def top1(logits: Array, label: int, patch_logits: Array) -> float:
    return hit(logits, label, 1)


@naive("output.top5")
def top5(logits: Array, label: int, patch_logits: Array) -> float:
    return hit(logits, label, 5)


@naive("output.patch_accuracy")
def patch_accuracy(logits: Array, label: int, patch_logits: Array) -> float:
    return sum(hit(scores, label, 1) for scores in patch_logits) / len(patch_logits)


@naive("output.calibration")
def calibration(seen: Seen) -> float:
    probabilities = [np.exp(z) / np.exp(z).sum() for z in seen.logits]
    error = 0.0
    for number in range(15):
        inside = [i for i, p in enumerate(probabilities) if number / 15 < max(p) <= (number + 1) / 15]
        right = sum(np.argmax(probabilities[i]) == seen.labels[i] for i in inside)
        error += abs(right - sum(max(probabilities[i]) for i in inside)) / len(probabilities)
    return error


@naive("output.knn")
def knn(seen: Seen) -> Array:
    """Of every image, 100 or 0: each asks all others."""
    found = []
    for image in range(len(seen.labels)):
        others = np.arange(len(seen.labels)) != image
        asked = KNeighborsClassifier(
            min(20, others.sum()), metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07)
        ).fit(seen.features[others], seen.labels[others])
        found.append(100.0 * (asked.predict(seen.features[[image]])[0] == seen.labels[image]))
    return np.array(found)


# ------------------------------------------------------------------------------------------------------------
# One number that stands for all


def summarised(summary: str, values: Sequence[float] | Array) -> float:
    """Of one image's numbers, or of all matrices'; NaNs are left out."""
    values = np.array(values)
    if summary == "pairs":
        values = values[~np.eye(len(values), dtype=bool)]
    known = values[~np.isnan(values)]
    if summary == "last":
        return values[-1]
    return np.median(known) if summary == "median" else known.mean()
