"""Hugging Face's data sets, written and read by its own package: columns, labels, splits, workers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pictures import make_args, no_augmentation, photo, save_photo, to_tensor
from PIL import Image
from processes import PATIENCE
from pyarrow import parquet

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
        "import sys\nfrom pictures import make_args\n"
        "from datasets import build_dataset\nfrom errors import UserError\n"
        "for half, name in zip(sys.argv[1::2], sys.argv[2::2]):\n"
        "    try: build_dataset(half == 'train', make_args(data_set='hfds/' + name))\n"
        "    except UserError as error: print('refused:', error)"
    )
    (folder / "test").rename(folder / "other")
    (tmp_path / "empty" / "train").mkdir(parents=True)
    cases = (
        ("test", folder, "has no split for evaluation: none of validation, val, test"),
        ("train", tmp_path / "empty", "cannot read --data-set hfds/.*empty"),
        ("train", tmp_path / "nowhere", "cannot read --data-set hfds/.*nowhere"),
    )
    asked = [str(word) for half, name, _ in cases for word in (half, name)]
    command = [sys.executable, "-W", "ignore", str(tmp_path / "script.py"), *asked]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    refused = [line for line in run.stdout.splitlines() if line.startswith("refused: ")]
    for line, (_, _, message) in zip(refused, cases, strict=True):
        assert re.match(f"refused: .*{message}", line), run.stdout


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


def test_usual_names_come_before_types(package, tmp_path):
    """An identifier is an integer, and the label a text."""
    columns = {"id": {"train": [5, 6, 7], "validation": [8, 9]}}
    columns["label"] = {"train": ["dog", "cat", "dog"], "validation": ["cat", "cat"]}
    write(
        package, tmp_path / "set", HALVES, lambda p: {"id": p.Value("int64"), "label": p.Value("string")}, **columns
    )
    images, classes = build(tmp_path / "set")
    assert classes == ["cat", "dog"] and labels_of(images) == [1, 0, 1]


def test_identifiers_are_no_labels(package, tmp_path):
    columns = {"id": {"train": [0, 1, 2], "validation": [3, 4]}}
    write(package, tmp_path / "set", HALVES, lambda p: {"id": p.Value("int64")}, **columns)
    with pytest.raises(
        UserError, match=r"column 'id' of .*set is the only one that could hold labels, but differs"
    ):
        build(tmp_path / "set")
    assert labels_of(build(tmp_path / "set", target_key="id")[0]) == [0, 1, 2]


def test_a_usual_name_of_another_type_is_not_passed_over(package, tmp_path):
    columns = {"label": {"train": [[0], [1], [0, 1]], "validation": [[0], [1]]}, "width": PLAIN}

    def kinds(p):
        return {"label": p.Sequence(p.Value("int64")), "width": p.Value("int64")}

    write(package, tmp_path / "set", HALVES, kinds, **columns)
    with pytest.raises(UserError, match=r"column 'label' of .* is of another type; choose by --target-key"):
        build(tmp_path / "set")


@pytest.mark.parametrize("form", ["bytes", "bytes and path"])
def test_parquet_of_other_programs(package, tmp_path, form):
    """Without Hugging Face's own description, images are bytes."""
    (tmp_path / "set").mkdir()
    contents = []
    for seed in (1, 2, 3):
        save_photo(tmp_path / "one.png", seed=seed)
        contents.append((tmp_path / "one.png").read_bytes())
    column = contents if form == "bytes" else [{"bytes": content, "path": "one.png"} for content in contents]
    table = pyarrow.table({"img": column, "labels": [1, 0, 1]})
    parquet.write_table(table, tmp_path / "set" / "train.parquet")
    images, classes = build(tmp_path / "set")
    assert classes == ["0", "1"] and labels_of(images) == [1, 0, 1]
    np.testing.assert_array_equal(np.asarray(images.decode(2)[0]), np.asarray(photo(3)))


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


CAT_DOG_EEL = {"train": ["cat", "dog", "eel"], "validation": ["eel", "cat", "dog"]}  # the names in two orders
SAID = {"train": ["dog", "cat", "eel"], "validation": ["dog", "eel"]}  # the labels of the rows, by name


def tables_of(package, names=CAT_DOG_EEL, said=SAID):
    """A data set a split, each with its own order of names."""
    with hugging_face.hugging_face():
        return {
            half: package.Dataset.from_dict(
                {"label": said[half], "image": [photo(seed) for seed in range(len(said[half]))]},
                features=package.Features(
                    {"label": package.ClassLabel(names=names[half]), "image": package.Image()}
                ),
            )
            for half in said
        }


@pytest.mark.parametrize("form", ["parquet", "parquet in folders", "arrow", "save_to_disk"])
def test_splits_with_names_in_another_order_mean_the_same(package, tmp_path, form):
    """load_dataset gives all splits the features of one of them, and keeps the numbers: dog would become cat."""
    folder = tmp_path / "set"
    tables = tables_of(package)
    with hugging_face.hugging_face():
        if form == "save_to_disk":
            package.DatasetDict(tables).save_to_disk(str(folder))
        for half, table in tables.items():
            if form == "arrow":
                table.save_to_disk(str(folder / half))
            elif form == "parquet":
                table.to_parquet(str(folder / f"{half}.parquet"))
            elif form == "parquet in folders":
                table.to_parquet(str(folder / half / "0.parquet"))
    for is_train, half in ((True, "train"), (False, "validation")):
        images, classes = build(folder, is_train)
        assert classes == ["cat", "dog", "eel"]
        assert [classes[label] for label in labels_of(images)] == SAID[half]


def test_files_of_one_split_must_agree(package, tmp_path):
    (tmp_path / "set").mkdir()
    for number, table in enumerate(tables_of(package).values()):
        with hugging_face.hugging_face():
            table.to_parquet(str(tmp_path / "set" / f"train-{number}.parquet"))
    with pytest.raises(
        UserError, match=r"train-0.parquet and .*train-1.parquet have different classes, or another"
    ):
        build(tmp_path / "set")


@pytest.mark.parametrize("is_train", [True, False])
def test_names_that_only_one_split_has(package, tmp_path, is_train):
    names = {"train": ["cat", "dog", "eel"], "validation": ["cat", "dog", "emu"]}
    with hugging_face.hugging_face():
        package.DatasetDict(tables_of(package, names, {"train": ["cat"], "validation": ["dog"]})).save_to_disk(
            str(tmp_path / "set")
        )
    both = r"'cat', 'dog', 'eel' in training, 'cat', 'dog', 'emu' in evaluation; only one of them has 'emu'"
    with pytest.raises(UserError, match=both):
        build(tmp_path / "set", is_train)


def test_splits_with_other_names_are_refused(package, tmp_path):
    columns = {"label": {"train": ["cat", "dog", "cat"], "validation": ["dog", "emu"]}}
    write(package, tmp_path / "set", HALVES, lambda p: {"label": p.Value("string")}, **columns)
    for is_train in (True, False):
        with pytest.raises(UserError, match=r"'cat', 'dog' in training, 'dog', 'emu' in evaluation; only .* 'emu'"):
            build(tmp_path / "set", is_train)


def test_classes_without_images_and_numbers_that_are_no_indices(package, tmp_path, capsys):
    columns = {"label": {"train": [1, 3, 1], "validation": [2, 1]}}
    write(package, tmp_path / "set", HALVES, lambda p: {"label": p.Value("int64")}, **columns)
    build(tmp_path / "set")
    assert "column 'label', 4 classes; no image of '0', '2' in train" in capsys.readouterr().out
    columns = {"label": {"train": [1, 20190512, 1], "validation": [2, 1]}}
    write(package, tmp_path / "other", HALVES, lambda p: {"label": p.Value("int64")}, **columns)
    with pytest.raises(UserError, match=r"has the label 20190512 in column 'label': these are no class indices"):
        build(tmp_path / "other", is_train=False)


@pytest.mark.parametrize("content", [b"PAR1 is how parquet begins PAR1", b""])
def test_damaged_files_are_one_line(package, tmp_path, content):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.parquet").write_bytes(content)
    with pytest.raises(UserError, match=r"^cannot read --data-set hfds/.*set: .+") as caught:
        build(tmp_path / "set")
    assert "\n" not in str(caught.value)


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
