"""From flags to a run: optimizer, schedule and moving average of a model, fresh or continued from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim import Optimizer

from engine import Finite, Precision
from errors import BAD_ARGUMENT, UserError, reason
from loaders import TrainLoader
from mixing import Mixing
from models import DiverseViT
from models.sharding import check_shards, shard
from options import config
from options.flags import Args
from schedules import PlateauLR, build_schedule, enter, global_batch, scaled_lr
from state import checkpoint
from state.contents import check_optimizer, check_scheduler
from state.optimizers import try_optimizer
from state.resumption import Earlier
from state.run_state import TOP1, RunState, Score
from utils import print_main

MakeSchedule = Callable[[Any, Optimizer, float], Scheduler]  # of flags, optimizer and peak rate
# The flags that make a schedule; the peak, which the global batch scales, is compared by itself.
SCHEDULE = (
    *("epochs", "lr", "scale_lr_flag", "warmup_epochs", "warmup_lr", "min_lr", "cooldown_epochs", "seed"),
    *("decay_epochs", "decay_milestones", "decay_rate", "patience_epochs"),
    *("lr_noise", "lr_noise_pct", "lr_noise_std"),
)
INITIAL_SHARE = 0.05  # of the initial weights in the final average, beyond which a run is too short for its decay


def build_run(
    args: Args,
    model: DiverseViT,
    precision: Precision,
    mixing: Mixing,
    loader: TrainLoader | None = None,
    earlier: Earlier | None = None,
    make_schedule: MakeSchedule = build_schedule,
    score: Score = TOP1,
) -> RunState:
    """Optimizer, schedule and EMA of a fresh run, or of the one that `--resume` continues.

    Args:
        loader: of the training set; without one, nothing is known of an epoch's length and images.
        earlier: the run to continue; its state is given up.
        make_schedule: of the flags, the optimizer and the peak rate.
        score: by what epochs are compared.
    """
    ema = build_ema(args, model, precision.device)
    optimizer = build_optimizer(args, model.backbone)
    second_order = getattr(optimizer, "is_second_order", False)
    if second_order:
        model.avoid_shortcuts()  # they are differentiated once
    if second_order and any(getattr(m, "fused_attn", False) for m in model.modules()):
        raise UserError(
            f"--opt {args.opt} needs second derivatives, which fused attention does not have: "
            "set the environment variable TIMM_FUSED_ATTN=0"
        )
    schedule = make_schedule(args, optimizer, scaled_lr(args))
    run_state = RunState(model, optimizer, schedule, precision.scaler, ema, config.plain(args), mixing)
    run_state.score = score
    run_state.precision = precision.name
    run_state.samples_per_step = args.batch_size * args.grad_accum_steps
    run_state.running.finite = Finite(args.nonfinite, args.nonfinite_patience)
    if loader is not None:
        run_state.steps_per_epoch = len(loader) // args.grad_accum_steps
        run_state.replaced, run_state.images = loader.replaced, loader.digest()
    if earlier is not None:
        continue_run(run_state, args, earlier, make_schedule)
    elif args.start_epoch > 0:
        run_state.epoch = args.start_epoch - 1
        enter(run_state.lr_scheduler, run_state.epoch, run_state.steps)
    if args.output_dir:
        try_saving(run_state, args)
    if ema is not None:
        warn_of_short_run(args, run_state.steps_per_epoch * args.epochs)
    return run_state


def try_saving(run_state: RunState, args: Args) -> None:
    """Save and load, before the first step, what the first checkpoint will hold; its large tensors apart.

    Raises:
        UserError: that fails, or the optimizer does not go on exactly from what it saves.
    """
    try_optimizer(args.opt, lambda layer: _of_a_layer(args, layer), run_state.device)
    try:
        checkpoint.try_out({"args": run_state.args, "lr_scheduler": run_state.lr_scheduler.state_dict()})
    except BAD_ARGUMENT as error:
        raise UserError(f"this run could not be saved: {reason(error)}") from error


def build_ema(args: Args, model: DiverseViT, device: torch.device) -> ModelEmaV3 | None:
    """The moving average, if the flags ask for one; with --fsdp, model and average become shards here."""
    if args.fsdp:
        check_shards(args.opt, lambda layer: _of_a_layer(args, layer), device)
        model.cpu()  # so that no GPU ever holds the EMA's copy
    ema = None
    if args.model_ema:
        ema = ModelEmaV3(
            model,
            decay=args.model_ema_decay,
            use_warmup=args.model_ema_warmup,
            device=torch.device("cpu") if args.model_ema_force_cpu else None,
        )
    if args.fsdp:
        for network in (model, ema.module) if ema is not None else (model,):
            shard(network, device)
    return ema


def warn_of_short_run(args: Args, steps: int) -> None:
    """Say so if the average will not have left the initial weights behind when the run ends.

    After n steps they still have the share decay^n of it.
    """
    decay = args.model_ema_decay
    share = decay**steps
    if steps and not args.model_ema_warmup and share > INITIAL_SHARE:
        better = 1 - float(f"{1 - INITIAL_SHARE ** (4 / steps):.1g}")  # a quarter of the run leaves that share
        print_main(
            f"warning: --model-ema-decay {decay} is for longer runs: after the {steps} steps of this one, "
            f"{100 * share:.0f} % of the average is still its first weights. Give --model-ema-warmup, or "
            f"--model-ema-decay {better:g}"
        )


def build_optimizer(args: Args, backbone: nn.Module) -> Optimizer:
    """The optimizer, at the peak learning rate.

    Raises:
        UserError: it cannot be built.
    """
    try:
        return _create_optimizer(replace(args, lr=scaled_lr(args)), backbone)
    except BAD_ARGUMENT as error:
        given = " ".join(f"{key}={value}" for key, value in args.opt_kwargs.items())
        how = f"--opt {args.opt}" + (f" --opt-kwargs {given}" if given else "")
        raise UserError(f"{how} cannot be built: {reason(error)}") from error


def _create_optimizer(args: Args, model: nn.Module) -> Optimizer:
    """timm's, at --lr as it is."""
    return create_optimizer_v2(model, **optimizer_kwargs(args), **args.opt_kwargs)


def _of_a_layer(args: Args, layer: nn.Module) -> Optimizer:
    """The optimizer of one layer, to try it."""
    return _create_optimizer(replace(args, lr=0.1, layer_decay=None), layer)


# ------------------------------------------------------------------------------------------------------------
# A run that goes on


def continue_run(
    run_state: RunState, args: Args, earlier: Earlier, make_schedule: MakeSchedule = build_schedule
) -> None:
    """Load the checkpoint, and let the flags hold that have changed since.

    Raises:
        UserError: the checkpoint does not fit.
    """
    processes = earlier.processes
    then = replace(args, **earlier.was)
    rates = [group["initial_lr"] for group in run_state.optimizer.param_groups]
    schedule = earlier.state.get("lr_scheduler", {})
    if args.resume_opt:
        check_optimizer(earlier.state["optimizer"], run_state.optimizer, earlier.path)
        check_scheduler(schedule, run_state.lr_scheduler, earlier.path)
    run_state.load_state_dict(earlier.state, earlier.path, with_optimizer=args.resume_opt)
    earlier.state = {}
    print_main(describe_resumed(run_state, earlier.path))
    if not args.resume_opt:
        begin_anew(run_state)
    if earlier.changes:
        if args.resume_opt:
            adopt_options(run_state, then, args)
        run_state.changes += [f"after {run_state.place}: {change}" for change in earlier.changes]
    if "seed" in earlier.was:
        run_state.drop_streams()
    peak, before = scaled_lr(args), scaled_lr(then, processes)
    if peak != before and "lr" not in earlier.was:
        batches = f"global batch {global_batch(args)}, before {global_batch(then, processes)}"
        change = f"peak learning rate {peak:.4g}, before {before:.4g} ({batches})"
        print_main(f"note: from here on {change}")
        run_state.changes.append(f"after {run_state.place}: {change}")
    if args.resume_opt and (peak != before or any(name in earlier.was for name in SCHEDULE)):
        reschedule(run_state, args, rates, schedule, make_schedule)


def begin_anew(run_state: RunState) -> None:
    """The optimizer as the flags build it, and their schedule as if it had been so from the first epoch on."""
    enter(run_state.lr_scheduler, run_state.epoch, run_state.steps)
    change = "fresh optimizer, and the flags' own schedule"
    print_main(f"note: from here on {change} (--no-resume-opt)")
    run_state.changes.append(f"after {run_state.place}: {change}")


def adopt_options(run_state: RunState, then: Args, now: Args) -> None:
    """Let the optimizer have the options that the flags give now, where the flags then gave others.

    What an optimizer itself keeps among its options stays.
    """
    backbone = run_state.model.backbone
    pairs = zip(
        build_optimizer(then, backbone).param_groups, build_optimizer(now, backbone).param_groups, strict=True
    )
    for group, (old, new) in zip(run_state.optimizer.param_groups, pairs, strict=True):
        group.update({key: new[key] for key in new if key not in ("params", "lr") and new[key] != old.get(key)})


def reschedule(
    run_state: RunState,
    args: Args,
    rates: list[float],
    before: dict[str, Any],
    make_schedule: MakeSchedule = build_schedule,
) -> None:
    """A schedule of other flags, as if it had been so from the first epoch on.

    Args:
        rates: the new peak of each group of parameters.
        before: the former schedule's state, for one that counts something.
    """
    for group, rate in zip(run_state.optimizer.param_groups, rates, strict=True):
        group["lr"] = group["initial_lr"] = rate
    schedule = make_schedule(args, run_state.optimizer, scaled_lr(args))
    if isinstance(schedule, PlateauLR):
        schedule.goes_on(before)
    enter(schedule, run_state.epoch, run_state.steps)
    run_state.lr_scheduler = schedule


def describe_resumed(run_state: RunState, path: str) -> str:
    """What was found in a checkpoint, in words."""
    done = f"epoch {run_state.epoch + 1} is done" if run_state.epoch >= 0 else "the first epoch has begun"
    step = run_state.running.step
    inside = f", and {step} steps after it" if step else ""
    return f"resumed {path}: {done}{inside}, best {run_state.score.name} {run_state.max_acc:.2f}%"
