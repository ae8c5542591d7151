"""--check-data: every bad image of both halves is listed, by one process and by several."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from processes import PATIENCE
from test_distributed import NO_LAUNCHER, ROOT, together

import check_data
import main
from datasets import LabelledImages
from images.decode import ImageError


@pytest.fixture
def data(tmp_path) -> Path:
    """60 training and 20 validation images in two classes."""
    noise = np.random.default_rng(0)
    for split, count in (("train", 60), ("val", 20)):
        for i in range(count):
            path = tmp_path / "data" / split / "ab"[i % 2] / f"{i:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(noise.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(path)
    return tmp_path / "data"


def spoil(data: Path) -> dict[Path, str]:
    """Make some images bad in different ways; what is said of each."""
    names = ("train/a/00.png", "train/b/31.png", "val/a/04.png", "val/b/05.png")
    cut, empty, text, thin = (data / name for name in names)
    cut.write_bytes(cut.read_bytes()[:300])
    empty.write_bytes(b"")
    text.write_text("no image")
    Image.new("RGB", (60000, 1)).save(thin)
    return {cut: "truncated", empty: "unknown format", text: "unknown format", thin: "60000"}


def flags(data: Path) -> list[str]:
    return ["--data-path", str(data), "--check-data", "--input-size", "224"]


def listed(text: str) -> list[str]:
    return [line for line in text.splitlines() if ".png" in line]


def check(bad: dict[Path, str], out: str) -> None:
    """Each bad image has one line, in order, with its reason."""
    lines = listed(out)
    assert lines == sorted(lines) and len(lines) == len(bad), lines
    for path, why in bad.items():
        (line,) = [line for line in lines if str(path) in line]
        assert why in line


@pytest.mark.parametrize("workers", [["--num_workers", "0"], ["--num_workers", "2"], []])
def test_bad_images_are_listed(data, capfd, workers):
    """Two of training and two of validation; no model, no folder, and no class is looked at."""
    bad = spoil(data)
    assert main.main([*flags(data), *workers, "--model", "no_such_model"]) == 2
    shown = capfd.readouterr()
    check(bad, shown.out)
    lines = [line for line in shown.err.splitlines() if line.startswith("main.py")]
    assert lines == [
        "main.py: error: 4 of 60 training and 20 validation images cannot be read, and are listed above: repair or "
        "remove them"
    ]
    for path in bad:
        path.unlink()
    assert main.main([*flags(data), *workers]) == 0
    assert capfd.readouterr().out.splitlines()[-1] == "all 58 training and 18 validation images can be read"


def test_two_processes_share_the_images(data):
    bad = spoil(data)
    process = together(2, "main.py", *flags(data), "--num_workers", "1")
    assert process.returncode != 0
    check(bad, process.stdout)
    assert process.stderr.count("main.py: error: 4 of 60 training and 20 validation images cannot be read") == 1
    assert "[30/30]" in process.stdout and "[10/10]" in process.stdout
    for path in bad:
        path.unlink()
    process = together(2, "main.py", *flags(data), "--num_workers", "1")
    assert process.returncode == 0, process.stderr[-3000:]
    assert process.stdout.count("all 58 training and 18 validation images can be read") == 1


def test_every_image_is_read_once_whatever_the_processes(data, monkeypatch):
    read, decode = [], LabelledImages.decode
    monkeypatch.setattr(
        LabelledImages, "decode", lambda self, index: read.append(self.samples[index]) or decode(self, index)
    )
    assert main.main([*flags(data), "--num_workers", "0"]) == 0
    assert len(read) == 80 and len({path for path, _ in read}) == 80
    assert {Path(path).parts[-3] for path, _ in read} == {"train", "val"}


def test_a_name_that_is_no_text(data, tmp_path):
    """Its bytes are shown escaped, also where the output is a pipe in another encoding."""
    name = os.fsencode(data / "train" / "a") + b"/\xff\xe9.png"
    Path(os.fsdecode(name)).write_bytes(b"junk")
    done = subprocess.run(
        [sys.executable, "main.py", *flags(data), "--num_workers", "1"],
        cwd=ROOT,
        env={**NO_LAUNCHER, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 2 and b"Traceback" not in done.stderr, done.stderr
    assert rb"\udcff\udce9.png" in done.stdout


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_signal_stops_it(data, capfd, monkeypatch, workers):
    """What was found until then is listed."""
    bad = spoil(data)
    over = check_data.Progress.over

    def stopping(self, first, total, meters):
        for number in over(self, first, total, meters):
            if total == 60 and number == 50:
                os.kill(os.getpid(), signal.SIGTERM)
            yield number

    monkeypatch.setattr(check_data.Progress, "over", stopping)
    before = signal.getsignal(signal.SIGTERM)
    assert main.main([*flags(data), "--num_workers", workers]) == 75
    out = capfd.readouterr().out
    assert signal.getsignal(signal.SIGTERM) == before
    check({path: why for path, why in bad.items() if "train" in path.parts}, out)
    assert "main.py: stopped by a signal after 49 of 60 training and 20 validation images; 2 cannot be read" in out


class Interrupting:
    """Ctrl-C while it is deleted, where Python drops what is raised."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGINT)


def test_a_ctrl_c_that_is_lost(data, capfd, monkeypatch):
    """It is raised again at the next image."""
    over, seen, lost = check_data.Progress.over, [], []

    def interrupting(self, first, total, meters):
        for number in over(self, first, total, meters):
            seen.append(number)
            if number == 5:
                Interrupting()
            yield number

    monkeypatch.setattr(check_data.Progress, "over", interrupting)
    monkeypatch.setattr(sys, "unraisablehook", lambda what: lost.append(what.exc_type))
    assert main.main([*flags(data), "--num_workers", "0"]) == 130
    assert capfd.readouterr().err == "\nmain.py: interrupted\n"
    assert lost == [KeyboardInterrupt] and seen[-1] == 5


def test_a_worker_that_dies_is_one_line(data, capfd, monkeypatch):
    def die(self, index):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(LabelledImages, "decode", die)
    assert main.main([*flags(data), "--num_workers", "1"]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("main.py: error: a data loading worker died: is killed by signal: Killed")


def test_a_data_set_that_cannot_be_opened_is_one_line(data, capfd):
    shutil.rmtree(data / "val")
    assert main.main(flags(data)) == 2
    shown = capfd.readouterr()
    assert shown.err.startswith("main.py: error: ") and shown.err.count("\n") == 1 and shown.out == ""


def test_the_halves_must_agree_on_their_classes(data, capfd):
    (data / "val" / "a").rename(data / "val" / "c")
    assert main.main(flags(data)) == 2
    shown = capfd.readouterr()
    assert "only" in shown.err and shown.err.count("\n") == 1 and shown.out == ""


def test_the_same_fault_in_both_halves_is_one_line(data, capfd, monkeypatch):
    def decode(self, index):
        raise ImageError("cannot decode image of\n  both: halves")

    monkeypatch.setattr(LabelledImages, "decode", decode)
    assert main.main([*flags(data), "--num_workers", "0"]) == 2
    shown = capfd.readouterr()
    assert shown.out.splitlines().count("cannot decode image of both: halves") == 1
    assert "1 of 60 training and 20 validation images cannot be read" in shown.err
