"""UperNet's step and the metrics against numbers computed by the reference, in float64 at rtol 1e-9.

The files lie in tests/golden, or in the folder that the environment variable GOLDEN_DIR names.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from segmentation.heads import FCNHead, UperHead, pixel_cross_entropy, resize
from segmentation.scores import Confusion

GOLDEN = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parent / "golden"))
RTOL = 1e-9
HEADS = ("decode_head", "auxiliary_head")
WEIGHTS = {"decode_head": 1.0, "auxiliary_head": 0.4}


@pytest.fixture(autouse=True)
def double_precision() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "upernet_step.npz") as file:
        return dict(file)


def heads(golden: dict[str, np.ndarray]) -> nn.ModuleDict:
    """Both heads with the file's parameters, without dropout; the names must be the file's."""
    *widths, channels, auxiliary_channels, classes, _, _ = golden["cfg"].tolist()
    built = nn.ModuleDict(
        {
            "decode_head": UperHead(widths, classes, channels, dropout=0.0),
            "auxiliary_head": FCNHead(widths[2], classes, auxiliary_channels, dropout=0.0),
        }
    )
    given = {key.removeprefix("param/"): value for key, value in golden.items() if key.startswith("param/")}
    shared = {name: torch.as_tensor(value) for name, value in given.items()}
    for name in (name for name in built.state_dict() if name.endswith("num_batches_tracked")):
        shared.setdefault(name, torch.tensor(0))  # the file has them of one head
    built.load_state_dict(shared, strict=True)
    return built


def features(golden: dict[str, np.ndarray]) -> list[Tensor]:
    return [torch.from_numpy(golden[f"feature{i}"]).requires_grad_() for i in range(4)]


def assert_close(actual: Tensor | None, expected: np.ndarray, what: str) -> None:
    """Equal to rtol 1e-9; numbers that cancel to nearly zero, to 1e-12 of the largest."""
    assert actual is not None, what
    atol = 1e-12 * float(np.abs(expected).max())
    np.testing.assert_allclose(actual.detach().numpy(), expected, rtol=RTOL, atol=atol, err_msg=what)


def test_a_step_of_upernet(golden: dict[str, np.ndarray]) -> None:
    model, maps = heads(golden).train(), features(golden)
    masks = torch.from_numpy(golden["label"])
    losses = {name: WEIGHTS[name] * pixel_cross_entropy(model[name](maps), masks) for name in HEADS}
    sum(losses.values()).backward()
    assert_close(losses["decode_head"], golden["loss_decode"], "loss_decode")
    assert_close(losses["auxiliary_head"], golden["loss_auxiliary"], "loss_auxiliary")
    for i, feature in enumerate(maps):
        assert_close(feature.grad, golden[f"grad_feature{i}"], f"feature {i}")
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, golden[f"grad/{name}"], name)
    statistics = {name: value for name, value in model.state_dict().items() if "running_" in name}
    assert {f"after/{name}" for name in statistics} == {key for key in golden if key.startswith("after/")}
    for name, value in statistics.items():
        assert_close(value, golden[f"after/{name}"], name)


def test_evaluation_of_upernet(golden: dict[str, np.ndarray]) -> None:
    logits = heads(golden).eval()["decode_head"](features(golden))
    assert_close(logits, golden["eval_logits"], "logits")
    assert_close(resize(logits, golden["label"].shape[1:]), golden["eval_upsampled"], "upsampled logits")


def test_metrics() -> None:
    with np.load(GOLDEN / "segmentation_metrics.npz") as file:
        golden = dict(file)
    scores = Confusion([str(number) for number in range(int(golden["classes"]))])
    for i in range(sum(key.startswith("pred") for key in golden)):
        scores.add(torch.from_numpy(golden[f"pred{i}"]), torch.from_numpy(golden[f"label{i}"]))
    found = scores.result()
    np.testing.assert_allclose(found.iou, golden["iou"], rtol=RTOL)
    np.testing.assert_allclose(found.accuracy, golden["accuracy"], rtol=RTOL)
    assert found.mean_iou == pytest.approx(float(golden["miou"]), rel=RTOL)
    assert found.mean_accuracy == pytest.approx(float(golden["macc"]), rel=RTOL)
    assert found.all_accuracy == pytest.approx(float(golden["all_accuracy"]), rel=RTOL)
