"""What a checkpoint holds of a run, and the way back: a resumed run gives the uninterrupted run's results."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor

from engine import Running
from errors import BAD_ARGUMENT, TrainingDiverged, UserError, reason
from loggers.summary import EVALUATED
from mixing import Mixing
from mixing.mixup import Mixup
from models.capture import DiverseViT
from models.sharding import optimizer_state, whole
from models.weights import load_weights, model_weights
from state import checkpoint
from state.contents import NEW_RUN, check_description
from state.optimizers import generator_state, set_generator
from state.saved_flags import flags_of
from utils import all_reduce, gather_to_main, is_main, print_main, rank, set_streams, streams, world_size


class Score(NamedTuple):
    """By which number epochs are compared, the larger the better.

    Attributes:
        key: in what an evaluation gives.
        best: in log.txt, the largest so far.
        name: in print.
        columns: of summary.csv, and their keys in what an evaluation gives.
    """

    key: str
    best: str
    name: str
    columns: Mapping[str, str]


TOP1 = Score("acc1", "max_acc", "top-1", EVALUATED)


class Best(NamedTuple):
    """The best epoch so far, by the model or by its average.

    Attributes:
        epoch: its number, -1 before the first.
        weights: 'model' or 'model_ema', whichever was better (the model, if both were equal).
        acc1, ema_acc1: top-1 of the two, or what else is the run's score, in percent; None without an average.
    """

    epoch: int = -1
    weights: str = "model"
    acc1: float = 0.0
    ema_acc1: float | None = None

    @property
    def top(self) -> float:
        return self.acc1 if self.weights == "model" or self.ema_acc1 is None else self.ema_acc1

    def __str__(self) -> str:
        return f"epoch {self.epoch + 1}'s {'EMA' if self.weights == 'model_ema' else 'model'} with {self.top:.2f}%"


@dataclass
class RunState:
    """Everything of a run that a checkpoint holds, and the way back.

    Attributes:
        model: the unwrapped model.
        optimizer, lr_scheduler, scaler, ema: as trained.
        args: the resolved flags, plain data.
        mixing: draws from a stream of its own.
        epoch: the last finished epoch, -1 before the first.
        running: where the epoch after it stands.
        score: by what epochs are compared.
        max_acc: the model's best score so far, the last epoch's included.
        best: the best epoch so far, by the model or its average.
        log: the lines of log.txt.
        changes: which flags have changed while the run went on, in words.
        precision: autocast's dtype.
        images: what tells another training set from this one.
        samples_per_step: of this process.
        steps_per_epoch: of the optimizer.
        replaced: bool [samples of an epoch], those of this process that stand in for an image that cannot be read.
        resumed: whether this run continues another.
    """

    model: DiverseViT
    optimizer: torch.optim.Optimizer
    lr_scheduler: Scheduler
    scaler: torch.amp.GradScaler
    ema: ModelEmaV3 | None
    args: dict[str, Any]
    mixing: Mixing = field(default_factory=Mixup)
    epoch: int = -1
    running: Running = field(default_factory=Running)
    score: Score = TOP1
    max_acc: float = 0.0
    best: Best = field(default_factory=Best)
    log: list[str] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)
    precision: str = ""
    images: str = ""
    samples_per_step: int = 0
    steps_per_epoch: int = 0
    replaced: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    resumed: bool = False
    _streams: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """The checkpoint's content, on the main process. All processes must ask for it together."""
        own = {
            "streams": streams(self.device, self.mixing.random),
            "meters": self.running.meters.state_dict(),
            "finite": self.running.finite.state_dict(),
            "replaced": self.replaced[: self.samples].nonzero()[:, 0],
        }
        state = {
            "model": whole(self.model.backbone.state_dict(), is_main()),
            "optimizer": whole(self.optimizer.state_dict(), is_main()),
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "epoch": self.epoch,
            "step": self.running.step,
            "optimizer_generator": generator_state(self.optimizer),
            "scaler": self.scaler.state_dict(),
            "args": self.args,
            "updates": self.running.updates,
            "precision": self.precision,
            "images": self.images,
            "max_acc": self.max_acc,
            "best": self.best._asdict(),
            "log": self.log,
            "changes": self.changes,
            "processes": gather_to_main(own),
        }
        if (metric := self.metric) is not None:
            state["metric"] = metric
        if self.ema is not None:
            state["model_ema"] = whole(self.ema.module.backbone.state_dict(), is_main())
        return state

    @property
    def metric(self) -> float | None:
        """The score of the weights that timm's tools take from this state: the average's, where there is one.

        None in the middle of an epoch, and where these weights have not been evaluated.
        """
        if self.running.step or not self.log:
            return None
        last: dict[str, Any] = json.loads(self.log[-1])
        return last.get(("test_" if self.ema is None else "ema_test_") + self.score.key)

    @property
    def is_best(self) -> bool:
        """Whether the last epoch was the best so far."""
        return self.best.epoch == self.epoch and not self.running.step

    @property
    def place(self) -> str:
        """How far the run is, in words."""
        step = self.running.step
        return f"epoch {self.epoch + 2}, step {step}" if step else f"epoch {self.epoch + 1}"

    @property
    def steps(self) -> int:
        """Those that are done in the whole run."""
        return (self.epoch + 1) * self.steps_per_epoch + self.running.step

    @property
    def samples(self) -> int:
        """Those of this process that the running epoch's steps took."""
        return self.running.step * self.samples_per_step

    def count_bad_images(self) -> int:
        """How often all processes have replaced an image that cannot be read, in the running epoch."""
        count = self.replaced[: self.samples].sum()
        return int(all_reduce(count.to(self.device)))

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def load_state_dict(self, state: Mapping[str, Any], path: str, with_optimizer: bool = True) -> None:
        """Continue from a checkpoint. Random streams are put back by `restore_streams`, when training begins.

        Args:
            with_optimizer: whether optimizer, schedule and gradient scaler are continued, too.
        Raises:
            UserError: it is another model's or optimizer's, or was written in the middle of an epoch that cannot
                go on with these processes.
        """
        load_weights(self.model.backbone, model_weights(state, path), path)
        try:
            if with_optimizer:
                self.optimizer.load_state_dict(optimizer_state(self.optimizer, state["optimizer"]))
                set_generator(self.optimizer, state.get("optimizer_generator"))
                self.lr_scheduler.load_state_dict(state["lr_scheduler"])
                if self.scaler.is_enabled() and state.get("scaler"):
                    self.scaler.load_state_dict(state["scaler"])
            self.epoch, self.running.step = int(state["epoch"]), int(state.get("step", 0))
            if self.steps_per_epoch and self.running.step > self.steps_per_epoch:
                raise UserError(f"{path} is {self.running.step} steps into an epoch of {self.steps_per_epoch}")
            steps = (self.epoch + 1) * self.steps_per_epoch + self.running.step
            self.running.updates = int(state.get("updates", steps))
            self.max_acc = float(state.get("max_acc", 0.0))
            self.best = Best(**state.get("best", {"acc1": self.max_acc}))
            self.log, self.changes = list(state.get("log", [])), list(state.get("changes", []))
            self.resumed = True
        except BAD_ARGUMENT as error:
            raise UserError(
                f"the optimizer or schedule in {path} is not this run's ({reason(error)}): repeat the "
                f"flags of its args.yaml, or {NEW_RUN}"
            ) from error
        if self.ema is not None and "model_ema" in state:
            load_weights(self.ema.module.backbone, model_weights(state, path, ema=True), path)
        elif self.ema is not None:
            print_main(f"warning: {path} holds no EMA; the average starts anew from its weights")
            self.ema.set(self.model)
        elif "model_ema" in state:
            print_main(f"note: --no-model-ema drops the moving average of {path}")
        if self.precision and state.get("precision", self.precision) != self.precision:
            print_main(f"note: from here on autocast runs in {self.precision}, before in {state['precision']}")
        self._compare_images(state.get("images", self.images), path)
        self._load_process(state.get("processes"), path)

    def _compare_images(self, images: str, path: str) -> None:
        """Refuse to go on in the middle of an epoch with other images: it would see some twice and some never."""
        if images == self.images:
            return
        change = "the training images are not those of the checkpoint: other names, labels, sizes or order"
        if self.running.step:
            raise UserError(
                f"{path} was written in the middle of an epoch, and {change}; put them back, or resume from a "
                "checkpoint of a whole epoch"
            )
        print_main(f"note: from here on {change}")
        self.changes.append(f"after {self.place}: other training images")

    def _load_process(self, processes: list[dict[str, Any]] | None, path: str) -> None:
        """This process's own part: its meters, and what `restore_streams` puts back."""
        if processes is None:
            print_main(f"note: {path} holds no random streams; they start anew")
        elif len(processes) == world_size():
            own = processes[rank()]
            self._streams = own["streams"]
            self.running.meters.load_state_dict(own["meters"])
            self.running.finite.load_state_dict(own["finite"])
            if len(self.replaced):  # --skip-bad-images is still on
                if len(own["replaced"]) and not 0 <= int(own["replaced"].max()) < len(self.replaced):
                    raise UserError(f"{path} has replaced images that an epoch does not have: take another one")
                self.replaced[own["replaced"]] = True
        elif self.running.step:
            raise UserError(
                f"{path} was written in the middle of an epoch by {len(processes)} processes, not {world_size()}: "
                "resume with as many, or from a checkpoint of a whole epoch"
            )
        else:
            print_main(f"note: {path} is of {len(processes)} processes, not {world_size()}: other random draws")

    def drop_streams(self) -> None:
        """Leave the random streams as the flags have seeded them."""
        self._streams = None

    def restore_streams(self) -> None:
        """Put the random streams back to where the checkpoint left them."""
        if self._streams is not None:
            set_streams(self._streams, self.device, self.mixing.random)
            self._streams = None

    def check_weights(self) -> None:
        """Raise TrainingDiverged if a weight is not finite: a gradient was not, although the loss was."""
        for name, weight in self.model.backbone.named_parameters():
            if not weight.isfinite().all():
                raise TrainingDiverged(
                    f"{name} is no longer finite after {self.place}: a gradient overflowed where the loss did not. "
                    "The last checkpoint is from before: continue from it with --resume auto and --amp-dtype "
                    "bfloat16 or float32, a smaller --lr, or --clip-grad 1"
                )

    def nbytes(self) -> int:
        """About how large a checkpoint is: weights, average, and what the optimizer will hold of each weight."""
        weights = checkpoint.nbytes(self.model.backbone.state_dict())
        return weights * (4 if self.ema is not None else 3)

    def finish_epoch(
        self,
        trained: Mapping[str, float],
        tested: Mapping[str, float],
        averaged: Mapping[str, float],
        monitored: Mapping[str, float] | None = None,
    ) -> dict[str, Any]:
        """Step the schedule and add the epoch to the log.

        Args:
            trained, tested, averaged: what training, the model's evaluation and that of its EMA gave; averaged is
                empty without an EMA, and both where the epoch is not evaluated.
            monitored: redundancy, if it was measured (`--monitor-redundancy`).
        Returns: the epoch's line of log.txt, in which null stands for what is not a number.
        """
        self.epoch += 1
        self.running.begin_epoch()
        self.replaced.zero_()
        self.lr_scheduler.step(self.epoch, tested.get(self.score.key))
        if tested:
            self.max_acc = max(self.max_acc, tested[self.score.key])
            self._compare_with_best(tested[self.score.key], averaged.get(self.score.key))
        record: dict[str, Any] = {f"train_{name}": value for name, value in trained.items()}
        record |= {f"test_{name}": value for name, value in tested.items()}
        record |= {f"ema_test_{name}": value for name, value in averaged.items()}
        record |= {f"redundancy_{name}": value for name, value in (monitored or {}).items()}
        parameters = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        record |= {self.score.best: self.max_acc, "epoch": self.epoch, "n_parameters": parameters}
        finite = {name: value if math.isfinite(value) else None for name, value in record.items()}
        self.log.append(json.dumps(finite, allow_nan=False))
        return finite

    def _compare_with_best(self, acc1: float, ema_acc1: float | None) -> None:
        """Keep the epoch as the best one if the model or its average was better than all before."""
        by_ema = ema_acc1 is not None and (ema_acc1 > acc1 or math.isnan(acc1))
        last = Best(self.epoch, "model_ema" if by_ema else "model", acc1, ema_acc1)
        if last.top > self.best.top:
            self.best = last


def check_remedies(state: Any, remedies: Sequence[str], path: str) -> None:
    """Refuse to evaluate weights in a model with other remedies than they were trained with.

    Args:
        state: the checkpoint; one that holds no flags is let through.
        remedies: of the model, as --remedy has them.
        path: of the checkpoint.
    Raises:
        UserError: they differ. Without parameters of a remedy, the weights would fit.
    """
    check_description(state, path, ("remedy",))
    flags = flags_of(state)
    then, now = list(flags.get("remedy") or []), list(remedies)
    if flags and then != now:
        had, has = (" ".join(f"--remedy {text}" for text in texts) or "no --remedy" for texts in (then, now))
        raise UserError(f"{path} was trained with {had}, and this model has {has}: give the same")


def check_class_names(saved: Any, names: Sequence[str], path: str) -> None:
    """Refuse data whose classes are not those that a checkpoint was trained on, where both have names.

    Args:
        saved: the flags in the checkpoint.
        names: the classes of the data, in the order of their labels.
        path: of the checkpoint.
    Raises:
        UserError: a label would mean another class.
    """
    flags = vars(saved) if isinstance(saved, argparse.Namespace) else saved or {}
    trained = list(flags.get("class_names") or [])
    if not trained or not names or trained == list(names):
        return
    label = next(n for n, pair in enumerate(zip_longest(trained, names)) if pair[0] != pair[1])
    then, now = (each[label] if label < len(each) else "none" for each in (trained, list(names)))
    raise UserError(
        f"{path} was trained on other classes than the data has: class {label} of {len(trained)} was {then!r}, "
        f"here class {label} of {len(names)} is {now!r}. Give the data that it was trained on, or {NEW_RUN}"
    )
