"""Metrics of weights: of every matrix of a block (q, k, v, proj, fc1, fc2); a row is a neuron.

Biases play no part. Where a block has several matrices of a kind (gate and value of an MLP), the mean is taken.

Shapes: n rows, d columns.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from redundancy.metrics.patches import singular_values
from redundancy.metrics.registry import metric
from regularizers.measures import pairwise_cosine


class Weight:
    """A matrix [n, d], and its singular values, which several metrics ask for."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix.detach().double() if matrix.device.type != "mps" else matrix.detach().cpu().double()

    @cached_property
    def singular(self) -> np.ndarray:
        """Singular values, largest first.  [min(n, d)]"""
        return singular_values(self.matrix).cpu().numpy()

    @cached_property
    def principal(self) -> np.ndarray:
        """Singular values of the matrix less its mean row: of the principal components of its rows.  [min(n, d)]"""
        return singular_values(self.matrix - self.matrix.mean(dim=0)).cpu().numpy()


@metric("weight.cosine_abs", takes="weight", label="mean |cos|", summary="mean", limits=(0, None), redundant="high")
def cosine_abs(weight: Weight) -> float:
    """Mean |cosine| between different rows of a matrix.

        M = 1/(n (n - 1)) sum_{i != j} |<u_i, u_j>|

    The same function as `--measure weight.pairwise_cosine`.

    Where: the matrix as it is stored, fused projections taken apart.
    Normalised: each row to length 1; nothing is centred.
    Range: [0, 1]; about sqrt(2 / (pi d)) for random rows of d numbers.
    Undefined: a single row, or a matrix of zeros.
    Source: Chen et al. 2022 (arXiv 2203.06345).
    """
    if len(weight.matrix) < 2 or not weight.matrix.any():
        return np.nan
    return float(pairwise_cosine(weight.matrix))


@metric(
    "weight.condition",
    takes="weight",
    label="condition number",
    summary="median",
    limits=(1, None),
    redundant="high",
)
def condition(weight: Weight) -> float:
    """Condition number of a matrix.

        M = s_max / s_min

    Where: the matrix as it is stored, fused projections taken apart.
    Normalised: nothing; it does not depend on the scale.
    Range: [1, inf).
    Undefined: s_min at the level of rounding, max(n, d) times the precision of float32 (1.2e-7) times s_max, or
        below: the matrix does not have full rank.
    Source: Chen et al. 2022 (arXiv 2203.06345), which penalises (s_max^2 - s_min^2)^2 (`weight.cno`).
    """
    largest, smallest = weight.singular[0], weight.singular[-1]
    rounding = max(weight.matrix.shape) * torch.finfo(torch.float32).eps * largest
    return float(largest / smallest) if smallest > rounding else np.nan


@metric(
    "weight.stable_rank", takes="weight", label="stable rank", summary="mean", limits=(0, None), redundant="low"
)
def stable_rank(weight: Weight) -> float:
    """Stable rank of a matrix: how many directions carry as much as the strongest.

        M = ||W||_F^2 / s_max^2

    Where: the matrix as it is stored, fused projections taken apart.
    Normalised: nothing; it does not depend on the scale.
    Range: [1, min(n, d)].
    Undefined: a matrix of zeros.
    Source: Rudelson and Vershynin 2007.
    """
    largest = weight.singular[0]
    return float((weight.singular / largest) @ (weight.singular / largest)) if largest > 0 else np.nan


@metric("weight.spectrum", takes="weight", label="s / s_max", summary="none", limits=(0, 1), along=("component", 1))
def spectrum(weight: Weight) -> np.ndarray:
    """Singular values of a matrix, largest first, relative to the largest.

        M_k = s_k / s_1

    Where: the matrix as it is stored, fused projections taken apart.
    Normalised: by the largest singular value.
    Range: [0, 1].
    Undefined: a matrix of zeros.
    Source: the singular value decomposition.
    """
    return weight.singular / weight.singular[0] if weight.singular[0] > 0 else np.full_like(weight.singular, np.nan)


@metric(
    "weight.reconstruction",
    takes="weight",
    label="relative error",
    summary="none",
    limits=(0, 1),
    along=("rank", 0),
)
def reconstruction(weight: Weight) -> np.ndarray:
    """Error of a matrix rebuilt from the first r principal components of its rows.

        M_r = ||C - C_r||_F / ||C||_F = sqrt( 1 - sum_{k <= r} s_k^2 / sum_k s_k^2 ),   r = 0, 1, ..., min(n, d)

    C is W less its mean row, s_k its singular values.

    Where: the matrix as it is stored, fused projections taken apart.
    Normalised: rows are centred by their mean, as principal components are; relative to the whole.
    Range: [0, 1], falling; the sooner, the more redundant the rows. 0 at r for rows of rank r.
    Undefined: a matrix whose rows are all equal.
    Source: Chen et al. 2022 (arXiv 2203.06345), which measures weights by their principal components.
    """
    left = left_over(weight)
    return np.sqrt(left)


def left_over(weight: Weight) -> np.ndarray:
    """Share of the energy that the first r principal components leave, r = 0, ..., min(n, d).  [min(n, d) + 1]"""
    energy = weight.principal**2
    rounding = np.finfo(float).eps ** 2 * float(weight.matrix.square().sum())
    if energy.sum() <= max(weight.matrix.shape) * rounding:
        return np.full(len(energy) + 1, np.nan)
    rest = np.append(np.cumsum(energy[::-1])[::-1], 0.0)  # small ones first, so that none is lost
    return rest / rest[0]


def rank_for(weight: Weight, share: float) -> float:
    """The smallest r whose principal components hold that share of the energy."""
    left = left_over(weight)
    return np.nan if np.isnan(left).any() else float(np.argmax(left <= 1 - share + 1e-12))


@metric("weight.rank_90", takes="weight", label="components", summary="mean", limits=(0, None), redundant="low")
def rank_90(weight: Weight) -> float:
    """Principal components of a matrix's rows that hold 90 % of their energy.

        M = min { r : sum_{k <= r} s_k^2 >= 0.9 sum_k s_k^2 }

    Where: the matrix as it is stored, fused projections taken apart.
    Normalised: rows are centred by their mean; s_k are the singular values of what remains.
    Range: [1, min(n, d)].
    Undefined: a matrix whose rows are all equal.
    Source: Chen et al. 2022 (arXiv 2203.06345), which measures weights by their principal components.
    """
    return rank_for(weight, 0.90)


@metric("weight.rank_95", takes="weight", label="components", summary="mean", limits=(0, None), redundant="low")
def rank_95(weight: Weight) -> float:
    """Principal components of a matrix's rows that hold 95 % of their energy.

        M = min { r : sum_{k <= r} s_k^2 >= 0.95 sum_k s_k^2 }

    Where: the matrix as it is stored, fused projections taken apart.
    Normalised: rows are centred by their mean; s_k are the singular values of what remains.
    Range: [1, min(n, d)].
    Undefined: a matrix whose rows are all equal.
    Source: Chen et al. 2022 (arXiv 2203.06345), which measures weights by their principal components.
    """
    return rank_for(weight, 0.95)


@metric("weight.rank_99", takes="weight", label="components", summary="mean", limits=(0, None), redundant="low")
def rank_99(weight: Weight) -> float:
    """Principal components of a matrix's rows that hold 99 % of their energy.

        M = min { r : sum_{k <= r} s_k^2 >= 0.99 sum_k s_k^2 }

    Where: the matrix as it is stored, fused projections taken apart.
    Normalised: rows are centred by their mean; s_k are the singular values of what remains.
    Range: [1, min(n, d)].
    Undefined: a matrix whose rows are all equal.
    Source: Chen et al. 2022 (arXiv 2203.06345), which measures weights by their principal components.
    """
    return rank_for(weight, 0.99)
