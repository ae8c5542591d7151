"""Train or evaluate a vision transformer: flags + YAML -> build -> train | --eval | --check-data.

    python main.py --data-path IMAGENET --model deit_small_patch16_224 --output_dir experiment/deit_small
    torchrun --nproc_per_node 8 main.py --config configs/deit_small_diverse.yaml --data-path IMAGENET

Exit codes: 0 done, 1 the loss stopped being finite or another process died, 2 something in the flags, data or files
cannot work, 75 stopped by SIGTERM or SIGUSR1 and saved (the same command with --resume auto goes on), 130
interrupted from the keyboard.
"""

from __future__ import annotations

import program
from options.flags import answer_at_once

if __name__ == "__main__":
    program.begin("main.py")
    answer_at_once()  # --help, --list-regularizers and what is mistyped, before torch is imported

import copy
import gc
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from build import (
    build_backbone,
    build_diversity,
    build_mixing,
    build_objective,
    build_student,
    build_teacher,
    training_mode,
)
from check_data import check_data
from datasets import LabelledImages, build_dataset, named
from engine import (
    Loader,
    Observer,
    Precision,
    Updater,
    evaluate,
    evaluate_together,
    report,
    report_joint,
    train_one_epoch,
)
from errors import Interrupted, LocalError, TrainingDiverged, UserError, is_first_on_machine, shown
from loaders import build_eval_loader, build_train_loader
from loggers.progress import Progress, clock
from loggers.summary import SUMMARY, Summary
from loggers.text import LOG, TextLog, read_lines, set_aside
from loggers.trackers import Trackers
from losses import Objective
from models import DiverseViT, check_name
from models.sharding import is_sharded, shard
from models.weights import has_average, load_weights, model_weights, without_patch_head
from options import config
from options.config import Resolved
from options.flags import shape_of
from program import Patience, Signals
from redundancy.monitor import Monitor
from regularizers import Diversity
from runs import build_run
from schedules import global_batch, scaled_lr, without_effect
from state import checkpoint, resumption
from state.lock import Lock
from state.preprocessing import follow_weights
from state.resumption import Earlier
from state.run_state import RunState, check_class_names, check_remedies
from state.saver import Saver
from utils import (
    broadcast_object,
    find_launch,
    init_distributed,
    lost_process,
    pick_device,
    print_main,
    rank,
    seed_everything,
    world_size,
)
from warmup import Batches, compile_model, warm_up
from workers import name_dead_workers

LONGEST = 4000  # characters of a message
AVERAGE = "EMA network"  # what a checkpoint's moving average is called in print


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; a user's mistake becomes one line and exit code 2."""
    try:
        with name_dead_workers():
            run(config.resolve(argv))
    except (UserError, TrainingDiverged) as error:
        # all processes meet the same mistake, and one of each machine reports it; but a LocalError is its own
        if isinstance(error, LocalError) or is_first_on_machine():
            print(shown(f"main.py: error: {error}", LONGEST), file=sys.stderr, flush=True)
        return 2 if isinstance(error, UserError) else 1
    except Interrupted as stop:
        print_main(f"main.py: {stop}")
        return 75
    except torch._dynamo.exc.TorchDynamoException as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        message = f"main.py: error: --torchcompile does not work here, drop it: {' '.join(lines[:2])}"
        print(shown(message, LONGEST), file=sys.stderr)
        return 2
    except RuntimeError as error:
        lost = lost_process(error)
        if lost is None:
            raise
        print(shown(f"main.py: error: {lost}", LONGEST), file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print("\nmain.py: interrupted", file=sys.stderr)
        return 130
    finally:
        if dist.is_initialized():
            gc.collect()  # a sharded model holds the group, whose threads must end before Python does
            dist.destroy_process_group()
    return 0


def run(args: Resolved) -> None:
    """Build everything, then train, or evaluate and stop; or only read the images."""
    if args.check_data:
        check_data(args)
        return
    check_name(args.model)
    precision = start(args)
    device = precision.device
    state = checkpoint.load(args.resume) if args.eval and args.resume else None
    earlier = None if args.eval or args.teacher_eval else resumption.find(args)
    args = follow_weights(args, state if earlier is None else earlier.state)
    if earlier is not None:
        args = resumption.in_force(args, earlier)
    val_set, classes = build_dataset(False, args)
    num_classes = len(classes)
    args = replace(args, class_names=named(classes))  # which the training half must have, too
    if args.teacher_eval:
        teacher = DiverseViT(build_teacher(args, num_classes, device))
        val_loader = build_eval_loader(args, val_set, world_size(), rank(), device)
        report(evaluate(teacher, val_loader, precision), len(val_set), "teacher")
        return
    if earlier is not None:
        check_class_names(earlier.state.get("args"), args.class_names, earlier.path)
    resumed = earlier is not None or state is not None
    fresh = replace(args, finetune="", pretrained=False) if resumed else args  # its weights come later
    backbone = build_backbone(fresh, num_classes)
    diversity, measure = build_diversity(args, backbone)
    monitor = Monitor(args, backbone, val_set)
    model = build_student(args, backbone, diversity, measure, num_classes, device, monitor.needs)
    if args.eval:
        val_loader = build_eval_loader(args, val_set, world_size(), rank(), device)
        evaluate_checkpoint(args, model, state, val_loader, len(val_set), precision, measure)
        return
    objective = build_objective(args, diversity, num_classes, device)
    output = Path(args.output_dir) if args.output_dir else None
    with Signals() as signals, Lock(output), build_trackers(args) as trackers:
        train(args, model, objective, measure, monitor, val_set, precision, signals, earlier, trackers)


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


def train(
    args: Resolved,
    model: DiverseViT,
    objective: Objective,
    measure: Diversity,
    monitor: Monitor,
    val_set: LabelledImages,
    precision: Precision,
    signals: Signals,
    earlier: Earlier | None,
    trackers: Trackers,
) -> None:
    """Build what only training needs; then the epochs: train, save, evaluate the model and its EMA, log, save."""
    device = precision.device
    train_set, _ = build_dataset(True, args)
    mixing = build_mixing(args, model.backbone, objective.diversity)
    train_loader = build_train_loader(args, train_set, world_size(), rank(), device)
    val_loader = build_eval_loader(args, val_set, world_size(), rank(), device)
    run_state = build_run(args, model, precision, mixing, train_loader, earlier)
    if args.torchcompile:
        compile_model(args.torchcompile, model)
        objective.compile(args.torchcompile)
    output = Path(args.output_dir) if args.output_dir else None
    saver = build_saver(args, run_state, output, signals, len(val_set) // world_size() // val_loader.batch_size)
    trackers.follow(run_state.log, run_state.resumed)
    observers = [*build_logs(output, run_state), saver, trackers]
    complete_save(observers, run_state, output, earlier)
    print_plan(args, model, precision, len(train_set), run_state)
    if run_state.epoch + 1 >= args.epochs:
        print_main(f"nothing to train: {run_state.epoch + 1} of {args.epochs} epochs are done; raise --epochs")
        return
    if output is not None:
        prepare(output, args, run_state)
        trackers.start()
    updater = build_updater(args, run_state, precision)
    wrapped = distribute(model, device)
    with_dropout = training_mode(args)
    if args.torchcompile or isinstance(wrapped, DistributedDataParallel):
        batches = Batches(shape_of(args), args.batch_size, val_loader.batch_sizes)
        spent = warm_up(wrapped, objective, measure, updater, mixing, batches, with_dropout)
        if args.torchcompile:
            print_main(f"compiled with {args.torchcompile} in {spent:.0f} s")
    run_state.restore_streams()

    began = time.perf_counter()
    for epoch in range(run_state.epoch + 1, args.epochs):
        train_loader.set_epoch(epoch, start=run_state.samples)
        trained = train_one_epoch(
            *(wrapped, objective, train_loader, updater, mixing, run_state.running),
            observers=observers,
            progress=Progress(f"Epoch {epoch + 1}/{args.epochs}", args.print_freq, args.epochs - epoch - 1),
            training_mode=with_dropout,
        )
        if args.skip_bad_images:
            trained["bad_images"] = run_state.count_bad_images()
        saver.after_training()
        tested: dict[str, float] = {}
        averaged: dict[str, float] = {}
        if (epoch + 1) % args.val_interval == 0 or epoch + 1 == args.epochs:
            tested, averaged = evaluate_run(run_state, val_loader, precision, measure, saver.after_batch)
        monitored = monitor.measure(epoch, run_state.model, precision)
        record = run_state.finish_epoch(trained, tested, averaged, monitored)
        report_run(run_state, tested, averaged, len(val_set))
        report_redundancy(monitored)
        for observer in observers:
            observer.after_epoch(record)
    print_main(f"Training time {clock(time.perf_counter() - began)}")
    note_worse_average(tested, averaged)


def build_updater(args: Resolved, run_state: RunState, precision: Precision) -> Updater:
    """What makes a step of the gradients."""
    return Updater(
        run_state.optimizer, precision, args.clip_grad, run_state.ema, args.grad_accum_steps, args.clip_mode
    )


def build_saver(
    args: Resolved, run_state: RunState, output: Path | None, signals: Signals, eval_batches: int
) -> Saver:
    """Saves as often as the flags say."""
    often = args.save_interval_steps, args.save_interval_minutes
    patience = Patience(args.dist_timeout)
    return Saver(run_state, output, signals, args.checkpoint_hist, *often, eval_batches, patience)


def complete_save(
    observers: Sequence[Observer], run_state: RunState, output: Path | None, earlier: Earlier | None
) -> None:
    """Do what the last save in this folder left undone, if a run goes on there after a whole epoch."""
    if earlier is not None and earlier.is_in(output) and run_state.running.step == 0:
        for observer in observers:
            observer.complete()


def build_trackers(args: Resolved) -> Trackers:
    """Those of --log-with; nothing is started yet."""
    output = Path(args.output_dir)
    return Trackers(args.log_with, output, args.project, args.run_name or output.resolve().name, config.plain(args))


def build_logs(output: Path | None, run_state: RunState) -> list[Observer]:
    """What is written of each epoch before it is saved."""
    if output is None:
        return []
    return [TextLog(output / LOG, run_state.log), Summary(output / SUMMARY, run_state.log)]


def evaluate_run(
    run_state: RunState,
    loader: Loader,
    precision: Precision,
    measure: Diversity,
    after_batch: Callable[[int], None],
) -> tuple[dict[str, float], dict[str, float]]:
    """Evaluate the model and its moving average in one pass over the images; {} if there is no average."""
    networks = [run_state.model]
    if run_state.ema is not None:
        networks.append(on_device(run_state.ema.module, precision.device))
    tested, *averaged = evaluate_together(networks, loader, precision, measure, after_batch)
    return tested, averaged[0] if averaged else {}


def report_run(
    run_state: RunState, tested: Mapping[str, float], averaged: Mapping[str, float], samples: int
) -> None:
    """Print what an evaluation gave, if there was one, and the best so far."""
    if not tested:
        return
    report(tested, samples)
    if averaged:
        print_main("EMA: Acc@1 {acc1:.3f} Acc@5 {acc5:.3f} loss {loss:.3f}".format(**averaged))
        report_joint(averaged, "EMA: ")
    print_main(f"Max accuracy: {run_state.max_acc:.2f}%" + (f", best: {run_state.best}" if averaged else ""))


def report_redundancy(monitored: Mapping[str, float]) -> None:
    """Print what --monitor-redundancy gave for the last layer, if this epoch has it."""
    last = [f"{name.removesuffix('@last')} {value:.4g}" for name, value in monitored.items() if "@last" in name]
    if last:
        print_main(f"redundancy, last layer: {'  '.join(last)}")


def note_worse_average(tested: Mapping[str, float], averaged: Mapping[str, float]) -> None:
    """Say so if a run ends with an average that is worse than the model."""
    if averaged and tested["acc1"] > averaged["acc1"]:
        print_main(
            f"note: the moving average ends with {averaged['acc1']:.2f}% and the model itself with "
            f"{tested['acc1']:.2f}%. script/export_model.py takes the better one; timm's loaders take the average"
        )


# ------------------------------------------------------------------------------------------------------------
# Parts


def evaluate_checkpoint(
    args: Resolved,
    model: DiverseViT,
    state: Any,
    loader: Loader,
    samples: int,
    precision: Precision,
    measure: Diversity,
) -> None:
    """--eval: print the accuracy of the weights in `state`, of their average, or of both, as --weights says."""
    if isinstance(state, dict):
        check_class_names(state.get("args"), args.class_names, args.resume)
        check_remedies(state, args.remedy, args.resume)
    networks = {AVERAGE if args.weights == "ema" else "network": model}
    if args.weights == "auto" and has_average(state):
        if args.fsdp:
            model.cpu()  # so that no GPU ever holds the copy
        networks[AVERAGE] = copy.deepcopy(model)
    for name, network in networks.items():
        if args.fsdp:
            shard(network, precision.device)
        if args.torchcompile:
            compile_model(args.torchcompile, network)
        if args.resume:
            weights = model_weights(state, args.resume, ema=name == AVERAGE)
            load_weights(network.backbone, without_patch_head(network.backbone, weights), args.resume)
    if not (args.resume or args.finetune or args.pretrained):
        print_main("warning: --eval without --resume evaluates untrained weights")
    found = evaluate_together(list(networks.values()), loader, precision, measure)
    for name, results in zip(networks, found, strict=True):
        report(results, samples, name)
        for measured in (each for each in measure.names if each in results):  # of the first one
            print_main(f"{measured} {results[measured]:.6g}")


def print_plan(args: Resolved, model: DiverseViT, precision: Precision, samples: int, run_state: RunState) -> None:
    """What is about to happen, so that a wrong batch or rate is seen at once."""
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    noise = f" (and noise of up to {100 * args.lr_noise_pct:g} %)" if args.lr_noise else ""
    print_main(
        f"{args.model}: {parameters:,} parameters, {samples:,} training images, {world_size()} process(es) on "
        f"{precision.device.type} in {precision.name}\n"
        f"global batch {global_batch(args)}, peak learning rate {scaled_lr(args):.4g}{noise}, "
        f"epochs {run_state.epoch + 2} to {args.epochs}\n"
        f"diversity: {'  '.join(args.reg) or 'none (plain DeiT)'}"
        + (f"\nremedies: {'  '.join(args.remedy)}" if args.remedy else "")
    )
    for flag in without_effect(args):
        print_main(f"note: --sched {args.sched} does not use {flag}")


def distribute(model: DiverseViT, device: torch.device) -> nn.Module:
    """DDP around the model, if there are several processes, each with the whole of it."""
    if world_size() == 1 or is_sharded(model):
        return model
    return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)


def on_device(model: DiverseViT, device: torch.device) -> DiverseViT:
    """The model itself if it is on the device, else a copy there (an EMA kept in host memory)."""
    return model if next(model.parameters()).device == device else copy.deepcopy(model).to(device)


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


if __name__ == "__main__":
    program.leave(main())
