"""Files: atomic, plain data, readable by torch and timm, refused with a reason."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import pickle
import tempfile
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from conftest import TINY, random_batch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3

import checkpoint
from engine import Precision, Updater, train_one_epoch
from losses import LabelLoss
from mixup import Mixup
from models import build_model
from run_state import RunState
from utils import UserError

CPU = Precision(torch.device("cpu"))


def make_run(tiny, seed: int = 0, train: bool = True) -> RunState:
    model, diversity = tiny("patch.cosine@last=0.5", seed=seed)
    optimizer = create_optimizer_v2(model.backbone, opt="adamw", lr=1e-3, weight_decay=0.05)
    schedule, _ = create_scheduler_v2(optimizer, num_epochs=20, warmup_epochs=5, warmup_lr=1e-6)
    run = RunState(
        model, optimizer, schedule, CPU.scaler, ModelEmaV3(model, decay=0.5), {"lr": 1e-3, "reg": ["a=1"]}
    )
    if train:
        updater = Updater(optimizer, CPU, ema=run.ema)
        train_one_epoch(model, LabelLoss(), diversity, [random_batch()], updater, Mixup())
        run.epoch, run.max_acc = 6, 71.5
        schedule.step(run.epoch)
    return run


def same(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


# ------------------------------------------------------------------------------------------------------------
# Writing and reading


def test_round_trip_restores_everything(tiny, tmp_path):
    run = make_run(tiny)
    checkpoint.save(run.state_dict(), tmp_path / "checkpoint.pth")
    state = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    expected = {"model", "optimizer", "lr_scheduler", "epoch", "model_ema", "scaler", "args", "max_acc"}
    assert set(state) == expected and state["args"] == {"lr": 1e-3, "reg": ["a=1"]}
    other = make_run(tiny, seed=1, train=False)
    assert not same(run.state_dict(), other.state_dict())
    other.load_state_dict(checkpoint.load(str(tmp_path / "checkpoint.pth")), "checkpoint.pth")
    assert same(run.state_dict(), other.state_dict())
    assert other.optimizer.param_groups[0]["lr"] == run.optimizer.param_groups[0]["lr"] != 1e-3
    assert not any(path.suffix == ".tmp" for path in tmp_path.iterdir())


def test_timm_reads_our_checkpoint(tiny, tmp_path):
    run = make_run(tiny)
    checkpoint.save(run.state_dict(), tmp_path / "checkpoint.pth")
    read = partial(
        timm.create_model, "deit_tiny_patch16_224", checkpoint_path=str(tmp_path / "checkpoint.pth"), **TINY
    )
    assert same(
        read().state_dict(), run.ema.module.backbone.state_dict()
    )  # timm takes the average where there is one
    run.ema = None
    checkpoint.save(run.state_dict(), tmp_path / "checkpoint.pth")
    assert same(read().state_dict(), run.model.backbone.state_dict())
    plain = timm.create_model("deit_tiny_patch16_224", **TINY)
    plain.load_state_dict(torch.load(tmp_path / "checkpoint.pth", weights_only=True)["model"], strict=True)


def test_a_crash_while_writing_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pth"
    checkpoint.save({"epoch": 1}, path)

    def dies(state, file):
        file.write(b"half a file")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", dies)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save({"epoch": 2}, path)
    assert checkpoint.load(str(path)) == {"epoch": 1}


def test_the_file_is_flushed_before_it_is_renamed(tmp_path, monkeypatch):
    order = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, n=name, o=original: (order.append(n), o(*a))[1])
    checkpoint.save({"epoch": 1}, tmp_path / "checkpoint.pth")
    assert order == ["fsync", "replace"]


def test_a_checkpoint_of_the_references_form_is_read(tmp_path):
    state = {"model": build_model("deit_tiny_patch16_224", **TINY).state_dict(), "args": argparse.Namespace(lr=1)}
    torch.save(state, tmp_path / "old.pth")
    assert checkpoint.load(str(tmp_path / "old.pth"))["args"].lr == 1


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


@pytest.mark.parametrize("content", ["empty", "text", "truncated", "pickle with code", "zip without data"])
def test_what_is_no_checkpoint_is_refused_and_never_executed(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": {"w": torch.zeros(1000)}}, path)
    data = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "text": b"not a checkpoint",
            "truncated": data[: len(data) // 2],
            "pickle with code": pickle.dumps({"model": Evil()}, protocol=2),
            "zip without data": b"PK\x05\x06" + b"\0" * 18,
        }[content]
    )
    with pytest.raises(UserError, match=r"checkpoint.pth is not a checkpoint, or a damaged one") as error:
        checkpoint.load(str(path))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "executed").exists()


@pytest.mark.filterwarnings("default:Detected pickle protocol")  # torch warns of what random bytes look like
@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_are_read_or_refused(content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.pth"
        path.write_bytes(content)
        with contextlib.suppress(UserError):
            checkpoint.load(str(path))


@pytest.mark.filterwarnings("default:Detected pickle protocol")
@settings(max_examples=200, deadline=None)
@given(st.data())
def test_flipped_bytes_are_read_or_refused(data):
    buffer = io.BytesIO()
    torch.save({"model": {"w": torch.arange(4.0)}, "epoch": 3, "args": {"lr": 1e-3}}, buffer)
    content = bytearray(buffer.getvalue())
    for position in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=5)):
        content[position] ^= data.draw(st.integers(1, 255))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.pth"
        path.write_bytes(content)
        with contextlib.suppress(UserError):
            checkpoint.load(str(path))


def test_addresses_are_downloaded_without_running_code(monkeypatch):
    asked = {}

    def download(url, **options):
        asked.update(url=url, **options)
        return {"model": {}}

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    checkpoint.load("https://example.org/deit.pth")
    assert asked == {"url": "https://example.org/deit.pth", "map_location": "cpu", "weights_only": True}


# ------------------------------------------------------------------------------------------------------------
# Resuming what cannot be resumed


def test_weights_alone_cannot_be_resumed(tiny):
    run = make_run(tiny, train=False)
    with pytest.raises(UserError, match="cannot be resumed, it has no optimizer, lr_scheduler, epoch; --finetune"):
        run.load_state_dict({"model": run.model.backbone.state_dict()}, "x.pth")


def test_another_models_checkpoint_is_refused(tiny):
    state = make_run(tiny).state_dict()
    wide, _ = tiny("patch.cosine@last=0.5", embed_dim=36)
    run = make_run(tiny, train=False)
    run.model = wide
    with pytest.raises(UserError, match=r"does not fit VisionTransformer: cls_token is \[1, 1, 24\] there and"):
        run.load_state_dict(state, "x.pth")


def test_another_optimizers_checkpoint_is_refused(tiny):
    run = make_run(tiny)
    state = run.state_dict()
    state["optimizer"]["param_groups"] = state["optimizer"]["param_groups"][:1]
    with pytest.raises(UserError, match="is not what --opt and --sched say"):
        run.load_state_dict(state, "x.pth")


def test_a_checkpoint_without_ema_starts_one_and_says_so(tiny, capsys):
    state = make_run(tiny).state_dict()
    del state["model_ema"]
    run = make_run(tiny, seed=1, train=False)
    run.load_state_dict(state, "x.pth")
    assert "warning: x.pth holds no EMA" in capsys.readouterr().out
    assert same(run.ema.module.backbone.state_dict(), state["model"])


def test_a_file_without_weights(tiny):
    with pytest.raises(UserError, match="holds no model weights"):
        checkpoint.model_weights({"epoch": 3}, "x.pth")
    with pytest.raises(UserError, match="holds no model weights"):
        checkpoint.model_weights([1, 2], "x.pth")
    weights = {"module.head.weight": torch.zeros(2), "_orig_mod.head.bias": torch.zeros(2)}
    assert list(checkpoint.model_weights({"state_dict": weights}, "x.pth")) == ["head.weight", "head.bias"]


# ------------------------------------------------------------------------------------------------------------
# Fine-tuning


def test_fine_tuning_to_other_classes_and_images(tiny):
    source, _ = tiny()
    target = build_model("deit_tiny_patch16_224", **TINY | {"img_size": 48, "num_classes": 7})
    weights = source.backbone.state_dict()
    head = target.head.weight.clone()
    assert checkpoint.load_for_finetuning(target, weights, "x.pth") == ["head.weight", "head.bias"]
    assert torch.equal(target.head.weight, head)
    assert torch.equal(target.blocks[1].mlp.fc1.weight, weights["blocks.1.mlp.fc1.weight"])
    grid = weights["pos_embed"][:, 1:].reshape(1, 4, 4, 24).permute(0, 3, 1, 2)
    larger = torch.nn.functional.interpolate(grid, size=(6, 6), mode="bicubic", align_corners=False)
    assert torch.equal(target.pos_embed[:, 0], weights["pos_embed"][:, 0])
    torch.testing.assert_close(target.pos_embed[:, 1:], larger.permute(0, 2, 3, 1).reshape(1, 36, 24))
    assert weights["head.weight"].shape == (5, 24)  # the caller's weights are left alone


def test_fine_tuning_keeps_a_fitting_head(tiny):
    source, _ = tiny(seed=0)
    target, _ = tiny(seed=1)
    assert checkpoint.load_for_finetuning(target.backbone, source.backbone.state_dict(), "x.pth") == []
    assert same(target.backbone.state_dict(), source.backbone.state_dict())


def test_fine_tuning_from_another_architecture_is_refused(tiny):
    source, _ = tiny()
    deeper = build_model("deit_tiny_patch16_224", **TINY | {"depth": 4})
    with pytest.raises(UserError, match=r"x.pth does not fit .*parameters are missing, first blocks.3"):
        checkpoint.load_for_finetuning(deeper, source.backbone.state_dict(), "x.pth")
