"""UperNet's heads against another library, and the loss of all pixels against a loop."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from segmenters import CLASSES, bilinear, images, randomised
from torch import Tensor
from torch.export import Dim
from transformers.models.upernet.modeling_upernet import UperNetFCNHead, UperNetHead

from segmentation.heads import AdaptiveMean, FCNHead, LinearHead, UperHead, pixel_cross_entropy


@pytest.mark.parametrize("training", [True, False])
def test_heads_are_transformers(training: bool) -> None:
    widths, channels = [4, 6, 8, 10], 5
    config = SimpleNamespace(
        pool_scales=(1, 2, 3, 6),
        hidden_size=channels,
        num_labels=CLASSES,
        auxiliary_in_channels=None,
        auxiliary_channels=channels,
        auxiliary_num_convs=1,
        auxiliary_concat_input=False,
    )
    sizes = [(21, 13), (11, 7), (6, 4), (3, 2)]
    maps = [images(*size)[:, :1].repeat(1, width, 1, 1) for size, width in zip(sizes, widths, strict=True)]
    for number, features in enumerate(maps):
        features += (
            images(*features.shape[-2:], seed=number)[:, :1] * torch.arange(features.shape[1])[:, None, None]
        )
    pairs = (
        (UperHead(widths, CLASSES, channels, dropout=0), UperNetHead(config, widths)),
        (FCNHead(widths[2], CLASSES, channels, dropout=0), UperNetFCNHead(config, widths)),
    )
    for ours, theirs in pairs:
        randomised(ours).train(training), theirs.double().train(training)
        renamed = {
            name.replace(".bn.", ".batch_norm.").replace("conv_seg", "classifier"): value
            for name, value in ours.state_dict().items()
        }
        theirs.load_state_dict(renamed, strict=True)
        torch.testing.assert_close(ours(maps), theirs(maps), rtol=1e-12, atol=1e-12)


def test_the_classifier_drops_whole_channels() -> None:
    head = FCNHead(4, CLASSES, 200, dropout=0.1).train()
    seen: list[Tensor] = []
    head.conv_seg.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    torch.manual_seed(0)
    head([torch.empty(0), torch.empty(0), 5 + torch.randn(8, 4, 3, 3)])
    nothing = seen[0].flatten(2) == 0
    gone = nothing.all(dim=-1)
    assert 0.05 < gone.double().mean() < 0.15


def test_linear_head_is_a_linear_function_of_normed_patches() -> None:
    head = randomised(LinearHead(6, CLASSES)).train()
    features = images(5, 4)[:, :1] * torch.arange(1, 7).view(1, 6, 1, 1) + images(5, 4, seed=2)[:, :1]
    mean, variance = features.mean(dim=(0, 2, 3)), features.var(dim=(0, 2, 3), unbiased=False)
    normed = (features - mean.view(-1, 1, 1)) / (variance + 1e-5).sqrt().view(-1, 1, 1)
    normed = normed * head.bn.weight.view(-1, 1, 1) + head.bn.bias.view(-1, 1, 1)
    expected = torch.einsum("bdhw,kd->bkhw", normed, head.conv_seg.weight.flatten(1))
    torch.testing.assert_close(head([features]), expected + head.conv_seg.bias.view(-1, 1, 1))


@pytest.mark.parametrize("cells", [1, 2, 3, 6])
def test_the_pooling_is_exported_for_any_size(cells: int) -> None:
    pool, dynamic = AdaptiveMean(cells), {2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    exported = torch.export.export(pool, (images(11, 7),), dynamic_shapes=(dynamic,)).module()
    for size in ((11, 7), (6, 6), (16, 32), (2, 5)):
        expected = F.adaptive_avg_pool2d(images(*size), cells)
        torch.testing.assert_close(pool(images(*size)), expected, rtol=0, atol=0)
        torch.testing.assert_close(exported(images(*size)), expected)


def test_loss_is_a_mean_over_all_pixels() -> None:
    logits = images(3, 4)
    masks = torch.randint(3, (2, 7, 9), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    masks[:, ::3] = 255
    total = 0.0
    for each, mask in zip(logits.numpy(), masks.numpy(), strict=True):
        up = bilinear(each, mask.shape)
        for row, column in np.ndindex(mask.shape):
            if mask[row, column] != 255:
                z = up[:, row, column]
                total += np.log(np.exp(z).sum()) - z[mask[row, column]]
    assert pixel_cross_entropy(logits, masks).item() == pytest.approx(total / masks.numel(), rel=1e-12)
    assert pixel_cross_entropy(logits.bfloat16(), masks).dtype == torch.float32
    assert pixel_cross_entropy(logits, torch.full_like(masks, 9), ignore_label=9) == 0
