"""A checkpoint of `python -m segmentation` becomes a network again: what export begins with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from errors import UserError
from models.weights import has_average, load_weights, model_weights
from segmentation.network import Segmenter
from segmentation.options import HEADS, NECKS, Flags
from segmentation.settings import Settings
from segmentation.starting import build_network
from state import checkpoint
from state.contents import check_description
from state.saved_flags import flags_of
from state.trained import Trained, class_names_of, is_segmenters, read_trained

# The flags that say what network it is.
MODEL = ("model", "model_kwargs", "remedy", "input_size", "in_chans")
PARTS = ("head", "neck", "map_layers", "channels", "auxiliary_channels", "auxiliary_coef")


@dataclass(frozen=True)
class TrainedSegmenter:
    """A network with its trained weights.

    Attributes:
        backbone: the trained backbone by itself, and what the checkpoint says of the run.
        network: backbone, neck and decode head, in evaluation mode; without the auxiliary head.
        head: its name in `network.HEADS`.
        classes: how many there are.
        class_names: in the order of the logits; none if the classes have no names.
    """

    backbone: Trained
    network: Segmenter
    head: str
    classes: int
    class_names: Sequence[str] = ()


def holds_segmenter(state: Any, path: str) -> bool:
    """Whether a loaded checkpoint is of a network for segmentation.

    Raises:
        UserError: it holds no weights.
    """
    return is_segmenters(model_weights(state, path, ema=has_average(state)))


def read_segmenter(path: str, weights: str = "auto", state: Any = None) -> TrainedSegmenter:
    """Build the network that a checkpoint of `python -m segmentation` describes, and load its weights.

    Args:
        path: a file or an https address.
        weights: as those of `state.trained.read_trained`; the better ones are those of the higher mIoU.
        state: what the file holds, if it is loaded already.
    Raises:
        UserError: no such file, one of another program, or weights that do not fit.
    """
    state = checkpoint.load(path) if state is None else state
    flags = flags_of(state)
    if not flags.get("model") or not {"head", "neck"} <= flags.keys():
        raise UserError(f"{path} does not say what network it holds: give a checkpoint of python -m segmentation")
    check_description(state, path, PARTS, Flags)
    if flags["head"] not in HEADS or flags["neck"] not in NECKS:
        raise UserError(
            f"{path} has a head or a neck of another version: its args say {flags['head']}, {flags['neck']}"
        )
    backbone = read_trained(path, weights, state=state)
    saved = model_weights(state, path, ema=backbone.weights == "ema")
    classifier = saved.get("decode_head.conv_seg.weight")
    if classifier is None:
        raise UserError(f"{path} has no decode_head.conv_seg.weight to tell the number of classes by")
    classes = len(classifier)
    said = {name: flags[name] for name in (*MODEL, *PARTS) if flags.get(name) is not None}
    network = build_network(replace(Settings(), **said), classes, origin=None, fresh=False)
    load_weights(network, saved, path, "Its args are not those that it was trained with")
    network.auxiliary_head = None
    names = class_names_of(flags, classes, path)
    return TrainedSegmenter(backbone, network.eval(), flags["head"], classes, names)
