"""The epochs of a run, whatever it learns: train, save, evaluate the model and its average, log, save.

main.py (a class for an image) and segmentation/ (a class for each pixel) build what they train, say how it is
evaluated, and hand both over here.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from engine import Observer, Precision, Updater, train_one_epoch
from errors import UserError
from loaders import TrainLoader
from loggers.progress import Progress, clock
from loggers.summary import SUMMARY, Summary
from loggers.text import LOG, TextLog, read_lines, set_aside
from loggers.trackers import Trackers
from losses import Objective
from mixing import Mixing
from models import DiverseViT
from models.sharding import is_sharded
from options import config
from options.config import Resolved
from program import Patience, Signals
from regularizers import Diversity
from state import checkpoint
from state.resumption import Earlier
from state.run_state import RunState
from state.saver import Saver
from utils import (
    broadcast_object,
    find_launch,
    init_distributed,
    pick_device,
    print_main,
    rank,
    seed_everything,
    world_size,
)
from warmup import Batches, compile_model, warm_up

Numbers = Mapping[str, float]  # scores by their names in log.txt


class Task(Protocol):
    """What a run learns: how it is evaluated, and what is said of it.

    Attributes:
        measure: the terms that evaluation measures.
        batches: the shapes of what comes, to warm up.
        length: the flag that says how long a run is.
        eval_batches: batches of an evaluation that every process has; only after these can it be stopped.
    """

    measure: Diversity
    batches: Batches
    length: str
    eval_batches: int

    def print_plan(self, run_state: RunState) -> None:
        """Say what is about to happen."""

    def evaluate(self, run_state: RunState, after_batch: Callable[[int], None]) -> tuple[Numbers, Numbers]:
        """The scores of the model, and of its moving average: {} if there is none."""

    def watch(self, run_state: RunState, epoch: int) -> Numbers:
        """What else is measured after an epoch, see `--monitor-redundancy`; {} where nothing is."""

    def report(self, run_state: RunState, tested: Numbers, averaged: Numbers, watched: Numbers) -> None:
        """Print what an epoch gave; without an evaluation the scores are {}."""

    def report_end(self, tested: Numbers, averaged: Numbers) -> None:
        """Print what is to be said of the last evaluation when all is done."""


@dataclass(frozen=True)
class Work:
    """What is trained, on what.

    Attributes:
        args: the flags in force.
        run_state: the model, its optimizer, and where the run stands.
        objective: what a step minimises.
        mixing: mixes images and labels them.
        loader: of the training set.
        precision: autocast's dtype and the gradient scaler.
        training_mode: whether dropout and drop path are on.
    """

    args: Resolved
    run_state: RunState
    objective: Objective
    mixing: Mixing
    loader: TrainLoader
    precision: Precision
    training_mode: bool = True


# ------------------------------------------------------------------------------------------------------------
# Beginning


def start(args: Resolved) -> Precision:
    """Join the other processes, take a device, and seed everything."""
    launch = find_launch(args.world_size)
    if args.fsdp and launch.world_size == 1:
        raise UserError("--fsdp shares the model out among processes, and this is one: start several, or drop it")
    device = pick_device(args.device, launch.local_rank)
    precision = Precision(device, args.amp_dtype, keep_casts=not args.fsdp)
    init_distributed(launch, device, args.dist_url, args.dist_timeout)
    seed_everything(args.seed + rank())
    torch.backends.cudnn.benchmark = not args.deterministic
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS asks for
        torch.use_deterministic_algorithms(True)
    return precision


# ------------------------------------------------------------------------------------------------------------
# Training


def train(work: Work, task: Task, signals: Signals, trackers: Trackers, earlier: Earlier | None = None) -> None:
    """The epochs that are left, from the first step that is not done.

    Args:
        earlier: the run that this one continues.
    """
    args, run_state = work.args, work.run_state
    compile_all(work)
    output = Path(args.output_dir) if args.output_dir else None
    saver = build_saver(args, run_state, output, signals, task.eval_batches)
    trackers.follow(run_state.log, run_state.resumed)
    observers = [Rates(run_state), *build_logs(output, run_state), saver, trackers]
    complete_save(observers, run_state, output, earlier)
    task.print_plan(run_state)
    mapped = run_state.model.mapped
    if mapped and not args.explicit_terms:
        print_main(f"note: terms form attention maps (docs/shortcuts.md), in blocks {', '.join(map(str, mapped))}")
    if run_state.epoch + 1 >= args.epochs:
        print_main(f"nothing to train: {run_state.epoch + 1} of {args.epochs} epochs are done; raise {task.length}")
        return
    if output is not None:
        prepare(output, args, run_state)
        trackers.start()
    updater = build_updater(args, run_state, work.precision)
    model = distribute(run_state.model, work.precision.device)
    prepare_passes(work, task, model, updater)

    began = time.perf_counter()
    for epoch in range(run_state.epoch + 1, args.epochs):
        work.loader.set_epoch(epoch, start=run_state.samples)
        trained = train_one_epoch(
            *(model, work.objective, work.loader, updater, work.mixing, run_state.running),
            observers=observers,
            progress=Progress(f"Epoch {epoch + 1}/{args.epochs}", args.print_freq, args.epochs - epoch - 1),
            training_mode=work.training_mode,
        )
        if args.skip_bad_images:
            trained["bad_images"] = run_state.count_bad_images()
        saver.after_training()
        tested: Numbers = {}
        averaged: Numbers = {}
        if (epoch + 1) % args.val_interval == 0 or epoch + 1 == args.epochs:
            tested, averaged = task.evaluate(run_state, saver.after_batch)
        watched = task.watch(run_state, epoch)
        record = run_state.finish_epoch(trained, tested, averaged, watched)
        task.report(run_state, tested, averaged, watched)
        for observer in observers:
            observer.after_epoch(record)
    print_main(f"Training time {clock(time.perf_counter() - began)}")
    task.report_end(tested, averaged)


# ------------------------------------------------------------------------------------------------------------
# Parts


class Rates:
    """Sets the rates of the next step, where the schedule goes by steps; before the step's state is saved."""

    def __init__(self, run_state: RunState) -> None:
        self.run_state = run_state

    def complete(self) -> None:
        """Nothing: a checkpoint holds the rates."""

    def after_step(self, step: int) -> None:
        """Schedules that go by epochs ignore this."""
        self.run_state.lr_scheduler.step_update(self.run_state.steps)

    def after_epoch(self, record: Mapping[str, Any]) -> None:
        """Nothing: `RunState.finish_epoch` steps the schedules that go by epochs."""


def build_trackers(args: Resolved) -> Trackers:
    """Those of --log-with; nothing is started yet."""
    output = Path(args.output_dir)
    return Trackers(args.log_with, output, args.project, args.run_name or output.resolve().name, config.plain(args))


def build_saver(
    args: Resolved, run_state: RunState, output: Path | None, signals: Signals, eval_batches: int
) -> Saver:
    """Saves as often as the flags say."""
    often = args.save_interval_steps, args.save_interval_minutes
    patience = Patience(args.dist_timeout)
    return Saver(run_state, output, signals, args.checkpoint_hist, *often, eval_batches, patience)


def build_logs(output: Path | None, run_state: RunState) -> list[Observer]:
    """What is written of each epoch before it is saved."""
    if output is None:
        return []
    return [TextLog(output / LOG, run_state.log), Summary(output / SUMMARY, run_state.log, run_state.score.columns)]


def complete_save(
    observers: Sequence[Observer], run_state: RunState, output: Path | None, earlier: Earlier | None
) -> None:
    """Do what the last save in this folder left undone, if a run goes on there after a whole epoch."""
    if earlier is not None and earlier.is_in(output) and run_state.running.step == 0:
        for observer in observers:
            observer.complete()


def prepare(output: Path, args: Resolved, run_state: RunState) -> None:
    """Try --output_dir, and write args.yaml; a fresh run sets the log of an earlier one aside."""

    def make() -> None:
        try:
            there_will_be = args.checkpoint_hist + 2  # with the best, and one being written
            more = max(1, there_will_be - len(checkpoint.files(output)))
            checkpoint.check_space(output, more * run_state.nbytes())
            config.write_args(args, output / "args.yaml", run_state.changes)
            if not run_state.resumed:
                for name in (LOG, SUMMARY):
                    set_aside(output / name)
            elif not run_state.log:  # of a file that holds no log
                run_state.log += read_lines(output / LOG, run_state.epoch)
        except OSError as error:
            raise UserError(f"cannot write to --output_dir {output}: {error.strerror}") from error

    broadcast_object(make)


def build_updater(args: Resolved, run_state: RunState, precision: Precision) -> Updater:
    """What makes a step of the gradients."""
    return Updater(
        run_state.optimizer, precision, args.clip_grad, run_state.ema, args.grad_accum_steps, args.clip_mode
    )


def distribute(model: DiverseViT, device: torch.device) -> nn.Module:
    """DDP around the model, if there are several processes, each with the whole of it."""
    if world_size() == 1 or is_sharded(model):
        return model
    return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)


def on_device(model: DiverseViT, device: torch.device) -> DiverseViT:
    """The model itself if it is on the device, else a copy there (an EMA kept in host memory)."""
    return model if next(model.parameters()).device == device else copy.deepcopy(model).to(device)


def prepare_passes(work: Work, task: Task, model: nn.Module, updater: Updater) -> None:
    """Compile, go once through all that the run will call, and put the random streams where they belong."""
    backend = work.args.torchcompile
    if backend or isinstance(model, DistributedDataParallel):
        spent = warm_up(
            *(model, work.objective, task.measure, updater, work.mixing, task.batches), work.training_mode
        )
        if backend:
            print_main(f"compiled with {backend} in {spent:.0f} s")
    work.run_state.restore_streams()


def compile_all(work: Work) -> None:
    """Compile the model and the objective, where --torchcompile says so. Nothing runs yet.

    Raises:
        UserError: an unknown backend, or a term that cannot be compiled.
    """
    if work.args.torchcompile:
        compile_model(work.args.torchcompile, work.run_state.model)
        work.objective.compile(work.args.torchcompile)
