"""What a run of segmentation learns (a Task of trainer.py): the class of each pixel, by mIoU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from engine import Loader, Precision
from models import DiverseViT, Needs
from options.flags import shape_of, sides
from regularizers import Diversity
from segmentation.inference import Predictor
from segmentation.scores import Confusion, Result
from segmentation.settings import Settings, without_effect
from state.run_state import RunState, Score
from trainer import on_device
from utils import print_main, world_size
from warmup import Batches

MIOU = Score("miou", "max_miou", "mIoU", {"eval_miou": "miou", "eval_macc": "macc", "eval_pixel_acc": "pixel_acc"})
Show = Callable[[int, Tensor], None]  # number of an image among this process's, its predicted classes [H, W]


@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def evaluate(
    networks: Sequence[DiverseViT],
    loader: Loader,
    precision: Precision,
    predict: Predictor,
    classes: Sequence[str],
    after_batch: Callable[[int], None] = lambda batch: None,
    show: Show | None = None,
) -> list[Result]:
    """Scores of several networks over all images that the processes' loaders hold together, read once.

    Nothing is compiled here: images have sizes of their own, and after eight of them torch gives up on a graph.

    Args:
        networks: not wrapped in DDP, since processes may have different numbers of images.
        loader: this process's share, one image in a batch: images of different sizes.
        predict: makes class numbers of an image.
        classes: their names.
        after_batch: told the number of each image that is done, from 1.
        show: told what the first network predicts.
    """
    counted = [Confusion(classes, device=precision.device) for _ in networks]
    for number, (images, masks) in enumerate(loader):
        images, masks = (tensor.to(precision.device, non_blocking=True) for tensor in (images, masks))
        for place, (network, scores) in enumerate(zip(networks, counted, strict=True)):
            network.eval()

            def logits(views: Tensor, network: DiverseViT = network) -> Tensor:
                with precision.autocast():
                    return network(views, needs=Needs()).logits

            predicted = predict(logits, images[0], masks.shape[-2:])  # [H, W]
            scores.add(predicted, masks[0])
            if show is not None and place == 0:
                show(number, predicted)
        after_batch(number + 1)
    return [scores.result() for scores in counted]


def numbers_of(result: Result) -> dict[str, float]:
    """What log.txt holds of a result, in percent."""
    return {
        "miou": 100 * result.mean_iou,
        "macc": 100 * result.mean_accuracy,
        "pixel_acc": 100 * result.all_accuracy,
    }


class Segmentation:
    """A Task (trainer.py): mIoU of the evaluation images.

    Args:
        args: the flags in force.
        loader: of the evaluation images, see `evaluate`.
        images: how many there are to train on, and to evaluate, in all.
        classes: their names.
        precision: where, and in which dtype.
        predict: makes class numbers of an image.
    """

    length = "--iterations"

    def __init__(
        self,
        args: Settings,
        loader: Loader,
        images: tuple[int, int],
        classes: Sequence[str],
        precision: Precision,
        predict: Predictor,
    ) -> None:
        self.args, self.loader, self.classes = args, loader, classes
        self.precision, self.predict = precision, predict
        self.train_images, self.val_images = images
        self.measure = Diversity([], depth=0)
        self.batches = Batches(shape_of(args), args.batch_size, [], sides(args.input_size))
        self.eval_batches = self.val_images // world_size()
        self._last: Result | None = None

    def print_plan(self, run_state: RunState) -> None:
        """The network, the batch, the rate and the terms."""
        args = self.args
        parameters = sum(p.numel() for p in run_state.model.parameters() if p.requires_grad)
        crop = " x ".join(map(str, sides(args.input_size)))
        batch = args.batch_size * args.grad_accum_steps * world_size()
        how = f"UperNet, {args.channels} wide" if args.head == "uper" else "a linear head"
        print_main(
            f"{args.model} under {how}: {parameters:,} parameters to train, {self.train_images:,} training images "
            f"of {len(self.classes)} classes, {world_size()} process(es) on {self.precision.device.type} in "
            f"{self.precision.name}\n"
            f"global batch {batch} crops of {crop}, peak learning rate {args.lr:.4g}, "
            f"steps {run_state.steps + 1} to {args.iterations}, an evaluation every {args.eval_interval}\n"
            f"diversity: {'  '.join(args.reg) or 'none'}"
        )
        for text in without_effect(args):
            print_main(f"note: {text}")

    def evaluate(
        self, run_state: RunState, after_batch: Callable[[int], None]
    ) -> tuple[Mapping[str, float], Mapping[str, float]]:
        """mIoU of the network and of its average."""
        networks = [run_state.model]
        if run_state.ema is not None:
            networks.append(on_device(run_state.ema.module, self.precision.device))
        found = evaluate(networks, self.loader, self.precision, self.predict, self.classes, after_batch)
        self._last = found[0]
        tested, *averaged = map(numbers_of, found)
        return tested, averaged[0] if averaged else {}

    def watch(self, run_state: RunState, epoch: int) -> Mapping[str, float]:
        """Nothing more is measured."""
        return {}

    def report(
        self,
        run_state: RunState,
        tested: Mapping[str, float],
        averaged: Mapping[str, float],
        watched: Mapping[str, float],
    ) -> None:
        """One line for the network, one for its average, and the best so far."""
        for name, numbers in (("", tested), ("EMA: ", averaged)):
            if numbers:
                print_main(name + report_line(numbers))
        print_main(f"Max mIoU: {run_state.max_acc:.2f}%" + (f", best: {run_state.best}" if averaged else ""))

    def report_end(self, tested: Mapping[str, float], averaged: Mapping[str, float]) -> None:
        """Every class of the last evaluation."""
        if self._last is not None:
            print_main(self._last.table())


def report_line(numbers: Mapping[str, float]) -> str:
    """The scores in a line."""
    return "mIoU {miou:.2f}%, mean accuracy {macc:.2f}%, pixels right {pixel_acc:.2f}%".format(**numbers)
