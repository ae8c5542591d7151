"""The language of `--reg` and `--measure`: "level.measure[:options][@layers]=coef".

    patch.cosine@last=0.5        patch.contrastive@first:last=0.5      patch.mixing=1
    attn.cosine@0=1e-4           weight.cno@all=5e-4                   patch.cosine:abs@0,6-11=0.1

A spec names a measure, a level (what the items are) and layers. The value of a term is the sum over its layers
(for weights: over all matrices of its layers), each the mean over the images. Layers are 'first', 'last', 'all',
a block's number, a range 'a-b', or several of these with commas; measures across layers take two of them with a
colon. For patches 'first' is the input of block 0.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch

from errors import UserError, did_you_mean
from models.adapters import MATRICES
from regularizers import attention, patch, weight
from regularizers.measures import MEASURES, OPTIONS

LEVELS: Mapping[str, ModuleType] = {"patch": patch, "attn": attention, "weight": weight}
MIXING = "patch.mixing"

# The reference's five flags, and the specs they spell.
REFERENCE_FLAGS: Mapping[str, str] = {
    "mixing_coef": MIXING,
    "emb_cos_within_coef": "patch.cosine@last",
    "emb_contrast_cross_coef": "patch.contrastive@first:last",
    "attn_cos_within_coef": "attn.cosine@0",
    "weight_mha_cond_orth_coef": "weight.cno@all",
}

_SPEC = re.compile(r"(?P<term>[^:@=]+)(?::(?P<options>[^@=]*))?(?:@(?P<layers>[^=]*))?(?:=(?P<coef>.*))?")


@dataclass(frozen=True)
class Spec:
    """A parsed spec. `name` is its canonical text without the coefficient: equal names are the same term."""

    level: str
    measure: str
    options: tuple[str, ...]
    layers: str
    coef: float
    matrices: tuple[str, ...] = weight.DEFAULT_MATRICES  # weight level only

    @property
    def name(self) -> str:
        if f"{self.level}.{self.measure}" == MIXING:
            return MIXING
        chosen = self.matrices if self.matrices != weight.DEFAULT_MATRICES else ()
        options = ":" + ",".join([*self.options, *chosen]) if self.options or chosen else ""
        return f"{self.level}.{self.measure}{options}@{self.layers}"


def all_names() -> list[str]:
    """Every level.measure that exists."""
    names = [f"{level}.{name}" for name, measure in MEASURES.items() for level in measure.levels]
    return [*names, MIXING]


def parse_spec(text: str, with_coef: bool = True) -> Spec:
    """Parse "level.measure[:options][@layers]=coef"; without `with_coef`, the same with no "=coef".

    Raises:
        UserError: malformed, or an unknown level, measure, option or layer.
    """
    form = "level.measure[:options][@layers]" + ("=coef" if with_coef else "")
    match = _SPEC.fullmatch(text.strip())
    if match is None or (match["coef"] is None) == with_coef:
        raise UserError(f"malformed regularizer {text!r}: write {form}, e.g. {_example(with_coef)}")
    term = match["term"].strip()
    if term not in all_names():
        raise UserError(f"unknown regularizer {term!r}.{did_you_mean(term, all_names())} Known: {_summary()}")
    coef = _number(match["coef"], text) if with_coef else 1.0
    level, _, name = term.partition(".")
    if not with_coef and (term == MIXING or MEASURES[name].takes == "gradient"):
        raise UserError(f"{text!r} depends on the training labels: it can be trained on (--reg), not measured")
    if term == MIXING:
        if match["options"] is not None or match["layers"] not in (None, "last"):
            raise UserError(f"{text!r}: {MIXING} takes no options and works on the last block's patches")
        return Spec(level, name, (), "last", coef)
    words = match["options"].split(",") if match["options"] is not None else []
    matrices = _chosen_matrices(level, words)
    options = _canonical_options(level, name, [word for word in words if word not in matrices], text)
    takes = MEASURES[name].takes
    layers = match["layers"] if match["layers"] is not None else LEVELS[level].DEFAULT_LAYERS[takes]
    _check_layers(layers, takes, text)
    layers = re.sub(r"\d+", lambda number: str(int(number[0])), layers)  # 03 is 3
    return Spec(level, name, options, layers, coef, matrices or weight.DEFAULT_MATRICES)


def _chosen_matrices(level: str, words: Sequence[str]) -> tuple[str, ...]:
    """The matrices among a weight term's options, in one order."""
    return tuple(name for name in MATRICES if name in words) if level == "weight" else ()


def _canonical_options(level: str, name: str, words: Sequence[str], spec: str) -> tuple[str, ...]:
    """The options that change something, in one order."""
    measure = MEASURES[name]
    defaults = {**measure.defaults, **LEVELS[level].DEFAULT_ARGUMENTS.get(name, {})}
    chosen: dict[str, str] = {}  # argument -> option
    for option in words:
        if option not in measure.options:
            known = ", ".join(measure.options) or "none"
            known += f"; its matrices: {', '.join(MATRICES)}" if level == "weight" else ""
            raise UserError(f"{spec!r}: {name} has no option {option!r}; its options: {known}")
        argument, _ = OPTIONS[option]
        if chosen.setdefault(argument, option) != option:
            raise UserError(f"{spec!r}: {chosen[argument]} and {option} contradict each other")
    changing = [option for argument, option in chosen.items() if defaults[argument] != OPTIONS[option][1]]
    return tuple(sorted(changing, key=list(OPTIONS).index))


def _example(with_coef: bool) -> str:
    return "patch.cosine@last=0.5" if with_coef else "patch.cosine@last"


def _summary() -> str:
    """'patch.{cosine, ...}, attn.{...}, weight.{...}', for error messages."""
    parts = []
    for level in LEVELS:
        names = [name.partition(".")[2] for name in all_names() if name.startswith(f"{level}.")]
        parts.append(f"{level}.{{{', '.join(names)}}}")
    return ", ".join(parts)


def _number(text: str, spec: str) -> float:
    try:
        value = float(text)
    except ValueError as error:
        raise UserError(f"malformed regularizer {spec!r}: {text!r} is not a number") from error
    if not (torch.isfinite(torch.tensor(value)) and value >= 0):
        raise UserError(f"{spec!r}: the coefficient must be finite and not negative")
    return value


_ONE_LAYER = re.compile(r"first|last|all|\d+|\d+-\d+")


def _check_layers(layers: str, takes: str, spec: str) -> None:
    sides = layers.split(":")
    if not all(_ONE_LAYER.fullmatch(part) for side in sides for part in side.split(",")):
        raise UserError(
            f"malformed layers {layers!r} in {spec!r}: write first, last, all, a block's number, a range a-b, "
            "or several with commas"
        )
    if (len(sides) == 2) != (takes == "pair") or len(sides) > 2:
        want = "two sides with a colon, e.g. @first:last" if takes == "pair" else "one side, e.g. @last"
        raise UserError(f"{spec!r}: this measure takes {want}")
    if takes == "gradient" and layers != "last":
        raise UserError(f"{spec!r}: the gradient of the label loss is taken at the last block only (@last)")


def resolve_layers(selector: str, depth: int, first: int, spec: str) -> list[int]:
    """Block indices that a selector names in a model of `depth` blocks; 'first' is `first` (-1 for patches).

    Raises:
        UserError: a block that the model does not have, or an empty range.
    """
    layers: list[int] = []
    for part in selector.split(","):
        if part in ("first", "last"):
            layers.append(first if part == "first" else depth - 1)
        elif part == "all":
            layers += range(depth)
        else:
            low, _, high = part.partition("-")
            start, end = int(low), int(high or low)
            if end < start:
                raise UserError(f"{spec!r}: the range {part} is empty")
            if end >= depth:
                outside = max(start, depth)
                raise UserError(f"{spec!r}: layer {outside} is out of range, the model has blocks 0 to {depth - 1}")
            layers += range(start, end + 1)
    return list(dict.fromkeys(layers))


def resolve_pairs(selector: str, depth: int, first: int, spec: str) -> list[tuple[int, int]]:
    left, right = (resolve_layers(side, depth, first, spec) for side in selector.split(":"))
    if len(left) == 1 or len(right) == 1:
        return [(a, b) for a in left for b in right]
    if len(left) != len(right):
        raise UserError(f"{spec!r}: {len(left)} layers against {len(right)}; give one, or equally many")
    return list(zip(left, right, strict=True))
