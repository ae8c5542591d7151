"""Measures of redundancy: pure functions of a set of n vectors [..., n, d], and nothing else.

What the vectors are (patches, heads, neurons) is the business of the levels: `patch.py`, `attention.py`,
`weight.py`. Every measure returns one scalar, the mean over the leading dimensions, to be *minimised*.
Half-precision input is computed in float32; float32 and float64 stay what they are.

To add a measure: write the function here with the sections of its neighbours' docstrings, add its line to
`MEASURES` at the bottom, test it in tests/test_measures.py against a naive loop, and run script/make_docs.py.
Every level, `--reg`, `--measure`, the YAML files and `--list-regularizers` then know it.

Memory: measures that normalise or compare all pairs go through `_mean_over_sets`. It takes as many sets at a time
as `in_chunks` allows and computes them again in the backward pass, so that such a measure keeps nothing but its
input for it: no n x n matrix, no normalised or float32 copy.

Shapes: B leading dimensions, n items, d their width.
Notation: u_i = x_i / max(|x_i|, 1e-8), G = X X^T.
Sources: [C22] Chen et al., The Principle of Diversity, CVPR 2022, arXiv 2203.06345;
         [G21] Gong et al., Vision Transformers with Patch Diversification, 2021, arXiv 2104.12753;
         [L21] Liu et al., Learning with Hyperspherical Uniformity, AISTATS 2021, arXiv 2103.01649;
         [B18] Bansal et al., Can We Gain More from Orthogonality Regularizations in Training Deep CNNs?, NeurIPS
         2018, arXiv 1810.09102.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

EPS = 1e-8
MAX_ELEMENTS = 2**22  # of a tensor inside a chunk, unless one set has more; 16 MiB in float32
MAX_ELEMENTS_ON_DEVICE = 2**25  # where launching a kernel costs more than memory: 128 MiB in float32


def full_precision(x: Tensor) -> Tensor:
    """Half precision becomes float32; float32 and float64 pass through."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def unit(x: Tensor) -> Tensor:
    """u_i = x_i / max(|x_i|, 1e-8), in at least float32.  [..., n, d] -> [..., n, d]"""
    return _Unit.apply(full_precision(x))


def mean_direction(x: Tensor) -> Tensor:
    """1/n sum_i u_i, in at least float32.  [..., n, d] -> [..., 1, d]"""
    return _MeanDirection.apply(full_precision(x))


class _Unit(torch.autograd.Function):
    """`unit`, which keeps nothing but x and whose gradient takes few passes through it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x / _lengths(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return _unit_gradient(x, gradient)


class _MeanDirection(torch.autograd.Function):
    """`mean_direction`, which never forms the u_i."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (1 / _lengths(x)).mT @ x / x.shape[-2]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return _unit_gradient(x, gradient / x.shape[-2])


def _unit_gradient(x: Tensor, gradient: Tensor) -> Tensor:
    """The gradient at x_i, where g_i is that at u_i: (g_i - <u_i, g_i> u_i) / max(|x_i|, 1e-8).

    Up to |x_i| = 1e-8, u_i is proportional to x_i, and the second summand is missing.

    Args: x [..., n, d]; gradient [..., n, d], or [..., 1, d] if it is the same for all i.
    """
    lengths = _lengths(x)
    along = (x * gradient).sum(dim=-1, keepdim=True) * (lengths > EPS) / lengths**2  # [..., n, 1]
    return torch.addcmul(gradient, along, x, value=-1).div_(lengths)


def _lengths(x: Tensor) -> Tensor:
    """max(|x_i|, 1e-8).  [..., n, d] -> [..., n, 1]"""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(EPS)


def gram(x: Tensor) -> Tensor:
    """X X^T.  [..., n, d] -> [..., n, n]"""
    return _Gram.apply(x)


class _Gram(torch.autograd.Function):
    """`gram`, with one matrix product in the backward pass; autograd would not see that both factors are X."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x @ x.mT

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return (gradient + gradient.mT) @ x


def in_chunks(*tensors: Tensor, each: int | None = None) -> list[tuple[Tensor, ...]]:
    """Tensors of equal length, split alike, so that a chunk has no more elements than is good for its device.

    Args:
        each: elements that one row stands for; those of the first tensor's if None.
    """
    first = tensors[0]
    limit = MAX_ELEMENTS if first.device.type == "cpu" else MAX_ELEMENTS_ON_DEVICE
    rows = max(1, limit // (each or first[0].numel()))
    return [tensor.split(rows) for tensor in tensors]


def _mean_over_sets(value: Callable[..., Tensor], *sets: Tensor, matrix: int = 0) -> Tensor:
    """Mean of a measure over the leading dimensions, in chunks that bound its memory whatever their number.

    No tensor inside `value` is larger than `in_chunks` allows, or than one set needs. Where gradients are wanted, a
    chunk is computed once more in its backward pass: nothing but `sets` themselves, in their own precision, is
    kept for it.

    Args:
        value: maps sets [C, n, d] to their C values; deterministic.
        sets: [..., n, d] each, with the same leading dimensions, if any.
        matrix: elements of the matrix that `value` forms for one set, if any.
    Returns: scalar.
    """
    largest = max(matrix, *(x.shape[-2] * x.shape[-1] for x in sets))
    chunks = zip(*in_chunks(*(x.reshape(-1, *x.shape[-2:]) for x in sets), each=largest), strict=True)  # [C, n, d]
    if torch.is_grad_enabled() and any(x.requires_grad for x in sets):
        values = [checkpoint(value, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    else:
        values = [value(*chunk) for chunk in chunks]
    return torch.cat(values).mean()


# ------------------------------------------------------------------------------------------------------------
# Cosine similarity


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

    return _mean_over_sets(of_chunk, x, matrix=x.shape[-2] ** 2 if absolute else 0)


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

    return _mean_over_sets(of_chunk, x, y, matrix=x.shape[-2] * y.shape[-2] if absolute else 0)


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
    n = x.shape[-2]

    def of_chunk(x: Tensor) -> Tensor:
        u = unit(x)  # [C, n, d]
        others = gram(u).abs().sum(dim=(-2, -1)) - u.square().sum(dim=(-2, -1))  # [C]
        return others / max(n * (n - 1), 1)

    return _mean_over_sets(of_chunk, x, matrix=n**2)


def contrastive(x: Tensor, y: Tensor) -> Tensor:
    r"""Each item of the last layer should resemble its own first-layer item more than the others.

        R = 1/n sum_i softplus(m_i - s_ii)
          = -1/n sum_i log( e^{s_ii} / (e^{s_ii} + e^{m_i}) )
        s_ij = <u_i, v_j>,   m_i = 1/(n - 1) sum_{j != i} s_ij

    No temperature, and the first layer is not detached. m_i comes from <u_i, sum_j v_j>, without the n x n
    products. With n = 1 there is nothing to contrast with, and R = 0.

    Args: x, y [..., n, d], first and last layer.
    Returns: scalar.
    Range: [log(1 + e^-2), log(1 + e^2)], about [0.13, 2.13], for n > 1.
    Rewards: items of the second layer that resemble their own item of the first, and not the others'.
    Cost: O(n d); again in the backward pass. Keeps nothing but the inputs.
    Source: [C22], after [G21] (which differs: raw dot products, detached target).
    Use: the recipe's term across layers, against patches that become alike with depth.
    """
    n = x.shape[-2]

    def of_chunk(x: Tensor, y: Tensor) -> Tensor:
        if n == 1:
            return 0 * (unit(x) * unit(y)).sum(dim=(-2, -1))
        return _Contrast.apply(full_precision(x), full_precision(y)).mean(dim=(-2, -1))  # [C, n, 1] -> [C]

    return _mean_over_sets(of_chunk, x, y)


class _Contrast(torch.autograd.Function):
    """softplus(m_i - s_ii), `contrastive` item by item.  x, y [..., n, d] -> [..., n, 1]

    The u_i and v_i are never formed, neither here nor for the gradient. With V = sum_j v_j, m_i - s_ii is
    (<u_i, V> - n s_ii) / (n - 1). With g_i the gradient at that numerator and U = sum_i g_i u_i,

        dR/du_i = g_i (V - n v_i),   dR/dv_i = U - n g_i u_i

    and x_i and y_i get of these what is at right angles to them, as in `_unit_gradient`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        *_, numerator = _Contrast.similarities(x, y)
        return F.softplus(numerator / (x.shape[-2] - 1))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, y = ctx.saved_tensors
        n = x.shape[-2]
        x_lengths, y_lengths, own, all_y, numerator = _Contrast.similarities(x, y)
        g = torch.sigmoid(numerator / (n - 1)) * gradient / (n - 1)
        all_x = (g / x_lengths).mT @ x  # U, [..., 1, d]
        x_along = g * numerator * (x_lengths > EPS)
        y_along = ((all_x @ y.mT).mT / y_lengths - n * g * own) * (y_lengths > EPS)
        crossed = -n * g / (x_lengths * y_lengths)
        by_x = (x * (-x_along / x_lengths**2)).addcmul_(crossed, y).addcmul_(g / x_lengths, all_y)
        by_y = (y * (-y_along / y_lengths**2)).addcmul_(crossed, x).addcmul_(1 / y_lengths, all_x)
        return by_x, by_y

    @staticmethod
    def similarities(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The lengths of x and of y, s_ii, V [..., 1, d], and the numerator; [..., n, 1] but for V."""
        x_lengths, y_lengths = _lengths(x), _lengths(y)
        own = (x * y).sum(dim=-1, keepdim=True) / (x_lengths * y_lengths)
        all_y = (1 / y_lengths).mT @ y
        return x_lengths, y_lengths, own, all_y, (all_y @ x.mT).mT / x_lengths - x.shape[-2] * own


# ------------------------------------------------------------------------------------------------------------
# Uniformity on the sphere


def _twice_normalised(x: Tensor) -> Tensor:
    """x / sqrt(|x|^2 + 1e-8), applied twice as the reference does.  [..., n, d] -> [..., n, d]"""
    for _ in range(2):
        x = x / (x.square().sum(dim=-1, keepdim=True) + EPS).sqrt()
    return x


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
        u = _twice_normalised(full_precision(x))  # [C, n, d]
        distance = 2 - 2 * gram(u)  # [C, n, n], squared
        pairs = torch.ones(distance.shape[-2:], dtype=torch.bool, device=x.device).tril(-1)  # [n, n]
        counts = pairs & (distance > 0)
        nearest = distance.masked_fill(~counts, torch.inf).amin(dim=(-2, -1), keepdim=True)  # [C, 1, 1]
        return -distance.where(counts & (distance == nearest), 0.0).sum(dim=(-2, -1))

    return _mean_over_sets(of_chunk, x, matrix=x.shape[-2] ** 2)


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
        u = _twice_normalised(wide.double())  # [C, n, d]
        kernel = torch.exp(-(2 - 2 * gram(u)))  # [C, n, n]
        jitter = 1e-6 * torch.eye(kernel.shape[-1], dtype=kernel.dtype, device=kernel.device)
        return -torch.logdet(kernel + jitter).to(full_precision(x[..., :0, :0]).dtype).to(x.device)

    return _mean_over_sets(of_chunk, x, matrix=x.shape[-2] ** 2)


# ------------------------------------------------------------------------------------------------------------
# Orthogonality


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

    return _mean_over_sets(of_chunk, x, matrix=min(n, d) ** 2)


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
    return _SquaredSpread.apply(x, probes, eps).mean()


class _Iterations(NamedTuple):
    """CNO's two power iterations. Vectors are rows: on CPUs v X is several times faster than X v."""

    y: Tensor  # [..., 1, n], G p
    u: Tensor  # [..., 1, n], (G - lambda_max I) p'
    largest: Tensor  # [..., 1, 1], lambda_max
    difference: Tensor  # [..., 1, 1], lambda_min - lambda_max

    @classmethod
    def of(cls, x: Tensor, probes: Tensor, eps: float) -> _Iterations:
        """Of x [..., n, d], from probes p and p' [..., 2, n]."""
        y, u = (probes @ x @ x.mT).split(1, dim=-2)  # G p and G p'
        largest = _squared_norm(y @ x) / _divisor(y, eps)
        u = u - largest * probes[..., 1:, :]
        difference = (_squared_norm(u @ x) - largest * _squared_norm(u)) / _divisor(u, eps)
        return cls(y, u, largest, difference)


class _SquaredSpread(torch.autograd.Function):
    r"""D^2, D = lambda_min - lambda_max, of x [..., n, d] with probes p and p' [..., 2, n].  -> [..., 1, 1]

    Autograd would make an n x d matrix for each product with X and add them up, which on a CPU costs far more than
    the products. This backward pass makes one, of rank 6:

        dD/dX = (S + S^T) X,   S = u u^T / |u|^2 + s p'^T + l (y y^T / |y|^2 + t p^T)
        s = 2 (G u - (lambda_max + D) u) / |u|^2
        t = 2 (G y - lambda_max y) / |y|^2
        l = -(u . u / |u|^2 + s . p')

    y = G p, u = (G - lambda_max I) p', and a divisor |v|^2 is v . v + eps.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, probes: Tensor, eps: float) -> Tensor:
        iterations = _Iterations.of(x, probes, eps)
        ctx.save_for_backward(x, probes, *iterations)
        ctx.eps = eps
        return iterations.difference.square()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        x, probes, *saved = ctx.saved_tensors
        if torch.is_grad_enabled():  # this pass is differentiated itself, and x is not seen through what was saved
            saved = _Iterations.of(x, probes, ctx.eps)
        y, u, largest, difference = saved
        y_divisor, u_divisor = _divisor(y, ctx.eps), _divisor(u, ctx.eps)
        y_u_probes_x = torch.cat([y, u, probes], dim=-2) @ x  # [..., 4, d]
        gram_y, gram_u = (y_u_probes_x[..., :2, :] @ x.mT).split(1, dim=-2)
        t = 2 * (gram_y - largest * y) / y_divisor
        s = 2 * (gram_u - (largest + difference) * u) / u_divisor
        by_largest = -(_squared_norm(u) / u_divisor + (s * probes[..., 1:, :]).sum(dim=-1, keepdim=True))  # l
        t_s, shares = torch.cat([t, s], dim=-2), torch.cat([by_largest, torch.ones_like(by_largest)], dim=-2)
        left = [2 * by_largest * y / y_divisor, 2 * u / u_divisor, shares * t_s, shares * probes]
        left = 2 * difference * gradient * torch.cat(left, dim=-2)  # [..., 6, n]
        return left.mT @ torch.cat([y_u_probes_x, t_s @ x], dim=-2), None, None


def _squared_norm(v: Tensor) -> Tensor:
    """[..., 1, n] -> [..., 1, 1]"""
    return v.square().sum(dim=-1, keepdim=True)


def _divisor(v: Tensor, eps: float) -> Tensor:
    """v . v + eps, never 0.  [..., 1, n] -> [..., 1, 1]"""
    return (_squared_norm(v) + eps).clamp_min(torch.finfo(v.dtype).tiny)


# ------------------------------------------------------------------------------------------------------------
# Gradients


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
# The registry

# An option of a spec ("patch.cosine:abs") and the keyword argument it stands for. A measure takes an option if
# its signature has the argument.
OPTIONS: Mapping[str, tuple[str, bool]] = {
    "abs": ("absolute", True),
    "signed": ("absolute", False),
    "normalize": ("normalize", True),
    "raw": ("normalize", False),
    "inverse": ("inverse", True),
}
# What each option means, for `--list-regularizers` and docs/regularizers.md.
OPTION_MEANINGS: Mapping[str, str] = {
    "abs": "absolute values of the similarities",
    "signed": "similarities with their sign",
    "normalize": "items scaled to length 1 first",
    "raw": "items as they are",
    "inverse": "X^T X, the Gram matrix of the columns, instead of X X^T",
}


@dataclass(frozen=True)
class Measure:
    """A measure and what it is applied to.

    Attributes:
        function: takes one set of items, a pair of sets, or the gradient at the items.
        takes: 'set' (one layer), 'pair' (two layers) or 'gradient' (of the label loss, at one layer).
        levels: where it makes sense.
        options: names from OPTIONS that `function` accepts.
        defaults: the function's keyword arguments and their defaults.
    """

    function: Callable[..., Tensor]
    takes: Literal["set", "pair", "gradient"] = "set"
    levels: tuple[str, ...] = ("patch", "attn", "weight")
    options: tuple[str, ...] = field(init=False)
    defaults: Mapping[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        accepted = inspect.signature(self.function).parameters
        defaults = {name: p.default for name, p in accepted.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}
        object.__setattr__(self, "defaults", defaults)
        object.__setattr__(
            self, "options", tuple(o for o, (argument, _) in OPTIONS.items() if argument in accepted)
        )


MEASURES: Mapping[str, Measure] = {
    "cosine": Measure(cosine),
    "pairwise_cosine": Measure(pairwise_cosine),
    "cosine_cross": Measure(cosine_cross, takes="pair", levels=("patch", "attn")),
    "contrastive": Measure(contrastive, takes="pair", levels=("patch", "attn")),
    "mhs": Measure(mhs),
    "mgd": Measure(mgd),
    "so": Measure(so),
    "cno": Measure(cno),
    "gradient_diversity": Measure(gradient_diversity, takes="gradient", levels=("patch",)),
}
