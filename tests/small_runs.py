"""Whole runs of a few seconds: a tiny model on two dozen images, through the command line, in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pictures import save_photo

import main
from state import checkpoint

MODEL = ["--model", "deit_tiny_patch16_224", "--input-size", "8", "--device", "cpu", "--num_workers", "0"]
MODEL += ["--model-kwargs", "patch_size=4", "embed_dim=12", "depth=2", "num_heads=2"]
FLAGS = [*MODEL, "--batch-size", "4", "--aa", "none", "--no-repeated-aug", "--print-freq", "100"]
FLAGS += ["--lr", "1e-2", "--unscale-lr", "--warmup-epochs", "1", "--model-ema-decay", "0.9"]


def make_images(root: Path, per_class: int = 6) -> Path:
    """Folders train and val, of two classes."""
    for half in ("train", "val"):
        for label in range(2):
            for number in range(per_class):
                save_photo(
                    root / half / f"class{label}" / f"{number}.png", seed=10 * number + label, width=9, height=9
                )
    return root


def train(images: Path, output: Path | None, *flags: str) -> int:
    """The exit code of a run."""
    where = [] if output is None else ["--output_dir", str(output)]
    return main.main([*FLAGS, "--data-path", str(images), *where, *flags])


def saved(folder: Path, name: str = "checkpoint.pth") -> Any:
    return checkpoint.load(str(folder / name))


def assert_same(one: Any, other: Any, where: str = "") -> None:
    """Equal bit for bit, in all parts."""
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other), where
    elif isinstance(one, dict):
        assert list(one) == list(other), where
        for key in one:
            assert_same(one[key], other[key], f"{where}[{key!r}]")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for number, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{where}[{number}]")
    else:
        assert one == other, where
