"""Remedies for redundancy that are built into a model: `--remedy NAME[:OPTIONS][@LAYERS]`.

    attnscale    featscale:paper    gfsa:order=3@6-11    contranorm:scale=0.2,learnable    layerscale:init=0.1

Each is one file with one class, and one line in `KINDS`. It changes a stock timm model that is built already, in
place: nothing of it is rebuilt, its parameters keep their names, and those of the remedy are added beside them,
below `remedies` (or, for what timm has itself, under timm's names). So it works with any family that has the place.

Whatever is put into the backbone moves with it: hooks are bound to modules of the backbone, and nothing here knows
losses, the loop or the wrapper that shows maps. That one sees the map that is used.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from errors import UserError, did_you_mean
from layers import ENDS, canonical, is_selector, resolve_layers
from models.adapters import remedies_of
from models.layout import Layout, find_layout
from models.remedies.attending import MapRemedy
from models.remedies.attnscale import AttnScale
from models.remedies.contranorm import ContraNorm
from models.remedies.featscale import FeatScale
from models.remedies.gfsa import GFSA
from models.remedies.neutreno import NeuTRENO
from models.remedies.reattention import ReAttention
from models.remedies.talking_heads import TalkingHeads
from models.remedies.timms import Differential, LayerScaling, QKNorm, Registers, arguments, fold_layer_scale


class Remedy(Protocol):
    """What is put into a model.

    Attributes:
        name: what the command line calls it. Its options are the keyword-only arguments of its constructor or of
            `install`: a word switches on what is off, a number is given by its name.
    """

    name: str

    @classmethod
    def install(cls, layout: Layout, blocks: Sequence[int], **options: Any) -> None:
        """Put it into these blocks.

        Raises:
            UserError: it is not defined there, or an option is out of range.
        """


KINDS: tuple[Any, ...] = (
    *(AttnScale, FeatScale, GFSA, ContraNorm, NeuTRENO, ReAttention, TalkingHeads),
    *(LayerScaling, Registers, Differential, QKNorm),
)
REMEDIES: Mapping[str, type[Remedy]] = {kind.name: kind for kind in KINDS}


class Chosen(NamedTuple):
    """A remedy, its options where they are not the defaults, and its blocks. Its text is the canonical spec."""

    name: str
    options: tuple[tuple[str, bool | float | int], ...] = ()
    layers: str = "all"

    def __str__(self) -> str:
        words = [key if value is True else f"{key}={value!r}" for key, value in self.options]
        return (
            self.name
            + (":" + ",".join(words) if words else "")
            + ("" if self.layers == "all" else f"@{self.layers}")
        )

    @property
    def changes_tokens(self) -> bool:
        """Whether the model has other tokens with it, so that weights without it are loaded before."""
        return not getattr(REMEDIES[self.name], "of_blocks", True)

    @property
    def keeps_statistics(self) -> bool:
        """Whether training updates more than its parameters: the statistics of a batch norm."""
        return getattr(REMEDIES[self.name], "keeps_statistics", False)

    @property
    def not_recomputed(self) -> str:
        """Why a block with it cannot be recomputed in the backward pass; '' if it can."""
        return getattr(REMEDIES[self.name], "not_recomputed", "")

    def install(self, backbone: nn.Module) -> None:
        """Put it into a model, with initial values of its own.

        Raises:
            UserError: it is not defined for this model.
        """
        layout = find_layout(backbone)
        like = next(backbone.parameters())
        before = {id(part) for part in (*backbone.modules(), *_tensors(backbone))}
        blocks = resolve_layers(self.layers, layout.depth, 0, f"--remedy {self}")
        REMEDIES[self.name].install(layout, blocks, **dict(self.options))
        for module in backbone.modules():
            if id(module) not in before:
                module.training = backbone.training
        for tensor in _tensors(backbone):
            if id(tensor) not in before:
                tensor.data = tensor.data.to(
                    like.device, like.dtype if tensor.is_floating_point() else tensor.dtype
                )


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


# ------------------------------------------------------------------------------------------------------------
# The language of --remedy


def parse_remedy(text: str) -> Chosen:
    """Parse NAME[:OPTIONS][@LAYERS].

    Raises:
        UserError: malformed, or an unknown name, option or layer.
    """
    rest, at, layers = text.strip().partition("@")
    name, colon, words = rest.partition(":")
    if name not in REMEDIES:
        raise UserError(
            f"unknown remedy {name!r}.{did_you_mean(name, list(REMEDIES))} Known: {', '.join(REMEDIES)}"
        )
    if at and not (is_selector(layers) and set(layers.split(",")).isdisjoint(ENDS)):
        raise UserError(
            f"malformed layers {layers!r} in --remedy {text!r}: write first, last, all, a block's number, a range "
            "a-b, or several with commas"
        )
    if at and not getattr(REMEDIES[name], "of_blocks", True):
        raise UserError(f"--remedy {text!r}: {name} is not a matter of single blocks: leave out @{layers}")
    defaults = options_of(name)
    pairs = [_option(word, name, defaults, text) for word in words.split(",")] if colon else []
    given = dict(pairs)
    if len(given) < len(pairs):
        raise UserError(f"--remedy {text!r}: an option is given twice")
    changing = tuple((key, given[key]) for key in defaults if given.get(key, defaults[key]) != defaults[key])
    return Chosen(name, changing, canonical(layers) if at else "all")


def options_of(name: str) -> dict[str, Any]:
    """The options of a remedy and their defaults."""
    kind: Any = REMEDIES[name]
    return {
        parameter.name: parameter.default
        for function in (kind.__init__, kind.install)
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }


def _option(word: str, name: str, defaults: Mapping[str, Any], spec: str) -> tuple[str, Any]:
    """An option and its value."""
    key, equals, number = word.partition("=")
    if key not in defaults:
        written = (each if value is False else f"{each}=X" for each, value in defaults.items())
        raise UserError(
            f"--remedy {spec!r}: {name} has no option {key!r}; its options: {', '.join(written) or 'none'}"
        )
    kind = type(defaults[key])
    if kind is bool:
        if equals:
            raise UserError(f"--remedy {spec!r}: the option {key} takes no number")
        return key, True
    try:
        value = kind(number)
    except ValueError as error:
        what = "a whole number" if kind is int else "a number"
        raise UserError(f"--remedy {spec!r}: {key} takes {what}, as in {key}={defaults[key]!r}") from error
    if not math.isfinite(value):
        raise UserError(f"--remedy {spec!r}: {key} must be finite")
    return key, value


# ------------------------------------------------------------------------------------------------------------
# Several remedies in a model


def parse_remedies(texts: Sequence[str]) -> list[Chosen]:
    """Parse the remedies of a run.

    Raises:
        UserError: one is malformed, or given twice.
    """
    chosen = [parse_remedy(text) for text in texts]
    names = [each.name for each in chosen]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"--remedy {twice} is given twice: give it once, with all its layers (@0,3-5)")
    return chosen


def install_remedies(backbone: nn.Module, texts: Sequence[str]) -> None:
    """Put remedies into a model, one after the other. Random draws leave the global stream where it was.

    Raises:
        UserError: one of them is not defined for this model, which may have those before it by then.
    """
    with torch.random.fork_rng(devices=[]):
        for chosen in parse_remedies(texts):
            chosen.install(backbone)


def needs_map(attention: Any) -> bool:
    """Whether what is built into an attention module has no form without the map."""
    remedies = [remedy for remedy in remedies_of(attention) if isinstance(remedy, MapRemedy)]
    return any(remedy.needs_map for remedy in remedies) or bool(remedies and attention.attn_drop.p > 0)


class Timms(NamedTuple):
    """What of a model's remedies timm can be told.

    Attributes:
        arguments: of timm's constructor.
        beyond: the remedies that timm does not have.
    """

    arguments: dict[str, Any]
    beyond: list[str]


def fold_away(backbone: nn.Module, texts: Sequence[str]) -> Timms:
    """Fold into a model's weights what can be folded, and say what is left.

    Raises:
        UserError: a malformed remedy.
    """
    layout = find_layout(backbone) if texts else None
    told: dict[str, Any] = {}
    beyond = []
    for chosen in parse_remedies(texts):
        assert layout is not None
        if chosen.name == LayerScaling.name:
            fold_layer_scale(layout, resolve_layers(chosen.layers, layout.depth, 0, str(chosen)))
            continue
        own = arguments(chosen.name, dict(chosen.options), backbone) if chosen.layers == "all" else {}
        told |= own
        if not own:
            beyond.append(str(chosen))
    return Timms(told, beyond)
