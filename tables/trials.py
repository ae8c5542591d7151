"""What a cell would train, built and tried before anything runs, by the parts of main.py or segmentation.

Nothing is read of weights but what they are of.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import build
from datasets import build_dataset
from errors import UserError
from options.config import Resolved, plain
from options.flags import shape_of
from segmentation.settings import FILES, Settings, check_files, described
from state.preprocessing import follow_weights
from tables.evidence import ROOT

COPIES = 3  # checkpoints of a run: the latest two, and the best


class Data(NamedTuple):
    """How many training images there are, and classes."""

    images: int
    classes: int


IMAGENET = Data(1_281_167, 1000)
CLASSES = {"ADE20K": 150, "CITYSCAPES": 19, "VOC": 21}  # where the data is not there


@dataclass(frozen=True)
class Size:
    """Of a row's model.

    Attributes:
        images: for training, in an epoch.
        parameters: that are trained.
        flops: of the forward pass of one image.
        disk: bytes of one run's checkpoints.
    """

    images: int
    parameters: int
    flops: float
    disk: float


def _size_of(args: Resolved, images: int, model: nn.Module, network: nn.Module, blank: torch.Tensor) -> Size:
    """The parameters of `model` that are trained, terms' own too; the work of its `network` on a blank image."""
    every = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    # the fused kernel would not be counted
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        network.eval()(blank)
    numbers = (1 + args.model_ema) * every + 2 * trained  # a weight, its average, its two moments
    return Size(images, trained, float(counter.get_total_flops()), 4.0 * numbers * COPIES)


# ------------------------------------------------------------------------------------------------------------
# main.py


def follow_main(args: Resolved, start: Resolved | None) -> Resolved:
    """The flags with the preprocessing that they mean; the weights are left out."""
    return follow_weights(replace(args, finetune="", pretrained=False))


def open_main(args: Resolved, with_data: bool) -> Data:
    """The data, if it is wanted or at hand; else it is taken for ImageNet."""
    if not (with_data or args.data_path is not None or args.data_set == "DIGITS"):
        return IMAGENET
    _, classes = build_dataset(False, args)
    images, _ = build_dataset(True, args)
    return Data(len(images), len(classes))


def build_main(args: Resolved, data: Data, processes: int) -> Size:
    """The model with its hooks, tried on blank images as main.py tries it."""
    device = torch.device("cpu")
    backbone = build.build_backbone(args, data.classes)
    diversity, measure = build.build_diversity(args, backbone)
    model = build.build_student(args, backbone, diversity, measure, data.classes, device)
    build.build_mixing(args, backbone, diversity)
    return _size_of(args, data.images, model, backbone, torch.zeros(1, *shape_of(args)))


# ------------------------------------------------------------------------------------------------------------
# Segmentation


def follow_backbone(args: Resolved, start: Resolved | None) -> Settings:
    """The flags with the model of the backbone.

    Args:
        start: the flags of the run that trains it; without them --model names it, or the file says it.
    Raises:
        UserError: there is none, or it cannot be read.
    """
    from segmentation.starting import find_origin

    assert isinstance(args, Settings)
    if start is not None:
        return described(args, plain(start))
    check_files(with_whole_paths(args))
    if args.model:
        return args
    if not args.backbone:
        raise UserError("there is no network: say backbone: ROW, or give --backbone FILE or --model in flags")
    return find_origin(with_whole_paths(args))[0]


def with_whole_paths(args: Settings) -> Settings:
    """The flags with files as they are found from any folder: a run starts in the project's."""
    named = {name: getattr(args, name) for name in FILES}
    there: dict[str, Any] = {
        name: str(ROOT / path) for name, path in named.items() if path and not path.startswith("https://")
    }
    return replace(args, **there)


def open_pairs(args: Resolved, with_data: bool) -> Data:
    """Both halves of the data, if it is wanted or at hand, and the files that flags name."""
    from segmentation.command import find_half

    assert isinstance(args, Settings)
    if importlib.util.find_spec("torchmetrics") is None:
        raise UserError("masks are counted by torchmetrics: pip install -r requirements-segmentation.txt")
    check_files(replace(with_whole_paths(args), backbone=""))
    if not with_data and args.data_path is None and args.data_set in CLASSES:
        return Data(0, CLASSES[args.data_set])
    pairs = find_half(with_whole_paths(args), is_train=False)
    images = find_half(with_whole_paths(args), is_train=True, classes=pairs.classes)
    return Data(len(images.samples), len(pairs.classes))


def build_segmentation(args: Resolved, data: Data, processes: int) -> Size:
    """The network with its terms, tried on crops without content: its sizes alone, whatever they would take."""
    from segmentation.command import build_model
    from segmentation.starting import build_network

    assert isinstance(args, Settings)
    nowhere = torch.device("meta")
    with nowhere:
        network = build_network(args, data.classes, None, fresh=False)
    diversity, _ = build.build_diversity(args, network)
    model = build_model(args, network, diversity, data.classes, nowhere)
    crops = args.eval_interval * args.batch_size * args.grad_accum_steps * processes
    return _size_of(args, crops, model, network, torch.zeros(1, *shape_of(args), device=nowhere))
