"""Data sets on tiny fixtures, and images that cannot be decoded."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import imnet, make_args, no_augmentation, photo, save_photo, to_pixels, to_tensor
from PIL import Image
from sklearn.datasets import load_digits
from torchvision.datasets import CIFAR100

from datasets import build_dataset
from errors import UserError
from images.decode import ImageError
from loaders import build_eval_loader

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


# ------------------------------------------------------------------------------------------------------------
# ImageFolder


@pytest.fixture
def image_folder(tmp_path):
    """Two classes; 3 training and 1 validation images of each."""
    for label, name in enumerate(["cat", "dog"]):
        for number in range(3):
            save_photo(tmp_path / "train" / name / f"{number}.png", seed=10 * label + number)
        save_photo(tmp_path / "val" / name / "0.png", seed=10 * label + 5)
    return tmp_path


def test_image_folder(image_folder):
    train, classes = build_dataset(True, imnet(image_folder))
    val, val_classes = build_dataset(False, imnet(image_folder))
    assert (len(train), len(val)) == (6, 2) and classes == val_classes == ["cat", "dog"]
    assert [label for _, label, _ in train] == [0, 0, 0, 1, 1, 1]
    image, label, boxes = val[1]
    assert image.shape == (3, 16, 16) and image.dtype == torch.uint8 and boxes == []
    expected = to_tensor(photo(15).resize((16, 16), Image.Resampling.BICUBIC))
    torch.testing.assert_close(image, expected)
    assert label == 1


def test_train_new_is_preferred(image_folder):
    for name in ("cat", "dog"):
        save_photo(image_folder / "train_new" / name / "0.png")
    train, _ = build_dataset(True, imnet(image_folder))
    assert [path.split("/")[-3] for path, _ in train.samples] == ["train_new", "train_new"]


def test_evaluation_needs_no_training_folder(image_folder):
    (image_folder / "train").rename(image_folder / "elsewhere")
    assert len(build_dataset(False, imnet(image_folder))[0]) == 2
    with pytest.raises(UserError, match=r"no folder .*/train; --data-path must hold train/ and val/"):
        build_dataset(True, imnet(image_folder))


@pytest.mark.parametrize("is_train", [True, False])
def test_splits_must_agree_on_the_classes(image_folder, is_train):
    save_photo(image_folder / "val" / "emu" / "0.png")
    with pytest.raises(UserError, match=r"same class folders, but 1 are in only one of them, for example 'emu'"):
        build_dataset(is_train, imnet(image_folder))


def test_folders_without_images(image_folder, tmp_path):
    (image_folder / "train" / "cat" / "notes.txt").write_text("no image")
    for image in (image_folder / "train" / "cat").glob("*.png"):
        image.unlink()
    message = r"class folder cat of .*/train holds no images that Pillow reads; add some, or remove .* both halves$"
    with pytest.raises(UserError, match=message):
        build_dataset(True, imnet(image_folder))
    for split in ("train", "val"):
        (image_folder / split / "ant").mkdir()
    with pytest.raises(UserError, match=r"class folder ant of .*/val holds no images"):
        build_dataset(False, imnet(image_folder))
    with pytest.raises(UserError, match=r"class folder ant \(and 1 more\) of .*/train holds no images"):
        build_dataset(True, imnet(image_folder))
    for label in ("a", "b"):
        (tmp_path / "hollow" / "val" / label).mkdir(parents=True)
    with pytest.raises(UserError, match=r"class folder a \(and 1 more\) of .*/val holds no images"):
        build_dataset(False, imnet(tmp_path / "hollow"))
    (tmp_path / "empty" / "val").mkdir(parents=True)
    with pytest.raises(UserError, match=r"/val holds no images; it must hold one folder of images per class"):
        build_dataset(False, imnet(tmp_path / "empty"))


# ------------------------------------------------------------------------------------------------------------
# CIFAR-100


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """torchvision's layout with 5 training and 2 test images, and the checksums of just these files."""
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    generator = np.random.default_rng(0)
    contents = {
        split: {
            "data": generator.integers(0, 256, (count, 3072), dtype=np.uint8),
            "fine_labels": list(range(90, 90 + count)),
        }
        for split, count in [("train", 5), ("test", 2)]
    }
    contents["meta"] = {"fine_label_names": [f"class{index}" for index in range(100)]}
    checksum = {}
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content))
        checksum[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    monkeypatch.setattr(CIFAR100, "train_list", [["train", checksum["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", checksum["test"]]])
    monkeypatch.setattr(CIFAR100, "meta", CIFAR100.meta | {"md5": checksum["meta"]})
    return tmp_path, contents


def test_cifar(cifar):
    root, contents = cifar
    args = no_augmentation(data_set="CIFAR", data_path=root, input_size=32)
    train, classes = build_dataset(True, args)
    val, _ = build_dataset(False, args)
    assert (len(train), len(val)) == (5, 2) and classes == [f"class{index}" for index in range(100)]
    assert [label for _, label, _ in train] == [90, 91, 92, 93, 94]
    pixels = contents["test"]["data"][1].reshape(3, 32, 32).transpose(1, 2, 0)
    np.testing.assert_array_equal(to_pixels(val[1][0]), pixels)


def test_cifar_missing_or_damaged(cifar, tmp_path):
    args = no_augmentation(data_set="CIFAR", data_path=cifar[0])
    (cifar[0] / "cifar-100-python" / "test").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"no intact CIFAR-100 in .*/cifar-100-python; unpack cifar-100-python"):
        build_dataset(True, args)
    (tmp_path / "empty").mkdir()
    args.data_path = str(tmp_path / "empty")
    with pytest.raises(UserError, match=r"no intact CIFAR-100 in .*empty/cifar-100-python"):
        build_dataset(False, args)


# ------------------------------------------------------------------------------------------------------------
# iNaturalist

TAXA = [  # identifiers are not positions
    {"id": 30, "name": "Vulpes", "genus": "Fox", "kingdom": "Animalia"},
    {"id": 10, "name": "Quercus", "genus": "Oak", "kingdom": "Plantae"},
    {"id": 20, "name": "Robur", "genus": "Oak", "kingdom": "Plantae"},
]


def inat_split(split, year, taxa_of_images):
    images = [
        {"id": 100 + index, "file_name": f"train_val{year}/Group{taxon}/{taxon}/{split}{index}.jpg"}
        for index, taxon in enumerate(taxa_of_images)
    ]
    annotations = [{"image_id": 100 + index, "category_id": taxon} for index, taxon in enumerate(taxa_of_images)]
    # listed backwards: labels follow the order of the annotations, not of the images
    return {"images": images[::-1], "annotations": annotations}


@pytest.fixture(params=[(2018, "listed"), (2018, "flattened"), (2019, "listed"), (2019, "flattened")], ids=str)
def inat(request, tmp_path):
    year, layout = request.param
    (tmp_path / "categories.json").write_text(json.dumps(TAXA))
    for split, taxa in [("train", [20, 30, 10, 30]), ("val", [30, 10])]:
        content = inat_split(split, year, taxa)
        (tmp_path / f"{split}{year}.json").write_text(json.dumps(content))
        for image in content["images"]:
            top, group, taxon, name = image["file_name"].split("/")
            middle = [group, taxon] if layout == "listed" else [taxon]
            save_photo(tmp_path.joinpath(top, *middle, name))
    return no_augmentation(
        data_set="INAT" if year == 2018 else "INAT19", data_path=str(tmp_path), inat_category="name"
    )


def test_inaturalist(inat):
    train, classes = build_dataset(True, inat)
    val, val_classes = build_dataset(False, inat)
    assert classes == val_classes == ["Robur", "Vulpes", "Quercus"]
    # training annotations name 20, 30, 10: labels 0, 1, 2
    assert [label for _, label, _ in train] == [1, 2, 1, 0]
    assert [label for _, label, _ in val] == [2, 1]
    assert train[0][0].shape == (3, 16, 16)
    assert [path.split("/")[-1] for path, _ in val.samples] == ["val1.jpg", "val0.jpg"]


def test_inaturalist_coarser_labels(inat):
    inat.inat_category = "genus"
    train, classes = build_dataset(True, inat)
    assert classes == ["Oak", "Fox"]
    assert [label for _, label, _ in train] == [1, 0, 1, 0]


def test_inaturalist_unknown_category(inat):
    inat.inat_category = "phylum"
    with pytest.raises(UserError, match=r"--inat-category phylum is not in the data; use genus, kingdom, name$"):
        build_dataset(True, inat)


def test_inaturalist_without_images_or_files(inat, tmp_path):
    year = 2018 if inat.data_set == "INAT" else 2019
    (tmp_path / f"train_val{year}").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"neither .*/Group30/30/train3.jpg nor .*\d/30/train3.jpg exists"):
        build_dataset(True, inat)
    file = tmp_path / f"val{year}.json"
    file.write_text(json.dumps({"images": [], "annotations": []}))
    with pytest.raises(UserError, match="list no images"):
        build_dataset(False, inat)
    file.write_text(json.dumps({"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": []}))
    with pytest.raises(UserError, match=rf"are not iNaturalist {year}'s: KeyError\(1\)"):
        build_dataset(False, inat)
    file.write_text("{")
    with pytest.raises(UserError, match=rf"cannot read .*val{year}.json"):
        build_dataset(False, inat)
    file.unlink()
    with pytest.raises(UserError, match=rf"cannot read .*val{year}.json"):
        build_dataset(False, inat)


# ------------------------------------------------------------------------------------------------------------
# Digits, and names and paths


def test_digits_are_scikit_learns():
    digits = load_digits()
    args = no_augmentation(input_size=8)
    train, classes = build_dataset(True, args)
    val, _ = build_dataset(False, args)
    assert (len(train), len(val)) == (1437, 360) and classes == list("0123456789")
    assert [label for _, label, _ in train] + [label for _, label, _ in val] == digits.target.tolist()
    for index in (0, 123, 359):
        levels = to_pixels(val[index][0]) * (16 / 255)  # [8, 8, 3]
        np.testing.assert_array_equal(levels.round(), np.stack([digits.images[1437 + index]] * 3, axis=-1))


@pytest.mark.parametrize("size", [32, 48])
def test_digits_are_enlarged_to_the_input_size(size):
    val, _ = build_dataset(False, no_augmentation(input_size=size))
    image, _ = val.decode(0)
    assert (image.mode, image.size) == ("RGB", (size, size))
    assert val[0][0].shape == (3, size, size)


def test_no_array_is_written_out_unless_it_is_refused():
    """The text of one digit's pixels takes more than a millisecond."""

    def refuse(source):
        raise AssertionError("nobody asked")

    images, _ = build_dataset(False, make_args(data_set="DIGITS", input_size=16))
    images.name = refuse
    assert images[0][0].shape == (3, 16, 16)


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match="pip install scikit-learn"):
        build_dataset(True, make_args())


def test_unknown_data_set():
    with pytest.raises(UserError, match=r"--data-set INET is not one of CIFAR, .* Did you mean IMNET"):
        build_dataset(True, make_args(data_set="INET"))


@pytest.mark.parametrize("name", ["CIFAR", "IMNET", "INAT", "INAT19"])
def test_data_path_is_needed(name, tmp_path):
    with pytest.raises(UserError, match=f"--data-set {name} needs --data-path"):
        build_dataset(True, make_args(data_set=name))
    with pytest.raises(UserError, match=r"--data-path .*nowhere is not a folder"):
        build_dataset(True, make_args(data_set=name, data_path=tmp_path / "nowhere"))


# ------------------------------------------------------------------------------------------------------------
# Tar files


def tarred(folder, nested):
    """A folder of class folders as a tar file beside it; or as a tar file of one tar file per class."""
    path = folder.with_suffix(".tar")
    with tarfile.open(path, "w") as tar:
        for label in sorted(folder.iterdir()):
            if not nested:
                tar.add(label, label.name)
                continue
            with tarfile.open(folder.parent / f"{label.name}.tar", "w") as inner:
                for image in label.iterdir():
                    inner.add(image, image.name)
            tar.add(folder.parent / f"{label.name}.tar", f"{label.name}.tar")
    return path


@pytest.fixture(params=[False, True], ids=["folders", "tar files of classes"])
def tars(request, tmp_path):
    """Three classes, which timm counts in another order than folders are counted."""
    for split, count in (("train", 3), ("val", 2)):
        for label, name in enumerate(["class10", "class2", "dog"]):
            for number in range(count):
                save_photo(
                    tmp_path / split / name / f"{name}_{number}.png",
                    seed=10 * label + number + 5 * (split == "val"),
                )
        tarred(tmp_path / split, request.param)
    return tmp_path


@pytest.mark.parametrize("is_train", [True, False])
def test_tar_files_are_as_folders(tars, is_train):
    args = no_augmentation(data_set="tar", data_path=str(tars))
    found, classes = build_dataset(is_train, args)
    expected, _ = build_dataset(is_train, imnet(tars))
    assert classes == ["class10", "class2", "dog"] and len(found) == len(expected) == (9 if is_train else 6)

    for index in range(len(expected)):
        (image, label), (expected_image, expected_label) = found.decode(index), expected.decode(index)
        np.testing.assert_array_equal(np.asarray(image), np.asarray(expected_image))
        assert label == expected_label


@pytest.mark.parametrize("num_workers", [0, 2])
def test_tar_files_are_read_by_workers(tars, num_workers):
    args = no_augmentation(data_set="tar", data_path=str(tars), num_workers=num_workers, batch_size=2)
    val, _ = build_dataset(False, args)
    val.decode(0)  # what this process has opened must not matter to its workers
    images = torch.cat([images for images, _ in build_eval_loader(args, val, 1, 0, CPU)])
    for index, image in enumerate(images):
        np.testing.assert_array_equal(to_pixels(image), val[index][0].permute(1, 2, 0).numpy())
    assert len(pickle.loads(pickle.dumps(val))) == 6


def test_damaged_image_in_a_tar_file_is_named(tars):
    args = no_augmentation(data_set="tar", data_path=str(tars))
    val, _ = build_dataset(False, args)
    with open(tars / "val.tar", "r+b") as file:
        file.seek(val.samples[0][0].offset)
        file.write(bytes(100))
    with pytest.raises(ImageError, match=r"^cannot decode image .*/val\.tar:.*class10_0\.png: unknown format"):
        val.decode(0)


def test_tar_files_that_cannot_be_used(tars, tmp_path):
    args = no_augmentation(data_set="tar", data_path=str(tars))

    def refused(content, message):
        """`content` writes val.tar; a path of its own, since an index is kept."""
        args.data_path = str(tmp_path / str(len(list(tmp_path.iterdir()))))
        shutil.copytree(tars / "train", f"{args.data_path}/train")
        tarred(Path(args.data_path, "train"), False)
        content(Path(args.data_path))
        for is_train in (False, True):
            with pytest.raises(UserError, match=message) as caught:
                build_dataset(is_train, args)
            assert "\n" not in str(caught.value)

    def flat(root):
        with tarfile.open(root / "val.tar", "w") as tar:
            tar.add(tars / "val" / "dog" / "dog_0.png", "dog_0.png")

    refused(lambda root: (root / "val.tar").write_bytes(b"no tar file"), "cannot read the tar file .*/val.tar: ")
    refused(
        lambda root: tarfile.open(root / "val.tar", "w").close(),
        "val.tar holds no images; it must hold one folder",
    )
    refused(flat, "val.tar holds images that are in no class folder, e.g. dog_0.png")
    args.data_path = str(tars)
    (tars / "train.tar").unlink()
    with pytest.raises(UserError, match=r"no file .*/train.tar; --data-path must hold train.tar and val.tar"):
        build_dataset(True, args)


def test_tar_files_with_different_classes(tars):
    shutil.rmtree(tars / "val" / "dog")
    args = no_augmentation(data_set="tar", data_path=str(tars))
    tarred(tars / "val", False)
    with pytest.raises(
        UserError, match=r"train.tar and .*val.tar must hold the same class folders, .* example 'dog'"
    ):
        build_dataset(True, args)


# ------------------------------------------------------------------------------------------------------------
# Shards


def add(tar, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def shards(tmp_path):
    """Folders, and the same images in shards: two for training, one in a folder for evaluation."""
    root = tmp_path / "shards"
    (root / "validation").mkdir(parents=True)
    for split, count in (("train", 4), ("val", 2)):
        for label, name in enumerate(["cat", "dog", "eel"]):
            for number in range(count):
                seed = 10 * label + number + 5 * (split == "val")
                save_photo(tmp_path / split / name / f"{number}.png", seed=seed)
    write_shards(tmp_path, root, {"set-train-0.tar": "01", "set-train-1.tar": "23"}, "train")
    write_shards(tmp_path, root, {"validation/0.tar": "01"}, "val")
    return tmp_path


def write_shards(folders, root, numbers_of, split):
    for shard, numbers in numbers_of.items():
        with tarfile.open(root / shard, "w") as tar:
            for label, name in enumerate(["cat", "dog", "eel"]):
                for number in numbers:
                    image = (folders / split / name / f"{number}.png").read_bytes()
                    members = {"cls": f"{label}\n".encode(), "PNG": image, "mask.png": b"?", "json": b"{}"}
                    for kind, content in members.items():
                        add(tar, f"./{split}/{name}{number}.{kind}", content)


@pytest.mark.parametrize("is_train", [True, False])
def test_shards_are_as_folders(shards, is_train):
    args = no_augmentation(data_set="wds/shards", data_path=str(shards))
    found, classes = build_dataset(is_train, args)
    expected, _ = build_dataset(is_train, imnet(shards))
    assert classes == ["0", "1", "2"] and len(found) == len(expected) == (12 if is_train else 6)
    pictures = {}
    for index in range(len(expected)):
        image, label = expected.decode(index)
        pictures[np.asarray(image).tobytes()] = label
    for index in range(len(found)):  # in the shards' order
        image, label = found.decode(index)
        assert pictures.pop(np.asarray(image).tobytes()) == label
    assert not pictures
    labels = [label for _, label in found.samples]
    assert labels == [0, 0, 1, 1, 2, 2] * (2 if is_train else 1)


def test_shards_are_read_by_workers_with_repeats(shards):
    args = no_augmentation(data_set="wds/", data_path=str(shards / "shards"), num_workers=2, batch_size=6)
    val, _ = build_dataset(False, args)
    images = torch.cat([images for images, _ in build_eval_loader(args, val, 1, 0, CPU)])
    for index, image in enumerate(images):
        np.testing.assert_array_equal(to_pixels(image), val[index][0].permute(1, 2, 0).numpy())


def test_shards_that_cannot_be_used(shards):
    root = shards / "shards"
    args = no_augmentation(data_set="wds/shards", data_path=str(shards))
    image = (shards / "train" / "cat" / "0.png").read_bytes()

    def refused(members, message):
        """The validation shard holds just these; a folder of its own, since an index is kept."""
        args.data_set = f"wds/{len(list(shards.iterdir()))}"
        folder = shards / args.data_set.removeprefix("wds/")
        shutil.copytree(root, folder)
        with tarfile.open(folder / "validation" / "0.tar", "w") as tar:
            for name, content in members:
                add(tar, name, content)
        for is_train in (False, True):
            with pytest.raises(UserError, match=message) as caught:
                build_dataset(is_train, args)
            assert "\n" not in str(caught.value)

    label = ("a.cls", b"1")
    refused([("a.png", image)], "shard .*0.tar has a.png without a.cls; a sample is an image and its class index")
    refused([label], "shard .*0.tar has a.cls without an image")
    refused([("a.cls", b"dog"), ("a.png", image)], "labelled in different ways: '0', '1', '2' and 'dog'")
    refused([label, ("a.png", image), ("a.jpg", image)], "the shard .*0.tar has a twice")
    refused([label, ("a.png", image), ("b/a.png", image)], "b/a.png without b/a.cls")
    (root / "validation" / "0.tar").write_bytes(b"no tar file")
    with pytest.raises(
        UserError, match=r"^cannot read the tar file .*0.tar: it is none, or is damaged \(truncated header\)"
    ):
        build_dataset(False, no_augmentation(data_set="wds/", data_path=str(root)))
    with pytest.raises(UserError, match=r"no shards with images in .*: tar files with 'val' in their name or"):
        build_dataset(False, no_augmentation(data_set="wds/", data_path=str(shards / "train")))


def test_a_shard_of_both_halves_is_refused(shards):
    shutil.copy(shards / "shards" / "validation" / "0.tar", shards / "shards" / "validation" / "train-0.tar")
    for is_train in (False, True):
        with pytest.raises(UserError, match=r"train-0.tar has both 'train' and 'val' in its name or folder"):
            build_dataset(is_train, no_augmentation(data_set="wds/shards", data_path=str(shards)))


def test_shards_of_a_class_that_is_not_trained(shards):
    folder = shards / "shards" / "validation"
    with tarfile.open(folder / "1.tar", "w") as tar:
        add(tar, "a.cls", b"3")
        add(tar, "a.png", (shards / "train" / "cat" / "0.png").read_bytes())
    args = no_augmentation(data_set="wds/shards", data_path=str(shards))
    with pytest.raises(UserError, match=r"the val shards in .* have images of class 3, the train shards none"):
        build_dataset(True, args)


# ------------------------------------------------------------------------------------------------------------
# Streams, and names


@pytest.mark.parametrize("name", ["tfds/mnist", "hfids/a/B"])
def test_streams_are_refused(name):
    with pytest.raises(
        UserError, match=rf"^--data-set {name} is a stream, whose images cannot be indexed; repeated"
    ):
        build_dataset(True, make_args(data_set=name))


def test_unknown_prefix():
    with pytest.raises(UserError, match=r"--data-set hfd/a is not one of CIFAR, .*, hfds/NAME, torch/NAME"):
        build_dataset(True, make_args(data_set="hfd/a"))


# ------------------------------------------------------------------------------------------------------------
# Damaged images


@pytest.mark.parametrize("num_workers", [0, 2])
def test_damaged_image_is_named_in_one_line(image_folder, num_workers):
    path = image_folder / "val" / "dog" / "0.png"
    path.write_bytes(path.read_bytes()[:200])
    args = imnet(image_folder, num_workers=num_workers)
    val, _ = build_dataset(False, args)
    with pytest.raises(UserError) as caught:
        list(build_eval_loader(args, val, 1, 0, CPU))
    message = str(caught.value)
    assert message.startswith(f"cannot decode image {path}: ")
    assert message.endswith("; repair or remove the file")
    assert "\n" not in message


@pytest.mark.parametrize(("width", "height"), [(10000, 1), (1, 10000)])
@pytest.mark.parametrize("fast_resize", [False, True])
@pytest.mark.parametrize("is_train", [False, True])
def test_a_very_thin_image_is_refused_by_name(image_folder, width, height, fast_resize, is_train):
    """Resizing it for evaluation would take gigabytes."""
    path = image_folder / ("train" if is_train else "val") / "cat" / "0.png"
    Image.new("RGB", (width, height)).save(path)
    args = imnet(image_folder, input_size=224, fast_resize=fast_resize)
    images, _ = build_dataset(is_train, args)
    with pytest.raises(ImageError, match=rf"cannot decode image {path}: it is too thin, {width} x {height}"):
        images.decode(0)
