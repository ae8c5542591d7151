"""Remedies in every family: nothing but themselves is changed, both forms agree, and the map shown is the one used.

What a map should become is written down a second time here, as formulas of the softmax that tests/families.py
recomputes. tests/test_golden.py compares with the authors' own modules.
"""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import pytest
import torch
from families import FAMILIES, attention_map, build, watched
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from errors import UserError
from models import DiverseViT, Needs, build_model, find_layout
from models.remedies import REMEDIES, Chosen, install_remedies, options_of, parse_remedy
from options.flags import REMEDIES as NAMES

NO_MAP = {"levit", "levit_conv", "hiera", "mvitv2", "mvitv2_cls"}  # passed to no module
NO_TOKENS = {"xcit", "xcit_tokens_norm"}  # a map between channels
TWO_MAPS = {"vit_diff", "vit_parallel_diff"}
WINDOWS = {"swin", "swinv2", "swinv2_cr"}
STAGES = {"pvt_v2", "pvt_v2_linear", "twins_svt", "twins_pcpvt"}
IN_MAP = NO_MAP | NO_TOKENS | TWO_MAPS | {"volo"}
PLAIN = {"vit", "vit_avg", "vit_gap", "vit_max", "vit_map", "deit", "deit3", "siglip", "siglip_gap", "dinov2"}
# Remedy -> the families that it is not defined for.
REFUSED: dict[str, set[str]] = {
    "attnscale": IN_MAP,
    "gfsa": IN_MAP | STAGES,  # keys are reduced
    "reattention": IN_MAP,
    "talking_heads": IN_MAP | WINDOWS | {"cait", "convit"},
    "neutreno": IN_MAP | STAGES | WINDOWS | {"vit_parallel_things", "convit"},
    "featscale": {"vit_parallel", "vit_parallel_diff", "levit_conv", "mvitv2", "mvitv2_cls"},
    "contranorm": {"levit", "levit_conv"},
    "layerscale": set(FAMILIES)
    - PLAIN
    - {"vit_qk_norm", "vit_diff", "vit_parallel_things", "deit_distilled", "eva", "eva02", "eva02_base"}
    - {"eva_grouped", "hiera"}
    | {"deit3", "dinov2"},
    "registers": set(FAMILIES)
    - PLAIN
    - {"vit_qk_norm", "vit_diff", "vit_parallel", "vit_parallel_diff", "vit_parallel_things"}
    - {"eva", "eva02", "eva02_base", "eva_grouped"},
    "differential": set(FAMILIES)
    - PLAIN
    - {"vit_parallel_things", "deit_distilled", "dinov2_reg", "naflex"}
    - {"naflex_cls", "naflex_map"},
    "qk_norm": IN_MAP - {"vit_parallel_diff"}
    | STAGES
    | WINDOWS
    | {"vit_qk_norm", "vit_parallel", "beit", "beit_shared"}
    | {"beitv2", "eva_grouped", "cait", "convit", "tnt"},
}
# The spec with which a remedy changes nothing.
IDENTITY = {
    "attnscale": "attnscale",
    "gfsa": "gfsa",
    "featscale": "featscale",
    "contranorm": "contranorm:scale=0",
    "talking_heads": "talking_heads",
    "layerscale": "layerscale:init=1",
    "neutreno": "neutreno:weight=0",
}
NAIVE: dict[str, Callable[[Tensor, Any], Tensor]]


@cache
def stock(family: str) -> Any:
    return build(family)


def remedied(family: str, *specs: str) -> Any:
    backbone = copy.deepcopy(stock(family))
    install_remedies(backbone, specs)
    return backbone


def answers(backbone: nn.Module, family: str) -> Tensor:
    with torch.no_grad():
        output = backbone(FAMILIES[family].images())
    return output[0] if isinstance(output, tuple) else output


def shake(backbone: nn.Module, before: set[str]) -> None:
    """Random values for what a remedy has added."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, tensor in backbone.state_dict().items():
            if name not in before and tensor.is_floating_point():
                noise = 0.3 * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
                tensor.copy_(noise.exp() if name.endswith("running_var") else noise)


def defined(methods: Iterable[str]) -> list[tuple[str, str]]:
    return [(method, family) for method in methods for family in FAMILIES if family not in REFUSED[method]]


def test_the_command_line_knows_all() -> None:
    assert set(NAMES) == set(REMEDIES) == set(REFUSED)


# ------------------------------------------------------------------------------------------------------------
# Where they are defined


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", REMEDIES)
def test_defined_or_refused(method: str, family: str) -> None:
    """A remedy works for a family, or says in one line why not."""
    if (method, family) == ("qk_norm", "deepseek"):
        return  # tests/families.py puts norms of its own into it: see test_norms_of_the_blocks_kind
    try:
        answers(remedied(family, method), family)
    except UserError as error:
        assert family in REFUSED[method], error
        text = str(error)
        assert text.startswith(f"--remedy {method}") and "choose" in text.lower() and "\n" not in text
    else:
        assert family not in REFUSED[method]


@pytest.mark.parametrize(("method", "family"), defined(IDENTITY))
def test_identity(method: str, family: str) -> None:
    """At its initial value the stock model is what it was, bit for bit; without the fused kernel to 1e-12."""
    expected, found = answers(stock(family), family), answers(remedied(family, IDENTITY[method]), family)
    if method == "talking_heads":
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    else:
        assert torch.equal(found, expected)


# ------------------------------------------------------------------------------------------------------------
# What they compute


def _attnscale(a: Tensor, remedy: Any) -> Tensor:
    uniform = torch.full_like(a, 1 / a.shape[-1])
    return torch.stack(
        [
            uniform.select(-3, h) + (1 + float(w)) * (a.select(-3, h) - uniform.select(-3, h))
            for h, w in enumerate(remedy.lamb)
        ],
        dim=-3,
    )


def _gfsa(a: Tensor, remedy: Any) -> Tensor:
    """b is added to 1 at A and to 0 at the approximated fourth power."""
    parts = []
    for h, b in enumerate(remedy.lamb.tolist()):
        own = a.select(-3, h)
        parts.append(own + b * (own + 3 * (torch.einsum("...ij,...jk->...ik", own, own) - own)))
    return torch.stack(parts, dim=-3)


def _mix(a: Tensor, weight: Tensor) -> Tensor:
    return torch.stack(
        [sum(weight[g, h] * a.select(-3, h) for h in range(len(weight))) for g in range(len(weight))],  # type: ignore[misc]
        dim=-3,
    )


def _reattention(a: Tensor, remedy: Any) -> Tensor:
    norm, conv = remedy.var_norm, remedy.reatten_matrix
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    mixed = _mix(a, conv.weight[:, :, 0, 0]) + conv.bias[:, None, None]
    return (mixed - norm.running_mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]


def _talking_heads(a: Tensor, remedy: Any) -> Tensor:
    """Scores are logarithms of the map, up to a number a row, which no softmax sees."""
    return _mix(torch.softmax(_mix(a.log(), remedy.proj_pre.weight), dim=-1), remedy.proj_post.weight)


NAIVE = {
    "attnscale": _attnscale,
    "gfsa": _gfsa,
    "reattention": _reattention,
    "talking_heads": _talking_heads,
    "neutreno": lambda a, remedy: a,
}


@pytest.mark.parametrize(("method", "family"), defined(NAIVE))
def test_the_map_shown_is_the_map_used(method: str, family: str) -> None:
    """It is the formula's, of the softmax; the model with it in hand and the fused model agree."""
    backbone = remedied(family, method)
    shake(backbone, set(stock(family).state_dict()))
    fused = answers(backbone, family)
    layout = find_layout(backbone)
    every = Needs(attention=frozenset(range(layout.depth)))
    model = DiverseViT(backbone, Needs(), every)
    with watched(FAMILIES[family].blocks(backbone)) as (_, calls), torch.no_grad():
        captured = model.eval()(FAMILIES[family].images(), needs=every)
        for block, module in enumerate(layout.blocks):
            softmax = attention_map(module, calls[block])
            remedies = [attention.remedies[method] for attention in layout.attentions(block)]
            if (method, family) == ("reattention", "cait"):  # whose heads talk before it
                talk = module.attn.proj_w
                softmax = _mix(softmax, talk.weight) + talk.bias[:, None, None]
            parts = softmax.chunk(len(remedies), dim=-3)
            expected = torch.cat([NAIVE[method](*pair) for pair in zip(parts, remedies, strict=True)], dim=-3)
            torch.testing.assert_close(captured.attention[block], expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(captured.logits, fused, rtol=1e-10, atol=1e-12)
    model.unhook()
    assert torch.equal(answers(backbone, family), fused)


@pytest.mark.parametrize("method", ["featscale", "featscale:paper", "contranorm:dual", "contranorm:learnable"])
def test_what_is_put_around_attention_and_norms(method: str) -> None:
    """Watched from outside in Swin, whose tokens are grids and windows."""
    backbone = remedied("swin", method)
    shake(backbone, set(stock("swin").state_dict()))
    name = method.partition(":")[0]
    for module in [m for m in backbone.modules() if name in getattr(m, "remedies", {})]:
        remedy = module.remedies[name]
        x = torch.randn(2, 9, remedy.lamb1.shape[0] if name == "featscale" else module.weight.shape[0]).double()
        if name == "featscale":
            factor = 1 if method.endswith("paper") else 2
            mean = sum(x[:, i] for i in range(9)) / 9
            expected = (1 + factor * remedy.lamb1) * mean[:, None] + (1 + factor * remedy.lamb2) * (
                x - mean[:, None]
            )
            found = remedy.after_attention(module, (), x)
        else:
            u = x / x.norm(dim=-1, keepdim=True)
            weight = torch.softmax(torch.einsum("bid,bjd->bij", u, u), dim=2)
            if method.endswith("dual"):
                weight = weight + torch.softmax(torch.einsum("bid,bjd->bij", u, u), dim=1)
            scale = remedy.scale_param if method.endswith("learnable") else 0.1
            expected = x - scale * torch.einsum("bij,bjd->bid", weight, x)
            (found,) = remedy.before_norm(module, (x,))
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_they_follow_each_other() -> None:
    """GFSA takes the map that AttnScale leaves, fused and not; the other order is another model."""
    found = []
    for specs in (("attnscale", "gfsa"), ("gfsa", "attnscale")):
        backbone = remedied("vit", *specs)
        for block in backbone.blocks:
            with torch.no_grad():
                block.attn.remedies.attnscale.lamb.fill_(0.4)
                block.attn.remedies.gfsa.lamb.fill_(0.3)
        fused = answers(backbone, "vit")
        for block in backbone.blocks:
            block.attn.fused_attn = False
        torch.testing.assert_close(answers(backbone, "vit"), fused, rtol=1e-10, atol=1e-12)
        found.append(fused)
    assert not torch.allclose(*found)


@pytest.mark.parametrize("specs", [("neutreno", "reattention"), ("reattention", "neutreno")])
def test_what_is_added_comes_whatever_the_order(specs: tuple[str, str]) -> None:
    """NeuTRENO's difference, beside a map that is changed after dropout."""
    both = remedied("vit", *specs)
    shake(both, set(stock("vit").state_dict()))
    seen: dict[str, list[Tensor]] = {"qkv": [], "output": [], "map": []}
    hooks = []
    for block in both.blocks[:2]:
        used = block.attn.remedies.reattention.used
        hooks += [
            block.attn.qkv.register_forward_hook(lambda m, a, y: seen["qkv"].append(y)),
            used.register_forward_hook(lambda m, a, y: seen["map"].append(y)),
            block.attn.proj.register_forward_pre_hook(lambda m, a: seen["output"].append(a[0])),
        ]
    answers(both, "vit")
    for hook in hooks:
        hook.remove()
    first, second = (y.unflatten(-1, (3, 3, -1))[:, :, 2].flatten(2) for y in seen["qkv"])  # [B, N, D]
    heads = second.unflatten(-1, (3, -1)).transpose(1, 2)  # [B, H, N, d]
    attended = torch.einsum("bhnm,bhmd->bnhd", seen["map"][1], heads).flatten(2)
    torch.testing.assert_close(seen["output"][1], attended + 0.6 * (first - second), rtol=1e-10, atol=1e-12)


def test_it_is_given_before_something_looks_at_the_map() -> None:
    """Or terms would see the map before it, and taking them away would switch it off."""
    backbone = copy.deepcopy(stock("vit"))
    DiverseViT(backbone, Needs(attention=frozenset({0})))
    with pytest.raises(UserError, match="build remedies in before"):
        install_remedies(backbone, ["talking_heads"])
    install_remedies(backbone, ["featscale"])
    with pytest.raises(UserError, match="the model has the remedy featscale already"):
        install_remedies(backbone, ["featscale"])


def test_shifted_windows_keep_their_mask() -> None:
    """Talking heads are refused where a mask would be mixed; blocks without one have them."""
    with pytest.raises(UserError, match="of SwinTransformer: its shifted windows"):
        remedied("swin", "talking_heads")
    whole = [str(i) for i, block in enumerate(FAMILIES["swin"].blocks(stock("swin"))) if not any(block.shift_size)]
    assert whole
    found = answers(remedied("swin", f"talking_heads@{','.join(whole)}"), "swin")
    torch.testing.assert_close(found, answers(stock("swin"), "swin"), rtol=1e-12, atol=1e-12)


def test_dropped_entries_of_the_map_need_the_map() -> None:
    """With attention dropout a remedy leaves the fused kernel, which could not drop what it changes."""
    backbone = build_model("vit_tiny_patch16_224", depth=1, attn_drop_rate=0.5, num_classes=2)
    install_remedies(backbone, ["attnscale"])
    (block,) = backbone.blocks  # type: ignore[misc]
    assert not block.attn.fused_attn


# ------------------------------------------------------------------------------------------------------------
# Weights


@pytest.mark.parametrize("method", REMEDIES)
def test_stock_weights_keep_their_names(method: str) -> None:
    """A remedy adds parameters and changes none; the optimizer gives decay to matrices alone."""
    backbone = remedied("vit", method)
    before, after = stock("vit").state_dict(), backbone.state_dict()
    grown = {"pos_embed"} if method == "registers" else set()
    assert set(before) <= set(after)
    assert all(torch.equal(before[name], after[name]) for name in before if name not in grown)
    assert all(tensor.dtype == torch.float64 for name, tensor in after.items() if tensor.is_floating_point())
    optimizer = create_optimizer_v2(backbone, "adamw", weight_decay=0.1)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    names = {name for name, p in backbone.named_parameters() if name not in before and id(p) in decayed}
    kinds = {re.sub(r"blocks\.\d+\.", "", name) for name in names}
    assert kinds == {
        "reattention": {"attn.remedies.reattention.reatten_matrix.weight"},
        "talking_heads": {f"attn.remedies.talking_heads.proj_{part}.weight" for part in ("pre", "post")},
    }.get(method, set())


@pytest.mark.parametrize("method", REMEDIES)
def test_a_copy_is_a_model_of_its_own(method: str) -> None:
    """As an EMA needs it: hooks and values move with the copy."""
    backbone = remedied("vit", method)
    shake(backbone, set(stock("vit").state_dict()))
    twin = copy.deepcopy(backbone)
    expected = answers(backbone, "vit")
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.zero_()
    assert torch.equal(answers(twin, "vit"), expected)
    pickled = pickle.loads(pickle.dumps(twin))
    assert torch.equal(answers(pickled, "vit"), expected)
    twin.load_state_dict(backbone.state_dict())
    assert torch.equal(answers(twin, "vit"), answers(backbone, "vit"))


def test_random_draws_leave_the_stream() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    remedied("vit", "talking_heads:random", "reattention", "registers")
    assert torch.equal(torch.rand(3), expected)


VIT, DEIT3, DINOV2 = "vit_tiny_patch16_224", "deit3_small_patch16_224", "vit_small_patch14_dinov2"


@pytest.mark.parametrize(
    ("name", "spec", "options"),
    [
        *((name, "registers:count=3", {"reg_tokens": 3}) for name in (VIT, DEIT3, DINOV2)),
        *((name, "qk_norm", {"qk_norm": True}) for name in (VIT, DEIT3, DINOV2)),
        *((name, "differential", {"attn_layer": "diff"}) for name in (VIT, DEIT3, DINOV2)),
        (VIT, "layerscale:init=0.1", {"init_values": 0.1}),  # the others have it
    ],
)
def test_timms_own_are_timms(name: str, spec: str, options: dict[str, Any]) -> None:
    """The model is the one that timm builds when it is told so: its names, and its numbers."""
    sizes = {"depth": 2, "num_classes": 3, "embed_dim": 24, "num_heads": 2, "img_size": 28, "patch_size": 7}
    torch.manual_seed(0)
    backbone = build_model(name, **sizes)
    install_remedies(backbone, [spec])
    torch.manual_seed(1)
    timms = build_model(name, **{**sizes, **options})
    timms.load_state_dict(backbone.state_dict(), strict=True)
    images = torch.randn(2, 3, 28, 28)
    assert torch.equal(timms.eval()(images), backbone.eval()(images))


# ------------------------------------------------------------------------------------------------------------
# The language


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("gfsa:order=4", "gfsa"),
        ("contranorm:learnable,scale=0.20", "contranorm:scale=0.2,learnable"),
        ("attnscale@06-11,first", "attnscale@6-11,first"),
        ("featscale:paper@last", "featscale:paper@last"),
        (" registers:count=8", "registers:count=8"),
        ("neutreno@all", "neutreno"),
    ],
)
def test_parsing(text: str, canonical: str) -> None:
    assert str(parse_remedy(text)) == canonical
    assert parse_remedy(canonical) == parse_remedy(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("atnscale", "unknown remedy 'atnscale'. Did you mean attnscale or"),
        ("gfsa:power=3", "gfsa has no option 'power'; its options: order=X"),
        ("attnscale:x", "its options: none"),
        ("gfsa:order=2.5", "order takes a whole number, as in order=4"),
        ("contranorm:scale=many", "scale takes a number"),
        ("contranorm:scale=nan", "scale must be finite"),
        ("contranorm:dual=1", "the option dual takes no number"),
        ("contranorm:", "contranorm has no option ''"),
        ("attnscale@", "malformed layers ''"),
        ("attnscale@1:2", "malformed layers '1:2'"),
        ("registers@3", "registers is not a matter of single blocks: leave out @3"),
        ("", "unknown remedy ''"),
        ("contranorm:scale=0.1,scale=0.5", "an option is given twice"),
        ("contranorm:dual,dual", "an option is given twice"),
    ],
)
def test_what_is_mistyped(text: str, says: str) -> None:
    with pytest.raises(UserError, match=re.escape(says)):
        parse_remedy(text)


@pytest.mark.parametrize(
    ("specs", "says"),
    [
        (["attnscale", "attnscale@0"], "--remedy attnscale is given twice"),
        (["attnscale@7"], "layer 7 is out of range, the model has blocks 0 to 2"),
        (["attnscale@2-1"], "the range 2-1 is empty"),
        (["gfsa:order=1"], "must be 2 to 1000"),
        (["contranorm:scale=-1"], "scale=-1 must not be negative"),
        (["contranorm:tau=0"], "tau=0 at least 1e-06"),
        (["contranorm:positive"], "positive is for a learnable scale"),
        (["registers:count=0"], "give 1 to 1024"),
        (["layerscale", "layerscale:init=1"], "given twice"),
        (["differential", "qk_norm", "attnscale"], "two maps"),
        (["attnscale", "differential"], "changed by another remedy already"),
        (["neutreno@1"], "give at least two blocks"),
        (["featscale", "differential"], "changed by another remedy already"),
    ],
)
def test_what_cannot_be(specs: list[str], says: str) -> None:
    with pytest.raises(UserError, match=re.escape(says)):
        remedied("vit", *specs)


def test_norms_of_the_blocks_kind() -> None:
    backbone: Any = FAMILIES["deepseek"].make()
    install_remedies(backbone, ["qk_norm"])
    attention = backbone.encoder.blocks[0].attn
    assert type(attention.q_norm) is type(backbone.encoder.blocks[0].norm1)
    assert attention.q_norm.weight.shape == (attention.head_dim,)
    assert backbone(torch.randn(1, 3, 28, 28)).isfinite().all()


def test_some_blocks_only() -> None:
    backbone = remedied("vit", "attnscale@first,2")
    assert [hasattr(block.attn, "remedies") for block in backbone.blocks] == [True, False, True]
    assert str(Chosen("attnscale", (), "1")) == "attnscale@1" and options_of("gfsa") == {"order": 4}
