"""A trained network for segmentation leaves the project: as an ONNX file or a PyTorch program.

Images [B, C, H, W] -> logits [B, K, H, W], as large as the image, of any number of images and, where the backbone
allows it, of any size. Files are written and compared by the root's export.py; timm has no segmentation, so its
format holds the backbone.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from export import Exported, to_onnx, to_torch
from export import export as export_backbone
from segmentation.features import Size
from segmentation.heads import resize
from segmentation.network import Segmenter
from segmentation.trained import TrainedSegmenter


class SegmenterOfPixels(nn.Module):
    """Logits of every pixel of whole images, which evaluation (`inference.Predictor`) takes the best class of.

    Args:
        network: gives logits at the resolution of its largest map.
    """

    def __init__(self, network: Segmenter) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> logits [B, K, H, W]"""
        return resize(self.network(images), images.shape[-2:])


def takes_any_size(network: Segmenter, size: Size | None = None) -> bool:
    """Whether a file is for images of any size; else for those of `size`, by default of the training crop's.

    It is not if a size is asked for, or positions are made for one size. Nor with windows: how many there are, and
    which patches at the border share one, depends on the image in a way that torch.export does not follow (in 7
    minutes it had not traced a Swin of 5 blocks, and had not failed either).
    """
    windows = any(hasattr(module, "window_size") for module in network.modules())
    return size is None and network.maps.only is None and not windows


def sizes_to_compare(network: Segmenter, trained_size: Size) -> list[Size]:
    """Heights and widths at which a file for any size is compared with the network; the first one is traced.

    That is not of whole patches: the graph would else keep nothing of the padding, and of the resize of its logits.
    The others are of whole patches, one patch (of the last stage), larger and odd, and what was trained on.
    """
    side = max(layer["reduction"] for layer in network.feature_info)
    return [
        (5 * side - 1, 7 * side - 1),
        (4 * side, 6 * side),
        (side, side),
        (3 * side + 1, 9 * side),
        trained_size,
    ]


def export(
    trained: TrainedSegmenter, folder: Path, form: str, opset: int | None = None, size: Size | None = None
) -> Exported:
    """Write one of FORMATS; 'timm' is the backbone alone.

    Args:
        form: 'timm', 'torch' or 'onnx'.
        opset: ONNX's operator set, torch's choice by default.
        size: height and width of the only images that the program is to take; by default see `takes_any_size`.
    Raises:
        UserError: as the root's to_timm, to_torch and to_onnx do; also for a size that the backbone does not take.
    """
    if form == "timm":
        return export_backbone(trained.backbone, folder, form)
    channels, *crop = trained.backbone.image_shape
    height, width = size or crop
    sizes = sizes_to_compare(trained.network, (height, width)) if takes_any_size(trained.network, size) else []
    shape, model = (channels, height, width), SegmenterOfPixels(trained.network)
    if form == "torch":
        return to_torch(model, folder, shape, trained.class_names, sizes)
    return to_onnx(model, folder, shape, opset, trained.class_names, sizes)
