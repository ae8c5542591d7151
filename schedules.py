"""How the learning rate goes from epoch to epoch: timm's schedules, and one that waits for the accuracy."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from timm.scheduler import create_scheduler
from timm.scheduler.scheduler import Scheduler
from torch.optim import Optimizer

from errors import BAD_ARGUMENT, UserError, reason
from options.flags import Args
from options.parser import dashed
from utils import print_main, world_size

# Which schedules use a flag, of those that not all of them use.
USED_BY = {
    "min_lr": ("cosine", "tanh", "plateau", "poly", "wsd", "rsqrt"),
    "decay_epochs": ("step", "wsd", "rsqrt"),
    "decay_milestones": ("multistep",),
    "decay_rate": ("step", "multistep", "plateau", "poly"),
    "patience_epochs": ("plateau",),
}


def scaled_lr(args: Args, processes: int | None = None) -> float:
    """--lr is for 512 images; scale it to the global batch unless told not to."""
    return args.lr * global_batch(args, processes) / 512.0 if args.scale_lr_flag else args.lr


def global_batch(args: Args, processes: int | None = None) -> int:
    """Images in one step, over all processes (of this run, or as many as are given) and accumulated batches."""
    return args.batch_size * args.grad_accum_steps * (processes or world_size())


class PlateauLR(Scheduler):
    r"""Multiply the rate by `decay_rate` when the accuracy has not risen for more than `patience_t` epochs.

        risen:  accuracy > best (1 + 1e-4)

    The rates are those of torch's ReduceLROnPlateau, which timm's schedule of this name asks. Unlike that one, this
    goes on exactly from its state_dict, with noise too, and starts at the rate itself where there is no warm-up.

    Args:
        optimizer: whose rates are set.
        decay_rate: below 1.
        lr_min: no rate is decayed below it.
        warmup_t, warmup_lr_init: epochs of linear warm-up, and the rate it starts from.
        noise: of timm's Scheduler, added to what is used and not to what is decayed.
    """

    THRESHOLD, SMALLEST = 1e-4, 1e-8  # torch's: what counts as risen, and as a decay

    def __init__(
        self,
        optimizer: Optimizer,
        decay_rate: float,
        patience_t: int,
        lr_min: float,
        warmup_t: int,
        warmup_lr_init: float,
        **noise: Any,
    ) -> None:
        super().__init__(optimizer, "lr", **noise)
        self.decay_rate, self.patience_t, self.lr_min = decay_rate, patience_t, lr_min
        self.warmup_t, self.warmup_lr_init = warmup_t, warmup_lr_init
        self.rates = list(self.base_values)  # without noise
        self.best, self.bad_epochs = -math.inf, 0
        if warmup_t:
            self.update_groups(warmup_lr_init)

    def step(self, epoch: int, metric: float | None = None) -> None:
        """Set the rates of the epoch after `epoch`, whose accuracy is the metric."""
        if epoch <= self.warmup_t and self.warmup_t:
            share = epoch / self.warmup_t
            first = self.warmup_lr_init
            self.update_groups([first + share * (base - first) for base in self.base_values])
            return
        if metric is not None:
            self._count(metric)
        self.update_groups(self._add_noise(self.rates, epoch))

    def _count(self, metric: float) -> None:
        if metric > self.best * (1 + self.THRESHOLD):
            self.best, self.bad_epochs = metric, 0
        else:
            self.bad_epochs += 1
        if self.bad_epochs > self.patience_t:
            decayed = [max(rate * self.decay_rate, self.lr_min) for rate in self.rates]
            pairs = zip(self.rates, decayed, strict=True)
            self.rates = [new if old - new > self.SMALLEST else old for old, new in pairs]
            self.bad_epochs = 0

    def _get_lr(self, t: int) -> list[float]:
        return self.rates

    def goes_on(self, before: dict[str, Any]) -> None:
        """Take over what an earlier schedule with other flags has counted, and how far it has decayed."""
        self.best, self.bad_epochs = before["best"], before["bad_epochs"]
        pairs = zip(self.base_values, before["rates"], before["base_values"], strict=True)
        self.rates = [max(base * rate / was, self.lr_min) if was else base for base, rate, was in pairs]


class PolyBySteps(Scheduler):
    r"""A polynomial that is followed step by step, behind a linear warm-up: how segmentation is trained.

        r(t) = base w(t) (1 - t / T)^p,     w(t) = 1 - (1 - f) (1 - t / W) for t < W, else 1

    t counts the steps that are done, so that r(0) = f base is the first one's rate.

    Args:
        optimizer: whose rates are set.
        steps: T, of the whole run.
        warmup_steps: W.
        warmup_share: f, of the rate that the warm-up starts from.
        power: p.
    Source: mmsegmentation's schedule of UperNet, as Patch Diversification's code uses it.
    """

    def __init__(
        self, optimizer: Optimizer, steps: int, warmup_steps: int = 0, warmup_share: float = 1.0, power: float = 1.0
    ) -> None:
        super().__init__(optimizer, "lr", t_in_epochs=False)
        self.steps, self.power = steps, power
        self.warmup_steps, self.warmup_share = warmup_steps, warmup_share
        self.update_groups(self._get_lr(0))

    def _get_lr(self, t: int) -> list[float]:
        share = max(1 - t / self.steps, 0.0) ** self.power
        if t < self.warmup_steps:
            share *= 1 - (1 - self.warmup_share) * (1 - t / self.warmup_steps)
        return [base * share for base in self.base_values]


def enter(schedule: Scheduler, epoch: int, steps: int) -> None:
    """Set the rates that a run has after an epoch (-1: none), and after so many steps in all."""
    if epoch >= 0:
        schedule.step(epoch)
    schedule.step_update(steps)


def build_schedule(args: Args, optimizer: Optimizer, peak: float) -> Scheduler:
    """The schedule that the flags ask for; it is stepped after each epoch, as the reference does.

    Args:
        optimizer: its rates become those of the first epoch.
        peak: --lr, scaled to the global batch.
    Raises:
        UserError: the schedule cannot be, or would rise above the peak.
    """
    check_rates(args, peak)
    try:
        if args.sched == "plateau":
            return _plateau(args, optimizer)
        return create_scheduler(replace(args, lr=peak), optimizer)[0]
    except BAD_ARGUMENT as error:
        raise UserError(f"--sched {args.sched} cannot be built: {reason(error)}") from error


def _plateau(args: Args, optimizer: Optimizer) -> PlateauLR:
    shares = args.lr_noise or []
    noisy: Any = [share * args.epochs for share in shares]
    return PlateauLR(
        optimizer,
        decay_rate=args.decay_rate,
        patience_t=args.patience_epochs,
        lr_min=args.min_lr,
        warmup_t=args.warmup_epochs,
        warmup_lr_init=args.warmup_lr,
        noise_range_t=noisy[0] if len(noisy) == 1 else noisy or None,
        noise_pct=args.lr_noise_pct,
        noise_std=args.lr_noise_std,
        noise_seed=args.seed,
    )


def check_rates(args: Args, peak: float) -> None:
    """Refuse flags that would let the rate rise above the peak that is printed.

    Where none of them was given, and a small global batch alone brings the peak below the defaults, the run goes on
    as the reference's does, with a warning.

    Raises:
        UserError: with the flag that does.
    """
    above = []
    if args.sched in USED_BY["min_lr"] and args.min_lr > peak:
        above.append("min_lr")
    if args.warmup_epochs and args.warmup_lr > peak:
        above.append("warmup_lr")
    default = Args()
    for name in above:
        flag = f"--{dashed(name)}"
        text = f"{flag} {getattr(args, name):g} is above the peak learning rate, {peak:.4g}"
        if getattr(args, name) != getattr(default, name) or args.lr != default.lr:
            raise UserError(f"{text}: give a smaller one, or a larger --lr")
        print_main(f"warning: {text}, which the small global batch makes; give {flag} 0, or --unscale-lr")
    if args.decay_rate > 1 and args.sched in ("step", "multistep", "plateau"):
        raise UserError(f"--decay-rate {args.decay_rate:g} would raise the rate: give at most 1")
    if args.sched == "plateau" and args.decay_rate == 1:
        raise UserError("--sched plateau with --decay-rate 1 never decays: give less, or --sched constant")


def without_effect(args: Args) -> list[str]:
    """The schedule's flags that were given, but that this schedule does not use."""
    default = Args()
    return [
        f"--{dashed(name)} (used by {', '.join(users)})"
        for name, users in USED_BY.items()
        if args.sched not in users and getattr(args, name) != getattr(default, name)
    ]
