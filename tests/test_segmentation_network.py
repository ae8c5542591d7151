"""The whole segmenter: gradients, rates of its layers, compiling, the wrapper around it, mmseg's checkpoints."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from segmenters import CLASSES, SMALL, SWIN, TINY, images, segmenter
from timm.optim import param_groups_layer_decay
from torch import Tensor

from errors import UserError
from models import DiverseViT, Needs
from models.remedies import install_remedies
from segmentation.features import build_backbone
from segmentation.heads import resize
from segmentation.inference import Predictor
from segmentation.network import Segmenter, build_segmenter, load_mmseg


def test_frozen_backbone_and_linear_head() -> None:
    model = segmenter(head="linear", frozen=True).train()
    assert model.training and model.decode_head.training and not model.backbone.training
    logits = model(images(64, 64))
    assert isinstance(logits, Tensor)
    logits.sum().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {"decode_head.bn.weight", "decode_head.bn.bias"} | {
        "decode_head.conv_seg.weight",
        "decode_head.conv_seg.bias",
    }
    seen: list[Tensor] = []
    model.decode_head.register_forward_pre_hook(lambda module, args: seen.append(args[0][-1]))
    model(images(64, 64))
    tokens = model.backbone.forward_features(images(64, 64))[:, 1:]  # the final norm is applied
    torch.testing.assert_close(seen[0], tokens.mT.unflatten(-1, (8, 8)))


@pytest.mark.parametrize(
    "name", ["deit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "eva02_tiny_patch14_224"]
)
def test_rates_fall_from_the_heads_to_the_patch_embedding(name: str) -> None:
    model = segmenter(name)
    groups = param_groups_layer_decay(model, 0.01, model.no_weight_decay(), layer_decay=0.5)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    scale = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    decay = {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}
    assert set(scale) == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    outside = {value for name, value in scale.items() if not name.startswith("backbone.")}
    assert outside == {1.0}
    stem = scale["backbone.patch_embed.proj.weight"]
    blocks = [
        [value for name, value in scale.items() if name.startswith(prefix)]
        for prefix in (
            [f"backbone.layers.{stage}.blocks.{i}." for stage in range(4) for i in range(SWIN["depths"][stage])]
            if "swin" in name
            else [f"backbone.blocks.{i}." for i in range(TINY["depth"])]
        )
    ]
    assert all(len(set(block)) == 1 for block in blocks)
    rates = [stem, *(block[0] for block in blocks), 1.0]
    assert rates == [0.5**power for power in range(len(rates) - 1, -1, -1)]
    tables = ("pos_embed", "cls_token", "relative_position_bias_table")
    assert all(decay[name] == 0 for name in decay if name.endswith(tables) or name.endswith(".bias"))
    assert decay["decode_head.conv_seg.weight"] == 0.01 and decay["neck.norms.0.weight"] == 0


def test_gradient_checkpointing_changes_nothing() -> None:
    plain, checkpointed = segmenter().train(), segmenter().train()
    checkpointed.set_grad_checkpointing()
    assert checkpointed.backbone.grad_checkpointing
    for model in (plain, checkpointed):
        torch.manual_seed(3)  # dropout of the heads
        logits, auxiliary = model(images(64, 64))
        (logits.square().sum() + auxiliary.square().sum()).backward()
    for ours, theirs in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


# torch's compiler meets this warning of its own, hides it when it would be shown, but not where it is an error
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_compiles_as_one_graph() -> None:
    torch._dynamo.reset()
    model = segmenter(layers=[0, 0, 0, 1]).train()
    model.decode_head.dropout.p = model.auxiliary_head.dropout.p = 0.0
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    batch = images(61, 64)
    for each in (model, compiled):
        logits, auxiliary = each(batch)
        (logits.square().sum() + auxiliary.square().sum()).backward()
    for ours, theirs in zip(model.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-10)
    with torch.no_grad():
        torch.testing.assert_close(compiled.eval()(batch), model.eval()(batch))
    torch._dynamo.reset()


def test_a_copy_stands_by_itself() -> None:
    model = segmenter().eval()
    twin = copy.deepcopy(model)
    before = model(images(64, 64))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    torch.testing.assert_close(model(images(64, 64)), before, rtol=0, atol=0)
    assert twin(images(64, 64)).abs().max() == 0


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "swin_tiny_patch4_window7_224"])
def test_the_wrapper_sees_the_blocks_inside(name: str) -> None:
    model, alone = segmenter(name).train(), segmenter(name).train()
    wrapped = DiverseViT(model, Needs(tokens=frozenset({-2, -1, 2}), attention=frozenset({1})))
    assert wrapped.layout is not None
    torch.manual_seed(3)
    captured = wrapped(images(64, 64))
    torch.manual_seed(3)
    logits, auxiliary = alone(images(64, 64))
    torch.testing.assert_close(captured.logits, logits)
    torch.testing.assert_close(captured.dist_logits, auxiliary)
    prefix = model.backbone.num_prefix_tokens if "deit" in name else 0
    assert captured.prefix_tokens == {-2: 0, -1: prefix, 2: prefix}
    patches = {"deit": {-2: 64, -1: 66, 2: 66}, "swin": {-2: 256, -1: 256, 2: 16}}[name[:4]]
    assert {layer: tokens.shape[1] for layer, tokens in captured.tokens.items()} == patches
    assert captured.attention[1].requires_grad
    assert wrapped.layout.patch_size == ((8, 8) if "deit" in name else (32, 32))


@pytest.mark.parametrize("remedy", ["gfsa", "neutreno", "contranorm"])
def test_remedies_in_the_backbone_act_on_the_maps(remedy: str) -> None:
    plain, remedied = (build_backbone("deit_tiny_patch16_224", (64, 64), **TINY) for _ in range(2))
    remedied.load_state_dict(plain.state_dict())
    install_remedies(remedied, [remedy])
    with torch.no_grad():
        for name, parameter in remedied.named_parameters():
            if ".remedies." in name:
                parameter.fill_(0.3)
    batch = images(64, 64).float()
    model = build_segmenter(remedied, CLASSES, image_size=(64, 64), **SMALL).eval()
    with_it, without = model.maps(remedied, batch)[3], model.maps(plain.eval(), batch)[3]
    assert (with_it - without).abs().max() > 1e-4
    tokens = remedied.blocks(remedied._pos_embed(remedied.patch_embed(batch)))[:, 1:]
    torch.testing.assert_close(with_it, tokens.mT.unflatten(-1, (8, 8)))


def test_a_prediction_for_an_image_of_odd_size() -> None:
    model, picture = segmenter().eval(), images(61, 75)[0]
    logits = model(picture[None])  # [1, K, 31, 38], two pixels each
    expected = resize(logits, (61, 75)).argmax(dim=1)[0]
    assert (Predictor()(model, picture, (61, 75)) == expected).double().mean() > 0.999


# ------------------------------------------------------------------------------------------------------------
# mmseg's checkpoints


def mmseg_file(model: Segmenter) -> dict[str, Tensor]:
    """What mmseg would have saved: its backbone under other names, no norms in the neck."""
    generator = torch.Generator().manual_seed(5)
    weights = {
        name: torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.dtype)
        for name, value in model.state_dict().items()
        if not name.startswith(("backbone.", "neck.norms."))
    }
    return {**weights, "backbone.patch_embed.projection.weight": torch.zeros(3)}


def test_mmsegs_weights_load_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    model = segmenter(neck="multilevel")
    weights = mmseg_file(model)
    norm = model.neck.norms[0].weight.clone()
    load_mmseg(model, weights, "upernet.pth")
    for name, value in model.state_dict().items():
        if name in weights:
            torch.testing.assert_close(value, weights[name], rtol=0, atol=0)
    torch.testing.assert_close(model.neck.norms[0].weight, norm, rtol=0, atol=0)
    assert "note: upernet.pth has no norms in its neck: they start untrained" in capsys.readouterr().out
    old = {name: value for name, value in weights.items() if "num_batches_tracked" not in name}
    load_mmseg(model, {name: value for name, value in old.items() if not name.startswith("auxiliary")}, "old.pth")
    assert "note: old.pth has no auxiliary_head: it starts untrained" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda weights: weights.update({"decode_head.conv_seg.weight": torch.zeros(150, 8, 1, 1)}),
            r"decode_head of f\.pth does not fit: conv_seg\.weight is \[150, 8, 1, 1\] \(classes first\) there and",
        ),
        (
            lambda weights: weights.pop("decode_head.bottleneck.conv.weight"),
            "1 parameters are missing, first bottle",
        ),
        (
            lambda weights: weights.update({"auxiliary_head.convs.1.conv.weight": torch.zeros(1)}),
            r"auxiliary_head of f\.pth does not fit: 1 are unknown here, first convs\.1\.conv\.weight",
        ),
        (lambda weights: [weights.pop(n) for n in list(weights) if n[:6] == "decode"], "parameters are missing"),
    ],
)
def test_other_weights_are_refused(change: Any, message: str) -> None:
    model = segmenter()
    weights = mmseg_file(model)
    change(weights)
    with pytest.raises(UserError, match=message) as error:
        load_mmseg(model, weights, "f.pth")
    assert "\n" not in str(error.value)
