"""Terms without maps and logits in whole runs, against `--explicit-terms`: each run is a second long."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import FLAGS, assert_same, make_images, saved, train

from models.attentions import Attentions

TERMS = ["patch.mixing=1", "attn.cosine@all=1", "attn.mgd@1=0.1", "attn.cno@all=0.1", "attn.contrastive@0:1=1"]
MEASURES = ["attn.cno@all", "attn.cosine_cross@1:0"]
REG = [flag for term in TERMS for flag in ("--reg", term)]
RUN = [*REG, *(flag for spec in MEASURES for flag in ("--measure", spec)), "--drop-path", "0.3", "--drop", "0.1"]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def start(images, tmp_path_factory) -> list[str]:
    """Flags that start a run from weights whose attention maps are far from uniform, so that heads differ."""
    folder = tmp_path_factory.mktemp("start")
    assert train(images, folder, "--epochs", "1") == 0
    state = saved(folder)
    for name, weight in state["model"].items():
        if name.endswith("attn.qkv.weight"):
            weight.mul_(20)
    torch.save(state, folder / "sharp.pth")
    return ["--finetune", str(folder / "sharp.pth"), "--weights", "raw", "--train-mode"]


def losses(folder: Path) -> list[dict[str, float]]:
    """What training and evaluation logged of each epoch."""
    lines = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    return [{name: value for name, value in line.items() if re.match("train_|test_|ema_", name)} for line in lines]


def assert_close(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> None:
    assert [line.keys() for line in one] == [line.keys() for line in other] and one
    for ours, theirs in zip(one, other, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--grad-checkpointing", "--grad-accum-steps", "2", "--batch-size", "2"],
        ["--model-kwargs", *FLAGS[FLAGS.index("--model-kwargs") + 1 :][:4], "attn_drop_rate=0.3"],
        ["--model", "deit_tiny_distilled_patch16_224"],
    ],
    ids=["plain", "recomputed and accumulated", "attention dropout", "distilled"],
)
def test_a_run_is_the_same_with_maps_and_logits(images, start, tmp_path, monkeypatch, flags):
    """All terms, measures and losses of two epochs: the same random numbers are drawn, also by dropout."""
    served: list[list[int]] = []
    keep = Attentions.keep
    monkeypatch.setattr(Attentions, "keep", lambda own, sizes: (served.append(sorted(sizes)), keep(own, sizes))[1])
    for name, explicit in (("ours", []), ("theirs", ["--explicit-terms"])):
        assert train(images, tmp_path / name, "--epochs", "2", *RUN, *start, *flags, *explicit) == 0
        assert ([0, 1] in served) == (name == "ours")
        served.clear()
    assert_close(losses(tmp_path / "ours"), losses(tmp_path / "theirs"))
    assert losses(tmp_path / "ours")[0]["train_attn.cosine@all"] < 1.9  # 2, if heads were alike


def test_a_stopped_run_goes_on_exactly(images, tmp_path):
    """Within an epoch, bit for bit; and with maps and logits from there on, but for rounding."""
    run = [*RUN, "--epochs", "3", "--save-interval-steps", "1", "--checkpoint-hist", "9"]
    assert train(images, tmp_path / "whole", *run) == 0
    stopped = str(tmp_path / "whole" / "checkpoint.5.pth")
    assert saved(tmp_path / "whole", "checkpoint.5.pth")["step"] == 1
    for name, explicit in (("same", []), ("other", ["--explicit-terms"])):
        assert train(images, tmp_path / name, *run, "--resume", stopped, *explicit) == 0
    whole = losses(tmp_path / "whole")
    for part in ("model", "model_ema", "optimizer"):
        assert_same(*(saved(tmp_path / name)[part] for name in ("whole", "same")))
    assert losses(tmp_path / "same") == whole[-len(losses(tmp_path / "same")) :]
    assert_close(losses(tmp_path / "other"), whole[-len(losses(tmp_path / "other")) :])


def test_a_run_says_which_maps_it_forms(images, tmp_path, capsys):
    terms = ["--reg", "attn.cosine@all=1"]
    assert train(images, tmp_path / "none", "--epochs", "1", *terms) == 0
    assert "attention maps" not in capsys.readouterr().out
    assert train(images, tmp_path / "one", "--epochs", "1", *terms, "--reg", "attn.cno:inverse@1=0.1") == 0
    assert "note: terms form attention maps (docs/shortcuts.md), in blocks 1\n" in capsys.readouterr().out
