"""Metrics of patches: the patch tokens of a block's output, before the final norm, without prefix tokens.

Layer 'input' is what enters block 0. Each number is one image's; a finding is their mean over images. Where tokens
are not finite, a metric is undefined.

Shapes: B images, P patches, D width, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from redundancy.finding import Finding
from redundancy.metrics.registry import metric
from redundancy.metrics.shown import Shown, layer_label
from redundancy.metrics.streams import Accumulator, Groups, Singular, axis_of
from regularizers.measures import pairwise_cosines
from regularizers.primitives import unit

OUTLIER = 3.0  # times the median norm
ROUNDING = 4.0  # times the precision: images whose patches differ by less are the same


def in_range(x: Tensor) -> Tensor:
    """Images [B, ...], each times the power of two that brings its largest entry near 1.

    No digit changes, and no square of a huge or tiny entry leaves the range of float32.
    """
    largest = x.abs().flatten(1).amax(dim=1)
    exponent = torch.frexp(torch.where(largest.isfinite(), largest, 1.0)).exponent.clamp(-126, 126)
    return torch.ldexp(x, -exponent.view(-1, *[1] * (x.ndim - 1)))


def undefined_where(undefined: Tensor, values: Tensor) -> Tensor:
    """Values [B] with gaps."""
    return values.masked_fill(undefined, torch.nan)


def no_pairs(x: Tensor) -> Tensor:
    """Whether sets [B, ..., n, d] have no two items, or only zeros.  -> bool [B]"""
    return (x == 0).flatten(1).all(dim=1) | (x.shape[-2] < 2)


@metric(
    "patch.cosine_abs",
    takes="patches",
    label="mean |cos|",
    summary="last",
    limits=(0, 1),
    redundant="high",
    cheap=True,
)
def cosine_abs(x: Tensor) -> Tensor:
    """Mean |cosine| between different patches of an image: the papers' form.

        M = 1/(P (P - 1)) sum_{i != j} |<u_i, u_j>|

    The same function as `--measure patch.pairwise_cosine`.

    Args: x [B, P, D].
    Returns: [B].
    Where: the output of a block, before the final norm; prefix tokens left out.
    Normalised: each patch to length 1; nothing is centred.
    Range: [0, 1]; 1 where all patches lie on one line, also where some are opposite, 0 where they are orthogonal.
    Undefined: a single patch, or patches that are all zero.
    Source: Chen et al. 2022 (arXiv 2203.06345) and Gong et al. 2021 (arXiv 2104.12753).
    """
    return undefined_where(no_pairs(x), pairwise_cosines(in_range(x)))


@metric(
    "patch.cosine",
    takes="patches",
    label="mean cos",
    summary="last",
    limits=(None, 1),
    redundant="high",
    cheap=True,
)
def cosine(x: Tensor) -> Tensor:
    """Mean signed cosine between different patches of an image.

        M = 1/(P (P - 1)) sum_{i != j} <u_i, u_j> = ( |sum_i u_i|^2 - sum_i |u_i|^2 ) / (P (P - 1))

    Training minimises it with the diagonal, as `patch.cosine`: R = ((P - 1) M + 1) / P. Patches that are opposite
    to each other lower it, and not the mean of |cos|: only both together tell them from orthogonal ones.

    Args: x [B, P, D].
    Returns: [B].
    Where: the output of a block, before the final norm; prefix tokens left out.
    Normalised: each patch to length 1; nothing is centred.
    Range: [-1/(P - 1), 1].
    Undefined: a single patch, or patches that are all zero.
    Source: the signed form of Chen et al. 2022 (arXiv 2203.06345), on the pairs of the papers' form.
    """
    u = unit(in_range(x))  # [B, P, D]
    count = x.shape[1]
    others = u.sum(dim=1).square().sum(dim=1) - u.square().sum(dim=(1, 2))  # [B]
    return undefined_where(no_pairs(x), others / max(count * (count - 1), 1))


@metric(
    "patch.mean_energy",
    takes="patches",
    label="share of energy",
    summary="last",
    limits=(0, 1),
    redundant="high",
    cheap=True,
)
def mean_energy(x: Tensor) -> Tensor:
    """Share of the patches' energy that their mean holds: what is the same in all of them.

        M = P |m|^2 / sum_i |x_i|^2,   m = 1/P sum_i x_i

    One minus it is the squared residual of rank collapse, relative to the whole.

    Args: x [B, P, D].
    Returns: [B].
    Where: the output of a block, before the final norm; prefix tokens left out.
    Normalised: nothing; patches count by their length.
    Range: [0, 1]; 1 where all patches are equal.
    Undefined: patches that are all zero.
    Source: Dong et al. 2021 (arXiv 2103.03404), the residual; Wang et al. 2022 (arXiv 2203.05962), the share of the
        direct current.
    """
    x = in_range(x)
    energy = x.square().sum(dim=(1, 2))  # [B]
    share = x.shape[1] * x.mean(dim=1).square().sum(dim=1) / energy.clamp_min(torch.finfo(x.dtype).tiny)
    return undefined_where(energy == 0, share)


@metric(
    "patch.effective_rank",
    takes="patches",
    label="effective rank",
    summary="last",
    limits=(0, None),
    redundant="low",
)
def effective_rank(x: Tensor) -> Tensor:
    """Effective rank of an image's patches: how many directions they fill, weighted by how much.

        M = exp( -sum_k p_k log p_k ),   p_k = s_k / sum_j s_j

    s_k are the singular values of X [P, D].

    Args: x [B, P, D].
    Returns: [B].
    Where: the output of a block, before the final norm; prefix tokens left out.
    Normalised: nothing; X is not centred, so a large common mean lowers it.
    Range: [1, min(P, D)].
    Undefined: patches that are all zero.
    Source: Roy and Vetterli 2007, "The effective rank: a measure of effective dimensionality".
    """
    values = singular_values(x)  # [B, min(P, D)]
    total = values.sum(dim=1, keepdim=True)
    shares = values / total.clamp_min(torch.finfo(values.dtype).tiny)
    return undefined_where(total[:, 0] == 0, torch.special.entr(shares).sum(dim=1).exp())


def singular_values(x: Tensor) -> Tensor:
    """Of matrices [..., n, d], largest first, in float64 (MPS has none: on the CPU).  -> [..., min(n, d)]

    NaN for a matrix that is not finite.
    """
    x = x.cpu() if x.device.type == "mps" else x
    finite = x.isfinite().all(dim=(-2, -1))[..., None, None]
    values = torch.linalg.svdvals(torch.where(finite, x.double(), 0.0))
    return torch.where(finite[..., 0], values, torch.nan)


@metric("patch.norm_outliers", takes="patches", label="share of patches", summary="last", limits=(0, None))
def norm_outliers(x: Tensor) -> Tensor:
    """Share of patches that are more than three times as long as the median patch of their image.

        M = 1/P #{ i : |x_i| > 3 median_j |x_j| }

    Such tokens are taken out of the image's content to store something global. The factor does not depend on the
    model's scale; the source cuts where its model's norms have a gap (150, typical ones being 40 to 50).

    Args: x [B, P, D].
    Returns: [B].
    Where: the output of a block, before the final norm; prefix tokens left out.
    Normalised: by the median length of the image's patches.
    Range: [0, 1/2).
    Undefined: a median of zero.
    Source: after Darcet et al. 2024 (arXiv 2309.16588).
    """
    lengths, median = _lengths(x)
    return undefined_where(~(median > 0), (lengths > OUTLIER * median[:, None]).double().mean(dim=1))


@metric("patch.norm_ratio", takes="patches", label="longest / median", summary="last", limits=(1, None))
def norm_ratio(x: Tensor) -> Tensor:
    """Length of an image's longest patch, relative to the median patch.

        M = max_i |x_i| / median_j |x_j|

    Args: x [B, P, D].
    Returns: [B].
    Where: the output of a block, before the final norm; prefix tokens left out.
    Normalised: by the median length of the image's patches.
    Range: [1, inf).
    Undefined: a median of zero.
    Source: after Darcet et al. 2024 (arXiv 2309.16588) and Sun et al. 2024 (arXiv 2402.17762).
    """
    lengths, median = _lengths(x)
    return undefined_where(~(median > 0), lengths.amax(dim=1) / median.clamp_min(torch.finfo(x.dtype).tiny))


def _lengths(x: Tensor) -> tuple[Tensor, Tensor]:
    """The patches' lengths [B, P], and their median [B]: of an even number the mean of the two in the middle.

    NaN where a length is not finite.
    """
    lengths = torch.linalg.vector_norm(in_range(x), dim=-1)
    middle = lengths.sort(dim=1).values[:, [(x.shape[1] - 1) // 2, x.shape[1] // 2]]
    return lengths, undefined_where(~lengths.isfinite().all(dim=1), middle.mean(dim=1))


@metric("patch.to_input", takes="patches and input", label="mean cos", summary="last", limits=(None, 1))
def to_input(x: Tensor, first: Tensor) -> Tensor:
    """Mean cosine of each patch to what it was when it entered block 0.

        M = 1/P sum_i <u_i, v_i>,   v_i the direction of patch i in the input

    Args: x, first [B, P, D].
    Returns: [B].
    Where: the output of a block, before the final norm, against the input of block 0 after position embedding.
    Normalised: each patch to length 1; nothing is centred.
    Range: [-1, 1]; 1 at the input itself, if no patch is zero.
    Undefined: layers of another shape than the input, or patches that are all zero.
    Source: Gong et al. 2021 (arXiv 2104.12753), the similarity that its contrastive term keeps up.
    """
    if x.shape != first.shape:
        return x.new_full(x.shape[:1], torch.nan)
    empty = (x == 0).flatten(1).all(dim=1) | (first == 0).flatten(1).all(dim=1)
    return undefined_where(empty, (unit(in_range(x)) * unit(in_range(first))).sum(dim=-1).mean(dim=1))


@metric(
    "patch.by_patch", takes="all patches", label="mean cos", summary="pairs", limits=(None, 1), redundant="high"
)
def by_patch(layers: Sequence[Tensor]) -> Tensor:
    """Mean cosine between a patch in one layer and the same patch in another.

        M_lm = 1/P sum_i <u_i(l), u_i(m)>

    Args: layers, L tensors [B, P, D].
    Returns: [B, L, L].
    Where: the outputs of two blocks, before the final norm; prefix tokens left out.
    Normalised: each patch to length 1; nothing is centred.
    Range: [-1, 1]; 1 on the diagonal, if no patch is zero.
    Undefined: layers of different shapes, or patches that are all zero.
    Source: Gong et al. 2021 (arXiv 2104.12753), similarity across layers.
    """
    found = layers[0].new_full((len(layers[0]), len(layers), len(layers)), torch.nan)
    for same in by_shape(layers):
        u = torch.stack([unit(in_range(layers[place])) for place in same], dim=1)  # [B, l, P, D]
        flat = u.flatten(2)  # <u_i, v_i> summed over patches is one product
        values = flat @ flat.mT / u.shape[2]  # [B, l, l]
        empty = (flat == 0).all(dim=2)  # [B, l]
        values = values.masked_fill(empty[:, :, None] | empty[:, None, :], torch.nan)
        rows = torch.tensor(same, device=found.device)
        found[:, rows[:, None], rows] = values.to(found.dtype)
    return found


def by_shape(tensors: Sequence[Tensor]) -> list[list[int]]:
    """The places of tensors of equal shape, shape by shape."""
    places: dict[torch.Size, list[int]] = {}
    for place, tensor in enumerate(tensors):
        places.setdefault(tensor.shape, []).append(place)
    return list(places.values())


@metric(
    "patch.rankme",
    takes="set",
    label="RankMe",
    summary="last",
    limits=(0, None),
    redundant="low",
    needs=("tokens",),
)
class RankMe(Accumulator):
    """Effective rank of all images' representations, each the mean of an image's patches.

        M = exp( -sum_k p_k log p_k ),   p_k = s_k / sum_j s_j + 1e-7

    s_k are the singular values of Z [N, D], a row for each image. Rows are kept until they are twice as many as
    columns; then Z gives way to the triangle of its QR decomposition, which has the same singular values. So the
    memory does not grow with the number of images, and the result does not depend on how they are split.

    Where: the output of a block, before the final norm; the mean over patches, prefix tokens left out.
    Normalised: nothing; Z is not centred.
    Range: [1, min(N, D)]; with few images N is the limit, so compare equal numbers of images only.
    Undefined: representations that are all zero.
    Source: Garrido et al. 2023 (arXiv 2210.02885).
    """

    def __init__(self) -> None:
        self.layers: dict[int, Singular] = {}
        self.count = 0

    def update(self, shown: Shown) -> None:
        self.count += len(shown.logits)
        for layer, x in shown.patches.items():
            self.layers.setdefault(layer, Singular()).add(x.mean(dim=1))

    def merge(self, other: RankMe) -> None:
        self.count += other.count
        for layer, rows in other.layers.items():
            self.layers.setdefault(layer, Singular()).merge(rows)

    def finding(self) -> Finding:
        values = np.array([self._of(rows.values()) for rows in self.layers.values()])
        labels = axis_of("layer", map(layer_label, self.layers))
        return Finding((labels,), values, np.full_like(values, np.nan), self.count)

    @staticmethod
    def _of(values: np.ndarray) -> float:
        if values.sum() == 0:
            return float("nan")
        shares = values / values.sum() + 1e-7
        return float(np.exp(-(shares * np.log(shares)).sum()))


@metric("patch.cka", takes="set", label="CKA", summary="pairs", limits=(0, 1), redundant="high", needs=("tokens",))
class CKA(Groups):
    """Debiased minibatch linear CKA between two layers: do they tell images apart in the same way?

        M_lm = h_lm / sqrt(h_ll h_mm),   h_lm = sum_g n_g (n_g - 3) HSIC_1(K_l, K_m) / sum_g n_g (n_g - 3)
        HSIC_1(K, L) = 1/(n (n - 3)) [ tr(K' L') + (1^T K' 1)(1^T L' 1) / ((n - 1)(n - 2)) - 2/(n - 2) 1^T K' L' 1 ]

    K = X X^T is linear, K' is K with a zero diagonal, and a row of X is all patches of an image, one after the
    other. HSIC_1 is an unbiased estimate: unlike that of the plain CKA, its expectation is 0 for independent
    representations, also with few images. Groups g are n_g = 32 images in the order in which they were drawn, the
    last one 4 to 35, whatever the batches are. The standard error is that of a ratio (delta method) over groups.

    Where: the outputs of two blocks, before the final norm; prefix tokens left out.
    Normalised: X is centred within its group, which HSIC_1 does not notice, but rounding does.
    Range: near [0, 1], 1 on the diagonal; as an estimate it may leave it a little. 1 for representations that are
        equal up to rotation and scale.
    Undefined: fewer than 4 images, or a layer whose HSIC_1 with itself is not positive: it does not tell the images
        apart, or by no more than rounding.
    Source: Kornblith et al. 2019 (arXiv 1905.00414), CKA; Song et al. 2012, HSIC_1; Nguyen et al. 2021 (arXiv
        2010.15327), minibatches.
    """

    def of_group(self, layers: Sequence[Tensor]) -> np.ndarray:
        """HSIC_1 of all pairs of layers, each [n, P * D].  -> [L, L]"""
        return hsic(layers)

    def finding(self) -> Finding:
        labels = axis_of("layer", map(layer_label, self.layers))
        mean, error = ratio_of_means(self.values, self.sizes, len(self.layers))
        note = f"{len(self.values)} group(s) of images"
        return Finding((labels, labels), mean, error, self.count, note=note)


def hsic(layers: Sequence[Tensor]) -> np.ndarray:
    """HSIC_1 of all pairs of layers; X [n, d] each, n > 3, any d.  -> [L, L]"""
    grams = []
    for x in layers:
        rounding = ROUNDING * torch.finfo(x.dtype).eps
        x = (x.cpu() if x.device.type == "mps" else x).double()
        centred = x - x.mean(dim=0)
        if centred.norm() <= rounding * x.norm():
            centred = torch.zeros_like(x)
        grams.append((centred @ centred.T).fill_diagonal_(0))
    k = torch.stack(grams)  # [L, n, n]
    n = k.shape[1]
    rows = k.sum(dim=2)  # [L, n]
    sums = rows.sum(dim=1)  # [L]
    traces = k.flatten(1) @ k.flatten(1).T  # tr(K' L'), [L, L]
    found = traces + sums[:, None] * sums / ((n - 1) * (n - 2)) - 2 / (n - 2) * rows @ rows.T
    return (found / (n * (n - 3))).cpu().numpy()


def ratio_of_means(
    groups: Sequence[np.ndarray], sizes: Sequence[int], layers: int
) -> tuple[np.ndarray, np.ndarray]:
    """CKA and its standard error from the HSIC_1 of every group, [L, L] each, and their images; see `CKA`."""
    gaps = np.full((layers, layers), np.nan)
    if not groups:
        return gaps, gaps
    values = np.stack(groups)  # [G, L, L]
    weights = np.array([n * (n - 3) for n in sizes], dtype=float)
    weights /= weights.sum()
    h = np.tensordot(weights, values, axes=1)  # [L, L]
    own = np.diagonal(h)
    defined = (own[:, None] > 0) & (own[None] > 0)
    scale = np.sqrt(np.where(defined, own[:, None] * own[None], 1))
    mean = np.where(defined, h / scale, np.nan)
    if len(groups) == 1:
        return mean, gaps
    selves = np.diagonal(values, axis1=1, axis2=2) / np.where(own > 0, own, 1)  # [G, L]
    # the first-order change of the ratio with the HSIC_1 of one group; their weighted mean is 0
    change = values / scale - np.where(defined, mean, 0) * (selves[:, :, None] + selves[:, None, :]) / 2
    variance = np.tensordot(weights**2, change**2, axes=1) * len(groups) / (len(groups) - 1)
    return mean, np.where(defined, np.sqrt(variance), np.nan)
