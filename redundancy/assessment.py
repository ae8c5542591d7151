"""Measure a model's redundancy: run images through it, and let every metric see what it shows.

    from redundancy import assess
    report = assess(model, loader, label="plain") + assess(other, loader, label="diverse")
    report.save("report")

The command (command.py) does this for models of the command line; monitor.py measures less, and more often.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from errors import UserError
from models import Layout
from models.adapters import MATRICES
from redundancy.examples import Look, look_at
from redundancy.finding import Assessed, Axis, Example, Finding
from redundancy.metrics.measured import Measured, as_metric, compares_layers, measured_weights, refusal
from redundancy.metrics.registry import Metric, choose, nanmean
from redundancy.metrics.shown import Shown, layer_label
from redundancy.metrics.streams import Accumulator, ImageMeans, axis_of
from redundancy.metrics.values import values_of
from redundancy.metrics.weights import Weight
from redundancy.report import Report
from redundancy.watch import Heads, Watched
from regularizers import Spec, parse_spec
from regularizers.of_products import WIDE, of_products
from utils import world_size


def assess(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    label: str = "model",
    metrics: Sequence[str] = (),
    measures: Sequence[str] = (),
    about: Mapping[str, Any] | None = None,
    look: Look | None = None,
    classes: str = "",
    first: int = 0,
    places: Sequence[int] = (),
    after_batch: Callable[[int], None] = lambda batch: None,
) -> Report:
    """Measure one model; `+` joins reports.

    If processes have been started, each gives the images that its own loader holds, in the order of their ranks,
    and all get the whole report.

    Args:
        model: a timm model, a DiverseViT, or any module that makes logits [B, K] of images; it is left as it was.
        loader: yields (images [B, C, H, W], labels [B]), or images alone.
        label: what figures call it; several of one label are seeds of one run.
        metrics: names or levels of `metrics.METRICS`; none are all.
        measures: regularizers besides, as in `--measure`.
        about: what else the report should say of the model.
        look: which images it shows, by default the first two.
        classes: why the model's classes are not the data's; empty if they are.
        first: place of this process's first image among all.
        places: a number for each image of this process, by which differences between models know it again; without
            them images are known by their pixels.
        after_batch: told the number of each batch that is done, from 1.
    Raises:
        UserError: no images, images that the model does not take, or an unknown metric.
    """
    chosen = choose([metrics] if isinstance(metrics, str) else metrics)
    texts = [measures] if isinstance(measures, str) else measures
    specs = [parse_spec(text, with_coef=False) for text in texts]
    asked = [*chosen, *map(as_metric, specs)]
    wanted = {need for metric in asked for need in metric.needs}
    chosen_look = Look() if look is None else look

    def own_images() -> Seen | None:
        batches = _batches(loader, _like(model))
        opening = next(batches, None)
        if opening is None:
            return None
        besides = ("tokens", "attention") if chosen_look.count else ()
        heads = None if "attention" in besides else of_heads(chosen, specs)
        with Watched(model, wanted, opening[0][:2], besides, heads) as watched:
            lacks = watched.lacks | ({"classes": classes} if classes else {})
            lacks |= {} if opening[1] is not None else {"labels": "the images come without labels"}
            lacks |= _refused(specs, watched, opening[0][:2], lacks)
            pass_ = Pass(watched, chosen, specs, lacks, first)
            examples = pass_.run(chain([opening], batches), chosen_look, after_batch)
            return Seen(pass_.streams, pass_.of_weights(), lacks, examples, list(places) or pass_.images)

    streams, of_weights, lacks, examples, images = _joined(own_images)
    found = {name: stream.finding() for name, stream in streams.items()} | of_weights
    identity = np.array(images, dtype=np.uint32)
    findings = {each.name: _finished(each, found[each.name], identity) for each in asked if each.name in found}
    gaps = {each.name: _why(each, findings, lacks) for each in asked}
    gaps = {name: why for name, why in gaps.items() if why}
    described = {"parameters": sum(parameter.numel() for parameter in model.parameters()), **(about or {})}
    return Report([Assessed(label, described, findings, gaps, examples)], {})


def of_heads(metrics: Iterable[Metric], specs: Iterable[Spec]) -> Heads | None:
    """The inner products of heads that metrics and measures want; None if some want the maps."""
    attending = [metric for metric in metrics if "attention" in metric.needs]
    measured = [spec for spec in specs if spec.level == "attn"]
    forms = [metric.of_products for metric in attending] + [of_products(spec) for spec in measured]
    if any(form is None for form in forms):
        return None
    across = any(metric.takes == "all maps" for metric in attending) or any(map(compares_layers, measured))
    return Heads(across, wide=any(spec.measure in WIDE for spec in measured))


def _batches(loader: Iterable[Any], like: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Images and, if there are any, labels where a tensor is, in its precision; empty batches are left out.

    Raises:
        UserError: the loader yields something else, or not always the same.
    """
    forms = set()
    for batch in loader:
        images, labels = _parts(batch)
        if len(images):
            forms.add((images.shape[1:], labels is None))
            if len(forms) > 1:
                raise UserError("a loader must yield images of one size, and labels with all of them or with none")
            yield images.to(like), labels if labels is None else labels.to(like.device)


def _parts(batch: Any) -> tuple[Tensor, Tensor | None]:
    """Images and labels of a batch.

    Raises:
        UserError: it is something else.
    """
    several = isinstance(batch, (tuple, list))
    parts: Sequence[Any] = batch if several else (batch,)
    images, labels, *_ = (*parts, None, None)
    if not isinstance(images, Tensor) or images.ndim != 4:
        raise UserError("a loader must yield images [B, C, H, W], or (images, labels)")
    if not images.is_floating_point():
        raise UserError(f"images must be normalised numbers as the model takes them, not {images.dtype}")
    if labels is not None:
        if not isinstance(labels, Tensor) or labels.shape != images.shape[:1] or labels.is_floating_point():
            raise UserError("labels must be the numbers of the images' classes, a tensor [B] of integers")
        labels = labels.long()
        if (labels < 0).any():
            raise UserError("labels must be the numbers of the images' classes, from 0")
    return images, labels


def _refused(specs: Sequence[Spec], watched: Watched, images: Tensor, lacks: Mapping[str, str]) -> dict[str, str]:
    """Spec -> why it cannot be measured, though its level can."""
    able = [spec for spec in specs if not any(need in lacks for need in as_metric(spec).needs)]
    if not able or watched.layout is None:
        return {}
    shown, layout = watched.look(images, None), watched.layout
    reasons = {spec.name: refusal(spec, layout, shown) for spec in able}
    return {name: why for name, why in reasons.items() if why}


class Seen(NamedTuple):
    """What a process found: see `Pass`."""

    streams: dict[str, Accumulator]
    of_weights: dict[str, Finding]
    lacks: Mapping[str, str]
    examples: list[Example]
    images: list[int]


def _joined(find: Callable[[], Seen | None]) -> Seen:
    """What all processes find, put together in the order of their ranks.

    Raises:
        UserError: of any of them, on all; or no process had an image, or some lack what others have.
    """
    every: list[Seen | UserError | None] = [None]
    try:
        every = [find()]
    except UserError as error:
        if world_size() == 1:
            raise
        every = [error]
    if world_size() > 1:
        own, every = every[0], [None] * world_size()
        dist.all_gather_object(every, own)
    for each in every:
        if isinstance(each, UserError):
            raise UserError(str(each))  # also of a LocalError, which all have heard of now
    found = [each for each in every if isinstance(each, Seen)]
    if not found:
        raise UserError("there are no images to measure")
    first, *others = found
    for other in others:
        if other.streams.keys() != first.streams.keys():
            differing = ", ".join(sorted(other.streams.keys() ^ first.streams.keys()))
            raise UserError(f"some processes can measure {differing}, others cannot: give all labels, or none")
        for name, stream in first.streams.items():
            stream.merge(other.streams[name])
        first.images.extend(other.images)
    return first


def _like(model: nn.Module) -> Tensor:
    """A tensor where the model is, in the precision that it takes images in."""
    floating = (parameter for parameter in model.parameters() if parameter.is_floating_point())
    return next(floating, torch.zeros(0)).detach()


def _why(metric: Metric, findings: Mapping[str, Finding], lacks: Mapping[str, str]) -> str:
    """Why a metric has nothing to show; empty if it has."""
    if metric.name not in findings:
        return next(lacks[need] for need in (*metric.needs, metric.name) if need in lacks)
    if np.isnan(findings[metric.name].mean).all():
        return f"undefined for this model and these images: {metric.text.sections['Undefined']}"
    return ""


def _finished(metric: Metric, finding: Finding, images: np.ndarray) -> Finding:
    """With its summary, and which images its numbers of single images are of."""
    if finding.per_image is not None and len(finding.per_image) == len(images):
        finding = replace(finding, images=images)
    if np.isnan(finding.summary):
        return replace(finding, summary=float(metric.summarised(finding.mean)))
    return finding


# ------------------------------------------------------------------------------------------------------------
# One pass over the images


class Pass:
    """The metrics that a model can be measured by, and what they have seen.

    Args:
        watched: the model.
        chosen, specs: what is to be measured.
        lacks: what cannot be had, and why.
        first: place of the first image.
    Attributes:
        streams: of the metrics that look at images, by name.
        images: of each image that was seen a checksum of what the model got.
    """

    def __init__(
        self,
        watched: Watched,
        chosen: Sequence[Metric],
        specs: Sequence[Spec],
        lacks: Mapping[str, str],
        first: int,
    ) -> None:
        self.watched, self.lacks = watched, lacks
        self.images: list[int] = []
        able = [metric for metric in chosen if not any(need in lacks for need in metric.needs)]
        self._of_weights = [metric for metric in able if metric.takes == "weight"]
        self.streams = {metric.name: self._stream(metric) for metric in able if metric.takes != "weight"}
        self._specs_of_weights: list[Spec] = []
        for spec in specs:
            metric = as_metric(spec)
            if any(need in lacks for need in (*metric.needs, spec.name)):
                continue
            if metric.takes == "weight":
                self._specs_of_weights.append(spec)
            else:
                assert watched.layout is not None
                self.streams[spec.name] = Measured(spec, watched.layout.depth, first)

    def _stream(self, metric: Metric) -> Accumulator:
        if metric.takes == "set":
            accumulator: Accumulator = metric.function()
            return accumulator
        layers = self.watched.needs.attending if "attention" in metric.needs else self.watched.needs.tokens
        axis = axis_of("layer", map(layer_label, sorted(layers)))
        dimensions = {"output": 0, "all patches": 2, "all maps": 2}.get(metric.takes, 1)
        return ImageMeans(metric, (axis,) * dimensions, partial(values_of, metric))

    def run(
        self,
        batches: Iterable[tuple[Tensor, Tensor | None]],
        look: Look,
        after_batch: Callable[[int], None],
    ) -> list[Example]:
        """Show every batch to every metric; the images to look at are the first ones."""
        examples: list[Example] = []
        for number, (images, labels) in enumerate(batches, start=1):
            shown = self.watched.look(images, labels)
            self._check_labels(shown)
            self.images += [zlib.crc32(image.cpu().float().numpy().tobytes()) for image in images]
            with torch.autocast(images.device.type, enabled=False):
                for stream in self.streams.values():
                    stream.update(shown)
                examples += self._examples(images, labels, replace(look, count=look.count - len(examples)))
            after_batch(number)
        for stream in self.streams.values():
            stream.close()
        return examples

    def _examples(self, images: Tensor, labels: Tensor | None, look: Look) -> list[Example]:
        """Of the first images of a batch, up to the count; they are run through the model once more."""
        some, named = images[: look.count], None if labels is None else labels[: look.count]
        if not len(some):
            return []
        # Hiera keeps the patches of a mask unit together
        row_by_row = getattr(self.watched.backbone, "unroll", None) is None
        return look_at(self.watched.look(some, named, everything=True), some, look, row_by_row)

    def _check_labels(self, shown: Shown) -> None:
        """Refuse labels that the model has no logit for, where its classes are taken for the data's.

        Raises:
            UserError: with what to give.
        """
        if shown.labels is None or "classes" in self.lacks:
            return
        largest, classes = int(shown.labels.max()), shown.logits.shape[1]
        if largest >= classes:
            raise UserError(
                f"label {largest} is none of the model's {classes} classes: say why, as in "
                "assess(..., classes='it was trained on other data'), and accuracies are left out"
            )

    def of_weights(self) -> dict[str, Finding]:
        """What the weights give, which need no images."""
        layout = self.watched.layout
        if layout is None:
            return {}
        found = {spec.name: measured_weights(spec, layout) for spec in self._specs_of_weights}
        return found | measure_weights(layout, self._of_weights)


def measure_weights(layout: Layout, metrics: Sequence[Metric]) -> dict[str, Finding]:
    """Metrics of every matrix of every block; of several matrices of a kind in a block the mean."""
    numbers: dict[str, list[list[np.ndarray]]] = {metric.name: [] for metric in metrics}
    for block in range(layout.depth if metrics else 0):
        by_kind = [_weights(layout, block, kind) for kind in MATRICES]
        for metric in metrics:
            of_each = [[np.atleast_1d(metric.function(weight)) for weight in weights] for weights in by_kind]
            numbers[metric.name].append([nanmean(padded(each).T) for each in of_each])
    labels = axis_of("layer", map(layer_label, range(layout.depth)))
    found: dict[str, Finding] = {}
    for metric in metrics:
        mean = padded([value for row in numbers[metric.name] for value in row])  # [L * kinds, length]
        mean = mean.reshape(layout.depth, len(MATRICES), -1)
        axes: tuple[Axis, ...] = (labels, Axis("matrix", MATRICES))
        if metric.along is not None:
            name, first = metric.along
            axes = (*axes, axis_of(name, map(str, range(first, first + mean.shape[2]))))
        else:
            mean = mean[:, :, 0]
        found[metric.name] = Finding(axes, mean)
    return found


def _weights(layout: Layout, block: int, kind: str) -> list[Weight]:
    """A block's matrices of a kind; none if it has none."""
    try:
        stacks = layout.weights(block, [kind])
    except UserError:  # this family has no such matrix here: a gap
        return []
    return [Weight(matrix) for stack in stacks for matrix in stack]


def padded(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Rows of different lengths as one array, with NaN after their ends; [1, 1] of NaN if there are none."""
    length = max((len(row) for row in rows), default=1)
    whole = np.full((max(len(rows), 1), length), np.nan)
    for place, row in enumerate(rows):
        whole[place, : len(row)] = row
    return whole
