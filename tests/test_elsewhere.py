"""Diversity terms attached to a model of others: what it returns, what it keeps, and what may wrap it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import forks
import pytest
import timm
import torch
from conftest import TINY, random_batch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from elsewhere import Diverse, attach
from errors import UserError
from models import DiverseViT, Needs
from regularizers import Diversity, parse_spec, total

SPECS = ("patch.cosine@last=0.5", "patch.contrastive=0.5", "attn.cosine@0=1e-2", "weight.cno@all=5e-2")
NAMES = ["patch.cosine@last", "patch.contrastive@first:last", "attn.cosine@0", "weight.cno@all"]


def build(**overrides: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model("deit_tiny_patch16_224", **{**TINY, **overrides})


class Around(nn.Module):
    """A model of others that calls a timm model, as transformers' does, and returns what is no tensor."""

    def __init__(self, timm_model: nn.Module) -> None:
        super().__init__()
        self.timm_model = timm_model

    def forward(self, *, pixel_values: Tensor) -> dict[str, Tensor]:
        return {"logits": self.timm_model(pixel_values)}


def expected(images: Tensor, **overrides: Any) -> tuple[Tensor, Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Logits, weighted sum, values and gradients by name, as this project's own loop computes them."""
    backbone = build(**overrides)
    diversity = Diversity([parse_spec(spec) for spec in SPECS], depth=3)
    own = DiverseViT(backbone, Needs(**diversity.needs))
    torch.manual_seed(1)
    captured = own(images)
    terms = diversity(captured, own.weights)
    loss = total(terms)
    (captured.logits.logsumexp(1).mean() + loss).backward()
    gradients = {name: parameter.grad for name, parameter in backbone.named_parameters()}
    return captured.logits.detach(), loss.detach(), {k: v.value.detach() for k, v in terms.items()}, gradients


def step(model: nn.Module, images: Tensor) -> Diverse:
    torch.manual_seed(1)  # of CNO's probes
    model.zero_grad()
    found = model(images)
    (found.output.logsumexp(1).mean() + found.diversity).backward()
    return found


def assert_as_expected(
    found: Diverse, model: nn.Module, images: Tensor, prefix: str = "", **tolerance: Any
) -> None:
    logits, diversity, terms, gradients = expected(images)
    torch.testing.assert_close(found.output, logits, **tolerance)
    torch.testing.assert_close(found.diversity, diversity, **tolerance)
    torch.testing.assert_close(found.terms, terms, **tolerance)
    assert list(found.terms) == NAMES and not any(value.requires_grad for value in found.terms.values())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name.removeprefix(prefix)], **tolerance)


EXACT = {"rtol": 0, "atol": 0}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_numbers_are_those_of_the_own_loop(checkpointing: bool) -> None:
    images, _ = random_batch()
    model = build()
    model.set_grad_checkpointing(checkpointing)
    assert attach(model, SPECS) is model and model.diversity.names == NAMES
    assert_as_expected(step(model, images), model, images, **EXACT)


def test_the_model_stays_its_own_class_with_its_own_names() -> None:
    plain, model = build(), attach(build(), SPECS)
    assert type(model) is type(plain) and model.no_weight_decay() == plain.no_weight_decay()
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]


def test_a_model_around_a_timm_model() -> None:
    """It is called with keywords, and its output comes back as it is."""
    images, _ = random_batch()
    model = attach(Around(build()), SPECS)
    torch.manual_seed(1)
    output, diversity, terms = model(pixel_values=images)
    assert list(output) == ["logits"]
    (output["logits"].logsumexp(1).mean() + diversity).backward()
    assert_as_expected(Diverse(output["logits"], diversity, terms), model, images, "timm_model.", **EXACT)


def test_without_gradients_nothing_is_captured_or_drawn() -> None:
    """The output has the same form. Evaluation mode alone changes nothing: DeiT fine-tunes in it."""
    images, _ = random_batch()
    model = attach(build(), SPECS).eval()
    assert_as_expected(step(model, images), model, images, **EXACT)
    plain = build().eval()
    plain.blocks[0].attn.fused_attn = False  # as where its map is wanted
    state = torch.get_rng_state()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            output, diversity, terms = model(images)
        assert torch.equal(output, plain(images)) and diversity.item() == 0 and terms == {}
    assert torch.equal(torch.get_rng_state(), state)


def test_no_terms() -> None:
    images, _ = random_batch()
    output, diversity, terms = attach(build(), ())(images)
    assert torch.equal(output, build()(images)) and diversity.item() == 0 and terms == {}


def held(model: Any) -> list[object]:
    student = model.diversity._student
    return [student._sink, student._wanted.tokens, student._wanted.attention]


def test_nothing_is_kept_after_a_step_or_a_failure() -> None:
    model = attach(build(), SPECS)
    step(model, random_batch()[0])
    assert not any(held(model))
    with pytest.raises(AssertionError, match="Input height"):
        model(torch.zeros(2, 3, 24, 32))
    assert not any(held(model))
    model.blocks[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(random_batch()[0])
    assert not any(held(model))


def test_remove_leaves_the_model_as_it_was() -> None:
    images, _ = random_batch()
    model, plain = attach(build(), SPECS), build()
    model.diversity.remove()
    assert torch.equal(model(images), plain(images)) and not hasattr(model, "diversity")
    assert all(block.attn.fused_attn for block in model.blocks)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    attach(model, SPECS)
    assert_as_expected(step(model, images), model, images, **EXACT)


def test_a_copy_captures_for_itself() -> None:
    """An EMA is a copy."""
    images, _ = random_batch()
    model = attach(build(), SPECS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    ema = ModelEmaV3(attach(build(), SPECS), decay=0.5)
    copied = copy.deepcopy(ema.module).requires_grad_(True)
    assert_as_expected(step(copied, images), copied, images, **EXACT)
    ema.update(model)
    with torch.no_grad():
        assert torch.allclose(ema.module.norm.weight, torch.full((24,), 1.5))
        assert ema.module(images).terms == {}


def test_terms_are_float32_under_autocast() -> None:
    """Those of the weights have no share in autocast's rounding at all."""
    images, _ = random_batch()
    model = attach(build(), SPECS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = step(model, images)
    _, _, terms, _ = expected(images)
    assert found.output.dtype == torch.bfloat16 and found.diversity.dtype == torch.float32
    assert torch.equal(found.terms["weight.cno@all"], terms["weight.cno@all"])
    assert all(value.dtype == torch.float32 for value in found.terms.values())
    torch.testing.assert_close(found.terms, terms, rtol=2e-2, atol=2e-3)


# torch's compiler meets this warning of its own, hides it when it would be shown, but not where it is an error
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("inside", [False, True])
def test_compiled(inside: bool) -> None:
    """The model itself, or a module of others that calls it."""
    images, _ = random_batch()
    model = attach(build(), SPECS)
    torch._dynamo.reset()
    compiled: Any = torch.compile(nn.Sequential(model) if inside else model, backend="aot_eager")
    found = step(compiled, images)
    torch._dynamo.reset()
    assert_as_expected(found, model, images)
    assert not any(held(model))


DDP = """
import sys
import torch
import torch.distributed as dist
from conftest import random_batch
from test_elsewhere import SPECS, assert_as_expected, attach, build, expected, step
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("gloo")
model = DistributedDataParallel(attach(build(), SPECS), find_unused_parameters=sys.argv[1] == "unused")
found = step(model, random_batch(seed=dist.get_rank())[0])
means = [expected(random_batch(seed=rank)[0])[3] for rank in range(2)]
assert found.terms["weight.cno@all"] > 0
for name, parameter in model.module.named_parameters():
    mean = (means[0][name] + means[1][name]) / 2
    torch.testing.assert_close(parameter.grad, mean, rtol=1e-5, atol=1e-7)
dist.destroy_process_group()
"""


@pytest.mark.parametrize("parameters", ["used", "unused"])
def test_gradients_of_ddp_are_the_mean_of_the_processes(tmp_path: Path, parameters: str) -> None:
    """Also where DDP looks for what the loss depends on in what the forward pass returns."""
    (tmp_path / "step.py").write_text(DDP)
    run = forks.run(2, str(tmp_path / "step.py"), parameters, env={"PATH": "/usr/bin:/bin"})
    assert run.returncode == 0, run.stderr[-3000:]


def test_patch_embeddings_are_seen() -> None:
    """The layer embed is a module's output, which a call of the model shows."""
    images, _ = random_batch()
    model = attach(build(), ["patch.so@embed=1"])
    found = model(images)
    with torch.no_grad():
        unit = nn.functional.normalize(model.patch_embed(images), dim=-1)  # [B, P, D]
        expected = (unit @ unit.mT - torch.eye(unit.shape[1])).square().sum((1, 2)).mean()
    torch.testing.assert_close(found.terms["patch.so@embed"], expected, rtol=1e-4, atol=0)
    found.diversity.backward()
    assert model.patch_embed.proj.weight.grad.any()


def two_models() -> nn.Module:
    return nn.ModuleList([build(), build()])


@pytest.mark.parametrize(
    ("model", "specs", "says"),
    [
        (
            build,
            ["patch.mixing=1"],
            "patch.mixing takes the patch labels of the mixed images, which only this proj",
        ),
        (
            build,
            ["patch.gradient_diversity=1"],
            "patch.gradient_diversity@last takes the gradient of the label loss",
        ),
        (build, ["patch.region_mixing=1"], "patch.region_mixing takes the patch labels of the mixed images"),
        (build, ["patch.context=1"], "the layer norm is what forward_features returns, which a call of the model"),
        (build, ["patch.cosine@7=1"], "layer 7 is out of range, the model has blocks 0 to 2"),
        (build, ["patch.cosine=1", "patch.cosine=2"], "patch.cosine@last is given twice"),
        (build, ["patch.cosin=1"], "unknown regularizer 'patch.cosin'. Did you mean patch.cosine"),
        (
            lambda: nn.Linear(2, 2),
            ["patch.cosine=1"],
            "Linear is not a vision transformer that diversity terms know",
        ),
        (
            lambda: "patch.cosine=1",
            ["attn.cosine=1"],
            "a model first, then its terms: 'patch.cosine=1' is no torch.nn",
        ),
        (two_models, ["patch.cosine=1"], "ModuleList has 2 timm models inside: give one of them"),
        (lambda: nn.DataParallel(build()), [], "give diversity the model before DataParallel wraps it"),
        (lambda: torch.compile(build()), [], "give diversity the model before OptimizedModule wraps it"),
        (lambda: Around(attach(build(), [])), [], "has diversity terms already: give all of them in one call"),
    ],
)
def test_mistakes_are_one_line(model: Any, specs: list[str], says: str) -> None:
    with pytest.raises(UserError) as raised:
        attach(model(), specs)
    assert says in str(raised.value) and "\n" not in str(raised.value)


def test_what_a_model_cannot_show_leaves_it_as_it_was() -> None:
    """Swin's layers have different grids, which the trial with blank images shows."""
    arguments = {"img_size": 32, "window_size": 4, "embed_dim": 12, "depths": (1, 1), "num_heads": (2, 2)}
    torch.manual_seed(0)
    model = timm.create_model("swin_tiny_patch4_window7_224", **arguments)
    with pytest.raises(UserError, match="layers 0 and 1 cannot be compared"):
        attach(model, ["patch.contrastive@0:1=1", "attn.cosine@0=1"])
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    assert isinstance(model(torch.zeros(1, 3, 32, 32)), Tensor)


def test_the_size_of_the_images() -> None:
    """The model's own, in height, width and channels; or what is given."""
    for overrides in ({"img_size": (16, 32)}, {"in_chans": 1}):
        model = attach(build(**overrides), SPECS)
        shape = (2, overrides.get("in_chans", 3), *overrides.get("img_size", (32, 32)))
        assert model(torch.ones(shape)).diversity.requires_grad
    with pytest.raises(UserError, match=r"cannot take images of 3 x 40 x 40 pixels: .* Give diversity the size"):
        attach(build(), SPECS, img_size=40)
    for size, sides in ((40, (40, 40)), ((24, 40), (24, 40))):
        assert attach(build(dynamic_img_size=True), SPECS, img_size=size)(torch.ones(2, 3, *sides)).terms


def test_modes_of_parts_are_kept() -> None:
    """A frozen part may be in evaluation mode while the rest trains."""
    model = build().train()
    model.blocks[0].eval()
    modes = [part.training for part in model.modules()]
    attach(model, SPECS)
    assert [part.training for part in model.modules()] == modes


def test_frozen_layers_before_a_term_are_told() -> None:
    model = attach(build().requires_grad_(False), ["patch.cosine@last=1"])
    with pytest.raises(UserError, match="arrived without gradient"):
        model(random_batch()[0])
    assert not any(held(model))


def test_threads_of_data_parallel_are_refused() -> None:
    """They would run copies of the model at the same time, whose hooks store in one place."""
    model = attach(build(), SPECS)
    replica = copy.copy(model)  # what nn.parallel.replicate makes of a module: its attributes, hooks among them
    with pytest.raises(UserError, match="use one process per GPU"):
        replica(random_batch()[0])
