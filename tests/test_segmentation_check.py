"""--check-data for images with masks: faults are listed, and pixels counted, by one process and by several."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import forks
import numpy as np
import pytest
from PIL import Image
from test_distributed import NO_LAUNCHER

import check_data
from errors import Interrupted, UserError
from segmentation.check import check_pairs, table, warnings
from segmentation.images import SegmentedImages
from segmentation.sets import Options, find_pairs
from segmentation.transforms import RECIPES, Training, Whole

NAMES = ("sky", "sea", "a|b\x1b", "sand")
HALVES = {"training": ("train", 13), "validation": ("val", 4)}


@pytest.fixture
def data(tmp_path) -> Path:
    """13 and 4 images of 6 x 5 pixels; the training masks have labels 0, 1 and ignored ones, the others 0 and 2."""
    noise = np.random.default_rng(0)
    for half, count in HALVES.values():
        for i in range(count):
            for kind in ("images", "masks"):
                (tmp_path / kind / half).mkdir(parents=True, exist_ok=True)
            Image.fromarray(noise.integers(0, 256, (5, 6, 3), np.uint8)).save(
                tmp_path / f"images/{half}/{i:02}.png"
            )
            numbers = noise.choice([0, 1, 255] if half == "train" else [0, 2], (5, 6)).astype(np.uint8)
            Image.fromarray(numbers).save(tmp_path / f"masks/{half}/{i:02}.png")
    return tmp_path


def spoil(data: Path) -> dict[str, tuple[str, ...]]:
    """Make some pairs bad in different ways; what is said of each."""
    masks = data / "masks/train"
    Image.new("L", (6, 4)).save(masks / "01.png")
    Image.new("RGB", (6, 5)).save(masks / "02.png")
    Image.fromarray(np.full((5, 6), 9, np.uint8)).save(masks / "03.png")
    (data / "images/train/04.png").write_text("no image")
    (masks / "04.png").write_bytes((masks / "04.png").read_bytes()[:45])
    (data / "images/val/02.png").write_bytes(b"")
    return {
        "masks/train/01.png": ("has 6 x 4 pixels, but its image", "has 6 x 5"),
        "masks/train/02.png": ("is a picture in colours (RGB)",),
        "masks/train/03.png": ("has the label 9 in row 1, column 1; 0 to 3, 255 are known",),
        "images/train/04.png": ("unknown format", "also: cannot decode image", "truncated"),
        "images/val/02.png": ("unknown format",),
    }


def halves(data: Path) -> dict[str, SegmentedImages]:
    return {
        half: SegmentedImages(
            find_pairs("FOLDER", data, half == "training", Options(NAMES)),
            Training(RECIPES["FOLDER"]),
            Whole(RECIPES["FOLDER"]),
        )
        for half in HALVES
    }


def counted(data: Path, without: tuple[str, ...] = ()) -> dict[str, list[int]]:
    """Pixels of 0 to 3 and 255, counted by Pillow's histogram."""
    counts = {}
    for half, (folder, _) in HALVES.items():
        counts[half] = [0] * 5
        for path in (data / "masks" / folder).iterdir():
            if f"{folder}/{path.name}" not in without:
                histogram = Image.open(path).histogram()
                counts[half] = [a + histogram[k] for a, k in zip(counts[half], (0, 1, 2, 3, 255), strict=True)]
    return counts


def rows(out: str) -> dict[str, list[str]]:
    """Of the printed table: class -> its numbers of pixels."""
    lines = out.splitlines()
    start = next(k for k, line in enumerate(lines) if line.startswith("class "))
    split = [line.split() for line in lines[start + 1 : start + 6]]
    return {cells[0]: [cell.replace(",", "") for cell in cells[1:]] for cells in split}


def check_table(out: str, counts: dict[str, list[int]]) -> None:
    found = rows(out)
    for label, name in enumerate(("sky", "sea", r"a|b\x1b", "sand")):
        number, *cells = found[name]
        assert int(number) == label
        for half, pixels, share in zip(HALVES, cells[::3], cells[1::3], strict=True):
            assert int(pixels) == counts[half][label]
            assert abs(float(share) - 100 * counts[half][label] / sum(counts[half][:4])) <= 0.005
    assert [int(cell) for cell in found["ignored"]] == [counts[half][4] for half in HALVES]


@pytest.mark.parametrize("workers", [0, 2])
def test_all_is_well(data, capfd, workers):
    check_pairs(halves(data), workers, 300)
    shown = capfd.readouterr()
    check_table(shown.out, counted(data))
    assert shown.out.splitlines()[-1] == "all 13 training and 4 validation pairs of image and mask can be read"
    assert shown.err.splitlines() == [
        "warning: no mask that was read has 1 of 4 classes: 'sand'",
        r"warning: no training mask that was read has 1 of 4 classes: 'a|b\x1b'",
        "warning: no validation mask that was read has 1 of 4 classes: 'sea'",
    ]


def check_faults(faults: dict[str, tuple[str, ...]], out: str) -> None:
    lines = [line for line in out.splitlines() if ".png" in line]
    assert lines == sorted(lines) and len(lines) == len(faults)
    for path, said in faults.items():
        (line,) = [line for line in lines if f"{path}" in line.partition(":")[0] or f"{path} " in line]
        assert all(words in line for words in said), line


def test_every_fault_is_listed(data, capfd):
    """What is wrong with the image and with the mask; masks of bad images are counted."""
    faults = spoil(data)
    with pytest.raises(
        UserError, match=r"^5 of 13 training and 4 validation pairs of image and mask cannot be read"
    ):
        check_pairs(halves(data), 0, 300)
    out = capfd.readouterr().out
    check_faults(faults, out)
    check_table(out, counted(data, ("train/02.png", "train/03.png", "train/04.png")))


def test_two_processes_share_the_pairs(data):
    faults = spoil(data)
    process = forks.run(2, "tests/checked_pairs.py", str(data), "1", env=NO_LAUNCHER)
    assert process.returncode != 0
    check_faults(faults, process.stdout)
    check_table(process.stdout, counted(data, ("train/02.png", "train/03.png", "train/04.png")))
    assert "error: 5 of 13 training and 4 validation pairs" in process.stderr and "Traceback" not in process.stderr
    assert process.stderr.count("warning: no mask that was read has 1 of 4 classes: 'sand'") == 1


def test_every_file_is_read_once(data, monkeypatch):
    read: list[str] = []
    for name in ("read_image", "read_mask"):
        original = getattr(SegmentedImages, name)
        monkeypatch.setattr(
            SegmentedImages,
            name,
            lambda self, index, f=original, n=name: read.append((n, id(self), index)) or f(self, index),
        )
    check_pairs(halves(data), 0, 300)
    assert len(read) == len(set(read)) == 2 * (13 + 4)


def test_a_signal_stops_it(data, capfd, monkeypatch):
    """What was found until then is listed; nothing is said of classes."""
    spoil(data)
    over = check_data.Progress.over

    def stopping(self, first, total, meters):
        for number in over(self, first, total, meters):
            if total == 13 and number == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            yield number

    monkeypatch.setattr(check_data.Progress, "over", stopping)
    with pytest.raises(Interrupted, match="stopped by a signal after 2 of 13 training and 4 validation pairs"):
        check_pairs(halves(data), 0, 300)
    shown = capfd.readouterr()
    assert "masks/train/01.png" in shown.out and "masks/train/02.png" not in shown.out and shown.err == ""


def test_many_classes_that_are_missing_are_one_line():
    names = [f"class {k}" for k in range(150)]
    pixels = {"training": np.r_[np.zeros(145), 1, 1, 1, 1, 1, 9].astype(int)}
    (line,) = warnings(names, pixels)
    assert (
        line
        == "warning: no mask that was read has 145 of 150 classes: 'class 0', 'class 1', 'class 2' and 142 more"
    )
    assert len(table(names, pixels).splitlines()) == 152
