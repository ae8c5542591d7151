"""ContraNorm's gradient, which is written by hand, against that of the equation; and its two forms."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

from models import build_model
from models.remedies import install_remedies
from models.remedies.contranorm import ContraNorm

SPECS = [
    {},
    {"scale": 0.7, "tau": 0.4},
    {"dual": True, "tau": 2.0},
    {"identity": True},
    {"learnable": True, "dual": True},
    {"learnable": True, "identity": True, "positive": True},
]
each_spec = pytest.mark.parametrize("options", SPECS, ids=str)


def naive(x: Tensor, remedy: ContraNorm) -> Tensor:
    """x' token by token."""
    outputs = []
    for image in x:
        u = [token / max(token.norm(), torch.tensor(1e-12)) for token in image]
        scores = torch.stack([torch.stack([(a * b).sum() / remedy.tau for b in u]) for a in u])  # [N, N]
        weights = torch.softmax(scores, dim=1)
        if remedy.dual:
            weights = weights + torch.softmax(scores, dim=0)
        mean = torch.stack([sum(w * token for w, token in zip(row, image, strict=True)) for row in weights])
        scale = remedy.scale if remedy.scale_param is None else remedy.scale_param
        scale = scale.exp() if remedy.positive else scale
        own = image
        if remedy.identity:
            own = (1 + scale) * image if remedy.scale_param is None else scale * image
        outputs.append(own - scale * mean)
    return torch.stack(outputs)


def tokens(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


@each_spec
@pytest.mark.parametrize("shape", [(2, 4, 6), (2, 6, 4)], ids=["fewer tokens", "more tokens"])
def test_both_forms_are_the_equation(options: dict, shape: tuple[int, ...]) -> None:
    x, remedy = tokens(*shape), ContraNorm(shape[-1], **options).double()
    wanted = [x, *remedy.parameters()]
    weights = torch.arange(x.numel(), dtype=torch.float64).cos().view(shape)
    found, expected = remedy(x), naive(x, remedy)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad((y * weights).sum(), wanted) for y in (found, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@each_spec
def test_the_gradient_is_differentiated_itself(options: dict) -> None:
    remedy = ContraNorm(5, **options).double()
    assert torch.autograd.gradcheck(remedy, tokens(2, 3, 5))
    assert torch.autograd.gradgradcheck(remedy, tokens(2, 3, 5))


def test_a_token_of_zeros_has_a_finite_gradient() -> None:
    """As by torch's normalize: u is proportional to x below the smallest length."""
    remedy, x = ContraNorm(5), tokens(1, 3, 5).detach().float()
    x[0, 1] = 0
    x.requires_grad_()
    (found,) = torch.autograd.grad(remedy(x).square().sum(), x)
    u = nn.functional.normalize(x, dim=-1)
    written = x - 0.1 * (u @ u.mT).softmax(dim=-1) @ x
    (expected,) = torch.autograd.grad(written.square().sum(), x)
    assert found.isfinite().all()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dual", [False, True])
def test_tokens_keep_their_precision_under_autocast(dtype: torch.dtype, dual: bool) -> None:
    """Products are in half precision, the sum is not."""
    remedy, x = ContraNorm(24, scale=1e-4, dual=dual), tokens(2, 7, 24).detach().float().requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        y = remedy(x)
    (found,) = torch.autograd.grad(y.square().sum(), x)
    (expected,) = torch.autograd.grad(remedy(x).square().sum(), x)
    assert y.dtype == found.dtype == torch.float32
    torch.testing.assert_close(y, remedy(x), rtol=0, atol=1e-5)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("spec", ["contranorm", "contranorm:dual", "contranorm:learnable,identity"])
def test_compiled_and_exported(spec: str) -> None:
    """A model of fewer tokens than channels, whose matrix is formed."""
    backbone = build_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=24, num_heads=2, num_classes=3)
    install_remedies(backbone, [spec])
    compiled = copy.deepcopy(backbone)
    compiled.compile(backend="aot_eager", fullgraph=True)
    images = torch.randn(2, 3, 32, 32)
    for model in (backbone, compiled):
        model(images).square().sum().backward()
    for ours, theirs in itertools.zip_longest(backbone.parameters(), compiled.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad)
    backbone.eval()
    program = torch.export.export(backbone, (images,), dynamic_shapes=({0: torch.export.Dim("B")},)).module()
    more = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(program(more), backbone(more))
