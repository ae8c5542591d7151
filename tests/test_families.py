"""Every family of timm transformers that is supported: what is captured, against tests/families.py and timm."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from families import CLASSES, FAMILIES, Family, attention_map, build, neurons, watched
from torch import Tensor

from errors import UserError
from models import DiverseViT, Needs, build_model
from models.heads import RegionHead
from regularizers import Diversity, parse_spec

EXACT = {"rtol": 0, "atol": 1e-12}
ATTENDING = [name for name, family in FAMILIES.items() if family.attends]
CLASSIFYING = [name for name, family in FAMILIES.items() if family.classifies]

every_family = pytest.mark.parametrize("name", FAMILIES)


def everything(family: Family, backbone: Any) -> Needs:
    """All that this family can show."""
    blocks = range(family.depth)
    return Needs(
        tokens=frozenset([-1, *blocks]),
        attention=frozenset(blocks if family.attends else ()),
        weights=frozenset((i, name) for i in blocks for name in neurons(family.blocks(backbone)[i])),
        patch_logits=family.classifies,
    )


def wrapped(name: str, **needs: Any) -> tuple[Family, Any, DiverseViT]:
    """A family, an untouched backbone, and a model that shows `needs` (or everything) of an equal one."""
    family, backbone = FAMILIES[name], build(name)
    wanted = Needs(**needs) if needs else everything(family, backbone)
    return family, backbone, DiverseViT(copy.deepcopy(backbone), wanted).eval()


def set_fused(backbone: Any, fused: bool) -> None:
    for module in backbone.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused


# ------------------------------------------------------------------------------------------------------------
# Capturing changes nothing


@pytest.mark.parametrize("fused", [True, False])
@every_family
def test_logits_are_the_plain_models(name: str, fused: bool) -> None:
    family, backbone = FAMILIES[name], build(name)
    set_fused(backbone, fused)
    images, needs = family.images(), everything(family, backbone)
    model = DiverseViT(copy.deepcopy(backbone), needs).eval()
    measuring = DiverseViT(copy.deepcopy(backbone), Needs(), needs).eval()
    plain = backbone(images)
    torch.testing.assert_close(model(images).logits, plain, **EXACT)
    torch.testing.assert_close(model(images, needs=Needs()).logits, plain, **EXACT)
    assert torch.equal(measuring(images).logits, plain)
    torch.testing.assert_close(measuring(images, needs=needs).logits, plain, **EXACT)
    assert torch.equal(measuring(images).logits, plain)  # fused again


@every_family
def test_a_training_pass_changes_nothing_else(name: str) -> None:
    """Neither the logits in training mode nor the statistics that it leaves behind."""
    family, backbone, model = wrapped(name)
    images = family.images()
    backbone.train()
    model.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        plain = backbone(images)
        torch.manual_seed(3)
        shown = model(images)
    torch.testing.assert_close(shown.logits, plain, **EXACT)
    for (buffer_name, mine), (_, theirs) in zip(
        model.backbone.named_buffers(), backbone.named_buffers(), strict=True
    ):
        torch.testing.assert_close(mine, theirs, **EXACT, msg=buffer_name)


# ------------------------------------------------------------------------------------------------------------
# Tokens


@every_family
def test_tokens_are_what_the_blocks_pass_on(name: str) -> None:
    family, backbone, model = wrapped(name)
    images = family.images()
    with watched(family.blocks(backbone)) as (expected, _):
        backbone(images)
    shown = model(images)
    assert model.layout is not None and model.layout.depth == family.depth
    assert sorted(shown.tokens) == sorted(shown.prefix_tokens) == [-1, *range(family.depth)]
    for layer, tokens in shown.tokens.items():
        prefix = family.prefix[layer + 1]
        assert shown.prefix_tokens[layer] == prefix, layer
        assert tokens.shape[:2] == (len(images), prefix + family.patches(layer)), layer
        torch.testing.assert_close(tokens, expected[layer], **EXACT)
    assert model.layout.patch_size == (family.pixels // family.sides[-1],) * 2


def intermediates(family: Family, backbone: Any, images: Tensor) -> dict[int, tuple[Tensor, Tensor | None]]:
    """Block -> (patches [B, P, D], prefix tokens if timm gives them), on timm's own path for feature extraction."""
    forward = backbone.forward_intermediates
    if hasattr(backbone, "reroll"):
        grids = forward(images, coarse=False, output_fmt="NHWC", intermediates_only=True)
        return {index: (grid.flatten(1, 2), None) for index, grid in enumerate(grids)}
    stages = family.stages(backbone)
    if len(stages) > 1:
        ends = [sum(len(stage) for stage in stages[: i + 1]) - 1 for i in range(len(stages))]
        grids = forward(images, intermediates_only=True)  # [B, D, h, w]
        return {end: (grid.flatten(2).mT, None) for end, grid in zip(ends, grids, strict=True)}
    options = {"output_fmt": "NLC", "intermediates_only": True}
    if "return_prefix_tokens" in inspect.signature(forward).parameters and family.prefix[-1]:
        return dict(enumerate(forward(images, return_prefix_tokens=True, **options)))
    return {index: (patches, None) for index, patches in enumerate(forward(images, **options))}


@every_family
def test_tokens_are_timms_intermediates(name: str) -> None:
    family, backbone, model = wrapped(name)
    images = family.images()
    shown = model(images)
    compared = intermediates(family, backbone, images)
    assert len(compared) >= 2 and max(compared) == family.depth - 1
    for index, (patches, prefix) in compared.items():
        tokens, count = shown.tokens[index], shown.prefix_tokens[index]
        mine = tokens[:, count:]
        if name == "hiera":  # its tokens are sorted by mask units
            mine = backbone.reroll(mine, index).flatten(1, 2)
        if name.startswith("pvt"):  # which ends a stage with a norm
            mine = next(stage.norm for stage in backbone.stages if family.blocks(backbone)[index] in stage.blocks)(
                mine
            )
        torch.testing.assert_close(mine, patches, **EXACT)
        if prefix is not None:
            torch.testing.assert_close(tokens[:, :count], prefix, **EXACT)


# ------------------------------------------------------------------------------------------------------------
# Before and after all blocks

EMBED = -2
WITHOUT_EMBEDDING = {name for name in FAMILIES if name.startswith(("naflex", "tnt", "deepseek", "twins", "levit"))}


def as_row(grid: Tensor, width: int) -> Tensor:
    """[B, N, D], or a grid [B, h, w, D] or [B, D, h, w] row by row, by its width D."""
    if grid.ndim == 3:
        return grid
    return (grid if grid.shape[3] == width else grid.permute(0, 2, 3, 1)).flatten(1, 2)


@every_family
def test_embed_and_norm_are_what_the_model_passes_on(name: str) -> None:
    """What patch_embed returns, and forward_features; models that have no patch_embed are refused."""
    family, backbone = FAMILIES[name], build(name)
    images = family.images()
    if name in WITHOUT_EMBEDDING:
        with pytest.raises(UserError, match="the layer embed is what patch_embed returns, which"):
            DiverseViT(copy.deepcopy(backbone), Needs(tokens=frozenset({EMBED})))
    wanted = {family.depth} if name in WITHOUT_EMBEDDING else {EMBED, family.depth}
    made: list[Any] = []
    if name not in WITHOUT_EMBEDDING:
        backbone.patch_embed.register_forward_hook(lambda module, args, output: made.append(output))
    with watched(family.blocks(backbone)) as (tokens, _):
        features = backbone.forward_features(images)
    model = DiverseViT(build(name), Needs(tokens=frozenset(wanted))).eval()
    shown = model(images)
    torch.testing.assert_close(shown.logits, backbone(images), **EXACT)
    assert sorted(shown.tokens) == sorted(shown.prefix_tokens) == sorted(wanted)
    last = as_row(features, backbone.num_features)
    torch.testing.assert_close(shown.tokens[family.depth], last, **EXACT)
    assert shown.prefix_tokens[family.depth] == last.shape[1] - family.patches(family.depth - 1)
    if made:
        embedded = made[0][0] if isinstance(made[0], tuple) else made[0]
        torch.testing.assert_close(shown.tokens[EMBED], as_row(embedded, tokens[-1].shape[-1]), **EXACT)
        assert shown.prefix_tokens[EMBED] == 0


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in WITHOUT_EMBEDDING])
def test_context_works_or_is_refused_in_words(name: str) -> None:
    """Of one scale it can be trained on; where the final features are wider than the embeddings it is refused."""
    family = FAMILIES[name]
    diversity = Diversity([parse_spec("patch.context=1")], depth=family.depth, grid=(family.sides[-1],) * 2)
    model = DiverseViT(build(name), Needs(**diversity.needs)).train()
    shown = model(family.images())
    if not family.one_scale:
        with pytest.raises(UserError, match=r"patch.context@embed:norm: layers embed and norm cannot be compared"):
            diversity.check(shown)
        return
    diversity.check(shown)
    (term,) = diversity(shown, model.weights).values()
    term.value.backward()
    assert term.value.isfinite() and model.layout is not None
    gradients = [parameter.grad for parameter in model.layout.blocks[0].parameters() if parameter.grad is not None]
    assert any(gradient.any() for gradient in gradients)


class Halves:
    """Labels of two regions: the first patches, and the others."""

    def __init__(self, patches: int) -> None:
        own = (torch.arange(patches) < patches // 3).double()
        self.regions = torch.stack([own, 1 - own])


@every_family
def test_the_region_head_reads_final_patches(name: str) -> None:
    """The mean of a region, or of the whole image, through a linear layer of its own; whatever the family."""
    family, backbone = FAMILIES[name], build(name)
    model = DiverseViT(backbone, Needs(patch_logits=True), head=RegionHead).eval()
    images = family.images()
    features = as_row(backbone.forward_features(images), backbone.num_features)
    patches = features[:, features.shape[1] - family.patches(family.depth - 1) :]
    shown = model(images)
    weight, bias = backbone.patch_head.weight, backbone.patch_head.bias
    assert model.predicts_jointly and shown.patch_logits is not None and shown.patch_logits.dtype == torch.float64
    torch.testing.assert_close(shown.patch_logits, (patches.mean(1) @ weight.T + bias)[:, None], **EXACT)
    labels = Halves(patches.shape[1])
    mixed = model(images, labels=labels).patch_logits
    for region, mask in enumerate(labels.regions):
        inside = torch.stack([patches[:, p] for p in range(patches.shape[1]) if mask[p]]).sum(0)
        expected = inside / (mask.sum() + 1e-4) @ weight.T + bias
        torch.testing.assert_close(mixed[:, region], expected, **EXACT)


@every_family
def test_the_region_head_has_the_models_own_dropout(name: str) -> None:
    """Anew for the patches; none where the model was built without, and none in evaluation."""
    family = FAMILIES[name]
    model = DiverseViT(build(name), Needs(patch_logits=True), head=RegionHead)
    found = [module for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    calls = []
    for module in found:
        module.register_forward_hook(lambda module, args, output: calls.append(args[0].shape))
    model.train()(family.images())
    assert calls[-1] == (len(family.images()), 1, model.backbone.num_features)  # after all of the model's own


# ------------------------------------------------------------------------------------------------------------
# Attention


@pytest.mark.parametrize("name", ATTENDING)
def test_attention_maps_are_the_softmax(name: str) -> None:
    family, backbone, model = wrapped(name)
    images = family.images()
    with watched(family.blocks(backbone)) as (_, calls):
        backbone(images)
    shown = model(images)
    assert list(shown.attention) == list(range(family.depth))
    for index, block in enumerate(family.blocks(backbone)):
        expected = attention_map(block, calls[index])
        assert expected.std().item() > 1e-3  # not trivially uniform
        torch.testing.assert_close(shown.attention[index], expected, **EXACT)
        rows = expected.sum(dim=-1)
        torch.testing.assert_close(rows, torch.ones_like(rows), **EXACT)


@pytest.mark.parametrize(
    "name", [name for name in ATTENDING if name != "tnt"]
)  # which fails in timm: it drops in place
def test_attention_maps_are_seen_before_dropout(name: str) -> None:
    family, _, model = wrapped(name, attention=frozenset(range(FAMILIES[name].depth)))
    for module_name, module in model.named_modules():
        if module_name.endswith("attn_drop"):
            module.p = 0.5
    model.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        shown = model(family.images())
    for attention in shown.attention.values():
        rows = attention.sum(dim=-1)
        torch.testing.assert_close(rows, torch.ones_like(rows), **EXACT)


# ------------------------------------------------------------------------------------------------------------
# Weights


@every_family
def test_weights_are_the_layers(name: str) -> None:
    """x W^T is what the layer does to x, but for its bias."""
    family, _, model = wrapped(name)
    generator = torch.Generator().manual_seed(4)
    for index, block in enumerate(family.blocks(model.backbone)):
        for kind, layers in neurons(block).items():
            matrices = [matrix for stack in model.weights(index, [kind]) for matrix in stack]
            assert len(matrices) == len(layers), kind
            for matrix, (width, layer) in zip(matrices, layers, strict=True):
                x = torch.randn(4, width, generator=generator, dtype=torch.float64)
                torch.testing.assert_close(x @ matrix.T, layer(x) - layer(torch.zeros_like(x)), **EXACT)


@every_family
def test_weights_cover_their_parameters_once(name: str) -> None:
    """The gradient of their sum is 1 in every element of some of the block's parameters, and 0 elsewhere."""
    family, _, model = wrapped(name)
    for index, block in enumerate(family.blocks(model.backbone)):
        matrices = model.weights(index, [*neurons(block)])
        model.zero_grad()
        torch.stack([matrix.sum() for matrix in matrices]).sum().backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        assert all(torch.equal(gradient, torch.ones_like(gradient)) for gradient in gradients.values())
        assert sum(gradient.numel() for gradient in gradients.values()) == sum(m.numel() for m in matrices)
        mine = {id(p) for p in block.parameters()}
        assert all(id(model.get_parameter(n)) in mine for n in gradients)


# ------------------------------------------------------------------------------------------------------------
# Gradients


def specs(family: Family, name: str) -> list[str]:
    """The terms that apply to a family."""
    layers = "2-3" if name == "volo" else "all"  # outlook attention has neither queries nor keys
    found = ["patch.cosine@all", f"weight.so@{layers}", f"weight.cno@{layers}", "weight.cosine:proj,fc1,fc2@all"]
    found += ["patch.contrastive@first:last"] if family.one_scale else []
    return found + (["attn.cosine@all"] if family.attends else [])


def terms(model: DiverseViT, diversity: Diversity, images: Tensor) -> dict[str, Tensor]:
    """The value of every term, with the same random draws each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        shown = model(images)
        values = {term: value for term, (value, _) in diversity(shown, model.weights).items()}
    if shown.patch_logits is not None:
        values["mixing"] = shown.patch_logits.logsumexp(dim=-1).mean()
    return values


def training_model(name: str) -> tuple[Family, DiverseViT, Diversity]:
    family, backbone = FAMILIES[name], build(name)
    diversity = Diversity([parse_spec(f"{spec}=1") for spec in specs(family, name)], depth=family.depth)
    model = DiverseViT(backbone, Needs(**diversity.needs) | Needs(patch_logits=family.classifies))
    return family, model.train(), diversity


@every_family
def test_gradients_of_terms_are_finite_differences(name: str) -> None:
    """Along one random direction in the space of all parameters."""
    family, model, diversity = training_model(name)
    images, parameters = family.images(), list(model.parameters())
    generator = torch.Generator().manual_seed(5)
    direction = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters]
    length = sum(d.square().sum().item() for d in direction) ** 0.5
    start, step = [p.detach().clone() for p in parameters], 1e-5 / length

    def moved(distance: float) -> dict[str, Tensor]:
        with torch.no_grad():
            for parameter, d, origin in zip(parameters, direction, start, strict=True):
                parameter.copy_(origin + distance * d)
            return terms(model, diversity, images)

    slopes = {}
    for term, value in terms(model, diversity, images).items():
        gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
        pairs = zip(gradients, direction, strict=True)
        slopes[term] = torch.stack([(g * d).sum() for g, d in pairs if g is not None]).sum() / length
    above, below = moved(step), moved(-step)
    assert len(slopes) == len(specs(family, name)) + family.classifies
    for term, slope in slopes.items():
        difference = (above[term] - below[term]) / 2e-5
        assert slope != 0, term
        torch.testing.assert_close(slope, difference, rtol=1e-5, atol=1e-9, msg=lambda text, t=term: f"{t}: {text}")


@every_family
def test_everything_captured_requires_grad_in_training(name: str) -> None:
    family, _, model = wrapped(name)
    shown = model.train()(family.images())
    captured = [*shown.tokens.values(), *shown.attention.values()]
    assert len(captured) == family.depth * (2 if family.attends else 1) + 1
    assert all(tensor.requires_grad for tensor in captured)
    assert (shown.patch_logits is not None) == family.classifies
    assert shown.patch_logits is None or shown.patch_logits.requires_grad


def shifted(block: Any, value: Any, delta: Tensor) -> Any:
    """What goes into, or comes out of, a block, with delta [B, N, D] added to its tokens."""
    several = isinstance(value, tuple)
    at = 1 if several and hasattr(block, "attn_out") else 0
    tokens = value[at] if several else value
    channels_first = tokens.ndim == 4 and hasattr(block.attn, "use_conv")
    moved = tokens + (delta.mT if channels_first else delta).reshape(tokens.shape)
    return (*value[:at], moved, *value[at + 1 :]) if several else moved


@every_family
def test_gradient_at_the_tokens_is_the_whole_gradient(name: str) -> None:
    """d loss / d tokens, which gradient diversity asks for, is what moving the tokens does to the loss."""
    family, backbone, model = wrapped(name, tokens=frozenset([-1, *range(FAMILIES[name].depth)]))
    images, blocks = family.images(), family.blocks(backbone)

    def loss_of(logits: Tensor) -> Tensor:
        return (logits.log_softmax(dim=-1) * torch.linspace(-1, 1, CLASSES, dtype=torch.float64)).sum()

    def moved(layer: int, delta: Tensor) -> Tensor:
        if layer == -1:
            handle = blocks[0].register_forward_pre_hook(lambda block, args: shifted(block, args, delta))
        else:
            handle = blocks[layer].register_forward_hook(lambda block, args, output: shifted(block, output, delta))
        with torch.no_grad():
            loss = loss_of(backbone(images))
        handle.remove()
        return loss

    shown = model(images)
    gradients = torch.autograd.grad(loss_of(shown.logits), list(shown.tokens.values()))
    for layer, gradient in zip(shown.tokens, gradients, strict=True):
        generator = torch.Generator().manual_seed(layer + 1)
        delta = 1e-7 * torch.randn(gradient.shape, generator=generator, dtype=torch.float64)
        difference = (moved(layer, delta) - moved(layer, -delta)) / 2
        torch.testing.assert_close((gradient * delta).sum(), difference, rtol=1e-5, atol=1e-12)
    assert model.layout is not None
    last = gradients[-1][:, shown.prefix_tokens[family.depth - 1] :]
    assert model.layout.patches_reach_label == last.any()


@every_family
def test_gradient_checkpointing_changes_nothing(name: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        family, model, diversity = training_model(name)
        try:
            model.backbone.set_grad_checkpointing(checkpointing)
        except AssertionError:
            assert "twins" in name or name == "convit"  # timm cannot
            return
        torch.stack(list(terms(model, diversity, family.images()).values())).sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 10
    for parameter, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][parameter], gradient, rtol=1e-9, atol=1e-12, msg=parameter)


# ------------------------------------------------------------------------------------------------------------
# Patches through the head


@pytest.mark.parametrize("name", CLASSIFYING)
def test_patch_logits_are_the_heads_answer_to_one_patch(name: str) -> None:
    family, backbone, model = wrapped(name)
    shown = model(family.images())
    last = family.depth - 1
    patches = shown.tokens[last][:, shown.prefix_tokens[last] :]
    expected = family.classify(backbone, patches.flatten(0, 1)).unflatten(0, patches.shape[:2])
    assert expected.std().item() > 1e-2
    assert shown.patch_logits is not None and shown.patch_logits.shape == (*patches.shape[:2], CLASSES)
    torch.testing.assert_close(shown.patch_logits, expected, **EXACT)


def test_patch_logits_in_distilled_training_are_the_class_tokens() -> None:
    family, backbone, model = wrapped("deit_distilled")
    model.backbone.set_distilled_training(True)
    shown = model.train()(family.images())
    patches = shown.tokens[2][:, 2:]
    assert shown.dist_logits is not None and shown.patch_logits is not None
    torch.testing.assert_close(shown.patch_logits, backbone.head(backbone.norm(patches)), **EXACT)


# ------------------------------------------------------------------------------------------------------------
# Checks and refusals


@every_family
def test_check_accepts_what_works(name: str) -> None:
    family, backbone = FAMILIES[name], build(name).float()
    model = DiverseViT(backbone, everything(family, backbone))
    model.check((3, family.pixels, family.pixels), CLASSES, model.needs)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ATTENDING])
def test_maps_that_no_module_sees_are_refused(name: str) -> None:
    with pytest.raises(
        UserError, match=r"cannot see the map of \w+ at block 0: its \w+ passes its softmax to no module"
    ):
        DiverseViT(build(name), Needs(attention=frozenset({0})))


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in CLASSIFYING])
def test_heads_that_mix_images_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"cannot classify single patches: \w+ has batch normalisation"):
        DiverseViT(build(name), Needs(patch_logits=True))


def test_missing_matrices_are_refused() -> None:
    with pytest.raises(
        UserError, match="find no q in block 0 of VOLO: its OutlookAttention and MLP have v, proj, fc1"
    ):
        DiverseViT(build("volo"), Needs(weights=frozenset({(0, "q")})))


@pytest.mark.parametrize(
    "needs",
    [
        Needs(tokens=frozenset({0})),
        Needs(attention=frozenset({0})),
        Needs(weights=frozenset({(0, "q")})),
        Needs(patch_logits=True),
    ],
)
def test_models_without_blocks_are_refused(needs: Needs) -> None:
    with pytest.raises(
        UserError, match=r"ResNet .* looked for blocks with\s+attention .*attn.* in its blocks, layers"
    ):
        DiverseViT(build_model("resnet10t", num_classes=CLASSES), needs)


# ------------------------------------------------------------------------------------------------------------
# Beyond the families above: to be refused, or right


@pytest.mark.parametrize("name", ["seresnext26ts", "halonet26t", "cs3darknet_focus_s"])
def test_convolutional_blocks_with_a_module_called_attn_are_refused(name: str) -> None:
    """Squeeze-and-excitation, or nothing at all, is called attn there."""
    with pytest.raises(UserError, match="is not a vision transformer"):
        DiverseViT(build_model(name, num_classes=CLASSES), Needs(tokens=frozenset({-1, 0})))


@pytest.mark.parametrize("name", ["coatnet_pico_rw_224", "tiny_vit_5m_224"])
def test_projections_fused_head_by_head(name: str) -> None:
    model = DiverseViT(build_model(name, num_classes=CLASSES), Needs(weights=frozenset({(0, "q")})))
    assert model.layout is not None
    attn: Any = model.layout.blocks[0].attn
    per_head = attn.qkv.weight.flatten(1).unflatten(0, (attn.num_heads, -1))  # [H, n / H, d]
    third = per_head.shape[1] // 3
    sizes = [attn.key_dim, attn.key_dim, attn.val_dim] if hasattr(attn, "val_dim") else [third] * 3
    for kind, expected in zip("qkv", per_head.split(sizes, dim=1), strict=True):
        assert torch.equal(*model.weights(0, [kind]), expected.flatten(0, 1)[None]), kind


def test_global_queries_have_no_matrix_in_their_block() -> None:
    """GCViT's blocks 1, 3, ... take queries from elsewhere: their qkv holds keys and values."""
    model = DiverseViT(build_model("gcvit_xxtiny", num_classes=CLASSES), Needs(weights=frozenset({(1, "k")})))
    assert model.layout is not None
    keys, values = model.layout.blocks[1].attn.qkv.weight.chunk(2)
    assert torch.equal(*model.weights(1, ["k", "v"]), torch.stack([keys, values]))
    with pytest.raises(UserError, match="find no q in block 1"):
        model.weights(1, ["q"])
