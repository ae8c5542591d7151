"""Whole runs of segmentation in a few seconds: a tiny backbone on a dozen small images, in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from segmentation.command import main

BACKBONE = ["--model", "deit_tiny_patch16_224", "--device", "cpu"]
BACKBONE += ["--model-kwargs", "patch_size=4", "embed_dim=16", "depth=4", "num_heads=2"]
FLAGS = ["--data-set", "FOLDER", "--crop-size", "16", "--resize", "24", "20", "--test-resize", "0"]
FLAGS += ["--channels", "8", "--auxiliary-channels", "4", "--batch-size", "4", "--lr", "1e-2"]
FLAGS += ["--num_workers", "0", "--print-freq", "100"]
FLAGS += ["--iterations", "6", "--eval-interval", "3", "--warmup-iterations", "2", "--model-ema-decay", "0.5"]
TERMS = ["--reg", "patch.cosine=0.1", "--reg", "attn.cosine=0.1", "--reg", "weight.so=1e-4"]


def make_pairs(root: Path, train: int = 7, val: int = 5) -> Path:
    """Pictures whose right half is bright: three classes, the third in a corner, and some unlabelled pixels."""
    random = np.random.default_rng(0)
    for half, count in (("train", train), ("val", val)):
        for kind in ("images", "masks"):
            (root / kind / half).mkdir(parents=True)
        for number in range(count):
            height, width = 17 + 2 * number, 26 - number
            mask = np.zeros((height, width), np.uint8)
            mask[:, width // 2 :] = 1
            mask[:5, :5] = 2
            pixels = random.integers(0, 60, (height, width, 3)) + 90 * mask[..., None]
            mask[-1] = 255
            Image.fromarray(pixels.astype(np.uint8)).save(root / "images" / half / f"{number}.png")
            Image.fromarray(mask).save(root / "masks" / half / f"{number}.png")
    return root


def segment(images: Path, output: Path | None, *flags: str, model: list[str] = BACKBONE) -> int:
    """The exit code of a run."""
    where = [] if output is None else ["--output_dir", str(output)]
    return main([*model, *FLAGS, "--data-path", str(images), *where, *flags])


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
