"""The moving average beside the model: its warm-up, runs too short for it, and which of the two is the best."""

from __future__ import annotations

import json
import math
import runpy
from pathlib import Path

import pytest
import torch
from small_runs import make_images, saved, train
from timm.utils import ModelEmaV3
from torch import nn

import main
from engine import Precision, Tally, Updater
from models.captured import Captured
from state.run_state import Best
from state.trained import read_trained

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"))


# ------------------------------------------------------------------------------------------------------------
# The average


def test_warm_up_is_timms(monkeypatch):
    """1 - (1 + n)^(-2/3), n counted from the second update, up to the decay; without it, the decay alone."""
    model = nn.Linear(2, 2)
    monkeypatch.setattr("engine.unwrap", lambda model: model)
    expected = {True: [0.0, 1 - 2 ** (-2 / 3), 1 - 3 ** (-2 / 3), 0.55, 0.55], False: [0.55] * 5}
    for warmup, decays in expected.items():
        ema = ModelEmaV3(model, decay=0.55, use_warmup=warmup)
        updater = Updater(torch.optim.SGD(model.parameters(), lr=0.1), Precision(torch.device("cpu")), ema=ema)
        average = ema.module.weight.clone()
        for number, decay in enumerate(decays, start=1):
            model.weight.grad = torch.randn(2, 2)
            updater.step(model, number)
            average = decay * average + (1 - decay) * model.weight.detach()
            assert torch.allclose(ema.module.weight, average, rtol=1e-6, atol=1e-7), (warmup, number)


def test_updates_are_counted_over_the_run(images, tmp_path):
    assert train(images, tmp_path / "a", "--epochs", "2", "--model-ema-warmup") == 0
    assert saved(tmp_path / "a")["updates"] == 6  # 12 images in batches of 4, twice
    state = saved(tmp_path / "a")
    del state["updates"]  # a checkpoint of an earlier version
    torch.save(state, tmp_path / "a" / "checkpoint.pth")
    assert train(images, tmp_path / "a", "--epochs", "3", "--model-ema-warmup", "--resume", "auto") == 0
    assert saved(tmp_path / "a")["updates"] == 9


@pytest.mark.parametrize(
    ("flags", "warned"),
    [
        (["--model-ema-decay", "0.99996"], True),
        (["--model-ema-decay", "0.99996", "--model-ema-warmup"], False),
        (["--model-ema-decay", "0.99996", "--no-model-ema"], False),
        (["--model-ema-decay", "0.3"], False),  # 0.3^3 = 0.027
    ],
)
def test_a_run_too_short_for_its_average_is_warned(images, flags, warned, capsys):
    assert train(images, None, "--epochs", "1", *flags) == 0
    out = capsys.readouterr().out
    assert ("after the 3 steps of this one, 100 % of the average is still its first weights" in out) == warned


# ------------------------------------------------------------------------------------------------------------
# Which is best


def run_with_accuracies(images, folder, monkeypatch, accuracies, *flags: str) -> None:
    """A run whose epochs have these accuracies: (of the model, of the average)."""
    evaluate = main.evaluate_run

    def measured(run_state, *others):
        tested, averaged = evaluate(run_state, *others)
        model, ema = accuracies[run_state.epoch + 1]
        return {**tested, "acc1": model}, {**averaged, "acc1": ema} if averaged else {}

    monkeypatch.setattr(main, "evaluate_run", measured)
    assert train(images, folder, "--epochs", str(len(accuracies)), *flags) == 0
    monkeypatch.undo()


def test_the_best_file_is_of_the_best_weights(images, tmp_path, monkeypatch, capsys):
    run_with_accuracies(images, tmp_path, monkeypatch, [(30.0, 9.0), (40.0, 10.0), (35.0, 60.0), (50.0, 55.0)])
    best = saved(tmp_path, "checkpoint_best.pth")
    assert best["epoch"] == 2
    assert best["best"] == {"epoch": 2, "weights": "model_ema", "acc1": 35.0, "ema_acc1": 60.0}
    assert saved(tmp_path)["best"] == best["best"] and saved(tmp_path)["max_acc"] == 50.0
    assert "Max accuracy: 50.00%, best: epoch 3's EMA with 60.00%" in capsys.readouterr().out
    exported = read_trained(str(tmp_path / "checkpoint_best.pth"))
    assert (exported.weights, exported.evaluated.ema, exported.evaluated.model) == ("ema", 60.0, 35.0)


def test_export_takes_the_better_weights_and_says_so(images, tmp_path, monkeypatch, capsys):
    run_with_accuracies(images, tmp_path, monkeypatch, [(20.0, 9.0), (33.0, 9.7)])
    assert "ends with 9.70% and the model itself with 33.00%" in capsys.readouterr().out
    export_model = runpy.run_path(str(ROOT / "script" / "export_model.py"))["main"]
    path = str(tmp_path / "checkpoint_best.pth")
    state = saved(tmp_path, "checkpoint_best.pth")
    for weights, key, said in (
        ("auto", "model", "the trained weights (raw), top-1 33.00% on the run's evaluation images (ema: 9.70%)"),
        (
            "ema",
            "model_ema",
            "the moving average of the weights (ema), top-1 9.70% on the run's evaluation images (raw: 33",
        ),
    ):
        assert export_model([path, str(tmp_path / weights), "--formats", "timm", "--weights", weights]) == 0
        assert said in capsys.readouterr().out
        trained = read_trained(path, weights)
        assert all(torch.equal(value, state[key][name]) for name, value in trained.backbone.state_dict().items())


def test_without_an_average_the_model_is_the_best(images, tmp_path, monkeypatch, capsys):
    run_with_accuracies(images, tmp_path, monkeypatch, [(30.0, 0), (20.0, 0)], "--no-model-ema")
    assert saved(tmp_path, "checkpoint_best.pth")["best"] == Best(0, "model", 30.0, None)._asdict()
    assert "Max accuracy: 30.00%\n" in capsys.readouterr().out


def test_a_best_epoch_is_written_once(images, tmp_path, monkeypatch):
    run_with_accuracies(images, tmp_path, monkeypatch, [(30.0, 9.0)])
    assert (tmp_path / "checkpoint.pth").samefile(tmp_path / "checkpoint_best.pth")


# ------------------------------------------------------------------------------------------------------------
# What is not a number


class Broken(nn.Module):
    """Logits of which some are not finite; and those of a second head, which are."""

    predicts_jointly = True

    def __init__(self, bad: float) -> None:
        super().__init__()
        self.bad = bad

    def forward(self, images, needs=None, labels=None):
        logits = torch.zeros(len(images), 3)
        logits[0, 1] = self.bad
        return Captured(logits, None, torch.zeros(len(images), 1, 3), {}, {}, {})


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite_have_no_accuracy(bad):
    tally = Tally(Broken(bad), Precision(torch.device("cpu")))
    tally.add(torch.zeros(4, 3, 2, 2), torch.zeros(4, dtype=torch.long))
    means = tally.means()
    accuracies = {name: value for name, value in means.items() if name != "loss"}
    assert set(accuracies) == {"acc1", "acc5", "joint_acc1", "joint_acc5"}
    assert all(math.isnan(value) for value in accuracies.values())


def test_the_log_is_json(images, tmp_path, monkeypatch):
    nan = float("nan")
    run_with_accuracies(images, tmp_path, monkeypatch, [(nan, 20.0), (30.0, nan)])

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    lines = (tmp_path / "log.txt").read_text().splitlines()
    records = [json.loads(line, parse_constant=refuse) for line in lines]
    assert [(record["test_acc1"], record["ema_test_acc1"]) for record in records] == [(None, 20.0), (30.0, None)]
    assert [record["max_acc"] for record in records] == [0.0, 30.0]
    assert saved(tmp_path)["best"]["weights"] == "model"
