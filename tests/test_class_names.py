"""The names of the classes: kept by a run, and compared wherever labels could change their meaning."""

from __future__ import annotations

import io
import shutil
import tarfile

import pytest
import torch
import yaml
from pictures import no_augmentation, photo, save_photo

import main
from datasets import build_dataset
from errors import UserError

SMALL = ["--model", "deit_tiny_patch16_224", "--input-size", "16", "--device", "cpu", "--batch-size", "4"]
SMALL += ["--model-kwargs", "patch_size=8", "embed_dim=24", "depth=1", "num_heads=2", "--num_workers", "0"]
TRAIN = [*SMALL, "--no-repeated-aug", "--aa", "none", "--warmup-epochs", "0"]


def write(root, classes=("cat", "dog"), count=4):
    shutil.rmtree(root, ignore_errors=True)
    for half in ("train", "val"):
        for label, name in enumerate(classes):
            for number in range(count):
                save_photo(root / half / name / f"{number}.png", seed=10 * label + number)
    return str(root)


def shards(root, labels):
    root.mkdir()
    for half in ("train", "val"):
        with tarfile.open(root / f"{half}.tar", "w") as tar:
            for number, label in enumerate(labels):
                file = io.BytesIO()
                photo(number).save(file, "PNG")
                for kind, content in (("png", file.getvalue()), ("cls", label.encode())):
                    member = tarfile.TarInfo(f"{number}.{kind}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return no_augmentation(data_set="wds/", data_path=str(root))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on cats and dogs."""
    folder = tmp_path_factory.mktemp("names")
    argv = ["--data-path", write(folder / "data"), *TRAIN, "--epochs", "1", "--output_dir", str(folder / "run")]
    assert main.main(argv) == 0
    return folder


def test_a_run_keeps_them(run):
    saved = torch.load(run / "run" / "checkpoint.pth", weights_only=True)
    assert saved["args"]["class_names"] == ["cat", "dog"]
    assert yaml.safe_load((run / "run" / "args.yaml").read_text())["class_names"] == ["cat", "dog"]


@pytest.mark.parametrize(
    ("classes", "said"),
    [
        (("cat", "eel"), "class 1 of 2 was 'dog', here class 1 of 2 is 'eel'"),
        (("ant", "cat", "dog"), "class 0 of 2 was 'cat', here class 0 of 3 is 'ant'"),
    ],
)
@pytest.mark.parametrize("how", [["--eval"], ["--epochs", "2"]], ids=["evaluated", "resumed"])
def test_a_checkpoint_is_not_used_on_other_classes(run, tmp_path, capsys, classes, said, how):
    argv = ["--data-path", write(tmp_path / "data", classes), *TRAIN, "--output_dir", str(tmp_path / "run")]
    state = torch.load(run / "run" / "checkpoint.pth", weights_only=True)
    assert main.main([*argv, "--resume", str(run / "run" / "checkpoint.pth"), *how]) == 2
    error = capsys.readouterr().err
    if len(classes) == len(state["args"]["class_names"]) or how == ["--eval"]:
        assert f"{run}/run/checkpoint.pth was trained on other classes than the data has: {said}" in error
    assert error.count("\n") == 1


def test_they_are_compared_before_weights_are_loaded(run, tmp_path, capsys):
    """Weights fit as well, so that nothing else would notice."""
    argv = ["--data-path", write(tmp_path / "data", ("dog", "zebra")), *SMALL, "--eval"]
    assert main.main([*argv, "--resume", str(run / "run" / "checkpoint.pth")]) == 2
    assert "class 0 of 2 was 'cat', here class 0 of 2 is 'dog'" in capsys.readouterr().err


def test_args_yaml_repeats_a_run_on_the_same_classes_alone(run, tmp_path, capsys):
    argv = ["--config", str(run / "run" / "args.yaml"), "--output_dir", str(tmp_path / "again")]
    assert main.main(argv) == 0
    capsys.readouterr()
    assert main.main([*argv, "--data-path", write(tmp_path / "other", ("cat", "eel"))]) == 2
    assert "class 1 of the data is eel, but --class-names, args.yaml or the other half says dog" in (
        capsys.readouterr().err
    )


def test_classes_without_names_are_called_as_the_flag_says(tmp_path):
    args = shards(tmp_path / "shards", ["0", "1", "1"])
    assert build_dataset(True, args)[1] == ["0", "1"]
    args.class_names = ["cat", "dog", "eel"]  # of which these shards lack the last
    assert build_dataset(True, args)[1] == ["cat", "dog", "eel"]
    args.class_names = ["cat"]
    with pytest.raises(
        UserError, match=r"class 0 of the data is 0, but --class-names.* says cat.* 2 classes, 1 names"
    ):
        build_dataset(True, args)


def test_names_are_checked_against_the_datas_own(tmp_path):
    args = no_augmentation(data_set="IMNET", data_path=write(tmp_path), class_names=["cat", "dog"])
    assert build_dataset(True, args)[1] == ["cat", "dog"]
    args.class_names = ["dog", "cat"]
    with pytest.raises(UserError, match=r"class 0 of the data is cat, but --class-names.* says dog"):
        build_dataset(True, args)
