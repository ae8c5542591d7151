"""What a segmentation run starts from: the network, with a trained backbone in it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from torch import nn

from build import use_grad_checkpointing
from errors import UserError
from images.transforms import preprocessing
from models import check_name
from models.remedies import install_remedies, parse_remedies
from models.weights import StateDict, load_for_finetuning, load_timms, model_weights
from options.flags import sides
from segmentation.features import build_backbone
from segmentation.network import Segmenter, build_segmenter, load_mmseg
from segmentation.settings import Settings
from state import checkpoint
from state.preprocessing import said_by_timm
from state.trained import Trained, read_trained
from utils import broadcast_object, print_main

# Arguments of a constructor that this program gives itself.
GIVEN = ("img_size", "in_chans", "dynamic_img_size")


class Origin(NamedTuple):
    """A trained backbone, to start from.

    Attributes:
        weights: of the whole classifier.
        size: height and width of the images that it was trained on.
        kind: 'raw' or 'ema'.
    """

    weights: StateDict
    size: tuple[int, int]
    kind: str


def find_origin(args: Settings) -> tuple[Settings, Origin | None]:
    """Read --backbone. The settings then name its model, its remedies, and the colours that it was trained on.

    Raises:
        UserError: it cannot be read, or does not say what it holds, or is of another model than --model and
            --model-kwargs say, or of other remedies than --remedy.
    """
    if not args.backbone:
        check_name(args.model)
        return with_colours(args, said_by_timm(args.model, (args.in_chans, *sides(args.input_size)))[0]), None
    trained = read_trained(
        args.backbone, args.weights, model=args.model or None, model_kwargs=args.model_kwargs, only_if_silent=True
    )
    check_model(args, trained)
    own, given = list(trained.remedies), list(args.remedy)
    if given and [str(each) for each in parse_remedies(own)] != given:
        raise UserError(
            f"{args.backbone} is of a model with {' '.join(f'--remedy {each}' for each in own) or 'no --remedy'}, "
            f"not {' '.join(given)}: drop the flag"
        )
    kwargs = {key: value for key, value in trained.model_args.items() if key not in GIVEN}
    found = replace(args, model=trained.name, model_kwargs=kwargs, remedy=own, in_chans=trained.image_shape[0])
    height, width = trained.image_shape[1:]
    origin = Origin(trained.backbone.state_dict(), (height, width), trained.weights)
    return with_colours(found, trained.preprocessing._asdict()), origin


def check_model(args: Settings, trained: Trained) -> None:
    """Refuse a --backbone of another model than is asked for.

    Raises:
        UserError: with what its file says.
    """
    if args.model and args.model.partition(".")[0] != trained.name.partition(".")[0]:
        raise UserError(
            f"{args.backbone} is of the model {trained.name}, not {args.model}: drop --model, or give its backbone"
        )
    for key, value in args.model_kwargs.items():
        own = trained.model_args.get(key, value)
        if own != value:
            raise UserError(
                f"{args.backbone} is of a model with {key}={own}, not {value}: drop it from --model-kwargs"
            )


def with_colours(args: Settings, said: dict[str, Any]) -> Settings:
    """The settings with the mean and deviation that are said, where the flags give none; else DeiT's."""
    mean, std = args.mean or said.get("mean"), args.std or said.get("std")
    colours = preprocessing(replace(args, mean=mean and list(mean), std=std and list(std)))
    return replace(args, mean=list(colours.mean), std=list(colours.std))


def build_network(args: Settings, classes: int, origin: Origin | None, fresh: bool) -> Segmenter:
    """The network; its backbone has the weights of `origin`, timm's, or untrained ones.

    Args:
        classes: K.
        fresh: whether --pretrained and --head-weights count; those of a checkpoint come later.
    Raises:
        UserError: the backbone gives no maps, or its weights do not fit.
    """
    options: dict[str, Any] = {} if args.in_chans == 3 else {"in_chans": args.in_chans}
    if args.drop_path > 0:
        options["drop_path_rate"] = args.drop_path
    size = sides(args.input_size)
    backbone = build_backbone(args.model, size, **options | args.model_kwargs)
    if args.pretrained and fresh:
        adapted = broadcast_object(lambda: load_timms(backbone, args.model))
        print_main("; ".join(filter(None, [f"backbone: the weights of {args.model} in timm", str(adapted)])))
    install_remedies(backbone, args.remedy)
    if origin is not None:
        start_from(backbone, origin, args.backbone)
    network = build_segmenter(
        backbone,
        classes,
        head=args.head,
        neck=args.neck,
        layers=args.map_layers or None,
        channels=args.channels,
        auxiliary_channels=args.auxiliary_channels if args.auxiliary_coef else 0,
        image_size=size,
        frozen=args.frozen,
        in_chans=args.in_chans,
        dropout=args.head_drop,
    )
    if args.head_weights and fresh:
        state = checkpoint.load(args.head_weights)
        load_mmseg(network, model_weights(state, args.head_weights), args.head_weights)
    if args.grad_checkpointing:
        use_grad_checkpointing(backbone)
    return network


def start_from(backbone: nn.Module, origin: Origin, path: str) -> None:
    """Load a trained backbone's weights; position tables are resampled to this image size."""
    adapted = load_for_finetuning(backbone, origin.weights, path, trained_size=origin.size)
    source = f"the moving average in {path}" if origin.kind == "ema" else path
    print_main("; ".join(filter(None, [f"backbone: {source}", str(adapted)])))
