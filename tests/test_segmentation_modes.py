"""Segmentation with recomputed activations, and compiled: the same losses, gradients, weights and scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from segmenters import CLASSES, images, segmenter
from small_runs import saved
from torch import Tensor

from engine import Precision
from losses import Objective
from models import DiverseViT, Needs
from regularizers import Diversity, parse_spec, total
from segmentation.command import main
from segmentation.inference import Predictor
from segmentation.objective import PixelLoss
from segmentation.task import evaluate

FAMILIES = ["deit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "eva02_tiny_patch14_224"]
TERMS = ["patch.cosine@all=0.1", "attn.cosine@all=0.1", "weight.so@all=1e-3"]
RUN = ["--data-set", "DIGITS", "--model", "deit_tiny_patch16_224", "--crop-size", "32", "--device", "cpu"]
RUN += ["--model-kwargs", "patch_size=8", "embed_dim=24", "depth=4", "num_heads=3", "--drop-path", "0.2"]
RUN += ["--channels", "8", "--auxiliary-channels", "4", "--batch-size", "2", "--lr", "1e-2", "--num_workers", "0"]
RUN += ["--iterations", "3", "--eval-interval", "3", "--warmup-iterations", "1", "--no-model-ema"]
RUN += ["--reg", "patch.cosine=0.1", "--reg", "attn.cosine=0.1"]
RUN += ["--opt", "sgd"]  # AdamW would take the rounding of a gradient near 0 for a direction


def losses_and_gradients(name: str, checkpointing: bool) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    """Of a training step with diversity terms; and how often blocks were run."""
    network, runs = segmenter(name), []
    if checkpointing:
        network.set_grad_checkpointing()
    backbone = network.backbone
    blocks = (
        backbone.blocks if hasattr(backbone, "blocks") else [b for stage in backbone.layers for b in stage.blocks]
    )
    for block in blocks:
        block.register_forward_pre_hook(lambda module, args: runs.append(module))
    diversity = Diversity([parse_spec(term) for term in TERMS], depth=len(blocks))
    model, objective = DiverseViT(network, Needs(**diversity.needs)).train(), Objective(PixelLoss(), diversity)
    masks = torch.randint(CLASSES, (2, 61, 64), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(3)  # dropout of the heads
    terms = objective(model(images(61, 64)), masks) | objective.of_weights(model.weights)
    total(terms).backward()
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    return {name: term.value for name, term in terms.items()}, gradients, len(runs) // len(blocks)


@pytest.mark.parametrize("name", FAMILIES)
def test_recomputed_blocks_change_nothing(name: str) -> None:
    losses, gradients, once = losses_and_gradients(name, checkpointing=False)
    again, same_gradients, twice = losses_and_gradients(name, checkpointing=True)
    assert (once, twice) == (1, 2)
    assert {"ce", "auxiliary"} < losses.keys() and len(losses) == 2 + len(TERMS)
    torch.testing.assert_close(again, losses, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(same_gradients, gradients, rtol=1e-8, atol=1e-10)


def result(folder: Path, *flags: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The log's last line, and the weights, of a run."""
    assert main([*RUN, *flags, "--output_dir", str(folder)]) == 0
    return json.loads((folder / "log.txt").read_text().splitlines()[-1]), saved(folder)["model"]


# torch's compiler meets this warning of its own, hides it when it would be shown, but not where it is an error
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_runs_end_with_the_same_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three steps with terms, dropout and drop path: compiled, and also recomputed."""
    torch._dynamo.reset()
    log, weights = result(tmp_path / "plain")
    compiled = ["--torchcompile", "aot_eager"]
    for number, flags in enumerate((compiled, [*compiled, "--grad_checkpointing"])):
        other, others = result(tmp_path / str(number), *flags)
        for name in ("train_ce", "train_auxiliary", "train_patch.cosine@last", "train_attn.cosine@0"):
            assert other[name] == pytest.approx(log[name], rel=1e-5)
        assert other["test_miou"] == pytest.approx(log["test_miou"], abs=0.01)  # of 100
        torch.testing.assert_close(others, weights, rtol=1e-5, atol=1e-6)
        assert "compiled with aot_eager in " in capsys.readouterr().out
    torch._dynamo.reset()


def test_images_of_many_sizes_are_evaluated_by_a_compiled_network() -> None:
    """More sizes than torch compiles graphs of one function."""
    precision, sizes = Precision(torch.device("cpu"), "float32"), [(9 + 11 * n, 80 - 7 * n) for n in range(10)]
    pairs = [(images(*size, batch=1), torch.randint(CLASSES, (1, *size))) for size in sizes]
    names, found = [str(number) for number in range(CLASSES)], []
    for backend in (None, "aot_eager"):
        model = DiverseViT(segmenter(), Needs())
        if backend:
            model.compile(backend=backend, fullgraph=True)
        (scores,) = evaluate([model], pairs, precision, Predictor(), names)
        found.append(scores)
    assert found[0].mean_iou == found[1].mean_iou > 0


def test_backbones_that_cannot_recompute_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", "twins_svt_small", "--crop-size", "64", "--data-set", "DIGITS", "--grad_checkpointing"]
    assert main([*flags, "--device", "cpu"]) == 2
    assert "Twins has no gradient checkpointing: drop --grad-checkpointing" in capsys.readouterr().err


def test_unknown_backends_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*RUN, "--torchcompile", "aot_eger"]) == 2
    assert "unknown --torchcompile backend 'aot_eger'. Did you mean aot_eager" in capsys.readouterr().err
