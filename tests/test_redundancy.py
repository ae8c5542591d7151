"""`python -m redundancy` and `--monitor-redundancy`: models of every source, one process and two, bad input."""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import signal
import subprocess
import sys
from html import escape
from pathlib import Path
from typing import Any

import forks
import numpy as np
import pytest
import timm
import torch
from families import FAMILIES
from processes import PATIENCE
from small_runs import FLAGS, assert_same, make_images, saved, train
from test_timms_checkpoints import save_as_timm
from torch.utils.data import DataLoader, TensorDataset

import main
from datasets import build_dataset
from engine import Precision
from export import to_timm
from models import DiverseViT
from options import config
from redundancy import Report, assess
from redundancy.command import main as redundancy
from redundancy.metrics.registry import METRICS, metric
from redundancy.monitor import Monitor
from redundancy.presentation import page, tables
from redundancy.subjects import find_subjects
from state.trained import read_trained

ROOT = Path(__file__).parents[1]
QUICK = ["--metrics", "patch.cosine", "output"]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"), per_class=40)


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory) -> Path:
    """The folder of a run of one epoch, which keeps an average."""
    folder = tmp_path_factory.mktemp("runs") / "plain"
    assert train(images, folder, "--epochs", "1", "--mixup", "0", "--cutmix", "0") == 0
    return folder


def run(images: Path, output: Path, *argv: str) -> int:
    where = ["--data-path", str(images), "--output", str(output), "--num_workers", "0", "--device", "cpu"]
    return redundancy([*argv, *where])


def unsaved(monkeypatch) -> list[Report]:
    """Reports that would have been saved."""
    reports: list[Report] = []
    monkeypatch.setattr(Report, "save", lambda report, folder: reports.append(report))
    return reports


def parsed(path: Path) -> Any:
    """JSON as the standard has it: NaN and Infinity are errors."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


# ------------------------------------------------------------------------------------------------------------
# Sources of models


def test_a_whole_report(images, trained, tmp_path, capsys):
    words = [f"plain={trained / 'checkpoint.pth'}", f"average={trained / 'checkpoint_best.pth'}"]
    assert run(images, tmp_path / "out", *words, "--images", "30", "--measure", "attn.so@all") == 0
    printed = capsys.readouterr().out
    assert "Measuring plain" in printed and "patch.cosine_abs" in printed
    assert printed.rstrip().endswith(f"report: {tmp_path / 'out' / 'report.html'}")
    report = parsed(tmp_path / "out" / "report.json")
    assert [model["label"] for model in report["models"]] == ["plain", "average"]
    assert "30 of the 80 evaluation images" in report["about"]["data"]
    assert set(report["about"]) >= {"command", "revision", "torch", "timm", "data sha256", "device", "date"}
    assert report["about"]["command"].startswith(f"python -m redundancy plain={trained / 'checkpoint.pth'} ")
    about = report["models"][0]["about"]
    summed = subprocess.run(["sha256sum", trained / "checkpoint.pth"], capture_output=True, text=True, check=True)
    assert about["sha256"] == summed.stdout.split()[0]
    assert set(report["models"][0]["findings"]) == {*METRICS, "attn.so@all"}
    assert not report["models"][0]["gaps"]
    with open(tmp_path / "out" / "numbers.csv", newline="") as file:
        assert {row["metric"] for row in csv.DictReader(file)} == {*METRICS, "attn.so@all"}
    for name in ("report.html", "summary.csv", "summary.tex", "figures"):
        assert (tmp_path / "out" / name).exists()
    assert not [path for path in tmp_path.iterdir() if path.name != "out"]


def found(images, tmp_path, monkeypatch, *argv: str) -> Report:
    """The report of a command line."""
    reports = unsaved(monkeypatch)
    assert run(images, tmp_path / "none", *argv) == 0
    (report,) = reports
    return report


def same_numbers(one: Any, other: Any, tolerance: float = 0.0) -> None:
    """Of two models, all findings."""
    assert one.findings.keys() == other.findings.keys() and one.gaps == other.gaps
    for name, finding in one.findings.items():
        assert finding.axes == other.findings[name].axes and finding.count == other.findings[name].count
        np.testing.assert_allclose(finding.mean, other.findings[name].mean, tolerance, tolerance, err_msg=name)
        if finding.error is not None:
            np.testing.assert_allclose(finding.error, other.findings[name].error, tolerance, tolerance)


def test_one_model_from_every_source(images, trained, tmp_path, monkeypatch, capsys):
    """Equal weights give equal numbers, wherever they come from."""
    ours = read_trained(str(trained / "checkpoint.pth"), "raw")
    bare, deits = tmp_path / "bare.pth", tmp_path / "deits.pth"
    torch.save({"model": ours.backbone.state_dict()}, bare)
    torch.save(ours.backbone.state_dict(), deits)
    to_timm(ours.backbone, tmp_path / "export", ours.image_shape, ours.model_args, images=ours.preprocessing)
    kwargs = ["--model", "deit_tiny_patch16_224", "--input-size", "8"]
    kwargs += ["--model-kwargs", "patch_size=4", "embed_dim=12", "depth=2", "num_heads=2"]
    words = [f"ours={trained / 'checkpoint.pth'}", f"bare={bare}", f"deits={deits}"]
    report = found(images, tmp_path, monkeypatch, *words, "--weights", "raw", *kwargs, *QUICK)
    assert "says itself" not in capsys.readouterr().out  # it is the same model
    first, *others = report.models
    for other in others:
        same_numbers(first, other)
    export = found(images, tmp_path, monkeypatch, f"local-dir:{tmp_path / 'export'}", *QUICK).models[0]
    same_numbers(first, export)
    assert export.label == f"local-dir:{tmp_path / 'export'}"


def test_seeds_of_one_run(images, trained, tmp_path, monkeypatch):
    """Two files of one label are averaged, and their spread is the error."""
    other = saved(trained)
    for value in other["model"].values():
        value.mul_(1.01)
    torch.save(other, tmp_path / "other.pth")
    words = [f"run={trained / 'checkpoint.pth'}", f"run={tmp_path / 'other.pth'}", "--weights", "raw"]
    report = found(images, tmp_path, monkeypatch, *words, *QUICK)
    (models,) = report.groups().values()
    values = [model.findings["patch.cosine"].summary for model in models]
    assert values[0] != values[1] and "over seeds" in report.table()
    row = re.search(r"patch\.cosine +\| +(\S+) ± (\S+)", report.table().replace("\u2212", "-"))
    assert row is not None
    expected = [np.mean(values), np.std(values, ddof=1) / 2**0.5]
    assert [float(number) for number in row.groups()] == pytest.approx(expected, rel=0.05)


def test_raw_or_ema(images, tmp_path, monkeypatch):
    """Of timm's own files."""
    file, model, average = save_as_timm(tmp_path / "timm")
    for weights, expected in (("raw", model), ("ema", average), ("auto", average)):
        report = found(
            images, tmp_path, monkeypatch, str(file), "--weights", weights, "--metrics", "weight.stable_rank"
        )
        value = report.models[0].findings["weight.stable_rank"].mean[0, 0]
        query = expected.blocks[0].attn.qkv.weight[:12].double()
        singular = np.linalg.svd(query.detach().numpy(), compute_uv=False)
        assert value == pytest.approx((singular**2).sum() / singular[0] ** 2, rel=1e-9)
        assert report.models[0].about["weights"].endswith(f"({'raw' if weights == 'raw' else 'ema'})")


def test_untrained_models_by_name(images, tmp_path, monkeypatch):
    """And seeds, which figures average."""
    argv = ["vit_tiny_patch16_224", "--no-pretrained", "--input-size", "8", "16", "--model-kwargs", "patch_size=4"]
    argv += ["depth=2", "--images", "6"]
    model = found(images, tmp_path, monkeypatch, *argv).models[0]
    assert model.about["images"] == "3 x 8 x 16" and model.label == "vit_tiny_patch16_224"
    assert model.gaps["output.top1"] == "the model knows 1000 classes, the data has 2"
    assert "output.knn" in model.findings
    again = found(images, tmp_path, monkeypatch, *argv).models[0]
    same_numbers(model, again)
    other = found(images, tmp_path, monkeypatch, *argv, "--seed", "1").models[0]
    assert model.findings["weight.cosine_abs"].summary != other.findings["weight.cosine_abs"].summary


def test_accuracy_is_main_pys(images, trained, tmp_path, monkeypatch, capsys):
    report = found(
        images, tmp_path, monkeypatch, str(trained / "checkpoint.pth"), "--images", "1000", "--weights", "raw"
    )
    resume = ["--eval", "--resume", str(trained / "checkpoint.pth"), "--weights", "raw"]
    assert main.main([*FLAGS, "--data-path", str(images), *resume]) == 0
    accuracy = report.models[0].findings["output.top1"].summary
    assert f"* Acc@1 {accuracy:.3f}" in capsys.readouterr().out


def test_terminals_without_signs(images, trained, tmp_path):
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    argv = [str(trained / "checkpoint.pth"), "--data-path", str(images), "--output", str(tmp_path / "out"), *QUICK]
    run = subprocess.run([sys.executable, "-m", "redundancy", *argv], cwd=ROOT, env=env, capture_output=True)
    assert run.returncode == 0 and b" +- " in run.stdout, run.stderr


def test_labels_of_words(tmp_path):
    """What a model is called, and which of them are seeds."""
    for name in ("a/plain/checkpoint.pth", "b/plain/checkpoint.pth", "x=y/checkpoint_best.pth", "c/deit.pth"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    a, b, equals, own = (
        str(tmp_path / name)
        for name in ("a/plain/checkpoint.pth", "b/plain/checkpoint.pth", "x=y/checkpoint_best.pth", "c/deit.pth")
    )
    label = lambda *words: [subject.label for subject in find_subjects(words)]  # noqa: E731
    assert label(a, own) == ["plain", "deit"]
    assert label(a, b) == [a, b]  # two runs of one name are no seeds
    assert label(f"plain={a}", b) == ["plain", b]
    assert label(f"run={a}", f"run={b}") == ["run", "run"]
    assert label(equals, f"lr=0.1={own}", f"a/b={a}") == ["x=y", "lr=0.1", "a/b"]
    assert label("deit_tiny_patch16_224", "hf-hub:timm/x") == ["deit_tiny_patch16_224", "hf-hub:timm/x"]


# ------------------------------------------------------------------------------------------------------------
# Processes


def command(*argv: str, processes: int = 1) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*launcher, "-m", "redundancy", *argv], cwd=ROOT, env=env, capture_output=True, text=True, timeout=PATIENCE
    )


def test_two_processes_and_other_batches_give_the_same(images, trained, tmp_path):
    """80 images make the groups 32, 32 and 16: one process has the first, the other both others."""
    argv = [str(trained / "checkpoint.pth"), "--data-path", str(images), "--num_workers", "0", "--device", "cpu"]
    argv += ["--metrics", "patch.cosine_abs", "patch.rankme", "patch.cka", "attn.across", "output"]
    argv += ["--measure", "attn.cno@all", "--measure", "patch.contrastive"]  # one draws random probes
    one = command(*argv, "--output", str(tmp_path / "one"), "--batch-size", "7")
    two = command(*argv, "--output", str(tmp_path / "two"), "--batch-size", "16", processes=2)
    assert (one.returncode, two.returncode) == (0, 0), one.stderr + two.stderr
    assert two.stdout.count("report: ") == 1
    first, second = (Report.from_json((tmp_path / name / "report.json").read_text()) for name in ("one", "two"))
    same_numbers(first.models[0], second.models[0], 1e-6)
    assert first.models[0].findings["patch.cka"].note == second.models[0].findings["patch.cka"].note
    assert "2 process(es)" in second.about["device"]
    assert second.about["command"].startswith("torchrun --nproc_per_node 2 -m redundancy ")


def test_a_failure_of_one_process_is_that_of_all(trained, tmp_path):
    """None of them waits for the one that cannot read an image; one line says which."""
    broken = make_images(tmp_path / "images", per_class=40) / "val" / "class0" / "0.png"
    broken.write_bytes(b"no image")
    argv = [str(trained / "checkpoint.pth"), "--data-path", str(tmp_path / "images"), "--num_workers", "0", *QUICK]
    ended = command(*argv, "--output", str(tmp_path / "out"), "--device", "cpu", processes=2)
    assert ended.returncode != 0 and not (tmp_path / "out").exists()
    errors = [line for line in ended.stderr.splitlines() if line.startswith("redundancy: error: ")]
    assert len(errors) == 1 and str(broken) in errors[0], ended.stderr


def test_more_processes_than_groups(images, trained, tmp_path):
    argv = [
        str(trained / "checkpoint.pth"),
        "--data-path",
        str(images),
        "--num_workers",
        "0",
        "--images",
        "5",
        *QUICK,
    ]
    ended = command(*argv, "--output", str(tmp_path / "out"), "--device", "cpu", processes=2)
    assert ended.returncode == 0, ended.stderr
    assert parsed(tmp_path / "out" / "report.json")["models"][0]["findings"]["patch.cosine"]["count"] == 5


def test_help_and_mistakes_are_answered_without_torch(tmp_path):
    """Before anything is imported that takes time."""
    code = """
import runpy, sys
sys.argv = ["redundancy", *{!r}]
try:
    runpy.run_module("redundancy", run_name="__main__")
except SystemExit as end:
    print("torch" in sys.modules, end.code)
"""
    for argv, last in ((["--help"], "False 0"), (["x", "--outptu", "y"], "False 2"), ([], "False 2")):
        ended = subprocess.run(
            [sys.executable, "-c", code.format(argv)], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE
        )
        assert ended.stdout.splitlines()[-1] == last, ended.stderr


# ------------------------------------------------------------------------------------------------------------
# All families


def measured(name: str, **options: Any) -> Report:
    """A family's report of nine images."""
    family = FAMILIES[name]
    torch.manual_seed(0)
    model = family.make().float()
    pixels = torch.randn(9, 3, family.pixels, family.pixels, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(9) % 5
    return assess(model, [(pixels[:4], labels[:4]), (pixels[4:], labels[4:])], label=name, **options)


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name):
    """All that tests/families.py says a family shows has numbers; the rest has a reason, also on the page."""
    family, report = FAMILIES[name], measured(name)
    (assessed,) = report.models
    json.loads(report.to_json(), parse_constant=lambda constant: pytest.fail(constant))
    groups = report.groups()
    html, table = page.render(groups, {}, {}), report.table()
    assert all(f">{metric}<" in html for metric in METRICS) and tables.latex(groups) and tables.numbers_csv(groups)
    assert all(f"| {metric} " in table for metric, each in METRICS.items() if each.summary != "none")
    assert all(escape(reason[:40]) in html for reason in assessed.gaps.values())
    numbers = {metric for metric, finding in assessed.findings.items() if not np.isnan(finding.mean).all()}
    assert numbers | assessed.gaps.keys() == set(METRICS) and not numbers & assessed.gaps.keys()
    hidden = {each for each in METRICS if each.startswith("attn.")} if not family.attends else set()
    hidden |= {"output.patch_accuracy"} if not family.classifies else set()
    hidden |= {"attn.distance"} if name.startswith("xcit") else set()  # maps between channels
    assert assessed.gaps.keys() == hidden and all(assessed.gaps.values())
    layers = assessed.findings["patch.cosine_abs"].axes[0].labels
    assert layers == ("input", *map(str, range(family.depth)))
    if not family.one_scale:
        assert np.isnan(assessed.findings["patch.to_input"].mean[-1])


def test_a_page_of_unlike_families(tmp_path):
    """Layers, windows, widths and gaps of one are not those of another; figures have room for all."""
    few = ["patch.cosine_abs", "patch.by_patch", "attn.across", "attn.distance", "weight.rank_90", "output.top1"]
    reports = [measured(name, metrics=few) for name in ("deit_distilled", "swin", "xcit", "levit", "hiera")]
    sum(reports[1:], reports[0]).save(tmp_path / "out")
    assert {path.stem for path in (tmp_path / "out" / "figures").glob("*.png")} >= set(few)
    parsed(tmp_path / "out" / "report.json")


# ------------------------------------------------------------------------------------------------------------
# Bad input


def refused(capsys, images: Path, output: Path, *argv: str) -> str:
    """The one line of an error."""
    assert run(images, output, *argv) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and errors.startswith("redundancy: error: ")
    return errors.removeprefix("redundancy: error: ").rstrip()


def test_bad_input(images, trained, tmp_path, capsys):
    file, output = str(trained / "checkpoint.pth"), tmp_path / "out"
    say = lambda *argv: refused(capsys, images, output, *argv)  # noqa: E731
    assert "unknown model 'deit_smal'. Did you mean" in say("deit_smal")
    assert say("no/such.pth") == "no/such.pth: no such file (and not an https address)"
    assert "is a folder: give a checkpoint in it" in say(str(trained))
    assert "given twice as a" in say(f"a={file}", f"a={file}")
    assert "one side of the '=' is empty" in say(f"={file}")
    assert "there is no such metric or level. Did you mean patch.cosine" in say(file, "--metrics", "patch.cosin")
    assert "unknown regularizer 'patch.cosin'" in say(file, "--measure", "patch.cosin")
    assert "depends on the training labels" in say(file, "--measure", "patch.mixing")
    assert say(file, "--images", "0") == "--images must be at least 1, not 0"
    assert "--weights is for checkpoints, and all models" in say("vit_tiny_patch16_224", "--weights", "ema")
    assert "--model is for checkpoints, and all models" in say("vit_tiny_patch16_224", "--model", "x")
    assert "--num-classes is for checkpoints, and all" in say("vit_tiny_patch16_224", "--num-classes", "5")
    assert "--no-pretrained is for models by name, and all" in say(file, "--no-pretrained")
    assert "rows and columns count from 0" in say(file, "--patch", "-1", "0")
    assert "holds no EMA" in say(save_as_timm(tmp_path / "x", ema=False)[0].as_posix(), "--weights", "ema")
    assert not output.exists()


def test_what_would_mislead_is_refused(images, trained, tmp_path, capsys):
    file, output = str(trained / "checkpoint.pth"), tmp_path / "out"
    say = lambda *argv: refused(capsys, images, output, *argv)  # noqa: E731
    assert say("vit_tiny_patch16_224", "--input-size", "0") == "--input-size must be at least 1, not 0"
    assert "unknown model" in say("x" * 300) and "no such file" in say("y" * 300 + "=" + "z" * 300 + ".pth")
    (tmp_path / "again.pth").symlink_to(file)
    assert "is given twice as a" in say(f"a={file}", f"a={tmp_path / 'again.pth'}")
    broken = saved(trained)
    broken["model"]["cls_token"].fill_(float("nan"))
    torch.save(broken, tmp_path / "broken.pth")
    line = say(f"a={tmp_path / 'broken.pth'}", "--weights", "raw")
    assert line.endswith("has diverged: its weights are not finite, e.g. cls_token")
    assert "there is no patch 2 0 in 2 rows and 2 columns" in say(file, "--patch", "2", "0", *QUICK)
    assert "must be at least 1" in say(file, "--num-classes", "0")


def test_examples_come_from_as_many_batches_as_they_need(images, trained, tmp_path, monkeypatch):
    """Also where attention is not measured."""
    argv = [str(trained / "checkpoint.pth"), "--batch-size", "2", "--metrics", "output.top1", "--images", "12"]
    for count in (0, 2, 7, 12, 20):
        model = found(images, tmp_path, monkeypatch, *argv, "--examples", str(count)).models[0]
        assert len(model.examples) == min(count, 12)
        assert all(each.heads is not None and each.cosine is not None for each in model.examples)


def test_a_checkpoint_that_says_its_model_but_not_its_arguments(images, trained, tmp_path, monkeypatch):
    """As DeiT's: what it does not say is filled in."""
    state = read_trained(str(trained / "checkpoint.pth"), "raw").backbone.state_dict()
    said = argparse.Namespace(model="deit_tiny_patch16_224", input_size=8, data_set="IMNET")
    torch.save({"model": state, "args": said}, tmp_path / "deit.pth")
    kwargs = ["--model-kwargs", "patch_size=4", "embed_dim=12", "depth=2", "num_heads=2"]
    one = found(images, tmp_path, monkeypatch, str(tmp_path / "deit.pth"), *kwargs, *QUICK).models[0]
    two = found(images, tmp_path, monkeypatch, str(trained / "checkpoint.pth"), "--weights", "raw", *QUICK).models[
        0
    ]
    same_numbers(one, two)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_while_the_report_is_written_leaves_nothing(images, trained, tmp_path, number, code):
    program = f"""
import os, program
program.begin("redundancy")
from redundancy import command
from redundancy.presentation import figures
figures.save = lambda *_: os.kill(os.getpid(), {int(number)})
program.leave(command.main())
"""
    argv = [str(trained / "checkpoint.pth"), "--data-path", str(images), "--output", str(tmp_path / "out"), *QUICK]
    ended = subprocess.run(
        [sys.executable, "-c", program, *argv, "--num_workers", "0", "--device", "cpu"],
        cwd=ROOT,
        capture_output=True,
    )
    assert ended.returncode == code, ended.stderr
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_another_architecture(images, trained, tmp_path, capsys):
    state = read_trained(str(trained / "checkpoint.pth")).backbone.state_dict()
    torch.save({"model": {**state, "odd.weight": torch.zeros(2)}}, tmp_path / "odd.pth")
    kwargs = ["--input-size", "8", "--model-kwargs", "patch_size=4", "embed_dim=12", "depth=3", "num_heads=2"]
    line = refused(
        capsys, images, tmp_path / "out", str(tmp_path / "odd.pth"), "--model", "deit_tiny_patch16_224", *kwargs
    )
    assert "blocks.2." in line and "odd.weight" in line
    assert "does not say which model it holds: give --model NAME" in refused(
        capsys, images, tmp_path / "out", str(tmp_path / "odd.pth")
    )


def test_nothing_is_overwritten(images, trained, tmp_path, capsys):
    """Nor measured, where the report could not be written."""
    (tmp_path / "out").mkdir()
    (tmp_path / "file").write_text("")
    file = str(trained / "checkpoint.pth")
    assert "exists; give another one" in refused(capsys, images, tmp_path / "out", file)
    assert "is no folder that can be written to" in refused(capsys, images, tmp_path / "file" / "x", file)
    assert not list((tmp_path / "out").iterdir())


def test_the_last_model_is_built_before_the_first_is_measured(images, trained, tmp_path, capsys):
    (tmp_path / "broken.pth").write_bytes(b"no checkpoint")
    assert run(images, tmp_path / "out", str(trained / "checkpoint.pth"), str(tmp_path / "broken.pth")) == 2
    printed = capsys.readouterr()
    assert "Measuring" not in printed.out and "broken.pth is not a checkpoint" in printed.err


def test_folders_without_images_and_a_single_image(images, trained, tmp_path, capsys, monkeypatch):
    file = str(trained / "checkpoint.pth")
    assert "no folder" in refused(capsys, tmp_path, tmp_path / "out", file)
    for label in range(2):
        (tmp_path / "hollow" / "val" / f"class{label}").mkdir(parents=True)
    assert "class folder class0 (and 1 more) of" in refused(capsys, tmp_path / "hollow", tmp_path / "out", file)
    (model,) = found(images, tmp_path, monkeypatch, file, "--images", "1").models
    assert set(model.gaps) == {"patch.cka", "output.knn"}
    assert np.isfinite(model.findings["patch.cosine"].mean).all()
    assert np.isnan(model.findings["patch.cosine"].error).all()  # of one image


# ------------------------------------------------------------------------------------------------------------
# While a run trains

MONITORED = ("--epochs", "3", "--mixup", "0", "--cutmix", "0", "--monitor-redundancy", "2")


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def watched(record: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in record.items() if name.startswith("redundancy_")}


def test_monitor(images, tmp_path, monkeypatch, capsys):
    """Every second epoch and the last; the numbers are the command's; training does not notice."""
    assert train(images, tmp_path / "plain", *MONITORED[:-2]) == 0
    assert train(images, tmp_path / "run", *MONITORED) == 0
    assert "redundancy, last layer: patch.cosine_abs" in capsys.readouterr().out
    first, second, third = map(watched, records(tmp_path / "run"))
    cheap = [name for name, metric in METRICS.items() if metric.cheap]
    assert not first and second.keys() == third.keys()
    assert set(third) == {f"redundancy_{name}@{layers}" for name in cheap for layers in ("mean", "last")}
    assert second != third
    plain, run_ = (saved(tmp_path / name) for name in ("plain", "run"))
    assert_same(plain["model"], run_["model"])
    assert_same(plain["optimizer"], run_["optimizer"])
    file = str(tmp_path / "run" / "checkpoint.pth")
    report = found(images, tmp_path, monkeypatch, file, "--weights", "raw", "--images", "16", "--metrics", *cheap)
    for name in cheap:
        finding = report.models[0].findings[name]
        assert third[f"redundancy_{name}@last"] == pytest.approx(finding.mean[-1], rel=1e-6), name
        assert third[f"redundancy_{name}@mean"] == pytest.approx(finding.mean.mean(), rel=1e-6), name


def test_monitor_resumes_exactly(images, tmp_path):
    """Also another interval, which holds from there on."""
    assert train(images, tmp_path / "whole", *MONITORED) == 0
    assert train(images, tmp_path / "parts", *MONITORED, "--epochs", "3", "--sched", "constant") == 0
    assert train(images, tmp_path / "again", *MONITORED, "--sched", "constant", "--epochs", "2") == 0
    assert train(images, tmp_path / "again", *MONITORED, "--sched", "constant", "--resume", "auto") == 0
    parts, again = (records(tmp_path / name) for name in ("parts", "again"))
    assert watched(parts[2]) == watched(again[2]) and watched(parts[1]) == watched(again[1])


def test_monitor_of_layers_without_a_number(images, tmp_path):
    """A block with one head has no pairs of heads; the mean is that of the others."""
    flags = ["--model", "pvt_v2_b0", "--input-size", "32", "--batch-size", "4", "--epochs", "1", "--device", "cpu"]
    flags += [
        "--num_workers",
        "0",
        "--monitor-redundancy",
        "1",
        "--mixup",
        "0",
        "--cutmix",
        "0",
        "--no-repeated-aug",
    ]
    assert main.main([*flags, "--data-path", str(images), "--output_dir", str(tmp_path / "run")]) == 0
    numbers = watched(records(tmp_path / "run")[0])
    assert numbers["redundancy_attn.cosine_abs@mean"] > 0


def test_monitor_names_what_a_model_does_not_show(images, tmp_path, capsys):
    flags = ["--model", "levit_128s", "--input-size", "32", "--batch-size", "4", "--epochs", "1", "--device", "cpu"]
    flags += ["--num_workers", "0", "--monitor-redundancy", "1", "--mixup", "0", "--cutmix", "0"]
    flags += ["--output_dir", str(tmp_path / "run")]
    assert main.main([*flags, "--data-path", str(images), "--no-repeated-aug", "--model-kwargs"]) == 0
    assert "note: --monitor-redundancy leaves out attention: " in capsys.readouterr().out
    assert not [name for name in watched(records(tmp_path / "run")[0]) if "attn" in name]
    flags[1] = "resnet10t"
    assert main.main([*flags, "--data-path", str(images), "--no-repeated-aug"]) == 2
    assert "resnet10t shows neither patches nor attention: drop it" in capsys.readouterr().err


def test_timms_names_are_there():
    """The offline tests above build these by name."""
    assert all(name in timm.list_models() for name in ("levit_128s", "resnet10t", "vit_tiny_patch16_224"))


def test_the_pages_example(tmp_path, monkeypatch):
    """docs/redundancy.md's lines, as they stand."""
    (lines,) = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "docs" / "redundancy.md").read_text(), flags=re.M | re.S
    )
    torch.manual_seed(0)
    model, other = FAMILIES["deit"].make(), FAMILIES["swin"].make()
    pixels = torch.randn(8, 3, 32, 32)
    given = {"model": model, "other": other, "loader": DataLoader(TensorDataset(pixels, torch.arange(8) % 5), 3)}
    monkeypatch.chdir(tmp_path)
    few = ("patch.cosine_abs", "patch.cka", "weight.condition")  # all of them are drawn by another test
    monkeypatch.setattr("redundancy.metrics.registry.METRICS", {name: METRICS[name] for name in few})
    exec(lines, given)
    assert (tmp_path / "report" / "report.html").is_file()
    assert 0 < given["deepest"] < 1 and given["figure"].axes


def test_a_metric_is_one_file(monkeypatch):
    """One registered here is measured, named and explained, without another change."""
    monkeypatch.setattr("redundancy.metrics.registry.METRICS", dict(METRICS))

    @metric("patch.largest", takes="patches", label="largest", summary="last")
    def largest(x):
        """Largest entry of the patches.

            M = max_id x_id

        Where: here.
        Normalised: nothing.
        Range: any.
        Undefined: never.
        Source: this test.
        """
        return x.amax(dim=(1, 2))

    model = FAMILIES["deit"].make().eval()
    pixels = torch.randn(5, 3, 32, 32)
    report = assess(model, [pixels], metrics=["patch"])
    with torch.no_grad():
        (tokens,) = model.forward_intermediates(
            pixels, indices=[2], norm=False, output_fmt="NLC", intermediates_only=True
        )
    expected = tokens.amax(dim=(1, 2)).mean()
    assert report.models[0].findings["patch.largest"].summary == pytest.approx(float(expected), rel=1e-6)
    assert "patch.largest" in report.table()


@pytest.mark.parametrize("flags", [[], ["--fsdp"]], ids=["ddp", "fsdp"])
def test_monitor_in_two_processes(images, tmp_path, flags):
    """They look at the same images, as one process does: with the weights that the two end with."""
    options = [*FLAGS, "--data-path", str(images), "--output_dir", str(tmp_path / "run"), "--epochs", "1", *flags]
    done = forks.run(2, "main.py", *options, "--monitor-redundancy", "1", env=os.environ)
    assert done.returncode == 0, done.stderr
    numbers = watched(records(tmp_path / "run")[0])
    one = ["--epochs", "1", "--resume", str(tmp_path / "run" / "checkpoint.pth"), "--batch-size", "8"]
    model = read_trained(str(tmp_path / "run" / "checkpoint.pth"), "raw").backbone
    args = config.resolve([*FLAGS, "--data-path", str(images), "--monitor-redundancy", "1", *one])
    monitor = Monitor(args, model, build_dataset(False, args)[0])
    cpu = Precision(torch.device("cpu"))
    expected = monitor.measure(0, DiverseViT(model, measured=monitor.needs), cpu)
    assert numbers == pytest.approx({f"redundancy_{name}": value for name, value in expected.items()}, rel=1e-6)


# torch's compiler meets this warning of its own, hides it when it would be shown, but not where it is an error
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_monitor_of_a_compiled_model(images, tmp_path):
    """The same numbers as without."""
    flags = ["--epochs", "1", "--monitor-redundancy", "1", "--attn_cos_within_coef", "0.1"]
    assert train(images, tmp_path / "eager", *flags) == 0
    assert train(images, tmp_path / "compiled", *flags, "--torchcompile", "eager") == 0
    eager, compiled = (watched(records(tmp_path / name)[0]) for name in ("eager", "compiled"))
    assert eager == pytest.approx(compiled, rel=1e-6) and eager
