"""Everything of a run that a checkpoint holds, and the way back."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import torch
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3

from checkpoint import load_weights, model_weights
from models.capture import DiverseViT
from utils import BAD_ARGUMENT, UserError, print_main

# Flags that a resumed run must keep, and flags whose old values live on in the restored optimizer and schedule.
FIXED = ("opt", "sched")
OVERRULED = ("epochs", "lr", "min_lr", "warmup_lr", "warmup_epochs", "weight_decay", "batch_size", "decay_rate")


@dataclass
class RunState:
    """Everything of a run that a checkpoint holds, and the way back.

    Attributes:
        model: the unwrapped model.
        optimizer, lr_scheduler, scaler, ema: as trained.
        args: the resolved flags, plain data.
        epoch: the last finished epoch, -1 before the first.
        max_acc: the best top-1 so far, the last epoch's included.
    """

    model: DiverseViT
    optimizer: torch.optim.Optimizer
    lr_scheduler: Scheduler
    scaler: torch.amp.GradScaler
    ema: ModelEmaV3 | None
    args: dict[str, Any]
    epoch: int = -1
    max_acc: float = 0.0

    def state_dict(self) -> dict[str, Any]:
        """The checkpoint's content."""
        state = {
            "model": self.model.backbone.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "epoch": self.epoch,
            "scaler": self.scaler.state_dict(),
            "args": self.args,
            "max_acc": self.max_acc,
        }
        if self.ema is not None:
            state["model_ema"] = self.ema.module.backbone.state_dict()
        return state

    def load_state_dict(self, state: Any, path: str) -> None:
        """Continue from a checkpoint.

        Raises:
            UserError: it lacks what a continuation needs, or is another model's.
        """
        needed = ["model", "optimizer", "lr_scheduler", "epoch"]
        missing = [key for key in needed if not isinstance(state, dict) or key not in state]
        if missing:
            raise UserError(
                f"{path} cannot be resumed, it has no {', '.join(missing)}; --finetune starts from its weights, "
                "--eval --resume evaluates them"
            )
        self._compare_args(state.get("args"), path)
        load_weights(self.model.backbone, model_weights(state, path), path)
        try:
            self.optimizer.load_state_dict(state["optimizer"])
            self.lr_scheduler.load_state_dict(state["lr_scheduler"])
            if self.scaler.is_enabled() and state.get("scaler"):
                self.scaler.load_state_dict(state["scaler"])
            self.epoch = int(state["epoch"])
            self.max_acc = float(state.get("max_acc", 0.0))
        except BAD_ARGUMENT as error:
            raise UserError(
                f"the optimizer or schedule in {path} is not what --opt and --sched say ({error}); "
                "repeat the flags of its args.yaml, or start from its weights with --finetune"
            ) from error
        if self.ema is not None and "model_ema" in state:
            load_weights(self.ema.module.backbone, model_weights(state, path, ema=True), path)
        elif self.ema is not None:
            print_main(f"warning: {path} holds no EMA; the average starts anew from its weights")
            self.ema.set(self.model)

    def _compare_args(self, saved: Any, path: str) -> None:
        """Refuse another optimizer or schedule; say which other flags the checkpoint's state overrules."""
        then = vars(saved) if isinstance(saved, argparse.Namespace) else saved or {}
        changed = {key: then[key] for key in FIXED + OVERRULED if key in then and then[key] != self.args.get(key)}
        for key in FIXED:
            if key in changed:
                raise UserError(
                    f"{path} was trained with --{key} {changed[key]}, not {self.args.get(key)}: keep it"
                )
        for key, value in changed.items():
            name = key.replace("_", "-")
            print_main(f"warning: --{name} {self.args.get(key)} has no effect: the checkpoint's {value} goes on")
