"""Hugging Face's data sets, written and read by its own package: columns, labels, splits, workers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pictures import make_args, no_augmentation, photo, save_photo, to_tensor
from PIL import Image
from processes import PATIENCE

import datasets as ours
from datasets import build_dataset
from errors import UserError
from images import hugging_face
from images.decode import ImageError

ROOT = Path(__file__).parents[1]

READ = """
import sys

import datasets
from pictures import no_augmentation
from workers import SteadyLoader
from loaders import collate

args = no_augmentation(data_set="hfds/" + sys.argv[1], num_workers=2)
if __name__ == "__main__":
    images, classes = datasets.build_dataset(False, args)
    assert sys.modules["datasets"] is datasets and images.decode(0)[0].mode == "RGB"
    for method in ("fork", "spawn"):
        batches = list(SteadyLoader(images, num_workers=2, collate_fn=collate, multiprocessing_context=method))
        labels, sums = zip(*((batch.labels.item(), batch.images.sum().item()) for batch in batches))
        print(len(classes), *labels, sum(sums))
    assert sys.modules["datasets"] is datasets
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Hugging Face's package, with its cache in a folder of the test."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with hugging_face.hugging_face():
        package = __import__("datasets")
        package.disable_progress_bars()
        package.config.HF_DATASETS_CACHE = tmp_path / "cache"
    assert package.__name__ == "datasets" and package is not ours
    return package


def write(package, folder, halves, features, **columns):
    """Parquet files, one a split, with a picture and these columns."""
    folder.mkdir(exist_ok=True)
    for half, rows in halves.items():
        own = {name: values[half] for name, values in columns.items()}
        images = [photo(seed) for seed in rows]
        with hugging_face.hugging_face():
            kinds = package.Features({**features(package), "picture": package.Image()})
            package.Dataset.from_dict({**own, "picture": images}, features=kinds).to_parquet(
                str(folder / f"{half}.parquet")
            )
    return folder


def build(folder, is_train=True, **flags):
    root = str(folder.parent / "cache")
    args = no_augmentation(data_set=f"hfds/{folder}", data_path=root, **flags)
    return build_dataset(is_train, args)


def labels_of(images):
    return [label for _, label in images.samples]


# ------------------------------------------------------------------------------------------------------------
# This process, its workers, and a whole run


@pytest.fixture
def hub(tmp_path):
    """A folder whose name has capitals, and an environment in which it is a Hugging Face data set."""
    folder = tmp_path / "Org" / "Name"
    for split, count in (("train", 20), ("test", 3)):
        for label, name in enumerate(["cat", "dog"]):
            for number in range(count):
                save_photo(folder / split / name / f"{number}.png", seed=100 * label + number)
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    env = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    return folder, os.environ | env


def test_sets_are_read_in_this_process_and_by_workers(hub, tmp_path):
    """The package has the name of datasets.py; both are found where they should be."""
    folder, env = hub
    (tmp_path / "script.py").write_text(READ)
    command = [sys.executable, "-W", "ignore", str(tmp_path / "script.py"), str(folder)]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    seeds = (0, 1, 2, 100, 101, 102)
    expected = [to_tensor(photo(seed).resize((16, 16), Image.Resampling.BICUBIC)) for seed in seeds]
    line = " ".join(map(str, [2, 0, 0, 0, 1, 1, 1, sum(int(image.sum()) for image in expected)]))
    assert run.stdout.splitlines()[-2:] == [line] * 2


def test_a_run_of_two_processes(hub, tmp_path):
    """main.py from the project's folder, where `import datasets` would find its own."""
    folder, env = hub
    argv = ["--data-set", f"hfds/{folder}", "--model", "deit_tiny_patch16_224", "--input-size", "16"]
    argv += ["--model-kwargs", "patch_size=8", "embed_dim=24", "depth=1", "num_heads=2", "--batch-size", "8"]
    argv += ["--epochs", "1", "--num_workers", "1", "--no-repeated-aug", "--output_dir", str(tmp_path / "run")]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, "-W", "ignore", *launch, "main.py", *argv, "--device", "cpu"]
    run = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "40 training images" in run.stdout and "on the 6 test images" in run.stdout
    assert run.stdout.count("images of column 'image', labels of column 'label', 2 classes") == 1


def test_sets_that_are_not_there(hub, tmp_path):
    folder, env = hub
    (tmp_path / "script.py").write_text(
        "import sys\nfrom pictures import make_args\nfrom datasets import build_dataset\n"
        "build_dataset(sys.argv[2] == 'train', make_args(data_set='hfds/' + sys.argv[1]))"
    )
    (folder / "test").rename(folder / "other")
    (tmp_path / "empty" / "train").mkdir(parents=True)
    for name, half, message in (
        (folder, "test", "has no split for evaluation: none of validation, val, test"),
        (tmp_path / "empty", "train", "cannot read --data-set hfds/.*empty"),
        (tmp_path / "nowhere", "train", "cannot read --data-set hfds/.*nowhere"),
    ):
        command = [sys.executable, "-W", "ignore", str(tmp_path / "script.py"), str(name), half]
        run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=PATIENCE, check=False)
        assert re.match(f"errors.UserError: .*{message}", run.stderr.splitlines()[-1]), run.stderr[-3000:]


def test_without_the_package(monkeypatch):
    monkeypatch.setattr(hugging_face, "find_spec", lambda name: None)
    needs = r"^--data-set hfds/a/B needs Hugging Face's package: pip install datasets$"
    with pytest.raises(UserError, match=needs):
        build_dataset(True, make_args(data_set="hfds/a/B"))
    assert sys.modules["datasets"] is ours


# ------------------------------------------------------------------------------------------------------------
# Columns

HALVES = {"train": [0, 1, 2], "validation": [3, 4]}
PLAIN = {"train": [1, 0, 2], "validation": [2, 0]}


@pytest.mark.parametrize("column", ["label", "labels", "fine_label", "category"])
def test_columns_are_chosen_by_type_and_that_is_said(package, tmp_path, capsys, column):
    write(
        package,
        tmp_path / "set",
        HALVES,
        lambda p: {column: p.ClassLabel(names=["cat", "dog", "eel"]), "width": p.Value("int64")},
        **{column: PLAIN, "width": {"train": [5, 6, 7], "validation": [8, 9]}},
    )
    images, classes = build(tmp_path / "set")
    assert classes == ["cat", "dog", "eel"] and labels_of(images) == [1, 0, 2]
    np.testing.assert_array_equal(np.asarray(images.decode(1)[0]), np.asarray(photo(1)))
    assert f"images of column 'picture', labels of column '{column}', 3 classes" in capsys.readouterr().out


def test_flags_choose_otherwise(package, tmp_path):
    fine, coarse = (lambda p: p.ClassLabel(names=list("abc"))), (lambda p: p.ClassLabel(names=list("xy")))
    write(
        package,
        tmp_path / "set",
        HALVES,
        lambda p: {"fine_label": fine(p), "coarse_label": coarse(p), "thumb": p.Image()},
        fine_label=PLAIN,
        coarse_label={"train": [1, 1, 0], "validation": [0, 1]},
        thumb={half: [photo(50 + seed) for seed in rows] for half, rows in HALVES.items()},
    )
    with pytest.raises(
        UserError, match=r"several columns that could be meant: thumb, picture; choose by --image-key"
    ):
        build(tmp_path / "set")
    images, classes = build(tmp_path / "set", image_key="thumb")
    assert classes == ["a", "b", "c"] and labels_of(images) == [1, 0, 2]
    np.testing.assert_array_equal(np.asarray(images.decode(0)[0]), np.asarray(photo(50)))
    images, classes = build(tmp_path / "set", image_key="picture", target_key="coarse_label")
    assert classes == ["x", "y"] and labels_of(images) == [1, 1, 0]
    with pytest.raises(
        UserError,
        match=r"no column 'fine_labels' for --target-key; it has fine_label \(ClassLabel\), .*Did you mean",
    ):
        build(tmp_path / "set", image_key="picture", target_key="fine_labels")
    with pytest.raises(UserError, match=r"--target-key thumb of .* is of another type"):
        build(tmp_path / "set", image_key="picture", target_key="thumb")


def test_no_column_at_all(package, tmp_path):
    write(package, tmp_path / "set", HALVES, lambda p: {"score": p.Value("float32")}, score=PLAIN)
    with pytest.raises(
        UserError, match=r"has no column for --target-key; its columns are score \(Value\), picture"
    ):
        build(tmp_path / "set")


# ------------------------------------------------------------------------------------------------------------
# Labels and splits


@pytest.mark.parametrize(
    ("kind", "train", "val", "classes", "expected"),
    [
        ("int64", [1, 0, 5], [2, 9], [str(label) for label in range(10)], ([1, 0, 5], [2, 9])),
        ("uint8", [1, 0, 1], [1, 0], ["0", "1"], ([1, 0, 1], [1, 0])),
        ("string", ["dog", "cat", "eel"], ["eel", "dog"], ["cat", "dog", "eel"], ([1, 0, 2], [2, 1])),
        ("bool", [True, False, True], [False, False], ["False", "True"], ([1, 0, 1], [0, 0])),
    ],
)
def test_numbers_and_texts_are_labels(package, tmp_path, kind, train, val, classes, expected):
    columns = {"target": {"train": train, "validation": val}}
    write(package, tmp_path / "set", HALVES, lambda p: {"target": p.Value(kind)}, **columns)
    for is_train, labels in zip((True, False), expected, strict=True):
        images, found = build(tmp_path / "set", is_train)
        assert found == classes and labels_of(images) == labels


def test_splits_with_names_in_another_order_mean_the_same(package, tmp_path, monkeypatch):
    """load_dataset gives all splits the features of one, so each split is a set of its own here."""
    tables = {}
    for half, names in (("train", ["cat", "dog", "eel"]), ("validation", ["eel", "cat", "dog"])):
        with hugging_face.hugging_face():
            features = package.Features({"label": package.ClassLabel(names=names), "image": package.Image()})
            columns = {"label": PLAIN[half], "image": [photo(seed) for seed in HALVES[half]]}
            tables[half] = package.Dataset.from_dict(columns, features=features)
    with hugging_face.hugging_face():
        package.DatasetDict({"train": tables["train"]}).save_to_disk(str(tmp_path / "set"))
    load = hugging_face._load
    monkeypatch.setattr(
        hugging_face,
        "_load",
        lambda name, root, split: tables[split] if split in tables else load(name, root, split),
    )
    assert labels_of(build(tmp_path / "set")[0]) == [1, 0, 2]
    images, classes = build(tmp_path / "set", is_train=False)
    assert classes == ["cat", "dog", "eel"]
    assert labels_of(images) == [1, 2]  # dog, eel: 2 and 0 of ["eel", "cat", "dog"]


def test_splits_with_other_names_are_refused(package, tmp_path):
    columns = {"label": {"train": ["cat", "dog", "cat"], "validation": ["dog", "emu"]}}
    write(package, tmp_path / "set", HALVES, lambda p: {"label": p.Value("string")}, **columns)
    for is_train in (True, False):
        with pytest.raises(UserError, match=r"'cat', 'dog' in training, 'dog', 'emu' in evaluation; only .* 'emu'"):
            build(tmp_path / "set", is_train)


@pytest.mark.parametrize(
    ("kind", "values", "said"),
    [
        ("int64", [-1, -1], "hides 2 of its 2 labels"),
        ("string", [None, "cat"], "hides 1 of its 2 labels"),
        ("int64", [None, 1], "hides 1 of its 2 labels"),
        ("int64", [-7, 1], "has the label -7, which is no class index"),
    ],
)
def test_hidden_and_impossible_labels(package, tmp_path, kind, values, said):
    train = ["cat", "dog", "cat"] if kind == "string" else [0, 1, 0]
    columns = {"label": {"train": train, "test": values}}
    halves = {"train": [0, 1, 2], "test": [3, 4]}
    write(package, tmp_path / "set", halves, lambda p: {"label": p.Value(kind)}, **columns)
    with pytest.raises(UserError, match=rf"split 'test' of --data-set hfds/.*set {said}"):
        build(tmp_path / "set", is_train=False)


def test_sets_that_were_saved_to_disk(package, tmp_path):
    with hugging_face.hugging_face():
        features = package.Features({"label": package.ClassLabel(names=["cat", "dog"]), "image": package.Image()})
        halves = {
            half: package.Dataset.from_dict({"label": [1, 0], "image": [photo(1), photo(2)]}, features=features)
            for half in ("train", "test")
        }
        package.DatasetDict(halves).save_to_disk(str(tmp_path / "both"))
        halves["train"].save_to_disk(str(tmp_path / "one"))
    for is_train in (True, False):
        images, classes = build(tmp_path / "both", is_train)
        assert classes == ["cat", "dog"] and labels_of(images) == [1, 0]
    assert labels_of(build(tmp_path / "one")[0]) == [1, 0]
    with pytest.raises(UserError, match="has no split for evaluation"):
        build(tmp_path / "one", is_train=False)


def test_rows_without_an_image_are_named(package, tmp_path):
    with hugging_face.hugging_face():
        features = package.Features({"label": package.ClassLabel(names=["cat", "dog"]), "image": package.Image()})
        rows = {"label": [1, 0], "image": [photo(1), None]}
        package.DatasetDict({"train": package.Dataset.from_dict(rows, features=features)}).save_to_disk(
            str(tmp_path / "set")
        )
    images, _ = build(tmp_path / "set")
    with pytest.raises(
        ImageError, match=r"cannot decode image 1 of hfds/.*set, split train: there is none in this"
    ):
        images.decode(1)


def test_columns_of_other_sets_are_refused():
    for flag in ("image_key", "target_key"):
        with pytest.raises(UserError, match=r"is for --data-set hfds, not DIGITS: drop it"):
            build_dataset(True, make_args(**{flag: "x"}))
