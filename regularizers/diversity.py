"""From specs to named, logged terms, and their weighted sum."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from errors import UserError
from layers import layer_name, resolve_layers
from regularizers.levels import LEVELS
from regularizers.measures import MEASURES
from regularizers.of_features import OF_FEATURES
from regularizers.of_products import WIDE, of_products
from regularizers.primitives import MAX_ELEMENTS_ON_DEVICE, full_precision
from regularizers.specs import Spec, resolve_pairs

if TYPE_CHECKING:
    from mixing import Labels
    from models.captured import Captured, Weights
    from models.heads import Linear


STACKED = 2**18  # elements of weights that are copied together on a CPU: 1 MiB in float32


class Term(NamedTuple):
    """One term of the loss: its value, and what it is multiplied by."""

    value: Tensor
    coef: float


def total(terms: Mapping[str, Term]) -> Tensor:
    """The weighted sum of all terms, in three kernels and not two for each term."""
    values = torch.stack([term.value for term in terms.values()])
    return values @ _on_device(tuple(term.coef for term in terms.values()), values.dtype, values.device)


@cache
def _on_device(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Copied once, since a device that waits for numbers of the host makes the host wait as well."""
    return torch.tensor(numbers, dtype=dtype, device=device)


class BoundTerm:
    """A spec bound to a model's depth: which layers, which function, and how its items are found.

    Args:
        grid: see `Diversity`.
    """

    def __init__(self, spec: Spec, depth: int, grid: tuple[int, int] | None = None) -> None:
        measure = MEASURES[spec.measure]
        self.spec = spec
        self.depth = depth
        self.level = LEVELS[spec.level]
        self.takes = measure.takes
        self.averaged = measure.averaged
        self.detached = measure.detached
        self.looks_at_neighbours = "grid" in measure.defaults
        self.grid = grid if self.looks_at_neighbours else None
        self.function = partial(measure.function, **spec.arguments, **({"grid": self.grid} if self.grid else {}))
        self.of_products = of_products(spec) if self.level.source == "attention" else None
        self.is_wide = spec.measure in WIDE  # others draw their probes in the precision of the model
        self.matrices = spec.matrices or self.level.default_matrices
        self.layers: list[int] = []
        self.pairs: list[tuple[int, int]] = []
        if self.takes == "pair":
            self.pairs = resolve_pairs(spec.layers, depth, self.level.first, spec.name)
        elif self.takes != "labels":
            self.layers = resolve_layers(spec.layers, depth, self.level.first, spec.name)

    @property
    def key(self) -> tuple[object, ...]:
        """What the term computes: equal keys are the same term, however it is spelled."""
        spec = self.spec
        return spec.level, spec.measure, spec.options, self.matrices, tuple(self.layers), tuple(self.pairs)

    @property
    def sets(self) -> list[tuple[int, ...]]:
        """What is compared: the items of each layer, or of each pair of layers."""
        return [*((layer,) for layer in self.layers), *self.pairs]

    @property
    def needs(self) -> dict[str, frozenset[Any]]:
        """The layers of its level's source; of weights, with the matrices."""
        used = frozenset(layer for layers in self.sets for layer in layers)
        if self.level.of_weights:
            return {self.level.source: frozenset((layer, name) for layer in used for name in self.matrices)}
        if self.of_products is not None:
            return {"heads": frozenset(self.sets)}
        return {self.level.source: used}

    def check(self, captured: Captured) -> None:
        """Refuse pairs of layers whose items cannot be compared, and patches that are not those of the grid."""
        for a, b in self.pairs:
            if (a, b) in captured.products:
                continue  # they were multiplied
            first, second = self.items(captured, a), self.items(captured, b)
            if first.shape != second.shape:
                alike = first.shape[1:] == second.shape[1:]  # but for the windows, which stand beside the images
                one, other = (x.shape[0 if alike else 1 :] for x in (first, second))
                raise UserError(
                    f"{self.spec.name}: layers {layer_name(a, self.depth)} and {layer_name(b, self.depth)} cannot "
                    f"be compared, their {'windows x ' if alike else ''}{self.level.shape} differ: "
                    f"{_times(one)} and {_times(other)}; choose two layers of equal shape"
                )
            if self.grid and self.grid[0] * self.grid[1] != first.shape[1]:
                raise UserError(
                    f"{self.spec.name} takes patches of the last block's grid, {_times(self.grid)}, but layer "
                    f"{layer_name(a, self.depth)} has {first.shape[1]}; choose other layers"
                )

    def source(self, captured: Captured, layer: int) -> Tensor:
        """What the items of a layer are taken from."""
        return getattr(captured, self.level.source)[layer]

    def items(self, captured: Captured, layer: int) -> Tensor:
        """The items of a layer.  [..., n, d]"""
        return self.level.items(self.source(captured, layer), captured.prefix_tokens.get(layer, 0))

    def gradients(self, captured: Captured, layer: int, label_loss: Tensor) -> Tensor:
        """Gradient of the label loss at the items of a layer, differentiable once more.  [..., n, d]

        The loss is first scaled by the number of vectors: gradient diversity does not change, and half-precision
        gradients do not underflow.

        Raises:
            UserError: the label loss does not depend on this layer.
        """
        source = self.source(captured, layer)  # [B, N, D]
        scale = source.shape[0] * source.shape[1]
        (gradient,) = torch.autograd.grad(label_loss * scale, source, create_graph=True, allow_unused=True)
        if gradient is None:
            raise UserError(
                f"the label loss does not depend on the captured {self.level.source} of layer {layer}, so "
                f"{self.spec.level}.{self.spec.measure} has no gradient there: models that are compiled, or in DDP "
                "with static_graph=True, hand out copies"
            )
        return self.level.items(gradient, captured.prefix_tokens.get(layer, 0))

    def stacks(self, weights: Weights) -> list[Tensor]:
        """The matrices of all its layers, stacked by shape so that a measure runs once for many of them.

        The order within a stack is block by block, and within a block that of `matrices`. A stack is a copy, which
        waits for its gradient: large matrices of a block stay by themselves on a CPU, where kernels start at once.

        Returns: tensors [M, n, d], M matrices of n neurons.
        """
        stacks: dict[torch.Size, list[Tensor]] = {}
        for layer in self.layers:
            for some in weights(layer, self.matrices):  # [m, n, d]
                items = self.level.items(some, 0)
                stacks.setdefault(items.shape[1:], []).append(items)
        return [
            torch.cat(some) if len(some) > 1 else some[0] for stack in stacks.values() for some in _in_stacks(stack)
        ]

    def of_stacks(self, stacks: Sequence[Tensor]) -> Tensor:
        """The term of weights: of all matrices [M, n, d] of its layers."""
        return _sum(len(stack) * self.function(stack) for stack in stacks)

    def of_batch(self, captured: Captured, label_loss: Tensor | None) -> Tensor:
        if self.takes == "gradient":
            assert label_loss is not None
            return _sum(self.function(self.gradients(captured, layer, label_loss)) for layer in self.layers)
        return _sum(self.of_layers(captured, layers) for layers in self.sets)

    def of_layers(self, captured: Captured, layers: tuple[int, ...]) -> Tensor:
        """The measure of one layer, or of a pair: of inner products, where they are all that was captured."""
        products = captured.products.get(layers)
        if products is not None and self.of_products is not None:
            dtype = full_precision(captured.logits[:0]).dtype
            return self.of_products(products if self.is_wide else products.to(dtype)).to(dtype)
        items = [self.items(captured, layer) for layer in layers]
        if self.detached:
            items[0] = items[0].detach()
        return self.function(*items)

    def of_labels(self, captured: Captured, labels: Labels) -> Term:
        """The term of the patch logits and the labels; of one that is averaged, with c n for c."""
        if captured.patch_loss is not None:
            value, count = captured.patch_loss
        else:
            assert captured.patch_logits is not None
            value, count = self.function(captured.patch_logits, labels), captured.patch_logits.shape[1]
        return Term(value, self.spec.coef * (count if self.averaged else 1))


def _in_stacks(matrices: list[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors [m, n, d], so many together that their copy has no more elements than is good for its device."""
    first = matrices[0]
    limit = STACKED if first.device.type == "cpu" else MAX_ELEMENTS_ON_DEVICE
    count = max(1, limit // first.numel())
    for start in range(0, len(matrices), count):
        yield matrices[start : start + count]


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
        patches_reach_label: whether the label depends on the patch tokens of the last block even without a term
            that takes labels (average-pooled models); gradient diversity needs that.
        grid: rows and columns of the patches, for measures that look at neighbours; None is as near to a square as
            their number allows.
    Attributes:
        terms: those of a batch, then those of the weights, then those that take labels.
    Raises:
        UserError: a layer out of range, a term given twice, or one that cannot work with this model.
    """

    def __init__(
        self,
        specs: Sequence[Spec],
        depth: int,
        patches_reach_label: bool = False,
        grid: tuple[int, int] | None = None,
    ) -> None:
        terms = [BoundTerm(spec, depth, grid) for spec in specs if spec.coef > 0]
        _refuse_repetition([(term.key, term.spec.name) for term in terms])
        self._labelled = [term for term in terms if term.takes == "labels"]
        unlabelled = [term for term in terms if term.takes != "labels"]
        self._of_a_batch = [term for term in unlabelled if not term.level.of_weights]
        self._of_the_weights = [term for term in unlabelled if term.level.of_weights]
        self.terms = [*self._of_a_batch, *self._of_the_weights, *self._labelled]
        for term in self.terms:
            if term.takes == "gradient" and not (self._labelled or patches_reach_label):
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
    def needs(self) -> dict[str, Any]:
        """What a forward pass has to capture: keyword arguments of `models.captured.Needs`."""
        found: dict[str, Any] = {"patch_logits": True} if self._labelled else {}
        for term in [*self._of_a_batch, *self._of_the_weights]:
            for source, wanted in term.needs.items():
                found[source] = found.get(source, frozenset()) | wanted
        if any(term.is_wide for term in self._of_a_batch if term.of_products is not None):
            found["wide"] = True
        return found

    @property
    def differentiates_twice(self) -> bool:
        """Whether a term needs the gradient of a gradient."""
        return any(term.takes == "gradient" for term in self.terms)

    @property
    def names(self) -> list[str]:
        """The names of the terms that take no labels, in the order of `__call__`'s."""
        return [term.spec.name for term in [*self._of_a_batch, *self._of_the_weights]]

    @property
    def looks_at_neighbours(self) -> list[str]:
        """The names of the terms to which the patches' grid matters."""
        return [term.spec.name for term in self.terms if term.looks_at_neighbours]

    @property
    def labelled(self) -> list[str]:
        """The names of the terms that take labels."""
        return [term.spec.name for term in self._labelled]

    @property
    def patch_loss(self) -> Callable[[Linear, Any], Tensor] | None:
        """The term that takes labels as a function of features, if there is one, and it has such a form.

        Its gradient is made with its value, so nothing may be differentiated twice.
        """
        if len(self._labelled) != 1 or self.differentiates_twice:
            return None
        return OF_FEATURES.get(self._labelled[0].spec.measure)

    @property
    def averaged(self) -> frozenset[str]:
        """The names of those label terms whose items are averaged with the image's own cross-entropy."""
        return frozenset(term.spec.name for term in self._labelled if term.averaged)

    def check(self, captured: Captured) -> None:
        """Refuse, on what a trial pass showed, what these terms cannot be computed from.

        Raises:
            UserError: a term across layers whose items have different numbers or widths.
        """
        for term in self.terms:
            term.check(captured)

    def __call__(self, captured: Captured, weights: Weights, label_loss: Tensor | None = None) -> dict[str, Term]:
        """Every term's value and coefficient, by the spec's name, in at least float32; but those that take labels.

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
        return {
            term.spec.name: Term(term.of_batch(captured, label_loss), term.spec.coef) for term in self._of_a_batch
        }

    def of_weights(self, weights: Weights) -> dict[str, Term]:
        """The weight terms, which do not depend on a batch."""
        return self._stack_terms([term.stacks(weights) for term in self._of_the_weights])

    def _of_stacks(self, stacks: Sequence[Sequence[Tensor]]) -> dict[str, Term]:
        return {
            term.spec.name: Term(term.of_stacks(own), term.spec.coef)
            for term, own in zip(self._of_the_weights, stacks, strict=True)
        }

    def of_labels(self, captured: Captured, labels: Labels) -> dict[str, Term]:
        """The terms that take labels.

        The coefficient of one that is `averaged` is c n: its coefficient c, times the number n of its items.
        """
        return {term.spec.name: term.of_labels(captured, labels) for term in self._labelled}
