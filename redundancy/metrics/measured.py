"""Any regularizer of `--list-regularizers` as a metric: `--measure SPEC`, as in main.py, layer by layer.

main.py logs the sum over a spec's layers. Here each layer, pair of layers or matrix has a number of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from errors import UserError
from layers import EMBED
from models import Layout
from models.adapters import MATRICES
from redundancy.finding import Axis, Finding
from redundancy.metrics.registry import Metric, Needs, Takes, Text
from redundancy.metrics.shown import Shown, layer_label
from redundancy.metrics.streams import Accumulator, ImageMeans, axis_of
from regularizers import Spec
from regularizers.catalogue import read
from regularizers.diversity import BoundTerm
from regularizers.measures import MEASURES

NEEDS: dict[str, Needs] = {"patch": "tokens", "attn": "attention", "weight": "weights"}


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random probes that depend on the seed alone; afterwards the streams are where they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _by_spec() -> None:
    """What stands where other metrics have their function: `Measured` and `measured_weights` compute it."""


def as_metric(spec: Spec) -> Metric:
    """How a spec is named and explained in the report."""
    (entry,) = (entry for entry in read().entries if entry.name == spec.measure)
    of_weights = spec.level == "weight"
    sections = {
        "Where": f"{spec.layers} ({spec.level})",
        "Normalised": "as the equation says",
        "Range": entry.text.sections["Range"],
        "Undefined": "layers that the model does not show",
        "Source": entry.text.sections["Source"],
    }
    remark = "As --measure computes it, each layer by itself."
    text = Text(entry.text.summary, entry.text.equation, remark, sections)
    needs = NEEDS[spec.level]
    takes: Takes = "weight" if of_weights else "set"
    return Metric(spec.name, _by_spec, takes, "R", "mean", (None, None), "high", False, (needs,), text)


def compares_layers(spec: Spec) -> bool:
    return MEASURES[spec.measure].takes == "pair"


def refusal(spec: Spec, layout: Layout, shown: Shown) -> str:
    """Why a spec cannot be computed from what a model shows; empty if it can.

    Raises:
        UserError: the model has no such layer.
    """
    term = BoundTerm(spec, layout.depth)
    if term.level.of_weights:
        try:
            term.stacks(layout.weights)
        except UserError as error:
            return str(error)
        return ""
    if term.level.source == "tokens":
        source: Collection[int] = shown.patches
    else:
        source = shown.attending
    ends = [layout.layer_name(layer) for layer in _layers(term) if layer in (EMBED, layout.depth)]
    if ends:
        return (
            f"{spec.name}: the report looks at blocks and at the input of the first, not at {ends[0]}; "
            "--measure of main.py does"
        )
    missing = [layer for layer in _layers(term) if layer not in source]
    if missing:
        return f"{spec.name}: {layout.name} shows no {term.level.source} of layer {layer_label(missing[0])}"
    for pair in term.pairs:
        if not _alike(shown, term, pair):
            one, other = pair
            return (
                f"{spec.name}: layers {layer_label(one)} and {layer_label(other)} cannot be compared, their "
                f"{term.level.shape} differ; choose two layers of equal shape"
            )
    return ""


def _alike(shown: Shown, term: BoundTerm, pair: tuple[int, int]) -> bool:
    """Whether the items of two layers can be compared."""
    if term.level.source == "attention" and shown.heads:
        if shown.products(*pair) is not None:
            return True
        if not all(block in shown.maps for block in pair):
            return False  # maps of one size are known together, or their inner products are
    source = shown.patches if term.level.source == "tokens" else shown.maps
    one, other = (source[layer].shape[1:] for layer in pair)
    return one == other


def _layers(term: BoundTerm) -> list[int]:
    return [*term.layers, *chain(*term.pairs)]


class Measured(Accumulator):
    """Adds a spec of patches or attention up over images.

    The random probes of some measures are drawn anew for each image, from its place in the order.

    Args:
        spec: of a measure that takes a set, or a pair.
        depth: L of the model.
        first: place of the first image that it will see.
    """

    def __init__(self, spec: Spec, depth: int, first: int = 0) -> None:
        self.term = BoundTerm(spec, depth)
        self.place = first
        labels = [layer_label(layer) for layer in self.term.layers]
        labels += [f"{layer_label(one)}:{layer_label(other)}" for one, other in self.term.pairs]
        self.means = ImageMeans(as_metric(spec), (axis_of("layer", labels),))

    def update(self, shown: Shown) -> None:
        rows = []
        for image in range(len(shown.logits)):
            with seeded(self.place, shown.logits.device):
                rows.append(self._of_image(shown, image))
            self.place += 1
        self.means.add(torch.stack(rows).double().cpu().numpy())

    def _of_image(self, shown: Shown, image: int) -> Tensor:
        """One number for each layer, or each pair."""
        return torch.stack([self._value(shown, layers, image).cpu() for layers in self.term.sets])

    def _value(self, shown: Shown, layers: tuple[int, ...], image: int) -> Tensor:
        """Of a layer, or of two that are compared."""
        products = shown.products(*layers) if self.term.of_products is not None else None
        if products is not None and self.term.of_products is not None:
            g = products if self.term.is_wide else products.to(shown.logits.dtype)
            return self.term.of_products(g[image])
        grid = {"grid": shown.grids[layers[0]]} if self.term.looks_at_neighbours else {}
        return self.term.function(*(self._items(shown, layer, image) for layer in layers), **grid)

    def _items(self, shown: Shown, layer: int, image: int) -> Tensor:
        """[..., n, d]"""
        if self.term.level.source == "tokens":
            return shown.patches[layer][image]
        return shown.maps[layer][image].flatten(-2)

    def merge(self, other: Measured) -> None:
        self.means.merge(other.means)

    def finding(self) -> Finding:
        return self.means.finding()


def measured_weights(spec: Spec, layout: Layout) -> Finding:
    """A spec of weights: a number for each of its blocks and matrices."""
    term = BoundTerm(spec, layout.depth)
    kinds = [kind for kind in MATRICES if kind in term.matrices]
    values = np.full((len(term.layers), len(kinds)), np.nan)
    for row, layer in enumerate(term.layers):
        for column, kind in enumerate(kinds):
            matrices = [matrix.detach() for stack in layout.weights(layer, [kind]) for matrix in stack]
            with seeded(layer, matrices[0].device):
                values[row, column] = np.mean([float(term.function(matrix[None])) for matrix in matrices])
    axes: Sequence[Axis] = (axis_of("layer", map(layer_label, term.layers)), Axis("matrix", tuple(kinds)))
    return Finding(tuple(axes), values)
