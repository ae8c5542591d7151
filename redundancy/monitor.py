"""`--monitor-redundancy N`: while a run trains, the cheap metrics on a few evaluation images, every N epochs."""

from __future__ import annotations

import torch
from torch import Tensor

from datasets import LabelledImages
from engine import Precision, in_step
from errors import UserError
from images.transforms import preprocessing
from loaders import normalise
from models import DiverseViT, Needs
from options.flags import Args, shape_of
from redundancy.metrics.registry import Metric, choose, nanmean
from redundancy.metrics.streams import Moments, draw
from redundancy.metrics.values import values_of
from redundancy.watch import Watched, shown_by
from utils import print_main

IMAGES = 16  # that are looked at, the same ones all the time
AT_ONCE = 8


class Monitor:
    """Measures the model after every N-th epoch, and after the last.

    All processes look at the same images, so that all take part where a model is sharded; no random number is
    drawn, so a run with a monitor trains as one without.

    Args:
        args: the flags; without --monitor-redundancy it needs and does nothing.
        model: the backbone, to see what it shows.
        val_set: of which the images are drawn, by --seed.
    Attributes:
        needs: what passes of the model may be asked for.
    Raises:
        UserError: the model shows neither patches nor attention.
    """

    def __init__(self, args: Args, model: torch.nn.Module, val_set: LabelledImages) -> None:
        self.every, self.last = 0 if args.eval else args.monitor_redundancy, args.epochs - 1
        self.needs = Needs()
        self.metrics: list[Metric] = []
        self._batches: list[tuple[Tensor, Tensor]] = []
        if not self.every:
            return
        with Watched(model, ("tokens", "attention"), torch.zeros(2, *shape_of(args))) as watched:
            self.needs, self.layout, lacks = watched.needs, watched.layout, watched.lacks
        cheap = [metric for metric in choose(()) if metric.cheap]
        self.metrics = [metric for metric in cheap if not any(need in lacks for need in metric.needs)]
        for level, need in (("patches", "tokens"), ("attention", "attention")):
            if need in lacks:
                print_main(f"note: --monitor-redundancy leaves out {level}: {lacks[need]}")
        if not self.metrics:
            raise UserError(f"--monitor-redundancy: {args.model} shows neither patches nor attention: drop it")
        places = draw(len(val_set), IMAGES, args.seed)
        colours = preprocessing(args)
        mean, std = torch.tensor([colours.mean, colours.std])[..., None, None]
        images = normalise(torch.stack([val_set[int(place)][0] for place in places]), mean, std)
        self._batches = [(some, torch.zeros(len(some), dtype=torch.long)) for some in images.split(AT_ONCE)]

    def measure(self, epoch: int, model: DiverseViT, precision: Precision) -> dict[str, float]:
        """Means over images, by 'METRIC@mean' (over all layers) and 'METRIC@last'; {} where the epoch has none.

        Args:
            epoch: that was trained, from 0.
        """
        if not self.every or ((epoch + 1) % self.every and epoch != self.last):
            return {}
        model.eval()
        means = {metric.name: Moments() for metric in self.metrics}
        for images, labels in in_step([model], self._batches):
            if len(labels):
                self._add(means, model, images, precision)
        found: dict[str, float] = {}
        for name, moments in means.items():
            layers = moments.means()
            found |= {f"{name}@mean": float(nanmean(layers)), f"{name}@last": float(layers[-1])}
        return found

    @torch.no_grad()
    def _add(self, means: dict[str, Moments], model: DiverseViT, images: Tensor, precision: Precision) -> None:
        with precision.autocast():
            captured = model(images.to(precision.device), needs=self.needs)
        shown = shown_by(captured, self.layout, (images.shape[2], images.shape[3]))
        for metric in self.metrics:
            means[metric.name].add(values_of(metric, shown).cpu().numpy())
