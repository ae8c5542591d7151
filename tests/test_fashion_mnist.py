"""script/fashion_mnist.py, with small files and their checksums in place of Fashion-MNIST's."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from pictures import no_augmentation

from datasets import build_dataset

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "script" / "fashion_mnist.py"
IN_PACKAGE = "usr/share/datasets/fashion-mnist"


def content_of(name: str) -> bytes:
    count = 12 if name.startswith("train") else 5
    if "labels" in name:
        return struct.pack(">II", 2049, count) + bytes(number % 10 for number in range(count))
    return struct.pack(">IIII", 2051, count, 28, 28) + bytes(number % 251 for number in range(count * 28 * 28))


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, which expects small files; no package is installed, and PATH holds no programs."""
    spec = importlib.util.spec_from_file_location("fashion_mnist", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    small = {name: content_of(name) for name in module.FILES}
    checksums = {name: (len(content), hashlib.sha256(content).hexdigest()) for name, content in small.items()}
    monkeypatch.setattr(module, "FILES", checksums)
    monkeypatch.setattr(module, "ROOT_OF_PACKAGES", tmp_path / "system")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "bin").mkdir()
    return module


def pack(folder: Path, *names: str) -> None:
    """Write files as the package has them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / f"{name}.gz").write_bytes(gzip.compress(content_of(name)))


def program(folder: Path, name: str, body: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{body}\n")
    (folder / name).chmod(0o755)


def fake_apt(tmp_path: Path) -> None:
    """apt-get and dpkg-deb that bring the files of tmp_path/packed, and write down what they were asked."""
    folder = tmp_path / "bin"
    for tool in ("cp", "mkdir"):
        (folder / tool).symlink_to(shutil.which(tool, path=os.defpath) or tool)
    calls = tmp_path / "calls"
    program(folder, "apt-get", f'echo "apt-get $*" >>{calls}\n: >dataset-fashion-mnist_0_all.deb')
    unpack = f'mkdir -p "$3/{IN_PACKAGE}"\ncp {tmp_path}/packed/*.gz "$3/{IN_PACKAGE}"'
    program(folder, "dpkg-deb", f'echo "dpkg-deb $1 ${{2##*/}}" >>{calls}\n{unpack}')


def raw_of(folder: Path) -> Path:
    return folder / "FashionMNIST" / "raw"


def is_whole(script: ModuleType, folder: Path) -> bool:
    """Whether the folder holds the four files, and nothing else but what was packed."""
    found = {path.name: path.read_bytes() for path in raw_of(folder).iterdir() if path.suffix != ".gz"}
    return found == {name: content_of(name) for name in script.FILES}


def error_of(script: ModuleType, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What a call that cannot work says: one line, and exit code 2."""
    assert script.main([str(argument) for argument in arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("fashion_mnist.py: error: ") and said.count("\n") == 1
    return said


# ------------------------------------------------------------------------------------------------------------
# Where the files come from


def test_from_the_installed_package(script, tmp_path, capsys):
    """A second call changes nothing, and the data set's reader takes what lies there."""
    pack(tmp_path / "system" / IN_PACKAGE, *script.FILES)
    folder = tmp_path / "new" / "data"
    assert script.main([str(folder)]) == 0 and is_whole(script, folder)
    assert "4 of 4 files from the installed package dataset-fashion-mnist" in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in raw_of(folder).iterdir()}
    shutil.rmtree(tmp_path / "system")
    assert script.main([str(folder)]) == 0
    assert "holds Fashion-MNIST already: nothing to do" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in raw_of(folder).iterdir()}
    for is_train, count in ((True, 12), (False, 5)):
        args = no_augmentation(data_set="torch/fashion_mnist", data_path=str(folder))
        images, classes = build_dataset(is_train, args)
        assert len(images) == count and classes[:2] == ["T-shirt/top", "Trouser"]


def test_from_a_downloaded_package(script, tmp_path, capsys):
    pack(tmp_path / "packed", *script.FILES)
    fake_apt(tmp_path)
    assert script.main([str(tmp_path / "data")]) == 0 and is_whole(script, tmp_path / "data")
    assert "4 of 4 files from the package dataset-fashion-mnist, downloaded by apt-get" in capsys.readouterr().out
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls == ["apt-get download dataset-fashion-mnist", "dpkg-deb -x dataset-fashion-mnist_0_all.deb"]


def test_only_what_is_missing_is_made(script, tmp_path, capsys):
    """And it comes from the nearest place."""
    raw = raw_of(tmp_path)
    pack(raw, "t10k-labels-idx1-ubyte", "train-images-idx3-ubyte")
    pack(tmp_path / "system" / IN_PACKAGE, *script.FILES)
    for name in ("t10k-images-idx3-ubyte", "train-labels-idx1-ubyte"):
        (raw / name).write_bytes(content_of(name))
    assert script.main([str(tmp_path)]) == 0 and is_whole(script, tmp_path)
    assert "2 of 4 files from the .gz files beside them" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------
# What cannot work


def test_no_source(script, tmp_path, capsys):
    said = error_of(script, capsys, tmp_path / "data")
    assert "is not installed, and apt-get and dpkg-deb are not here" in said and "--download" in said
    fake_apt(tmp_path)
    program(tmp_path / "bin", "apt-get", "echo 'W: first' >&2; echo 'E: Unable to locate package' >&2; exit 100")
    said = error_of(script, capsys, tmp_path / "data")
    assert "apt-get download failed (E: Unable to locate package; perhaps apt-get update helps)" in said
    program(tmp_path / "bin", "apt-get", "exit 0")
    assert "apt-get left 0 packages" in error_of(script, capsys, tmp_path / "data")


def test_a_damaged_file_that_is_there_is_kept(script, tmp_path, capsys):
    pack(tmp_path / "system" / IN_PACKAGE, *script.FILES)
    damaged = raw_of(tmp_path) / "t10k-labels-idx1-ubyte"
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(b"damaged")
    said = error_of(script, capsys, tmp_path)
    size, digest = script.FILES[damaged.name]
    assert f"{damaged} is damaged: 7 bytes of SHA-256 {hashlib.sha256(b'damaged').hexdigest()}" in said
    assert f"where {size:,} bytes of SHA-256 {digest} should be" in said
    assert [path.name for path in damaged.parent.iterdir()] == [damaged.name] and damaged.read_bytes() == b"damaged"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (gzip.compress(b"another"), "7 bytes of SHA-256"),
        (b"no gzip", "7 bytes that cannot be unpacked"),
        (gzip.compress(content_of("train-labels-idx1-ubyte"), mtime=0)[:-9], "bytes that cannot be unpacked"),
    ],
    ids=["another file", "no gzip", "cut off"],
)
def test_a_damaged_source(script, tmp_path, capsys, content, said):
    """No file gets its name that is not what it should be."""
    package = tmp_path / "system" / IN_PACKAGE
    pack(package, *script.FILES)
    (package / "train-labels-idx1-ubyte.gz").write_bytes(content)
    error = error_of(script, capsys, tmp_path / "data")
    assert f"{package}/train-labels-idx1-ubyte.gz is damaged: " in error and said in error
    assert [path.name for path in raw_of(tmp_path / "data").iterdir()] == ["train-images-idx3-ubyte"]


def test_a_stop_half_way(script, tmp_path, monkeypatch):
    """Whole files have their names, and no others; the next call makes the rest, whatever a kill left behind."""
    pack(tmp_path / "system" / IN_PACKAGE, *script.FILES)
    names = list(script.FILES)

    def stopped(temporary: Path, path: Path) -> None:
        if path.name == names[2]:
            raise KeyboardInterrupt
        os.rename(temporary, path)

    with monkeypatch.context() as patch:
        patch.setattr(script.os, "replace", stopped)
        assert script.main([str(tmp_path)]) == 130
    assert sorted(path.name for path in raw_of(tmp_path).iterdir()) == sorted(names[:2])
    (raw_of(tmp_path) / f"{names[2]}.tmp").write_bytes(b"half")
    assert script.main([str(tmp_path)]) == 0 and is_whole(script, tmp_path)


@pytest.mark.parametrize("arguments", [[], ["a", "b"], ["--no-such"]])
def test_wrong_arguments(script, capsys, arguments):
    assert "--help lists every flag" in error_of(script, capsys, *arguments)


def test_a_folder_that_cannot_be_written_to(script, tmp_path, capsys):
    (tmp_path / "file").touch()
    said = error_of(script, capsys, tmp_path / "file")
    assert f"Fashion-MNIST cannot be put into {tmp_path / 'file'}: " in said and "Not a directory" in said


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_of_others(script, tmp_path, capsys):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    assert "Permission denied" in error_of(script, capsys, closed)


def test_it_runs_as_a_program(tmp_path):
    """From any folder, and without anything installed."""
    run = subprocess.run(
        [sys.executable, "-S", str(SCRIPT)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith("fashion_mnist.py: error: ") and "FOLDER" in run.stderr
