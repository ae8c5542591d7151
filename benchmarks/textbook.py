"""The equations as they stand, in plain torch: what the measures and losses would be without any thought on cost.

n x n matrices of all pairs, Gram matrices, one-hot labels, loops over weight matrices and over patches. A measure
needs no form here; the benchmarks then leave it out.

Shapes: x, y [B, n, d] -> [].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mixing.mixup import Labels

Form = Callable[..., Tensor]


def full(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def units(x: Tensor) -> Tensor:
    return full(x) / full(x).norm(dim=-1, keepdim=True).clamp_min(1e-8)


def cosine_cross(x: Tensor, y: Tensor, absolute: bool = False) -> Tensor:
    similarity = units(x) @ units(y).mT  # [B, n, n]
    return similarity.abs().mean() if absolute else similarity.mean()


def cosine(x: Tensor, absolute: bool = False) -> Tensor:
    return cosine_cross(x, x, absolute)


def pairwise_cosine(x: Tensor) -> Tensor:
    similarity = (units(x) @ units(x).mT).abs()  # [B, n, n]
    n = similarity.shape[-1]
    different = 1 - torch.eye(n, device=x.device)
    return (similarity * different).sum(dim=(-2, -1)).mean() / (n * (n - 1))


def contrastive(x: Tensor, y: Tensor, tau: float = 1.0) -> Tensor:
    similarity = units(x) @ units(y).mT / tau  # [B, n, n]
    own = similarity.diagonal(dim1=-2, dim2=-1)
    others = (similarity.sum(dim=-1) - own) / (similarity.shape[-1] - 1)
    return -(own.exp() / (own.exp() + others.exp())).log().mean()


def twice_normalised(x: Tensor) -> Tensor:
    for _ in range(2):
        x = x / (x.square().sum(dim=-1, keepdim=True) + 1e-8).sqrt()
    return x


def mhs(x: Tensor) -> Tensor:
    u = twice_normalised(full(x))
    distance = 2 - 2 * u @ u.mT  # [B, n, n]
    lower = torch.ones_like(distance).tril(-1)
    masked = torch.where((lower > 0) & (distance > 0), distance, torch.inf)
    nearest = masked.amin(dim=(-2, -1), keepdim=True)
    return -(distance * (masked == nearest)).sum(dim=(-2, -1)).mean()


def mgd(x: Tensor) -> Tensor:
    u = twice_normalised((x.cpu() if x.device.type == "mps" else x).double())
    kernel = (2 * u @ u.mT - 2).exp()  # [B, n, n]
    jitter = 1e-6 * torch.eye(kernel.shape[-1], dtype=u.dtype, device=u.device)
    return -torch.logdet(kernel + jitter).mean().float().to(x.device)


def so(x: Tensor, normalize: bool = False) -> Tensor:
    x = units(x) if normalize else full(x)
    gram = x @ x.mT  # [B, n, n]
    return (gram - torch.eye(gram.shape[-1], device=x.device)).square().sum(dim=(-2, -1)).mean()


def dominant(matrix: Tensor, probe: Tensor, eps: float) -> Tensor:
    y = matrix @ probe  # [..., n, 1]
    return (matrix @ y * y).sum(dim=(-2, -1), keepdim=True) / ((y * y).sum(dim=(-2, -1), keepdim=True) + eps)


def spread(gram: Tensor, first: Tensor, second: Tensor, eps: float) -> Tensor:
    """(lambda_max - lambda_min)^2 of Gram matrices [..., n, n], from probes [..., n, 1]."""
    largest = dominant(gram, first, eps)
    identity = torch.eye(gram.shape[-1], device=gram.device)
    smallest = largest + dominant(gram - largest * identity, second, eps)
    return (largest - smallest).square().mean()


def cno(
    x: Tensor, normalize: bool = False, inverse: bool = False, distribution: str = "normal", eps: float = 1e-6
) -> Tensor:
    """Patches and heads as a batch; weights, whose probes are uniform, matrix by matrix."""
    x = units(x) if normalize else full(x)
    x = x.mT if inverse else x
    if distribution == "normal":
        first, second = (torch.randn(*x.shape[:-1], 1, device=x.device) for _ in range(2))
        return spread(x @ x.mT, first, second, eps)
    values = []
    for matrix in x:
        first, second = (torch.rand(len(matrix), 1, device=x.device) for _ in range(2))
        values.append(spread(matrix @ matrix.mT, first, second, eps))
    return torch.stack(values).mean()


def gradient_diversity(g: Tensor) -> Tensor:
    gram = full(g) @ full(g).mT  # [B, n, n]
    return -(gram.diagonal(dim1=-2, dim2=-1).sum(dim=-1) / gram.sum(dim=(-2, -1))).mean()


def dense_mixing(patch_logits: Tensor, labels: Labels) -> Tensor:
    classes = patch_logits.shape[-1]

    def smoothed(label: Tensor) -> Tensor:
        one_hot = F.one_hot(label, classes).float()[:, None]  # [B, 1, K]
        return (1 - labels.smoothing) * one_hot + labels.smoothing / classes

    weight = labels.patch_weight[..., None]  # [B, P, 1]
    target = weight * smoothed(labels.own) + (1 - weight) * smoothed(labels.partner)  # [B, P, K]
    return -(target * full(patch_logits).log_softmax(dim=-1)).sum(dim=-1).mean()


def mixing(patch_logits: Tensor, labels: Labels) -> Tensor:
    """Patch by patch."""
    patches = [
        (patch_logits[:, [p]], labels._replace(patch_weight=labels.patch_weight[:, [p]]))
        for p in range(patch_logits.shape[1])
    ]
    return torch.stack([dense_mixing(*patch) for patch in patches]).mean()


TEXTBOOK: dict[str, Form] = {
    form.__name__: form
    for form in (cosine, cosine_cross, pairwise_cosine, contrastive, mhs, mgd, so, cno, gradient_diversity, mixing)
}
