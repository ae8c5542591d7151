"""`python -m segmentation`: build the data, the network and the run, then train it or evaluate it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from build import build_diversity
from datasets import named
from ending import finish
from engine import Precision
from errors import BAD_ARGUMENT, UserError, reason
from images.transforms import preprocessing
from loaders import DeviceLoader
from losses import Objective
from models import DiverseViT, Needs
from models.checks import check_captured
from models.weights import has_average, load_weights, model_weights
from options.config import provenance
from options.flags import shape_of, sides
from program import Signals
from regularizers import Diversity
from runs import build_run
from schedules import PolyBySteps
from segmentation.check import check_pairs
from segmentation.images import SegmentedImages
from segmentation.inference import Predictor
from segmentation.layouts import Options
from segmentation.loading import build_eval_loader, build_train_loader
from segmentation.network import Segmenter
from segmentation.objective import PixelLoss, Unmixed, synchronised
from segmentation.options import PROGRAM
from segmentation.predictions import Predictions
from segmentation.sets import Pairs, find_pairs
from segmentation.settings import Settings, described, names_of, recipe_of, resolve, stride_of
from segmentation.starting import build_network, find_origin
from segmentation.task import MIOU, Segmentation, evaluate, numbers_of, report_line
from segmentation.transforms import Training, Whole
from state import checkpoint, resumption
from state.lock import Lock
from state.run_state import check_class_names
from state.saved_flags import flags_of
from state.trained import is_segmenters
from trainer import Work, build_trackers, start, train
from utils import broadcast_from_main, find_launch, init_distributed, print_main, rank, world_size
from workers import default_workers

ADVICE = "Give a checkpoint of python -m segmentation, with the flags of its run: --config FOLDER/args.yaml"
AVERAGE = "EMA"  # what a checkpoint's moving average is called in print


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; a user's mistake becomes one line and exit code 2."""
    return finish(PROGRAM, lambda: run(resolve(argv)))


def run(args: Settings) -> None:
    """Build everything, then train, or evaluate and stop; or only read the images and masks."""
    if args.check_data:
        check_data(args)
        return
    precision = start(args)
    check_batch(args)
    state = checkpoint.load(args.resume) if args.eval and args.resume else None
    earlier = None if args.eval else resumption.find(args)
    saved = state if earlier is None else earlier.state
    if saved is not None:
        check_segmenter(saved, args.resume if earlier is None else earlier.path)
    if saved is None:
        args, origin = find_origin(args)
    else:
        args, origin = described(args, flags_of(saved)), None
    if earlier is not None:
        args = resumption.in_force(args, earlier)
    pairs = find_half(args, is_train=False)
    check_names(args, pairs)
    args = replace(args, class_names=named(pairs.classes))
    if saved is not None:
        check_heads(args, flags_of(saved))
        check_class_names(flags_of(saved), args.class_names, args.resume)
    network = build_network(args, len(pairs.classes), origin, fresh=saved is None)
    diversity, _ = build_diversity(args, network)
    model = build_model(args, network, diversity, len(pairs.classes), precision.device)
    val_set = images_of(args, pairs)
    loader = build_eval_loader(args, val_set, world_size(), rank(), precision.device)
    predict = predictor_of(args)
    if args.eval:
        evaluate_checkpoint(args, model, state, loader, val_set, precision, predict)
        return
    output = Path(args.output_dir) if args.output_dir else None
    with Signals() as signals, Lock(output), build_trackers(args) as trackers:
        train_set = images_of(args, find_half(args, is_train=True, classes=pairs.classes))
        train_loader = build_train_loader(args, train_set, world_size(), rank(), precision.device)
        mixing, objective = Unmixed(), Objective(PixelLoss(auxiliary=args.auxiliary_coef), diversity)
        run_state = build_run(args, model, precision, mixing, train_loader, earlier, by_steps, MIOU)
        task = Segmentation(args, loader, (len(train_set), len(val_set)), pairs.classes, precision, predict)
        train(Work(args, run_state, objective, mixing, train_loader, precision), task, signals, trackers, earlier)


def check_data(args: Settings) -> None:
    """--check-data: read all pairs of both halves once."""
    init_distributed(find_launch(args.world_size), torch.device("cpu"), args.dist_url, args.dist_timeout)
    training = find_half(args, is_train=True)
    validation = find_half(
        args, is_train=False, classes=training.classes
    )  # for which all masks were read, if at all
    found = {"training": images_of(args, training), "validation": images_of(args, validation)}
    workers = default_workers() if args.num_workers is None else args.num_workers
    check_pairs(found, workers, args.dist_timeout)


def check_batch(args: Settings) -> None:
    """Refuse steps in which batch norm would see a single value of each channel.

    Raises:
        UserError: one crop in all processes, whose pyramid of UperNet has a map of 1 x 1.
    """
    if args.head == "uper" and not args.eval and args.batch_size * world_size() == 1:
        raise UserError(
            "--batch-size 1 in one process: UperNet averages a whole crop into one value of each channel, and "
            "batch norm needs two: give --batch-size 2, perhaps with --grad-checkpointing, or start more processes"
        )


def check_values(args: Settings, patches: int) -> None:
    """Refuse steps of the linear head in which its batch norm would see a single value of each channel.

    Args:
        patches: of a crop.
    Raises:
        UserError: one crop of one patch in all processes.
    """
    if args.head == "linear" and not args.eval and args.batch_size * world_size() * patches == 1:
        raise UserError(
            "--batch-size 1 in one process, and a crop of one patch: batch norm needs two values of each channel: "
            "give --batch-size 2, or a larger --crop-size"
        )


def check_segmenter(state: Any, path: str) -> None:
    """Refuse to continue, or to evaluate, a checkpoint of something else.

    Raises:
        UserError: it is of a classifier.
    """
    if not is_segmenters(model_weights(state, path, ema=has_average(state))):
        raise UserError(
            f"--resume {path} is not a checkpoint of python -m segmentation, it has no decode_head: give one, or "
            "start from its backbone with --backbone"
        )


def check_heads(args: Settings, saved: Mapping[str, Any]) -> None:
    """Refuse to take away the auxiliary head that a checkpoint has, or to add one.

    Args:
        saved: the flags in the checkpoint.
    Raises:
        UserError: with the coefficient that it was trained with.
    """
    then = saved.get("auxiliary_coef")
    if args.head == "uper" and then is not None and bool(then) != bool(args.auxiliary_coef):
        has = "an" if then else "no"
        raise UserError(
            f"{args.resume} was trained with --auxiliary-coef {then:g} and has {has} auxiliary head: keep it, it "
            f"cannot go on with {args.auxiliary_coef:g}"
        )


def find_half(args: Settings, is_train: bool, classes: Sequence[str] = ()) -> Pairs:
    """The training or the evaluation half of --data-set.

    Args:
        classes: the names, where they are known from the other half.
    """
    names = classes or names_of(args) if args.data_set == "FOLDER" else ()
    said = Options(names, args.ignore_label, args.reduce_zero_label)
    return find_pairs(args.data_set, args.data_path or "", is_train, said)


def check_names(args: Settings, pairs: Pairs) -> None:
    """Refuse --class-names that are not the data's.

    Raises:
        UserError: a label would mean another class.
    """
    if args.class_names and args.class_names != list(pairs.classes):
        raise UserError(
            f"--class-names, or args.yaml, has {len(args.class_names)} names that are not those of the "
            f"{len(pairs.classes)} classes of --data-set {args.data_set}: give the data that they belong to"
        )


def images_of(args: Settings, pairs: Pairs) -> SegmentedImages:
    """A half of the data, with the transforms that the flags ask for."""
    recipe = recipe_of(args)
    training = Training(recipe, args.in_chans, preprocessing(args).mean)
    return SegmentedImages(pairs, training, Whole(recipe, args.in_chans))


def predictor_of(args: Settings) -> Predictor:
    """How evaluation finds the class of each pixel."""
    slides = args.inference == "slide"
    window = sides(args.input_size) if slides else None
    return Predictor(window, stride_of(args) if slides else None, args.test_scales, args.test_flip)


def by_steps(args: Settings, optimizer: torch.optim.Optimizer, peak: float) -> PolyBySteps:
    """The schedule: warm-up, then a polynomial to 0."""
    return PolyBySteps(optimizer, args.iterations, args.warmup_iterations, args.warmup_share, args.power)


def build_model(
    args: Settings, network: Segmenter, diversity: Diversity, classes: int, device: torch.device
) -> DiverseViT:
    """The network with hooks on what the terms need, tried on blank crops, with equal weights in all processes.

    Raises:
        UserError: it does not take such crops, or too few, or a term cannot be computed from what it shows.
    """
    needs = Needs(**diversity.needs)
    check_layers(diversity, network)
    model = DiverseViT(synchronised(network.to(device)), needs)
    shape = shape_of(args)
    try:
        if not args.explicit_terms:
            model.find_shortcuts(shape)
        captured = model.tried(torch.zeros(2, *shape, device=device), needs)
    except BAD_ARGUMENT as error:
        raise UserError(
            f"{args.model} cannot take crops of {' x '.join(map(str, shape))} pixels: {reason(error)}. Check "
            "--crop-size, --in-chans and --model-kwargs"
        ) from error
    if captured.logits.shape[:2] != (2, classes):
        raise UserError(f"{args.model} under --head {args.head} gives logits {list(captured.logits.shape)}")
    if model.layout is not None:
        check_captured(captured, model.layout, shape[1:])
        diversity.check(captured)
    check_values(args, captured.logits[0, 0].numel())
    broadcast_from_main(model)  # the processes drew different weights; the EMA is a copy of these
    return model


def check_layers(diversity: Diversity, network: Segmenter) -> None:
    """Refuse terms at layers that a segmenter does not run.

    Raises:
        UserError: with the term.
    """
    if network.maps.hierarchical:
        return  # all stages are read
    last = max(network.maps.layers)
    for term in diversity.terms:
        layers = [*term.layers, *(layer for pair in term.pairs for layer in pair)]
        if term.spec.level != "weight" and max(layers, default=0) > last:
            raise UserError(
                f"{term.spec.name} is at a layer behind the last block that the head reads, {last}: choose "
                "layers up to it"
            )


def evaluate_checkpoint(
    args: Settings,
    model: DiverseViT,
    state: Any,
    loader: DeviceLoader,
    images: SegmentedImages,
    precision: Precision,
    predict: Predictor,
) -> None:
    """--eval: print the scores of the weights in `state`, of their average, or of both, as --weights says."""
    networks = {AVERAGE if args.weights == "ema" else "network": model}
    if args.weights == "auto" and has_average(state):
        networks[AVERAGE] = copy.deepcopy(model)
    for name, each in networks.items():
        if args.resume:
            load_weights(each.backbone, model_weights(state, args.resume, ema=name == AVERAGE), args.resume, ADVICE)
    if not args.resume:
        print_main("warning: --eval without --resume evaluates untrained heads")
    written = Predictions(Path(args.predictions), images, args.pictures) if args.predictions else None

    def show(number: int, predicted: Tensor) -> None:
        if written is not None:
            written.add(number * world_size() + rank() if args.dist_eval else number, predicted)

    found = evaluate([*networks.values()], loader, precision, predict, images.pairs.classes, show=show)
    for name, result in zip(networks, found, strict=True):
        print_main(f"{name}: {report_line(numbers_of(result))}")
    print_main(found[0].table())
    if written is not None:
        about = {"weights": args.resume or "untrained heads", "images": len(images), **provenance()}
        print_main(f"written: {written.write_page(f'Segmentation of {args.data_set}', found[0], about)}")
