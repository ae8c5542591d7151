"""Measures of redundancy: pure functions of a set of n vectors [..., n, d], and nothing else.

What the vectors are (patches, heads, neurons) is the business of the levels: `patch.py`, `attention.py`,
`weight.py`. Every measure returns one scalar, the mean over the leading dimensions, to be *minimised*.
Half-precision input is computed in float32; float32 and float64 stay what they are.

To add a measure:
    1. Write the function here, under `@measure(...)`, with the docstring's sections that its neighbours have.
       A new paper goes into the list below. A keyword argument that specs may set goes into OPTIONS.
    2. Write its naive form, under the same name, in tests/reference.py.
    3. Run script/make_docs.py.
Every level, `--reg`, `--measure`, the YAML files and `--list-regularizers` then know it.

Memory: a measure that normalises items or compares all pairs goes through `mean_over_sets`. This takes some sets at
a time and computes them again in the backward pass, so that only the input is saved for it: no n x n matrix, and no
normalised or float32 copy.

Shapes: B leading dimensions, n items, d their width.
Notation: u_i = x_i / max(|x_i|, 1e-8), G = X X^T.
Sources: [C22] Chen et al., The Principle of Diversity, CVPR 2022, arXiv 2203.06345;
         [G21] Gong et al., Vision Transformers with Patch Diversification, 2021, arXiv 2104.12753;
         [L21] Liu et al., Learning with Hyperspherical Uniformity, AISTATS 2021, arXiv 2103.01649;
         [B18] Bansal et al., Can We Gain More from Orthogonality Regularizations in Training Deep CNNs?, NeurIPS
         2018, arXiv 1810.09102.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from regularizers.primitives import (
    EPS,
    Contrast,
    CrossEntropy,
    SquaredSpread,
    full_precision,
    gram,
    mean_direction,
    mean_of_neighbours,
    mean_over_sets,
    over_sets,
    twice_normalised,
    unit,
)
from regularizers.registry import Option, Registry

if TYPE_CHECKING:
    from mixing.mixup import Labels
    from mixing.patch_grid import Labels as GridLabels

# Options of specs ("patch.cosine:abs", "patch.contrastive:tau=0.1"), and the keyword arguments that they set.
# A measure has an option if its function has the argument.
OPTIONS: Mapping[str, Option] = {
    "abs": Option("absolute", "absolute values of the similarities", value=True),
    "signed": Option("absolute", "similarities with their sign", value=False),
    "normalize": Option("normalize", "items scaled to length 1 first", value=True),
    "raw": Option("normalize", "items as they are", value=False),
    "inverse": Option("inverse", "X^T X, the Gram matrix of the columns, instead of X X^T", value=True),
    "tau": Option("tau", "temperature: similarities are divided by it", above=0.0),
}
MEASURES = Registry(OPTIONS)
measure = MEASURES.measure


# ------------------------------------------------------------------------------------------------------------
# Cosine similarity


@measure()
def cosine(x: Tensor, *, absolute: bool = False) -> Tensor:
    r"""Mean cosine similarity over all pairs, diagonal included.

        R = 1/n^2 sum_ij <u_i, u_j> = | 1/n sum_i u_i |^2

    The right side needs no pairs. With `absolute`, 1/n^2 sum_ij |<u_i, u_j>| has no such form.

    Args: x [..., n, d].
    Returns: scalar.
    Range: [0, 1]; 0 where the u_i add up to nothing, with `absolute` at least 1/n (of non-zero items).
    Rewards: directions that cancel in the sum, which opposite items do as well as spread ones; with `absolute`,
        directions at right angles.
    Cost: O(n d); with `absolute` O(n^2 d). Again in the backward pass; keeps nothing but the input.
    Source: [C22], within-layer embedding and attention terms (signed).
    Use: the recipe's term for patches and heads; with `abs` where items should be apart rather than balanced.
    """

    def of_chunk(x: Tensor) -> Tensor:
        if absolute:
            u = unit(x)  # [C, n, d]
            return gram(u).abs().mean(dim=(-2, -1))
        return mean_direction(x).square().sum(dim=(-2, -1))  # [C, 1, d] -> [C]

    return mean_over_sets(of_chunk, x, matrix=x.shape[-2] ** 2 if absolute else 0)


@measure()
def pairwise_cosine(x: Tensor) -> Tensor:
    r"""Mean absolute cosine similarity over pairs of different items: the papers' form, to report with.

        R = 1/(n (n - 1)) sum_{i != j} |<u_i, u_j>|

    With n = 1 there are no pairs, and R = 0.

    Args: x [..., n, d].
    Returns: scalar.
    Range: [0, 1]; 0 for orthogonal items, 1 for items on one line.
    Rewards: directions at right angles.
    Cost: O(n^2 d); again in the backward pass. Keeps nothing but the input.
    Source: [C22] and [G21], similarity of patch embeddings and of heads.
    Use: to report redundancy (--measure); as a term it is `cosine` with `abs`, without the diagonal.
    """
    return pairwise_cosines(x).mean()


def pairwise_cosines(x: Tensor) -> Tensor:
    """`pairwise_cosine` of every set.  [..., n, d] -> [...]"""
    n = x.shape[-2]

    def of_chunk(x: Tensor) -> Tensor:
        u = unit(x)  # [C, n, d]
        others = gram(u).abs().sum(dim=(-2, -1)) - u.square().sum(dim=(-2, -1))  # [C]
        return others / max(n * (n - 1), 1)

    return over_sets(of_chunk, x, matrix=n**2).view(x.shape[:-2])


@measure(takes="pair")
def cosine_cross(x: Tensor, y: Tensor, *, absolute: bool = False) -> Tensor:
    r"""Mean cosine similarity between the items of one layer and those of another.

        R = 1/n^2 sum_ij <u_i, v_j>
          = < 1/n sum_i u_i, 1/n sum_j v_j >

    u from the first, v from the second layer. The second line needs no pairs; with `absolute`,
    1/n^2 sum_ij |<u_i, v_j>| has no such form.

    Args: x, y [..., n, d].
    Returns: scalar.
    Range: [-1, 1], with `absolute` [0, 1].
    Rewards: mean directions of the two layers that oppose each other; with `absolute`, layers at right angles.
    Cost: O(n d); with `absolute` O(n^2 d). Again in the backward pass; keeps nothing but the inputs.
    Source: [C22], across-layer terms.
    Use: where a layer repeats what an earlier one already says.
    """

    def of_chunk(x: Tensor, y: Tensor) -> Tensor:
        if absolute:
            return (unit(x) @ unit(y).mT).abs().mean(dim=(-2, -1))
        return (mean_direction(x) * mean_direction(y)).sum(dim=(-2, -1))  # [C, 1, d] -> [C]

    return mean_over_sets(of_chunk, x, y, matrix=x.shape[-2] * y.shape[-2] if absolute else 0)


@measure(takes="pair")
def contrastive(x: Tensor, y: Tensor, *, tau: float = 1.0) -> Tensor:
    r"""Each item of the last layer should resemble its own first-layer item more than the others.

        R = 1/n sum_i softplus((m_i - s_ii) / tau)
          = -1/n sum_i log( e^{s_ii / tau} / (e^{s_ii / tau} + e^{m_i / tau}) )
        s_ij = <u_i, v_j>,   m_i = 1/(n - 1) sum_{j != i} s_ij

    With a small temperature tau, those items count most that resemble the others more than their own. [C22] has no
    temperature, which is tau = 1. The first layer is not detached. m_i comes from <u_i, sum_j v_j>, without the
    n x n products. With n = 1 there is nothing to contrast with, and R = 0.

    Args: x, y [..., n, d], first and last layer; `tau` > 0.
    Returns: scalar.
    Range: [log(1 + e^{-2 / tau}), log(1 + e^{2 / tau})] for n > 1; about [0.13, 2.13] with tau = 1.
    Rewards: items of the second layer that resemble their own item of the first, and not the others'.
    Cost: O(n d); again in the backward pass. Keeps nothing but the inputs.
    Source: [C22], after [G21] (which differs: raw dot products, detached target).
    Use: the recipe's term across layers, against patches that become alike with depth.
    """
    n = x.shape[-2]

    def of_chunk(x: Tensor, y: Tensor) -> Tensor:
        if n == 1:
            return 0 * (unit(x) * unit(y)).sum(dim=(-2, -1))
        return Contrast.apply(full_precision(x), full_precision(y), tau).mean(dim=(-2, -1))  # [C, n, 1] -> [C]

    return mean_over_sets(of_chunk, x, y)


@measure(takes="pair", levels=("patch",), detached=True)
def context(x: Tensor, y: Tensor, *, grid: tuple[int, int] | None = None) -> Tensor:
    r"""Each patch of the last layer should fit its own embedding more than other patches and its neighbours do.

        R = -1/n sum_i log( e^{s_i} / (e^{s_i} + e^{o_i} + e^{g_i}) + 1e-8 )
        s_i = <x_i, y_i>,   o_i = <x_i, 1/(n - 1) sum_{j != i} y_j>,   g_i = <x_i, (A_i - y_i / 49) 49 / 48>

    A_i is the average of y in the 7 x 7 window around patch i. Beyond the border of the grid y counts as 0, and is
    counted, so that g_i is smaller there. The products are raw, not cosines. No gradient flows through the first
    layer: a term takes it as it is. With n = 1 there is nothing to contrast with, and R = 0.

    Args: x, y [..., n, d], first and last layer, row by row; `grid` has rows and columns, None is as near to a
        square as n allows.
    Returns: scalar.
    Range: [0, 18.5], from -log(1 + 1e-8) to -log(1e-8); about log 3 where the three products are alike.
    Rewards: patches whose product with their own embedding is above that of the others' mean and of their
        neighbours'; longer ones too, once it is.
    Cost: O(n d); the window takes 14 additions a number. Again in the backward pass; keeps nothing but the inputs.
    Source: [G21], the context term of its code (its paper has `contrastive`'s form).
    Use: the released recipe of [G21], with its embeddings and final features (embed:norm), beside `region_mixing`.
    """
    n = x.shape[-2]

    def of_chunk(x: Tensor, y: Tensor) -> Tensor:
        x, y = full_precision(x), full_precision(y)  # [C, n, d]
        own = (x * y).sum(dim=-1)  # [C, n]
        if n == 1:
            return 0 * own.sum(dim=-1)
        others = ((x @ y.sum(dim=-2, keepdim=True).mT).squeeze(-1) - own) / (n - 1)
        around = ((x * mean_of_neighbours(y, grid, 7)).sum(dim=-1) - own / 49) * 49 / 48
        share = torch.stack([own, others, around], dim=-1).softmax(dim=-1)[..., 0]  # [C, n]
        return -(share + EPS).log().mean(dim=-1)

    return mean_over_sets(of_chunk, x, y)


# ------------------------------------------------------------------------------------------------------------
# Uniformity on the sphere


@measure()
def mhs(x: Tensor) -> Tensor:
    r"""Maximum hyperspherical separation: push the two nearest items apart.

        R = - min { 2 - 2 <u_i, u_j> : i > j, not 0 }

    Summed over the pairs that attain the minimum. u_i = x_i / sqrt(|x_i|^2 + 1e-8), twice. Without a pair at
    non-zero distance, R = 0.

    Args: x [..., n, d].
    Returns: scalar.
    Range: about [-4, 0] where one pair is the nearest; ties add up.
    Rewards: a nearest pair that is further apart on the sphere.
    Cost: O(n^2 d); again in the backward pass. Keeps nothing but the input.
    Source: [C22], MHS, after [L21].
    Use: few items, such as heads: only the nearest pair of a set is moved.
    """

    def of_chunk(x: Tensor) -> Tensor:
        u = twice_normalised(full_precision(x))  # [C, n, d]
        distance = 2 - 2 * gram(u)  # [C, n, n], squared
        pairs = torch.ones(distance.shape[-2:], dtype=torch.bool, device=x.device).tril(-1)  # [n, n]
        counts = pairs & (distance > 0)
        nearest = distance.masked_fill(~counts, torch.inf).amin(dim=(-2, -1), keepdim=True)  # [C, 1, 1]
        return -distance.where(counts & (distance == nearest), 0.0).sum(dim=(-2, -1))

    return mean_over_sets(of_chunk, x, matrix=x.shape[-2] ** 2)


@measure()
def mgd(x: Tensor) -> Tensor:
    r"""Minimum Gram determinant: maximise the volume that a Gaussian kernel of the items spans.

        R = - log det( exp(-(2 - 2 U U^T)) + 1e-6 I )

    u_i = x_i / sqrt(|x_i|^2 + 1e-8), twice. Computed in float64 whatever the input (on MPS, which has no float64,
    on the CPU): in exact numbers the kernel has no negative eigenvalue, so the smallest of the sum is at least
    1e-6. Rounding moves eigenvalues by up to about n times the precision: for n = 196 by 1e-5 in float32, which can
    make the determinant negative and R NaN, but by 1e-13 in float64. So even identical float32 items have a finite
    value and, as the inverse's entries are at most 1e6, a finite gradient.

    Args: x [..., n, d].
    Returns: scalar, in the input's precision (at least float32).
    Range: [-n log(1 + 1e-6), about 13.8 n]; the upper end where all items are alike.
    Rewards: items spread over the sphere, all at once: every near pair counts, the nearest most.
    Cost: O(n^2 d + n^3); in float64, and again in the backward pass. Keeps nothing but the input.
    Source: [C22], MGD, after [L21].
    Use: a smooth alternative to `mhs` where all items should spread and the cubic cost is affordable.
    """

    def of_chunk(x: Tensor) -> Tensor:
        wide = x.cpu() if x.device.type == "mps" else x
        u = twice_normalised(wide.double())  # [C, n, d]
        kernel = torch.exp(-(2 - 2 * gram(u)))  # [C, n, n]
        jitter = 1e-6 * torch.eye(kernel.shape[-1], dtype=kernel.dtype, device=kernel.device)
        return -torch.logdet(kernel + jitter).to(full_precision(x[..., :0, :0]).dtype).to(x.device)

    return mean_over_sets(of_chunk, x, matrix=x.shape[-2] ** 2)


# ------------------------------------------------------------------------------------------------------------
# Orthogonality


@measure()
def so(x: Tensor, *, normalize: bool = False) -> Tensor:
    r"""Soft orthogonality: the Gram matrix should be the identity.

        R = || X X^T - I ||_F^2
          = || X^T X - I ||_F^2 + n - d

    Whichever of the two matrices is smaller is formed: n x n on the first line, d x d on the second.

    Args: x [..., n, d]; `normalize` replaces x_i by u_i first (the patch level's default).
    Returns: scalar.
    Range: [max(n - d, 0), inf).
    Rewards: items of length 1 at right angles to each other; with `normalize`, right angles whatever the lengths.
    Cost: O(n d min(n, d)); again in the backward pass. Keeps nothing but the input.
    Source: [C22], SO, after [B18].
    Use: weights, or few items in many dimensions; n > d items cannot all be orthogonal.
    """
    n, d = x.shape[-2:]

    def of_chunk(x: Tensor) -> Tensor:
        x = unit(x) if normalize else full_precision(x)  # [C, n, d]
        products = gram(x.mT if n > d else x)  # [C, min(n, d), min(n, d)]
        identity = torch.eye(products.shape[-1], dtype=products.dtype, device=products.device)
        return (products - identity).square().sum(dim=(-2, -1)) + max(n - d, 0)

    return mean_over_sets(of_chunk, x, matrix=min(n, d) ** 2)


def draw_probes(x: Tensor, distribution: Literal["normal", "uniform"]) -> tuple[Tensor, Tensor]:
    """Start vectors of CNO's two power iterations, drawn on x's device from torch's global generator.

    'uniform' is in [0, 1): for each matrix one vector for lambda_max, then one for lambda_min (one batched draw
    gives on the CPU the stream of drawing them one by one, as the reference does for weights). 'normal' draws
    all vectors for lambda_max, then all for lambda_min (the reference's patches and heads).

    Args: x [..., n, d].  Returns: two tensors [..., n, 1].
    """
    *lead, n, _ = x.shape
    if distribution == "uniform":
        probes = torch.rand(*lead, 2, n, 1, dtype=x.dtype, device=x.device)
        return probes[..., 0, :, :], probes[..., 1, :, :]
    first = torch.randn(*lead, n, 1, dtype=x.dtype, device=x.device)
    second = torch.randn(*lead, n, 1, dtype=x.dtype, device=x.device)
    return first, second


@measure()
def cno(
    x: Tensor,
    *,
    normalize: bool = False,
    inverse: bool = False,
    distribution: Literal["normal", "uniform"] = "normal",
    eps: float = 1e-6,
) -> Tensor:
    r"""Conditional-number orthogonality: the Gram matrix's extreme eigenvalues should be equal.

        R = (lambda_max - lambda_min)^2
        lambda_max = dominant(G, p),   lambda_min = lambda_max + dominant(G - lambda_max I, p')
        dominant(A, p) = (A y . y) / (y . y + eps),   y = A p

    G = X X^T, or with `inverse` X^T X; neither is ever formed: G v = X (X^T v), so O(n d). Both power iterations
    start side by side, and (G y . y) is |X^T y|^2, so four products with X are enough, and as many for the
    gradient, which flows through all of them. The probes p and p' are random (`draw_probes`).

    Args: x [..., n, d]; `normalize` replaces x_i by u_i first (the patch level's default); `distribution` and
        `eps` follow the reference: uniform probes and eps = 0 for weights, normal and 1e-6 elsewhere.
    Returns: scalar; random, as the probes are.
    Range: [0, inf).
    Rewards: items that fill all directions alike, so that the extreme eigenvalues of their Gram matrix are close;
        without `normalize` also shorter items.
    Cost: O(n d); keeps the input, normalised with `normalize`, and four vectors of n numbers (d with `inverse`).
    Source: [C22], CNO.
    Use: the recipe's term for weights; the cheapest of the orthogonality terms on large matrices. `inverse` where
        n > d, for which X X^T is singular.
    """
    x = unit(x) if normalize else full_precision(x)
    x = x.mT if inverse else x
    probes = torch.cat(draw_probes(x, distribution), dim=-1).mT  # [..., 2, n]
    return SquaredSpread.apply(x, probes, eps).mean()


# ------------------------------------------------------------------------------------------------------------
# Gradients


@measure(takes="gradient")
def gradient_diversity(g: Tensor) -> Tensor:
    r"""Diversity of the items' gradients: large when they point in different directions.

        R = - sum_i |g_i|^2 / | sum_i g_i |^2

    g_i is the gradient of the label loss at item i, so training on R needs a double backward. R does not
    change when the loss is scaled. Without any gradient R = 0.

    Args: g [..., n, d].
    Returns: scalar.
    Range: (-inf, -1/n]; unbounded where the gradients cancel, -1/n where they are equal.
    Rewards: patches that the label loss pulls in different directions.
    Cost: O(n d); and a double backward pass through what lies above the patches. Keeps the gradient.
    Source: [C22], gradient diversity.
    Use: with `patch.mixing` or an average-pooled model, where the label reaches the last block's patches.
    """
    g = full_precision(g)
    total = g.sum(dim=-2).square().sum(dim=-1)  # [...]
    return -(g.square().sum(dim=(-2, -1)) / total.clamp_min(torch.finfo(g.dtype).tiny)).mean()


# ------------------------------------------------------------------------------------------------------------
# Labels


@measure(takes="labels", averaged=True)
def mixing(patch_logits: Tensor, labels: Labels) -> Tensor:
    r"""Cross-entropy of every patch against its own soft label, mean over images and patches.

        R = 1/(B P) sum_bp CE_bp
        CE_bp = -(1 - e) (w_p log q_own + (1 - w_p) log q_partner) - e mean_k log q_k

    q is the softmax of the patch's K logits, e the label smoothing and w_p the share of patch p that shows the
    image's own class. The second line is the cross-entropy with the dense label e/K + (1 - e) (w_p 1_own + (1 -
    w_p) 1_partner), which is never built; nor are the log-probabilities, but for some patches at a time.

    Args: patch_logits [B, P, K], any precision; computed in at least float32.
    Returns: scalar. The papers' sum over patches is P times it.
    Range: [0, inf); log K where all classes are equally likely.
    Rewards: patches that say themselves which class they show.
    Cost: O(P K); again in the backward pass. And the model's head on every patch. Keeps nothing but the input.
    Source: [C22], mixing loss, after [G21].
    Use: the recipe's term inside the label loss; it also lets the label reach the last block's patches.
    """
    classes, shares = labels_of_patches(labels)
    return CrossEntropy.apply(patch_logits.flatten(0, 1), classes, shares, labels.smoothing).mean()


def labels_of_patches(labels: Labels) -> tuple[Tensor, Tensor]:
    """The two classes of each patch, and their shares in it.  -> [B * P, 2], [B * P, 2]"""
    classes = torch.stack([labels.own, labels.partner], dim=1)[:, None]  # [B, 1, 2]
    classes = classes.expand(-1, labels.patch_weight.shape[1], -1).flatten(0, 1)
    shares = torch.stack([labels.patch_weight, 1 - labels.patch_weight], dim=2).flatten(0, 1)
    return classes, shares


@measure(takes="labels")
def region_mixing(patch_logits: Tensor, labels: GridLabels) -> Tensor:
    r"""Divergence of what each region of a mixed image is taken for from what it shows, weighted by its size.

        R = 1/B sum_b sum_r w_r sum_k t_brk (log t_brk - log(1e-8 + q_brk))

    The two regions are the patches that are an image's own and those of its partner; w_r is their share of all
    patches, t_br the (soft) label of what they show, and q the softmax of the region's K logits. 0 log 0 = 0. The
    sum over the regions is not divided.

    Args: patch_logits [B, 2, K], of the regions that `labels` names (mixing/patch_grid.py), through a head of their
        own (models/heads.py); computed in at least float32.
    Returns: scalar.
    Range: [-1e-8 K, 18.5]; 0 where q is the label.
    Rewards: patches of a region whose mean says what the region shows.
    Cost: O(K); and O(P D + D K) of the head. Keeps the probabilities of two regions an image.
    Source: [G21], the mixing term of its code (its paper has `mixing`'s form).
    Use: the released recipe of [G21], beside `context`. It brings its own mix of patches, and a head `patch_head`.
    """
    logits = full_precision(patch_logits)
    targets = labels.of_regions(logits.shape[2], logits.dtype)  # [B, 2, K]
    divergence = torch.xlogy(targets, targets) - targets * (logits.softmax(dim=2) + EPS).log()
    return (divergence.sum(dim=2) @ labels.shares.to(logits.dtype)).mean()
