"""The index of tar files: true after any change, harmless when damaged, and never code."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pictures import no_augmentation, photo, save_photo
from processes import PATIENCE

from datasets import build_dataset
from images import tar_index

ROOT = Path(__file__).parents[1]
INDEX = {"tar": ".train.tar.index.npz", "wds/": ".train.index.npz"}


def write(root, first=0, classes=("cat", "dog"), count=3):
    """train.tar and val.tar, which are tar files of folders, and shards."""
    shutil.rmtree(root / "tree", ignore_errors=True)
    for half in ("train", "val"):
        for label, name in enumerate(classes):
            for number in range(count):
                save_photo(root / "tree" / half / name / f"{number}.png", seed=first + 10 * label + number)
        subprocess.run(["tar", "cf", root / f"{half}.tar", half], cwd=root / "tree", check=True)
    shutil.rmtree(root / "tree")


@pytest.fixture(params=["tar", "wds/"])
def form(request, tmp_path):
    write(tmp_path)
    return request.param


def labels_of(root, form, first=0, **flags):
    """The data set's labels; its pixels must be those of `write`."""
    images, classes = build_dataset(True, no_augmentation(data_set=form, data_path=str(root), **flags))
    found = {images.read(source).tobytes(): label for source, label in images.samples}
    for seed_of_class, label in ((10 * number, number) for number in range(len(classes))):
        assert found[photo(first + seed_of_class).tobytes()] == label
    return [label for _, label in images.samples]


@pytest.fixture
def scans(monkeypatch):
    """The tar files whose headers are read."""
    scanned = []
    scan = tar_index.scan
    monkeypatch.setattr(tar_index, "scan", lambda path: scanned.append(path.name) or scan(path))
    return scanned


def test_headers_are_read_once(tmp_path, form, scans):
    assert labels_of(tmp_path, form) == [0, 0, 0, 1, 1, 1]
    assert (tmp_path / INDEX[form]).is_file() and sorted(scans) == ["train.tar", "val.tar"]
    assert labels_of(tmp_path, form) == [0, 0, 0, 1, 1, 1]
    assert len(scans) == 2


def test_a_new_tar_file_is_never_read_by_an_old_index(tmp_path, form):
    labels_of(tmp_path, form)
    write(tmp_path, first=100, classes=("ant", "bee", "cow"), count=2)
    assert labels_of(tmp_path, form, first=100) == [0, 0, 1, 1, 2, 2]


def test_a_tar_file_of_the_same_size_and_time_is_seen(tmp_path, form):
    """Its head or tail is another."""
    path = tmp_path / "train.tar"
    labels_of(tmp_path, form)
    before = path.stat()
    content = path.read_bytes()
    path.write_bytes(content.replace(b"train/dog/", b"train/ant/"))  # headers' checksums follow
    content = bytearray(path.read_bytes())
    for start in range(0, len(content), 512):
        if content[start : start + 10] == b"train/ant/":
            header = content[start : start + 512]
            header[148:156] = b" " * 8
            content[start + 148 : start + 156] = f"{sum(header):06o}\0 ".encode()
    path.write_bytes(content)
    subprocess.run(["tar", "tf", path], check=True, capture_output=True)
    subprocess.run(["tar", "cf", tmp_path / "val.tar", "-C", tmp_path, "train.tar"], check=True)  # any other
    shutil.copy(path, tmp_path / "val.tar")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size and path.stat().st_mtime_ns == before.st_mtime_ns
    images, classes = build_dataset(True, no_augmentation(data_set=form, data_path=str(tmp_path)))
    assert classes == ["ant", "cat"] and [label for _, label in images.samples] == [0, 0, 0, 1, 1, 1]


def test_only_changed_shards_are_read_again(tmp_path, scans):
    write(tmp_path)
    shutil.copy(tmp_path / "train.tar", tmp_path / "train-2.tar")
    os.utime(tmp_path / "train-2.tar", (1, 1))
    labels_of(tmp_path, "wds/")
    scans.clear()
    os.utime(tmp_path / "train-2.tar", (2, 2))
    assert len(labels_of(tmp_path, "wds/")) == 12
    assert scans == ["train-2.tar"]


def evil(path):
    """A pickle that would leave a file behind, as .npz members and as the whole file."""

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(path.parent / "executed"),)

    return Evil()


DAMAGE = {
    "empty": lambda path: path.write_bytes(b""),
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-50]),
    "a bit flipped": lambda path: flip(path),
    "text": lambda path: path.write_text("no index"),
    "a pickle": lambda path: path.write_bytes(pickle.dumps(evil(path))),
    "a pickle inside": lambda path: np.savez(path, version=np.array([evil(path)], dtype=object)),
    "another version": lambda path: np.savez(path, **dict(np.load(path)) | {"version": np.array([0])}),
    "a part missing": lambda path: np.savez(path, **{k: v for k, v in np.load(path).items() if k != "sizes"}),
    "a part too short": lambda path: np.savez(path, **dict(np.load(path)) | {"kinds": np.zeros(1, np.uint8)}),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a FIFO": lambda path: (path.unlink(), os.mkfifo(path)),
}


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_index_costs_time_alone(tmp_path, form, damage):
    labels_of(tmp_path, form)
    DAMAGE[damage](tmp_path / INDEX[form])
    assert labels_of(tmp_path, form) == [0, 0, 0, 1, 1, 1]
    assert not (tmp_path / "executed").exists()


def test_where_the_data_cannot_be_written_the_index_stands_beside_the_run(tmp_path, form, scans, monkeypatch):
    save = tar_index.put_in_place

    def read_only(temporary, path):
        if path.parent == tmp_path:
            raise PermissionError("read-only")
        save(temporary, path)

    monkeypatch.setattr(tar_index, "put_in_place", read_only)
    run = tmp_path / "runs" / "x"
    for _ in range(2):
        assert labels_of(tmp_path, form, output_dir=str(run)) == [0, 0, 0, 1, 1, 1]
    assert (run / INDEX[form]).is_file() and len(scans) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs", "train.tar", "val.tar"]
    assert labels_of(tmp_path, form) == [0, 0, 0, 1, 1, 1] and len(scans) == 4  # and without a run: none


def test_many_shards_are_read_by_several_processes(tmp_path):
    write(tmp_path)
    for number in range(10):
        shutil.copy(tmp_path / "train.tar", tmp_path / f"train-{number}.tar")
        os.utime(tmp_path / f"train-{number}.tar", (number, number))
    code = (
        "import sys; sys.path[:0] = ['tests']\n"
        "from pictures import no_augmentation\nfrom datasets import build_dataset\n"
        "images, classes = build_dataset(True, no_augmentation(data_set='wds/', data_path=sys.argv[1]))\n"
        "print(len(images), classes)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.splitlines()[-1] == "66 ['cat', 'dog']"
