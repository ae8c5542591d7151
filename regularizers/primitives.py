"""What measures are made of: normalising, Gram matrices, chunks, and gradients that are written out.

A `torch.autograd.Function` here saves its input for the backward pass, and at most some vectors; autograd would
save every intermediate. `mean_over_sets` bounds the memory of a measure, however many sets there are.

Shapes: n items of width d, in sets [..., n, d].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

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


def mean_of_neighbours(x: Tensor, grid: tuple[int, int] | None, side: int) -> Tensor:
    """The average over the window of side x side around each item of a grid, beyond which there are zeros.

    Args:
        x: [C, n, d], items row by row.
        grid: rows and columns; None is as near to a square as n allows.
        side: of the window, odd.
    Returns: [C, n, d].
    """
    n = x.shape[-2]
    rows, columns = grid or nearest_to_a_square(n)
    image = x.mT.unflatten(-1, (rows, columns))  # [C, d, rows, columns]
    image = F.avg_pool2d(image, (side, 1), stride=1, padding=(side // 2, 0))
    image = F.avg_pool2d(image, (1, side), stride=1, padding=(0, side // 2))
    return image.flatten(2).mT


def nearest_to_a_square(n: int) -> tuple[int, int]:
    """Rows and columns, rows <= columns, of a rectangle of n whose sides differ least."""
    rows = next(rows for rows in range(math.isqrt(n), 0, -1) if n % rows == 0)
    return rows, n // rows


def in_chunks(*tensors: Tensor, each: int | None = None) -> list[tuple[Tensor, ...]]:
    """Tensors of equal length, split alike, so that a chunk has no more elements than is good for its device.

    Args:
        each: elements that one row stands for; those of the first tensor's if None.
    """
    first = tensors[0]
    limit = MAX_ELEMENTS if first.device.type == "cpu" else MAX_ELEMENTS_ON_DEVICE
    rows = max(1, limit // (each or first[0].numel()))
    return [tensor.split(rows) for tensor in tensors]


def mean_over_sets(value: Callable[..., Tensor], *sets: Tensor, matrix: int = 0) -> Tensor:
    """Mean of a measure over the leading dimensions; see `over_sets`.  -> scalar"""
    return over_sets(value, *sets, matrix=matrix).mean()


def over_sets(value: Callable[..., Tensor], *sets: Tensor, matrix: int = 0) -> Tensor:
    """A measure of every set, in chunks that bound its memory whatever their number.

    No tensor inside `value` is larger than `in_chunks` allows, or than one set needs. Where gradients are wanted, a
    chunk is computed once more in its backward pass: nothing but `sets` themselves, in their own precision, is
    kept for it.

    Args:
        value: maps sets [C, n, d] to their C values; deterministic.
        sets: [..., n, d] each, with the same leading dimensions, if any.
        matrix: elements of the matrix that `value` forms for one set, if any.
    Returns: a number for each set, [product of the leading dimensions].
    """
    largest = max(matrix, *(x.shape[-2] * x.shape[-1] for x in sets))
    chunks = zip(*in_chunks(*(x.reshape(-1, *x.shape[-2:]) for x in sets), each=largest), strict=True)  # [C, n, d]
    if torch.is_grad_enabled() and any(x.requires_grad for x in sets):
        values = [checkpoint(value, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    else:
        values = [value(*chunk) for chunk in chunks]
    return torch.cat(values)


def twice_normalised(x: Tensor) -> Tensor:
    """x / sqrt(|x|^2 + 1e-8), applied twice as the reference does.  [..., n, d] -> [..., n, d]"""
    for _ in range(2):
        x = x / (x.square().sum(dim=-1, keepdim=True) + EPS).sqrt()
    return x


# ------------------------------------------------------------------------------------------------------------
# Measures with a gradient of their own


class Contrast(torch.autograd.Function):
    """softplus((m_i - s_ii) / tau), `contrastive` item by item.  x, y [..., n, d] -> [..., n, 1]

    The u_i and v_i are never formed, neither here nor for the gradient. With V = sum_j v_j, (m_i - s_ii) / tau is
    (<u_i, V> - n s_ii) / ((n - 1) tau). With g_i the gradient at that numerator and U = sum_i g_i u_i,

        dR/du_i = g_i (V - n v_i),   dR/dv_i = U - n g_i u_i

    and x_i and y_i get of these what is at right angles to them, as in `_unit_gradient`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, tau: float) -> Tensor:
        ctx.save_for_backward(x, y)
        ctx.divisor = (x.shape[-2] - 1) * tau
        *_, numerator = Contrast.similarities(x, y)
        return F.softplus(numerator / ctx.divisor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, y = ctx.saved_tensors
        n = x.shape[-2]
        x_lengths, y_lengths, own, all_y, numerator = Contrast.similarities(x, y)
        g = torch.sigmoid(numerator / ctx.divisor) * gradient / ctx.divisor
        all_x = (g / x_lengths).mT @ x  # U, [..., 1, d]
        x_along = g * numerator * (x_lengths > EPS)
        y_along = ((all_x @ y.mT).mT / y_lengths - n * g * own) * (y_lengths > EPS)
        crossed = -n * g / (x_lengths * y_lengths)
        by_x = (x * (-x_along / x_lengths**2)).addcmul_(crossed, y).addcmul_(g / x_lengths, all_y)
        by_y = (y * (-y_along / y_lengths**2)).addcmul_(crossed, x).addcmul_(1 / y_lengths, all_x)
        return by_x, by_y, None

    @staticmethod
    def similarities(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The lengths of x and of y, s_ii, V [..., 1, d], and the numerator; [..., n, 1] but for V."""
        x_lengths, y_lengths = _lengths(x), _lengths(y)
        own = (x * y).sum(dim=-1, keepdim=True) / (x_lengths * y_lengths)
        all_y = (1 / y_lengths).mT @ y
        return x_lengths, y_lengths, own, all_y, (all_y @ x.mT).mT / x_lengths - x.shape[-2] * own


class Iterations(NamedTuple):
    """CNO's two power iterations. Vectors are rows: on CPUs v X is several times faster than X v."""

    y: Tensor  # [..., 1, n], G p
    u: Tensor  # [..., 1, n], (G - lambda_max I) p'
    largest: Tensor  # [..., 1, 1], lambda_max
    difference: Tensor  # [..., 1, 1], lambda_min - lambda_max

    @classmethod
    def of(cls, x: Tensor, probes: Tensor, eps: float) -> Iterations:
        """Of x [..., n, d], from probes p and p' [..., 2, n]."""
        y, u = (probes @ x @ x.mT).split(1, dim=-2)  # G p and G p'
        largest = _squared_norm(y @ x) / _divisor(y, eps)
        u = u - largest * probes[..., 1:, :]
        difference = (_squared_norm(u @ x) - largest * _squared_norm(u)) / _divisor(u, eps)
        return cls(y, u, largest, difference)


class SquaredSpread(torch.autograd.Function):
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
        iterations = Iterations.of(x, probes, eps)
        ctx.save_for_backward(x, probes, *iterations)
        ctx.eps = eps
        return iterations.difference.square()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        x, probes, *saved = ctx.saved_tensors
        if torch.is_grad_enabled():  # this pass is differentiated itself, and x is not seen through what was saved
            saved = Iterations.of(x, probes, ctx.eps)
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


class CrossEntropy(torch.autograd.Function):
    """`mixing` patch by patch: CE of logits [N, K] with two classes [N, 2] and their shares [N, 2].  -> [N]

    It keeps the logits as they are. Besides, only the gradient is as large as they are; with q recomputed, it is

        dCE/dlogit_k = q_k - e/K - (1 - e) (w 1_own + (1 - w) 1_partner)_k
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, classes: Tensor, shares: Tensor, smoothing: float) -> Tensor:
        ctx.save_for_backward(logits, classes, shares)
        ctx.smoothing = smoothing
        values = []
        for some, chosen, parts in zip(*in_chunks(logits, classes, shares), strict=True):
            log_q = full_precision(some).log_softmax(dim=1)  # [n, K]
            hit = (parts * log_q.gather(1, chosen)).sum(dim=1)  # [n]
            values.append(-((1 - smoothing) * hit + smoothing * log_q.mean(dim=1)))
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        logits, classes, shares = ctx.saved_tensors
        by_logits, start = torch.empty_like(logits), 0
        for some, chosen, parts, factor in zip(*in_chunks(logits, classes, shares, gradient), strict=True):
            q = full_precision(some).softmax(dim=1)  # [n, K]
            hit = ((1 - ctx.smoothing) * parts).to(q.dtype)  # [n, 2]
            by_some = (q - ctx.smoothing / q.shape[1]).scatter_add(1, chosen, -hit)
            by_logits[start : start + len(some)] = by_some * factor[:, None]
            start += len(some)
        return by_logits, None, None, None
