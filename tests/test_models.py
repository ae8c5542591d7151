"""Names, state dicts, hooks and what they capture."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from conftest import RECIPE, TINY, random_batch
from timm.utils import ModelEmaV3

from errors import UserError
from models import VARIANTS, DiverseViT, Needs, build_model, check_name, find_layout

STOCK = {"tiny": (192, 12), "small": (384, 12), "base": (768, 12)}

# ------------------------------------------------------------------------------------------------------------
# Names and weights


@pytest.mark.parametrize("size", STOCK)
def test_the_suffix_changes_nothing_but_the_name(size):
    stock, diverse = f"deit_{size}_patch16_224", f"deit_{size}_patch16_224_diverse"
    models = []
    for name in (stock, diverse):
        torch.manual_seed(3)
        models.append(build_model(name, num_classes=10))
    for (name, one), (other_name, other) in zip(
        models[0].state_dict().items(), models[1].state_dict().items(), strict=True
    ):
        assert name == other_name and torch.equal(one, other)
    assert (models[0].embed_dim, len(models[0].blocks)) == STOCK[size]


def test_24_block_small_has_the_published_size():
    for name in ("deit_small_layer24_patch16_224", "deit_small_layer24_patch16_224_diverse"):
        model = build_model(name)
        assert sum(p.numel() for p in model.parameters()) == 43_344_232
        assert (model.embed_dim, len(model.blocks), model.blocks[0].attn.num_heads) == (384, 24, 6)
    base = build_model("deit_base_layer24_patch16_224", num_classes=10)
    assert (base.embed_dim, len(base.blocks), base.blocks[0].attn.num_heads) == (768, 24, 12)
    with pytest.raises(UserError, match="no pretrained weights for deit_small_layer24"):
        timm.create_model("deit_small_layer24_patch16_224", pretrained=True)


def test_weights_go_to_timm_and_back_by_name(tmp_path):
    mine = build_model("deit_tiny_patch16_224_diverse")
    theirs = timm.create_model("deit_tiny_patch16_224")
    theirs.load_state_dict(mine.state_dict(), strict=True)
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(theirs.eval()(images), mine.eval()(images))
    fresh = timm.create_model("deit_tiny_patch16_224")
    mine.load_state_dict(fresh.state_dict(), strict=True)


def test_initialisation_is_timms_but_for_the_class_token():
    torch.manual_seed(5)
    theirs = timm.create_model("deit_tiny_patch16_224")
    after_theirs = torch.rand(3)
    torch.manual_seed(5)
    mine = build_model("deit_tiny_patch16_224")
    assert torch.equal(torch.rand(3), after_theirs)  # the global stream is where it would have been
    for name, value in mine.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name]) == (name != "cls_token")
    tokens = torch.cat([build_model("deit_tiny_patch16_224").cls_token.flatten() for _ in range(5)])
    assert 0.017 < tokens.std().item() < 0.023  # the reference's truncated normal; timm's has 1e-6


def test_unknown_names_and_arguments():
    with pytest.raises(UserError, match=r"unknown model 'deit_smal_patch16_224'. Did you mean deit_small"):
        check_name("deit_smal_patch16_224")
    with pytest.raises(UserError, match="cannot be built with dept=3"):
        build_model("deit_tiny_patch16_224", dept=3)
    assert set(VARIANTS) <= set(timm.list_models())


def test_image_size_is_left_to_models_that_take_it():
    assert build_model("deit_tiny_patch16_224", img_size=32, patch_size=4).patch_embed.num_patches == 64
    assert build_model("resnet10t", img_size=16, num_classes=3).num_classes == 3  # takes images as they come


# ------------------------------------------------------------------------------------------------------------
# Capture


def manual_pass(backbone, images):
    """Tokens and attention maps recomputed layer by layer from the block's own weights."""
    x = backbone._pos_embed(backbone.patch_embed(images))
    tokens, maps = {-1: x}, {}
    for index, block in enumerate(backbone.blocks):
        attn = block.attn
        normed = block.norm1(x)
        b, n, d = normed.shape
        q, k, _ = (attn.qkv(normed)).reshape(b, n, 3, attn.num_heads, d // attn.num_heads).permute(2, 0, 3, 1, 4)
        maps[index] = torch.softmax(torch.einsum("bhid,bhjd->bhij", q, k) / (d // attn.num_heads) ** 0.5, dim=-1)
        x = block(x)
        tokens[index] = x
    return tokens, maps


@pytest.mark.parametrize(
    "name", ["deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "vit_tiny_patch16_224"]
)
def test_capture_equals_a_manual_pass(name):
    torch.manual_seed(0)
    backbone = build_model(name, **TINY).double().eval()
    images = random_batch()[0].double()
    plain = backbone(images)
    model = DiverseViT(
        backbone, Needs(tokens=frozenset({-1, 0, 1, 2}), attention=frozenset({0, 2}), patch_logits=True)
    ).eval()
    shown = model(images)
    tokens, maps = manual_pass(backbone, images)
    torch.testing.assert_close(shown.logits, plain, rtol=0, atol=1e-12)
    assert sorted(shown.tokens) == [-1, 0, 1, 2] and sorted(shown.attention) == [0, 2]
    for layer, value in shown.tokens.items():
        torch.testing.assert_close(value, tokens[layer], rtol=0, atol=1e-12)
    for layer, value in shown.attention.items():
        torch.testing.assert_close(value, maps[layer], rtol=0, atol=1e-12)
    prefix = 2 if "distilled" in name else 1
    assert set(shown.prefix_tokens.values()) == {prefix} and shown.patch_logits.shape == (4, 16, 5)
    heads = [backbone.head, backbone.head_dist] if prefix == 2 else [backbone.head]  # a distilled model averages
    by_hand = sum(head(backbone.norm(tokens[2])) for head in heads)[:, prefix:] / len(heads)
    torch.testing.assert_close(shown.patch_logits, by_hand, rtol=0, atol=1e-12)


def test_average_pooled_patches_pass_the_models_own_head():
    torch.manual_seed(0)
    backbone = build_model("vit_tiny_patch16_224", **TINY, global_pool="avg", class_token=False).double().eval()
    shown = DiverseViT(backbone, Needs(tokens=frozenset({2}), patch_logits=True))(random_batch()[0].double())
    by_hand = backbone.head(backbone.fc_norm(backbone.norm(shown.tokens[2])))
    assert shown.prefix_tokens == {2: 0}
    torch.testing.assert_close(shown.patch_logits, by_hand, rtol=0, atol=1e-12)


class RegionHead:
    """A patch head with a layer of its own, which mixes the patches as the labels say."""

    joint = False

    def __init__(self, layout):
        self.layout = layout
        self.attach(layout.backbone)

    @staticmethod
    def attach(backbone):
        backbone.patch_head = torch.nn.Linear(24, 7)

    def __call__(self, features, labels=None):
        patches = features[:, self.layout.final_prefix_tokens :]
        return self.layout.backbone.patch_head(patches if labels is None else patches * labels[..., None])


def test_a_patch_head_of_ones_own(tiny):
    """It sees final features and labels; its layer is the backbone's, in the average too, and is trained."""
    backbone = build_model("deit_tiny_patch16_224", **TINY)
    model = DiverseViT(backbone, Needs(patch_logits=True), head=RegionHead)
    images, shares = random_batch()[0], torch.rand(4, 16)
    shown = model(images, labels=shares)
    patches = backbone.forward_features(images)[:, 1:]
    torch.testing.assert_close(shown.patch_logits, backbone.patch_head(patches * shares[..., None]))
    torch.testing.assert_close(model(images).patch_logits, backbone.patch_head(patches))
    assert "backbone.patch_head.weight" in model.state_dict()
    shown.patch_logits.sum().backward()
    assert backbone.patch_head.weight.grad.any() and backbone.blocks[2].mlp.fc1.weight.grad.any()

    average = ModelEmaV3(model).module
    with torch.no_grad():
        average.backbone.patch_head.weight.zero_()
        average.backbone.patch_head.bias.zero_()
    assert not average(images).patch_logits.any() and model(images).patch_logits.any()
    assert not hasattr(
        DiverseViT(build_model("deit_tiny_patch16_224", **TINY), head=RegionHead).backbone, "patch_head"
    )


def test_the_models_own_head_takes_no_notice_of_labels(tiny):
    model, _ = tiny("patch.mixing=1")
    images = random_batch()[0]
    assert torch.equal(model(images, labels=torch.zeros(4, 16)).patch_logits, model(images).patch_logits)


def test_without_needs_nothing_is_hooked():
    backbone = build_model("deit_tiny_patch16_224", **TINY)
    fused = [block.attn.fused_attn for block in backbone.blocks]
    model = DiverseViT(backbone)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert [block.attn.fused_attn for block in backbone.blocks] == fused
    images = random_batch()[0]
    backbone.eval()
    shown = model(images)
    assert torch.equal(shown.logits, backbone(images))
    assert shown.patch_logits is None and shown.dist_logits is None and not shown.tokens and not shown.attention


def test_only_what_is_needed_is_hooked(tiny):
    model, _ = tiny("attn.cosine@1=1", "patch.cosine@last=1")
    hooked = {name for name, m in model.backbone.named_modules() if m._forward_hooks or m._forward_pre_hooks}
    assert hooked == {"blocks.1.attn.attn_drop", "blocks.2"}
    fused = timm.layers.use_fused_attn()
    assert [bool(block.attn.fused_attn) for block in model.backbone.blocks] == [bool(fused), False, bool(fused)]


def test_nothing_stays_on_the_module(tiny):
    model, _ = tiny(*RECIPE)
    model(random_batch()[0])
    assert not model._sink and not model._wanted
    assert not model(random_batch()[0], needs=Needs()).tokens
    with pytest.raises(AssertionError, match="Input height"):
        model(torch.zeros(1, 3, 7, 7))
    assert not model._sink and not model._wanted
    copy.deepcopy(model)


def test_measuring_leaves_training_alone():
    """What is only measured is captured on demand, and training keeps its fused attention."""
    backbone = build_model("deit_tiny_patch16_224", **TINY)
    fused = [block.attn.fused_attn for block in backbone.blocks]
    measured = Needs(tokens=frozenset({2}), attention=frozenset({0, 1}))
    model = DiverseViT(backbone, Needs(attention=frozenset({1})), measured).eval()
    images = random_batch()[0]
    trained = model(images)
    assert not trained.tokens and list(trained.attention) == [1]
    shown = model(images, needs=measured)
    assert list(shown.tokens) == [2] and list(shown.attention) == [0, 1]
    torch.testing.assert_close(shown.logits, trained.logits)
    assert [block.attn.fused_attn for block in backbone.blocks] == [fused[0], False, fused[2]]


class SigmoidAttention(torch.nn.Module):
    """Attention whose map is not a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(24, 72)
        self.attn_drop = torch.nn.Dropout(0.0)

    def forward(self, x, **kwargs):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.attn_drop((q @ k.mT).sigmoid()[:, None])[:, 0] @ v


def test_what_is_not_as_terms_take_it_for_is_refused():
    backbone = build_model("deit_tiny_patch16_224", **TINY)
    backbone.num_prefix_tokens = 3
    model = DiverseViT(backbone, Needs(tokens=frozenset({0})))
    with pytest.raises(UserError, match=r"at layer 0 for \[B, N, D\] with 3 prefix tokens.*they are \[2, 17, 24\]"):
        model.check((3, 32, 32), 5, model.needs)

    backbone = build_model("deit_tiny_patch16_224", **TINY)
    backbone.blocks[1].attn = SigmoidAttention()
    model = DiverseViT(backbone, Needs(attention=frozenset({1})))
    with pytest.raises(UserError, match=r"at block 1 for a softmax \[..., H, n, m\].*its rows do not sum to 1"):
        model.check((3, 32, 32), 5, model.needs)


def test_check_refuses_other_images_and_classes(tiny):
    model, _ = tiny(*RECIPE)
    model.train()
    model.check((3, 32, 32), 5, model.needs)
    assert model.training
    with pytest.raises(UserError, match=r"cannot take images of 3 x 36 x 36 pixels: Input height"):
        model.check((3, 36, 36), 5, model.needs)
    with pytest.raises(UserError, match=r"returns \[5\] numbers an image, the data has 7 classes"):
        model.check((3, 32, 32), 7, model.needs)


def test_the_ema_copy_captures_for_itself(tiny):
    """Hooks are rebound by deepcopy: the average's forward pass must not write into the trained model."""
    model, _ = tiny("patch.cosine@last=1")
    ema = ModelEmaV3(model)
    with torch.no_grad():
        for parameter in ema.module.parameters():
            parameter.zero_()
    images = random_batch()[0]
    assert ema.module(images).tokens[2].abs().sum() == 0
    assert model(images).tokens[2].abs().sum() > 0
    assert list(ema.module.backbone.state_dict()) == list(model.backbone.state_dict())


def test_a_hook_that_never_fires_is_an_error(tiny):
    model, _ = tiny("attn.cosine@1=1")
    model.backbone.blocks[1].attn.fused_attn = True  # as a module that bypasses its dropout would
    with pytest.raises(UserError, match="the attention of VisionTransformer at layer 1 never arrived"):
        model(random_batch()[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_capture(tiny, dtype):
    """Autocast's maps and tokens become float32 terms, near those of a float32 pass."""
    model, diversity = tiny("patch.cosine@all=1", "patch.contrastive=1", "attn.cosine@all=1", "weight.cno=1")
    images = random_batch()[0]
    with torch.autocast("cpu", dtype=dtype):
        captured = model(images)
    assert {value.dtype for value in captured.attention.values()} <= {dtype, torch.float32}
    assert captured.logits.dtype == dtype
    for seen, exact in zip(captured.attention.values(), model(images).attention.values(), strict=True):
        torch.testing.assert_close(seen.float(), exact, rtol=0, atol=2e-3)
    torch.manual_seed(0)
    half = diversity(captured, model.weights)
    torch.manual_seed(0)
    full = diversity(model(images), model.weights)
    for name, term in half.items():
        assert term.value.dtype == torch.float32
        assert term.value.item() == pytest.approx(full[name].value.item(), rel=2e-2), name
    sum(term.value for term in half.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("deit_tiny_patch16_224", TINY),
        ("swin_tiny_patch4_window7_224", {"img_size": 32, "embed_dim": 12, "depths": (2, 2), "num_heads": (2, 3)}),
        (
            "levit_conv_128s",
            {"img_size": 64, "embed_dim": (16, 24, 32), "num_heads": (2, 3, 4), "depth": (1, 1, 1)},
        ),
    ],
)
def test_channels_last_capture(name, overrides):
    torch.manual_seed(0)
    backbone = build_model(name, **{"num_classes": 5, **overrides}).double().eval()
    depth = find_layout(backbone).depth
    attention = frozenset() if "levit" in name else frozenset(range(depth))
    model = DiverseViT(backbone, Needs(tokens=frozenset(range(-1, depth)), attention=attention))
    images = random_batch(pixels=overrides["img_size"])[0].double()
    expected = model(images)
    shown = model.to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last))
    torch.testing.assert_close(shown.logits, expected.logits, rtol=0, atol=1e-12)
    for ours, theirs in ((shown.tokens, expected.tokens), (shown.attention, expected.attention)):
        assert list(ours) == list(theirs)
        for layer, value in ours.items():
            torch.testing.assert_close(value, theirs[layer], rtol=0, atol=1e-12)


def test_what_arrives_without_gradient_is_an_error(tiny):
    """Reentrant checkpointing runs the blocks without a graph: their tokens would train nothing."""
    model, _ = tiny("patch.cosine@0=1")
    blocks = model.backbone.blocks
    blocks.forward = lambda x: torch.utils.checkpoint.checkpoint(
        lambda tokens: blocks[2](blocks[1](blocks[0](tokens))), x, use_reentrant=True
    )
    with pytest.raises(UserError, match=r"the tokens of VisionTransformer at layer 0 arrived without gradient"):
        model(random_batch()[0])
    del blocks.forward
    with torch.no_grad():
        assert model(random_batch()[0]).tokens[0].shape == (4, 17, 24)  # measuring needs none

    model, _ = tiny("attn.cosine@0=1")
    model.requires_grad_(False)
    with pytest.raises(UserError, match="at layer 0 arrived without gradient, so its terms would train nothing"):
        model(random_batch()[0])


def test_gradient_checkpointing_changes_nothing(tiny):
    grads = []
    for checkpointing in (False, True):
        model, diversity = tiny("patch.cosine@all=1", "attn.cosine@0=1")
        model.backbone.set_grad_checkpointing(checkpointing)
        model.train()
        shown = model(random_batch()[0])
        sum(term.value for term in diversity(shown, model.weights).values()).backward()
        assert not model._sink
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1]) > 10
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


# ------------------------------------------------------------------------------------------------------------
# Layouts


def test_projections_are_views_of_the_parameters(tiny):
    model, _ = tiny("weight.cosine=1")
    (q, k, v) = (torch.cat(model.weights(1, [name])).squeeze(0) for name in "qkv")
    weight = model.backbone.blocks[1].attn.qkv.weight
    assert torch.equal(torch.cat([q, k, v]), weight) and q.shape == (24, 24)
    q.sum().backward()
    assert torch.equal(weight.grad[:24], torch.ones(24, 24)) and not weight.grad[24:].any()


def test_projections_kept_apart():
    backbone = build_model("eva02_base_patch14_224", img_size=28, embed_dim=24, depth=1, num_heads=2, num_classes=3)
    attn = backbone.blocks[0].attn
    for name, layer in (("q", attn.q_proj), ("k", attn.k_proj), ("v", attn.v_proj)):
        (matrix,) = find_layout(backbone).weights(0, [name])
        assert matrix.data_ptr() == layer.weight.data_ptr() and torch.equal(matrix[0], layer.weight)


@pytest.mark.parametrize(
    ("needs", "name", "overrides", "message"),
    [
        (Needs(tokens=frozenset({0})), "resnet10t", {}, "ResNet is not a vision transformer .*: looked for blocks"),
        (
            Needs(patch_logits=True),
            "levit_128s",
            {},
            "cannot classify single patches: LevitDistilled has batch normalisation in its head",
        ),
        (
            Needs(weights=frozenset({(0, "q")})),
            "volo_d1_224",
            {},
            "find no q in block 0 of VOLO: its OutlookAttention and MLP have v, proj, fc1, fc2; choose",
        ),
    ],
)
def test_unsupported_backbones_are_refused(needs, name, overrides, message):
    with pytest.raises(UserError, match=message):
        DiverseViT(build_model(name, **overrides), needs)


def test_blocks_without_a_visible_map_or_projections_are_refused():
    class Opaque(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = torch.nn.ModuleList([torch.nn.Module()])
            self.blocks[0].attn = torch.nn.Module()
            self.blocks[0].attn.proj = torch.nn.Linear(2, 2)
            self.patch_embed = torch.nn.Module()
            self.patch_embed.patch_size = 4
            self.num_prefix_tokens = 0

    with pytest.raises(UserError, match=r"patches are labelled by Opaque.feature_info"):
        assert find_layout(Opaque()).patch_size
    with pytest.raises(
        UserError, match=r"cannot see the map of Opaque at block 0: its Module passes its softmax to no"
    ):
        DiverseViT(Opaque(), Needs(attention=frozenset({0})))
    with pytest.raises(UserError, match=r"find no q in block 0 of Opaque: its Module and MLP have proj; choose"):
        DiverseViT(Opaque(), Needs(weights=frozenset({(0, "q")})))
