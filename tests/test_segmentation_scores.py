"""Scores against sets of pixels, torchmetrics' Jaccard index, and one process."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import forks
import numpy as np
import pytest
import torch
from counted_masks import CLASSES, IMAGES, masks
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from errors import UserError
from segmentation.scores import Confusion

NAMES = [str(number) for number in range(CLASSES)]
NO_LAUNCHER = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}


def counted(names: list[str] = NAMES) -> Confusion:
    scores = Confusion(names)
    for number in range(IMAGES):
        scores.add(*masks(number))
    return scores


def test_ratios_of_sets_of_pixels() -> None:
    pixels = [
        (number, i, int(p), int(t))
        for number in range(IMAGES)
        for i, (p, t) in enumerate(zip(*(each.flatten() for each in masks(number)), strict=True))
        if t != 255
    ]
    result = counted([*NAMES, "nowhere"]).result()
    for label in range(CLASSES):
        predicted = {(number, i) for number, i, p, _ in pixels if p == label}
        true = {(number, i) for number, i, _, t in pixels if t == label}
        assert result.iou[label] == len(predicted & true) / len(predicted | true)
        assert result.accuracy[label] == len(predicted & true) / len(true)
        assert result.pixels[label] == len(true)
    assert np.isnan(result.iou[CLASSES]) and np.isnan(result.accuracy[CLASSES])
    assert result.mean_iou == pytest.approx(result.iou[:CLASSES].mean(), rel=1e-15)
    assert result.all_accuracy == sum(p == t for _, _, p, t in pixels) / len(pixels)


def test_torchmetrics_agrees() -> None:
    jaccard = MulticlassJaccardIndex(CLASSES, average="none", ignore_index=255)
    accuracy = MulticlassAccuracy(CLASSES, average="none", ignore_index=255)
    for number in range(IMAGES):
        predicted, mask = (each.long().flatten() for each in masks(number))
        jaccard.update(predicted, mask)
        accuracy.update(predicted, mask)
    result = counted().result()
    np.testing.assert_allclose(result.iou, jaccard.compute(), rtol=1e-6)
    np.testing.assert_allclose(result.accuracy, accuracy.compute(), rtol=1e-6)


def test_large_counts_are_exact() -> None:
    """float32, in which torchmetrics takes ratios, does not know 2^24 + 1."""
    scores = Confusion(["a", "b"])
    count = 2**24 + 1
    scores._matrix.confmat += torch.tensor([[count, 1], [0, 0]])
    assert scores.result().iou[0] == count / (count + 1) != float(np.float32(count) / np.float32(count + 1))


def test_a_class_predicted_where_it_is_not() -> None:
    """It counts in mIoU with 0, and has no accuracy."""
    scores = Confusion(["a", "b", "c"])
    scores.add(torch.tensor([[0, 1]]), torch.tensor([[0, 0]]))
    result = scores.result()
    assert result.iou[:2].tolist() == [0.5, 0.0] and np.isnan(result.iou[2])
    assert result.mean_iou == 0.25 and result.mean_accuracy == 0.5


def test_nothing_counted() -> None:
    result = Confusion(["a"]).result()
    assert np.isnan([result.mean_iou, result.mean_accuracy, result.all_accuracy]).all()
    assert result.table().splitlines()[1].split() == ["a", "-", "-", "0.00"]


def test_another_ignored_label() -> None:
    scores = Confusion(["a", "b"], ignore_label=0)
    scores.add(torch.tensor([[1, 1, 0]]), torch.tensor([[1, 0, 0]]))
    assert scores.result().pixels.tolist() == [0, 1] and scores.result().all_accuracy == 1


def test_table() -> None:
    scores = Confusion(["sky", "a \x1b[31mlong name", "no"])
    scores.add(torch.tensor([[0, 0, 1, 1]]), torch.tensor([[0, 0, 0, 1]]))
    assert scores.result().table().splitlines() == [
        r"class                  IoU  accuracy  pixels",
        r"sky                  66.67     66.67   75.00",
        r"a \x1b[31mlong name  50.00    100.00   25.00",
        r"no                       -         -    0.00",
        r"mean                 58.33     83.33",
        r"all pixels                     75.00",
    ]


def test_three_processes_count_as_one(tmp_path: Path) -> None:
    run = forks.run(3, "tests/counted_masks.py", str(tmp_path / "result"), env=NO_LAUNCHER)
    assert run.returncode == 0, run.stderr[-2000:]
    found = torch.load(tmp_path / "result", weights_only=False)
    alone = counted().result()
    expected = (alone.iou, alone.accuracy, alone.pixels, alone.all_accuracy)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_torchmetrics_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics.classification", None)
    with pytest.raises(UserError, match="pip install torchmetrics"):
        Confusion(["a"])
