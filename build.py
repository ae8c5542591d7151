"""From flags to objects: model, teacher, objective and mixing. The rest of a run is built in runs.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from errors import BAD_ARGUMENT, UserError, reason
from images.transforms import preprocessing
from layers import EMBED
from losses import LabelLoss, Objective, Teacher
from mixing import Mixing
from mixing.mixup import Mixup
from mixing.patch_grid import PatchGrid
from models import DiverseViT, Layout, Needs, build_model, find_layout
from models.heads import OwnHead, PatchHead, RegionHead
from models.remedies import Chosen, install_remedies, parse_remedies
from models.weights import load_for_finetuning, load_timms, load_weights, model_weights, without_patch_head
from options.config import Resolved
from options.flags import Args, shape_of, sides
from regularizers import MEASURES, Diversity
from state import checkpoint
from state.contents import check_description
from state.preprocessing import preprocessing_of
from state.saved_flags import flags_of
from utils import broadcast_from_main, broadcast_object, print_main, rank


def build_backbone(args: Resolved, num_classes: int) -> Any:
    """The student: a timm model with the flags' dropout, drop path, image size and --model-kwargs.

    If a term brings a head with a layer of its own, the model has this layer, which may start from a checkpoint's.
    """
    options: dict[str, Any] = {"num_classes": num_classes, "img_size": args.input_size, **_channels(args)}
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
    labelled = [spec.name for spec in args.terms if MEASURES[spec.measure].takes == "labels"]
    find_scheme(labelled).head.attach(backbone)
    if args.pretrained:
        # the others take the main process's weights, see build_student
        adapted = broadcast_object(lambda: load_timms(backbone, args.model))
        print_main("; ".join(filter(None, [f"starting from the weights of {args.model} in timm", str(adapted)])))
    if args.finetune:
        return start_from(args, backbone)
    install_remedies(backbone, args.remedy)
    return backbone


def start_from(args: Args, backbone: nn.Module) -> nn.Module:
    """The backbone with --finetune's weights, which may be a stock model's or one's with remedies, and --remedy."""
    state = checkpoint.load(args.finetune)
    check_description(state, args.finetune, ("input_size", "remedy"))
    weights = model_weights(state, args.finetune, ema=args.weights == "ema")
    flags = flags_of(state)
    trained_size = sides(flags["input_size"]) if flags.get("input_size") else ()
    own = parse_remedies(args.remedy)
    there = compared_remedies(parse_remedies(flags.get("remedy") or ()), own, args.finetune)
    late = [str(remedy) for remedy in own if remedy.changes_tokens and remedy.name not in there]
    stock = backbone.state_dict().keys()
    install_remedies(backbone, [str(remedy) for remedy in own if str(remedy) not in late])
    added = backbone.state_dict().keys() - stock
    adapted = load_for_finetuning(backbone, weights, args.finetune, trained_size=trained_size, optional=added)
    install_remedies(backbone, late)
    source = f"the moving average in {args.finetune}" if args.weights == "ema" else args.finetune
    print_main("; ".join(filter(None, [f"fine-tuning from {source}", str(adapted)])))
    return backbone


def compared_remedies(there: Sequence[Chosen], own: Sequence[Chosen], path: str) -> set[str]:
    """The names of the remedies that weights come with.

    Args:
        there, own: of the weights' model, and of this one.
        path: where the weights are from.
    Raises:
        UserError: this model lacks one, or has it in other blocks or in another number.
    """
    now = {remedy.name: remedy for remedy in own}
    for remedy in there:
        if remedy.name not in now:
            raise UserError(f"{path} is of a model with --remedy {remedy}, and this one has none: give it too")
        mine = now[remedy.name]
        if mine.layers != remedy.layers or (remedy.changes_tokens and mine != remedy):
            raise UserError(f"{path} is of a model with --remedy {remedy}, and this one has {mine}: give the same")
        if mine != remedy:
            print_main(f"note: {path} was trained with --remedy {remedy}, from here on {mine}")
    return {remedy.name for remedy in there}


def _channels(args: Args) -> dict[str, int]:
    """What a constructor is told of the channels; nothing of three, which not every one takes."""
    return {} if args.in_chans == 3 else {"in_chans": args.in_chans}


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
    check_patch_dropout(backbone, diversity)
    if diversity.looks_at_neighbours or measure.looks_at_neighbours:
        grid = layout.grid(sides(args.input_size))
        diversity, measure = (Diversity(specs, depth, reached, grid) for specs in (args.terms, args.measures))
    blocks = Needs(**diversity.needs).attending | Needs(**measure.needs).attending
    if any(tap.between == "channels" for block in blocks for tap in layout.map_taps(block)):
        print_main(f"note: the attention maps of {layout.name} are between the channels of a head, not its tokens")
    return diversity, measure


def check_patch_dropout(backbone: Any, diversity: Diversity) -> None:
    """Refuse terms that need all patches, where the model drops some while it trains.

    Raises:
        UserError: one takes labels of patches, their neighbours, or their embeddings before some are dropped.
    """
    dropout = getattr(backbone, "patch_drop", None)
    if not getattr(dropout, "prob", 0):
        return
    embedded = [term.spec.name for term in diversity.terms if any(EMBED in pair for pair in term.pairs)]
    whole = [*diversity.labelled, *diversity.looks_at_neighbours, *embedded]
    if whole:
        raise UserError(f"{whole[0]} needs all patches, and --model-kwargs patch_drop_rate drops some: drop one")


def build_student(
    args: Args,
    backbone: nn.Module,
    diversity: Diversity,
    measure: Diversity,
    num_classes: int,
    device: torch.device,
    monitored: Needs | None = None,
) -> DiverseViT:
    """The backbone with hooks on what the terms need, tried on blank images, with equal weights in all processes.

    Args:
        monitored: what is looked at besides the terms.
    Raises:
        UserError: a term cannot be computed from what this model shows.
    """
    if diversity.differentiates_twice:
        unfuse_after_blocks(backbone)
    needs, measured = Needs(**diversity.needs), Needs(**measure.needs) | (monitored or Needs())
    head = find_scheme(diversity.labelled).head
    model = DiverseViT(backbone, needs, measured, head, diversity.patch_loss).to(device)
    tried = model.check(shape_of(args), num_classes, needs | measured, shortcuts=not args.explicit_terms)
    diversity.check(tried)
    measure.check(tried)
    broadcast_from_main(model)  # the processes drew different weights; the EMA is a copy of these
    return model


def unfuse_after_blocks(backbone: nn.Module) -> None:
    """Let what attends after the blocks leave the fused kernel, which has no second derivative."""
    within = {module for block in find_layout(backbone).blocks for module in block.modules()}
    after: list[Any] = [module for module in backbone.modules() if module not in within]
    for module in after:
        if hasattr(module, "fused_attn"):
            module.fused_attn = False


def training_mode(args: Args) -> bool:
    """Whether dropout and drop path are on while training; by default not while fine-tuning, as in DeiT."""
    on = not args.finetune if args.train_mode is None else args.train_mode
    rates = [f"--{name} {rate:g}" for name, rate in (("drop", args.drop), ("drop-path", args.drop_path)) if rate]
    if rates and not on:
        why = "--no-train-mode" if args.train_mode is False else "--finetune without --train-mode"
        print_main(
            f"note: {' and '.join(rates)} without effect: {why} trains in evaluation mode, as DeiT fine-tunes"
        )
    for remedy in parse_remedies(args.remedy):
        if remedy.keeps_statistics and not on:
            print_main(f"note: the batch norm of {remedy.name} keeps its statistics; --train-mode renews them")
    if args.cosub and not (rates and on):
        print_main("note: --cosub without effect: its two submodels are the same without --drop-path or --drop")
    return on


def build_teacher(args: Args, num_classes: int, device: torch.device) -> nn.Module:
    """The teacher, with its weights, in evaluation mode; it takes the student's images.

    Raises:
        UserError: it cannot be built, its weights do not fit, or it does not take such images.
    """
    size = args.teacher_input_size or args.input_size
    shape = (args.in_chans, *sides(size))
    flags = "--teacher-model, --teacher-path, --teacher-input-size and --teacher-model-kwargs"
    state = checkpoint.load(args.teacher_path)
    check_description(state, args.teacher_path, ("remedy",))
    try:
        teacher = build_model(
            args.teacher_model,
            **{"num_classes": num_classes, "img_size": size, **_channels(args)} | args.teacher_model_kwargs,
        )
        install_remedies(teacher, [str(text) for text in flags_of(state).get("remedy") or ()])
        weights = model_weights(state, args.teacher_path, ema=args.teacher_weights == "ema")
        weights = without_patch_head(teacher, weights)
        load_weights(
            teacher, weights, args.teacher_path, f"Check {flags}; it must know the data's {num_classes} classes"
        )
        own = preprocessing_of(state, args.teacher_path, args.teacher_model, shape)
    except UserError as error:
        raise UserError(f"--teacher-model {args.teacher_model}: {error}") from error
    teacher.eval().requires_grad_(False).to(device)
    try:
        with torch.no_grad():
            answer = teacher(torch.zeros(2, *shape, device=device))
        if answer.shape != (2, num_classes):
            raise ValueError(
                f"it returns {list(answer.shape[1:])} numbers an image, the data has {num_classes} classes"
            )
    except BAD_ARGUMENT as error:
        raise UserError(
            f"--teacher-model {args.teacher_model} does not take images of {shape[1]} x {shape[2]}: {reason(error)}"
            f"; check {flags}"
        ) from error
    students = preprocessing(args)
    if size == args.input_size and (own.mean, own.std) == (students.mean, students.std):
        return teacher
    print_main(f"the teacher takes images of {shape[1]} x {shape[2]} pixels, normalised by {own.colours}")
    return Teacher(teacher, sides(size), [(students.mean, students.std), (own.mean, own.std)]).to(device)


def build_objective(args: Args, diversity: Diversity, num_classes: int, device: torch.device) -> Objective:
    """Cross-entropy, with a teacher if the flags ask for one, and the diversity terms."""
    teacher = build_teacher(args, num_classes, device) if args.distillation_type != "none" else None
    distilled = args.distillation_type, args.distillation_alpha, args.distillation_tau
    label_loss = LabelLoss(teacher, *distilled, binary=args.bce_loss, cosub=args.cosub)
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
SCHEMES: Mapping[str, Scheme] = {
    "patch.mixing": Scheme(Mixup, OwnHead),
    "patch.region_mixing": Scheme(PatchGrid, RegionHead),
}
PLAIN = Scheme(Mixup, OwnHead)  # where no measure takes labels


def find_scheme(labelled: Sequence[str]) -> Scheme:
    """How a run mixes images whose terms with these names take labels.

    Raises:
        UserError: two of its terms need different schemes.
        ValueError: a measure that takes labels has no scheme.
    """
    measures = {name: name.partition(":")[0] for name in labelled}
    missing = [measure for measure in measures.values() if measure not in SCHEMES]
    if missing:
        raise ValueError(f"{missing[0]} takes labels, but has no line in build.SCHEMES that says whose")
    schemes = {SCHEMES[measure]: name for name, measure in measures.items()}
    if len(schemes) > 1:
        raise UserError(f"{' and '.join(schemes.values())} mix images in different ways: drop one of them")
    return next(iter(schemes), PLAIN)


def build_mixing(args: Args, backbone: nn.Module, diversity: Diversity) -> Mixing:
    """Mixup and CutMix as the flags say; patches are labelled only where a term takes their labels."""
    return find_scheme(diversity.labelled).mixing(
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
