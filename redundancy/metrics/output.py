"""Metrics of the output: how right the model is, how well it knows that, and what patches and features say.

Shapes: B images, P patches, D width, K classes.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from redundancy.finding import Finding
from redundancy.metrics.registry import METRICS, metric
from redundancy.metrics.shown import Shown
from redundancy.metrics.streams import Accumulator, ImageMeans

BINS = 15
NEIGHBOURS = 20
TEMPERATURE = 0.07


@metric("output.top1", takes="output", label="%", summary="value", limits=(0, 100), needs=("labels", "classes"))
def top1(shown: Shown) -> Tensor:
    """Share of images whose class has the largest logit.

        M = 100 [ argmax_k z_k = y ]

    Where: the model's own logits.
    Normalised: nothing.
    Range: [0, 100] percent.
    Undefined: without labels; classes of the model that are not the data's; logits that are not finite.
    Source: top-1 accuracy, as main.py evaluates it.
    """
    return _hits(shown, 1)


@metric("output.top5", takes="output", label="%", summary="value", limits=(0, 100), needs=("labels", "classes"))
def top5(shown: Shown) -> Tensor:
    """Share of images whose class is among those with the five largest logits (all, if there are fewer).

        M = 100 [ y among the five largest z_k ]

    Where: the model's own logits.
    Normalised: nothing.
    Range: [0, 100] percent.
    Undefined: without labels; classes of the model that are not the data's; logits that are not finite.
    Source: top-5 accuracy, as main.py evaluates it.
    """
    return _hits(shown, 5)


def ranked(logits: Tensor) -> Tensor:
    """The classes from the largest logit down; of equal ones the first class comes first.  [B, K] -> [B, K]"""
    return logits.argsort(dim=1, descending=True, stable=True)


def _hits(shown: Shown, count: int) -> Tensor:
    assert shown.labels is not None
    best = ranked(shown.logits)[:, :count]  # [B, count]
    hits = 100.0 * (best == shown.labels[:, None]).any(dim=1)
    return hits.masked_fill(~shown.logits.isfinite().all(dim=1), torch.nan)


@metric(
    "output.calibration", takes="set", label="ECE", summary="value", limits=(0, None), needs=("labels", "classes")
)
class Calibration(Accumulator):
    """Expected calibration error: by how much the model's confidence differs from its accuracy.

        M = sum_b n_b / N |acc_b - conf_b|,   15 bins of equal width, b = ceil(15 conf)

    conf is the largest probability, acc the share of right answers.

    Where: the softmax of the model's own logits.
    Normalised: nothing; no temperature is fitted.
    Range: [0, 1]; biased upwards where bins hold few images, so compare equal numbers of images only.
    Undefined: without labels; classes of the model that are not the data's; logits that are not finite.
    Source: Guo et al. 2017 (arXiv 1706.04599).
    """

    def __init__(self) -> None:
        self.sums = np.zeros((3, BINS))  # images, confidence, right answers
        self.broken = 0  # images whose logits are not finite

    def update(self, shown: Shown) -> None:
        assert shown.labels is not None
        finite = shown.logits.isfinite().all(dim=1)
        confidence = shown.logits[finite].double().softmax(dim=1).amax(dim=1)
        right = (ranked(shown.logits[finite])[:, 0] == shown.labels[finite]).double()
        bins = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
        for row, values in zip(self.sums, (torch.ones_like(confidence), confidence, right), strict=True):
            row += torch.bincount(bins, weights=values, minlength=BINS).cpu().numpy()
        self.broken += int((~finite).sum())

    def merge(self, other: Calibration) -> None:
        self.sums = self.sums + other.sums
        self.broken += other.broken

    def finding(self) -> Finding:
        images, confidence, right = self.sums
        count = int(images.sum())
        value = np.abs(right - confidence).sum() / count if count and not self.broken else np.nan
        return Finding((), np.array(value), np.array(np.nan), count)


@metric(
    "output.patch_accuracy",
    takes="output",
    label="%",
    summary="value",
    limits=(0, 100),
    needs=("patch logits", "labels", "classes"),
)
def patch_accuracy(shown: Shown) -> Tensor:
    """Share of patches from which the head reads the image's class.

        M = 100/P sum_p [ argmax_k z_pk = y ]

    z_p is what the model says of an image of this one final token, the head that `patch.mixing` trains.

    Where: the final norm and head, on every patch of the last block.
    Normalised: nothing.
    Range: [0, 100] percent.
    Undefined: without labels; classes of the model that are not the data's; heads that cannot classify patches;
        logits that are not finite.
    Source: Gong et al. 2021 (arXiv 2104.12753), whose mixing loss trains it.
    """
    assert shown.labels is not None and shown.patch_logits is not None
    share = 100.0 * (shown.patch_logits.argmax(dim=-1) == shown.labels[:, None]).double().mean(dim=1)
    return share.masked_fill(~shown.patch_logits.isfinite().all(dim=(1, 2)), torch.nan)


@metric("output.knn", takes="set", label="%", summary="value", limits=(0, 100), needs=("labels", "features"))
class Neighbours(Accumulator):
    """Accuracy of the 20 nearest neighbours among the other images, weighted: what the features say without a head.

        M = 100/N sum_i [ argmax_c sum_{j in N(i), y_j = c} exp(<u_i, u_j> / 0.07) = y_i ]

    Each image asks all the others that were drawn, not a training set; with fewer than 21 images it asks all of
    them. So the number depends on how many images of each class were drawn: compare equal draws only. The
    features are kept, which takes N D numbers of memory. Images share their neighbours, while the standard error
    takes them for independent: it is too small, by a fifth to a third in simulations.

    Where: the features that the model's classifier reads.
    Normalised: each image's features to length 1.
    Range: [0, 100] percent.
    Undefined: without labels; a single image; a model without a classifier, or features that are not one vector an
        image, not finite, or all zero.
    Source: Wu et al. 2018 (arXiv 1805.01978), as DINO (arXiv 2104.14294) evaluates; leaving one out.
    """

    def __init__(self) -> None:
        self.features: list[Tensor] = []
        self.labels: list[Tensor] = []

    def update(self, shown: Shown) -> None:
        if shown.features is not None and shown.labels is not None:
            self.features.append(shown.features.detach().float().cpu())
            self.labels.append(shown.labels.cpu())

    def merge(self, other: Neighbours) -> None:
        self.features += other.features
        self.labels += other.labels

    def finding(self) -> Finding:
        images = sum(map(len, self.labels))
        means = ImageMeans(METRICS["output.knn"], ())
        finite = all(features.isfinite().all() for features in self.features)
        if images < 2 or not finite or not any(features.any() for features in self.features):
            means.add(np.full(max(images, 1), np.nan))
            return means.finding()
        labels, u = torch.cat(self.labels), torch.cat(self.features).double()
        u = torch.nn.functional.normalize(u, dim=1)
        for first in range(0, images, 1024):
            means.add(_right(u, labels, range(first, min(first + 1024, images))).numpy())
        return means.finding()


def _right(u: Tensor, labels: Tensor, asked: range) -> Tensor:
    """100 where the neighbours of an image name its class, else 0.  u [N, D], labels [N] -> [images asked]"""
    rows = torch.tensor(asked)
    similar = u[rows] @ u.T  # [b, N]
    similar[torch.arange(len(rows)), rows] = -torch.inf
    weights, nearest = similar.topk(min(NEIGHBOURS, len(u) - 1), dim=1)
    votes = u.new_zeros(len(rows), int(labels.max()) + 1)
    votes.scatter_add_(1, labels[nearest], (weights / TEMPERATURE).exp())
    return 100.0 * (votes.argmax(dim=1) == labels[rows])
