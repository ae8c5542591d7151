"""A backbone, a neck and heads as one model that classifies every pixel.

Legend: B images, C channels, K classes, h x w pixels of the logits, H x W of an image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from timm.models import group_parameters
from torch import Tensor, nn

from errors import UserError, did_you_mean, shown
from segmentation.features import Maps, Size, find_maps, parameters_of_maps
from segmentation.heads import FCNHead, LinearHead, UperHead
from segmentation.necks import build_neck
from utils import print_main

HEADS = ("uper", "linear")


class Segmenter(nn.Module):
    """Logits of every pixel, at the resolution of the head's largest map.

    `models.capture.DiverseViT` takes it like a classifier: its hooks sit on the blocks of the backbone inside, and
    it knows pairs of logits in training from distilled students. What the wrapper and timm's optimizers ask of a
    model (patch size, prefix tokens, layers for the decay of rates) is answered for the backbone.

    Args:
        backbone: a timm model without its classifier.
        maps: where its maps are.
        neck: makes the head's maps of them.
        decode_head, auxiliary_head: logits of the head's maps; the second in training alone, if there is one.
        frozen: whether the backbone stays in evaluation mode.
    """

    backbone: Any  # an nn.Module; timm's parts of it have no common type

    def __init__(
        self,
        backbone: nn.Module,
        maps: Maps,
        neck: nn.Module,
        decode_head: nn.Module,
        auxiliary_head: nn.Module | None = None,
        frozen: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = neck
        self.decode_head = decode_head
        self.auxiliary_head = auxiliary_head
        self.maps, self.frozen = maps, frozen
        self.train(self.training)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """[B, C, H, W] -> logits [B, K, h, w]; in training with those of the auxiliary head, if there is one.

        Images of any size are padded to whole patches, and the logits of the padding are cut off.

        Raises:
            UserError: the backbone does not take images of this size.
        """
        size = images.shape[-2:]
        features = self.neck(self.maps(self.backbone, images))
        logits = self.maps.cropped(self.decode_head(features), size)
        if self.training and self.auxiliary_head is not None:
            return logits, self.maps.cropped(self.auxiliary_head(features), size)
        return logits

    def train(self, mode: bool = True) -> Segmenter:
        """Training mode, but for a frozen backbone."""
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    # ------------------------------------------------------------------------------------------------------
    # What timm's optimizers ask

    def no_weight_decay(self) -> set[str]:
        """The backbone's parameters without weight decay besides biases and norms: tokens and position tables."""
        own: set[str] = getattr(self.backbone, "no_weight_decay", set)()
        return {f"backbone.{name}" for name in own}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """Parameter name -> its layer: those of the backbone that are trained, then neck and heads.

        Raises:
            UserError: the backbone has no layers.
        """
        if not hasattr(self.backbone, "group_matcher"):
            raise UserError(f"{type(self.backbone).__name__} has no layers for --layer-decay: drop the flag")
        own = group_parameters(self.backbone, self.backbone.group_matcher(coarse=coarse), reverse=True)
        trained = {f"backbone.{name}": own[name] for name, p in self.backbone.named_parameters() if p.requires_grad}
        places = {layer: place for place, layer in enumerate(sorted(set(trained.values())))}
        return lambda name: places[trained[name]] if name in trained else len(places)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Let the backbone recompute its blocks in the backward pass instead of keeping their activations."""
        self.backbone.set_grad_checkpointing(enable)

    # ------------------------------------------------------------------------------------------------------
    # What models.layout asks

    @property
    def feature_info(self) -> Any:
        """Of the backbone: how many pixels of an image a pixel of each layer's map stands for."""
        return self.backbone.feature_info

    @property
    def patch_embed(self) -> Any:
        """Of the backbone: what makes patch embeddings of images; None if it has no such part."""
        return getattr(self.backbone, "patch_embed", None)

    @property
    def num_prefix_tokens(self) -> int | None:
        """Of the backbone: how many tokens come before the patches; None if it does not say."""
        return getattr(self.backbone, "num_prefix_tokens", None)

    @property
    def cls_token(self) -> Any:
        """Of the backbone: the class token; None if it has none."""
        return getattr(self.backbone, "cls_token", None)


def build_segmenter(
    backbone: Any,
    classes: int,
    head: str = "uper",
    neck: str = "scale",
    layers: Sequence[int] | None = None,
    channels: int = 512,
    auxiliary_channels: int = 256,
    image_size: Size = (512, 512),
    frozen: bool = False,
    in_chans: int = 3,
    dropout: float = 0.1,
) -> Segmenter:
    """A segmenter around a timm model, which loses its classifier.

    Parameters on which the logits do not depend, e.g. a final norm that no map goes through, keep their values and
    get no gradient.

    Args:
        classes: K.
        head: 'uper' for UperNet with an auxiliary head on the third map, or 'linear' for a linear classifier of the
            last layer's patches after the backbone's own final norm.
        neck: how the four maps of a plain ViT get their sizes: 'scale', 'multilevel' or 'deconv'.
        layers: blocks of a plain ViT, or stages, that the maps are from, see `features.find_maps`.
        channels, auxiliary_channels: C of UperNet and of the auxiliary head; 0: there is no auxiliary head.
        image_size: height and width of training images.
        frozen: train neck and heads alone; the backbone stays in evaluation mode. (DINOv2's protocol is this with
            the linear head.)
        in_chans: channels of images.
        dropout: before each classifier.
    Raises:
        UserError: a name that is unknown, or a backbone that gives no such maps.
    """
    if head not in HEADS:
        raise UserError(f"unknown head {head!r}.{did_you_mean(head, HEADS)} There are {', '.join(HEADS)}")
    linear = head == "linear"
    if linear and (neck != "scale" or layers is not None):
        raise UserError("--head linear reads the last layer alone: drop --neck and --map-layers")
    maps = find_maps(backbone, image_size, layers, last=linear, in_chans=in_chans)
    if hasattr(backbone, "reset_classifier"):
        backbone.reset_classifier(0)
    read = set() if frozen else parameters_of_maps(backbone, maps, image_size, in_chans)
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_(name in read)
    if linear:
        return Segmenter(backbone, maps, nn.Identity(), LinearHead(maps.widths[-1], classes), frozen=frozen)
    return Segmenter(
        backbone,
        maps,
        build_neck(neck, maps),
        UperHead(maps.widths, classes, channels, dropout),
        FCNHead(maps.widths[2], classes, auxiliary_channels, dropout) if auxiliary_channels else None,
        frozen,
    )


def load_mmseg(segmenter: Segmenter, weights: Mapping[str, Tensor], path: str) -> None:
    """Load the heads, and the neck if there is one, of a checkpoint of mmseg; what they lack is printed.

    Args:
        weights: its state dict, with the names decode_head.*, auxiliary_head.* and neck.*; all others, among them
            the backbone's, are not read.
        path: where they are from, for the messages.
    Raises:
        UserError: the decode head does not fit, or another part that the checkpoint has.
    """
    for part in ("decode_head", "auxiliary_head", "neck"):
        module = getattr(segmenter, part)
        own = module.state_dict() if module is not None else {}
        prefix = f"{part}."
        there = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        if not there and part != "decode_head":
            if own:
                print_main(f"note: {path} has no {part}: it starts untrained")
            continue
        if not own:
            print_main(f"note: the {part} of {path} is left out, this model has none")
            continue
        _check_part(own, there, part, path)
        module.load_state_dict({**own, **there})


def _check_part(own: Mapping[str, Tensor], there: Mapping[str, Tensor], part: str, path: str) -> None:
    """Refuse what does not fit a part of the segmenter; see `load_mmseg`."""
    lacking = [name for name in own if name not in there and not name.endswith("num_batches_tracked")]
    norms = [name for name in lacking if part == "neck" and name.startswith("norms.")]  # mmseg's necks have none
    missing = [name for name in lacking if name not in norms]
    unknown = [name for name in there if name not in own]
    shapes = [name for name in own if name in there and own[name].shape != there[name].shape]
    problems = []
    if shapes:
        name = shapes[0]
        what = " (classes first)" if name.startswith("conv_seg") else ""
        problems.append(f"{name} is {list(there[name].shape)}{what} there and {list(own[name].shape)} here")
    if missing:
        problems.append(f"{len(missing)} parameters are missing, first {missing[0]}")
    if unknown:
        problems.append(f"{len(unknown)} are unknown here, first {shown(unknown[0])}")
    if problems:
        raise UserError(
            f"the {part} of {shown(path)} does not fit: {'; '.join(problems)}. Choose the classes, channels, "
            "backbone and neck that it was trained with"
        )
    if norms:
        print_main(f"note: {path} has no norms in its {part}: they start untrained")
