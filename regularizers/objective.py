"""From "level.measure[:options][@layers]=coef" to named, logged terms.

    patch.cosine@last=0.5        patch.contrastive@first:last=0.5      patch.mixing=1
    attn.cosine@0=1e-4           weight.cno@all=5e-4                   patch.cosine:abs@0,6-11=0.1

A spec names a measure, a level (what the items are) and layers. The value of a term is the sum over its layers
(for weights: over all matrices of its layers), each the mean over the images. Layers are 'first', 'last', 'all',
a block's number, a range 'a-b', or several of these with commas; measures across layers take two of them with a
colon. For patches 'first' is the input of block 0.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from models.adapters import MATRICES
from models.capture import Needs
from regularizers import attention, patch, weight
from regularizers.measures import MEASURES, OPTIONS
from utils import UserError, did_you_mean

if TYPE_CHECKING:
    from models.capture import Captured

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


class Term(NamedTuple):
    """One term of the loss: its value, and what it is multiplied by."""

    value: Tensor
    weight: float


def total(terms: Mapping[str, Term]) -> Tensor:
    """The weighted sum of all terms, in three kernels and not two for each term."""
    values = torch.stack([term.value for term in terms.values()])
    return values @ _on_device(tuple(term.weight for term in terms.values()), values.dtype, values.device)


@cache
def _on_device(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Copied once, since a device that waits for numbers of the host makes the host wait as well."""
    return torch.tensor(numbers, dtype=dtype, device=device)


# ------------------------------------------------------------------------------------------------------------
# Specs


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


def _resolve_pairs(selector: str, depth: int, first: int, spec: str) -> list[tuple[int, int]]:
    left, right = (resolve_layers(side, depth, first, spec) for side in selector.split(":"))
    if len(left) == 1 or len(right) == 1:
        return [(a, b) for a in left for b in right]
    if len(left) != len(right):
        raise UserError(f"{spec!r}: {len(left)} layers against {len(right)}; give one, or equally many")
    return list(zip(left, right, strict=True))


# ------------------------------------------------------------------------------------------------------------
# The objective


class _Bound:
    """A spec bound to a model's depth: which layers, which function, and how its items are found."""

    def __init__(self, spec: Spec, depth: int) -> None:
        level, measure = LEVELS[spec.level], MEASURES[spec.measure]
        arguments: dict[str, Any] = dict(level.DEFAULT_ARGUMENTS.get(spec.measure, {}))
        arguments.update(OPTIONS[option] for option in spec.options)
        self.spec = spec
        self.takes = measure.takes
        self.level = level
        self.function = partial(measure.function, **arguments)
        self.layers: list[int] = []
        self.pairs: list[tuple[int, int]] = []
        if self.takes == "pair":
            self.pairs = _resolve_pairs(spec.layers, depth, level.FIRST, spec.name)
        else:
            self.layers = resolve_layers(spec.layers, depth, level.FIRST, spec.name)

    @property
    def key(self) -> tuple[object, ...]:
        """What the term computes: equal keys are the same term, however it is spelled."""
        spec = self.spec
        return spec.level, spec.measure, spec.options, spec.matrices, tuple(self.layers), tuple(self.pairs)

    @property
    def needs(self) -> Needs:
        used = frozenset(self.layers) | {layer for pair in self.pairs for layer in pair}
        if self.spec.level == "patch":
            return Needs(tokens=used)
        if self.spec.level == "attn":
            return Needs(attention=used)
        return Needs(weights=frozenset((layer, name) for layer in used for name in self.spec.matrices))

    def check(self, captured: Captured) -> None:
        """Refuse pairs of layers whose items cannot be compared."""
        for a, b in self.pairs:
            first, second = (self.level.items(captured, layer) for layer in (a, b))
            if first.shape[1:] != second.shape[1:]:
                what = "patches x width" if self.spec.level == "patch" else "heads x map"
                raise UserError(
                    f"{self.spec.name}: layers {a} and {b} cannot be compared, their {what} differ: "
                    f"{_times(first.shape[1:])} and {_times(second.shape[1:])}; choose two layers of equal shape"
                )

    def of_stacks(self, stacks: Sequence[Tensor]) -> Tensor:
        """The term of weights: of all matrices [M, n, d] of its layers."""
        return _sum(len(stack) * self.function(stack) for stack in stacks)

    def of_batch(self, captured: Captured, label_loss: Tensor | None) -> Tensor:
        items = self.level.items
        if self.takes == "pair":
            return _sum(self.function(items(captured, a), items(captured, b)) for a, b in self.pairs)
        if self.takes == "gradient":
            assert label_loss is not None
            return _sum(self.function(patch.gradients(captured, i, label_loss)) for i in self.layers)
        return _sum(self.function(items(captured, i)) for i in self.layers)


def _times(shape: Iterable[int]) -> str:
    return " x ".join(str(size) for size in shape)


def _refuse_repetition(terms: Sequence[tuple[object, str]]) -> None:
    seen: dict[object, str] = {}
    for key, name in terms:
        if key in seen:
            both = f"{name} is" if seen[key] == name else f"{seen[key]} and {name} are the same term,"
            raise UserError(f"{both} given twice: keep one, with the sum of the coefficients if both are meant")
        seen[key] = name


def _sum(values: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(values)).sum()


class Diversity:
    """The diversity terms of a run. Without specs it is empty, needs nothing, and training is plain DeiT.

    Args:
        specs: the terms; those with coefficient 0 are dropped.
        depth: L, the model's number of blocks (any number if there are no specs).
        patches_reach_label: whether the label depends on the patch tokens of the last block even without
            mixing (average-pooled models); gradient diversity needs that.
    Attributes:
        needs: what a forward pass has to capture.
        mixing: c, the weight of the mixing loss inside the label loss (`losses.LabelLoss`).
    Raises:
        UserError: a layer out of range, a term given twice, or one that cannot work with this model.
    """

    def __init__(self, specs: Sequence[Spec], depth: int, patches_reach_label: bool = False) -> None:
        specs = sorted((spec for spec in specs if spec.coef > 0), key=lambda spec: spec.level == "weight")
        self.mixing = sum(spec.coef for spec in specs if spec.name == MIXING)
        self.terms = [_Bound(spec, depth) for spec in specs if spec.name != MIXING]
        _refuse_repetition([(term.key, term.spec.name) for term in self.terms])
        _refuse_repetition([(spec.name, spec.name) for spec in specs])
        self.needs = Needs(patch_logits=self.mixing > 0)
        for term in self.terms:
            self.needs |= term.needs
            if term.takes == "gradient" and not (self.mixing or patches_reach_label):
                raise UserError(
                    f"{term.spec.name}: with a class-token head the last block's patches get no gradient from the "
                    "label; add patch.mixing=1 or choose an average-pooled model"
                )

        self._batch_terms: Callable[..., dict[str, Term]] = self._of_batch
        self._stack_terms: Callable[..., dict[str, Term]] = self._of_stacks

    def compile(self, backend: str) -> None:
        """Compile the terms in place: those of a batch in one graph, those of the weights in another.

        CNO's probes stay those of the eager form.
        """
        options = {"fallback_random": True} if backend == "inductor" else None
        compiled = partial(torch.compile, backend=backend, fullgraph=True, options=options)
        self._batch_terms, self._stack_terms = compiled(self._of_batch), compiled(self._of_stacks)

    @property
    def differentiates_twice(self) -> bool:
        """Whether a term needs the gradient of a gradient."""
        return any(term.takes == "gradient" for term in self.terms)

    @property
    def names(self) -> list[str]:
        """The names of the terms, in the order of `__call__`'s."""
        return [term.spec.name for term in self.terms]

    def check(self, captured: Captured) -> None:
        """Refuse, on what a trial pass showed, what these terms cannot be computed from.

        Raises:
            UserError: a term across layers whose items have different numbers or widths.
        """
        for term in self.terms:
            term.check(captured)

    def __call__(
        self, captured: Captured, weights: weight.Weights, label_loss: Tensor | None = None
    ) -> dict[str, Term]:
        """Every term's value and coefficient, by the spec's name, in at least float32.

        Args:
            captured: what the forward pass showed.
            weights: block, kinds -> the block's matrices of these kinds.
            label_loss: the label loss; only gradient diversity looks at it.
        """
        return self.of_batch(captured, label_loss) | self.of_weights(weights)

    def of_batch(self, captured: Captured, label_loss: Tensor | None = None) -> dict[str, Term]:
        """The patch and attention terms: means over the images of a batch."""
        return self._batch_terms(captured, label_loss)

    def _of_batch(self, captured: Captured, label_loss: Tensor | None) -> dict[str, Term]:
        terms = [term for term in self.terms if term.spec.level != "weight"]
        return {term.spec.name: Term(term.of_batch(captured, label_loss), term.spec.coef) for term in terms}

    def of_weights(self, weights: weight.Weights) -> dict[str, Term]:
        """The weight terms, which do not depend on a batch."""
        terms = [term for term in self.terms if term.spec.level == "weight"]
        return self._stack_terms([weight.items(weights, term.layers, term.spec.matrices) for term in terms])

    def _of_stacks(self, stacks: Sequence[Sequence[Tensor]]) -> dict[str, Term]:
        terms = [term for term in self.terms if term.spec.level == "weight"]
        return {
            term.spec.name: Term(term.of_stacks(own), term.spec.coef)
            for term, own in zip(terms, stacks, strict=True)
        }
