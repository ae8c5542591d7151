"""Compiled models and objectives: few graphs, all of them before the first step, and the eager numbers."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo as dynamo
from conftest import RECIPE, TINY, random_batch
from families import FAMILIES, build

from build import use_grad_checkpointing
from engine import Precision, Updater, terms_of_batch
from errors import UserError
from losses import LabelLoss, Objective
from mixing.mixup import Mixup
from models import DiverseViT, Needs, build_model, find_layout
from regularizers import MEASURES, Diversity, Term, parse_spec, total
from regularizers.measures import OPTIONS
from regularizers.specs import all_names
from utils import set_streams, streams
from warmup import Batches, compile_model, warm_up

SPECS = ("patch.cosine@first,all=0.5", "weight.so:v=1e-3")
STEPS = 3
ONE_GRAPH = [
    *("vit", "vit_map", "vit_parallel_things", "deit", "deit_distilled", "deit3", "beit", "eva", "eva02"),
    *("eva02_base", "dinov3", "relpos", "naflex", "cait", "xcit", "tnt", "deepseek"),
    *("swin", "swinv2", "pvt_v2", "twins_svt", "volo", "hiera", "mvitv2"),
]
CPU = Precision(torch.device("cpu"))
# torch's compiler meets this warning of its own, hides it when it would be shown, but not where it is an error
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


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
    eager = DiverseViT(backbone, Needs(**diversity.needs))
    compiled = copy.deepcopy(eager)
    if checkpointing:
        use_grad_checkpointing(compiled.backbone)
    compile_model(backend, compiled)
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
    with pytest.raises(UserError, match=r"unknown --torchcompile backend 'inductr'\. Did you mean inductor"):
        compile_model("inductr", DiverseViT(backbone))
    twice = Diversity([parse_spec("patch.gradient_diversity=1")], 3, patches_reach_label=True)
    with pytest.raises(UserError, match="differentiates twice, which compiled models cannot"):
        Objective(diversity=twice).compile("inductor")


# ------------------------------------------------------------------------------------------------------------
# The objective

DOUBLE = {"rtol": 1e-9, "atol": 1e-12}


def graphs() -> int:
    return dynamo.utils.counters["stats"]["unique_graphs"]


def differentiated(terms: dict[str, Term], inputs: list[torch.Tensor]) -> list[torch.Tensor | None]:
    """The weighted sum of the terms, and its gradients."""
    value = total(terms)
    return [value.detach(), *torch.autograd.grad(value, inputs, allow_unused=True)]


def compare_compiled(compute: Callable[[], list[Any]], compile_it: Callable[[], None], count: int) -> None:
    """The same numbers before and after compiling, from that many graphs, none of them made in the second step."""
    expected = compute()
    compile_it()
    for _ in range(2):
        for ours, theirs in zip(compute(), expected, strict=True):
            assert (ours is None) == (theirs is None)
            if theirs is not None:
                torch.testing.assert_close(ours, theirs, **DOUBLE)
        assert graphs() == count


def options_of(name: str) -> list[str]:
    """The term, and with each of its options where a measure's first level stands for the others."""
    level, _, measure = name.partition(".")
    layers = "@first:last" if MEASURES[measure].takes == "pair" else "@all"
    given = [
        OPTIONS[option].written(option, max(OPTIONS[option].above, 0.0) + 0.5)
        for option in MEASURES[measure].options
        if level == MEASURES[measure].levels[0]
    ]
    return [f"{name}{layers}", *(f"{name}:{option}{layers}" for option in given)]


COMPILED = [name for name in all_names() if MEASURES[name.partition(".")[2]].takes in ("set", "pair")]


@pytest.mark.parametrize("spec", [spec for name in COMPILED for spec in options_of(name)])
def test_a_compiled_term(tiny, spec):
    model, diversity = tiny(f"{spec}=0.5")
    model.double()
    images = random_batch(2)[0].double()

    def compute() -> list[torch.Tensor | None]:
        torch.manual_seed(5)  # CNO's probes
        captured = model(images)
        inputs = [*captured.tokens.values(), *captured.attention.values()]
        return differentiated(diversity(captured, model.weights), inputs or [*model.parameters()])

    compare_compiled(compute, lambda: diversity.compile("aot_eager"), count=1)


@pytest.mark.parametrize(
    ("distilled", "kind", "mixing"),  # each pair of two of them occurs
    [
        *(("none", "mixup", 1.0), ("none", "smoothing", 0.0), ("none", "plain", 1.0), ("soft", "mixup", 0.0)),
        *(("soft", "smoothing", 1.0), ("soft", "plain", 0.0), ("hard", "mixup", 1.0), ("hard", "smoothing", 1.0)),
        ("hard", "plain", 0.0),
    ],
)
def test_a_compiled_label_loss(tiny, mixing, kind, distilled):
    name = "deit_tiny_patch16_224" if distilled == "none" else "deit_tiny_distilled_patch16_224"
    model, diversity = tiny(*([f"patch.mixing={mixing}"] if mixing else []), name=name)
    model.double()
    teacher = build_model("deit_tiny_patch16_224", **TINY).double().eval()
    if distilled != "none":
        model.backbone.set_distilled_training(True)
    mixup = Mixup(0.8 * (kind == "mixup"), 0, smoothing=0.1 * (kind != "plain"), patch_size=(8, 8))
    objective = Objective(LabelLoss(teacher, distilled), diversity)
    images, targets = random_batch(pixels=32)
    images, labels = mixup(images.double(), targets)

    def compute() -> list[torch.Tensor | None]:
        captured = model(images)
        terms = objective(captured, labels, objective.ask_teacher(images))
        wanted = [captured.logits, captured.patch_logits, captured.dist_logits]
        return differentiated(terms, [logits for logits in wanted if logits is not None])

    compare_compiled(compute, lambda: objective.compile("aot_eager"), count=1 + (distilled != "none"))


# ------------------------------------------------------------------------------------------------------------
# Warming up


def test_warming_up_leaves_no_trace_and_nothing_to_compile(tiny):
    model, diversity = tiny(*RECIPE, drop_path_rate=0.2, pos_drop_rate=0.1)
    norm = torch.nn.BatchNorm1d(24)  # whose statistics a pass would move
    model.backbone.norm_pre = torch.nn.Sequential(Transposed(), norm, Transposed())
    measure = Diversity([parse_spec("attn.pairwise_cosine@all=1")], 3)
    model = DiverseViT(model.backbone, Needs(**diversity.needs), Needs(**measure.needs))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    updater, mixup = Updater(optimizer, CPU), Mixup(prob=0.6, patch_size=(8, 8))
    objective = Objective(diversity=diversity)
    compile_model("aot_eager", model)
    objective.compile("aot_eager")
    before = copy.deepcopy(model.state_dict()), draws(mixup)
    seconds = warm_up(model, objective, measure, updater, mixup, Batches((3, 32, 32), 4, [6, 5]))
    torch.testing.assert_close((model.state_dict(), draws(mixup)), before, rtol=0, atol=0)
    assert not optimizer.state
    assert seconds > 0 and all(p.grad is None for p in model.parameters())

    made = graphs()
    assert made == 5  # training and evaluation of the model, label loss, terms of the batch, terms of the weights
    for seed in range(6):  # mixed by Mixup, by CutMix and not at all
        model.train()
        terms = terms_of_batch(model, objective, random_batch(4, seed=seed), mixup, updater)
        (total(terms) + total(objective.of_weights(model.weights))).backward()
    model.eval()
    with torch.no_grad():
        for size in (6, 5, 6):
            model(random_batch(size)[0], needs=Needs(**measure.needs))
    assert graphs() == made
    assert norm.running_mean.any()  # these passes did move the statistics


def draws(mixup: Mixup) -> tuple[float, ...]:
    """What the random streams would give next; they stay where they are."""
    state = streams(CPU.device, mixup.random)
    found = random.random(), np.random.rand(), torch.rand(()).item(), mixup.random.rand()
    set_streams(state, CPU.device, mixup.random)
    return found


class Transposed(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mT
