"""Train or evaluate a vision transformer: flags + YAML -> build -> train | --eval.

    python main.py --data-path IMAGENET --model deit_small_patch16_224 --output_dir experiment/deit_small
    torchrun --nproc_per_node 8 main.py --config configs/deit_small_diverse.yaml --data-path IMAGENET

Exit codes: 0 done, 1 the loss stopped being finite or another process died, 2 something in the flags, data or files
cannot work, 75 stopped by SIGTERM or SIGUSR1 and saved (the same command with --resume auto goes on), 130
interrupted from the keyboard.
"""

from __future__ import annotations

import argparse
import copy
import gc
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from build import (
    build_backbone,
    build_diversity,
    build_label_loss,
    build_mixup,
    build_run,
    build_teacher,
    global_batch,
    scaled_lr,
)
from datasets import build_dataset
from engine import Loader, Precision, Updater, evaluate, report, train_one_epoch
from errors import Interrupted, LocalError, TrainingDiverged, UserError, is_first_on_machine
from loaders import build_eval_loader, build_train_loader
from loggers.progress import clock
from losses import LabelLoss
from models import DiverseViT, check_name
from models.sharding import is_sharded, shard
from models.weights import load_weights, model_weights
from options import config
from regularizers import Diversity
from state import checkpoint
from state.run_state import RunState
from state.saver import Saver
from utils import (
    Signals,
    broadcast_from_main,
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
from warmup import compile_model, compile_objective, warm_up
from workers import name_dead_workers


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; a user's mistake becomes one line and exit code 2."""
    try:
        with name_dead_workers():
            run(config.resolve(argv))
    except (UserError, TrainingDiverged) as error:
        # all processes meet the same mistake, and one of each machine reports it; but a LocalError is its own
        if isinstance(error, LocalError) or is_first_on_machine():
            print(f"main.py: error: {error}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, UserError) else 1
    except Interrupted as stop:
        print_main(f"main.py: {stop}")
        return 75
    except torch._dynamo.exc.TorchDynamoException as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        print(f"main.py: error: --torchcompile does not work here, drop it: {' '.join(lines[:2])}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        lost = lost_process(error)
        if lost is None:
            raise
        print(f"main.py: error: {lost}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print("\nmain.py: interrupted", file=sys.stderr)
        return 130
    finally:
        if dist.is_initialized():
            gc.collect()  # a sharded model holds the group, whose threads must end before Python does
            dist.destroy_process_group()
    return 0


def run(args: argparse.Namespace) -> None:
    """Build everything, then train, or evaluate and stop."""
    check_name(args.model)
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

    val_set, num_classes = build_dataset(False, args)
    if args.teacher_eval:
        teacher = DiverseViT(build_teacher(args, num_classes, device))
        val_loader = build_eval_loader(args, val_set, world_size(), rank(), device)
        report(evaluate(teacher, val_loader, precision), len(val_set), "teacher")
        return
    backbone = build_backbone(args, num_classes)
    diversity, measure = build_diversity(args, backbone)
    model = DiverseViT(backbone, diversity.needs, measure.needs).to(device)
    tried = model.check(args.input_size, num_classes, diversity.needs | measure.needs)
    diversity.check(tried)
    measure.check(tried)
    broadcast_from_main(model)  # the processes drew different weights; the EMA is a copy of these
    if args.eval:
        if args.fsdp:
            shard(model, device)
        if args.torchcompile:
            compile_model(args.torchcompile, model)
        val_loader = build_eval_loader(args, val_set, world_size(), rank(), device)
        evaluate_checkpoint(args, model, val_loader, len(val_set), precision, measure)
        return
    label_loss = build_label_loss(args, diversity, num_classes, device)
    with Signals() as signals:
        run_training(args, model, label_loss, diversity, measure, val_set, precision, signals)


def run_training(
    args: argparse.Namespace,
    model: DiverseViT,
    label_loss: LabelLoss,
    diversity: Diversity,
    measure: Diversity,
    val_set: Any,
    precision: Precision,
    signals: Signals,
) -> None:
    """Build what only training needs, and bind one epoch's training and testing for `train`."""
    train_set, _ = build_dataset(True, args)
    mixup = build_mixup(args, model.backbone, diversity)
    train_loader = build_train_loader(args, train_set, world_size(), rank(), precision.device)
    samples: Any = train_loader.loader.dataset  # torch's types know neither a SeededDataset
    sampler: Any = train_loader.loader.sampler  # nor its ResumableSampler
    run_state = build_run(args, model, precision, mixup, samples.replaced)
    val_loader = build_eval_loader(args, val_set, world_size(), rank(), precision.device)
    if args.torchcompile:
        compile_model(args.torchcompile, model)
        compile_objective(args.torchcompile, label_loss, diversity)
    print_plan(args, model, precision, len(train_set), run_state)

    def prepare(wrapped: nn.Module, updater: Updater) -> None:
        if args.torchcompile or isinstance(wrapped, DistributedDataParallel):
            sizes = args.input_size, args.batch_size, val_loader.batch_sizes
            parts = wrapped, label_loss, diversity, measure, updater, mixup
            spent = warm_up(*parts, *sizes, training_mode=not args.finetune)
            if args.torchcompile:
                print_main(f"compiled with {args.torchcompile} in {spent:.0f} s")

    def train_epoch(wrapped: nn.Module, updater: Updater, saver: Saver) -> dict[str, float]:
        epoch, done = run_state.epoch + 1, run_state.step
        sampler.set_epoch(epoch, start=run_state.samples)
        trained = train_one_epoch(
            wrapped,
            label_loss,
            diversity,
            train_loader,
            updater,
            mixup,
            meters=run_state.meters,
            finite=run_state.finite,
            first_step=done + 1,
            wish=saver.wish,
            after_step=saver.after_step,
            header=f"Epoch {epoch + 1}/{args.epochs}",
            epochs_after=args.epochs - epoch - 1,
            print_freq=args.print_freq,
            training_mode=not args.finetune,  # DeiT fine-tunes in evaluation mode
        )
        return trained | ({"bad_images": run_state.count_bad_images()} if args.skip_bad_images else {})

    every_process_has = len(val_set) // world_size() // int(val_loader.loader.batch_size or 1)  # batches

    def test(network: DiverseViT, saver: Saver) -> dict[str, float]:
        def after_batch(batch: int) -> None:
            if batch <= every_process_has:
                saver.after_batch()

        return evaluate(network, val_loader, precision, measure if network is model else None, after_batch)

    train(args, run_state, precision, prepare, train_epoch, test, len(val_set), signals)


# ------------------------------------------------------------------------------------------------------------
# Running


def evaluate_checkpoint(
    args: argparse.Namespace,
    model: DiverseViT,
    loader: Loader,
    samples: int,
    precision: Precision,
    measure: Diversity,
) -> None:
    """--eval: print the accuracy of --resume's weights, and of its EMA if it has one."""
    state = checkpoint.load(args.resume) if args.resume else None
    if args.resume:
        load_weights(model.backbone, model_weights(state, args.resume), args.resume)
    elif not args.finetune:
        print_main("warning: --eval without --resume evaluates untrained weights")
    results = evaluate(model, loader, precision, measure)
    report(results, samples)
    for name in measure.names:
        print_main(f"{name} {results[name]:.6g}")
    if isinstance(state, dict) and "model_ema" in state:
        weights = model_weights(state, args.resume, ema=True)
        load_weights(model.backbone, weights, args.resume)
        report(evaluate(model, loader, precision), samples, "EMA network")


def print_plan(
    args: argparse.Namespace, model: DiverseViT, precision: Precision, samples: int, run_state: RunState
) -> None:
    """What is about to happen, so that a wrong batch or rate is seen at once."""
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print_main(
        f"{args.model}: {parameters:,} parameters, {samples:,} training images, {world_size()} process(es) on "
        f"{precision.device.type} in {precision.name}\n"
        f"global batch {global_batch(args)}, peak learning rate {scaled_lr(args):.4g}, "
        f"epochs {run_state.epoch + 2} to {args.epochs}\n"
        f"diversity: {'  '.join(args.reg) or 'none (plain DeiT)'}"
    )


def train(
    args: argparse.Namespace,
    run_state: RunState,
    precision: Precision,
    prepare: Callable[[nn.Module, Updater], None],
    train_epoch: Callable[[nn.Module, Updater, Saver], dict[str, float]],
    test: Callable[[DiverseViT, Saver], dict[str, float]],
    samples: int,
    signals: Signals,
) -> None:
    """Prepare, and then the epochs: train, test the raw model and its EMA, log, save."""
    if run_state.epoch + 1 >= args.epochs:
        print_main(f"nothing to train: {run_state.epoch + 1} of {args.epochs} epochs are done; raise --epochs")
        return
    output = make_output_dir(args, run_state) if args.output_dir else None
    model, ema = run_state.model, run_state.ema
    updater = Updater(run_state.optimizer, precision, args.clip_grad, ema, args.grad_accum_steps)
    wrapped = distribute(model, precision.device)
    prepare(wrapped, updater)
    start = time.perf_counter()
    saver = Saver(
        run_state, output, signals, args.checkpoint_hist, args.save_interval_steps, args.save_interval_minutes
    )
    run_state.restore_streams()
    while run_state.epoch + 1 < args.epochs:
        trained = train_epoch(wrapped, updater, saver)
        tested = test(model, saver)
        report(tested, samples)
        averaged = test(on_device(ema.module, precision.device), saver) if ema is not None else {}
        if averaged:
            print_main(
                f"EMA: Acc@1 {averaged['acc1']:.3f} Acc@5 {averaged['acc5']:.3f} loss {averaged['loss']:.3f}"
            )
        best = run_state.finish_epoch(trained, tested, averaged)
        print_main(f"Max accuracy: {run_state.max_acc:.2f}%")
        saver.after_epoch(best)
    print_main(f"Training time {clock(time.perf_counter() - start)}")


def distribute(model: DiverseViT, device: torch.device) -> nn.Module:
    """DDP around the model, if there are several processes, each with the whole of it."""
    if world_size() == 1 or is_sharded(model):
        return model
    return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)


def on_device(model: DiverseViT, device: torch.device) -> DiverseViT:
    """The model itself if it is on the device, else a copy there (an EMA kept in host memory)."""
    return model if next(model.parameters()).device == device else copy.deepcopy(model).to(device)


def make_output_dir(args: argparse.Namespace, run_state: RunState) -> Path:
    """Create and try --output_dir, and write args.yaml; a fresh run sets the log of an earlier one aside."""
    output = Path(args.output_dir)

    def make() -> None:
        try:
            output.mkdir(parents=True, exist_ok=True)
            more = max(
                1, args.checkpoint_hist + 2 - len(checkpoint.files(output))
            )  # the best, and one being written
            checkpoint.check_space(output, more * run_state.nbytes())
            config.write_args(args, output / "args.yaml")
            run_state.adopt_log(output / "log.txt")
        except OSError as error:
            raise UserError(f"cannot write to --output_dir {output}: {error.strerror}") from error

    broadcast_object(make)
    return output


if __name__ == "__main__":
    sys.exit(main())
