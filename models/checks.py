"""Whether what a model shows is what the terms take it for, which is tried on blank images."""

from __future__ import annotations

import math

import torch

from errors import UserError
from models.captured import Captured
from models.layout import Layout


def check_captured(
    captured: Captured, layout: Layout, image_size: tuple[int, int], whole_images: bool = False
) -> None:
    """Refuse what is not what the terms take it for.

    Args:
        image_size: height and width of the images that showed it.
        whole_images: whether the patch logits, which were made without labels, are one prediction an image.
    Raises:
        UserError: tokens that are no grid of patches after the prefix tokens, or maps that are no softmax.
    """
    for index, tokens in captured.tokens.items():
        patches = tokens.shape[1] - captured.prefix_tokens[index] if tokens.ndim == 3 else 0
        if not _is_grid(patches, layout, image_size):
            raise UserError(
                f"patch terms take the tokens of {layout.name} at layer {layout.layer_name(index)} for [B, N, D] "
                f"with {captured.prefix_tokens[index]} prefix tokens before a grid of patches, but they are "
                f"{list(tokens.shape)}: this family keeps its patches elsewhere and is not supported"
            )
    for index, attention in captured.attention.items():
        rows = attention.float().sum(dim=-1)
        has_numbers = not attention.is_meta
        sums = has_numbers and all(tap.sums_to_one for tap in layout.map_taps(index))
        if attention.ndim < 4 or (sums and not torch.allclose(rows, torch.ones_like(rows), atol=1e-2)):
            raise UserError(
                f"attention terms take the map of {layout.name} at block {index} for a softmax [..., H, n, m], but "
                f"it is {list(attention.shape)}, or its rows do not sum to 1: this family's attention is not "
                "supported; use patch or weight terms"
            )
    if captured.patch_logits is not None:
        height, width = layout.patch_size
        labelled, classes = _patches_of(layout, image_size), captured.logits.shape[1]
        if captured.patch_logits.shape[1:] != (1 if whole_images else labelled, classes):
            raise UserError(
                f"patch.mixing labels {labelled} patches of {height} x {width} pixels and {classes} classes, but "
                f"{layout.name} classifies {list(captured.patch_logits.shape[1:])}; drop patch.mixing"
            )
        if whole_images:
            there = captured.tokens[layout.depth].shape[1] - layout.final_prefix_tokens
            if there != labelled or not labelled:
                raise UserError(
                    f"patch.region_mixing labels {labelled} patches of {height} x {width} pixels, and "
                    f"{layout.name} has {there}: choose an --input-size of whole patches, another --model, or drop "
                    "the term"
                )


def _is_grid(patches: int, layout: Layout, image_size: tuple[int, int]) -> bool:
    """Whether that many patches can cover an image: a grid of its shape, or as many as the model has."""
    height, width = image_size
    rows = round(math.sqrt(max(patches, 0) * height / width))
    if rows and patches % rows == 0 and abs(patches // rows - rows * width / height) < 1:
        return True
    return patches == _patches_of(layout, image_size)


def _patches_of(layout: Layout, image_size: tuple[int, int]) -> int:
    """P, the patches of the last block in images of this height and width."""
    rows, columns = layout.grid(image_size)
    return rows * columns
