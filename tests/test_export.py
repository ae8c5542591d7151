"""Trained models outside the project: timm, torch and ONNX Runtime alone give the trained model's logits."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import forks
import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from conftest import TINY
from pictures import make_args
from PIL import Image
from processes import PATIENCE
from timm.data import create_transform
from torch import Tensor, nn

import datasets
import export as exporting
from errors import UserError
from images.lists import DIGITS_TRAIN
from images.transforms import build_transform, preprocessing
from loaders import normalise
from models import DiverseViT, Needs, build_model
from options import config
from state import checkpoint
from state.trained import read_trained

ROOT = Path(__file__).parents[1]
SMALL = "patch_size=8 embed_dim=24 depth=2 num_heads=3"
CLASSES, PIXELS = 5, 32
SHAPE = (3, PIXELS, PIXELS)

# name of the case -> model, its arguments on main.py's command line, and the same model in stock timm's words
CASES = {
    "tiny": ("deit_tiny_patch16_224_diverse", f"{SMALL} drop_path_rate=0.1", "deit_tiny_patch16_224", {}),
    "24 layers": (
        "deit_small_layer24_patch16_224_diverse",
        "patch_size=16 embed_dim=12 num_heads=2",
        "deit_small_patch16_224",
        {"depth": 24},
    ),
    "distilled": ("deit_tiny_distilled_patch16_224", SMALL, "deit_tiny_distilled_patch16_224", {}),
    "swin": (
        "swin_tiny_patch4_window7_224",
        "embed_dim=12 depths=(2,2) num_heads=(2,2) window_size=4",
        "swin_tiny_patch4_window7_224",
        {},
    ),
    "cait": ("cait_xxs24_224", "patch_size=8 embed_dim=24 depth=2 num_heads=3", "cait_xxs24_224", {}),
}
TRACED = ("tiny", "distilled", "swin")  # the cases that are also written as programs

# Run in a folder that holds images.pt and the exported cases, isolated from this repository: with torch alone, then
# timm and with transformers as well.
OUTSIDE = """
import importlib.util, sys
import torch
images = torch.load("images.pt")
cases, traced = (text.split(",") for text in sys.argv[1:])
results = {case: {} for case in cases}
with torch.no_grad():
    for case in traced:
        model = torch.export.load(f"{case}/model.pt2").module()
        results[case]["torch"] = [model(images), model(images[:1])]
    assert "timm" not in sys.modules
    import timm
    for case in cases:
        model = timm.create_model(f"local-dir:{case}", pretrained=True).eval()
        config = timm.data.resolve_model_data_config(model)
        results[case] |= {"timm": model(images), "config": config, "weights": model.state_dict()}
    from transformers import AutoModelForImageClassification
    for case in cases:
        model = AutoModelForImageClassification.from_pretrained(case).eval()
        results[case] |= {"transformers": model(images).logits, "labels": model.config.id2label}
assert not any(importlib.util.find_spec(name) for name in ("models", "checkpoint", "regularizers"))
torch.save(results, "results.pt")
"""


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("export_script", ROOT / "script" / "export_model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SCRIPT = load_script()


def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Weights as large as trained ones, so that a difference would show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return model.eval()


def saved_args(name: str, model_kwargs: str) -> dict:
    """What main.py saves with its checkpoints."""
    flags = ["--data-set", "DIGITS", "--input-size", str(PIXELS), "--model", name]
    return config.plain(config.resolve([*flags, "--model-kwargs", *model_kwargs.split()]))


def save_checkpoint(case: str, path: Path) -> nn.Module:
    """A checkpoint as main.py writes it, without optimizer; its EMA is the model to be exported."""
    name, model_kwargs, _, _ = CASES[case]
    args = saved_args(name, model_kwargs)
    backbone = build_model(name, num_classes=CLASSES, img_size=PIXELS, **args["model_kwargs"])
    model = randomise(backbone, seed=0).state_dict()
    state = {"model": {key: value.clone() for key, value in model.items()}, "args": args, "epoch": 3}
    checkpoint.save({**state, "model_ema": randomise(backbone, seed=1).state_dict()}, path)
    return backbone


@torch.no_grad()
def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    return model(images)


class World:
    """Every case as the command exports it, and what becomes of it in another process.

    Attributes:
        models: the trained models themselves, in evaluation mode.
        outside: for every case what OUTSIDE saves.
    """

    def __init__(self, folder: Path, images: Tensor) -> None:
        self.folder = folder
        self.models = {case: save_checkpoint(case, folder / f"{case}.pth") for case in CASES}
        for case in CASES:
            formats = exporting.FORMATS if case in TRACED else ("timm",)
            assert SCRIPT.main([str(folder / f"{case}.pth"), str(folder / case), "--formats", *formats]) == 0
        torch.save(images, folder / "images.pt")
        command = [sys.executable, "-I", "-W", "error", "-c", OUTSIDE, ",".join(CASES), ",".join(TRACED)]
        run = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=PATIENCE, check=False)
        assert run.returncode == 0, run.stderr
        self.outside = torch.load(folder / "results.pt")


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(5, 3, PIXELS, PIXELS, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def world(tmp_path_factory, images) -> World:
    return World(tmp_path_factory.mktemp("exported"), images)


# ------------------------------------------------------------------------------------------------------------
# The three formats


@pytest.mark.parametrize("case", CASES)
def test_timm_alone_gives_the_same_bits(world, images, case):
    outside, expected = world.outside[case], logits_of(world.models[case], images)
    assert expected.abs().max() > 0.1
    assert torch.equal(outside["timm"], expected)
    weights = world.models[case].state_dict()
    assert outside["weights"].keys() == weights.keys()
    assert all(torch.equal(outside["weights"][key], value) for key, value in weights.items())
    assert tuple(outside["config"]["input_size"]) == (3, PIXELS, PIXELS)


@pytest.mark.parametrize("case", CASES)
def test_transformers_gives_the_same_bits(world, images, case):
    outside = world.outside[case]
    assert torch.equal(outside["transformers"], logits_of(world.models[case], images))
    assert list(outside["labels"]) == list(range(CLASSES))


@pytest.mark.parametrize("case", CASES)
def test_timms_configuration_names_the_stock_architecture(world, case):
    _, model_kwargs, architecture, added = CASES[case]
    written = json.loads((world.folder / case / "config.json").read_text())
    assert written["architecture"] == architecture and written["num_classes"] == CLASSES
    pairs = dict(pair.split("=") for pair in model_kwargs.split() if "drop_path" not in pair)
    for key, value in {**pairs, **added}.items():
        assert written["model_args"][key] == json.loads(str(value).replace("(", "[").replace(")", "]"))
    assert "drop_path_rate" not in written["model_args"]
    stock = ("url", "hf_hub_id", "license", "tag", "origin_url")  # they describe other weights
    assert not set(stock) & set(written["pretrained_cfg"])


@pytest.mark.parametrize("case", TRACED)
def test_torch_alone_gives_the_same_bits(world, images, case):
    five, one = world.outside[case]["torch"]
    assert torch.equal(five, logits_of(world.models[case], images))
    assert torch.equal(one, logits_of(world.models[case], images[:1]))


@pytest.mark.parametrize("case", TRACED)
def test_onnx_runtime_gives_the_same_logits(world, images, case):
    path = str(world.folder / case / "model.onnx")
    onnx.checker.check_model(path, full_check=True)
    graph = onnx.load(path).graph
    (shape,) = [[size.dim_param or size.dim_value for size in i.type.tensor_type.shape.dim] for i in graph.input]
    assert shape == ["batch", 3, PIXELS, PIXELS]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == ["logits"]  # nothing that hooks capture
    for batch in (1, 5):
        (logits,) = session.run(None, {"images": images[:batch].numpy()})
        expected = logits_of(world.models[case], images[:batch]).numpy()
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)


def test_onnx_of_attention_with_a_bias(tmp_path, images):
    """torch's own decomposition of fused attention fails on it."""
    name, shape = "beit_base_patch16_224", {"patch_size": 8, "embed_dim": 12, "depth": 1, "num_heads": 3}
    backbone = build_model(name, img_size=PIXELS, num_classes=CLASSES, **shape)
    exporting.to_onnx(randomise(backbone, seed=0), tmp_path, SHAPE)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"images": images.numpy()})
    np.testing.assert_allclose(logits, logits_of(backbone, images).numpy(), rtol=0, atol=1e-5)
    assert backbone.blocks[0].attn.fused_attn


def test_onnx_operator_set(tmp_path):
    backbone = randomise(build_model("deit_tiny_patch16_224", **TINY | {"depth": 1}), seed=0)
    exporting.to_onnx(backbone, tmp_path, SHAPE, opset=23)
    model = onnx.load(str(tmp_path / "model.onnx"))
    assert model.opset_import[0].version == 23
    assert "Attention" in {node.op_type for node in model.graph.node}


def test_weights_too_large_for_one_onnx_file_stand_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "ONE_FILE", 0)
    backbone = randomise(build_model("deit_tiny_patch16_224", **TINY | {"depth": 1}), seed=0)
    exported = exporting.to_onnx(backbone, tmp_path / "x", SHAPE)
    assert [path.name for path in exported.files] == ["model.onnx", "model.onnx.data"]
    assert sorted(exported.files) == sorted((tmp_path / "x").iterdir())
    (tmp_path / "x").rename(tmp_path / "moved")  # the first file finds the second wherever both are
    session = onnxruntime.InferenceSession(str(tmp_path / "moved" / "model.onnx"))
    images = torch.randn(2, 3, PIXELS, PIXELS)
    (logits,) = session.run(None, {"images": images.numpy()})
    np.testing.assert_allclose(logits, logits_of(backbone, images).numpy(), rtol=0, atol=1e-5)


def test_files_say_nothing_of_this_machine(world):
    for name in ("model.pt2", "model.onnx", "config.json"):
        content = (world.folder / "tiny" / name).read_bytes()
        assert str(ROOT).encode() not in content and str(Path(timm.__file__).parent).encode() not in content


def test_files_have_the_permissions_of_new_files(world):
    (world.folder / "new").touch()
    modes = {path.stat().st_mode for path in (world.folder / "tiny").iterdir()}
    assert modes == {(world.folder / "new").stat().st_mode}


# ------------------------------------------------------------------------------------------------------------
# Preprocessing


@pytest.mark.parametrize("size", [24, 32, 33, 48, 100, 224, 384])
def test_preprocessing_is_that_of_the_evaluation(size):
    """Pixel for pixel, for images of any shape."""
    args = make_args(input_size=size)
    ours = build_transform(False, args)
    timms = create_transform(input_size=(3, size, size), **exporting.preprocessing(preprocessing(args)))
    random = np.random.default_rng(0)
    for height, width in ((32, 32), (60, 45), (300, 500)):
        image = Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
        assert torch.equal(timms(image), normalise(ours(image)))


def test_preprocessing_of_a_written_model(world):
    """A digit as scikit-learn has it, through what timm reads from config.json, is what evaluation sees."""
    from sklearn.datasets import load_digits

    transform = create_transform(**world.outside["tiny"]["config"])
    pixels = (load_digits().images[DIGITS_TRAIN] * (255 / 16)).round().astype("uint8")
    evaluated, _ = datasets.build_dataset(False, make_args(input_size=PIXELS))
    assert torch.equal(transform(Image.fromarray(pixels).convert("RGB")), normalise(evaluated[0][0]))


# ------------------------------------------------------------------------------------------------------------
# The plain backbone


def hooks_in(model: nn.Module) -> int:
    names = [name for name in vars(nn.Module()) if name.endswith("_hooks") and "dict" not in name]
    assert {"_forward_hooks", "_forward_pre_hooks", "_backward_hooks"} <= set(names)
    return sum(len(getattr(module, name)) for module in model.modules() for name in names)


def wrapped(name: str = "deit_tiny_patch16_224", **overrides) -> DiverseViT:
    backbone = randomise(build_model(name, **{**TINY, **overrides}), seed=0)
    return DiverseViT(backbone, Needs(tokens=frozenset({-1, 2}), attention=frozenset({0, 2})))


def test_the_plain_backbone_has_no_hooks_and_the_model_keeps_its_own():
    model = wrapped().train()
    before, fused = hooks_in(model), [block.attn.fused_attn for block in model.backbone.blocks]
    plain = exporting.plain_backbone(model)
    assert before >= 4 and hooks_in(plain) == 0 and hooks_in(model) == before
    assert fused == [False, True, False] == [block.attn.fused_attn for block in model.backbone.blocks]
    assert all(block.attn.fused_attn for block in plain.blocks)
    assert model.training and not any(module.training for module in plain.modules())
    assert type(plain) is type(model.backbone)
    ours, theirs = model.backbone.state_dict(), plain.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert not {value.data_ptr() for value in ours.values()} & {value.data_ptr() for value in theirs.values()}
    captured = model(torch.randn(2, 3, PIXELS, PIXELS))
    assert set(captured.tokens) == {-1, 2} and set(captured.attention) == {0, 2}


def test_the_plain_backbone_computes_as_timm_does(images):
    model = wrapped().eval()
    stock = timm.create_model("deit_tiny_patch16_224", **TINY).eval()
    stock.load_state_dict(model.backbone.state_dict())
    plain = exporting.plain_backbone(model)
    assert torch.equal(logits_of(plain, images), logits_of(stock, images))
    assert torch.equal(logits_of(exporting.plain_backbone(plain), images), logits_of(stock, images))
    with torch.no_grad():
        torch.testing.assert_close(model(images).logits, logits_of(plain, images), rtol=1e-5, atol=1e-5)


def test_other_hooks_go_as_well():
    backbone = build_model("deit_tiny_patch16_224", **TINY)
    backbone.head.register_forward_hook(lambda module, args, output: output + 1)
    backbone.norm.register_forward_pre_hook(lambda module, args, kwargs: None, with_kwargs=True)
    backbone.norm.register_full_backward_hook(lambda module, grad_in, grad_out: None)
    assert hooks_in(exporting.plain_backbone(backbone)) == 0 and hooks_in(backbone) >= 3


def test_attention_that_timm_does_not_fuse_stays_so():
    """Where fused attention is experimental in timm, nothing switched it off, so nothing is to be restored."""
    backbone = build_model("swin_tiny_patch4_window7_224", img_size=PIXELS, embed_dim=12, window_size=4)
    for module in backbone.modules():
        if hasattr(module, "fused_attn"):
            module.register_forward_pre_hook(lambda module, args: None)
    assert not any(getattr(m, "fused_attn", False) for m in exporting.plain_backbone(backbone).modules())


def test_experimental_attention_is_what_timm_calls_so():
    found = set()
    for path in (Path(timm.__file__).parent / "models").glob("*.py"):
        if "use_fused_attn(experimental=True)" in path.read_text():
            found.add(f"timm.models.{path.stem}")
    assert found == exporting.EXPERIMENTAL
    for path in (Path(timm.__file__).parent / "layers").glob("*.py"):
        assert "use_fused_attn(experimental=True)" not in path.read_text()


def test_a_live_model_is_exported_without_its_wrapper(tmp_path, images):
    """From Python, straight after training: timm rebuilds it, hooks and all flags of capturing gone."""
    model = wrapped("deit_small_layer24_patch16_224_diverse", depth=3).train()
    exported = exporting.to_timm(model, tmp_path, SHAPE, TINY)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert exported.difference == 0
    assert torch.equal(logits_of(again, images), logits_of(exporting.plain_backbone(model), images))
    exporting.to_torch(model, tmp_path, SHAPE)
    program = torch.export.load(tmp_path / "model.pt2")
    assert len(program.graph_signature.user_outputs) == 1
    assert torch.equal(logits_of(program.module(), images), logits_of(again, images))
    assert model.training and hooks_in(model) >= 4


# ------------------------------------------------------------------------------------------------------------
# Reading checkpoints


def test_the_ema_is_taken_where_there_is_one(tmp_path, capsys):
    path = tmp_path / "x.pth"
    ema = save_checkpoint("tiny", path).state_dict()
    state = checkpoint.load(str(path))
    for weights, expected in (("auto", ema), ("ema", ema), ("raw", state["model"])):
        trained = read_trained(str(path), weights)
        found = trained.backbone.state_dict()
        assert all(torch.equal(found[key], value) for key, value in expected.items())
        assert trained.weights == ("raw" if weights == "raw" else "ema")
        assert not torch.equal(ema["norm.bias"], state["model"]["norm.bias"])
    del state["model_ema"]
    checkpoint.save(state, path)
    assert read_trained(str(path)).weights == "raw"
    with pytest.raises(UserError, match="holds no EMA: choose --weights raw or auto"):
        read_trained(str(path), "ema")


def test_timm_reads_the_same_weights_from_the_checkpoint(tmp_path, images):
    """timm's own reading of a checkpoint takes the EMA, and so does `auto`."""
    save_checkpoint("tiny", tmp_path / "x.pth")
    stock = {"img_size": PIXELS, **saved_args("deit_tiny_patch16_224", SMALL)["model_kwargs"]}
    theirs = timm.create_model(
        "deit_tiny_patch16_224", checkpoint_path=str(tmp_path / "x.pth"), num_classes=CLASSES, **stock
    )
    ours = read_trained(str(tmp_path / "x.pth")).backbone
    assert torch.equal(logits_of(ours, images), logits_of(theirs.eval(), images))


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "module.backbone.", "_orig_mod.backbone."])
def test_names_that_wrappers_leave_are_understood(tmp_path, prefix):
    backbone = randomise(build_model("deit_tiny_patch16_224", **TINY), seed=0)
    weights = {f"{prefix}{key}": value for key, value in backbone.state_dict().items()}
    if "backbone." in prefix:
        weights[f"{prefix.removesuffix('backbone.')}step"] = torch.zeros(1)  # a wrapper's own
    torch.save(weights, tmp_path / "x.pth")
    shape = {"patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3}
    trained = read_trained(
        str(tmp_path / "x.pth"), model="deit_tiny_patch16_224", model_kwargs=shape, input_size=PIXELS
    )
    assert trained.backbone.num_classes == CLASSES
    assert torch.equal(trained.backbone.blocks[1].attn.qkv.weight, backbone.blocks[1].attn.qkv.weight)


def test_a_checkpoint_of_the_references_form_is_exported(tmp_path, capsys):
    """A Namespace without --model-kwargs, as the reference and DeiT save it; the head says how many classes."""
    name = "deit_tiny_patch16_224"
    args = argparse.Namespace(model=name, input_size=PIXELS, nb_classes=7)
    weights = build_model(name, img_size=PIXELS, num_classes=7).state_dict()
    torch.save({"model": weights, "args": args}, tmp_path / "x.pth")
    assert SCRIPT.main([str(tmp_path / "x.pth"), str(tmp_path / "x"), "--formats", "timm"]) == 0
    assert "the trained weights (raw)" in capsys.readouterr().out
    again = timm.create_model(f"local-dir:{tmp_path / 'x'}", pretrained=True)
    assert again.num_classes == 7 and torch.equal(again.pos_embed, weights["pos_embed"])


def test_stock_weights_need_a_name_and_nothing_else(tmp_path):
    weights = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=3).state_dict()
    torch.save({"model": weights}, tmp_path / "x.pth")
    trained = read_trained(str(tmp_path / "x.pth"), model="deit_tiny_distilled_patch16_224")
    assert (trained.image_shape, trained.backbone.num_classes, trained.weights) == ((3, 224, 224), 3, "raw")


# ------------------------------------------------------------------------------------------------------------
# The command


def test_the_command_says_what_it_did(tmp_path, monkeypatch):
    """Also as a program of its own, from another folder, without warnings."""
    save_checkpoint("tiny", tmp_path / "x.pth")
    command = [sys.executable, "-W", "error", str(ROOT / "script" / "export_model.py"), "x.pth", "out"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.pt2",
        "model.safetensors",
    ]
    first, *lines = run.stdout.splitlines()
    took = "the moving average of the weights (ema), whose accuracy the checkpoint does not say"
    assert first == f"deit_tiny_patch16_224_diverse from x.pth: {took}"
    assert any(line.startswith("timm: out/model.safetensors (") for line in lines)
    loads = [line.strip() for line in lines if line.startswith("    model = ")]
    assert len(loads) == 2
    monkeypatch.chdir(tmp_path)
    for load in loads:
        names = {"timm": timm, "torch": torch}
        exec(load, names)
        assert logits_of(names["model"], torch.zeros(3, 3, PIXELS, PIXELS)).shape == (3, CLASSES)


# ------------------------------------------------------------------------------------------------------------
# The classes' names

ANIMALS = ["cat", "dog", "Käfer", "été, late", 'a "b"']  # CLASSES of them, some that quoting could break

NAMES_OUTSIDE = """
import json, timm, torch, onnx
for out in ("0/out", "1/out", "2/out"):
    labels = {"label_names": ""}
    torch.export.load(f"{out}/model.pt2", extra_files=labels)
    found = {"torch": json.loads(labels["label_names"] or "null")}
    config = timm.create_model(f"local-dir:{out}", pretrained=True).pretrained_cfg
    found["timm"] = config.get("label_names")
    properties = {each.key: each.value for each in onnx.load(f"{out}/model.onnx").metadata_props}
    found["onnx"] = json.loads(properties.get("label_names", "null"))
    print(json.dumps(found))
"""


def rewritten(path: Path, **flags: object) -> None:
    """The same checkpoint with other saved flags."""
    state = checkpoint.load(str(path))
    checkpoint.save({**state, "args": {**state["args"], **flags}}, path)


def test_names_of_classes_go_along(tmp_path, capsys):
    """In every format, where the classes have names; '0', '1', ... are none."""
    given = [ANIMALS, [], [str(label) for label in range(CLASSES)]]
    save_checkpoint("tiny", tmp_path / "x.pth")
    for number, names in enumerate(given):
        rewritten(tmp_path / "x.pth", class_names=names)
        out = tmp_path / str(number) / "out"
        assert SCRIPT.main([str(tmp_path / "x.pth"), str(out), "--formats", *exporting.FORMATS]) == 0
        said = "5 classes ('cat', 'dog', 'Käfer' and 2 more), images" in capsys.readouterr().out
        assert said == (names == ANIMALS)
    command = [sys.executable, "-I", "-c", NAMES_OUTSIDE]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert run.returncode == 0, run.stderr
    for number, line in enumerate(run.stdout.splitlines()[-3:]):
        expected, found = (ANIMALS if number == 0 else None), json.loads(line)
        assert (found["timm"] or None, found["torch"], found["onnx"]) == (expected, expected, expected)
        written = json.loads((tmp_path / str(number) / "out" / "config.json").read_text(encoding="utf-8"))
        assert written.get("label_names") == expected


def test_names_stay_with_weights_beside_an_onnx_file(tmp_path, monkeypatch, images):
    monkeypatch.setattr(exporting, "ONE_FILE", 0)
    backbone = randomise(build_model("deit_tiny_patch16_224", **TINY), seed=0)
    exported = exporting.to_onnx(backbone, tmp_path, SHAPE, class_names=ANIMALS)
    assert [path.name for path in exported.files] == ["model.onnx", "model.onnx.data"]
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    assert json.loads(session.get_modelmeta().custom_metadata_map["label_names"]) == ANIMALS
    logits = torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])
    torch.testing.assert_close(logits, logits_of(backbone, images), atol=1e-4, rtol=1e-4)


def test_more_names_than_classes_are_refused(tmp_path, capsys):
    save_checkpoint("tiny", tmp_path / "x.pth")
    rewritten(tmp_path / "x.pth", class_names=[*ANIMALS, "emu"])
    said = refused(capsys, tmp_path / "x.pth", tmp_path / "out")
    assert "x.pth has 6 class names, but 5 classes: correct its args' class_names" in said


def refused(capsys, *arguments: object) -> str:
    """The one line that a mistake becomes."""
    assert SCRIPT.main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("export_model.py: error: ") and captured.err.count("\n") == 1
    return captured.err


MISTAKES = {
    "no such file": (["missing.pth", "out"], r"cannot read the checkpoint missing.pth: .*No such file"),
    "damaged": (["damaged.pth", "out"], "damaged.pth is not a checkpoint, or a damaged one"),
    "no weights": (["empty.pth", "out"], "empty.pth holds no model weights"),
    "no name": (["stock.pth", "out"], r"stock.pth does not say which model it holds: give --model NAME"),
    "unknown model": (["stock.pth", "out", "--model", "deit_tinny_patch16_224"], "unknown model.*Did you mean"),
    "another model": (
        ["x.pth", "out", "--model-kwargs", "embed_dim=36"],
        r"x.pth does not fit VisionTransformer: .*\. Check --model, --model-kwargs, --input-size and --num-classes",
    ),
    "another size": (["x.pth", "out", "--input-size", "48"], r"pos_embed is \[1, 17, 24\] there and \[1, 37, 24\]"),
    "other classes": (
        ["x.pth", "out", "--num-classes", "6"],
        r"head.weight is \[5, 24\] \(classes, features\) there and \[6, 24\]",
    ),
    "another family": (["x.pth", "out", "--model", "resnet18"], "no fc.weight to tell the number of classes"),
    "bad argument": (["x.pth", "out", "--model-kwargs", "no_such=1"], "cannot be built with .*no_such"),
    "size of nothing": (["x.pth", "out", "--input-size", "0"], "--input-size must be at least 1, not 0"),
    "unknown format": (["x.pth", "out", "--formats", "timm", "onx"], "unknown format 'onx'.* Did you mean onnx"),
    "operator set": (["x.pth", "out", "--formats", "onnx", "--opset", "9"], "--opset 9 .* choose 18 to 23"),
    "unknown weights": (["x.pth", "out", "--weights", "mean"], "argument --weights: invalid choice: 'mean'"),
    "a file": (["x.pth", "x.pth"], "cannot write to x.pth: .*x.pth is a file, not a folder"),
    "in a file": (["x.pth", "x.pth/out"], "cannot write to x.pth/out: .*x.pth is a file, not a folder"),
    "unknown flag": (["x.pth", "out", "--format", "timm"], "unrecognized arguments: --format.* Did you mean"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line_and_write_nothing(tmp_path, monkeypatch, capsys, mistake):
    monkeypatch.chdir(tmp_path)
    save_checkpoint("tiny", tmp_path / "x.pth")
    torch.save(checkpoint.load("x.pth")["model"], "stock.pth")
    torch.save({"epoch": 3}, "empty.pth")
    (tmp_path / "damaged.pth").write_bytes((tmp_path / "x.pth").read_bytes()[:1000])
    before = sorted(tmp_path.rglob("*"))
    arguments, message = MISTAKES[mistake]
    assert re.search(message, refused(capsys, *arguments))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_that_denies_writing(tmp_path, monkeypatch, capsys):
    save_checkpoint("tiny", tmp_path / "x.pth")
    monkeypatch.setattr(os, "access", lambda *arguments: False)  # root may write everywhere
    assert "no permission to write in" in refused(capsys, tmp_path / "x.pth", tmp_path / "out")


def test_a_full_disk_is_one_line(tmp_path, monkeypatch, capsys):
    save_checkpoint("tiny", tmp_path / "x.pth")

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    message = refused(capsys, tmp_path / "x.pth", tmp_path / "out")
    assert message.endswith(f"cannot write to {tmp_path / 'out'}: No space left on device\n")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("package", exporting.EXTRAS)
def test_missing_extras_are_named(tmp_path, monkeypatch, capsys, package):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    message = refused(capsys, tmp_path / "x.pth", tmp_path / "out", "--formats", "onnx")
    assert f"the format onnx needs {package}: pip install -r requirements-export.txt" in message
    assert not (tmp_path / "out").exists()


DYING = """
import os, runpy, sys
import torch
save = torch.export.save

def save_and_die(program, path, **options):
    save(program, path, **options)
    os.kill(os.getpid(), int(os.environ["NUMBER"]))

torch.export.save = save_and_die
runpy.run_path("script/export_model.py", run_name="__main__")
"""


@pytest.mark.parametrize(("number", "code", "said"), [(15, 75, "stopped by a signal"), (2, 130, "interrupted")])
def test_a_signal_while_a_file_is_written_leaves_nothing(tmp_path, number, code, said):
    (tmp_path / "dying.py").write_text(DYING)
    """What nobody can read of its output is dropped."""
    save_checkpoint("tiny", tmp_path / "x.pth")
    out, errors = tmp_path / "out", tmp_path / "errors.txt"
    argv = [str(tmp_path / "x.pth"), str(out), "--formats", "timm", "torch"]
    with open("/dev/full", "wb") as full, open(errors, "wb") as file:
        env = {**os.environ, "NUMBER": str(number)}
        run = forks.Fork(tmp_path / "dying.py", argv, env, full.fileno(), file.fileno())
        assert run.wait() == code
    assert errors.read_text().strip() == f"export_model.py: {said}"
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]


def test_a_failed_export_keeps_the_old_files(tmp_path, monkeypatch):
    backbone = randomise(build_model("deit_tiny_patch16_224", **TINY), seed=0)
    exporting.to_torch(backbone, tmp_path, SHAPE)
    old = (tmp_path / "model.pt2").read_bytes()

    def dies(program, path, extra_files):
        Path(path).write_bytes(b"half a file")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.export, "save", dies)
    with pytest.raises(KeyboardInterrupt):
        exporting.to_torch(backbone, tmp_path, SHAPE)
    assert (tmp_path / "model.pt2").read_bytes() == old
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"]


class Halves(nn.Module):
    """Splits a batch by its numbers, which no graph can follow."""

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3)) if images.sum() > 0 else images.amax((2, 3))


def test_a_model_that_torch_cannot_follow_is_one_line(tmp_path):
    with pytest.raises(UserError, match="Halves cannot be exported to the format torch: ") as error:
        exporting.to_torch(Halves(), tmp_path, SHAPE)
    assert "\n" not in str(error.value) and list(tmp_path.iterdir()) == []


class Bessel(nn.Module):
    """Computes what ONNX has no operator for."""

    def forward(self, images: Tensor) -> Tensor:
        return torch.special.bessel_j1(images.mean((2, 3)))


def test_a_model_that_onnx_cannot_express_is_one_line(tmp_path):
    """With the cause alone, not with the exporter's coloured advice on how to report it."""
    with pytest.raises(UserError, match=r"Bessel cannot be exported to the format onnx: .*bessel_j1") as error:
        exporting.to_onnx(Bessel(), tmp_path, SHAPE)
    assert not set("\n\x1b") & set(str(error.value)) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", [1e-3, float("nan")])
def test_what_is_read_back_must_be_the_model(tmp_path, monkeypatch, change):
    """A file whose logits are others never takes its name."""
    backbone = randomise(build_model("deit_tiny_patch16_224", **TINY), seed=0)
    create = timm.create_model

    def altered(*arguments, **options):
        model = create(*arguments, **options)
        with torch.no_grad():
            model.head.bias += change
        return model

    monkeypatch.setattr(timm, "create_model", altered)
    with pytest.raises(UserError, match="nothing is written: the logits of timm's model are off by"):
        exporting.to_timm(backbone, tmp_path, SHAPE)
    assert list(tmp_path.iterdir()) == []
