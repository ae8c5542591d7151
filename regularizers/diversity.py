"""From specs to named, logged terms, and their weighted sum."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from errors import UserError
from models.capture import Needs
from regularizers import patch, weight
from regularizers.measures import MEASURES, OPTIONS
from regularizers.specs import LEVELS, MIXING, Spec, resolve_layers, resolve_pairs

if TYPE_CHECKING:
    from models.capture import Captured


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
            self.pairs = resolve_pairs(spec.layers, depth, level.FIRST, spec.name)
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
