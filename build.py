"""From flags to objects: model, objective, mixing, optimizer, schedule and EMA. No loop lives here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.optim import create_optimizer
from timm.scheduler import create_scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from engine import Finite, Precision
from errors import BAD_ARGUMENT, UserError, reason
from losses import LabelLoss, Objective
from mixing import Mixing
from mixing.mixup import Mixup
from models import DiverseViT, Layout, Needs, build_model, find_layout
from models.heads import OwnHead, PatchHead
from models.sharding import check_optimizer, shard
from models.weights import load_for_finetuning, load_weights, model_weights
from options import config
from options.config import Resolved
from options.flags import Args
from regularizers import Diversity
from state import checkpoint
from state.run_state import RunState
from utils import broadcast_from_main, broadcast_object, print_main, rank, world_size


def build_backbone(args: Args, num_classes: int) -> Any:
    """The student: a timm model with the flags' dropout, drop path, image size and --model-kwargs."""
    options: dict[str, Any] = {"num_classes": num_classes, "img_size": args.input_size}
    if args.drop_path > 0:
        options |= {"drop_path_rate": args.drop_path}
    if args.drop > 0:
        options |= {"pos_drop_rate": args.drop, "proj_drop_rate": args.drop}
    backbone: Any = build_model(args.model, **options | args.model_kwargs)
    if args.distillation_type != "none":
        if not hasattr(backbone, "set_distilled_training"):
            raise UserError(
                f"--distillation-type {args.distillation_type} needs a student with a distillation token, which "
                f"{args.model} lacks: choose e.g. --model deit_small_distilled_patch16_224"
            )
        backbone.set_distilled_training(True)
    if args.grad_checkpointing:
        use_grad_checkpointing(backbone)
    if args.finetune:
        weights = model_weights(checkpoint.load(args.finetune), args.finetune)
        adapted = load_for_finetuning(backbone, weights, args.finetune)
        print_main("; ".join(filter(None, [f"fine-tuning from {args.finetune}", str(adapted)])))
    return backbone


def use_grad_checkpointing(backbone: Any) -> None:
    """Let the backbone recompute its blocks in the backward pass instead of keeping their activations."""
    try:
        backbone.set_grad_checkpointing(True)
    except (AttributeError, AssertionError) as error:
        raise UserError(
            f"{type(backbone).__name__} has no gradient checkpointing: drop --grad-checkpointing"
        ) from error
    # when a compiled block is recomputed, its hooks have nothing to store
    torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True


def build_diversity(args: Resolved, backbone: nn.Module) -> tuple[Diversity, Diversity]:
    """The terms to train on, and those to measure only."""
    if not (args.terms or args.measures):
        return Diversity([], depth=0), Diversity([], depth=0)
    layout: Layout = find_layout(backbone)
    depth, reached = layout.depth, layout.patches_reach_label
    diversity, measure = Diversity(args.terms, depth, reached), Diversity(args.measures, depth, reached)
    blocks = Needs(**diversity.needs).attention | Needs(**measure.needs).attention
    if any(tap.between == "channels" for block in blocks for tap in layout.map_taps(block)):
        print_main(f"note: the attention maps of {layout.name} are between the channels of a head, not its tokens")
    return diversity, measure


def build_student(
    args: Args,
    backbone: nn.Module,
    diversity: Diversity,
    measure: Diversity,
    num_classes: int,
    device: torch.device,
) -> DiverseViT:
    """The backbone with hooks on what the terms need, tried on blank images, with equal weights in all processes.

    Raises:
        UserError: a term cannot be computed from what this model shows.
    """
    needs, measured = Needs(**diversity.needs), Needs(**measure.needs)
    model = DiverseViT(backbone, needs, measured, find_scheme(diversity).head).to(device)
    tried = model.check(args.input_size, num_classes, needs | measured)
    diversity.check(tried)
    measure.check(tried)
    broadcast_from_main(model)  # the processes drew different weights; the EMA is a copy of these
    return model


def build_teacher(args: Args, num_classes: int, device: torch.device) -> nn.Module:
    """The teacher, with its weights, in evaluation mode."""
    teacher = build_model(args.teacher_model, num_classes=num_classes, img_size=args.input_size)
    weights = model_weights(checkpoint.load(args.teacher_path), args.teacher_path)
    load_weights(teacher, weights, args.teacher_path)
    return teacher.to(device).eval().requires_grad_(False)


def build_objective(args: Args, diversity: Diversity, num_classes: int, device: torch.device) -> Objective:
    """Cross-entropy, with a teacher if the flags ask for one, and the diversity terms."""
    teacher = build_teacher(args, num_classes, device) if args.distillation_type != "none" else None
    label_loss = LabelLoss(teacher, args.distillation_type, args.distillation_alpha, args.distillation_tau)
    return Objective(label_loss, diversity)


class Scheme(NamedTuple):
    """A way to mix images, and what reads the patches of the mixture.

    Attributes:
        mixing: takes the keyword arguments of Mixup.
        head: classifies the patches (models/heads.py).
    """

    mixing: Callable[..., Mixing]
    head: type[PatchHead]


# The scheme whose labels each measure takes, of those that take labels.
SCHEMES: Mapping[str, Scheme] = {"patch.mixing": Scheme(Mixup, OwnHead)}
PLAIN = Scheme(Mixup, OwnHead)  # where no measure takes labels


def find_scheme(diversity: Diversity) -> Scheme:
    """How a run mixes images.

    Raises:
        UserError: two of its terms need different schemes.
        ValueError: a measure that takes labels has no scheme.
    """
    measures = {name: name.partition(":")[0] for name in diversity.labelled}
    missing = [measure for measure in measures.values() if measure not in SCHEMES]
    if missing:
        raise ValueError(f"{missing[0]} takes labels, but has no line in build.SCHEMES that says whose")
    schemes = {SCHEMES[measure]: name for name, measure in measures.items()}
    if len(schemes) > 1:
        raise UserError(f"{' and '.join(schemes.values())} mix images in different ways: drop one of them")
    return next(iter(schemes), PLAIN)


def build_mixing(args: Args, backbone: nn.Module, diversity: Diversity) -> Mixing:
    """Mixup and CutMix as the flags say; patches are labelled only where a term takes their labels."""
    return find_scheme(diversity).mixing(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        cutmix_minmax=tuple(args.cutmix_minmax) if args.cutmix_minmax else None,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        smoothing=args.smoothing,
        patch_size=find_layout(backbone).patch_size if diversity.labelled else None,
        seed=args.seed + rank(),
    )


def build_run(
    args: Args,
    model: DiverseViT,
    precision: Precision,
    mixing: Mixing,
    replaced: Tensor | None = None,
) -> RunState:
    """Optimizer, schedule and EMA of a fresh run, or of the one that `--resume` continues.

    Args:
        replaced: which samples of the running epoch stand in for a bad image (SeededDataset.replaced).
    """
    ema = None
    if args.fsdp:
        check_optimizer(args.opt, lambda layer: create_optimizer(replace(args, lr=0.1), layer), precision.device)
        model.cpu()  # so that no GPU ever holds the EMA's copy
    if args.model_ema:
        device = torch.device("cpu") if args.model_ema_force_cpu else None
        ema = ModelEmaV3(model, decay=args.model_ema_decay, device=device)
    if args.fsdp:
        for network in (model, ema.module) if ema is not None else (model,):
            shard(network, precision.device)
    scaled = replace(args, lr=scaled_lr(args))
    try:
        optimizer = create_optimizer(scaled, model.backbone)
        schedule, _ = create_scheduler(scaled, optimizer)  # stepped after each epoch, as the reference does
    except BAD_ARGUMENT as error:
        raise UserError(f"--opt {args.opt} and --sched {args.sched} cannot be built: {reason(error)}") from error
    if getattr(optimizer, "is_second_order", False) and any(
        getattr(m, "fused_attn", False) for m in model.modules()
    ):
        raise UserError(
            f"--opt {args.opt} needs second derivatives, which fused attention does not have: "
            "set the environment variable TIMM_FUSED_ATTN=0"
        )
    run_state = RunState(model, optimizer, schedule, precision.scaler, ema, config.plain(args), mixing)
    run_state.samples_per_step = args.batch_size * args.grad_accum_steps
    run_state.running.finite = Finite(args.nonfinite, args.nonfinite_patience)
    if replaced is not None:
        run_state.replaced = replaced
    if args.resume == "auto":
        resume_newest(run_state, Path(args.output_dir))
    elif args.resume:
        run_state.load_state_dict(checkpoint.load(args.resume), args.resume)
        print_main(describe_resumed(run_state, args.resume))
    elif args.start_epoch > 0:
        run_state.epoch = args.start_epoch - 1
        run_state.lr_scheduler.step(run_state.epoch)
    return run_state


def resume_newest(run_state: RunState, folder: Path) -> None:
    """--resume auto: continue from the newest valid checkpoint of a folder, if it has any."""
    newest: str | None = broadcast_object(lambda: _path_of_newest(folder))
    if newest is None:
        print_main(f"--resume auto: no checkpoint in {folder}, this is a fresh run")
        return
    run_state.load_state_dict(checkpoint.load(newest), newest)
    print_main(describe_resumed(run_state, newest))


def _path_of_newest(folder: Path) -> str | None:
    found = checkpoint.newest(folder)
    return str(found[0]) if found is not None else None


def describe_resumed(run_state: RunState, path: str) -> str:
    """What was found in a checkpoint, in words."""
    done = f"epoch {run_state.epoch + 1} is done" if run_state.epoch >= 0 else "the first epoch has begun"
    step = run_state.running.step
    inside = f", and {step} steps after it" if step else ""
    return f"resumed {path}: {done}{inside}, best top-1 {run_state.max_acc:.2f}%"


def scaled_lr(args: Args) -> float:
    """--lr is for 512 images; scale it to the global batch unless told not to."""
    return args.lr * global_batch(args) / 512.0 if args.scale_lr_flag else args.lr


def global_batch(args: Args) -> int:
    """Images in one step, over all processes and accumulated batches."""
    return args.batch_size * args.grad_accum_steps * world_size()
