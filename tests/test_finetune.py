"""Fine-tuning: every family, to other classes, another image size and both, against what timm itself loads."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from families import CLASSES, FAMILIES
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import resample_abs_pos_embed
from timm.models import save_for_hf
from torch import Tensor
from torchvision import transforms

from build import build_teacher, training_mode
from errors import UserError
from losses import Teacher
from models import build_model
from models.foreign import classifiers
from models.weights import load_for_finetuning, load_timms, load_weights
from options.flags import Args

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
NAMES = {"volo": "volo_d1_224", "mvitv2": "mvitv2_tiny", "mvitv2_cls": "mvitv2_base_cls"}  # built by their classes
TAKES_ANY_SIZE = ("naflex", "pvt_v2")  # without an image size of their own
# What timm does not resample, or not as DeiT does: computed again below.
OURS = ("pos_embed", "attention_biases")


def make(name: str, seed: int, **changes: Any) -> Any:
    """A family's model in float32, with random values in its tables, as timm builds it."""
    built: Any = FAMILIES[name].make
    arguments = {**built.keywords, **changes}
    if name.startswith(TAKES_ANY_SIZE):
        arguments.pop("img_size", None)
    torch.manual_seed(seed)
    model = built.func(*built.args, **arguments)
    if name in NAMES:
        config = timm.get_pretrained_cfg(NAMES[name])
        assert config is not None
        model.pretrained_cfg = config.to_dict()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


def as_timm_loads(name: str, weights: Mapping[str, Tensor], **changes: Any) -> dict[str, Tensor]:
    """What `timm.create_model(..., pretrained=True)` makes of the weights; {} where it cannot."""
    built: Any = FAMILIES[name].make
    if name in NAMES:
        return {}
    arguments = {**built.keywords, **changes}
    if name.startswith(TAKES_ANY_SIZE):
        arguments.pop("img_size", None)
    side = FAMILIES[name].pixels
    source = {"state_dict": dict(weights), "num_classes": CLASSES, "input_size": (3, side, side)}
    try:
        model = timm.create_model(*built.args, pretrained=True, pretrained_cfg_overlay=source, **arguments)
    except RuntimeError:  # of the position embeddings of hiera, cait, ... timm resamples none
        return {}
    return dict(model.state_dict())


def positions(there: Tensor, here: Tensor, antialias: bool) -> Tensor:
    """[1, T + n n, D] or [1, n, n, D] to the other size, one prefix row after the other."""
    if there.ndim == 4:
        grid = there.permute(0, 3, 1, 2)
        shape = (here.shape[1], here.shape[2])
        return F.interpolate(grid, shape, mode="bicubic", antialias=antialias).permute(0, 2, 3, 1)
    prefix = next(t for t in range(6) if all(float((p.shape[1] - t) ** 0.5).is_integer() for p in (there, here)))
    rows = [there[:, number] for number in range(prefix)]
    n, m = (round((p.shape[1] - prefix) ** 0.5) for p in (there, here))
    grid = there[:, prefix:].unflatten(1, (n, n)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (m, m), mode="bicubic", antialias=antialias)
    rows += list(grid.permute(2, 3, 0, 1).flatten(0, 1))
    return torch.stack(rows, dim=1)


def biases(there: Tensor, here: Tensor) -> Tensor:
    """LeViT's [H, n n], one head after the other."""
    n, m = (round(each.shape[1] ** 0.5) for each in (there, here))
    heads = [F.interpolate(row.view(1, 1, n, n), (m, m), mode="bicubic", antialias=True) for row in there]
    return torch.stack([head.flatten() for head in heads])


CHANGES = {
    "same": lambda pixels: {},
    "classes": lambda pixels: {"num_classes": 7},
    "larger": lambda pixels: {"img_size": pixels * 3 // 2 if pixels != 64 else 128},
    "smaller": lambda pixels: {"img_size": pixels // 2},
    "both": lambda pixels: {"num_classes": 7, "img_size": pixels * 2},
}


@pytest.mark.filterwarnings("ignore::UserWarning:timm.layers.interpolate")  # of timm's own run
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name: str, change: str) -> None:
    changes: Callable[[int], dict[str, Any]] = CHANGES[change]
    wanted = changes(FAMILIES[name].pixels)
    source, target = make(name, 0), make(name, 1, **wanted)
    weights = {key: value.clone() for key, value in source.state_dict().items()}
    before = {key: value.clone() for key, value in target.state_dict().items()}
    adapted = load_for_finetuning(target, weights, "x.pth")
    after, timms = target.state_dict(), as_timm_loads(name, weights, **wanted)
    heads = [key for key in before if key.split(".")[0] in ("head", "head_dist", "aux_head")]
    heads = [key for key in heads if before[key].shape != weights[key].shape]
    assert sorted(adapted.new) == sorted(heads) and bool(heads) == ("num_classes" in wanted)
    assert adapted.dropped == []
    assert set(adapted.resampled) == {
        key for key in after if after[key].shape != weights[key].shape and key not in heads
    }
    for key, value in after.items():
        if key in heads:
            expected = before[key]
        elif value.shape == weights[key].shape:
            expected = weights[key]
        elif key.endswith("pos_embed"):
            expected = positions(weights[key], value, antialias=False)
        elif key.endswith("attention_biases"):
            expected = biases(weights[key], value)
        elif key.endswith(("rel_pos_h", "rel_pos_w")):  # mvitv2, [n, d]
            expected = F.interpolate(weights[key].T[None], value.shape[0], mode="linear")[0].T
        else:
            expected = timms[key]
            assert not torch.equal(expected, before[key]), key
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-6)
        if key in timms and key not in heads and not key.endswith(OURS):
            assert torch.equal(value, timms[key]), key
    assert all(torch.equal(weights[key], value) for key, value in source.state_dict().items())
    images = torch.randn(2, 3, *[wanted.get("img_size", FAMILIES[name].pixels)] * 2)
    with torch.no_grad():
        logits = target(images)
    assert logits.shape == (2, wanted.get("num_classes", CLASSES)) and logits.isfinite().all()


# ------------------------------------------------------------------------------------------------------------
# What the same numbers must come of, as ever


def tiny(name: str = "deit_tiny_patch16_224", seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    return build_model(name, **{**TINY, **changes})


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_other_classes_and_images_of_a_plain_model() -> None:
    source, target = tiny(), tiny(seed=1, img_size=48, num_classes=7)
    weights, head = source.state_dict(), target.head.weight.clone()
    adapted = load_for_finetuning(target, weights, "x.pth")
    assert adapted == (["head.weight", "head.bias"], ["pos_embed"], [])
    assert str(adapted) == "new: head.weight, head.bias; resampled: pos_embed"
    assert torch.equal(target.head.weight, head)
    assert torch.equal(target.blocks[1].mlp.fc1.weight, weights["blocks.1.mlp.fc1.weight"])
    grid = weights["pos_embed"][:, 1:].reshape(1, 4, 4, 24).permute(0, 3, 1, 2)
    larger = F.interpolate(grid, size=(6, 6), mode="bicubic", align_corners=False)
    assert torch.equal(target.pos_embed[:, 0], weights["pos_embed"][:, 0])
    assert torch.equal(target.pos_embed[:, 1:], larger.permute(0, 2, 3, 1).reshape(1, 36, 24))
    assert weights["head.weight"].shape == (5, 24)  # the caller's weights are left alone


def test_a_fitting_head_is_kept() -> None:
    source, target = tiny(), tiny(seed=1)
    assert load_for_finetuning(target, source.state_dict(), "x.pth") == ([], [], [])
    assert same(target.state_dict(), source.state_dict())


def test_weights_without_a_head() -> None:
    source, target = tiny(num_classes=0), tiny(seed=1)
    assert load_for_finetuning(target, source.state_dict(), "x.pth").new == ["head.weight", "head.bias"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 4}, r"x.pth does not fit .*parameters are missing, first blocks.2"),
        ({"depth": 1}, r"x.pth does not fit .* are unknown to the model, first blocks.1.norm1.weight"),
        ({"embed_dim": 48}, r"x.pth does not fit .*cls_token is \[1, 1, 24\] there and \[1, 1, 48\] in the model"),
        ({"class_token": False, "global_pool": "avg"}, "17 position embeddings, which are no square grid after"),
    ],
)
def test_what_is_left_over_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_for_finetuning(tiny(**changes), tiny().state_dict(), "x.pth")


def test_grey_images() -> None:
    """A model of one channel adds up the weights of the three, as timm does; the other way there is none."""
    colours, grey = tiny(), tiny(in_chans=1, seed=1)
    adapted = load_for_finetuning(grey, colours.state_dict(), "x.pth")
    torch.testing.assert_close(grey.patch_embed.proj.weight, colours.patch_embed.proj.weight.sum(1, keepdim=True))
    assert adapted.resampled == ["patch_embed.proj.weight"]
    with pytest.raises(UserError, match=r"patch_embed.proj.weight is \[24, 1, 8, 8\] there and \[24, 3, 8, 8\]"):
        load_for_finetuning(colours, grey.state_dict(), "x.pth")


@pytest.mark.parametrize("size", [(32, 64), (16, 64), (64, 16)], ids=str)
def test_images_that_are_not_square(size: tuple[int, int]) -> None:
    """Positions of 4 x 4 patches become those of h x w, also where 2 x 8 are as many; and back."""
    source, target = tiny(), tiny(img_size=size, seed=1)
    load_for_finetuning(target, source.state_dict(), "x.pth")
    grid = [pixels // 8 for pixels in size]
    expected = resample_abs_pos_embed(source.pos_embed, new_size=grid, antialias=False, num_prefix_tokens=1)
    assert torch.equal(target.pos_embed, expected)
    back = tiny(seed=2)
    load_for_finetuning(back, target.state_dict(), "x.pth", trained_size=size)
    again = resample_abs_pos_embed(
        target.pos_embed, new_size=[4, 4], old_size=grid, antialias=False, num_prefix_tokens=1
    )
    assert torch.equal(back.pos_embed, again)
    back.patch_embed.patch_size = 8  # some of timm's models have one number
    load_for_finetuning(back, target.state_dict(), "x.pth", trained_size=size)
    assert torch.equal(back.pos_embed, again)
    same = tiny(img_size=size, seed=3)
    load_for_finetuning(same, target.state_dict(), "x.pth", trained_size=size)
    assert torch.equal(same.pos_embed, target.pos_embed)


@pytest.mark.parametrize("target", ["swin", "tnt", "mvitv2", "naflex", "levit", "hiera", "beit", "deepseek"])
def test_weights_of_another_family(target: str) -> None:
    with pytest.raises(UserError, match=r"^x.pth (does not fit|has)") as raised:
        load_for_finetuning(make(target, 0), tiny().state_dict(), "x.pth")
    assert "\n" not in str(raised.value)


# ------------------------------------------------------------------------------------------------------------
# With and without a distillation token

DISTILLED = "deit_tiny_distilled_patch16_224"


@pytest.mark.parametrize("size", [32, 48])
@pytest.mark.parametrize("classes", [5, 7])
def test_plain_to_distilled(size: int, classes: int) -> None:
    source, target = tiny(), tiny(DISTILLED, 1, img_size=size, num_classes=classes)
    weights, before = source.state_dict(), {key: value.clone() for key, value in target.state_dict().items()}
    adapted = load_for_finetuning(target, weights, "x.pth")
    own = ["head.weight", "head.bias"] if classes != 5 else []
    assert set(adapted.new) == {"dist_token", "head_dist.weight", "head_dist.bias", *own} and not adapted.dropped
    assert torch.equal(target.dist_token, before["dist_token"])
    assert torch.equal(target.head_dist.weight, before["head_dist.weight"])
    assert torch.equal(target.pos_embed[:, 0], weights["pos_embed"][:, 0])  # of the class token
    assert torch.equal(target.pos_embed[:, 1], before["pos_embed"][:, 1])  # of the distillation token
    assert torch.equal(target.head.weight, weights["head.weight"] if classes == 5 else before["head.weight"])
    expected = positions(weights["pos_embed"][:, 1:], target.pos_embed[:, 2:], antialias=False)
    torch.testing.assert_close(target.pos_embed[:, 2:].detach(), expected, rtol=0, atol=1e-7)
    for name in ("cls_token", "blocks.1.attn.qkv.weight", "norm.bias"):
        assert torch.equal(target.get_parameter(name), weights[name])


@pytest.mark.parametrize("size", [32, 48])
def test_distilled_to_plain(size: int) -> None:
    source, target = tiny(DISTILLED), tiny(seed=1, img_size=size)
    weights = source.state_dict()
    adapted = load_for_finetuning(target, weights, "x.pth")
    assert not adapted.new and set(adapted.dropped) == {"dist_token", "head_dist.weight", "head_dist.bias"}
    assert "dropped: dist_token, head_dist.weight, head_dist.bias" in str(adapted)
    assert torch.equal(target.pos_embed[:, 0], weights["pos_embed"][:, 0])
    expected = positions(weights["pos_embed"][:, 2:], target.pos_embed[:, 1:], antialias=False)
    torch.testing.assert_close(target.pos_embed[:, 1:].detach(), expected, rtol=0, atol=1e-7)
    assert torch.equal(target.head.weight, weights["head.weight"])


@pytest.mark.parametrize("there", [True, False])
def test_levit_with_and_without_its_second_head(there: bool) -> None:
    source, target = make("levit", 0, distilled=there), make("levit", 1, distilled=not there)
    adapted = load_for_finetuning(target, source.state_dict(), "x.pth")
    changed = adapted.dropped if there else adapted.new
    assert changed and all(name.startswith("head_dist.") for name in changed)
    assert not (adapted.new if there else adapted.dropped)
    assert torch.equal(target.head.linear.weight, source.head.linear.weight)


# ------------------------------------------------------------------------------------------------------------
# Names of published files


def test_the_files_of_deit3() -> None:
    """DeiT III calls its layer scales gamma_1 and gamma_2, and gives its class token no position."""
    source = tiny("deit3_small_patch16_224")
    target = tiny("deit3_small_patch16_224", 1, img_size=48, num_classes=7)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(torch.randn(parameter.shape))
    published = {
        key.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): value
        for key, value in source.state_dict().items()
    }
    assert "blocks.0.gamma_1" in published
    adapted = load_for_finetuning(target, published, "x.pth")
    assert adapted == (["head.weight", "head.bias"], ["pos_embed"], [])
    for block in (0, 1):
        assert torch.equal(target.blocks[block].ls1.gamma, source.blocks[block].ls1.gamma)
        assert torch.equal(target.blocks[block].ls2.gamma, source.blocks[block].ls2.gamma)
    expected = positions(source.pos_embed.detach(), target.pos_embed, antialias=False)
    torch.testing.assert_close(target.pos_embed.detach(), expected, rtol=0, atol=1e-6)


def test_the_files_of_swin() -> None:
    """Microsoft's have the down-sampling at the end of a stage, a plain head, and buffers that timm computes."""
    source, target = make("swin", 0), make("swin", 1, num_classes=7)
    published = {}
    for key, value in source.state_dict().items():
        key = key.replace("layers.1.downsample", "layers.0.downsample").replace("head.fc.", "head.")
        published[key] = value
    published["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(16, 16)
    adapted = load_for_finetuning(target, published, "x.pth")
    assert adapted == (["head.fc.weight", "head.fc.bias"], [], [])
    assert torch.equal(target.layers[1].downsample.reduction.weight, source.layers[1].downsample.reduction.weight)


def test_siglips_files_for_a_model_that_pools_otherwise() -> None:
    """timm has its gap models load the files of those with attention pooling, which are left out."""
    source, target = make("siglip", 0), make("siglip_gap", 1)
    adapted = load_for_finetuning(target, source.state_dict(), "x.pth")
    assert adapted.dropped and all(name.startswith("attn_pool.") for name in adapted.dropped)
    assert torch.equal(target.blocks[1].mlp.fc1.weight, source.blocks[1].mlp.fc1.weight)
    with pytest.raises(UserError, match=r"are missing, first attn_pool"):
        load_for_finetuning(make("siglip", 1), target.state_dict(), "x.pth")


@pytest.mark.filterwarnings("error")
def test_many_resampled_tables_are_told_briefly() -> None:
    target = make("beit", 1, img_size=48, depth=12)
    adapted = load_for_finetuning(target, make("beit", 0, depth=12).state_dict(), "x.pth")
    assert len(adapted.resampled) == 12 and str(adapted).endswith(" and 8 more")


# ------------------------------------------------------------------------------------------------------------
# Exactly fitting weights by other names


def test_published_names_are_known_without_fine_tuning() -> None:
    """--eval --resume, --teacher-path and the exporter take DeiT III's files; sizes must fit."""
    source, target = tiny("deit3_small_patch16_224"), tiny("deit3_small_patch16_224", 1)
    published = {key.replace("ls1.gamma", "gamma_1"): value for key, value in source.state_dict().items()}
    load_weights(target, published, "x.pth")
    assert same(target.state_dict(), source.state_dict())
    with pytest.raises(UserError, match=r"x.pth does not fit .*pos_embed is \[1, 16, 24\] there and \[1, 36, 24\]"):
        load_weights(tiny("deit3_small_patch16_224", img_size=48), published, "x.pth")
    with pytest.raises(UserError, match=r"x.pth does not fit .*classes, features"):
        load_weights(tiny("deit3_small_patch16_224", num_classes=7), published, "x.pth")


@pytest.mark.parametrize("target", ["swin", "tnt", "mvitv2", "levit", "beit", "deepseek"])
def test_other_weights_are_refused_without_fine_tuning(target: str) -> None:
    with pytest.raises(UserError, match=r"^x.pth does not fit \w+: .*missing"):
        load_weights(make(target, 0), tiny().state_dict(), "x.pth")


# ------------------------------------------------------------------------------------------------------------
# --pretrained


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What timm writes for the Hugging Face hub: weights, and the model's arguments."""
    path = tmp_path_factory.mktemp("hub")
    shape = {key: value for key, value in TINY.items() if key != "num_classes"}
    save_for_hf(tiny(), str(path), model_args=shape, safe_serialization=True)
    return f"local-dir:{path}"


@pytest.mark.parametrize("change", [{}, {"num_classes": 7}, {"img_size": 48}, {"num_classes": 7, "img_size": 16}])
def test_timms_weights_are_loaded_as_timm_does(folder: str, change: dict[str, int]) -> None:
    model = build_model(folder, **{"num_classes": 5, **change})
    head = model.head.weight.clone()  # type: ignore[union-attr, operator]
    adapted = load_timms(model, folder)
    timms = timm.create_model(folder, pretrained=True, **{"num_classes": 5, **change}).state_dict()
    assert bool(adapted.new) == ("num_classes" in change) and bool(adapted.resampled) == ("img_size" in change)
    for key, value in model.state_dict().items():
        expected = head if key == "head.weight" and "num_classes" in change else timms[key]
        assert torch.equal(value, expected), key


@pytest.mark.parametrize("name", ["pvt_v2_b0", "resnet10t"])
def test_a_folders_model_of_any_image_size(tmp_path: Path, name: str) -> None:
    save_for_hf(timm.create_model(name, num_classes=3), str(tmp_path), safe_serialization=True)
    folder = f"local-dir:{tmp_path}"
    model = build_model(folder, img_size=64, num_classes=7)
    assert load_timms(model, folder).new == [f"{classifiers(model)[0]}.{part}" for part in ("weight", "bias")]
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 7)


def fetching(monkeypatch: pytest.MonkeyPatch, weights: Mapping[str, Tensor] | Exception) -> None:
    """Let timm find these weights, or fail so."""

    def load(model: Any, config: Any, filter_fn: Callable[..., Any], **_: Any) -> None:
        if isinstance(weights, Exception):
            raise weights
        filter_fn(dict(weights), model)

    monkeypatch.setattr("models.weights.load_pretrained", load)


def test_the_references_names_have_the_weights_of_deits(monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = tiny(), tiny("deit_tiny_patch16_224_diverse", 1)
    assert target.pretrained_cfg["hf_hub_id"] == source.pretrained_cfg["hf_hub_id"]
    assert target.pretrained_cfg["architecture"] == "deit_tiny_patch16_224"
    fetching(monkeypatch, source.state_dict())
    load_timms(target, "deit_tiny_patch16_224_diverse")
    assert same(source.state_dict(), target.state_dict())


def test_deeper_models_have_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "deit_small_layer24_patch16_224"
    fetching(monkeypatch, tiny().state_dict())
    with pytest.raises(UserError, match=f"there are no pretrained weights for {name}: .*drop --pretrained"):
        load_timms(tiny(name), name)
    with pytest.raises(UserError, match=r"^deit_tiny does not fit .*first blocks.2.*Choose the --model"):
        load_timms(tiny(depth=3), "deit_tiny")


@pytest.mark.parametrize(
    "error", [OSError("no\nnetwork"), RuntimeError("No pretrained weights exist"), EOFError("x")]
)
def test_weights_that_cannot_be_had_are_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    fetching(monkeypatch, error)
    with pytest.raises(UserError, match=r"^--pretrained: no weights for deit_tiny: ") as raised:
        load_timms(tiny(), "deit_tiny")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"abc", b"\x08\0\0\0\0\0\0\0{}      "])
def test_a_damaged_folder(tmp_path: Path, folder: str, content: bytes) -> None:
    shutil.copytree(folder.removeprefix("local-dir:"), tmp_path / "x")
    (tmp_path / "x" / "model.safetensors").write_bytes(content)
    name = f"local-dir:{tmp_path / 'x'}"
    with pytest.raises(UserError) as raised:
        load_timms(build_model(name), name)
    assert "\n" not in str(raised.value)
    (tmp_path / "x" / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json") as raised:
        build_model(name)
    assert "\n" not in str(raised.value)


# ------------------------------------------------------------------------------------------------------------
# The teacher

CPU = torch.device("cpu")
SHAPE = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
AUGREG = "vit_tiny_patch16_224"  # in timm with mean and deviation 0.5


def a_teacher(path: Path, name: str = "deit_tiny_patch16_224", size: int = 32, **args: Any) -> Args:
    """Flags with a teacher whose file is written."""
    torch.save({"model": tiny(name, img_size=size).state_dict(), **args}, path / "t.pth")
    flags = {"teacher_path": str(path / "t.pth"), "teacher_model": name, "teacher_model_kwargs": SHAPE}
    return Args(input_size=32, distillation_type="hard", **flags)


def test_a_teacher_with_the_students_images_is_itself(tmp_path: Path) -> None:
    args = a_teacher(tmp_path)
    teacher = build_teacher(args, 5, CPU)
    assert not isinstance(teacher, Teacher) and not teacher.training
    saved = replace(args, mean=[0.5] * 3, std=[0.5] * 3)
    a_teacher(tmp_path, args={"data_set": "CIFAR", "mean": [0.5] * 3, "std": [0.5] * 3})
    assert not isinstance(build_teacher(saved, 5, CPU), Teacher)


@pytest.mark.parametrize("of", ["timm", "checkpoint"])
def test_a_teacher_sees_images_as_it_was_trained(
    tmp_path: Path, of: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if of == "timm":
        args = a_teacher(tmp_path, AUGREG)
    else:
        saved = {"data_set": "CIFAR", "mean": [0.5] * 3, "std": [0.5] * 3}
        args = a_teacher(tmp_path, args=saved)
    teacher = build_teacher(args, 5, CPU)
    assert isinstance(teacher, Teacher)
    assert "the teacher takes images of 32 x 32 pixels, normalised by mean 0.5 0.5 0.5" in capsys.readouterr().out
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    own = transforms.Normalize([0.5] * 3, [0.5] * 3)(pixels)
    students = transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)(pixels)
    with torch.no_grad():
        torch.testing.assert_close(teacher(students), teacher.backbone(own), rtol=0, atol=1e-5)
        assert (teacher.backbone(students) - teacher.backbone(own)).abs().max() > 1e-3


def test_a_teacher_of_another_size(tmp_path: Path) -> None:
    args = a_teacher(tmp_path, size=48)
    with pytest.raises(UserError, match=r"^--teacher-model deit_tiny_patch16_224: .*--teacher-input-size"):
        build_teacher(args, 5, CPU)
    teacher = build_teacher(replace(args, teacher_input_size=48), 5, CPU)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    resized = F.interpolate(images, (48, 48), mode="bicubic", antialias=True)
    with torch.no_grad():
        assert torch.equal(teacher(images), teacher.backbone(resized))  # type: ignore[operator]


@pytest.mark.parametrize(
    ("changes", "classes", "message"),
    [
        ({}, 7, r"head.weight is \[5, 24\] \(classes, features\) there and \[7, 24\] .*the data's 7 classes"),
        ({"teacher_model_kwargs": {}}, 5, "does not fit VisionTransformer"),
        ({"teacher_model_kwargs": {**SHAPE, "depht": 2}}, 5, "cannot be built with .*depht"),
        ({"teacher_model": "deit_tiny_patch16_225"}, 5, "unknown model"),
        ({"teacher_model_kwargs": {**SHAPE, "num_classes": 5}}, 7, "returns .5. numbers an image.*7 classes"),
        (
            {"teacher_model_kwargs": {**SHAPE, "img_size": 32}, "teacher_input_size": 40},
            5,
            "does not take images of 40",
        ),
    ],
    ids=["classes", "shape", "unknown argument", "unknown name", "logits", "size"],
)
def test_a_teachers_mismatch_names_its_flags(
    tmp_path: Path, changes: dict[str, Any], classes: int, message: str
) -> None:
    args = replace(a_teacher(tmp_path), **changes)
    with pytest.raises(UserError, match=rf"^--teacher-model {args.teacher_model}.*{message}") as raised:
        build_teacher(args, classes, CPU)
    assert "\n" not in str(raised.value) and "Check --model" not in str(raised.value)


# ------------------------------------------------------------------------------------------------------------
# Dropout and drop path


@pytest.mark.parametrize("train_mode", [None, True, False])
@pytest.mark.parametrize("finetune", ["", "x.pth"])
def test_training_mode(train_mode: bool | None, finetune: str, capsys: pytest.CaptureFixture[str]) -> None:
    args = Args(finetune=finetune, train_mode=train_mode, drop=0.2)
    expected = train_mode if train_mode is not None else not finetune
    assert training_mode(args) is expected
    note = capsys.readouterr().out
    assert note.startswith("note: --drop 0.2 and --drop-path 0.1 without effect: ") if not expected else not note
    assert training_mode(replace(args, drop=0.0, drop_path=0.0)) is expected and not capsys.readouterr().out
