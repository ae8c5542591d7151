"""Terms of heads from queries and keys, and mixing from features: what the maps and the logits give."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from families import CLASSES, FAMILIES, IMAGES, Family
from timm.layers import Attention
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from build import use_grad_checkpointing
from errors import UserError
from losses import Objective
from mixing.mixup import Labels
from models import DiverseViT, Needs, build_model, find_layout, products
from models.heads import Linear
from models.products import Attended, attend, inner_products
from models.remedies import install_remedies
from models.shortcuts import _products_of_maps
from redundancy import assess
from redundancy.examples import Look
from redundancy.watch import Heads, Watched
from regularizers import Diversity, measures, of_features, of_products, parse_spec
from regularizers.diversity import total
from regularizers.specs import all_names
from warmup import compile_model

SETS = ["cosine", "cosine:abs", "pairwise_cosine", "mhs", "mgd", "so", "so:normalize", "cno", "cno:normalize"]
PAIRS = ["cosine_cross", "cosine_cross:abs", "contrastive", "contrastive:tau=0.1"]
EVERYWHERE = [f"attn.{name}@all=1" for name in SETS if name != "mgd"]
DETERMINANT = ["attn.mgd@all=1"]
ATTENDING = [name for name, family in FAMILIES.items() if family.attends]
# Whose blocks, none or some of them, call no scaled_dot_product_attention, or twice, or only if timm is told to
WITH_MAPS = [
    "vit_diff",
    "vit_parallel_diff",
    "cait",
    "convit",
    "xcit",
    "xcit_tokens_norm",
    "tnt",
    "swinv2",
    "swinv2_cr",
]
PARTLY = {"volo": 2}


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ------------------------------------------------------------------------------------------------------------
# Tiles


def whole_maps(call: Attended) -> Tensor:
    """The softmax maps [C, H, n, m], as the equation says."""
    scores = torch.einsum("chnd,chmd->chnm", call.q, call.k) * call.scale
    if call.mask is not None:
        added = torch.zeros_like(scores)
        added = added.masked_fill(~call.mask, -torch.inf) if call.mask.dtype == torch.bool else added + call.mask
        scores = scores + added
    weights = (scores - scores.amax(dim=-1, keepdim=True)).exp()
    return weights / weights.sum(dim=-1, keepdim=True)


MASKS: dict[str, Callable[[], Tensor] | None] = {
    "none": None,
    "[n, m]": lambda: rand(5, 6, seed=7),
    "[H, n, m]": lambda: rand(2, 5, 6, seed=7),
    "[1, H, n, m]": lambda: rand(1, 2, 5, 6, seed=7),
    "[C, 1, n, m]": lambda: rand(4, 1, 5, 6, seed=7),
    "[C, H, 1, m]": lambda: rand(4, 2, 1, 6, seed=7),
    "booleans": lambda: rand(4, 1, 5, 6, seed=7) > -0.5,
}


def calls_with(mask: str, count: int = 2) -> tuple[list[Attended], list[Tensor]]:
    """Attentions of 2 heads, and what is differentiated of them."""
    make, calls, wanted = MASKS[mask], [], []
    for number in range(count):
        q, k = rand(4, 2, 5, 3, seed=number), rand(4, 2, 6, 3, seed=10 + number)
        added = None if make is None else make()
        calls.append(Attended(q, k, 0.4, added))
        wanted += [part for part in calls[-1][:2]] + (
            [added] if added is not None and added.is_floating_point() else []
        )
    for tensor in wanted:
        tensor.requires_grad_()
    return calls, wanted


@pytest.mark.parametrize(("mask", "elements"), [*product(MASKS, [1, 100, 2**20])])
def test_tiles_add_up(monkeypatch, mask, elements):
    """Tiles of one row, of some rows or images, and one tile for all: values, and gradients of q, k and mask."""
    monkeypatch.setattr(products, "MAX_ELEMENTS", elements)
    calls, wanted = calls_with(mask)
    flat = torch.cat([whole_maps(call) for call in calls], dim=1).flatten(2)
    expected, found = torch.einsum("cgi,chi->cgh", flat, flat), inner_products(calls)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    at = rand(4, 4, 4, seed=3)  # not symmetric
    gradients = [torch.autograd.grad(each, wanted, at) for each in (found, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("elements", [7, 2**20])
def test_the_attention_itself_comes_from_the_tiles(monkeypatch, mask, elements):
    monkeypatch.setattr(products, "MAX_ELEMENTS", elements)
    (call,), wanted = calls_with(mask, count=1)
    v = rand(4, 2, 6, 3, seed=5).requires_grad_()
    attended, found = attend(call, v)
    theirs = F.scaled_dot_product_attention(call.q, call.k, v, attn_mask=call.mask, scale=call.scale)
    torch.testing.assert_close(attended, theirs, rtol=1e-12, atol=1e-14)
    flat = whole_maps(call).flatten(2)
    at = rand(4, 2, 2, seed=3), rand(*attended.shape, seed=4)
    ours = torch.autograd.grad((found, attended), [*wanted, v], at)
    expected = torch.autograd.grad((flat @ flat.mT, theirs), [*wanted, v], at)
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-13)


def test_gradients_are_those_of_differences(monkeypatch):
    """First and second derivatives, in tiles."""
    monkeypatch.setattr(products, "MAX_ELEMENTS", 20)
    q, k, mask, v = (rand(2, 2, 3, size, seed=size).requires_grad_() for size in (2, 2, 3, 4))
    assert torch.autograd.gradcheck(lambda q, k, mask, v: attend(Attended(q, k, 0.7, mask), v), (q, k, mask, v))
    assert torch.autograd.gradgradcheck(
        lambda q, k, mask: inner_products([Attended(q, k, 0.7, mask)]), (q, k, mask)
    )


# ------------------------------------------------------------------------------------------------------------
# Measures


def test_every_form_is_compared():
    """By `test_sets` or `test_pairs`. `inverse` has no form: it needs products of columns."""
    assert {name.partition(":")[0] for name in [*SETS, *PAIRS]} == set(of_products.MEASURES)
    assert {f"attn.{name}" for name in of_products.MEASURES} <= set(all_names())
    assert of_products.of_products(parse_spec("attn.cno:inverse=1")) is None
    assert Diversity([parse_spec("attn.cno:inverse=1")], depth=2).needs == {"attention": frozenset({0})}


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("heads", [1, 2, 5])
def test_sets(name, heads):
    """Against the measure of the items, values and gradients."""
    compare(f"attn.{name}=1", [rand(3, heads, 20).abs()])


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("heads", [1, 2, 5])
def test_pairs(name, heads):
    compare(f"attn.{name}=1", [rand(3, heads, 20, seed=seed).abs() for seed in (0, 1)])


def compare(text: str, items: list[Tensor]) -> None:
    spec = parse_spec(text)
    form, function = of_products.of_products(spec), measures.MEASURES[spec.measure].function
    assert form is not None
    for each in items:
        each.requires_grad_()
    joined = torch.cat(items, dim=-2)
    torch.manual_seed(1)  # of CNO's probes
    found = form(joined @ joined.mT)
    torch.manual_seed(1)
    expected = function(*items, **spec.arguments)
    assert_same(found, expected)
    gradients = [torch.autograd.grad(value, items, allow_unused=True) for value in (found, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        assert_same(ours, theirs)


def assert_same(
    found: Tensor | None, expected: Tensor | None, beside: float = 0.01, rounding: float = 1e-12
) -> None:
    """To the rounding of the largest element, or of what is `beside` it: a small sum may be one of large parts."""
    largest = max(size(expected), beside)
    torch.testing.assert_close(found, expected, rtol=0, atol=rounding * largest)


def size(tensor: Tensor | None) -> float:
    return 0.0 if tensor is None else tensor.detach().abs().max().item()


@pytest.mark.parametrize("measured", [True, False])
def test_probes_are_those_of_the_maps_beside_a_measure_in_float64(measured):
    """mgd has inner products added up in float64; cno, in float32, draws the same probes as without it."""
    found: list[Any] = []
    specs = ["attn.cno@all", "attn.mgd@all"]
    diversity = Diversity([parse_spec(spec, with_coef=False) for spec in specs], 2)
    sizes = TINY | {"embed_dim": 32, "depth": 2, "num_heads": 16}
    backbone: Any = build_model("deit_tiny_patch16_224", **sizes).eval()
    images = rand(2, 3, 32, 32, dtype=torch.float32)
    with torch.no_grad():
        for block in backbone.blocks:
            block.attn.qkv.weight.mul_(20)  # heads that differ, or any probe gives the same
    if measured:
        found = [
            assess(backbone, [images], metrics=metrics, measures=specs, look=Look(count=0)).models[0].findings
            for metrics in (["output"], ["attn.entropy"])
        ]
        ours, theirs = (torch.from_numpy(each["attn.cno@all"].per_image) for each in found)
    else:
        model = DiverseViT(backbone, Needs(**diversity.needs))
        for shortcuts in (True, False):
            model.find_shortcuts((3, 32, 32)) if shortcuts else model.avoid_shortcuts()
            captured = model(images)
            torch.manual_seed(1)
            found.append(diversity.of_batch(captured)["attn.cno@all"].value)
        ours, theirs = found
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)


def test_identical_heads_have_a_finite_determinant():
    """In float32 the rounding of inner products could make the determinant negative."""
    q, k = (rand(2, 1, 50, 4, seed=seed, dtype=torch.float32).expand(-1, 12, -1, -1) for seed in (0, 1))
    found = of_products.mgd(inner_products([Attended(q, k, 0.5)], wide=True))
    flat = whole_maps(Attended(q, k, 0.5)).flatten(2)
    torch.testing.assert_close(found.float(), measures.mgd(flat), rtol=1e-5, atol=0)


# ------------------------------------------------------------------------------------------------------------
# Families


def built(family: Family, specs: list[str], shortcuts: bool, fused: bool = False) -> tuple[DiverseViT, Diversity]:
    torch.manual_seed(0)
    backbone: Any = family.make().double().eval()
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)  # maps that are far from uniform
    for module in backbone.modules():
        if fused and hasattr(module, "fused_attn"):
            module.fused_attn = True
    diversity = Diversity([parse_spec(spec) for spec in specs], family.depth, patches_reach_label=True)
    model = DiverseViT(backbone, Needs(**diversity.needs), patch_loss=diversity.patch_loss)
    if shortcuts:
        model.find_shortcuts((3, family.pixels, family.pixels))
    return model, diversity


def same_step(family: Family, specs: list[str], fused: bool = False, rounding: float = 1e-12) -> DiverseViT:
    """Terms, logits and all gradients, with and without maps; the model that has shortcuts."""
    results, images = [], family.images()
    for shortcuts in (False, True):
        model, diversity = built(family, specs, shortcuts, fused)
        images.requires_grad_()
        captured = model(images)
        torch.manual_seed(1)  # of CNO's probes
        terms = diversity.of_batch(captured)
        loss = total(terms) + captured.logits.square().sum()
        gradients = torch.autograd.grad(loss, [images, *model.parameters()], allow_unused=True)
        values = {name: term.value for name, term in terms.items()}
        results.append(({**values, "logits": captured.logits}, gradients))
    for one, other in zip(*(tuple(values.values()) for values, _ in results), strict=True):
        assert_same(other, one, rounding=rounding)
    largest = max(map(size, results[0][1]))
    for one, other in zip(*(gradients for _, gradients in results), strict=True):
        assert_same(other, one, largest, rounding)
    return model


@pytest.mark.parametrize("name", ATTENDING)
def test_a_familys_determinant(name):
    """Of heads that are alike its matrix is singular but for 1e-6, which magnifies rounding."""
    same_step(FAMILIES[name], DETERMINANT, rounding=1e-10)


@pytest.mark.parametrize("name", ATTENDING)
def test_a_familys_heads(name):
    """All measures of heads at all layers; and across layers, where their maps have one shape."""
    family = FAMILIES[name]
    pairs = (
        [f"attn.{pair}@{'0:0' if name == 'convit' else 'first:last'}=1" for pair in PAIRS]
        if family.one_scale
        else []
    )
    model = same_step(family, EVERYWHERE + pairs)
    number = 0 if name in WITH_MAPS or name == "swin" else PARTLY.get(name, family.depth)
    assert len(served(model, family)) == number
    if number:
        assert model._trained.attention == frozenset(range(family.depth)) - served(model, family)


def served(model: DiverseViT, family: Family) -> frozenset[int]:
    return frozenset(block for block in range(family.depth) if model._attentions.serve((block,)))


def test_windows_masks_and_biases():
    """Swin's attention calls the kernel where timm is told to: windows, shifted ones, with a bias that learns."""
    family = FAMILIES["swin"]
    model = same_step(family, EVERYWHERE, fused=True)
    assert len(served(model, family)) == family.depth


class OtherScale(Attention):
    """Its fused form multiplies the scores by a factor, the form with a map does not."""

    factor = 1.0

    def forward(self, x: Tensor, **others: Any) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused_attn:
            out = F.scaled_dot_product_attention(q, k, v, scale=self.scale * self.factor)
        else:
            out = self.attn_drop((q * self.scale @ k.mT).softmax(dim=-1)) @ v
        return self.proj(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize(("factor", "blocks"), [(1.0, 3), (1.05, 0), (0.9, 0)])
def test_other_maps_are_seen_in_an_untrained_model(factor, blocks):
    """Its maps are nearly uniform, and so are those with another scale, or with none at all."""
    torch.manual_seed(0)
    attention = type("Attention", (OtherScale,), {"factor": factor})
    backbone = build_model("vit_tiny_patch16_224", attn_layer=attention, **TINY | {"embed_dim": 192})
    model = DiverseViT(backbone, Needs(heads=frozenset({(0,), (1,), (2,)})))
    model.find_shortcuts((3, 32, 32))
    assert sum(model._attentions.serve((block,)) for block in range(3)) == blocks


def test_large_maps_are_added_up_exactly():
    """Sixteen million numbers in one float32 sum would be off by nearly what the trial allows."""
    torch.manual_seed(0)
    sizes = TINY | {"img_size": 512, "depth": 1, "num_heads": 1, "embed_dim": 8}
    backbone: Any = build_model("vit_tiny_patch16_224", **sizes)
    taps = {0: find_layout(backbone).map_taps(0)}
    image = torch.rand(1, 3, 512, 512)
    with torch.no_grad():
        (found,) = _products_of_maps(backbone, taps, image)[0]
        (exact,) = _products_of_maps(backbone.double(), taps, image.double())[0]
    assert found.sizes == (1, 4097, 4097)
    torch.testing.assert_close(found.products.double(), exact.products, rtol=1e-6, atol=0)


@pytest.mark.parametrize("fused", [True, False])
def test_blocks_with_different_numbers_of_windows_are_refused(fused):
    """Swin with as many heads in both stages: each window has the same map, but there are four times as many."""
    sizes: dict[str, Any] = {"img_size": 32, "embed_dim": 12, "depths": (2, 2), "num_heads": (3, 3)}
    backbone = build_model("swin_tiny_patch4_window7_224", window_size=4, num_classes=5, **sizes)
    for module in backbone.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    diversity = Diversity([parse_spec("attn.cosine_cross@first:last=1")], 4)
    model = DiverseViT(backbone, Needs(**diversity.needs))
    tried = model.check((3, 32, 32), 5, model.needs, shortcuts=True)
    with pytest.raises(UserError, match="their windows x heads x map differ: 8 x 3 x 256 and 2 x 3 x 256; choose"):
        diversity.check(tried)


def test_a_remedy_that_learns_to_change_maps_keeps_them():
    """At first AttnScale changes nothing, so that trying does not tell."""
    backbone = FAMILIES["deit"].make().double()
    install_remedies(backbone, ["attnscale@1"])
    diversity = Diversity([parse_spec("attn.cosine@all=1")], 3)
    model = DiverseViT(backbone, Needs(**diversity.needs))
    model.find_shortcuts((3, 32, 32))
    with torch.no_grad():
        backbone.blocks[1].attn.remedies["attnscale"].lamb.fill_(0.5)
    captured = model.eval()(FAMILIES["deit"].images())
    assert set(captured.products) == {(0,), (2,)} and set(captured.attention) == {1}
    maps = model(FAMILIES["deit"].images(), needs=Needs(attention=frozenset({1}))).attention[1]
    torch.testing.assert_close(diversity.terms[0].of_layers(captured, (1,)), measures.cosine(maps.flatten(-2)))


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.classifies])
@pytest.mark.parametrize("training", [True, False])
def test_a_familys_patches(name, training):
    """Mixing from features: value, coefficient and all gradients; with dropout in the head the same is dropped."""
    family, results = FAMILIES[name], []
    for shortcuts in (False, True):
        model, diversity = built(family, ["patch.mixing=1"], shortcuts)
        model.train(training)
        for module in model.modules():
            if isinstance(module, nn.Dropout) and module is getattr(model.backbone, "head_drop", None):
                module.p = 0.3
        labels = labels_for(model, family.pixels)
        torch.manual_seed(1)
        captured = model(family.images(), labels=labels)
        term = diversity.of_labels(captured, labels)["patch.mixing"]
        gradients = torch.autograd.grad(2 * term.value, list(model.parameters()), allow_unused=True)
        results.append((term, gradients, captured.patch_loss is not None))
    (term, gradients, taken), (other_term, others, shortcut) = results
    assert not taken and shortcut == (name not in ("volo", "deit_distilled"))
    assert term.coef == other_term.coef
    torch.testing.assert_close(term.value, other_term.value, rtol=1e-12, atol=0)
    for one, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def labels_for(model: DiverseViT, pixels: int, images: int = IMAGES, classes: int = CLASSES) -> Labels:
    assert model.layout is not None
    patches = math.prod(model.layout.grid((pixels, pixels)))
    generator = torch.Generator().manual_seed(3)
    own, partner = torch.randint(classes, (2, images), generator=generator)
    weight = torch.rand(images, generator=generator, dtype=torch.float64)
    shares = torch.rand(images, patches, generator=generator, dtype=torch.float64)
    return Labels(own, partner, weight, shares, 0.1, True)


def test_a_distilled_students_patches():
    """In training its class token's layer comes last; in evaluation mode the mean of two does."""
    model, _ = built(FAMILIES["deit_distilled"], ["patch.mixing=1"], shortcuts=False)
    model.backbone.set_distilled_training(True)
    model.find_shortcuts((3, 32, 32))
    labels, images = labels_for(model, 32), FAMILIES["deit_distilled"].images()
    captured = model.train()(images, labels=labels)
    assert captured.patch_loss is not None
    logits = model(images, needs=Needs(patch_logits=True)).patch_logits
    torch.testing.assert_close(captured.patch_loss.value, measures.mixing(logits, labels), rtol=1e-12, atol=0)
    assert model.eval()(images, labels=labels).patch_loss is None


@pytest.mark.parametrize(
    ("trained", "measured", "maps"),
    [
        (["attn.so@0=1", "attn.cno:inverse@0=1"], [], {0}),  # a map for one is the map for all
        (["attn.so@0,2=1", "attn.cosine_cross@0:1=1", "attn.cno:inverse@1=1"], [], {0, 1}),  # and its partner's
        (["attn.cno:inverse@0=1"], ["attn.so@all"], {0}),  # training has block 0 out of the fused kernel
        (["attn.so@0=1"], ["attn.cno:inverse@all"], {0, 1, 2}),
        (["attn.so@0=1"], ["attn.cosine_cross@0:2"], set()),
    ],
)
def test_maps_and_products_of_one_block(trained, measured, maps):
    """Terms that need a block's map beside terms that do not, in training and in evaluation."""
    family = FAMILIES["vit"]
    diversity = Diversity([parse_spec(spec) for spec in trained], family.depth)
    measure = Diversity([parse_spec(spec, with_coef=False) for spec in measured], family.depth)
    torch.manual_seed(0)
    model = DiverseViT(family.make().double(), Needs(**diversity.needs), Needs(**measure.needs)).eval()
    wanted = Needs(**diversity.needs) | Needs(**measure.needs)
    found = []
    for shortcuts in (False, True):
        if shortcuts:
            model.find_shortcuts((3, family.pixels, family.pixels))
        for terms, needs in ((diversity, None), (measure, Needs(**measure.needs)), (measure, wanted)):
            torch.manual_seed(1)
            captured = model(family.images(), needs=needs)
            found.append([term.value for term in terms.of_batch(captured).values()])
    assert set(captured.attention) == maps
    for one, other in zip(found[:3], found[3:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


# ------------------------------------------------------------------------------------------------------------
# Mixing from features


@pytest.mark.parametrize("bias", [True, False])
def test_frozen_parts_get_no_gradient(bias):
    """Of a frozen layer, or features that nothing learns."""
    features, weight = rand(2, 3, 4), rand(6, 4, seed=1)
    labels = Labels(torch.tensor([0, 5]), torch.tensor([1, 5]), rand(2), rand(2, 3, seed=2).sigmoid(), 0.1, True)
    for learns in product([False, True], repeat=2):
        linear = Linear(features.clone(), weight.clone(), rand(6, seed=3) if bias else None)
        for tensor, wanted in zip(linear, learns, strict=False):
            tensor.requires_grad_(wanted)
        expected = measures.mixing(F.linear(*linear), labels)
        found = of_features.mixing(linear, labels)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
        wanted = [tensor for tensor in linear if tensor is not None and tensor.requires_grad]
        assert found.requires_grad == bool(wanted)
        for ours, theirs in (
            zip(*(torch.autograd.grad(each, wanted) for each in (found, expected)), strict=True) if wanted else ()
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("size", [1.0, 300.0])
def test_float16_does_not_overflow(size):
    """Sums over many patches of large features would, if they were not shrunk: a scaler cannot see that."""
    features = (rand(8, 200, 16, dtype=torch.float32).abs() * size).half().requires_grad_()
    weight = (rand(10, 16, seed=1, dtype=torch.float32) / size).half().requires_grad_()
    ones = torch.zeros(8, dtype=torch.long)
    labels = Labels(ones, ones, torch.ones(8), torch.ones(8, 200), 0.0, True)
    by_weight = torch.autograd.grad(of_features.mixing(Linear(features, weight, None), labels), weight)[0]
    wide = [each.detach().float().requires_grad_() for each in (features, weight)]
    expected = torch.autograd.grad(of_features.mixing(Linear(*wide, None), labels), wide[1])[0]
    torch.testing.assert_close(by_weight.float(), expected, rtol=2e-2, atol=2e-3 * size)


def test_float16_keeps_its_digits():
    """A mean over many patches makes gradients so small that float16, which no scaler has helped yet, has few."""
    features, weight = rand(64, 196, 16, dtype=torch.float32), 0.02 * rand(10, 16, seed=1, dtype=torch.float32)
    own, partner = torch.randint(10, (2, 64), generator=torch.Generator().manual_seed(0))
    labels = Labels(own, partner, torch.ones(64), rand(64, 196, seed=2, dtype=torch.float32).sigmoid(), 0.1, True)
    found = []
    for enabled in (True, False):
        wanted = [each.clone().requires_grad_() for each in (features, weight)]
        with torch.autocast("cpu", dtype=torch.float16, enabled=enabled):
            value = of_features.mixing(Linear(*wanted, None), labels)
        found.append(torch.autograd.grad(value, wanted))
    for half, exact in zip(*found, strict=True):
        assert (half - exact).norm() < 1e-3 * exact.norm()


@pytest.mark.parametrize(
    ("patches", "classes", "parts"), [(784, 21_843, [392, 392]), (1568, 1000, [523, 523, 522]), (5, 10, [5])]
)
def test_parts_are_of_equal_length(patches, classes, parts):
    """A last part of a few patches would read and write the weight's gradient for next to nothing."""
    found = of_features._in_parts(torch.zeros(patches, 1), classes_of=torch.empty(classes, 1))
    assert [len(some) for (some,) in found] == parts


def test_a_second_derivative_is_refused():
    features = rand(2, 3, 4).requires_grad_()
    labels = Labels(torch.tensor([0, 1]), torch.tensor([1, 0]), rand(2), rand(2, 3, seed=2).sigmoid(), 0.1, True)
    value = of_features.mixing(Linear(features, rand(6, 4), None), labels)
    with pytest.raises(UserError, match="differentiated once, not twice: take --explicit-terms"):
        torch.autograd.grad(value, features, create_graph=True)
    torch.autograd.grad(value, features, retain_graph=True)
    with pytest.raises(UserError, match="differentiated once, not twice: take --explicit-terms"):
        torch.autograd.grad(value, features)
    both = ["patch.mixing=1", "patch.gradient_diversity=0.1"]
    assert Diversity([parse_spec(spec) for spec in both], depth=2).patch_loss is None


# ------------------------------------------------------------------------------------------------------------
# Steps


SPECS = ["patch.mixing=1", "patch.cosine=0.5", "patch.contrastive=0.5", "attn.cosine@all=1", "attn.mgd@1=0.1"]
SPECS += ["attn.cosine_cross@0:2=1", "weight.cno=5e-4"]
TINY: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 24,
    "depth": 3,
    "num_heads": 3,
    "num_classes": 5,
}


def step(
    shortcuts: bool, checkpointing: bool = False, compiled: bool = False, **how: Any
) -> tuple[Any, list[Tensor]]:
    """What a step of the whole objective captures, its loss, and its gradients."""
    torch.manual_seed(0)
    backbone: Any = build_model("deit_tiny_patch16_224", **TINY).to(how.get("dtype", torch.float64))
    if checkpointing:
        use_grad_checkpointing(backbone)
    diversity = Diversity([parse_spec(spec) for spec in SPECS], 3)
    model = DiverseViT(backbone, Needs(**diversity.needs), patch_loss=diversity.patch_loss)
    objective = Objective(diversity=diversity)
    if shortcuts:
        model.find_shortcuts((3, 32, 32))
    if compiled:
        torch._dynamo.reset()
        compile_model("aot_eager", model)
        objective.compile("aot_eager")
    labels = labels_for(model, 32, images=4)
    torch.manual_seed(2)
    with how.get("watch", nullcontext()):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how.get("autocast", False)):
            captured = model.train()(rand(4, 3, 32, 32).to(how.get("dtype", torch.float64)), labels=labels)
        loss = total(objective(captured, labels) | objective.of_weights(model.weights))
        return captured, [loss, *torch.autograd.grad(loss, list(model.parameters()))]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # Dynamo looks at it
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_steps_are_the_same(compiled, checkpointing):
    """Compiled in one graph, and with blocks that are computed again; in both at once, maps are formed."""
    _, expected = step(shortcuts=False)
    captured, found = step(True, checkpointing, compiled)
    assert captured.patch_loss is not None and captured.patch_logits is None
    assert len(captured.products) == (0 if compiled and checkpointing else 4)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


def test_under_autocast():
    """In bfloat16, what comes out is not farther from float64 than what maps and logits give."""
    _, exact = step(shortcuts=False)
    (_, maps), (_, ours) = (step(each, dtype=torch.float32, autocast=True) for each in (False, True))

    def far(found: list[Tensor]) -> float:
        return math.sqrt(sum((one - other).square().sum().item() for one, other in zip(found, exact, strict=True)))

    assert 0 < far(ours) < 1.2 * far(maps)
    assert all(gradient.dtype == torch.float32 for gradient in ours[1:])


class Shapes(TorchDispatchMode):
    """The sizes of all tensors that are made."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Size] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.seen += [each.shape for each in tensors_in(made)]
        return made


def tensors_in(made: Any) -> Iterator[Tensor]:
    if isinstance(made, Tensor):
        yield made
    elif isinstance(made, (tuple, list)):
        for each in made:
            yield from tensors_in(each)


@pytest.mark.parametrize("shortcuts", [True, False])
def test_maps_and_logits_are_never_formed(monkeypatch, shortcuts):
    """Forwards and backwards: no N x N tensor, and none with a class for each patch."""
    monkeypatch.setattr(products, "MAX_ELEMENTS", 200)
    monkeypatch.setattr(of_features, "MAX_ELEMENTS", 100)
    monkeypatch.setattr(of_features, "LEAST", 3)
    watch = Shapes()
    step(shortcuts, watch=watch)
    tokens, patches = 17, 4 * 16
    maps = [shape for shape in watch.seen if shape[-2:] == (tokens, tokens)]
    logits = [shape for shape in watch.seen if shape[-1:] == (5,) and shape.numel() >= 5 * patches]
    assert bool(maps) != shortcuts and bool(logits) != shortcuts


# ------------------------------------------------------------------------------------------------------------
# The report


@pytest.mark.parametrize("name", ["vit", "vit_parallel_things", "vit_diff", "volo", "pvt_v2", "twins_svt", "swin"])
def test_the_report_needs_no_maps_for_heads(name):
    """Similarity within and across blocks, against the same with maps; also where some blocks keep theirs."""
    family = FAMILIES[name]
    backbone = family.make().double()
    images = [family.images()]
    alone = ["attn.cosine_abs", "attn.across"]
    ours = assess(backbone, images, metrics=alone, look=Look(count=0)).models[0].findings
    assert not [module for module in backbone.modules() if module._forward_hooks or module._forward_pre_hooks]
    with_maps = assess(backbone, images, metrics=[*alone, "attn.entropy"], look=Look(count=0)).models[0].findings
    for metric in alone:
        np.testing.assert_allclose(ours[metric].mean, with_maps[metric].mean, rtol=1e-9)
        assert ours[metric].axes == with_maps[metric].axes


MEASURED = [*(f"attn.{name}@all" for name in SETS), *(f"attn.{name}@0:1" for name in PAIRS)]


@pytest.mark.parametrize("name", ["vit", "vit_parallel_things", "vit_diff", "volo", "swin"])
def test_measures_of_heads_in_the_report_need_no_maps(name):
    """Each block, or pair, by itself; pairs of blocks with maps of different sizes are refused either way."""
    family = FAMILIES[name]
    backbone = family.make().double()
    found = [
        assess(backbone, [family.images()], metrics=metrics, measures=MEASURED, look=Look(count=0)).models[0]
        for metrics in (["output"], ["attn.entropy"])
    ]
    ours, theirs = ({spec: each.findings[spec] for spec in MEASURED if spec in each.findings} for each in found)
    assert ours.keys() == theirs.keys() and ours
    gaps, others = ({spec: each.gaps.get(spec) for spec in MEASURED} for each in found)
    assert gaps == others
    for spec, finding in ours.items():
        np.testing.assert_allclose(finding.per_image, theirs[spec].per_image, rtol=1e-7)
        assert finding.axes == theirs[spec].axes


def test_a_block_with_a_map_among_others_is_compared_with_them():
    """A remedy keeps its block's map; so do the blocks that it is compared with."""
    family = FAMILIES["vit"]
    backbone = family.make().double()
    install_remedies(backbone, ["gfsa@1"])
    across, entropy = (
        assess(backbone, [family.images()], metrics=["attn.across", *besides], look=Look(count=0)).models[0]
        for besides in ([], ["attn.entropy"])
    )
    assert np.isfinite(across.findings["attn.across"].mean).all()
    np.testing.assert_allclose(across.findings["attn.across"].mean, entropy.findings["attn.across"].mean, rtol=1e-9)


def test_the_report_of_heads_forms_no_map(monkeypatch):
    """Beyond the trial, where the maps of one image are there, block by block."""
    monkeypatch.setattr(products, "MAX_ELEMENTS", 200)
    family = FAMILIES["vit"]
    backbone, watch = family.make().double(), Shapes()
    with Watched(backbone, ("attention",), family.images(), heads=Heads(across=True)) as watched, watch:
        shown = watched.look(family.images(), None)
    assert {(0, 1, 2)} == shown.heads.keys() and not shown.maps
    assert not [shape for shape in watch.seen if shape[-2:] == (17, 17) and shape[:1] == (IMAGES,)]
