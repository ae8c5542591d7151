"""The training loop and the evaluation. The loop reads like the equation:

    loss = label loss (cross-entropy, mixing, distillation) + sum of coefficient * diversity term

Nothing here knows which measures exist. No step waits for the device: numbers are read when they are printed. (Two
options wait by their nature: float16's gradient scaler, and an EMA kept in host memory.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from losses import LabelLoss
from mixup import Mixup
from models.capture import DiverseViT, Needs
from regularizers import Diversity, total
from regularizers.measures import full_precision
from utils import Meters, Progress, TrainingDiverged, UserError, all_reduce, print_main

AMP_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Loader(Protocol):
    """Batches of images [B, 3, S, S] and class indices [B]; a torch DataLoader is one."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...

    def __len__(self) -> int: ...


class Precision:
    """Mixed precision: which dtype autocast uses, and the gradient scaler that float16 needs.

    Args:
        device: where training runs.
        name: 'auto' (bfloat16 where a CUDA device supports it natively, else float16 there; float32 elsewhere),
            'float32', 'bfloat16' or 'float16'.
    Raises:
        UserError: float16 on a device other than CUDA, which has no scaled training.
    """

    def __init__(self, device: torch.device, name: str = "auto") -> None:
        if name == "auto":
            if device.type != "cuda":
                name = "float32"
            else:
                name = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
        if name == "float16" and device.type != "cuda":
            raise UserError(f"--amp-dtype float16 needs a CUDA device, not {device.type}: use bfloat16 or float32")
        self.name = name
        self.device = device
        self.dtype = AMP_DTYPES[name]
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "float16")

    def autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)


@dataclass
class Updater:
    """One optimiser step: backward, clip, step, EMA.

    Attributes:
        optimizer: over the backbone's parameters.
        precision: holds the gradient scaler.
        clip_grad: largest global gradient norm, or None.
        ema: the moving average of the unwrapped model, or None.
    """

    optimizer: torch.optim.Optimizer
    precision: Precision
    clip_grad: float | None = None
    ema: ModelEmaV3 | None = None

    def step(self, loss: Tensor, model: nn.Module) -> None:
        """Update the model's parameters from a loss."""
        scaler = self.precision.scaler
        self.optimizer.zero_grad()
        scaler.scale(loss).backward(create_graph=getattr(self.optimizer, "is_second_order", False))
        if self.clip_grad is not None:
            scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), self.clip_grad)
        scaler.step(self.optimizer)
        scaler.update()
        if self.ema is not None:
            self.ema.update(unwrap(model))


def unwrap(model: nn.Module) -> DiverseViT:
    """The DiverseViT inside DDP, or the model itself."""
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    assert isinstance(inner, DiverseViT)
    return inner


def train_one_epoch(
    model: nn.Module,
    label_loss: LabelLoss,
    diversity: Diversity,
    loader: Loader,
    updater: Updater,
    mixup: Mixup,
    *,
    header: str = "",
    epochs_after: int = 0,
    print_freq: int = 10,
    training_mode: bool = True,
) -> dict[str, float]:
    """Train over the loader once.

    Args:
        model: a DiverseViT, or DDP around one.
        label_loss, diversity: the objective.
        loader: batches of images [B, 3, S, S] and class indices [B].
        updater: optimiser, precision, clipping and EMA.
        mixup: mixes images and labels them.
        header: what progress lines start with.
        epochs_after: epochs still to come, for the ETA.
        print_freq: steps between progress lines, and between checks that the loss is finite.
        training_mode: False trains with dropout and drop path off (fine-tuning, as DeiT does).
    Returns:
        Mean over steps and processes of 'loss' and of every term by name, and 'lr'.
    Raises:
        TrainingDiverged: a loss was not finite; the message names the first term.
    """
    model.train(training_mode)
    weights = unwrap(model).weights
    meters = Meters()
    device, steps = updater.precision.device, len(loader)
    progress = Progress(header, print_freq, epochs_after)
    for step, (images, targets) in enumerate(progress.over(loader, steps, meters), start=1):
        images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        images, labels = mixup(images, targets)  # labels: image and per patch, compact

        with updater.precision.autocast():
            captured = model(images)  # logits, and what the objective asked for
            teacher_logits = label_loss.ask_teacher(images)
        terms = label_loss(captured, labels, teacher_logits)  # float32, outside autocast
        terms |= diversity(captured, weights, total(terms))
        loss = total(terms)

        updater.step(loss, model)
        meters.update({"loss": loss} | {name: term.value for name, term in terms.items()})
        if step % print_freq == 0 or step == steps:
            check_finite(meters)
    return meters.global_means() | {"lr": max(group["lr"] for group in updater.optimizer.param_groups)}


def check_finite(meters: Meters) -> None:
    """Raise TrainingDiverged on every process if a term stopped being finite on any, naming the first."""
    first = meters.first_broken()
    if first is not None:
        raise TrainingDiverged(
            f"the loss is not finite; the first term to break was {first}. Nothing of this epoch was saved. Try "
            "--amp-dtype bfloat16 or float32, a smaller --lr, or --clip-grad 1, and --resume the last checkpoint"
        )


@torch.no_grad()
def evaluate(
    model: DiverseViT, loader: Loader, precision: Precision, measure: Diversity | None = None
) -> dict[str, float]:
    """Loss and accuracy over all samples that the processes' loaders hold together.

    Args:
        model: not wrapped in DDP, since processes may have different numbers of batches.
        loader: this process's share of the samples, or all of them in every process.
        precision: where, and in which dtype.
        measure: redundancy terms to measure as well; their coefficients do not matter.
    Returns:
        'loss' (plain cross-entropy), 'acc1' and 'acc5' in percent, and every measured term by name: means over
        samples.
    """
    model.eval()
    device = precision.device
    names = ["loss", "acc1", "acc5", *(measure.names if measure else [])]
    sums = torch.zeros(len(names) + 1, dtype=torch.float64)  # the last one counts samples
    sums = sums if device.type == "mps" else sums.to(device)
    needs = measure.needs if measure else Needs()
    for images, targets in loader:
        images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        with precision.autocast():
            captured = model(images, needs=needs)
        logits = full_precision(captured.logits)  # [B, K]
        hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == targets[:, None]  # [B, 5]
        row = [F.cross_entropy(logits, targets, reduction="sum"), 100 * hits[:, 0].sum(), 100 * hits.sum()]
        if measure and measure.terms:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):  # training draws the same
                terms = measure(captured, model.weights)
            row += [term.value * len(targets) for term in terms.values()]
        row.append(torch.full((), len(targets), device=device))
        sums += torch.stack([value.to(sums.device).to(sums.dtype) for value in row])  # MPS has no float64
    *totals, count = all_reduce(sums).tolist()
    return {name: value / count for name, value in zip(names, totals, strict=True)}


def report(results: Mapping[str, float], samples: int, what: str = "network") -> None:
    """Print DeiT's two evaluation lines."""
    print_main(f"* Acc@1 {results['acc1']:.3f} Acc@5 {results['acc5']:.3f} loss {results['loss']:.3f}")
    print_main(f"Accuracy of the {what} on the {samples} test images: {results['acc1']:.1f}%")
