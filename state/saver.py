"""When a run is saved, and how it stops after a signal."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from errors import Interrupted, UserError
from program import Patience, Signals
from state import checkpoint
from state.run_state import RunState
from utils import Vote, broadcast_object, is_main


class Saver:
    """Saves, and stops the run after a signal: after the same step on all processes.

    Any process may have received the signal, and the main process's clock says when minutes have passed. What each
    wishes for, and what all then do, is 0 (go on), SAVE or STOP.

    Args:
        run_state: what is saved.
        folder: where; None saves nothing.
        signals: what asks a run to stop.
        keep: how many of the latest checkpoints stay.
        steps: steps between checkpoints within an epoch; 0: none.
        minutes: minutes between checkpoints; 0: none.
        eval_batches: batches of an evaluation that every process has; only after these can it be stopped.
        patience: for writing.
    """

    SAVE, STOP = 1, 2

    def __init__(
        self,
        run_state: RunState,
        folder: Path | None,
        signals: Signals,
        keep: int = 1,
        steps: int = 0,
        minutes: float = 0.0,
        eval_batches: int = 0,
        patience: Patience | None = None,
    ) -> None:
        self.run_state = run_state
        self.folder = folder
        self.signals = signals
        self.keep = keep
        self.steps = steps
        self.minutes = minutes
        self.eval_batches = eval_batches
        self.patience = patience or Patience()
        run_state.running.finite.own_wish = self.wish
        self._last = time.monotonic()
        self._saved: tuple[int, int] | None = None  # where the run was when it was last saved: epoch and step
        self._trained: tuple[int, int] | None = None  # where it was when it last began an evaluation
        self._vote = Vote()

    def wish(self) -> int:
        """What this process wishes for.

        Raises:
            KeyboardInterrupt: after a Ctrl-C that was lost.
        """
        self.signals.check()
        late = self.minutes > 0 and is_main() and time.monotonic() - self._last >= 60 * self.minutes
        return self.STOP if self.signals.received else self.SAVE if late else 0

    def after_step(self, step: int) -> None:
        """Do what any process wished for, after a training step.

        Raises:
            Interrupted: a signal asked the run to stop; it is saved.
        """
        wish = self.run_state.running.finite.wish
        if wish or (self.steps and step % self.steps == 0):
            self.save()
        if wish == self.STOP:
            self._stop()

    def after_training(self) -> None:
        """Save the epoch's training before its evaluation begins, so that nothing that happens there loses it.

        What is saved after the evaluation takes the place of this file, so that no older checkpoint goes for it.
        """
        self._trained = self._place
        if self._saved != self._trained:
            self.save()
        self._ask()

    def after_batch(self, batch: int) -> None:
        """Stop for a signal during the evaluation, one batch after it came; the epoch's training is saved.

        Raises:
            Interrupted: as in `after_step`.
        """
        if batch > self.eval_batches:
            return
        wish = self._agreed()
        self._ask()
        if wish == self.STOP:
            self._stop()

    def complete(self) -> None:
        """Do what the last save of a run that was killed has begun, once that run is resumed in its folder."""
        broadcast_object(self._complete)

    def _complete(self) -> None:
        assert self.folder is not None
        here = [path for path in checkpoint.files(self.folder) if self._is_at(path, self._place)]
        latest, best = self.folder / checkpoint.LATEST, self.folder / checkpoint.BEST
        if latest not in here:
            checkpoint.give_name(here[0], latest)
        if self.run_state.is_best and best not in here:
            checkpoint.give_name(latest, best)

    def after_epoch(self, record: Mapping[str, Any]) -> None:
        """Save the state of a finished epoch, as the best one too if it is.

        Raises:
            Interrupted: as in `after_step`.
        """
        self.save(self.run_state.is_best)
        self._ask()
        if self._agreed() == self.STOP:
            self._stop()

    def _ask(self) -> None:
        self._vote.ask(torch.tensor([-float(self.wish())], device=self.run_state.device))

    def _agreed(self) -> int:
        """What any process wished for when last asked."""
        return round(-min(self._vote.answer(), default=0))

    def save(self, best: bool = False) -> None:
        """Write checkpoint.pth, and checkpoint_best.pth if it is the best. All processes take part.

        Raises:
            UserError: the main process cannot write.
            TrainingDiverged: weights are not finite; the last checkpoint stays as it is.
        """
        self._last = time.monotonic()
        if self.folder is None:
            return
        self.run_state.check_weights()
        state = self.run_state.state_dict()
        with self.patience.over("writing a checkpoint"):
            broadcast_object(lambda: self._write(state, best))
        self._saved = self._place

    def _write(self, state: dict[str, Any], best: bool) -> None:
        assert self.folder is not None
        latest = self.folder / checkpoint.LATEST
        awaits_evaluation = self._trained is not None and self._is_at(latest, self._trained)
        checkpoint.save(state, latest, keep=1 if awaits_evaluation else self.keep)
        if best:
            checkpoint.give_name(latest, self.folder / checkpoint.BEST)

    @staticmethod
    def _is_at(path: Path, place: tuple[int, int]) -> bool:
        """Whether a file holds this epoch and step; a resumed run may find one."""
        try:
            return path.exists() and checkpoint.progress(path) == place
        except UserError:
            return False  # it is damaged

    @property
    def _place(self) -> tuple[int, int]:
        return self.run_state.epoch, self.run_state.running.step

    def _stop(self) -> None:
        where = f"stopped by a signal after {self.run_state.place}"
        if self.folder is None:
            raise Interrupted(f"{where}; nothing is saved without --output_dir")
        raise Interrupted(f"{where}, and saved: continue with --resume auto")
