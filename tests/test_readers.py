"""The same tree of images through every reader: the same classes, labels and pixels, whoever packed it, and how."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile

import numpy as np
import pytest
import webdataset
from pictures import imnet, no_augmentation, photo
from PIL import Image

from datasets import build_dataset
from errors import UserError

# Trees of half a data set: path -> seed of the picture. Classes are the first folders, whatever lies deeper.
TREES = {
    "plain": {"cat/0.png": 0, "cat/1.png": 1, "dog/0.png": 2, "eel/7.png": 3},
    "Tiny-ImageNet": {"n02/images/a.JPEG": 0, "n02/images/b.JPEG": 1, "n01/images/a.JPEG": 2},
    "unlike depths": {"cat/a/b/0.png": 0, "cat/1.png": 1, "dog/a.b/0.png": 2, "dog/a/c.png": 3, "dog/z.png": 4},
    "numbers": {f"{number}/0.png": number for number in range(12)},
    "odd names": {"a b/x y.png": 0, "c.d/x.y.png": 1, "ünï/é.webp": 2, "-e/-f.png": 3},
    "all endings": {
        "cat/0.webp": 0,
        "cat/1.GIF": 1,
        "cat/2.jfif": 2,
        "cat/3.jp2": 3,
        "dog/0.jpe": 4,
        "dog/1.bmp": 5,
    },
    "equal names": {"cat/0.png": 0, "dog/0.png": 1, "dog/deep/0.png": 2, "eel/0.png": 3},
}
CLASSES = {
    "plain": ["cat", "dog", "eel"],
    "Tiny-ImageNet": ["n01", "n02"],
    "unlike depths": ["cat", "dog"],
    "numbers": ["0", "1", "10", "11", "2", "3", "4", "5", "6", "7", "8", "9"],
    "odd names": ["-e", "a b", "c.d", "ünï"],
    "all endings": ["cat", "dog"],
    "equal names": ["cat", "dog", "eel"],
}


def write_tree(folder, tree):
    for path, seed in tree.items():
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        options = {"lossless": True} if file.suffix == ".webp" else {}
        photo(seed).save(file, Image.registered_extensions()[file.suffix.lower()], **options)
    return folder


def gnu_tar(*arguments, cwd):
    subprocess.run(["tar", *map(str, arguments)], cwd=cwd, check=True, capture_output=True)


# Packers: (folder with train/ and val/, where the result goes) -> the flags that read it.


def folders(source, target):
    shutil.copytree(source, target, dirs_exist_ok=True)
    return {"data_set": "IMNET"}


def folders_in_a_wrapper(source, target):
    for half in ("train", "val"):
        shutil.copytree(source / half, target / half / "wrapped" / half)
    return {"data_set": "IMNET"}


def linked_folders(source, target):
    """Every class folder, and every file in it, is a link."""
    for half in ("train", "val"):
        (target / half).mkdir()
        for label in (source / half).iterdir():
            (target / half / label.name).symlink_to(label)
    return {"data_set": "IMNET"}


def tar_of(*options):
    """GNU tar, with `{half}` in its arguments."""

    def pack(source, target):
        for half in ("train", "val"):
            arguments = [option.format(half=half, source=source) for option in options]
            gnu_tar("-cf", target / f"{half}.tar", *arguments, cwd=source)
        return {"data_set": "tar"}

    return pack


def appended(source, target):
    """Class by class with `tar -r`, and the first one twice."""
    for half in ("train", "val"):
        names = sorted(label.name for label in (source / half).iterdir())
        for number, name in enumerate([names[0], *names]):
            gnu_tar("-rf" if number else "-cf", target / f"{half}.tar", "--", f"./{name}", cwd=source / half)
    return {"data_set": "tar"}


def with_hard_links(source, target):
    """GNU tar stores a file's second name as a link to the first."""
    for half in ("train", "val"):
        copy = target / "linked" / half
        for path in sorted(path for path in (source / half).rglob("*") if path.is_file()):
            first, second = (
                target / "a" / half / path.relative_to(source / half),
                copy / path.relative_to(source / half),
            )
            first.parent.mkdir(parents=True, exist_ok=True)
            second.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, first)
            os.link(first, second)
        # `.first` is hidden, and is no class; the class folders hold links alone
        (target / "a" / half).rename(copy / ".first")
        names = [".first", *sorted(each.name for each in copy.iterdir() if each.name != ".first")]
        gnu_tar("-cf", target / f"{half}.tar", "--", *names, cwd=copy)
    return {"data_set": "tar"}


def with_symbolic_links(source, target):
    for half in ("train", "val"):
        with tarfile.open(target / f"{half}.tar", "w") as tar:
            for path in sorted(path for path in (source / half).rglob("*") if path.is_file()):
                name = path.relative_to(source / half)
                tar.add(path, f"{half}/.store/{name}")
                member = tarfile.TarInfo(f"{half}/{name}")
                member.type = tarfile.SYMTYPE
                member.linkname = "/".join([".."] * (len(name.parts) - 1) + [".store", str(name)])
                tar.addfile(member)
    return {"data_set": "tar"}


def tar_of_tars(inside):
    """One tar file per class, made in the class folder (`.`) or beside it, inside one tar file."""

    def pack(source, target):
        for half in ("train", "val"):
            made = target / "classes" / half
            made.mkdir(parents=True)
            for label in (source / half).iterdir():
                where, what = (label, ".") if inside else (label.parent, f"./{label.name}")
                gnu_tar("-cf", made / f"{label.name}.tar", what, cwd=where)
            gnu_tar("-cf", target / f"{half}.tar", half, cwd=made.parent)
        return {"data_set": "tar"}

    return pack


def shards_of_folders(source, target):
    """Tar files that share the images of a tree, without any `.cls`."""
    for half in ("train", "val"):
        files = sorted(str(path.relative_to(source)) for path in (source / half).rglob("*") if path.is_file())
        for number in range(2):
            gnu_tar("-cf", target / f"{half}-{number}.tar", "--", *files[number::2], cwd=source)
    return {"data_set": "wds/"}


def written_by_webdataset(labels):
    """webdataset's ShardWriter, with class indices or class names in `.cls`."""

    def pack(source, target):
        for half in ("train", "val"):
            classes = sorted(label.name for label in (source / half).iterdir())
            with webdataset.ShardWriter(str(target / f"{half}-%03d.tar"), maxcount=3, verbose=0) as writer:
                for number, path in enumerate(
                    sorted(each for each in (source / half).rglob("*") if each.is_file())
                ):
                    name = path.relative_to(source / half).parts[0]
                    label = classes.index(name) if labels == "indices" else name
                    ending = path.suffix[1:].lower()
                    writer.write({"__key__": f"{number:04}", ending: path.read_bytes(), "cls": str(label)})
        return {"data_set": "wds/"}

    return pack


PACKERS = {
    "folders": folders,
    "folders in a wrapper": folders_in_a_wrapper,
    "links to folders": linked_folders,
    "tar train": tar_of("{half}"),
    "tar ./train": tar_of("./{half}"),
    "tar -C train .": tar_of("-C", "{half}", "."),
    "tar /data/train": tar_of("-P", "{source}/{half}"),
    "tar, only files": tar_of("--no-recursion", "--null", "-T", "{half}.files"),
    "tar --format=ustar": tar_of("--format=ustar", "{half}"),
    "tar --format=pax": tar_of("--format=pax", "{half}"),
    "tar --format=gnu, backwards": tar_of("--format=gnu", "-T", "{half}.backwards"),
    "tar -r": appended,
    "hard links": with_hard_links,
    "symbolic links": with_symbolic_links,
    "tar of tars, -C class .": tar_of_tars(True),
    "tar of tars, class": tar_of_tars(False),
    "shards of folders": shards_of_folders,
    "webdataset, indices": written_by_webdataset("indices"),
    "webdataset, names": written_by_webdataset("names"),
}


def pictures(images):
    """Pixels and label of every image, in a data set's order."""
    decoded = (images.decode(index) for index in range(len(images)))
    return [(np.asarray(image).tobytes(), label) for image, label in decoded]


def stored_pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).tobytes()


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("tree", TREES)
def test_one_tree_has_the_same_labels_through_every_reader(tmp_path, tree, packer):
    source, target = tmp_path / "source", tmp_path / "target"
    target.mkdir()
    for half, shift in (("train", 0), ("val", 50)):
        write_tree(source / half, {path: seed + shift for path, seed in TREES[tree].items()})
        files = sorted(str(path.relative_to(source)) for path in (source / half).rglob("*") if path.is_file())
        if "-T" in str(packer) or packer in ("tar, only files", "tar --format=gnu, backwards"):
            (source / f"{half}.files").write_bytes("\0".join(files).encode())
            (source / f"{half}.backwards").write_text("\n".join(reversed(files)))
    flags = PACKERS[packer](source, target)
    indices = packer == "webdataset, indices" or (packer, tree) == ("webdataset, names", "numbers")
    for is_train in (True, False):
        images, classes = build_dataset(is_train, no_augmentation(data_path=str(target), **flags))
        half = source / ("train" if is_train else "val")
        known = classes if packer == "webdataset, names" else CLASSES[tree]  # a number in .cls is an index
        expected = [(stored_pixels(half / path), known.index(path.split("/")[0])) for path in TREES[tree]]
        assert classes == ([str(label) for label in range(len(CLASSES[tree]))] if indices else CLASSES[tree])
        assert sorted(pictures(images)) == sorted(expected)


@pytest.mark.parametrize("tree", TREES)
def test_folders_and_tar_files_are_in_torchvisions_order(tmp_path, tree):
    """As ImageFolder lists them: a run's order of samples is the reference's."""
    from torchvision.datasets import ImageFolder

    write_tree(tmp_path / "train", TREES[tree])
    shutil.copytree(tmp_path / "train", tmp_path / "val")
    gnu_tar("-cf", "train.tar", "train", cwd=tmp_path)
    expected = ImageFolder(str(tmp_path / "train"), is_valid_file=lambda path: True)
    images, classes = build_dataset(True, imnet(tmp_path))
    assert classes == expected.classes
    assert list(images.samples) == expected.samples
    packed, _ = build_dataset(True, no_augmentation(data_set="tar", data_path=str(tmp_path)))
    names = [(f"{tmp_path}/{stored.name}", label) for stored, label in packed.samples]
    assert names == expected.samples


@pytest.mark.parametrize(
    "packer", ["folders", "tar train", "tar -C train .", "tar of tars, -C class .", "shards of folders"]
)
def test_a_single_class_is_refused_unless_it_is_meant(tmp_path, packer):
    source, target = tmp_path / "source", tmp_path / "target"
    target.mkdir()
    for half in ("train", "val"):
        write_tree(source / half, {"only/0.png": 0, "only/1.png": 1})
    flags = no_augmentation(data_path=str(target), **PACKERS[packer](source, target))
    for is_train in (True, False):
        with pytest.raises(
            UserError, match=r"2 images of a single class, 'only' \(e\.g\. .*0\.png\).*--single-class"
        ):
            build_dataset(is_train, flags)
    flags.single_class = True
    images, classes = build_dataset(True, flags)
    assert classes == ["only"] and [label for _, label in images.samples] == [0, 0]


def test_a_single_class_with_folders_in_it(tmp_path):
    """Only a flag tells a class from a wrapper."""
    for half in ("train", "val"):
        write_tree(tmp_path / half, {"only/in/0.png": 0, "only/out/1.png": 1})
        gnu_tar("-cf", f"{half}.tar", half, cwd=tmp_path)
    for data_set in ("IMNET", "tar"):
        args = no_augmentation(data_set=data_set, data_path=str(tmp_path))
        assert build_dataset(True, args)[1] == ["in", "out"]
        args.single_class = True
        assert build_dataset(True, args)[1] == ["only"]


def test_class_folders_of_numbers_are_sorted_as_text_and_that_is_said(tmp_path, capsys):
    for half in ("train", "val"):
        write_tree(tmp_path / half, {f"{number}/0.png": number for number in range(11)})
    build_dataset(True, imnet(tmp_path))
    said = capsys.readouterr().out
    assert "note: the classes are named by numbers, but sorted as text" in said
    assert "label 2 is 10, not 2" in said
    for half in ("train", "val"):
        shutil.rmtree(tmp_path / half / "10")
    build_dataset(True, imnet(tmp_path))
    assert "note" not in capsys.readouterr().out
