"""What a step of segmentation changes: rates by layer, accumulated gradients, the average, frozen backbones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_runs import assert_same, saved
from small_segmentations import log_of, make_pairs, segment
from torch import Tensor

# One step of plain gradient descent, in which nothing is random but the crops
ONE_STEP = ["--iterations", "1", "--eval-interval", "1", "--warmup-iterations", "0", "--opt", "momentum"]
ONE_STEP += ["--momentum", "0", "--weight-decay", "0", "--lr", "0.1", "--drop-path", "0", "--head-drop", "0"]
PARAMETERS = ("weight", "bias", "cls_token", "pos_embed")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pairs(tmp_path_factory.mktemp("pairs"))


def weights(images: Path, output: Path, *flags: str) -> dict[str, Tensor]:
    """The parameters after a run."""
    assert segment(images, output, *flags) == 0
    return parameters(saved(output)["model"])


def parameters(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.double() for name, value in state.items() if name.endswith(PARAMETERS)}


def moves(images: Path, folder: Path, *flags: str) -> dict[str, Tensor]:
    """What one step adds to each parameter."""
    before = weights(images, folder / "before", *ONE_STEP, *flags, "--lr", "0")
    after = weights(images, folder / "after", *ONE_STEP, *flags)
    return {name: after[name] - before[name] for name in after}


def test_rates_fall_towards_the_first_layer(images: Path, tmp_path: Path) -> None:
    """Layer k of L has decay^(L - k) of the rate: patches 0, block i is i + 1, heads L."""
    plain, decayed = moves(images, tmp_path / "1"), moves(images, tmp_path / "2", "--layer-decay", "0.5")
    depth = 4
    seen = set()
    for name, move in plain.items():
        parts = name.split(".")
        if name.startswith("backbone.blocks."):
            layer = int(parts[2]) + 1
        elif name.startswith("backbone.norm"):
            continue  # no map goes through it
        else:
            layer = 0 if name.startswith("backbone.") else depth + 1
        seen.add(layer)
        scale = 0.5 ** (depth + 1 - layer)
        torch.testing.assert_close(decayed[name], scale * move, rtol=1e-3, atol=1e-7)
        assert move.abs().max() > 0, name
    assert seen == set(range(depth + 2))


def test_accumulated_gradients_are_averaged(tmp_path: Path) -> None:
    """All crops are one image, so that three batches have the gradient, and the batch statistics, of one."""
    images = make_pairs(tmp_path / "pairs", train=1, val=1)
    same = ["--crop-size", "17", "26", "--resize", "0", "--scale-range", "1", "1"]
    same += ["--flip-prob", "0", "--no-distort"]
    once, thrice = (
        moves(images, tmp_path / times, *same, "--batch-size", "2", "--grad-accum-steps", times)
        for times in ("1", "3")
    )
    for name, move in once.items():
        torch.testing.assert_close(thrice[name], move, rtol=1e-3, atol=1e-7)
    assert log_of(tmp_path / "3" / "after")[0]["train_ce"] == pytest.approx(
        log_of(tmp_path / "1" / "after")[0]["train_ce"], rel=1e-5
    )


def test_the_average(images: Path, tmp_path: Path) -> None:
    """After each step average = d average + (1 - d) weights."""
    flags = ["--iterations", "2", "--eval-interval", "1", "--model-ema-decay", "0.75"]
    now = weights(images, tmp_path, *flags)
    before, after = (parameters(saved(tmp_path, f"checkpoint{n}.pth")["model_ema"]) for n in (".1", ""))
    for name, weight in now.items():
        torch.testing.assert_close(after[name], 0.75 * before[name] + 0.25 * weight, rtol=1e-5, atol=1e-7)
    assert any(not torch.equal(after[name], weight) for name, weight in now.items())
    assert log_of(tmp_path)[-1].keys() >= {"ema_test_miou", "ema_test_pixel_acc"}


def test_a_frozen_backbone_stays(images: Path, tmp_path: Path) -> None:
    """DINOv2's protocol: a linear head learns, and the backbone neither learns nor drops paths."""
    frozen = ["--frozen", "--head", "linear", "--iterations", "3", "--lr", "0.1"]
    first = weights(images, tmp_path / "0", *frozen, "--lr", "0")
    state = weights(images, tmp_path / "1", *frozen)
    assert weights(images, tmp_path / "2", *frozen, "--drop-path", "0.9").keys() == state.keys()
    assert_same(saved(tmp_path / "2")["model"], saved(tmp_path / "1")["model"])
    for name, weight in state.items():
        assert torch.equal(weight, first[name]) == name.startswith("backbone."), name
    assert not any(name.startswith("auxiliary_head") for name in state)
