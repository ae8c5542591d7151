"""Evaluation images without class folders: ImageNet's as Kaggle and its authors pack it, and Tiny-ImageNet's."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from pictures import no_augmentation, photo, save_photo
from scipy.io import savemat

from datasets import build_dataset
from errors import UserError

SYNSETS = ["n01", "n02", "n03"]
TRUTH = ["n03", "n01", "n01", "n02", "n03"]  # of val images 1 to 5
DEVKIT = {"n02": 1, "n03": 2, "n01": 3}  # ILSVRC2012_ID: no label


def name(number):
    return f"ILSVRC2012_val_{number:08}.JPEG"


@pytest.fixture
def imagenet(tmp_path):
    """train/ with class folders, val/ flat."""
    write(tmp_path)
    return tmp_path


def write(top, inner=""):
    for label, synset in enumerate(SYNSETS):
        save_photo(top / "train" / synset / f"{synset}_1.JPEG", seed=label)
    for number in range(1, 6):
        save_photo(top / "val" / inner / name(number), seed=10 + number)


def read(root, data_set="IMNET", **flags):
    """Evaluation images by number, with the names of their classes."""
    images, classes = build_dataset(False, no_augmentation(data_set=data_set, data_path=str(root), **flags))
    assert classes == SYNSETS
    numbers = [int(str(source).split("_")[-1].split(".")[0]) for source, _ in images.samples]
    labels = [label for _, label in images.samples]
    assert labels == sorted(labels)
    assert build_dataset(True, no_augmentation(data_set=data_set, data_path=str(root), **flags))[1] == SYNSETS
    return [classes[label] for _, label in sorted(zip(numbers, labels, strict=True))]


def kaggle_csv(path):
    rows = [f"ILSVRC2012_val_{n:08},{TRUTH[n - 1]} 1 2 3 4 {TRUTH[n - 1]} 5 6 7 8 " for n in (3, 1, 5, 2, 4)]
    path.write_text("\n".join(["ImageId,PredictionString", *rows]) + "\n")
    return path


def devkit(folder):
    """The devkit's data/: its ground truth and meta.mat, with the hypernyms that have no images."""
    folder.mkdir(parents=True)
    truth = folder / "ILSVRC2012_validation_ground_truth.txt"
    truth.write_text("".join(f"{DEVKIT[synset]}\n" for synset in TRUTH))
    fields = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    rows = [(number, synset, "a word", 0) for synset, number in DEVKIT.items()] + [(4, "n00", "all", 3)]
    savemat(str(folder / "meta.mat"), {"synsets": np.array(rows, dtype=fields)[:, None]})
    return truth


@pytest.mark.parametrize("place", ["", "Data/CLS-LOC", "ILSVRC/Data/CLS-LOC"])
def test_imagenet_as_kaggle_packs_it(tmp_path, place, capsys):
    write(tmp_path / place)
    kaggle_csv(tmp_path / "LOC_val_solution.csv")
    assert read(tmp_path) == TRUTH
    assert (
        f"labels of {tmp_path / place / 'val'} are those of {tmp_path}/LOC_val_solution.csv"
        in capsys.readouterr().out
    )


def test_kaggles_evaluation_half_alone(tmp_path):
    write(tmp_path / "ILSVRC" / "Data" / "CLS-LOC")
    (tmp_path / "ILSVRC" / "Data" / "CLS-LOC" / "train").rename(tmp_path / "gone")
    kaggle_csv(tmp_path / "LOC_val_solution.csv")
    images, classes = build_dataset(False, no_augmentation(data_set="IMNET", data_path=str(tmp_path)))
    assert classes == SYNSETS and len(images) == 5


def test_the_list_that_a_flag_names(imagenet, tmp_path):
    listed = kaggle_csv(tmp_path / "elsewhere.csv")
    assert read(imagenet, val_labels=str(listed)) == TRUTH


@pytest.mark.parametrize("ending", ["", "\r"])
def test_one_synset_a_line(imagenet, tmp_path, ending):
    listed = tmp_path / "synsets.txt"
    listed.write_text("".join(f"{synset}{ending}\n" for synset in TRUTH), newline="")
    assert read(imagenet, val_labels=str(listed)) == TRUTH


@pytest.mark.parametrize("separator", [" ", "\t", ","])
def test_a_name_and_a_class_a_line(imagenet, tmp_path, separator):
    listed = tmp_path / "val.txt"
    listed.write_text("".join(f"val/{name(n)}{separator}{TRUTH[n - 1]}\n" for n in (4, 2, 5, 1, 3)))
    assert read(imagenet, val_labels=str(listed)) == TRUTH


def test_tiny_imagenet(tmp_path, capsys):
    write(tmp_path, "images")
    lines = [f"{name(n)}\t{TRUTH[n - 1]}\t0\t0\t9\t9" for n in (2, 1, 3, 5, 4)]
    (tmp_path / "val" / "val_annotations.txt").write_text("\n".join(lines))
    assert read(tmp_path) == TRUTH
    assert "skipped in" in capsys.readouterr().out  # the list itself


def test_the_devkits_numbers_are_no_labels(imagenet, tmp_path):
    truth = devkit(tmp_path / "devkit" / "data")
    assert read(imagenet, val_labels=str(truth)) == TRUTH


@pytest.mark.parametrize("inner", [False, True])
def test_a_flat_tar_file(imagenet, tmp_path, inner):
    """ILSVRC2012_img_val.tar is flat."""
    subprocess.run(["tar", "cf", "train.tar", "train"], cwd=imagenet, check=True)
    where = ["val"] if inner else ["-C", "val", "."]
    subprocess.run(["tar", "cf", "val.tar", *where], cwd=imagenet, check=True)
    listed = kaggle_csv(tmp_path / "a.csv")
    assert read(imagenet, "tar", val_labels=str(listed)) == TRUTH
    images, _ = build_dataset(
        False, no_augmentation(data_set="tar", data_path=str(imagenet), val_labels=str(listed))
    )
    pixels = [images.decode(index)[0].tobytes() for index in range(len(images))]
    first = next(index for index, (source, _) in enumerate(images.samples) if name(1) in str(source))
    save_photo(tmp_path / "again.JPEG", seed=11)
    assert pixels[first] != photo(11).tobytes() and len(set(pixels)) == 5


def test_without_a_training_half_the_list_has_the_classes(imagenet, tmp_path):
    (imagenet / "train").rename(tmp_path / "gone")
    listed = kaggle_csv(tmp_path / "a.csv")
    args = no_augmentation(data_set="IMNET", data_path=str(imagenet), val_labels=str(listed))
    assert build_dataset(False, args)[1] == SYNSETS


REFUSED = {
    "too few": ("\n".join(TRUTH[1:]), "has 4 lines, but there are 5 images"),
    "a class that is not trained": (
        "\n".join([*TRUTH[1:], "n09"]),
        "names 1 classes that have no training folder: 'n09'",
    ),
    "an image that is not listed": (f"{name(1)} n01\n{name(2)} n02", "has no label for 3 of 5 images: 'ILSVRC"),
    "numbers of nobody": ("".join(f"{name(n)} {n % 3}\n" for n in range(1, 6)), "classes as numbers, and nobody"),
    "numbers without meta.mat": (
        "1\n2\n3\n1\n2\n",
        r"numbers its classes as ImageNet's devkit does, .*no .*meta\.mat",
    ),
    "nothing": ("", "has 0 lines, but there are 5 images"),
}


@pytest.mark.parametrize(("content", "said"), REFUSED.values(), ids=REFUSED)
def test_lists_that_cannot_be_meant(imagenet, tmp_path, content, said):
    listed = tmp_path / "list.txt"
    listed.write_text(content)
    with pytest.raises(UserError, match=said):
        read(imagenet, val_labels=str(listed))


def test_other_mistakes(imagenet, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"val holds images that are in no class folder.*--val-labels names"):
        read(imagenet)
    listed = tmp_path / "list.txt"
    listed.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"cannot read the labels in .*list\.txt"):
        read(imagenet, val_labels=str(listed))
    truth = devkit(tmp_path / "devkit")
    (tmp_path / "devkit" / "meta.mat").write_bytes(b"no matrix")
    with pytest.raises(UserError, match=r"meta\.mat is not ImageNet's"):
        read(imagenet, val_labels=str(truth))
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(UserError, match="needs scipy: pip install scipy"):
        read(imagenet, val_labels=str(truth))


def test_a_list_where_none_is_needed(tmp_path):
    for half in ("train", "val"):
        for synset in SYNSETS:
            save_photo(tmp_path / half / synset / "a.JPEG")
    listed = kaggle_csv(tmp_path / "a.csv")
    with pytest.raises(UserError, match="val has class folders, which say what --val-labels would: drop the flag"):
        read(tmp_path, val_labels=str(listed))
    for half in ("train", "val"):
        subprocess.run(["tar", "cf", f"{half}.tar", half], cwd=tmp_path, check=True)
    with pytest.raises(UserError, match=r"val\.tar has class folders, which say what --val-labels would"):
        read(tmp_path, "tar", val_labels=str(listed))
    with pytest.raises(UserError, match="--val-labels is for --data-set IMNET and tar, not DIGITS: drop it"):
        build_dataset(False, no_augmentation(val_labels=str(listed)))
