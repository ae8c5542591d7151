"""The files peer_*.npz of tests/golden: how a remedy is put into a model of their size, and compared with them.

tests/test_golden.py does so. Shapes and options are read from the files.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

GOLDEN = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parent / "golden"))
RTOL = 1e-9
# What the files call the methods' own parameters -> what they are called here, below the module they belong to.
OWN = {
    "attnscale": {"lamb": "remedies.attnscale.lamb"},
    "gfsa": {"lamb": "remedies.gfsa.lamb"},
    "featscale": {"lamb1": "attn.remedies.featscale.lamb1", "lamb2": "attn.remedies.featscale.lamb2"},
    "reattention": {
        "reatten_matrix": "remedies.reattention.reatten_matrix",
        "var_norm": "remedies.reattention.var_norm",
    },
    "contranorm": {"layernorm.": "", "scale_param": "remedies.contranorm.scale_param"},
    "neutreno": {},
}


def assert_close(actual: Tensor, expected: np.ndarray, what: str, scale: float = 0.0) -> None:
    """Equal to rtol 1e-9; numbers that cancel to nearly zero, to 1e-12 of the largest, which `scale` may say."""
    atol = 1e-12 * max(float(np.abs(expected).max(initial=0.0)), scale)
    np.testing.assert_allclose(actual.detach().numpy(), expected, rtol=RTOL, atol=atol, err_msg=what)


class Case:
    """One case of a file."""

    def __init__(self, golden: Any, name: str) -> None:
        self.values = {k.partition("/")[2]: golden[k] for k in golden.files if k.startswith(f"{name}/")}

    def of(self, prefix: str) -> dict[str, np.ndarray]:
        return {k.removeprefix(prefix): v for k, v in self.values.items() if k.startswith(prefix)}

    def option(self, name: str) -> Any:
        return self.values[name].item()


def cases(method: str) -> Iterator[Case]:
    with np.load(GOLDEN / f"peer_{method}.npz") as golden:
        names = sorted({key.partition("/")[0] for key in golden.files})
        assert names
        for name in names:
            yield Case(golden, name)


def stock(case: Case, blocks: int = 1) -> Any:
    """timm's ViT with blocks of the recorded size."""
    parameters = case.of("param/")
    width = case.values["x"].shape[-1]
    hidden = next((v.shape[0] for k, v in parameters.items() if k.endswith("mlp.fc1.weight")), width)
    return VisionTransformer(
        img_size=16,
        patch_size=8,
        embed_dim=width,
        depth=blocks,
        num_heads=int(case.values.get("heads", 1)),
        mlp_ratio=(hidden + 0.5) / width,  # timm rounds down
        qkv_bias=any(name.endswith("qkv.bias") for name in parameters) or "heads" not in case.values,
        num_classes=2,
    )


def here(method: str, name: str) -> str:
    """A recorded parameter's name in this project."""
    for theirs, ours in OWN[method].items():
        if name == theirs or name.startswith(theirs if theirs.endswith(".") else f"{theirs}."):
            return ours + name.removeprefix(theirs)
    return name


def check(method: str, case: Case, module: Any, forward: Callable[[Tensor], Tensor]) -> None:
    """Load the recorded parameters; compare the output and all gradients."""
    recorded = {here(method, name): value for name, value in case.of("param/").items()}
    parameters = dict(module.named_parameters())
    assert set(recorded) <= set(parameters)
    with torch.no_grad():
        for name, value in recorded.items():
            parameters[name].copy_(torch.tensor(value))
    x = torch.tensor(case.values["x"], requires_grad=True)
    y = forward(x)
    loss = (torch.arange(y.numel()).cos() * y.flatten()).sum()
    assert_close(y, case.values["y"], f"{method}: output")
    assert_close(loss, case.values["loss"], f"{method}: loss")
    gradients = {here(method, name): value for name, value in case.of("grad/").items()}
    assert set(gradients) == set(recorded)
    found = torch.autograd.grad(loss, [x, *(parameters[name] for name in gradients)])
    largest = max(float(np.abs(value).max()) for value in gradients.values())
    assert_close(found[0], case.values["grad_x"], f"{method}: gradient of the input")
    for gradient, (name, value) in zip(found[1:], gradients.items(), strict=True):
        assert_close(gradient, value, f"{method}: gradient of {name}", scale=largest)
