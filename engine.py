"""The training loop and the evaluation. The loop reads like the equation:

    loss = label loss (cross-entropy, mixing, distillation) + sum of coefficient * diversity term

Nothing here knows which measures exist. No step blocks on the device: the check that a step is finite is read once
its backward pass is queued, and numbers are read when they are printed. (Two options wait by their nature:
float16's gradient scaler, and an EMA kept in host memory.)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.models import model_parameters
from timm.utils import ModelEmaV3, dispatch_clip_grad
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from errors import TrainingDiverged, UserError
from loggers.meters import Meters
from loggers.progress import Progress
from losses import Objective
from mixing import Mixing
from models.capture import DiverseViT
from models.captured import Needs
from models.sharding import is_sharded, weights_of
from regularizers.diversity import Diversity, Term, total
from regularizers.primitives import full_precision
from utils import Vote, all_reduce, print_main


class Loader(Protocol):
    """Batches of images [B, C, H, W] and class indices [B]; a torch DataLoader is one."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...

    def __len__(self) -> int: ...


class Observer(Protocol):
    """What watches a run: a saver, a log, a tracker."""

    def complete(self) -> None:
        """A finished epoch is resumed: do what was left undone when the run before it ended."""

    def after_step(self, step: int) -> None:
        """A step of the running epoch is done; they are counted from 1."""

    def after_epoch(self, record: Mapping[str, Any]) -> None:
        """An epoch is trained and evaluated; `record` is its line of log.txt."""


# ------------------------------------------------------------------------------------------------------------
# A step


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
        clip_grad: limit of the gradient, or None.
        clip_mode: of timm's `dispatch_clip_grad`: 'norm' of all, each 'value', or 'agc' (Brock et al., 2021), which
            leaves out the head.
        ema: the moving average of the unwrapped model, or None.
        accumulate: batches whose gradients make one step.
    """

    optimizer: torch.optim.Optimizer
    precision: Precision
    clip_grad: float | None = None
    ema: ModelEmaV3 | None = None
    accumulate: int = 1
    clip_mode: str = "norm"

    def backward(self, loss: Tensor) -> None:
        """Add a loss's gradients."""
        second_order = getattr(self.optimizer, "is_second_order", False)
        self.precision.scaler.scale(loss).backward(create_graph=second_order)

    def step(self, model: nn.Module, number: int = 0) -> None:
        """Update the model's parameters from the gradients.

        Args:
            number: of the update, from 1 in a run; an average with a warm-up asks for it.
        """
        scaler = self.precision.scaler
        if self.clip_grad is not None:
            scaler.unscale_(self.optimizer)
            whole = self.clip_mode != "agc"
            parameters = (
                model.parameters() if whole else model_parameters(unwrap(model).backbone, exclude_head=True)
            )
            dispatch_clip_grad(parameters, self.clip_grad, self.clip_mode)
        scaler.step(self.optimizer)
        scaler.update()
        if self.ema is not None:
            self.ema.update(unwrap(model), step=number if self.ema.use_warmup else None)


class Finite:
    """Watches that all terms of a step are finite, on all processes, before the step is made.

    The verdict is asked for before the backward pass and read after it, so that no host waits for its device's
    whole queue (see Vote). Gradients that overflow in float16 are the scaler's business, not an error.

    The same exchange carries what each process wishes for: to save or to stop (see state.saver).

    Args:
        policy: 'skip' drops such a step on all processes, 'stop' ends the run at the first one.
        patience: that many dropped steps in a row end the run.

    Attributes:
        in_a_row: steps dropped since the last good one.
        dropped: steps dropped in this epoch.
        own_wish: says what this process wishes for; larger numbers win.
        wish: what any process wished for at the last `ask`, once `verdict` is read.
    """

    def __init__(self, policy: str = "skip", patience: int = 10) -> None:
        self.policy = policy
        self.patience = patience
        self.in_a_row = 0
        self.dropped = 0
        self.own_wish: Callable[[], int] = int  # nothing: 0
        self.wish = 0
        self._names: list[str] = []
        self._vote = Vote()

    def ask(self, values: Mapping[str, Tensor]) -> None:
        """Start to find out whether these values are finite everywhere, and what all wish for."""
        self._names = list(values)
        finite = torch.stack([value.detach() for value in values.values()]).isfinite().float()  # [names]
        self._vote.ask(torch.cat([finite, finite.new_full((1,), -self.own_wish())]))

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


# ------------------------------------------------------------------------------------------------------------
# Training


@dataclass
class Running:
    """Where the running epoch stands; a checkpoint within an epoch holds it.

    Attributes:
        step: steps that are done.
        updates: of the weights, in the whole run; a step that is dropped is none.
        meters: the means over the steps.
        finite: what is to happen to a step that is not finite.
    """

    step: int = 0
    updates: int = 0
    meters: Meters = field(default_factory=Meters)
    finite: Finite = field(default_factory=Finite)

    def begin_epoch(self) -> None:
        """Forget the steps of the epoch before."""
        self.step, self.meters, self.finite.dropped = 0, Meters(), 0


def train_one_epoch(
    model: nn.Module,
    objective: Objective,
    loader: Loader,
    updater: Updater,
    mixing: Mixing,
    running: Running | None = None,
    *,
    observers: Sequence[Observer] = (),
    progress: Progress | None = None,
    training_mode: bool = True,
) -> dict[str, float]:
    """Train over the loader once, or over what is left of it.

    Args:
        model: a DiverseViT, sharded or not, or DDP around one.
        objective: label loss and diversity terms.
        loader: batches of images [B, C, H, W] and class indices [B], from the first step that is not done.
        updater: optimiser, precision, clipping, EMA, and how many batches make a step.
        mixing: mixes images and labels them.
        running: where the epoch stands; it is kept up to date.
        observers: told of each step that is done.
        progress: shows where the work stands.
        training_mode: False trains with dropout and drop path off (fine-tuning, as DeiT does).
    Returns:
        Mean over steps and processes of 'loss' and of every term by name; 'lr'; 'dropped', the steps that were not
        finite.
    Raises:
        TrainingDiverged: steps were not finite, and `running.finite` says to stop; the first term is named.
    """
    model.train(training_mode)
    running, progress = running or Running(), progress or Progress("")
    steps = len(loader) // updater.accumulate
    batches = iter(loader)
    for step in progress.over(running.step + 1, steps, running.meters):
        updater.optimizer.zero_grad()
        values: dict[str, Tensor] = {}
        for left in reversed(range(updater.accumulate)):
            with nullcontext() if left == 0 else no_sync(model):
                terms = terms_of_batch(model, objective, next(batches), mixing, updater)
                of_batch = list(terms)
                if left == 0:
                    terms |= objective.of_weights(weights_of(unwrap(model)))  # once a step, like clipping
                loss = total(terms)
                for name, value in [("loss", loss), *((name, term.value) for name, term in terms.items())]:
                    values[name] = values[name] + value.detach() if name in values else value.detach()
                if left == 0:
                    running.finite.ask({name: values[name] for name in [*terms, "loss"]})
                for part in apart(terms, of_batch) if is_sharded(model) else [loss]:
                    updater.backward(part)
        if running.finite.verdict(step):
            running.updates += 1
            updater.step(model, running.updates)
            running.meters.update(values)
        running.step = step
        for observer in observers:
            observer.after_step(step)
    rate = max(group["lr"] for group in updater.optimizer.param_groups)
    return running.meters.global_means() | {"lr": rate, "dropped": running.finite.dropped}


def terms_of_batch(
    model: nn.Module, objective: Objective, batch: tuple[Tensor, Tensor], mixing: Mixing, updater: Updater
) -> dict[str, Term]:
    """The terms of one batch, all but those of the weights, as its share of the step."""
    device = updater.precision.device
    images, targets = (tensor.to(device, non_blocking=True) for tensor in batch)
    images, labels = mixing(images, targets)  # labels: image and per patch, compact
    if objective.submodels > 1:
        images, labels = images.repeat(objective.submodels, 1, 1, 1), labels.repeat(objective.submodels)
    with updater.precision.autocast():
        captured = model(images, labels=labels)  # logits, and what the objective asked for
        teacher_logits = objective.ask_teacher(images)
    terms = objective(captured, labels, teacher_logits)  # float32, outside autocast
    if updater.accumulate == 1:
        return terms
    return {name: Term(term.value / updater.accumulate, term.coef) for name, term in terms.items()}


# ------------------------------------------------------------------------------------------------------------
# Evaluation


def evaluate(
    model: DiverseViT,
    loader: Loader,
    precision: Precision,
    measure: Diversity | None = None,
    after_batch: Callable[[int], None] = lambda batch: None,
) -> dict[str, float]:
    """Loss and accuracy of one model: see `evaluate_together`."""
    (results,) = evaluate_together([model], loader, precision, measure, after_batch)
    return results


@torch.no_grad()
def evaluate_together(
    models: Sequence[DiverseViT],
    loader: Loader,
    precision: Precision,
    measure: Diversity | None = None,
    after_batch: Callable[[int], None] = lambda batch: None,
) -> list[dict[str, float]]:
    """Loss and accuracy of several models over all samples that the processes' loaders hold together.

    The images are read once, and each model gives the numbers that it gives alone.

    Args:
        models: not wrapped in DDP, since processes may have different numbers of batches; all sharded or none.
        loader: this process's share of the samples, or all of them in every process.
        precision: where, and in which dtype.
        measure: redundancy terms to measure on the first model as well; their coefficients do not matter.
        after_batch: told the number of each batch that is done, from 1.
    Returns:
        For each model 'loss' (plain cross-entropy), 'acc1' and 'acc5' in percent, where a second head predicts
        together with the model's own 'joint_acc1' and 'joint_acc5', and for the first one every measured term by
        name: means over samples. Accuracies are not a number where a logit is not finite.
    """
    tallies = [Tally(model, precision, None if number else measure) for number, model in enumerate(models)]
    for batch, (images, targets) in enumerate(in_step(models, loader), start=1):
        images, targets = (tensor.to(precision.device, non_blocking=True) for tensor in (images, targets))
        for tally in tallies:
            tally.add(images, targets)
        if len(targets):
            after_batch(batch)
    return [tally.means() for tally in tallies]


class Tally:
    """One model's numbers in an evaluation: sums over samples, which stay on the device until the end.

    Args:
        model, precision, measure: as in `evaluate`.
    """

    def __init__(self, model: DiverseViT, precision: Precision, measure: Diversity | None = None) -> None:
        self.model = model.eval()
        self.precision = precision
        self.measure = measure
        self._joint = model.predicts_jointly
        self._needs = (Needs(**measure.needs) if measure else Needs()) | Needs(patch_logits=self._joint)
        self._names = ["loss", "acc1", "acc5", *(["joint_acc1", "joint_acc5"] if self._joint else [])]
        self._names += measure.names if measure else []
        sums = torch.zeros(len(self._names) + 1, dtype=torch.float64)  # the last one counts samples
        self._sums = sums if precision.device.type == "mps" else sums.to(precision.device)  # MPS has no float64

    def add(self, images: Tensor, targets: Tensor) -> None:
        """Classify images [B, C, H, W]. Without targets they only keep a sharded model's processes in step."""
        device = self.precision.device
        with self.precision.autocast():
            captured = self.model(images, needs=self._needs)
        measured: dict[str, Term] = {}
        if self.measure and self.measure.terms:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):  # training draws the same
                measured = self.measure(captured, weights_of(self.model))
        if not len(targets):
            return
        logits = full_precision(captured.logits)  # [B, K]
        row = [F.cross_entropy(logits, targets, reduction="sum"), *accuracies(logits, targets, logits)]
        if self._joint:
            assert captured.patch_logits is not None
            every = torch.cat([logits, full_precision(captured.patch_logits)[:, 0]], dim=1)  # [B, 2 K]
            row += accuracies(joint_prediction(logits, captured.patch_logits), targets, every)
        row += [term.value * len(targets) for term in measured.values()]
        row.append(torch.full((), len(targets), device=device))
        self._sums += torch.stack([value.to(self._sums.device).to(self._sums.dtype) for value in row])

    def means(self) -> dict[str, float]:
        """Means over the samples of all processes, which must ask together."""
        *totals, count = all_reduce(self._sums).tolist()
        return {name: value / count for name, value in zip(self._names, totals, strict=True)}


def accuracies(scores: Tensor, targets: Tensor, logits: Tensor) -> list[Tensor]:
    """Top-1 and top-5 in percent, summed over samples; not a number where a logit is not finite.

    Args: scores [B, K], targets [B], the logits that the scores are made of [B, ...].
    """
    hits = scores.topk(min(5, scores.shape[1]), dim=1).indices == targets[:, None]  # [B, 5]
    percent = torch.where(logits.isfinite().all(dim=1, keepdim=True), 100.0 * hits, torch.nan)
    return [percent[:, 0].sum(), percent.sum()]


def joint_prediction(logits: Tensor, patch_logits: Tensor) -> Tensor:
    """The probabilities of the model's own head plus those of the patches' head for the whole image.

    Args: logits [B, K], patch_logits [B, 1, K].  Returns: [B, K], from 0 to 2.
    Source: Gong et al., Vision Transformers with Patch Diversification, 2021, its code's evaluation.
    """
    return full_precision(logits).softmax(dim=1) + full_precision(patch_logits)[:, 0].softmax(dim=1)


def report_joint(results: Mapping[str, float], what: str = "* ") -> None:
    """Print the accuracy of both heads together, where there are two."""
    if "joint_acc1" in results:
        print_main("{}Joint Acc@1 {joint_acc1:.3f} Acc@5 {joint_acc5:.3f}".format(what, **results))


def report(results: Mapping[str, float], samples: int, what: str = "network") -> None:
    """Print DeiT's two evaluation lines, and between them the accuracy of both heads together."""
    print_main(f"* Acc@1 {results['acc1']:.3f} Acc@5 {results['acc5']:.3f} loss {results['loss']:.3f}")
    report_joint(results)
    print_main(f"Accuracy of the {what} on the {samples} test images: {results['acc1']:.1f}%")


def in_step(models: Sequence[nn.Module], loader: Loader) -> Iterator[tuple[Tensor, Tensor]]:
    """The loader's batches; of sharded models then blank images without targets, until no process has a batch.

    Every process takes part in every forward pass of a sharded model, also where it has fewer samples, or none.
    """
    sharded = [model for model in models if isinstance(model, FSDPModule)]
    if not sharded:
        yield from loader
        return
    batches = iter(loader)
    first = next(batches, None)
    shape = first[0].shape[1:] if first is not None else (0, 0, 0)
    sizes = torch.tensor([len(loader), *shape], device=next(models[0].parameters()).device)
    most, *image = all_reduce(sizes, dist.ReduceOp.MAX).tolist()
    if first is not None:
        yield first
    yield from batches
    for _ in range(most - len(loader)):
        yield torch.zeros(1, *image), torch.zeros(0, dtype=torch.long)
    for model in sharded:
        model.reshard()
