"""Train or evaluate a vision transformer: flags + YAML -> build -> train | --eval | --check-data.

    python main.py --data-path IMAGENET --model deit_small_patch16_224 --output_dir experiment/deit_small
    torchrun --nproc_per_node 8 main.py --config configs/deit_small_diverse.yaml --data-path IMAGENET

Exit codes: 0 done, 1 the loss stopped being finite or another process died, 2 something in the flags, data or files
cannot work, 75 stopped by SIGTERM or SIGUSR1 and saved (the same command with --resume auto goes on), 130
interrupted from the keyboard.
"""

from __future__ import annotations

import program

if __name__ == "__main__":
    program.begin("main.py")
    from options.flags import answer_at_once

    answer_at_once()  # --help, --list-regularizers and what is mistyped, before torch is imported

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

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
from ending import finish
from engine import (
    Loader,
    Precision,
    evaluate,
    evaluate_together,
    report,
    report_joint,
)
from loaders import build_eval_loader, build_train_loader
from models import DiverseViT, check_name
from models.sharding import shard
from models.weights import has_average, load_weights, model_weights, without_patch_head
from options import config
from options.config import Resolved
from options.flags import shape_of
from program import Signals
from redundancy.monitor import Monitor
from regularizers import Diversity
from runs import build_run
from schedules import global_batch, scaled_lr, without_effect
from state import checkpoint, resumption
from state.lock import Lock
from state.preprocessing import follow_weights
from state.run_state import RunState, check_class_names, check_remedies
from trainer import Numbers, Work, build_trackers, on_device, start, train
from utils import (
    print_main,
    rank,
    world_size,
)
from warmup import Batches, compile_model

AVERAGE = "EMA network"  # what a checkpoint's moving average is called in print


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; a user's mistake becomes one line and exit code 2."""
    return finish("main.py", lambda: run(config.resolve(argv)))


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
        train_set, _ = build_dataset(True, args)
        mixing = build_mixing(args, backbone, diversity)
        loader = build_train_loader(args, train_set, world_size(), rank(), device)
        run_state = build_run(args, model, precision, mixing, loader, earlier)
        task = Classification(args, val_set, len(train_set), measure, monitor, precision)
        work = Work(args, run_state, objective, mixing, loader, precision, training_mode(args))
        train(work, task, signals, trackers, earlier)


# ------------------------------------------------------------------------------------------------------------
# What is learned: the class of an image


class Classification:
    """A Task (trainer.py): top-1 and top-5 of the evaluation images.

    Args:
        args: the flags in force.
        val_set: the evaluation images.
        train_images: how many there are to train on.
        measure: the terms that evaluation measures.
        monitor: measures redundancy after some epochs.
        precision: where, and in which dtype.
    """

    length = "--epochs"

    def __init__(
        self,
        args: Resolved,
        val_set: LabelledImages,
        train_images: int,
        measure: Diversity,
        monitor: Monitor,
        precision: Precision,
    ) -> None:
        self.args, self.measure, self.monitor, self.precision = args, measure, monitor, precision
        self.train_images, self.val_images = train_images, len(val_set)
        self.loader = build_eval_loader(args, val_set, world_size(), rank(), precision.device)
        self.batches = Batches(shape_of(args), args.batch_size, self.loader.batch_sizes)
        self.eval_batches = self.val_images // world_size() // self.loader.batch_size

    def print_plan(self, run_state: RunState) -> None:
        """The model, the batch, the rate and the terms."""
        print_plan(self.args, run_state, self.precision, self.train_images)

    def evaluate(self, run_state: RunState, after_batch: Callable[[int], None]) -> tuple[Numbers, Numbers]:
        """Accuracy of the model and of its average."""
        return evaluate_run(run_state, self.loader, self.precision, self.measure, after_batch)

    def watch(self, run_state: RunState, epoch: int) -> Numbers:
        """What --monitor-redundancy measures."""
        return self.monitor.measure(epoch, run_state.model, self.precision)

    def report(self, run_state: RunState, tested: Numbers, averaged: Numbers, watched: Numbers) -> None:
        """DeiT's lines, and those of --monitor-redundancy."""
        report_run(run_state, tested, averaged, self.val_images)
        report_redundancy(watched)

    def report_end(self, tested: Numbers, averaged: Numbers) -> None:
        """Whether the average is worse than the model."""
        note_worse_average(tested, averaged)


def evaluate_run(
    run_state: RunState,
    loader: Loader,
    precision: Precision,
    measure: Diversity,
    after_batch: Callable[[int], None],
) -> tuple[Numbers, Numbers]:
    """Evaluate the model and its moving average in one pass over the images; {} if there is no average."""
    networks = [run_state.model]
    if run_state.ema is not None:
        networks.append(on_device(run_state.ema.module, precision.device))
    tested, *averaged = evaluate_together(networks, loader, precision, measure, after_batch)
    return tested, averaged[0] if averaged else {}


def report_run(run_state: RunState, tested: Numbers, averaged: Numbers, samples: int) -> None:
    """Print what an evaluation gave, if there was one, and the best so far."""
    if not tested:
        return
    report(tested, samples)
    if averaged:
        print_main("EMA: Acc@1 {acc1:.3f} Acc@5 {acc5:.3f} loss {loss:.3f}".format(**averaged))
        report_joint(averaged, "EMA: ")
    print_main(f"Max accuracy: {run_state.max_acc:.2f}%" + (f", best: {run_state.best}" if averaged else ""))


def report_redundancy(monitored: Numbers) -> None:
    """Print what --monitor-redundancy gave for the last layer, if this epoch has it."""
    last = [f"{name.removesuffix('@last')} {value:.4g}" for name, value in monitored.items() if "@last" in name]
    if last:
        print_main(f"redundancy, last layer: {'  '.join(last)}")


def note_worse_average(tested: Numbers, averaged: Numbers) -> None:
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


def print_plan(args: Resolved, run_state: RunState, precision: Precision, samples: int) -> None:
    """What is about to happen, so that a wrong batch or rate is seen at once."""
    parameters = sum(p.numel() for p in run_state.model.parameters() if p.requires_grad)
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


if __name__ == "__main__":
    program.leave(main())
