"""Measures of redundancy: pure functions of a set of n vectors [..., n, d], and nothing else.

What the vectors are (patches, heads, neurons) is the business of the levels: `patch.py`, `attention.py`,
`weight.py`. Every measure returns one scalar, the mean over the leading dimensions, to be *minimised*.
Half-precision input is computed in float32; float32 and float64 stay what they are.

To add a measure: write the function here, add its line to `MEASURES` at the bottom, and test it in
tests/test_measures.py against a naive loop. Every level, `--reg`, `--measure` and the YAML files then know it.

Shapes: B leading dimensions, n items, d their width.
Notation: u_i = x_i / max(|x_i|, 1e-8), G = X X^T.
Sources: [C22] Chen et al., The Principle of Diversity, CVPR 2022, arXiv 2203.06345;
         [G21] Gong et al., Vision Transformers with Patch Diversification, 2021, arXiv 2104.12753.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-8


def full_precision(x: Tensor) -> Tensor:
    """Half precision becomes float32; float32 and float64 pass through."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def unit(x: Tensor) -> Tensor:
    """x_i / max(|x_i|, 1e-8), in at least float32.  [..., n, d] -> [..., n, d]"""
    return F.normalize(full_precision(x), dim=-1, eps=EPS)


# ------------------------------------------------------------------------------------------------------------
# Cosine similarity


def cosine(x: Tensor, *, absolute: bool = False) -> Tensor:
    r"""Mean cosine similarity over all pairs, diagonal included.

        R = 1/n^2 sum_ij <u_i, u_j> = | 1/n sum_i u_i |^2

    The right side needs O(n d) work. With `absolute`, 1/n^2 sum_ij |<u_i, u_j>| has no such form: O(n^2 d).

    Args: x [..., n, d].  Returns: scalar; in [0, 1].
    Source: [C22], within-layer embedding and attention terms (signed).
    """
    u = unit(x)  # [..., n, d]
    if absolute:
        return (u @ u.mT).abs().mean()
    return u.mean(dim=-2).square().sum(dim=-1).mean()  # [..., d] -> []


def cosine_cross(x: Tensor, y: Tensor, *, absolute: bool = False) -> Tensor:
    r"""Mean cosine similarity between the items of one layer and those of another.

        R = 1/n^2 sum_ij <u_i, v_j> = < 1/n sum_i u_i, 1/n sum_j v_j >

    u from the first, v from the second layer. O(n d); with `absolute` 1/n^2 sum_ij |<u_i, v_j>|: O(n^2 d).

    Args: x, y [..., n, d].  Returns: scalar; in [-1, 1], with `absolute` in [0, 1].
    Source: [C22], across-layer terms.
    """
    u, v = unit(x), unit(y)  # [..., n, d]
    if absolute:
        return (u @ v.mT).abs().mean()
    return (u.mean(dim=-2) * v.mean(dim=-2)).sum(dim=-1).mean()  # [..., d] -> []


def pairwise_cosine(x: Tensor) -> Tensor:
    r"""Mean absolute cosine similarity over pairs of different items: the papers' form, to report with.

        R = 1/(n (n - 1)) sum_{i != j} |<u_i, u_j>|          (0 if n = 1)

    Args: x [..., n, d].  Returns: scalar; in [0, 1].  O(n^2 d).
    Source: [C22] and [G21], similarity of patch embeddings and of heads.
    """
    u = unit(x)  # [..., n, d]
    n = u.shape[-2]
    others = (u @ u.mT).abs().sum(dim=(-2, -1)) - u.square().sum(dim=(-2, -1))  # [...]
    return others.mean() / max(n * (n - 1), 1)


def contrastive(x: Tensor, y: Tensor) -> Tensor:
    r"""Each item of the last layer should resemble its own first-layer item more than the others.

        R = -1/n sum_i log( e^{s_ii} / (e^{s_ii} + e^{m_i}) ) = 1/n sum_i softplus(m_i - s_ii)
        s_ij = <u_i, v_j>,   m_i = 1/(n - 1) sum_{j != i} s_ij

    No temperature, and the first layer is not detached. O(n d): m_i comes from <u_i, sum_j v_j>. With n = 1
    there is nothing to contrast with, and R = 0.

    Args: x, y [..., n, d], first and last layer.
    Returns: scalar; for n > 1 in [log(1 + e^-2), log(1 + e^2)].
    Source: [C22], after [G21] (which differs: raw dot products, detached target).
    """
    u, v = unit(x), unit(y)  # [..., n, d]
    n = u.shape[-2]
    own = (u * v).sum(dim=-1)  # [..., n]
    if n == 1:
        return 0 * own.mean()
    all_items = (u @ v.sum(dim=-2, keepdim=True).mT).squeeze(-1)  # [..., n]
    return F.softplus((all_items - own) / (n - 1) - own).mean()


# ------------------------------------------------------------------------------------------------------------
# Uniformity on the sphere


def _twice_normalised(x: Tensor) -> Tensor:
    """x / sqrt(|x|^2 + 1e-8), applied twice as the reference does.  [..., n, d] -> [..., n, d]"""
    for _ in range(2):
        x = x / (x.square().sum(dim=-1, keepdim=True) + EPS).sqrt()
    return x


def mhs(x: Tensor) -> Tensor:
    r"""Maximum hyperspherical separation: push the two nearest items apart.

        R = - min { 2 - 2 <u_i, u_j> : i > j, not 0 },   summed over the pairs that attain it

    u_i = x_i / sqrt(|x_i|^2 + 1e-8), twice. Without a pair at non-zero distance, R = 0.

    Args: x [..., n, d].  Returns: scalar; about [-4, 0].  O(n^2 d).
    Source: [C22], MHS.
    """
    u = _twice_normalised(full_precision(x))  # [..., n, d]
    distance = 2 - 2 * (u @ u.mT)  # [..., n, n], squared
    pair = torch.ones_like(distance, dtype=torch.bool).tril(-1) & (distance > 0)
    nearest = distance.masked_fill(~pair, torch.inf).amin(dim=(-2, -1), keepdim=True)  # [..., 1, 1]
    return -distance.where(pair & (distance == nearest), 0.0).sum(dim=(-2, -1)).mean()


def mgd(x: Tensor) -> Tensor:
    r"""Minimum Gram determinant: maximise the volume that a Gaussian kernel of the items spans.

        R = - log det( exp(-(2 - 2 U U^T)) + 1e-6 I )

    u_i = x_i / sqrt(|x_i|^2 + 1e-8), twice. Computed in float64 whatever the input: nearly equal items make the
    kernel's small eigenvalues fall below float32's rounding of its entries (on MPS, which has no float64, on
    the CPU).

    Args: x [..., n, d].
    Returns: scalar, in the input's precision (at least float32); R >= -n log(1 + 1e-6).  O(n^2 d + n^3).
    Source: [C22], MGD.
    """
    wide = x.cpu() if x.device.type == "mps" else x
    u = _twice_normalised(wide.double())  # [..., n, d]
    kernel = torch.exp(-(2 - 2 * (u @ u.mT)))  # [..., n, n]
    jitter = 1e-6 * torch.eye(kernel.shape[-1], dtype=kernel.dtype, device=kernel.device)
    return -torch.logdet(kernel + jitter).mean().to(full_precision(x[..., :0, :0]).dtype).to(x.device)


# ------------------------------------------------------------------------------------------------------------
# Orthogonality


def so(x: Tensor, *, normalize: bool = False) -> Tensor:
    r"""Soft orthogonality: the Gram matrix should be the identity.

        R = || X X^T - I ||_F^2

    Args: x [..., n, d]; `normalize` replaces x_i by u_i first (the patch level's default).
    Returns: scalar, >= 0.  O(n^2 d).
    Source: [C22], SO.
    """
    x = unit(x) if normalize else full_precision(x)
    gram = x @ x.mT  # [..., n, n]
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return (gram - identity).square().sum(dim=(-2, -1)).mean()


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
    start side by side, and (G y . y) is |X^T y|^2, so four products with X are enough. The probes p and p' are
    random (`draw_probes`); gradients flow through all products.

    Args: x [..., n, d]; `normalize` replaces x_i by u_i first (the patch level's default); `distribution` and
        `eps` follow the reference: uniform probes and eps = 0 for weights, normal and 1e-6 elsewhere.
    Returns: scalar, >= 0.
    Source: [C22], CNO.
    """
    x = unit(x) if normalize else full_precision(x)
    x = x.mT if inverse else x
    first, second = draw_probes(x, distribution)  # each [..., n, 1]
    products = x @ (x.mT @ torch.cat([first, second], dim=-1))  # [..., n, 2], G p and G p'

    def quotient(numerator: Tensor, squared_norm: Tensor) -> Tensor:
        return numerator / (squared_norm + eps).clamp_min(torch.finfo(x.dtype).tiny)

    y = products[..., :1]  # [..., n, 1]
    largest = quotient(_squared_norm(x.mT @ y), _squared_norm(y))  # [..., 1, 1]
    u = products[..., 1:] - largest * second  # [..., n, 1], (G - lambda_max I) p'
    difference = quotient(_squared_norm(x.mT @ u) - largest * _squared_norm(u), _squared_norm(u))  # min - max
    return difference.square().mean()


def _squared_norm(v: Tensor) -> Tensor:
    """[..., n, 1] -> [..., 1, 1]"""
    return v.square().sum(dim=(-2, -1), keepdim=True)


# ------------------------------------------------------------------------------------------------------------
# Gradients


def gradient_diversity(g: Tensor) -> Tensor:
    r"""Diversity of the items' gradients: large when they point in different directions.

        R = - sum_i |g_i|^2 / | sum_i g_i |^2

    g_i is the gradient of the label loss at item i, so training on R needs a double backward. R does not
    change when the loss is scaled. Without any gradient R = 0.

    Args: g [..., n, d].  Returns: scalar, <= -1/n, unbounded where the gradients cancel.  O(n d).
    Source: [C22], gradient diversity.
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
