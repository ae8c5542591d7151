"""The method's equations, written naively, to compare the fast forms with: nothing here is shared with them.

Loops over items, pairs, classes and pixels, in float64. Measures take one set of items as a list of rows, of
floats or of 0-dimensional tensors, through which autograd finds the gradient; `mean_over_leading` and
`gradients_of_mean` apply them to tensors [..., n, d].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Number = float | Tensor  # float, or a float64 tensor []
Rows = list[list[Number]]  # n items of width d
Box = tuple[int, int, int, int]  # rows [top, bottom) and columns [left, right)


def mean_over_leading(function: Callable[..., Number], *sets: Tensor) -> float:
    """Mean of a measure over all leading dimensions of its inputs [..., n, d]."""
    flat = [x.detach().double().reshape(-1, *x.shape[-2:]).tolist() for x in sets]
    values = [float(function(*matrices)) for matrices in zip(*flat, strict=True)]
    return sum(values) / len(values)


def gradients_of_mean(function: Callable[..., Number], *sets: Tensor) -> list[Tensor]:
    """The gradients of that mean at each of its inputs, number by number through the loops, in float64."""
    leaves = [x.detach().double().requires_grad_() for x in sets]
    flat = [rows_of(leaf.reshape(-1, *leaf.shape[-2:])) for leaf in leaves]
    values = [function(*matrices) for matrices in zip(*flat, strict=True)]
    mean = sum(torch.as_tensor(value, dtype=torch.float64) for value in values) / len(values)
    if not mean.requires_grad:  # a constant, such as the pairs of a single item
        return [torch.zeros_like(leaf) for leaf in leaves]
    return list(torch.autograd.grad(mean, leaves, materialize_grads=True))


def rows_of(matrices: Tensor) -> list[Rows]:
    """[M, n, d] -> M sets of rows of tensors [], connected to `matrices`."""
    return [[list(row.unbind()) for row in matrix.unbind()] for matrix in matrices.unbind()]


def root(a: Number) -> Number:
    return a.sqrt() if isinstance(a, Tensor) else math.sqrt(a)


def exp(a: Number) -> Number:
    return a.exp() if isinstance(a, Tensor) else math.exp(a)


def log(a: Number) -> Number:
    return a.log() if isinstance(a, Tensor) else math.log(a)


def number(a: Number) -> Number:
    """As a float, unless autograd has to see it."""
    return a if isinstance(a, Tensor) and a.requires_grad else float(a)


def dense(rows: Rows) -> Tensor:
    """A matrix of its numbers, in float64."""
    return torch.stack([torch.stack([torch.as_tensor(a, dtype=torch.float64) for a in row]) for row in rows])


def dot(a: Sequence[Number], b: Sequence[Number]) -> Number:
    return sum(p * q for p, q in zip(a, b, strict=True))


def units(x: Rows) -> Rows:
    """u_i = x_i / max(|x_i|, 1e-8)"""
    return [[a / max(root(dot(row, row)), 1e-8) for a in row] for row in x]


def twice_normalised(x: Rows) -> Rows:
    """x_i / sqrt(|x_i|^2 + 1e-8), two times: how MHS and MGD normalise."""
    for _ in range(2):
        x = [[a / root(dot(row, row) + 1e-8) for a in row] for row in x]
    return x


# ------------------------------------------------------------------------------------------------------------
# Measures


def cosine(x: Rows, absolute: bool = False) -> Number:
    """1/n^2 sum_ij <u_i, u_j>"""
    return cosine_cross(x, x, absolute)


def cosine_cross(x: Rows, y: Rows, absolute: bool = False) -> Number:
    """1/n^2 sum_ij <u_i, v_j>"""
    pairs = [dot(u, v) for u in units(x) for v in units(y)]
    return sum(abs(s) if absolute else s for s in pairs) / len(pairs)


def pairwise_cosine(x: Rows) -> Number:
    """1/(n (n - 1)) sum_{i != j} |<u_i, u_j>|; no pairs: 0"""
    u, n = units(x), len(x)
    return sum(abs(dot(u[i], u[j])) for i in range(n) for j in range(n) if i != j) / max(n * (n - 1), 1)


def contrastive(x: Rows, y: Rows, tau: float = 1.0) -> Number:
    """-1/n sum_i log( e^{s_ii / t} / (e^{s_ii / t} + e^{m_i / t}) ),  m_i = mean_{j != i} s_ij; no others: 0"""
    u, v, n = units(x), units(y), len(x)
    if n == 1:
        return 0.0
    value: Number = 0.0
    for i in range(n):
        own = exp(dot(u[i], v[i]) / tau)
        others = exp(sum(dot(u[i], v[j]) for j in range(n) if j != i) / (n - 1) / tau)
        value -= log(own / (own + others)) / n
    return value


def grid_of(n: int) -> tuple[int, int]:
    """Rows and columns of the rectangle of n items whose sides differ least; no fewer columns than rows."""
    rows = max(rows for rows in range(1, n + 1) if n % rows == 0 and rows * rows <= n)
    return rows, n // rows


def neighbours_mean(y: Rows, place: int, grid: tuple[int, int]) -> list[Number]:
    """The sum over the 7 x 7 window around an item, divided by 49: what lies beyond the grid counts as zeros."""
    rows, columns = grid
    row, column = divmod(place, columns)
    near = [
        y[columns * r + c]
        for r in range(rows)
        for c in range(columns)
        if abs(r - row) <= 3 and abs(c - column) <= 3
    ]
    return [sum(values) / 49 for values in zip(*near, strict=True)]


def context(x: Rows, y: Rows, grid: tuple[int, int] | None = None) -> Number:
    """-1/n sum_i log(q_i + 1e-8), q the softmax of x_i's products with y_i, others and neighbours; no others: 0"""
    n, value = len(x), 0.0
    if n == 1:
        return 0.0
    for i in range(n):
        others = [sum(y[j][k] for j in range(n) if j != i) / (n - 1) for k in range(len(y[i]))]
        mean = neighbours_mean(y, i, grid or grid_of(n))
        around = [(a - b / 49) * 49 / 48 for a, b in zip(mean, y[i], strict=True)]
        products = [dot(x[i], other) for other in (y[i], others, around)]
        largest = max(float(torch.as_tensor(product).detach()) for product in products)
        powers = [exp(product - largest) for product in products]
        value = value - log(powers[0] / sum(powers) + 1e-8) / n
    return value


def squared_distances(x: Rows) -> list[Number]:
    """2 - 2 <u_i, u_j> over pairs i > j"""
    u = twice_normalised(x)
    return [2 - 2 * dot(u[i], u[j]) for i in range(len(u)) for j in range(i)]


def mhs(x: Rows) -> Number:
    """-(smallest non-zero squared distance), summed over the pairs that attain it"""
    distances = [s for s in squared_distances(x) if s > 0]
    return -sum(s for s in distances if s == min(distances))


def mgd(x: Rows) -> Number:
    """-logdet( exp(-(2 - 2 U U^T)) + 1e-6 I )"""
    u, n = twice_normalised(x), len(x)
    kernel = [[exp(-(2 - 2 * dot(u[i], u[j]))) + 1e-6 * (i == j) for j in range(n)] for i in range(n)]
    return number(-torch.linalg.eigvalsh(dense(kernel)).log().sum())


def so(x: Rows, normalize: bool = False) -> Number:
    """|| X X^T - I ||_F^2"""
    x = units(x) if normalize else x
    return sum((dot(x[i], x[j]) - float(i == j)) ** 2 for i in range(len(x)) for j in range(len(x)))


def gram(x: Rows, normalize: bool = False, inverse: bool = False) -> Tensor:
    """G = X X^T, or of the columns, as a dense matrix."""
    x = units(x) if normalize else x
    x = [list(column) for column in zip(*x, strict=True)] if inverse else x
    return dense([[dot(a, b) for b in x] for a in x])


def dominant(matrix: Tensor, probe: Tensor, eps: float) -> Number:
    """(A y . y) / (y . y + eps),  y = A probe; 0 if y = 0"""
    y = matrix @ probe.double()
    square = (y * y).sum()
    return (matrix @ y * y).sum() / (square + eps) if square > 0 else 0.0


def cno(g: Tensor, first: Tensor, second: Tensor, eps: float) -> Number:
    """(lambda_max - lambda_min)^2 of a dense Gram matrix, each from one step of power iteration."""
    largest = dominant(g, first, eps)
    smallest = largest + dominant(g - largest * torch.eye(len(g), dtype=torch.float64), second, eps)
    return number((largest - smallest) ** 2)


def gradient_diversity(g: Rows) -> Number:
    """-(sum_i |g_i|^2) / |sum_i g_i|^2"""
    whole = [sum(column) for column in zip(*g, strict=True)]
    return -sum(dot(row, row) for row in g) / dot(whole, whole)


# ------------------------------------------------------------------------------------------------------------
# Mixed images and their labels


def own_pixels(height: int, width: int, box: Box | None) -> Tensor:
    """True where a pixel is the image's own: outside the box.  [H, W]"""
    top, bottom, left, right = box or (0, 0, 0, 0)
    inside = [[top <= y < bottom and left <= x < right for x in range(width)] for y in range(height)]
    return ~torch.tensor(inside)


def image_weight(height: int, width: int, weight: float, box: Box | None) -> float:
    """lambda: the share of the image's own pixels, or Mixup's weight."""
    return weight if box is None else int(own_pixels(height, width, box).sum()) / (height * width)


def patch_weights(height: int, width: int, patch: tuple[int, int], weight: float, box: Box | None) -> list[float]:
    """lambda_p of every whole patch, row by row: its share of own pixels, counted; or Mixup's weight."""
    own, (ph, pw) = own_pixels(height, width, box), patch
    weights = []
    for top in range(0, height - ph + 1, ph):
        for left in range(0, width - pw + 1, pw):
            count = sum(bool(own[y, x]) for y in range(top, top + ph) for x in range(left, left + pw))
            weights.append(weight if box is None else count / (ph * pw))
    return weights


def mixed_image(image: Tensor, partner: Tensor, weight: float, box: Box | None) -> Tensor:
    """Pixel by pixel: the partner's inside the box; without a box, the weighted mean.  [3, H, W]"""
    _, height, width = image.shape
    own, mixed = own_pixels(height, width, box), torch.empty_like(image)
    for y in range(height):
        for x in range(width):
            if box is None:
                mixed[:, y, x] = weight * image[:, y, x] + (1 - weight) * partner[:, y, x]
            else:
                mixed[:, y, x] = image[:, y, x] if own[y, x] else partner[:, y, x]
    return mixed


def smooth_label(target: int, smoothing: float, classes: int) -> list[float]:
    """1 - e + e/K on the class, e/K elsewhere.  [K]"""
    return [(1 - smoothing) * (k == target) + smoothing / classes for k in range(classes)]


def soft_label(own: int, partner: int, weight: float, smoothing: float, classes: int) -> list[float]:
    """lambda y_own + (1 - lambda) y_partner.  [K]"""
    a, b = smooth_label(own, smoothing, classes), smooth_label(partner, smoothing, classes)
    return [weight * p + (1 - weight) * q for p, q in zip(a, b, strict=True)]


# ------------------------------------------------------------------------------------------------------------
# Losses


def soft_cross_entropy(logits: Tensor, labels: list[list[float]]) -> Tensor:
    """Mean over rows of -sum_k y_k log softmax(z)_k, differentiable.  logits [n, K]"""
    total = torch.zeros((), dtype=torch.float64)
    for z, y in zip(logits, labels, strict=True):
        partition = sum(torch.exp(z[k]) for k in range(len(y)))
        for k in range(len(y)):
            total = total - y[k] * torch.log(torch.exp(z[k]) / partition) / len(labels)
    return total


def patch_cross_entropies(
    patch_logits: Tensor, own: list[int], partner: list[int], weights: list[list[float]], smoothing: float
) -> list[Tensor]:
    """CE_p of every patch p, each a mean over the batch, with dense labels [B, P, K]."""
    batch, patches, classes = patch_logits.shape
    dense = [
        [soft_label(own[b], partner[b], weights[b][p], smoothing, classes) for p in range(patches)]
        for b in range(batch)
    ]
    return [soft_cross_entropy(patch_logits[:, p], [dense[b][p] for b in range(batch)]) for p in range(patches)]


def floored_cross_entropy(logits: list[list[float]], labels: list[list[float]]) -> float:
    """Mean over rows of -sum_k y_k log(1e-8 + softmax(z)_k)."""
    value = 0.0
    for z, y in zip(logits, labels, strict=True):
        partition = sum(math.exp(a) for a in z)
        value -= sum(p * math.log(1e-8 + math.exp(a) / partition) for a, p in zip(z, y, strict=True)) / len(logits)
    return value


def region_mixing(
    logits: list[list[list[float]]], labels: list[list[float]], order: list[int], own: list[list[int]]
) -> float:
    """Sum over the two regions: their share of the patches, times the images' mean of KL(label || 1e-8 + softmax).

    logits [B, 2, K]; labels [B, K] before patches were mixed; own [rows][columns], 1 where a patch is the image's.
    """
    cells = [cell for row in own for cell in row]
    shares = [cells.count(1) / len(cells), cells.count(0) / len(cells)]
    value = 0.0
    for b, both in enumerate(logits):
        for z, share, target in zip(both, shares, (labels[b], labels[order[b]]), strict=True):
            partition = sum(math.exp(a) for a in z)
            for a, t in zip(z, target, strict=True):
                if t > 0:
                    value += share * t * (math.log(t) - math.log(1e-8 + math.exp(a) / partition)) / len(logits)
    return value


def grid_mixed(images: Tensor, order: list[int], own: list[list[int]], patch: tuple[int, int]) -> Tensor:
    """Pixel by pixel: the image's own where its patch is, or where there is no whole patch; else the partner's."""
    mixed = images.clone()
    for b, partner in enumerate(order):
        for y in range(images.shape[2]):
            for x in range(images.shape[3]):
                row, column = y // patch[0], x // patch[1]
                if row < len(own) and column < len(own[0]) and not own[row][column]:
                    mixed[b, :, y, x] = images[partner, :, y, x]
    return mixed


def rectangles(rows: int, columns: int) -> dict[tuple[int, int, int, int], float]:
    """The probability of each rectangle (top, bottom, left, right): the rule's cases, one after the other."""
    patches, found = rows * columns, {}
    for area in range(patches):  # floor(P u), u uniform: each as likely
        lengths = range(1, max(1, min(rows, area) - 1) + 1)
        for drawn in lengths:
            length, width = drawn, area // drawn
            if width > columns:
                length, width = area // columns, columns
            tops, lefts = range(max(0, rows - length) + 1), range(max(0, columns - width) + 1)
            for top in tops:
                for left in lefts:
                    key = (top, top + length, left, left + width)
                    chance = 1 / (patches * len(lengths) * len(tops) * len(lefts))
                    found[key] = found.get(key, 0.0) + chance
    return found


def soft_distillation(student: Tensor, teacher: Tensor, tau: float) -> float:
    """tau^2 / (B K) sum_bk p_bk (log p_bk - log q_bk),  p = softmax(teacher / tau), q = softmax(student / tau)"""
    value = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        q_sum, p_sum = sum(math.exp(z / tau) for z in s), sum(math.exp(z / tau) for z in t)
        for k in range(len(s)):
            p, q = math.exp(t[k] / tau) / p_sum, math.exp(s[k] / tau) / q_sum
            value += p * (math.log(p) - math.log(q))
    return tau**2 * value / student.numel()


def hard_distillation(student: Tensor, teacher: Tensor) -> float:
    """-mean_b log q_b of the teacher's most probable class"""
    value = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        value -= math.log(math.exp(s[t.index(max(t))]) / sum(math.exp(z) for z in s))
    return value / len(student)
