"""The language of `--reg` and `--measure`: "level.measure[:options][@layers]=coef".

    patch.cosine@last=0.5        patch.contrastive:tau=0.1@first:last=0.5      patch.mixing=1
    attn.cosine@0=1e-4           weight.cno@all=5e-4                           patch.cosine:abs@0,6-11=0.1

A spec names a measure, a level (what the items are) and layers. The value of a term is the sum over its layers
(for weights: over all matrices of its layers), each the mean over the images. Layers are 'first', 'last', 'all',
a block's number, a range 'a-b', or several of these with commas; measures across layers take two of them with a
colon. For patches 'first' is the input of block 0, 'embed' the patch embeddings before their positions are added,
and 'norm' the final features, final norm included. Options are words or numbers ('tau=0.1'), with commas; the
coefficient stands after the last '='.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from errors import UserError, did_you_mean
from layers import ENDS, canonical, is_selector, resolve_layers
from regularizers.level import Level
from regularizers.levels import LEVELS
from regularizers.measures import MEASURES, OPTIONS
from regularizers.registry import Measure

# The reference's five flags, and the specs they spell.
REFERENCE_FLAGS: Mapping[str, str] = {
    "mixing_coef": "patch.mixing",
    "emb_cos_within_coef": "patch.cosine@last",
    "emb_contrast_cross_coef": "patch.contrastive@first:last",
    "attn_cos_within_coef": "attn.cosine@0",
    "weight_mha_cond_orth_coef": "weight.cno@all",
}


_TERM = r"(?P<term>[^:@=]+)(?::(?P<options>[^@]*))?(?:@(?P<layers>[^=]*))?"


@dataclass(frozen=True)
class Spec:
    """A parsed spec. `name` is its canonical text without the coefficient: equal names are the same term."""

    level: str
    measure: str
    options: tuple[str, ...]  # words, and numbers as in 'tau=0.1'
    layers: str
    coef: float
    matrices: tuple[str, ...] = ()  # of weights, where they are not the level's default

    @property
    def name(self) -> str:
        chosen = [*self.options, *self.matrices]
        options = ":" + ",".join(chosen) if chosen else ""
        layers = "" if MEASURES[self.measure].takes == "labels" else f"@{self.layers}"
        return f"{self.level}.{self.measure}{options}{layers}"

    @property
    def arguments(self) -> dict[str, Any]:
        """What the measure is called with: the level's own arguments, and what the options set."""
        level = LEVELS[self.level]
        return {**level.default_arguments.get(self.measure, {}), **dict(map(_argument, self.options))}


def all_names() -> list[str]:
    """Every level.measure that exists."""
    return [f"{level}.{name}" for name, measure in MEASURES.items() for level in measure.levels]


def parse_spec(text: str, with_coef: bool = True) -> Spec:
    """Parse "level.measure[:options][@layers]=coef"; without `with_coef`, the same with no "=coef".

    Raises:
        UserError: malformed, or an unknown level, measure, option or layer.
    """
    form = "level.measure[:options][@layers]" + ("=coef" if with_coef else "")
    match = re.fullmatch(_TERM + (r"=(?P<coef>.*)" if with_coef else ""), text.strip())
    if match is None:
        raise UserError(f"malformed regularizer {text!r}: write {form}, e.g. {_example(with_coef)}")
    term = match["term"].strip()
    if term not in all_names():
        raise UserError(f"unknown regularizer {term!r}.{did_you_mean(term, all_names())} Known: {_summary()}")
    coef = _coefficient(match["coef"], text) if with_coef else 1.0
    level_name, _, name = term.partition(".")
    level, measure = LEVELS[level_name], MEASURES[name]
    if not with_coef and measure.takes in ("gradient", "labels"):
        raise UserError(f"{text!r} depends on the training labels: it can be trained on (--reg), not measured")
    words = match["options"].split(",") if match["options"] is not None else []
    if measure.takes == "labels":
        _check_labelled(term, measure, words, match["layers"], text)
    matrices = tuple(matrix for matrix in level.matrices if matrix in words)
    options = _canonical_options(level, name, [word for word in words if word not in matrices], text)
    layers = match["layers"] if match["layers"] is not None else level.layers_without_choice(name, measure.takes)
    _check_layers(layers, level, measure.takes, text)
    layers = canonical(layers)
    return Spec(level_name, name, options, layers, coef, () if matrices == level.default_matrices else matrices)


def _check_labelled(term: str, measure: Measure, words: Sequence[str], layers: str | None, spec: str) -> None:
    """A term that takes labels has no layers to choose."""
    if layers not in (None, "last") or (words and not measure.options):
        options = "" if measure.options else "takes no options and "
        raise UserError(f"{spec!r}: {term} {options}works on the last block's patches")


def _canonical_options(level: Level, name: str, words: Sequence[str], spec: str) -> tuple[str, ...]:
    """The options that change something, in one order and each in one spelling."""
    defaults = {**MEASURES[name].defaults, **level.default_arguments.get(name, {})}
    chosen: dict[str, str] = {}  # argument -> option
    for word in words:
        option = _checked(word, level, name, spec)
        argument, _ = _argument(option)
        if argument in chosen and "=" in option:
            raise UserError(f"{spec!r}: {option.partition('=')[0]} is given twice")
        if chosen.setdefault(argument, option) != option:
            raise UserError(f"{spec!r}: {chosen[argument]} and {option} contradict each other")
    changing = [option for option in chosen.values() if _argument(option) not in defaults.items()]
    return tuple(sorted(changing, key=lambda option: list(OPTIONS).index(option.partition("=")[0])))


def _checked(word: str, level: Level, name: str, spec: str) -> str:
    """An option of a measure in its one spelling."""
    option, equals, number = word.partition("=")
    if option not in MEASURES[name].options:
        known = ", ".join(OPTIONS[each].written(each) for each in MEASURES[name].options) or "none"
        known += f"; its matrices: {', '.join(level.matrices)}" if level.matrices else ""
        raise UserError(f"{spec!r}: {name} has no option {option!r}; its options: {known}")
    if OPTIONS[option].value is not None:
        if equals:
            raise UserError(f"{spec!r}: the option {option} takes no number")
        return option
    above = OPTIONS[option].above
    try:
        value = float(number)
    except ValueError as error:
        instead = f", not {number!r}" if number else ""
        raise UserError(f"{spec!r}: the option {option} takes a number, as in {option}=0.1{instead}") from error
    if not (math.isfinite(value) and value > above):
        limit = f" and greater than {above:g}" if math.isfinite(above) else ""
        raise UserError(f"{spec!r}: {option} must be finite{limit}")
    return f"{option}={value!r}"


def _argument(option: str) -> tuple[str, bool | float]:
    """The keyword argument that an option sets, and to what."""
    name, _, number = option.partition("=")
    value = OPTIONS[name].value
    return OPTIONS[name].argument, float(number) if value is None else value


def _example(with_coef: bool) -> str:
    return "patch.cosine@last=0.5" if with_coef else "patch.cosine@last"


def _summary() -> str:
    """'patch.{cosine, ...}, attn.{...}, weight.{...}', for error messages."""
    parts = []
    for level in LEVELS:
        names = [name for name, measure in MEASURES.items() if level in measure.levels]
        parts.append(f"{level}.{{{', '.join(names)}}}")
    return ", ".join(parts)


def _coefficient(text: str, spec: str) -> float:
    try:
        value = float(text)
    except ValueError as error:
        hint = "; the coefficient stands last" if "@" in text else ""
        raise UserError(f"malformed regularizer {spec!r}: {text!r} is not a number{hint}") from error
    if not (torch.isfinite(torch.tensor(value)) and value >= 0):
        raise UserError(f"{spec!r}: the coefficient must be finite and not negative")
    return value


def _check_layers(layers: str, level: Level, takes: str, spec: str) -> None:
    sides = layers.split(":")
    ends = [part for side in sides for part in side.split(",") if part in ENDS]
    if ends and not level.ends:
        raise UserError(f"{spec!r}: the layer {ends[0]} has patches alone, no {level.name} terms: choose blocks")
    if not all(map(is_selector, sides)):
        words = ["first", "last", "all", *(ENDS if level.ends else ())]
        raise UserError(
            f"malformed layers {layers!r} in {spec!r}: write {', '.join(words)}, a block's number, a range a-b, or "
            "several with commas"
        )
    if (len(sides) == 2) != (takes == "pair") or len(sides) > 2:
        want = "two sides with a colon, e.g. @first:last" if takes == "pair" else "one side, e.g. @last"
        raise UserError(f"{spec!r}: this measure takes {want}")
    if takes == "gradient" and layers != "last":
        raise UserError(f"{spec!r}: the gradient of the label loss is taken at the last block only (@last)")


def resolve_pairs(selector: str, depth: int, first: int, spec: str) -> list[tuple[int, int]]:
    left, right = (resolve_layers(side, depth, first, spec) for side in selector.split(":"))
    if len(left) == 1 or len(right) == 1:
        return [(a, b) for a in left for b in right]
    if len(left) != len(right):
        raise UserError(f"{spec!r}: {len(left)} layers against {len(right)}; give one, or equally many")
    return list(zip(left, right, strict=True))
