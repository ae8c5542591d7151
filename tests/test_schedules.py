"""Learning rates from epoch to epoch, against timm's own schedules, and what is refused of them."""

from __future__ import annotations

import warnings
from itertools import pairwise

import pytest
import torch
from timm.scheduler.plateau_lr import PlateauLRScheduler

from errors import UserError
from options import config
from schedules import PlateauLR, PolyBySteps, build_schedule, enter, without_effect

ACCURACIES = [10.0, 20.0, 20.0, 20.0005, 19.0, 21.0, 21.0, 21.0, 21.0, 21.0, 30.0, 29.0, 29.0, 29.0, 29.0, 29.0]
NOISE = {"noise_range_t": (3, 12), "noise_pct": 0.3, "noise_std": 0.2, "noise_seed": 7}


def two_groups() -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [torch.zeros(1)], "lr": 1.0}, {"params": [torch.zeros(1)], "lr": 0.5}])


def rates(schedule, first: int = 0) -> list[list[float]]:
    seen = []
    for epoch, accuracy in list(enumerate(ACCURACIES))[first:]:
        schedule.step(epoch, accuracy)
        seen.append([group["lr"] for group in schedule.optimizer.param_groups])
    return seen


@pytest.mark.parametrize("noise", [{}, NOISE], ids=["plain", "noise"])
@pytest.mark.parametrize(("warmup", "patience"), [(2, 0), (2, 2), (1, 1)])
def test_plateau_gives_timms_rates(warmup, patience, noise):
    flags = {"decay_rate": 0.3, "patience_t": patience, "lr_min": 0.01, "warmup_t": warmup, "warmup_lr_init": 0.1}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # timm will remove it, since it does not resume
        timms = PlateauLRScheduler(two_groups(), **flags, **noise)
    assert rates(PlateauLR(two_groups(), **flags, **noise)) == rates(timms)


@pytest.mark.parametrize("noise", [{}, NOISE], ids=["plain", "noise"])
def test_plateau_goes_on_from_any_epoch(noise):
    flags = {"decay_rate": 0.3, "patience_t": 1, "lr_min": 0.01, "warmup_t": 0, "warmup_lr_init": 0.1}
    whole = rates(PlateauLR(two_groups(), **flags, **noise))
    for first in range(1, len(ACCURACIES)):
        before = PlateauLR(two_groups(), **flags, **noise)
        for epoch in range(first):
            before.step(epoch, ACCURACIES[epoch])
        after = PlateauLR(two_groups(), **flags, **noise)
        after.load_state_dict(before.state_dict())
        assert rates(after, first) == whole[first:]


def test_plateau_without_warm_up_starts_at_the_rate():
    """timm's falls to its warm-up rate, 1e-6, after the first epoch."""
    schedule = build_schedule(args("--sched", "plateau", "--warmup-epochs", "0", "--lr", "1"), two_groups(), 1.0)
    assert rates(schedule)[0] == [1.0, 0.5]


def test_milestones_are_epochs():
    flags = ["--sched", "multistep", "--decay-milestones", "3", "5", "--decay-rate", "0.5", "--warmup-epochs", "0"]
    schedule = build_schedule(args(*flags, "--lr", "1"), two_groups(), 1.0)
    of_epochs = [1.0, *(first for first, _ in rates(schedule))]  # the rate of an epoch is set after the one before
    assert [epoch for epoch, (one, other) in enumerate(pairwise(of_epochs), start=1) if one != other] == [3, 5]


def args(*argv: str) -> config.Resolved:
    return config.resolve(["--data-set", "DIGITS", "--unscale-lr", *argv])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--min-lr", "1e-2"], "--min-lr 0.01 is above the peak learning rate, 0.001"),
        (["--warmup-lr", "1e-2"], "--warmup-lr 0.01 is above the peak learning rate, 0.001"),
        (["--sched", "plateau", "--min-lr", "1e-2"], "--min-lr 0.01 is above the peak"),
        (["--sched", "step", "--decay-rate", "2"], "--decay-rate 2 would raise the rate"),
        (["--sched", "plateau", "--decay-rate", "1"], "never decays"),
        (["--sched", "wsd", "--epochs", "4", "--decay-epochs", "100"], "--sched wsd cannot be built: "),
    ],
)
def test_no_rate_rises_above_the_peak(flags, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        build_schedule(args("--lr", "1e-3", *flags), two_groups(), 1e-3)


def test_a_small_batch_alone_is_warned_of(capsys):
    """5e-4 for 512 images is below 1e-5 for ten: the reference's rate rises to it."""
    build_schedule(config.resolve(["--data-set", "DIGITS", "--warmup-epochs", "0"]), two_groups(), 4e-6)
    assert "warning: --min-lr 1e-05 is above the peak learning rate, 4e-06" in capsys.readouterr().out


def test_rates_that_stay_below_are_let_through():
    for flags in (["--sched", "step", "--min-lr", "1"], ["--warmup-epochs", "0", "--warmup-lr", "1"]):
        build_schedule(args("--lr", "1e-3", *flags), two_groups(), 1e-3)


@pytest.mark.parametrize("milestones", [["0"], ["3", "2"], ["2", "2"]])
def test_milestones_rise(milestones):
    with pytest.raises(UserError, match="--decay-milestones takes epochs in rising order"):
        args("--decay-milestones", *milestones)


def test_flags_that_a_schedule_does_not_use_are_named():
    assert without_effect(args()) == []
    (line,) = without_effect(args("--sched", "multistep", "--decay-epochs", "5"))
    assert line == "--decay-epochs (used by step, wsd, rsqrt)"


def test_polynomial_step_by_step():
    """mmsegmentation's rule, written as it states it: the polynomial's rate, less a share of it in the warm-up."""
    steps, warmup, share, power = 50, 8, 1e-2, 0.9
    schedule = PolyBySteps(two_groups(), steps, warmup, share, power)
    for step in range(steps + 1):
        seen = [group["lr"] for group in schedule.optimizer.param_groups]
        for base, rate in zip((1.0, 0.5), seen, strict=True):
            regular = base * (1 - step / steps) ** power
            less = (1 - step / warmup) * (1 - share) if step < warmup else 0.0
            assert rate == pytest.approx(regular - regular * less, rel=1e-12, abs=1e-15)
        schedule.step(step // 10, 0.5)  # the end of an epoch changes nothing
        schedule.step_update(step + 1)
    assert seen == [0.0, 0.0]


def test_polynomial_goes_on_from_any_step():
    before = PolyBySteps(two_groups(), 20, 5, 0.1)
    enter(before, -1, 7)
    after = PolyBySteps(two_groups(), 20, 5, 0.1)
    after.load_state_dict(before.state_dict())
    for schedule in (before, after):
        schedule.step_update(8)
    rates = [[group["lr"] for group in schedule.optimizer.param_groups] for schedule in (before, after)]
    assert rates[0] == rates[1] == [pytest.approx(0.6), pytest.approx(0.3)]
