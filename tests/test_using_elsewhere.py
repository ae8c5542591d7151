"""docs/using-elsewhere.md: its loops run as they stand, and what its table says is read, is read."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import TINY, random_batch
from pictures import save_photo
from processes import PATIENCE
from torch import Tensor, nn

import export as exporting
from elsewhere import attach
from engine import Precision, Updater, train_one_epoch
from losses import Objective
from mixing.mixup import Mixup
from models import DiverseViT, build_model
from models.weights import load_timms, model_weights
from regularizers import Diversity, parse_spec
from state import checkpoint

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "using-elsewhere.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.partition("\n## Remedies")[0], flags=re.M | re.S)
LOOPS = dict(zip(("timm", "lightning", "transformers"), BLOCKS, strict=True))
SPECS = ("patch.cosine@last=0.5", "weight.cno@all=5e-4")
CPU = Precision(torch.device("cpu"))

# Runs a block of the page in a program with modules of our names, with its terms and without. Notes what its first
# step computes.
PROGRAM = """
import importlib, sys
from pathlib import Path
import torch
from torch.utils.data import DataLoader, TensorDataset
loop, repository, *names = sys.argv[1:]
assert all(importlib.import_module(name).OWNER == "the program" for name in names)
images, labels = torch.load("batch.pt")

def build():
    if loop == "transformers":
        from transformers import AutoModelForImageClassification
        model = AutoModelForImageClassification.from_pretrained("exported").train()
        return model, model.timm_model
    import timm
    model = timm.create_model("local-dir:exported", pretrained=True)
    return model, model

def watch(model, first):
    def note(name, value):
        if torch.is_grad_enabled():
            first.setdefault(name, value.detach().clone())
    model.patch_embed.register_forward_pre_hook(lambda module, args: note("images", args[0]))
    model.head.register_forward_hook(lambda module, args, output: note("logits", output))
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: note_gradient(first, name, p))

def note_gradient(first, name, parameter):
    first["gradients"].setdefault(name, parameter.grad.clone())

for block in ("with", "without"):
    model, inner = build()
    first = {"gradients": {}}
    watch(inner, first)
    model.register_forward_pre_hook(lambda *_: torch.manual_seed(1) and None)  # CNO's probes
    before = {name: value.clone() for name, value in inner.state_dict().items()}
    program = {"model": model, "REPOSITORY": repository}
    program["loader"] = DataLoader(TensorDataset(images, labels), batch_size=len(images))
    program["dataset"] = [{"pixel_values": i, "labels": l} for i, l in zip(images, labels)]
    exec(Path(f"{block}.py").read_text(), program)
    after = inner.state_dict()
    assert list(before) == list(after) and any(not torch.equal(before[name], after[name]) for name in after)
    torch.save({**first, "loss": program["loss"].detach() if "loss" in program else None}, f"{block}.pt")
assert all(importlib.import_module(name).OWNER == "the program" for name in names)
"""


def stock(**overrides: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("deit_tiny_patch16_224", **{**TINY, **overrides})


@pytest.fixture(scope="module", params=LOOPS)
def steps(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Any]:
    """A loop of the page, and what its first step computed with terms and without, in a process of its own."""
    loop, folder = request.param, tmp_path_factory.mktemp(request.param)
    names = ("utils", "models", "losses", "regularizers", "errors", "elsewhere")
    for name in names:
        (folder / f"{name}.py").write_text("OWNER = 'the program'\n")
    without, changed = re.subn(r'\("patch\.[^)]*\)', "()", LOOPS[loop])
    assert changed == 1
    (folder / "with.py").write_text(LOOPS[loop])
    (folder / "without.py").write_text(without)
    torch.save(random_batch(), folder / "batch.pt")
    exporting.to_timm(stock(), folder / "exported", (3, 32, 32))
    env = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", PROGRAM, loop, str(ROOT), *names]
    process = subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return loop, torch.load(folder / "with.pt"), torch.load(folder / "without.pt")


@cache
def own_loop(specs: tuple[str, ...], smoothing: float) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Loss and terms, and gradients, of a step of this project's own loop on the same batch."""
    objective = Objective(diversity=Diversity([parse_spec(spec) for spec in specs], depth=3))
    model = DiverseViT(stock(), objective.needs)
    updater = Updater(torch.optim.SGD(model.parameters(), lr=0.0), CPU)
    torch.manual_seed(1)
    values = train_one_epoch(model, objective, [random_batch()], updater, Mixup(0, 0, smoothing=smoothing))
    return values, {name: parameter.grad for name, parameter in model.backbone.named_parameters()}


def test_the_loops_are_short() -> None:
    for name, block in LOOPS.items():
        assert f"from {name}" in block
        assert len([line for line in block.splitlines() if line]) < 15
        assert all(spec in block for spec in SPECS)


def test_a_loop_of_others_steps_as_ours(steps: tuple[str, Any, Any]) -> None:
    loop, first, _ = steps
    values, gradients = own_loop(SPECS, 0.1 if loop == "timm" else 0.0)
    assert values["weight.cno@all"] * 5e-4 + values["patch.cosine@last"] * 0.5 > 0.01  # the terms have a share
    if loop == "timm":
        assert first["loss"].item() == pytest.approx(values["loss"], rel=1e-6)
    assert first["gradients"].keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(first["gradients"][name], gradient, rtol=1e-5, atol=1e-7, msg=name)


def test_without_terms_a_loop_of_others_computes_as_without_us(steps: tuple[str, Any, Any]) -> None:
    """Bit for bit."""
    loop, _, first = steps
    images, labels = random_batch()
    order = [next(i for i, one in enumerate(images) if torch.equal(one, image)) for image in first["images"]]
    assert sorted(order) == list(range(len(images)))
    plain = stock().train()
    logits = plain(images[order])
    assert torch.equal(first["logits"], logits)
    loss_fn = timm.loss.LabelSmoothingCrossEntropy(0.1) if loop == "timm" else nn.CrossEntropyLoss()
    loss_fn(logits, labels[order]).backward()
    for name, parameter in plain.named_parameters():
        assert torch.equal(first["gradients"][name], parameter.grad), name


# ------------------------------------------------------------------------------------------------------------
# What reads what. Other rows of the table have their tests where the files are made: test_export.py,
# test_timms_checkpoints.py.

# Run where an exported folder lies, without this repository.
OTHERS = """
import timm, torch
from captum.attr import IntegratedGradients
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from transformers import AutoImageProcessor, AutoModelForImageClassification
images, image = torch.load("images.pt"), Image.open("image.png")
model = timm.create_model("local-dir:exported", pretrained=True).eval()
theirs = AutoModelForImageClassification.from_pretrained("exported").eval()
program = torch.export.load("exported/model.pt2").module()
with torch.no_grad():
    found = {"timm": model(images), "transformers": theirs(images).logits}
found["processor"] = AutoImageProcessor.from_pretrained("exported")(image)["pixel_values"][0]
found["transform"] = create_transform(**resolve_model_data_config(model))(image)
found["baseline"] = model(torch.zeros_like(images)).detach()
for name, one in (("captum", model), ("captum of model.pt2", program)):
    found[name] = IntegratedGradients(one).attribute(images, target=2, n_steps=50).detach()
theirs.save_pretrained("saved")
torch.save(found, "found.pt")
"""


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder with an exported model, and what others make of it in a process of their own."""
    folder = tmp_path_factory.mktemp("others")
    exporting.to_timm(stock(), folder / "exported", (3, 32, 32))
    exporting.to_torch(stock(), folder / "exported", (3, 32, 32))
    torch.save(random_batch()[0], folder / "images.pt")
    save_photo(folder / "image.png", seed=0, width=50, height=40)
    env = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.run(
        [sys.executable, "-c", OTHERS],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return folder, torch.load(folder / "found.pt")


def test_transformers_gives_the_same_bits_and_pixels(others: tuple[Path, Any]) -> None:
    _, found = others
    with torch.no_grad():
        expected = stock().eval()(random_batch()[0])
    assert torch.equal(found["timm"], expected) and torch.equal(found["transformers"], expected)
    assert found["processor"].shape == (3, 32, 32)
    assert torch.equal(found["processor"], found["transform"])


def test_what_transformers_saves_is_read_here(others: tuple[Path, Any]) -> None:
    """As --pretrained --model local-dir:saved reads it."""
    folder, found = others
    name = f"local-dir:{folder / 'saved'}"
    backbone = build_model(name).eval()
    load_timms(backbone, name)
    with torch.no_grad():
        assert torch.equal(backbone(random_batch()[0]), found["transformers"])


def test_captum_explains_either_form_alike(others: tuple[Path, Any]) -> None:
    """The attributions of an image sum up to what its logit differs from that of a black one."""
    _, found = others
    difference = (found["timm"] - found["baseline"])[:, 2]
    torch.testing.assert_close(found["captum"].sum(dim=(1, 2, 3)), difference, rtol=1e-3, atol=1e-3)
    assert difference.abs().min() > 5e-3
    assert torch.equal(found["captum of model.pt2"], found["captum"])


def test_timms_saver_writes_a_model_with_terms_as_one_without(tmp_path: Path) -> None:
    """Stock timm reads it, and so do we; its average, too."""
    model = attach(stock(), SPECS)
    ema = timm.utils.ModelEmaV3(model)
    with torch.no_grad():
        for parameter in ema.module.parameters():
            parameter.mul_(0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    saver = timm.utils.CheckpointSaver(model, optimizer, model_ema=ema, checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(0, metric=1.0)
    file = tmp_path / "last.pth.tar"
    for use_ema in (False, True):
        expected = {name: value * (0.5 if use_ema else 1) for name, value in stock().state_dict().items()}
        read = timm.create_model("deit_tiny_patch16_224", **TINY)
        timm.models.load_checkpoint(read, str(file), use_ema=use_ema)
        ours = model_weights(checkpoint.load(str(file)), str(file), use_ema)
        for name, value in expected.items():
            assert torch.equal(read.state_dict()[name], value) and torch.equal(ours[name], value)
