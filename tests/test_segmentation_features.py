"""The maps that timm's families give, against hooks of our own, and what necks make of them, against loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from families import FAMILIES, watched
from segmenters import CLASSES, SMALL, SWIN, TINY, bilinear, images, randomised, segmenter
from torch import nn

from errors import UserError
from segmentation.features import build_backbone, find_maps
from segmentation.necks import DeconvNeck, MultiLevelNeck, Neck, ScaleNeck
from segmentation.network import build_segmenter

# What timm 1.0.31 gives. Sizes are free where the constructor takes dynamic_img_size, or the family has no table.
ANY_SIZE = [
    *("vit", "vit_gap", "vit_map", "vit_parallel_things", "deit", "deit_distilled", "deit3", "eva", "eva02"),
    *("eva02_base", "dinov2", "dinov2_reg", "dinov3", "siglip", "naflex", "naflex_rope", "xcit", "deepseek"),
]
ONE_SIZE = ["beit", "beit_shared", "beitv2", "relpos", "relpos_cls", "cait", "convit", "tnt", "hiera"]
LINEAR_ONLY = ["swin", "swinv2", "swinv2_cr", "pvt_v2", "twins_svt", "volo", "levit", "mvitv2"]  # two stages here
FOUR_STAGES: dict[str, dict[str, Any]] = {
    "swin_tiny_patch4_window7_224": SWIN,
    "swinv2_tiny_window8_256": SWIN,
    "swinv2_cr_tiny_ns_224": {key: value for key, value in SWIN.items() if key != "window_size"},
    "pvt_v2_b0": {"embed_dims": (8, 8, 16, 16), "num_heads": (1, 1, 2, 2), "depths": (1, 1, 1, 1)},
    "twins_svt_small": {"embed_dims": (8, 8, 16, 16), "num_heads": (1, 1, 2, 2), "depths": (1, 1, 1, 1)},
    "convnext_atto": {"dims": (8, 8, 16, 16), "depths": (1, 1, 1, 1)},
}


def free(name: str) -> Any:
    """A family's tiny backbone, for images of any size where it can be."""
    try:
        return FAMILIES[name].make(dynamic_img_size=True)
    except TypeError:
        return FAMILIES[name].make()


@pytest.mark.parametrize("name", [*ANY_SIZE, *ONE_SIZE])
def test_maps_of_plain_families(name: str) -> None:
    family, pixels = FAMILIES[name], FAMILIES[name].pixels
    backbone = free(name).double().eval()
    maps = find_maps(backbone, (pixels, pixels))
    assert (maps.only is None) == (name in ANY_SIZE)
    if maps.hierarchical:
        assert maps.layers == (0, 1, 2, 3)
        return
    assert maps.layers == (0, 0, 1, 2)  # the quarters of three blocks
    batch = family.images()
    with watched(family.blocks(backbone)) as (tokens, _):
        found = maps(backbone, batch)
    for layer, features in zip(maps.layers, found, strict=True):
        prefix, side = family.prefix[layer + 1], family.sides[layer]
        expected = tokens[layer][:, prefix:].mT.unflatten(-1, (side, side))
        torch.testing.assert_close(features, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", FOUR_STAGES)
def test_maps_of_hierarchical_families(name: str) -> None:
    torch.manual_seed(0)
    backbone = build_backbone(name, (64, 64), **FOUR_STAGES[name])
    model = randomised(build_segmenter(backbone, CLASSES, image_size=(64, 64), **SMALL)).eval()
    assert model.maps.hierarchical and model.maps.only is None and model.maps.whole == (4, 4)
    assert type(model.neck) is Neck
    maps = model.maps(backbone, images(64, 64))
    assert [tuple(each.shape[-2:]) for each in maps] == [(16, 16), (8, 8), (4, 4), (2, 2)]
    norm = model.neck.norms[1]
    normed = F.layer_norm(maps[1].movedim(1, -1), (maps[1].shape[1],), norm.weight, norm.bias, norm.eps)
    torch.testing.assert_close(model.neck(maps)[1], normed.movedim(-1, 1))
    assert model(images(37, 51)).shape == (2, CLASSES, 10, 13)  # 37 x 51 pixels over 4, rounded up


@pytest.mark.parametrize("name", LINEAR_ONLY)
def test_what_has_too_few_stages_is_refused_by_upernet(name: str) -> None:
    backbone, pixels = free(name), FAMILIES[name].pixels
    with pytest.raises(UserError, match=r"UperNet reads the maps of 4 stages, and .* has 2"):
        build_segmenter(backbone, CLASSES, image_size=(pixels, pixels))
    model = build_segmenter(backbone, CLASSES, head="linear", image_size=(pixels, pixels)).eval()
    assert model(torch.randn(1, 3, pixels, pixels)).shape == (1, CLASSES, 4, 4)


def test_default_layers_end_the_quarters() -> None:
    for depth, layers in {12: (2, 5, 8, 11), 24: (5, 11, 17, 23), 4: (0, 1, 2, 3), 10: (1, 4, 6, 9)}.items():
        backbone = build_backbone("deit_tiny_patch16_224", (32, 32), **{**TINY, "depth": depth})
        assert find_maps(backbone, (32, 32)).layers == layers


def test_chosen_layers_stop_the_backbone_after_the_last() -> None:
    model = segmenter(layers=[0, 0, 1, 2])
    assert model.maps.layers == (0, 0, 1, 2)
    calls: list[int] = []
    for number, block in enumerate(model.backbone.blocks):
        block.register_forward_hook(lambda *_, number=number: calls.append(number))
    model.eval()(images(64, 64))
    assert calls == [0, 1, 2]
    assert not any(parameter.requires_grad for parameter in model.backbone.blocks[3].parameters())


@pytest.mark.parametrize(
    "name", ["deit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "swin_tiny_patch4_window7_224"]
)
def test_odd_sizes_are_padded_and_cropped(name: str) -> None:
    model = segmenter(name).eval()
    stride = 4 if "swin" in name else 2  # of the logits: a quarter of a patch
    whole = model.maps.whole[0]
    for size in ((61, 75), (33, 64), (5, 9)):
        to = [-(-side // whole) * whole for side in size]
        padded = torch.zeros(2, 3, *to, dtype=torch.float64)
        padded[..., : size[0], : size[1]] = images(*size)
        expected = model(padded)[..., : -(-size[0] // stride), : -(-size[1] // stride)]
        torch.testing.assert_close(model(images(*size)), expected, rtol=0, atol=0)


def test_one_size_alone_takes_smaller_images_and_refuses_larger() -> None:
    backbone = timm.create_model("beit_base_patch16_224", img_size=32, **TINY)
    model = build_segmenter(backbone, CLASSES, image_size=(32, 32), **SMALL).eval()
    assert model(torch.randn(1, 3, 17, 32)).shape == (1, CLASSES, 9, 16)
    with pytest.raises(UserError, match="takes images of 32 x 32 pixels alone, not 40 x 32: predict in windows"):
        model(torch.randn(1, 3, 40, 32))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [0, 1]}, r"reads 4 maps: name 4 blocks of VisionTransformer as layers, not 2"),
        ({"layers": [0, 1, 2, 4]}, r"has blocks 0 to 3, and no 4"),
        ({"layers": [1, 0, 2, 3]}, "are not in their order"),
        ({"neck": "multi"}, r"unknown neck 'multi'\. Did you mean multilevel"),
        ({"head": "unet"}, r"unknown head 'unet'\..* There are uper, linear"),
        ({"head": "linear", "neck": "deconv"}, "reads the last layer alone: drop --neck"),
        ({"image_size": (60, 64)}, None),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str | None) -> None:
    backbone = timm.create_model("deit_tiny_patch16_224", img_size=64, **TINY)
    arguments = {"image_size": (64, 64), **options}
    if message is None:  # padded to whole patches
        assert build_segmenter(backbone, CLASSES, **arguments).maps.only == (64, 64)
        return
    with pytest.raises(UserError, match=message):
        build_segmenter(backbone, CLASSES, **arguments)


def test_backbones_without_maps_are_refused() -> None:
    with pytest.raises(UserError, match="Sequential gives no maps: timm has no forward_intermediates"):
        build_segmenter(nn.Sequential(nn.Conv2d(3, 3, 1)), CLASSES)
    backbone = timm.create_model("deit_tiny_patch16_224", img_size=64, **TINY)
    with pytest.raises(UserError, match=r"gives no maps of images of 96 x 96 pixels: Input height \(96\)"):
        build_segmenter(backbone, CLASSES, image_size=(96, 96))
    with pytest.raises(UserError, match="drop --neck"):
        segmenter("swin_tiny_patch4_window7_224", neck="deconv")


def test_maps_of_another_size_are_refused() -> None:
    backbone = timm.create_model("deit_tiny_patch16_224", img_size=64, **TINY)
    backbone.feature_info = [{**layer, "reduction": 16} for layer in backbone.feature_info]
    with pytest.raises(UserError, match=r"layer 0 gives \[1, 24, 8, 8\], not one cell for 16 x 16 pixels"):
        find_maps(backbone, (64, 64))


def test_patches_that_are_no_squares() -> None:
    arguments = {**TINY, "patch_size": (8, 4)}
    backbone = build_backbone("vit_tiny_patch16_224", (32, 32), **arguments)
    model = build_segmenter(backbone, CLASSES, image_size=(32, 32), **SMALL).eval()
    assert model.maps.whole == (8, 4) and model.maps.only is None
    assert model(torch.randn(1, 3, 31, 33)).shape == (1, CLASSES, 16, 33)


def test_a_backbones_own_mistakes_are_told() -> None:
    with pytest.raises(UserError, match=r"deit_tiny_patch16_224 cannot be built .*'depht'"):
        build_backbone("deit_tiny_patch16_224", (32, 32), depht=3)
    with pytest.raises(UserError, match="unknown model 'deit_tiny_patch'"):
        build_backbone("deit_tiny_patch", (32, 32))
    assert build_backbone("beit_base_patch16_224", (32, 48), **TINY).patch_embed.img_size == (32, 48)


# ------------------------------------------------------------------------------------------------------------
# Necks


def naive_sizes(features: np.ndarray) -> list[np.ndarray]:
    """x4, x2, x1, x1/2 of four maps [D, h, w], pixel by pixel."""
    _, h, w = features.shape
    sizes = [(4 * h, 4 * w), (2 * h, 2 * w), (h, w), (-(-h // 2), -(-w // 2))]
    return [bilinear(features, size) for size in sizes]


def test_scale_neck_is_bilinear() -> None:
    neck = ScaleNeck([3] * 4).double()
    maps = [images(5, 4, batch=1, seed=seed) for seed in range(4)]
    normed = [F.layer_norm(each.movedim(1, -1), (3,), eps=1e-6).movedim(-1, 1) for each in maps]
    for number, found in enumerate(neck(maps)):
        expected = naive_sizes(normed[number][0].numpy())[number]
        np.testing.assert_allclose(found[0].detach().numpy(), expected, rtol=1e-12, atol=1e-12)
    even = images(6, 4, batch=1)
    quarter = neck([even] * 4)[3]
    torch.testing.assert_close(quarter, F.avg_pool2d(neck([even] * 4)[2], 2))


def test_multilevel_neck_convolves_before_and_after() -> None:
    neck = randomised(MultiLevelNeck([3] * 4))
    assert {"lateral_convs.3.conv.bias", "convs.0.conv.weight"} < neck.state_dict().keys()
    maps = [images(4, 6, seed=seed) for seed in range(4)]
    for number, found in enumerate(neck(maps)):
        lateral, conv = neck.lateral_convs[number].conv, neck.convs[number].conv
        mixed = torch.einsum("bdhw,cd->bchw", neck.norms[number](maps[number]), lateral.weight[..., 0, 0])
        mixed = mixed + lateral.bias.view(-1, 1, 1)
        resized = np.stack([naive_sizes(each)[number] for each in mixed.detach().numpy()])
        expected = F.conv2d(torch.from_numpy(resized), conv.weight, conv.bias, padding=1)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_deconv_neck_learns_its_steps() -> None:
    neck = randomised(DeconvNeck([3] * 4)).eval()
    maps = [images(5, 4, seed=seed) for seed in range(4)]
    found = neck(maps)
    assert [tuple(each.shape[-2:]) for each in found] == [(20, 16), (10, 8), (5, 4), (3, 2)]
    normed = [norm(each) for norm, each in zip(neck.norms, maps, strict=True)]
    weight, bias = neck.resizes[1].weight, neck.resizes[1].bias  # [in, out, 2, 2]
    doubled = torch.einsum("bdhw,dcij->bchiwj", normed[1], weight).flatten(4, 5).flatten(2, 3)
    torch.testing.assert_close(found[1], doubled + bias.view(-1, 1, 1))
    torch.testing.assert_close(found[2], normed[2])
    torch.testing.assert_close(found[3][:, :, 2, 1], normed[3][:, :, 4, 2:4].amax(dim=-1))
    first, norm, last = neck.resizes[0][0], neck.resizes[0][1], neck.resizes[0][3]
    torch.testing.assert_close(found[0], last(F.gelu(norm(first(normed[0])))))


@pytest.mark.parametrize("neck", ["scale", "multilevel", "deconv"])
def test_every_parameter_gets_a_gradient_or_is_fixed(neck: str) -> None:
    model = segmenter("deit_tiny_distilled_patch16_224", neck=neck).train()
    logits, auxiliary = model(images(64, 64))
    assert logits.shape == (2, CLASSES, 32, 32) and auxiliary.shape == (2, CLASSES, 8, 8)
    (logits.square().sum() + auxiliary.square().sum()).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    fixed = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert fixed == {"backbone.norm.weight", "backbone.norm.bias"}
    assert not any(name.startswith(("backbone.head.", "backbone.head_dist.")) for name in model.state_dict())
