"""Compiled models: one graph, no recompilation between steps, the eager model's numbers."""

from __future__ import annotations

import argparse
import copy

import pytest
import torch
import torch._dynamo as dynamo
from families import FAMILIES, build

from build import compile_model, use_grad_checkpointing
from models import DiverseViT, find_layout
from regularizers import Diversity, parse_spec, total
from utils import UserError

SPECS = ("patch.cosine@first,all=0.5", "weight.so:v=1e-3")
STEPS = 3
ONE_GRAPH = [
    *("vit", "vit_map", "vit_parallel_things", "deit", "deit_distilled", "deit3", "beit", "eva", "eva02"),
    *("eva02_base", "dinov2_reg", "dinov3", "siglip", "relpos", "naflex", "cait", "xcit", "tnt", "deepseek"),
    *("swin", "swinv2", "pvt_v2", "twins_svt", "volo", "hiera", "mvitv2"),
]


@pytest.fixture(autouse=True)
def fresh_compiler():
    dynamo.reset()
    dynamo.utils.counters.clear()
    yield
    dynamo.reset()


def step(model: DiverseViT, diversity: Diversity, images: torch.Tensor) -> tuple[float, list[torch.Tensor | None]]:
    """Value and gradients of all terms and some function of the logits."""
    torch.manual_seed(2)  # drop path
    model.train().zero_grad()
    captured = model(images)
    loss = captured.logits.square().mean() + total(diversity(captured, model.weights))
    if captured.patch_logits is not None:
        loss = loss + captured.patch_logits.logsumexp(dim=-1).mean()
    loss.backward()
    return loss.item(), [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def compare(name: str, backend: str = "aot_eager", checkpointing: bool = False) -> int:
    """Train three steps eagerly and compiled; how many graphs were compiled."""
    family = FAMILIES[name]
    specs = [*SPECS, "attn.cosine@all=0.1"] if family.attends else [*SPECS]
    specs += ["patch.mixing=1"] if family.classifies else []
    backbone = build(name)
    diversity = Diversity([parse_spec(spec) for spec in specs], find_layout(backbone).depth)
    eager = DiverseViT(backbone, diversity.needs)
    compiled = copy.deepcopy(eager)
    if checkpointing:
        use_grad_checkpointing(compiled.backbone)
    compile_model(argparse.Namespace(torchcompile=backend), compiled, diversity)
    assert list(compiled.state_dict()) == list(eager.state_dict())
    images = family.images()
    expected_loss, expected = step(eager, diversity, images)
    for _ in range(STEPS):
        loss, gradients = step(compiled, diversity, images)
        assert loss == pytest.approx(expected_loss, rel=1e-12)
        for ours, theirs in zip(gradients, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    assert not compiled._sink
    return dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("name", ONE_GRAPH)
def test_one_graph_for_all_steps(name):
    assert compare(name) == 1


def test_a_cache_filled_in_the_first_step_costs_a_second_graph():
    """ConViT computes its relative positions when it sees the first images, and keeps them."""
    assert compare("convit") == 2


@pytest.mark.parametrize("name", ["deit", "swin"])
def test_with_gradient_checkpointing(name):
    assert compare(name, checkpointing=True) == 1


def test_gradient_checkpointing_that_the_model_lacks_is_refused():
    with pytest.raises(UserError, match="ConVit has no gradient checkpointing: drop --grad-checkpointing"):
        use_grad_checkpointing(build("convit"))


def test_what_cannot_be_compiled_is_refused():
    backbone = build("deit")
    for backend, spec, message in [
        ("inductr", "patch.cosine=1", "unknown --torchcompile backend 'inductr'. Did you mean inductor"),
        ("inductor", "patch.gradient_diversity=1", "differentiates twice, which compiled models cannot"),
    ]:
        diversity = Diversity([parse_spec(spec)], 3, patches_reach_label=True)
        model = DiverseViT(backbone, diversity.needs)
        with pytest.raises(UserError, match=message):
            compile_model(argparse.Namespace(torchcompile=backend), model, diversity)
