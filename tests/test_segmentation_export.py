"""Trained segmenters outside the project: torch and ONNX Runtime alone give the logits of every pixel."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import timm
import torch
import torch.nn.functional as F
from processes import PATIENCE
from segmenters import SWIN, randomised
from test_export import SCRIPT, refused
from torch import Tensor

from options import config
from segmentation import export as exporting
from segmentation.command import main
from segmentation.inference import Predictor
from segmentation.network import Segmenter
from segmentation.settings import resolve
from segmentation.starting import build_network
from segmentation.trained import read_segmenter
from state import checkpoint

VIT = ["--model", "deit_tiny_patch16_224", "--crop-size", "32"]
VIT += ["--model-kwargs", "patch_size=8", "embed_dim=12", "depth=1", "num_heads=2"]
UPER = ["--head", "uper", "--map-layers", "0", "0", "0", "0", "--channels", "6", "--auxiliary-channels", "4"]
LINEAR = ["--head", "linear"]
SWIN_KWARGS = [f"{key}={str(value).replace(' ', '')}" for key, value in SWIN.items()]
BEIT = ["--model", "beit_base_patch16_224", *VIT[2:]]
CLASSES = 5
# Not of whole patches, of them, of one, less than one, and longer than what was trained on
SIZES = [(2, 29, 43), (1, 32, 32), (3, 8, 16), (1, 8, 8), (1, 5, 3), (1, 100, 61)]

# Run in a folder that holds images.pt and model.pt2, isolated from this repository, with torch alone.
OUTSIDE = """
import importlib.util, sys
import torch
model = torch.export.load("out/model.pt2").module(check_guards=False)
with torch.no_grad():
    torch.save([model(images) for images in torch.load("images.pt")], "logits.pt")
assert "timm" not in sys.modules and importlib.util.find_spec("segmentation") is None
"""


def saved(path: Path, *flags: str, **contents: Any) -> Segmenter:
    """A checkpoint with random weights as a run writes it, and its network, auxiliary head included."""
    args = resolve(flags)
    torch.manual_seed(0)
    network = randomised(build_network(args, CLASSES, origin=None, fresh=True)).float().eval()
    names = ["road", "Käfer", "sky", "tree", "a, b"]
    state = {"model": network.state_dict(), "args": {**config.plain(args), "class_names": names}, **contents}
    checkpoint.save(state, path)
    return network


@torch.no_grad()
def pixel_logits(network: Segmenter, images: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, K, H, W], by torch's own resize of what the network gives."""
    return F.interpolate(network(images), size=images.shape[-2:], mode="bilinear", align_corners=False)


def batches(*sizes: tuple[int, int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(batch, 3, *sides, generator=generator) for batch, *sides in sizes]


def session_of(folder: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])


def assert_alike(session: onnxruntime.InferenceSession, network: Segmenter, images: Tensor) -> None:
    (logits,) = session.run(None, {"images": images.numpy()})
    expected = pixel_logits(network, images)
    assert expected.std(dim=1).mean() > 0.1  # the classes differ
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-5, atol=1e-4)


# ------------------------------------------------------------------------------------------------------------
# Images of any size


@pytest.mark.parametrize(
    "flags",
    [[*UPER, "--neck", "deconv"], [*UPER, "--neck", "multilevel"], LINEAR],
    ids=["deconv", "multilevel", "linear"],
)
def test_onnx_runtime_takes_images_of_any_size(tmp_path, capsys, flags):
    network = saved(tmp_path / "x.pth", *VIT, *flags)
    assert SCRIPT.main([str(tmp_path / "x.pth"), str(tmp_path), "--formats", "onnx"]) == 0
    assert "5 classes ('road', 'Käfer', 'sky' and 2 more), images [B, 3, H, W]\n" in capsys.readouterr().out
    graph = onnx.load(tmp_path / "model.onnx").graph
    (shape,) = [[side.dim_param or side.dim_value for side in i.type.tensor_type.shape.dim] for i in graph.input]
    assert shape == ["batch", 3, "height", "width"]
    assert not any("auxiliary" in weight.name for weight in graph.initializer)
    session = session_of(tmp_path)
    for images in batches(*SIZES):
        assert_alike(session, network, images)
    names = json.loads(session.get_modelmeta().custom_metadata_map["label_names"])
    assert names == ["road", "Käfer", "sky", "tree", "a, b"]


def test_torch_alone_takes_images_of_any_size(tmp_path, capsys):
    network, images = saved(tmp_path / "x.pth", *VIT, *LINEAR), batches(*SIZES)
    assert SCRIPT.main([str(tmp_path / "x.pth"), str(tmp_path / "out"), "--formats", "torch"]) == 0
    load = f'torch.export.load("{tmp_path / "out" / "model.pt2"}").module(check_guards=False)'
    assert load in capsys.readouterr().out
    torch.save(images, tmp_path / "images.pt")
    command = [sys.executable, "-I", "-W", "error", "-c", OUTSIDE]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert run.returncode == 0, run.stderr
    for each, logits in zip(images, torch.load(tmp_path / "logits.pt"), strict=True):
        torch.testing.assert_close(logits, pixel_logits(network, each), rtol=1e-5, atol=1e-5)


def test_what_a_run_leaves_predicts_as_its_evaluation_does(tmp_path, capsys):
    """From training to class numbers: a run's checkpoint, its EMA, UperNet with its default neck."""
    argv = ["--data-set", "DIGITS", *VIT, *UPER, "--device", "cpu", "--iterations", "2", "--eval-interval", "2"]
    argv += ["--batch-size", "2", "--warmup-iterations", "0", "--lr", "1e-2", "--model-ema-decay", "0.5"]
    assert main([*argv, "--num_workers", "0", "--output_dir", str(tmp_path)]) == 0
    last = json.loads((tmp_path / "log.txt").read_text().splitlines()[-1])
    better = "ema" if last["ema_test_miou"] >= last["test_miou"] else "raw"
    score = last["ema_test_miou" if better == "ema" else "test_miou"]
    capsys.readouterr()
    assert SCRIPT.main([str(tmp_path / "checkpoint.pth"), str(tmp_path), "--formats", "onnx"]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert (
        first.startswith("uper head on deit_tiny_patch16_224 from ") and f"({better}), mIoU {score:.2f}%" in first
    )
    state = checkpoint.load(str(tmp_path / "checkpoint.pth"))
    network = build_network(resolve([*argv]), 11, origin=None, fresh=True).eval()
    network.load_state_dict(state["model_ema" if better == "ema" else "model"])
    session = session_of(tmp_path)
    for images in batches(*SIZES):
        (logits,) = session.run(None, {"images": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), pixel_logits(network, images), rtol=1e-5, atol=1e-4)
        for image, found in zip(images, torch.from_numpy(logits), strict=True):
            evaluated = Predictor()(network, image, image.shape[-2:])
            assert (found.argmax(dim=0) == evaluated).double().mean() > 0.999


# ------------------------------------------------------------------------------------------------------------
# Images of one size


def test_windows_take_one_size(tmp_path, capsys):
    """A Swin's file is for the training crop's size, and the command says so, or for the one that is asked for."""
    flags = ["--model", "swin_tiny_patch4_window7_224", "--crop-size", "32", "48", *UPER[7:]]
    network = saved(tmp_path / "x.pth", "--model-kwargs", *SWIN_KWARGS, *flags)
    argv = [str(tmp_path / "x.pth"), str(tmp_path), "--formats", "onnx"]
    said, _ = SCRIPT.segmenter(SCRIPT.get_args_parser().parse_args(argv), checkpoint.load(argv[0]))
    assert "images [B, 3, 32, 48], the training crop's size, since this backbone cannot be traced for any" in said
    assert SCRIPT.main([*argv, "--input-size", "29", "43"]) == 0
    assert "images [B, 3, 29, 43]\n" in capsys.readouterr().out
    session = session_of(tmp_path)
    for images in batches((1, 29, 43), (3, 29, 43)):
        assert_alike(session, network, images)
    (other,) = batches((1, 64, 48))
    with pytest.raises(Exception, match="Got invalid dimensions"):
        session.run(None, {"images": other.numpy()})


@pytest.mark.parametrize("flags", [VIT, BEIT], ids=["vit", "beit"])
def test_one_size_can_be_asked_for(tmp_path, capsys, flags):
    """BEiT is for one size, and pads smaller images."""
    network, (images,) = saved(tmp_path / "x.pth", *flags, *LINEAR), batches((2, 29, 27))
    argv = [str(tmp_path / "x.pth"), str(tmp_path), "--formats", "torch", "--input-size", "29", "27"]
    assert SCRIPT.main(argv) == 0
    assert "images [B, 3, 29, 27]\n" in capsys.readouterr().out
    program = torch.export.load(tmp_path / "model.pt2").module()
    torch.testing.assert_close(program(images), pixel_logits(network, images), rtol=1e-5, atol=1e-5)


def test_families_that_can_be_traced_for_any_size():
    """Convolutions and pooled attention can; their smallest image is a pixel of the last stage."""
    shapes = {
        "convnext_atto": ["dims=(8,8,16,16)", "depths=(1,1,1,1)"],
        "pvt_v2_b0": ["embed_dims=(8,8,16,16)", "num_heads=(1,1,2,2)", "depths=(1,1,1,1)"],
        "swinv2_tiny_window8_256": SWIN_KWARGS,
    }
    found = {}
    for name, kwargs in shapes.items():
        args = resolve(["--model", name, "--crop-size", "64", *UPER[7:], "--model-kwargs", *kwargs])
        network = build_network(args, CLASSES, origin=None, fresh=True)
        found[name] = exporting.takes_any_size(network)
        assert exporting.sizes_to_compare(network, (64, 64))[:3] == [(159, 223), (128, 192), (32, 32)]
    assert found == {"convnext_atto": True, "pvt_v2_b0": True, "swinv2_tiny_window8_256": False}


# ------------------------------------------------------------------------------------------------------------
# What is read, and what is refused


def test_timms_format_holds_the_backbone(tmp_path):
    network = saved(tmp_path / "x.pth", *VIT, *UPER)
    assert SCRIPT.main([str(tmp_path / "x.pth"), str(tmp_path / "out"), "--formats", "timm"]) == 0
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    own = network.backbone.state_dict()
    assert model.num_classes == 0 and model.state_dict().keys() == own.keys()
    assert all(torch.equal(weight, own[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize(("raw", "ema", "better"), [(41.5, 40.0, "raw"), (41.5, 42.0, "ema")])
def test_the_better_weights_are_those_of_the_higher_miou(tmp_path, raw, ema, better):
    log = [json.dumps({"test_miou": raw, "ema_test_miou": ema})]
    network = saved(tmp_path / "x.pth", *VIT, *UPER)
    average = {name: weight + 1 for name, weight in network.state_dict().items()}
    saved(tmp_path / "x.pth", *VIT, *UPER, log=log, model_ema=average)
    trained = read_segmenter(str(tmp_path / "x.pth"))
    assert trained.backbone.weights == better and trained.backbone.evaluated == (raw, ema, 0, "mIoU")
    expected = average if better == "ema" else network.state_dict()
    found = trained.network.state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in found.items())
    lost = expected.keys() - found.keys()
    assert lost and all(name.startswith("auxiliary_head.") for name in lost)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "deit_tiny_patch16_224"], "says which network for segmentation it holds: drop --model"),
        (["--model-kwargs", "depth=3"], "says which network for segmentation it holds: drop --model-kwargs"),
        (["--num-classes", "7"], "says which network for segmentation it holds: drop --num-classes"),
        (["--input-size", "0"], "--input-size must be at least 1, not 0"),
        (["--input-size", "40"], "this backbone takes images of 32 x 32 pixels alone, not 40 x 40"),
        (["--weights", "ema"], "x.pth holds no EMA: choose --weights raw or auto"),
    ],
    ids=lambda each: each[0] if isinstance(each, list) else "",
)
def test_flags_that_cannot_be_are_refused(tmp_path, capsys, flags, message):
    saved(tmp_path / "x.pth", *BEIT, *UPER)
    assert message in refused(capsys, tmp_path / "x.pth", tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head": None}, "x.pth does not say what network it holds: give a checkpoint of python -m segmentation"),
        ({"head": "fcn"}, "x.pth has a head or a neck of another version: its args say fcn, scale"),
        ({"channels": "six"}, "x.pth is malformed, its args' channels is 'six'"),
        ({"channels": 7}, "x.pth does not fit Segmenter: "),
        ({"class_names": ["a"]}, "x.pth has 1 class names, but 5 classes"),
        ({"model": None}, "x.pth does not say what network it holds"),
    ],
)
def test_files_that_say_something_else_are_refused(tmp_path, capsys, change, message):
    saved(tmp_path / "x.pth", *VIT, *UPER)
    state = checkpoint.load(str(tmp_path / "x.pth"))
    args = {name: value for name, value in {**state["args"], **change}.items() if value is not None}
    checkpoint.save({**state, "args": args}, tmp_path / "x.pth")
    assert message in refused(capsys, tmp_path / "x.pth", tmp_path / "out")
