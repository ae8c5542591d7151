"""torchvision's sets, from files written here in their own formats."""

from __future__ import annotations

import gzip
import hashlib
import pickle
import struct

import numpy as np
import pytest
from pictures import no_augmentation
from torchvision.datasets import CIFAR10

from datasets import build_dataset
from errors import UserError


def build(root, name, is_train=True, **flags):
    return build_dataset(is_train, no_augmentation(data_set=f"torch/{name}", data_path=str(root), **flags))


@pytest.fixture(params=["MNIST", "FashionMNIST", "KMNIST"])
def idx(request, tmp_path):
    """MNIST's format: idx files of big-endian sizes, then bytes."""
    folder = tmp_path / request.param / "raw"
    folder.mkdir(parents=True)
    pixels = {}
    for half, count in (("train", 12), ("t10k", 5)):
        pixels[half] = np.random.default_rng(count).integers(0, 256, (count, 28, 28), dtype=np.uint8)
        images = struct.pack(">IIII", 2051, count, 28, 28) + pixels[half].tobytes()
        labels = struct.pack(">II", 2049, count) + bytes(number % 10 for number in range(count))
        (folder / f"{half}-images-idx3-ubyte").write_bytes(images)
        (folder / f"{half}-labels-idx1-ubyte").write_bytes(labels)
    return tmp_path, {"MNIST": "mnist", "FashionMNIST": "fashion_mnist", "KMNIST": "kmnist"}[request.param], pixels


def test_idx_files(idx):
    root, name, pixels = idx
    for is_train, half in ((True, "train"), (False, "t10k")):
        images, classes = build(root, name, is_train)
        assert len(classes) == 10 and [label for _, label in images.samples] == [
            number % 10 for number in range(len(pixels[half]))
        ]
        for index, expected in enumerate(pixels[half]):
            image, _ = images.decode(index)
            np.testing.assert_array_equal(np.asarray(image), np.stack([expected] * 3, axis=-1))
    if name == "fashion_mnist":
        assert classes[:2] == ["T-shirt/top", "Trouser"]


def test_cifar10(tmp_path, monkeypatch):
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3072), dtype=np.uint8)
    content = {
        "data_batch_1": {"data": pixels[:3], "labels": [3, 0, 9]},
        "test_batch": {"data": pixels[3:], "labels": [7]},
        "batches.meta": {"label_names": [f"class{number}" for number in range(10)]},
    }
    checksums = {}
    for name, each in content.items():
        (folder / name).write_bytes(pickle.dumps(each))
        checksums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    monkeypatch.setattr(CIFAR10, "train_list", [["data_batch_1", checksums["data_batch_1"]]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", checksums["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": checksums["batches.meta"]})
    images, classes = build(tmp_path, "cifar10")
    assert classes == content["batches.meta"]["label_names"]
    assert [label for _, label in images.samples] == [3, 0, 9]
    np.testing.assert_array_equal(np.asarray(images.decode(1)[0]), pixels[1].reshape(3, 32, 32).transpose(1, 2, 0))
    (folder / "data_batch_1").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"torch/cifar10 is not in .*, or is damaged \(.*\): give --download"):
        build(tmp_path, "cifar10")


def test_what_is_not_there(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"torch/fashion_mnist is not in .*: give --download, or put it there"):
        build(tmp_path, "fashion_mnist")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nobody listens
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(
        UserError, match=r"torch/fashion_mnist cannot be downloaded to .*; fetch it elsewhere"
    ) as caught:
        build(tmp_path / "new", "fashion_mnist", download=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("labels", "said"),
    [([1, 2, 3], "12 images, 3 labels"), ([11] * 12, "12 images, 12 labels beyond the classes")],
)
def test_labels_that_do_not_fit_the_images(idx, labels, said):
    """MNIST's format has no checksums."""
    root, name, _ = idx
    (path,) = root.glob("*/raw/train-labels-idx1-ubyte")
    path.write_bytes(struct.pack(">II", 2049, len(labels)) + bytes(labels))
    with pytest.raises(UserError, match=rf"torch/{name} in .* is damaged: {said}"):
        build(root, name)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("imagenet", "has another reader here: use --data-set IMNET"),
        ("inaturalist", "use --data-set INAT or INAT19"),
        ("fashon_mnist", "is none of torch/cifar10, .* Did you mean fashion_mnist"),
        ("", "is none of torch/cifar10"),
    ],
)
def test_other_names(tmp_path, name, said):
    with pytest.raises(UserError, match=said):
        build(tmp_path, name)


def test_download_is_for_these_sets_alone(tmp_path):
    with pytest.raises(UserError, match=r"--download is for --data-set torch, not IMNET: drop it"):
        build_dataset(True, no_augmentation(data_set="IMNET", data_path=str(tmp_path), download=True))


def test_gzipped_files_are_not_taken_for_missing(idx):
    """As they are downloaded; torchvision unpacks them when it is asked to download."""
    root, name, _ = idx
    for path in (
        root / {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "kmnist": "KMNIST"}[name] / "raw"
    ).iterdir():
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    with pytest.raises(UserError, match="give --download"):
        build(root, name)
