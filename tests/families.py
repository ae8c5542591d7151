"""Tiny instances of timm's transformer families, and what their parts compute, written down a second time.

Nothing here uses models/layout.py, adapters.py or capture.py: tests/test_families.py compares them with this file.
`FAMILIES` says how each family is built and where it keeps its blocks; `attention_map` recomputes a block's
softmax from its attention module's parameters; `neurons` gives a block's linear layers as functions.

Legend: B images, P patches, T prefix tokens, N = P + T tokens, D width, H heads, d width of a head, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers import DiffAttention, RmsNormFp32
from timm.models import vision_transformer as vits
from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg
from timm.models.volo import VOLO
from torch import Tensor, nn

CLASSES = 5
IMAGES = 3  # not 2: the batch norm of two numbers is their sign

Stages = Callable[[Any], list[list[Any]]]
Classify = Callable[[Any, Tensor], Tensor]


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        make: builds the backbone.
        stages: backbone -> the blocks of each stage; one stage for models of one scale.
        sides: per block, the side of the square of patches that it returns.
        prefix: T of the input of block 0 (first) and of every block's output (all others).
        classify: backbone, final tokens of one patch each [M, D], before the final norm -> [M, K].
        pixels: side of the images.
        attends: whether attention maps can be captured.
        classifies: whether the head can classify single patches.
    """

    make: Callable[[], nn.Module]
    stages: Stages
    sides: tuple[int, ...]
    prefix: tuple[int, ...]
    classify: Classify
    pixels: int = 32
    attends: bool = True
    classifies: bool = True

    @property
    def depth(self) -> int:
        return len(self.sides)

    @property
    def one_scale(self) -> bool:
        """Whether the input of block 0 and the output of the last block have one shape."""
        return len(set(self.sides)) == 1

    def blocks(self, backbone: Any) -> list[Any]:
        return [block for stage in self.stages(backbone) for block in stage]

    def patches(self, layer: int) -> int:
        """P at the output of block `layer`; -1 is the input of block 0, which has the grid of its output."""
        return self.sides[max(layer, 0)] ** 2

    def images(self, seed: int = 1) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(IMAGES, 3, self.pixels, self.pixels, generator=generator, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------------
# What a head says about an image of one patch


def _by_first_token(backbone: Any, token: Tensor) -> Tensor:
    """The head reads token 0."""
    return backbone.forward_head(backbone.norm(token)[:, None])


def _by_pooling(backbone: Any, token: Tensor) -> Tensor:
    """The head pools what comes after the prefix tokens, whose values must not matter."""
    junk = torch.full((len(token), backbone.num_prefix_tokens, token.shape[1]), 7.0, dtype=token.dtype)
    return backbone.forward_head(torch.cat([junk, backbone.norm(token)[:, None]], dim=1))


def _by_two_heads(backbone: Any, token: Tensor) -> Tensor:
    """Distilled: the mean of what the class and the distillation token's heads say."""
    token = backbone.norm(token)
    return (backbone.head(token) + backbone.head_dist(token)) / 2


def _by_volo(backbone: Any, token: Tensor) -> Tensor:
    """The class token's head, and half of the best that the other head says of any patch."""
    token = backbone.norm(token)
    return backbone.head(token) + backbone.aux_head(token) / 2


def _by_xcit(backbone: Any, token: Tensor) -> Tensor:
    """The class-attention blocks also change the patches, each by itself."""
    for block in backbone.cls_attn_blocks:
        token = token + block.gamma1 * block.norm1(token)
        token = 2 * (block.norm2(token) if block.tokens_norm else token)
    return backbone.head(backbone.norm(token))


def _by_grid_of_one(backbone: Any, token: Tensor) -> Tensor:
    """Swin and deepseek: [M, 1, 1, D]."""
    norm = backbone.encoder.norm if hasattr(backbone, "encoder") else backbone.norm
    return backbone.forward_head(norm(token)[:, None, None])


def _by_swin_cr(backbone: Any, token: Tensor) -> Tensor:
    """The final norm belongs to the last block; the head takes [M, D, 1, 1]."""
    return backbone.forward_head(token[:, :, None, None])


def _by_pvt(backbone: Any, token: Tensor) -> Tensor:
    return backbone.forward_head(backbone.stages[-1].norm(token)[:, :, None, None])


def _by_twins(backbone: Any, token: Tensor) -> Tensor:
    return backbone.forward_head(backbone.norm(token)[:, None])


def _by_no_patch(backbone: Any, token: Tensor) -> Tensor:
    """Levit's head normalises over the batch: patches would change its statistics."""
    raise NotImplementedError


def _by_hiera(backbone: Any, token: Tensor) -> Tensor:
    return backbone.forward_head(token[:, None])


# ------------------------------------------------------------------------------------------------------------
# The families


def _plain_stages(backbone: Any) -> list[list[Any]]:
    return [list(backbone.blocks)]


def _nested_stages(backbone: Any) -> list[list[Any]]:
    stages = backbone.layers if hasattr(backbone, "layers") else backbone.stages
    return [list(stage.blocks) for stage in stages]


def _create(name: str, **arguments: Any) -> Callable[[], nn.Module]:
    return partial(timm.create_model, name, num_classes=CLASSES, **arguments)


def _plain(
    name: str, prefix: int = 1, classify: Classify = _by_first_token, heads: int = 3, **arguments: Any
) -> Family:
    """Three blocks of width 24 on 4 x 4 patches."""
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": heads, **arguments}
    return Family(_create(name, **sizes), _plain_stages, (4, 4, 4), (prefix,) * 4, classify)


def _pyramid(name: str, classify: Classify, stages: Stages = _nested_stages, **arguments: Any) -> Family:
    """Two blocks on 8 x 8 patches, two on 4 x 4."""
    return Family(_create(name, **arguments), stages, (8, 8, 4, 4), (0,) * 5, classify)


def _naflex(prefix: int, classify: Classify, **arguments: Any) -> Family:
    sizes = {"patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "pos_embed_grid_size": (4, 4)}
    make = _create("naflexvit_base_patch16_gap", **{**sizes, **arguments})
    return Family(make, _plain_stages, (4, 4, 4), (prefix,) * 4, classify)


def _swin(name: str, classify: Classify) -> Family:
    return _pyramid(
        name, classify, img_size=32, patch_size=4, embed_dim=12, depths=(2, 2), num_heads=(2, 3), window_size=4
    )


def _twins(name: str, **arguments: Any) -> Family:
    sizes = {"embed_dims": (8, 16), "num_heads": (2, 2), "mlp_ratios": (2, 2), "sr_ratios": (2, 1)}
    return _pyramid(
        name,
        _by_twins,
        lambda backbone: [list(stage) for stage in backbone.blocks],
        img_size=32,
        depths=(2, 2),
        **sizes,
        **arguments,
    )


def _pvt(**arguments: Any) -> Family:
    sizes = {"embed_dims": (8, 16), "num_heads": (2, 2), "mlp_ratios": (2, 2), "sr_ratios": (2, 1)}
    return _pyramid("pvt_v2_b0", _by_pvt, depths=(2, 2), **sizes, **arguments)


def _levit(name: str) -> Family:
    make = _create(name, img_size=64, stem_type="s8", embed_dim=(16, 24), key_dim=8, num_heads=(2, 3), depth=(2, 2))
    return Family(make, _nested_stages, (8, 8, 4, 4), (0,) * 5, _by_no_patch, 64, attends=False, classifies=False)


def _hiera(**arguments: Any) -> Family:
    make = _create("hiera_tiny_224", img_size=64, embed_dim=12, num_heads=1, stages=(1, 2, 1, 1), **arguments)
    return Family(
        make,
        lambda backbone: [
            list(backbone.blocks[end - length + 1 : end + 1])
            for end, length in zip(backbone.stage_ends, (1, 2, 1, 1), strict=True)
        ],
        (16, 8, 8, 4, 2),
        (0,) * 6,
        _by_hiera,
        64,
        attends=False,
    )


def _mvit(cls: bool) -> Family:
    config = MultiScaleVitCfg(
        depths=(1, 2), embed_dim=8, num_heads=1, stride_q=((1, 1), (2, 2)), use_cls_token=cls, norm_eps=1e-6
    )
    make = partial(MultiScaleVit, config, img_size=32, num_classes=CLASSES)
    classify = _by_first_token if cls else _by_pooling
    return Family(make, _nested_stages, (8, 4, 4), (int(cls),) * 4, classify, attends=False)


def _volo() -> Family:
    make = partial(
        VOLO,
        layers=(2, 2),
        img_size=32,
        num_classes=CLASSES,
        patch_size=4,
        stem_hidden_dim=8,
        embed_dims=(12, 24),
        num_heads=(2, 3),
        downsamples=(True, False),
        outlook_attention=(True, False),
    )
    stages = [0, 2]  # the down-sampling lies between them
    return Family(
        make,
        lambda backbone: [list(backbone.network[i]) for i in stages],
        (8, 8, 4, 4),
        (0,) * 5,
        _by_volo,
    )


def _tnt() -> Family:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads_outer": 3}
    make = _create("tnt_s_patch16_224", inner_dim=8, num_heads_inner=2, **sizes)
    return Family(make, _plain_stages, (4, 4, 4), (1,) * 4, _by_first_token)


def _convit() -> Family:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 8, "depth": 3, "num_heads": 4}
    make = _create("convit_tiny", local_up_to_layer=2, **sizes)  # the class token joins before block 2
    return Family(make, _plain_stages, (4, 4, 4), (0, 0, 0, 1), _by_first_token)


def _deepseek() -> Family:
    sizes = {"img_size": 28, "patch_size": 7, "embed_dim": 24, "depth": 3, "num_heads": 3}
    make = _create("deepseek_vit_412m", **sizes)
    return Family(make, lambda backbone: [list(backbone.encoder.blocks)], (4, 4, 4), (0,) * 4, _by_grid_of_one, 28)


class _DiffAttention(DiffAttention):
    """With the parameters that timm does not round to float32."""

    def __init__(self, *args: Any, **arguments: Any) -> None:
        super().__init__(*args, dual_lambda=True, **arguments)


FAMILIES: dict[str, Family] = {
    "vit": _plain("vit_tiny_patch16_224"),
    "vit_qk_norm": _plain("vit_tiny_patch16_224", qk_norm=True),
    "vit_avg": _plain("vit_tiny_patch16_224", classify=_by_pooling, global_pool="avg"),
    "vit_gap": _plain("vit_tiny_patch16_224", 0, _by_pooling, global_pool="avg", class_token=False),
    "vit_max": _plain("vit_tiny_patch16_224", classify=_by_pooling, global_pool="max"),
    "vit_map": _plain("vit_tiny_patch16_224", classify=_by_pooling, global_pool="map"),
    "vit_diff": _plain("vit_tiny_patch16_224", attn_layer=_DiffAttention, qk_norm=True),
    "vit_parallel": _plain("vit_tiny_patch16_224", block_fn=vits.ParallelScalingBlock, qk_norm=True),
    "vit_parallel_diff": _plain(
        "vit_tiny_patch16_224", block_fn=partial(vits.DiffParallelScalingBlock, dual_lambda=True)
    ),
    "vit_parallel_things": _plain("vit_tiny_patch16_224", block_fn=vits.ParallelThingsBlock),
    "deit": _plain("deit_tiny_patch16_224"),
    "deit_distilled": _plain("deit_tiny_distilled_patch16_224", 2, _by_two_heads),
    "deit3": _plain("deit3_small_patch16_224"),
    "beit": _plain("beit_base_patch16_224", classify=_by_pooling),
    "beit_shared": _plain(
        "beit_base_patch16_224", classify=_by_pooling, use_rel_pos_bias=False, use_shared_rel_pos_bias=True
    ),
    "beitv2": _plain("beitv2_base_patch16_224", classify=_by_pooling),
    "eva": _plain("eva_giant_patch14_224", classify=_by_pooling),
    "eva02": _plain("eva02_tiny_patch14_224", classify=_by_pooling),
    "eva02_base": _plain("eva02_base_patch14_224", classify=_by_pooling),
    "eva_grouped": _plain(
        "eva02_base_patch14_224",
        1,
        _by_pooling,
        heads=4,
        embed_dim=32,
        num_kv_heads=2,
        attn_type="rope",
        qk_norm=True,
    ),
    "dinov2": _plain("vit_small_patch14_dinov2"),
    "dinov2_reg": _plain("vit_small_patch14_reg4_dinov2", 5),
    "dinov3": _plain("vit_small_patch16_dinov3", 5, _by_pooling),
    "siglip": _plain("vit_base_patch16_siglip_224", 0, _by_pooling),
    "siglip_gap": _plain("vit_base_patch16_siglip_gap_224", 0, _by_pooling),
    "relpos": _plain("vit_relpos_small_patch16_224", 0, _by_pooling),
    "relpos_cls": _plain("vit_relpos_base_patch16_cls_224"),
    "relpos_shared": _plain("vit_srelpos_small_patch16_224", 0, _by_pooling),
    "relpos_bias": _plain("vit_relpos_base_patch16_cls_224", rel_pos_type="bias"),
    "naflex": _naflex(4, _by_pooling),
    "naflex_cls": _naflex(3, _by_first_token, class_token=True, reg_tokens=2, global_pool="token", fc_norm=False),
    "naflex_map": _naflex(1, _by_pooling, reg_tokens=1, global_pool="map", fc_norm=False),
    "naflex_rope": _naflex(4, _by_pooling, rope_type="axial", swiglu_mlp=True),
    "cait": _plain("cait_xxs24_224", 0),
    "convit": _convit(),
    "xcit": _plain("xcit_nano_12_p16_224", 0, _by_xcit),
    "xcit_tokens_norm": _plain("xcit_tiny_12_p16_224", 0, _by_xcit),
    "tnt": _tnt(),
    "deepseek": _deepseek(),
    "swin": _swin("swin_tiny_patch4_window7_224", _by_grid_of_one),
    "swinv2": _swin("swinv2_tiny_window8_256", _by_grid_of_one),
    "swinv2_cr": _swin("swinv2_cr_tiny_ns_224", _by_swin_cr),
    "pvt_v2": _pvt(),
    "pvt_v2_linear": _pvt(linear=True),
    "twins_svt": _twins("twins_svt_small", wss=(3, 2)),  # 8 x 8 patches in windows of 3 x 3: padded
    "twins_pcpvt": _twins("twins_pcpvt_small"),
    "volo": _volo(),
    "levit": _levit("levit_128s"),
    "levit_conv": _levit("levit_conv_128s"),
    "hiera": _hiera(),
    "mvitv2": _mvit(cls=False),
    "mvitv2_cls": _mvit(cls=True),
}


class _RmsNorm(nn.Module):
    """RmsNormFp32 without its rounding to float32."""

    def __init__(self, norm: RmsNormFp32) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        x = x * (x.square().mean(dim=-1, keepdim=True) + self.eps).rsqrt()
        return x if self.weight is None else x * self.weight


def build(name: str, seed: int = 0) -> Any:
    """A family's backbone in float64 and eval mode, with random values wherever timm starts from a constant."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = FAMILIES[name].make().double().eval()
    for module in list(backbone.modules()):
        for child_name, child in module.named_children():
            if isinstance(child, RmsNormFp32):
                setattr(module, child_name, _RmsNorm(child))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in backbone.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 2 else 0
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(noise * (fan_in**-0.5 if fan_in > 25 else 0.2))
        for buffer_name, buffer in backbone.named_buffers():
            if buffer_name.endswith("running_mean"):
                buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator, dtype=torch.float64))
            if buffer_name.endswith("running_var"):
                buffer.copy_((0.4 * torch.randn(buffer.shape, generator=generator, dtype=torch.float64)).exp())
    return backbone


# ------------------------------------------------------------------------------------------------------------
# Watching a model with hooks of our own


def attentions_of(block: Any) -> list[Any]:
    """The attention among the patches (in tnt the outer one); several side by side; or the block that is one."""
    if hasattr(block, "attns"):
        return [branch.attn for branch in block.attns]
    if hasattr(block, "in_split"):
        return [block]
    return [block.attn_out if hasattr(block, "attn_out") else block.attn]


def as_tokens(value: Tensor | tuple[Tensor, ...], block: Any) -> Tensor:
    """What a block takes or returns, as [B, N, D]: grids row by row, the patch stream where there are two."""
    if isinstance(value, tuple):
        value = value[1] if hasattr(block, "attn_out") else value[0]
    if value.ndim == 4:
        value = (value.permute(0, 2, 3, 1) if hasattr(block.attn, "use_conv") else value).flatten(1, 2)
    return value


Call = tuple[tuple[Any, ...], dict[str, Any]]  # the arguments of a module


@contextmanager
def watched(blocks: list[Any]) -> Iterator[tuple[dict[int, Tensor], dict[int, list[Call]]]]:
    """The tokens (-1: input of block 0), and the arguments of each block's attentions, of one forward pass."""
    tokens: dict[int, Tensor] = {}
    calls: dict[int, list[Call]] = {index: [] for index in range(len(blocks))}

    def entering(block: Any, args: tuple) -> None:
        tokens[-1] = as_tokens(args, block)

    handles = [blocks[0].register_forward_pre_hook(entering)]
    for index, block in enumerate(blocks):

        def leaving(block: Any, args: tuple, output: Any, index: int = index) -> None:
            tokens[index] = as_tokens(output, block)

        def attending(module: Any, args: tuple, kwargs: dict, index: int = index) -> None:
            calls[index].append((args, kwargs))

        handles.append(block.register_forward_hook(leaving))
        handles += [m.register_forward_pre_hook(attending, with_kwargs=True) for m in attentions_of(block)]
    try:
        yield tokens, calls
    finally:
        for handle in handles:
            handle.remove()


# ------------------------------------------------------------------------------------------------------------
# Projections


def _linear(layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b of an nn.Linear or a 1 x 1 convolution.  [..., d] -> [..., n]"""
    bias = layer.bias if bias is None else bias
    y = x @ layer.weight.flatten(1).T
    return y if bias is None else y + bias


def _heads(y: Tensor, parts: int, heads: int) -> list[Tensor]:
    """[..., n, parts * H * d] -> parts x [..., H, n, d]"""
    return [part.transpose(-3, -2) for part in y.unflatten(-1, (parts, heads, -1)).unbind(-3)]


def _interleaved(layer: Any, x: Tensor, attn: Any) -> list[Tensor]:
    """Levit: per head first q, then k, then v; without the batch norm that follows."""
    y = _linear(layer.linear, x).unflatten(-1, (attn.num_heads, -1)).transpose(-3, -2)
    return list(y.split([attn.key_dim, attn.key_dim, attn.val_dim], dim=-1))


def qkv(attn: Any, x: Tensor, source: Tensor | None = None) -> list[Tensor]:
    """Queries, keys and values [..., H, n, d] of tokens x [..., n, D]; keys and values are of `source` if given."""
    heads = attn.heads if hasattr(attn, "heads") else attn.num_heads
    source = x if source is None else source
    if hasattr(attn, "in_split"):
        q, k, v = _linear(attn.in_proj, x).split(attn.in_split, dim=-1)[1:]
        pairs = 2 if hasattr(attn, "lambda_init") else 1
        return [_heads(q, 1, pairs * heads)[0], _heads(k, 1, pairs * heads)[0], _heads(v, 1, heads)[0]]
    if hasattr(attn, "lambda_init"):  # differential attention: two queries and keys to a value
        q, k, v = _linear(attn.qkv, x).chunk(3, dim=-1)
        return [_heads(q, 1, 2 * heads)[0], _heads(k, 1, 2 * heads)[0], _heads(v, 1, heads)[0]]
    if hasattr(attn, "attention_biases"):
        return _interleaved(attn.qkv, x, attn)
    if hasattr(attn, "qk"):
        return [*_heads(_linear(attn.qk, x), 2, heads), *_heads(_linear(attn.v, x), 1, heads)]
    if hasattr(attn, "kv"):
        return [*_heads(_linear(attn.q, x), 1, heads), *_heads(_linear(attn.kv, source), 2, heads)]
    if getattr(attn, "qkv", None) is None:
        grouped = getattr(attn, "num_kv_heads", heads)
        counts = (("q", heads), ("k", grouped), ("v", grouped))
        return [_heads(_linear(getattr(attn, f"{name}_proj"), x), 1, count)[0] for name, count in counts]
    bias = None
    if getattr(attn, "q_bias", None) is not None:
        bias = torch.cat([attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias])
    return _heads(_linear(attn.qkv, x, bias), 3, heads)


# ------------------------------------------------------------------------------------------------------------
# Attention maps


def _softmax(q: Tensor, k: Tensor, scale: float, bias: Tensor | float = 0.0) -> Tensor:
    """[..., H, n, d], [..., H, m, d] -> [..., H, n, m]"""
    return torch.softmax(torch.einsum("...nd,...md->...nm", q, k) * scale + bias, dim=-1)


def _offsets(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Rows and columns by which patch i lies after patch j.  Two of [P, P]"""
    index = torch.arange(height * width)
    row, column = index // width, index % width
    return row[:, None] - row[None, :], column[:, None] - column[None, :]


def _table_bias(table: Tensor, window: tuple[int, int], prefix: int) -> Tensor:
    """Relative position biases of a table [(2h-1)(2w-1) + 3, H], the last 3: from, to and at the class token."""
    rows, columns = _offsets(*window)
    patches = table[(rows + window[0] - 1) * (2 * window[1] - 1) + columns + window[1] - 1]  # [P, P, H]
    if not prefix:
        return patches.permute(2, 0, 1)
    n = len(patches) + 1
    bias = table[-1].expand(n, n, -1).clone()
    bias[0, 1:], bias[1:, 0], bias[1:, 1:] = table[-3], table[-2], patches
    return bias.permute(2, 0, 1)


def _relpos_bias(module: Any) -> Tensor:
    """timm.layers.RelPosBias, or RelPosMlp from its table of log coordinates.  [H, N, N]"""
    if hasattr(module, "relative_position_bias_table"):
        return _table_bias(module.relative_position_bias_table, module.window_size, module.prefix_tokens)
    (rows, columns), (height, width) = _offsets(*module.window_size), module.window_size
    hidden = F.relu(_linear(module.mlp.fc1, module.rel_coords_log[rows + height - 1, columns + width - 1]))
    bias = _linear(module.mlp.fc2, hidden).permute(2, 0, 1)
    bias = 16 * torch.sigmoid(bias) if module.mode == "swin" else bias
    return F.pad(bias, (module.prefix_tokens, 0, module.prefix_tokens, 0))


def _rotate(x: Tensor, rope: Tensor, half: bool, prefix: int) -> Tensor:
    """Turn the pairs (x_a, x_b) of every patch by its angle; prefix tokens stay."""
    sine, cosine = rope.chunk(2, dim=-1)
    before, x = x[..., :prefix, :], x[..., prefix:, :]
    if half:
        a, b = x.chunk(2, dim=-1)
        turned = torch.cat([-b, a], dim=-1)
    else:
        a, b = x[..., ::2], x[..., 1::2]
        turned = torch.stack([-b, a], dim=-1).flatten(-2)
    return torch.cat([before, x * cosine + turned * sine], dim=-2)


def _plain_map(
    block: Any,
    attn: Any,
    x: Tensor,
    rope: Tensor | None = None,
    attn_mask: Tensor | None = None,
    shared_rel_pos_bias: Tensor | None = None,
    shared_rel_pos: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """ViT, beit, eva, relpos, tnt, convit's last blocks; qk-norm, rope, grouped keys and biases as they come."""
    assert attn_mask is None and not is_causal
    q, k, _ = qkv(attn, attn.in_norm(x) if hasattr(attn, "in_norm") else x)
    if hasattr(attn, "q_norm"):
        q, k = attn.q_norm(q), attn.k_norm(k)
    if rope is not None:
        q, k = (_rotate(y, rope, attn.rotate_half, attn.num_prefix_tokens) for y in (q, k))
    k = k.repeat_interleave(q.shape[-3] // k.shape[-3], dim=-3)
    bias: Tensor | float = 0.0
    if getattr(attn, "relative_position_bias_table", None) is not None:
        bias = _table_bias(attn.relative_position_bias_table, attn.window_size, 1)
    elif getattr(attn, "rel_pos", None) is not None:
        bias = _relpos_bias(attn.rel_pos)
    shared = shared_rel_pos_bias if shared_rel_pos is None else shared_rel_pos
    return _softmax(q, k, q.shape[-1] ** -0.5, bias if shared is None else bias + shared)


def _talking_map(block: Any, attn: Any, x: Tensor) -> Tensor:
    """Cait: heads are mixed before the softmax (the mixing after it is not part of the map)."""
    q, k, _ = qkv(attn, x)
    scores = torch.einsum("bhnd,bhmd->bhnm", q, k) * q.shape[-1] ** -0.5
    mixed = torch.einsum("gh,bhnm->bgnm", attn.proj_l.weight, scores) + attn.proj_l.bias[:, None, None]
    return torch.softmax(mixed, dim=-1)


def _gated_map(block: Any, attn: Any, x: Tensor) -> Tensor:
    """Convit: a gate per head between content and position."""
    q, k, _ = qkv(attn, x)
    side = math.isqrt(x.shape[1])
    rows, columns = (-offset for offset in _offsets(side, side))
    features = torch.stack([columns, rows, rows**2 + columns**2], dim=-1).to(x)
    position = torch.softmax(_linear(attn.pos_proj, features).permute(2, 0, 1), dim=-1)
    gate = torch.sigmoid(attn.gating_param)[:, None, None]
    return (1 - gate) * _softmax(q, k, q.shape[-1] ** -0.5) + gate * position


def _channel_map(block: Any, attn: Any, x: Tensor) -> Tensor:
    """Xcit: between the d channels of a head."""
    q, k, _ = (y.mT / y.mT.norm(dim=-1, keepdim=True) for y in qkv(attn, x))
    return torch.softmax((q @ k.mT) * attn.temperature, dim=-1)


def _shift_mask(block: Any) -> Tensor | float:
    """-100 between tokens of a window that the cyclic shift took from opposite borders.  [W, 1, n, n]"""
    (h, w), (shift_h, shift_w) = block.window_size, block.shift_size
    if not (shift_h or shift_w):
        return 0.0
    height, width = block.input_resolution if hasattr(block, "input_resolution") else block.feat_size
    from_top = (torch.arange(height) >= height - shift_h).long()
    from_left = (torch.arange(width) >= width - shift_w).long()
    region = 2 * from_top[:, None] + from_left[None, :]  # [height, width]
    region = region.unfold(0, h, h).unfold(1, w, w).reshape(-1, h * w)  # [W, n]
    return -100.0 * (region[:, :, None] != region[:, None, :]).double()[:, None]


def _window_bias(attn: Any) -> Tensor:
    """Position biases [H, n, n] of swin's three versions."""
    h, w = attn.window_size
    if hasattr(attn, "relative_position_bias_table"):
        return _table_bias(attn.relative_position_bias_table, (h, w), 0)
    if hasattr(attn, "meta_mlp"):
        hidden = F.relu(_linear(attn.meta_mlp.fc1, attn.relative_coordinates_log))
        return _linear(attn.meta_mlp.fc2, hidden).T.unflatten(1, (h * w, h * w))
    rows, columns = _offsets(h, w)
    coordinates = attn.relative_coords_table[0, rows + h - 1, columns + w - 1]  # [n, n, 2]
    hidden = F.relu(_linear(attn.cpb_mlp[0], coordinates))
    return 16 * torch.sigmoid(_linear(attn.cpb_mlp[2], hidden).permute(2, 0, 1))


def _window_map(block: Any, attn: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Swin: x are windows [B * W, n, D]; the mask is our own."""
    q, k, _ = qkv(attn, x)
    if hasattr(attn, "logit_scale"):
        q, k = (y / y.norm(dim=-1, keepdim=True) for y in (q, k))
        scores = q @ k.mT * attn.logit_scale.clamp(max=math.log(100)).exp().reshape(-1, 1, 1)
    else:
        scores = q @ k.mT * q.shape[-1] ** -0.5
    scores = scores + _window_bias(attn)
    ours = _shift_mask(block)
    if isinstance(ours, Tensor):
        scores = (scores.unflatten(0, (-1, len(ours))) + ours).flatten(0, 1)
    return torch.softmax(scores, dim=-1)


def _reduced_map(block: Any, attn: Any, x: Tensor, size: tuple[int, int]) -> Tensor:
    """Pvt and twins: keys from a coarser grid.  [B, H, N, M]"""
    source = x
    if attn.sr is not None:
        grid = x.mT.unflatten(-1, tuple(size))
        pooled = getattr(attn, "pool", None) is not None
        grid = F.adaptive_avg_pool2d(grid, 7) if pooled else grid
        grid = F.conv2d(grid, attn.sr.weight, attn.sr.bias, stride=attn.sr.stride)
        source = F.layer_norm(grid.flatten(2).mT, grid.shape[1:2], attn.norm.weight, attn.norm.bias, attn.norm.eps)
        source = F.gelu(source) if pooled else source
    q, k, _ = qkv(attn, x, source)
    return _softmax(q, k, q.shape[-1] ** -0.5)


def _local_map(block: Any, attn: Any, x: Tensor, size: tuple[int, int]) -> Tensor:
    """Twins: non-overlapping windows, zeros beyond the border.  [B, W, H, n, n]"""
    (height, width), side = size, attn.ws
    grid = F.pad(x.unflatten(1, (height, width)), (0, 0, 0, -width % side, 0, -height % side))
    windows = grid.unfold(1, side, side).unfold(2, side, side)  # [B, rows, columns, D, side, side]
    q, k, _ = qkv(attn, windows.flatten(4).mT.flatten(1, 2))
    return _softmax(q, k, q.shape[-1] ** -0.5)


def _outlook_map(block: Any, attn: Any, x: Tensor) -> Tensor:
    """Volo's first stage: a map of a k x k neighbourhood from the mean of a cell.  [B, W, H, k * k, k * k]"""
    grid = F.avg_pool2d(x.permute(0, 3, 1, 2), attn.stride, attn.stride)
    scores = _linear(attn.attn, grid.flatten(2).mT)  # [B, W, H * k^4]
    area = attn.kernel_size**2
    scores = scores.unflatten(-1, (attn.num_heads, area, area))
    return torch.softmax(scores * (x.shape[-1] // attn.num_heads) ** -0.5, dim=-1)


def _grid_map(block: Any, attn: Any, x: Tensor) -> Tensor:
    """Volo's transformer blocks: NHWC."""
    q, k, _ = qkv(attn, x.flatten(1, 2))
    return _softmax(q, k, q.shape[-1] ** -0.5)


_MAPS: dict[str, Callable[..., Tensor]] = {
    "TalkingHeadAttn": _talking_map,
    "GPSA": _gated_map,
    "XCA": _channel_map,
    "WindowAttention": _window_map,
    "WindowMultiHeadAttention": _window_map,
    "GlobalSubSampleAttn": _reduced_map,
    "LocallyGroupedAttn": _local_map,
    "OutlookAttention": _outlook_map,
}


def _map_function(attn: Any) -> Callable[..., Tensor]:
    if type(attn).__module__.endswith("pvt_v2"):
        return _reduced_map
    if type(attn).__module__.endswith("volo") and type(attn).__name__ == "Attention":
        return _grid_map
    return _MAPS.get(type(attn).__name__, _plain_map)


def attention_map(block: Any, calls: list[Call]) -> Tensor:
    """The softmax of a block's attentions, called so, from the modules' parameters; side by side, head by head."""
    maps = [
        _map_function(attn)(block, attn, *args, **kwargs)
        for attn, (args, kwargs) in zip(attentions_of(block), calls, strict=True)
    ]
    return torch.cat(maps, dim=-3)


# ------------------------------------------------------------------------------------------------------------
# Neurons

Layer = tuple[int, Callable[[Tensor], Tensor]]  # width of the input, and the layer: [M, d] -> [M, n]


def _whole(layer: Any) -> Layer:
    layer = layer.linear if hasattr(layer, "linear") else layer  # levit: without its batch norm
    return layer.weight.shape[1], partial(_linear, layer)


def _part(attn: Any, which: int, width: int) -> Layer:
    def function(x: Tensor) -> Tensor:
        return qkv(attn, x)[which].transpose(-3, -2).flatten(-2)

    return width, function


def _half(layer: Any, which: int) -> Layer:
    return layer.weight.shape[1], lambda x: _linear(layer, x).chunk(2, dim=-1)[which]


def _attention_layers(attn: Any) -> dict[str, list[Layer]]:
    layers = {"proj": [_whole(attn.proj.ln if hasattr(attn.proj, "ln") else attn.proj)]}
    if type(attn).__name__ == "OutlookAttention":
        return {"v": [_whole(attn.v)], **layers}
    first = next(p for name, p in attn.named_parameters() if name.startswith("q") and p.ndim > 1)
    return {**{name: [_part(attn, i, first.shape[1])] for i, name in enumerate("qkv")}, **layers}


def _mlp_layers(mlp: Any) -> dict[str, list[Layer]]:
    kind = type(mlp).__name__
    if kind == "LevitMlp":
        return {"fc1": [_whole(mlp.ln1)], "fc2": [_whole(mlp.ln2)]}
    if kind == "SwiGLU":
        return {"fc1": [_whole(mlp.fc1_g), _whole(mlp.fc1_x)], "fc2": [_whole(mlp.fc2)]}
    if kind == "GluMlp":
        return {"fc1": [_half(mlp.fc1, 0), _half(mlp.fc1, 1)], "fc2": [_whole(mlp.fc2)]}
    return {"fc1": [_whole(mlp.fc1)], "fc2": [_whole(mlp.fc2)]}


def _joint_layers(block: Any) -> dict[str, list[Layer]]:
    """Attention and MLP share the layer before them, and perhaps the one after them."""
    width, hidden = block.in_proj.weight.shape[1], block.in_split[0]
    layers = {name: [_part(block, i, width)] for i, name in enumerate("qkv")}
    layers["fc1"] = [(width, lambda x: _linear(block.in_proj, x)[..., :hidden])]
    if block.out_proj is None:
        return {**layers, "proj": [_whole(block.attn_out_proj)], "fc2": [_whole(block.mlp_out_proj)]}
    layers["proj"] = [(width, lambda x: _linear(block.out_proj, F.pad(x, (0, hidden))))]
    layers["fc2"] = [(hidden, lambda x: _linear(block.out_proj, F.pad(x, (width, 0))))]
    return layers


def neurons(block: Any) -> dict[str, list[Layer]]:
    """The block's layers by name, affine functions; gated MLPs have two fc1: what is activated, then its factor."""
    if hasattr(block, "in_split"):
        return _joint_layers(block)
    mlps = [branch.mlp for branch in block.ffns] if hasattr(block, "ffns") else [block.mlp]
    parts = [_attention_layers(attn) for attn in attentions_of(block)] + [_mlp_layers(mlp) for mlp in mlps]
    return {name: [layer for part in parts for layer in part.get(name, [])] for part in parts for name in part}
