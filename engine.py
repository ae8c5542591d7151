"""The training loop and the evaluation. The loop reads like the equation:

    loss = label loss (cross-entropy, mixing, distillation) + sum of coefficient * diversity term

Nothing here knows which measures exist. No step waits for the device: numbers are read when they are printed. (Two
options wait by their nature: float16's gradient scaler, and an EMA kept in host memory.)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from errors import TrainingDiverged, UserError
from loggers.meters import Meters
from loggers.progress import Progress
from losses import LabelLoss
from mixing.mixup import Mixup
from models.capture import DiverseViT, Needs
from models.sharding import in_step, is_sharded, weights_of
from regularizers import Diversity, Term, total
from regularizers.measures import full_precision
from utils import Vote, all_reduce, print_main


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
        keep_casts: whether a forward pass casts each weight once and keeps what it casts until its end; for shards,
            that would be a half-precision copy of the whole model.
    Raises:
        UserError: float16 on a device other than CUDA, which has no scaled training.
    """

    def __init__(self, device: torch.device, name: str = "auto", keep_casts: bool = True) -> None:
        if name == "auto":
            if device.type != "cuda":
                name = "float32"
            else:
                name = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
        if name == "float16" and device.type != "cuda":
            raise UserError(f"--amp-dtype float16 needs a CUDA device, not {device.type}: use bfloat16 or float32")
        self.name = name
        self.device = device
        self.dtype: torch.dtype = getattr(torch, name)
        self.keep_casts = keep_casts
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "float16")

    def autocast(self) -> AbstractContextManager[object]:
        enabled = self.dtype != torch.float32
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=enabled, cache_enabled=self.keep_casts)


@dataclass
class Updater:
    """One optimiser step: backward (of one batch or several), clip, step, EMA.

    Attributes:
        optimizer: over the backbone's parameters.
        precision: holds the gradient scaler.
        clip_grad: largest global gradient norm, or None.
        ema: the moving average of the unwrapped model, or None.
        accumulate: batches whose gradients make one step.
    """

    optimizer: torch.optim.Optimizer
    precision: Precision
    clip_grad: float | None = None
    ema: ModelEmaV3 | None = None
    accumulate: int = 1

    def backward(self, loss: Tensor) -> None:
        """Add a loss's gradients."""
        second_order = getattr(self.optimizer, "is_second_order", False)
        self.precision.scaler.scale(loss).backward(create_graph=second_order)

    def step(self, model: nn.Module) -> None:
        """Update the model's parameters from the gradients."""
        scaler = self.precision.scaler
        if self.clip_grad is not None:
            scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), self.clip_grad)
        scaler.step(self.optimizer)
        scaler.update()
        if self.ema is not None:
            self.ema.update(unwrap(model))


class Finite:
    """Watches that all terms of a step are finite, on all processes, before the step is made.

    The verdict is asked for before the backward pass and read after it, so that no host waits for its device's
    whole queue (see Vote). Gradients that overflow in float16 are the scaler's business, not an error.

    The same exchange carries what each process wishes for: to save or to stop (see run_state.Saver).

    Args:
        policy: 'skip' drops such a step on all processes, 'stop' ends the run at the first one.
        patience: that many dropped steps in a row end the run.

    Attributes:
        in_a_row: steps dropped since the last good one.
        dropped: steps dropped in this epoch.
        wish: the largest that any process gave to the last `ask`, once `verdict` is read.
    """

    def __init__(self, policy: str = "skip", patience: int = 10) -> None:
        self.policy = policy
        self.patience = patience
        self.in_a_row = 0
        self.dropped = 0
        self.wish = 0
        self._names: list[str] = []
        self._vote = Vote()

    def ask(self, values: Mapping[str, Tensor], wish: int = 0) -> None:
        """Start to find out whether these values are finite everywhere, and what all wish for."""
        self._names = list(values)
        finite = torch.stack([value.detach() for value in values.values()]).isfinite().float()  # [names]
        self._vote.ask(torch.cat([finite, finite.new_full((1,), -wish)]))

    def verdict(self, step: int) -> bool:
        """Whether they are; the same on all processes.

        Raises:
            TrainingDiverged: they are not, and the policy or the patience ends the run.
        """
        *finite, wish = self._vote.answer()
        self.wish = round(-wish)
        if all(finite):
            self.in_a_row = 0
            return True
        first = self._names[finite.index(0.0)]
        self.in_a_row += 1
        self.dropped += 1
        if self.policy == "stop" or self.in_a_row >= self.patience:
            raise TrainingDiverged(
                f"the loss is not finite, {self.in_a_row} step(s) in a row up to step {step}; the first term to "
                f"break was {first}. None of these steps changed the weights. Continue from the last checkpoint "
                "with --resume auto and --amp-dtype bfloat16 or float32, a smaller --lr, or --clip-grad 1"
            )
        print_main(f"warning: step {step} is dropped, {first} is not finite ({self.in_a_row} in a row)")
        return False

    def state_dict(self) -> dict[str, int]:
        return {"in_a_row": self.in_a_row, "dropped": self.dropped}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.in_a_row, self.dropped = int(state["in_a_row"]), int(state["dropped"])


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
    meters: Meters | None = None,
    finite: Finite | None = None,
    first_step: int = 1,
    wish: Callable[[], int] = lambda: 0,
    after_step: Callable[[int, int], None] = lambda step, wish: None,
    header: str = "",
    epochs_after: int = 0,
    print_freq: int = 10,
    training_mode: bool = True,
) -> dict[str, float]:
    """Train over the loader once, or over what is left of it.

    Args:
        model: a DiverseViT, sharded or not, or DDP around one.
        label_loss, diversity: the objective.
        loader: batches of images [B, 3, S, S] and class indices [B], from step `first_step` on.
        updater: optimiser, precision, clipping, EMA, and how many batches make a step.
        mixup: mixes images and labels them.
        meters: the epoch's means so far.
        finite: what to do with a step that is not finite.
        first_step: the step to begin with, counted from 1.
        wish: what this process wishes for, asked once a step.
        after_step: told the number of each step that is done, and the largest wish of any process.
        header: what progress lines start with.
        epochs_after: epochs still to come, for the ETA.
        print_freq: steps between progress lines.
        training_mode: False trains with dropout and drop path off (fine-tuning, as DeiT does).
    Returns:
        Mean over steps and processes of 'loss' and of every term by name; 'lr'; 'dropped', the steps that were not
        finite.
    Raises:
        TrainingDiverged: steps were not finite, and `finite` says to stop; the message names the first term.
    """
    model.train(training_mode)
    meters, finite = meters or Meters(), finite or Finite()
    steps = len(loader) // updater.accumulate
    batches = iter(loader)
    progress = Progress(header, print_freq, epochs_after)
    for step in progress.over(first_step, steps, meters):
        updater.optimizer.zero_grad()
        values: dict[str, Tensor] = {}
        for left in reversed(range(updater.accumulate)):
            with nullcontext() if left == 0 else no_sync(model):
                terms = objective(model, label_loss, diversity, next(batches), mixup, updater)
                of_batch = list(terms)
                if left == 0:
                    terms |= diversity.of_weights(weights_of(unwrap(model)))  # once a step, like clipping
                loss = total(terms)
                for name, value in [("loss", loss), *((name, term.value) for name, term in terms.items())]:
                    values[name] = values[name] + value.detach() if name in values else value.detach()
                if left == 0:
                    finite.ask({name: values[name] for name in [*terms, "loss"]}, wish())
                for part in apart(terms, of_batch) if is_sharded(model) else [loss]:
                    updater.backward(part)
        if finite.verdict(step):
            updater.step(model)
            meters.update(values)
        after_step(step, finite.wish)
    rate = max(group["lr"] for group in updater.optimizer.param_groups)
    return meters.global_means() | {"lr": rate, "dropped": finite.dropped}


def objective(
    model: nn.Module,
    label_loss: LabelLoss,
    diversity: Diversity,
    batch: tuple[Tensor, Tensor],
    mixup: Mixup,
    updater: Updater,
) -> dict[str, Term]:
    """The terms of one batch, all but those of the weights, as its share of the step."""
    device = updater.precision.device
    images, targets = (tensor.to(device, non_blocking=True) for tensor in batch)
    images, labels = mixup(images, targets)  # labels: image and per patch, compact
    with updater.precision.autocast():
        captured = model(images)  # logits, and what the objective asked for
        teacher_logits = label_loss.ask_teacher(images)
    # float32, outside autocast; and the label loss last: autograd goes backwards, and frees the logits of all
    # patches before the gradients of the other terms, which have to wait for their layers, are there
    if diversity.differentiates_twice:
        terms = label_loss(captured, labels, teacher_logits)
        terms |= diversity.of_batch(captured, total(terms))
    else:
        others = diversity.of_batch(captured)
        terms = label_loss(captured, labels, teacher_logits) | others
    if updater.accumulate == 1:
        return terms
    return {name: Term(term.value / updater.accumulate, term.weight) for name, term in terms.items()}


def apart(terms: Mapping[str, Term], of_batch: Collection[str]) -> list[Tensor]:
    """The sum of the weight terms, if there are any, and of the others: shards differentiate one after the other.

    FSDP adds to the gradients of shards on a stream of its own. That waits for what was added before; what autograd
    adds at the same time would not wait for it.
    """
    parts = [name for name in terms if name not in of_batch], of_batch
    return [total({name: terms[name] for name in part}) for part in parts if part]


def no_sync(model: nn.Module) -> AbstractContextManager[object]:
    """Leave gradients unreduced: a later batch of the same step reduces them.

    Those of shards are reduced each time, since no process has room for all of them.
    """
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


@torch.no_grad()
def evaluate(
    model: DiverseViT,
    loader: Loader,
    precision: Precision,
    measure: Diversity | None = None,
    after_batch: Callable[[int], None] = lambda batch: None,
) -> dict[str, float]:
    """Loss and accuracy over all samples that the processes' loaders hold together.

    Args:
        model: not wrapped in DDP, since processes may have different numbers of batches; sharded or not.
        loader: this process's share of the samples, or all of them in every process.
        precision: where, and in which dtype.
        measure: redundancy terms to measure as well; their coefficients do not matter.
        after_batch: told the number of each batch that is done, from 1.
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
    for batch, (images, targets) in enumerate(in_step(model, loader), start=1):
        images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        with precision.autocast():
            captured = model(images, needs=needs)
        measured = {}
        if measure and measure.terms:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):  # training draws the same
                measured = measure(captured, weights_of(model))
        if not len(targets):
            continue  # images that only keep a sharded model's processes in step
        logits = full_precision(captured.logits)  # [B, K]
        hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == targets[:, None]  # [B, 5]
        row = [F.cross_entropy(logits, targets, reduction="sum"), 100 * hits[:, 0].sum(), 100 * hits.sum()]
        row += [term.value * len(targets) for term in measured.values()]
        row.append(torch.full((), len(targets), device=device))
        sums += torch.stack([value.to(sums.device).to(sums.dtype) for value in row])  # MPS has no float64
        after_batch(batch)
    *totals, count = all_reduce(sums).tolist()
    return {name: value / count for name, value in zip(names, totals, strict=True)}


def report(results: Mapping[str, float], samples: int, what: str = "network") -> None:
    """Print DeiT's two evaluation lines."""
    print_main(f"* Acc@1 {results['acc1']:.3f} Acc@5 {results['acc5']:.3f} loss {results['loss']:.3f}")
    print_main(f"Accuracy of the {what} on the {samples} test images: {results['acc1']:.1f}%")
