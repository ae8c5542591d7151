"""Process group, seeding, meters and progress: what every other module may lean on.

Nothing here knows about models, measures or data. Errors a user can fix are `UserError`s: `main.py` turns
them into one line on stderr and exit code 2.
"""

from __future__ import annotations

import difflib
import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")


class UserError(Exception):
    """Something the user gave cannot work. The message says what, and what to do about it."""


class LocalError(UserError):
    """A UserError that perhaps only this process meets: every process prints its own."""


# What libraries raise for an argument that they cannot use.
BAD_ARGUMENT = (
    TypeError,
    ValueError,
    AssertionError,
    RuntimeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    ImportError,
    OSError,
)


class TrainingDiverged(Exception):
    """The loss is no longer finite. The message names the first term that broke."""


class Interrupted(Exception):
    """A signal asked the run to stop, and it did so after saving."""


def did_you_mean(word: str, known: Iterable[str], count: int = 3) -> str:
    """' Did you mean a, b or c?' for the nearest known words, or '' if none is near."""
    near = difflib.get_close_matches(word, list(known), n=count)
    return f" Did you mean {' or '.join(near)}?" if near else ""


# ------------------------------------------------------------------------------------------------------------
# Processes


@dataclass(frozen=True)
class Launch:
    """Who this process is: global rank, number of processes, rank on its own machine."""

    rank: int
    world_size: int
    local_rank: int


def _first_slurm_host(nodelist: str) -> str:
    """First host of a SLURM node list: 'gpu[07-09,12],login1' -> 'gpu07'."""
    head = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\])?", nodelist)
    if head is None:
        raise UserError(f"cannot read the first host from SLURM_JOB_NODELIST={nodelist!r}; export MASTER_ADDR")
    return head.group(1) + (head.group(2) or "")


def find_launch(world_size: int = 1, env: Mapping[str, str] = os.environ) -> Launch:
    """Read rank and world size from torchrun's variables, else SLURM's, else be a single process.

    Args:
        world_size: what `--world_size` said; used where the launcher sets RANK but no WORLD_SIZE.
        env: the environment.
    Raises:
        UserError: several processes are asked for but nothing says which one this is.
    """
    if "RANK" in env:
        values = [env["RANK"], env.get("WORLD_SIZE", str(world_size)), env.get("LOCAL_RANK", "0")]
        if not all(value.isdigit() for value in values):
            raise UserError(f"RANK, WORLD_SIZE, LOCAL_RANK are {values}: start with torchrun, or unset RANK")
        return Launch(*(int(value) for value in values))
    if int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:  # srun sets it; a batch script by itself is one process
        return Launch(int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"]), int(env["SLURM_LOCALID"]))
    if world_size > 1:
        raise UserError(
            f"--world_size {world_size}, but no launcher set RANK: start with "
            f"'torchrun --nproc_per_node {world_size} main.py ...' or srun"
        )
    return Launch(0, 1, 0)


def init_distributed(
    launch: Launch, device: torch.device, dist_url: str = "env://", timeout: float = 1800.0
) -> None:
    """Join the process group (NCCL on CUDA, gloo elsewhere); a single process joins none.

    Args:
        timeout: seconds that a process waits for the others, here and in every exchange.
    """
    if launch.world_size == 1:
        return
    if dist_url == "env://" and "MASTER_ADDR" not in os.environ:
        if "SLURM_JOB_NODELIST" not in os.environ:
            raise UserError("several processes, but no MASTER_ADDR: start with torchrun, or give --dist_url")
        os.environ["MASTER_ADDR"] = _first_slurm_host(os.environ["SLURM_JOB_NODELIST"])
        os.environ.setdefault("MASTER_PORT", str(20000 + int(os.environ.get("SLURM_JOB_ID", 0)) % 10000))
    restart, patience = _restart(launch), timedelta(seconds=timeout)
    try:
        store, _, _ = next(dist.rendezvous(dist_url, launch.rank, launch.world_size, timeout=patience))
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore(f"restart{restart}", store),
            rank=launch.rank,
            world_size=launch.world_size,
            device_id=device if device.type == "cuda" else None,
            timeout=patience,
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{launch.world_size} processes cannot meet at --dist_url {dist_url}: {error}") from error


def _restart(launch: Launch, env: Mapping[str, str] = os.environ) -> str:
    """How often torchrun has restarted the processes.

    torchrun keeps one store for all of them, in which a restarted process would find addresses of dead ones. On one
    machine each restart gets a part of its own; several machines count restarts differently, and need a new store.

    Raises:
        UserError: several machines would restart in one store. Source: pytorch issue 135712.
    """
    shared = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    several = int(env.get("LOCAL_WORLD_SIZE", 0)) < launch.world_size
    if shared and several and int(env.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0:
        raise UserError(
            "torchrun --max-restarts on several machines works with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 only: "
            "export it on all of them before torchrun"
        )
    return env.get("TORCHELASTIC_RESTART_COUNT", "0") if shared and not several else "0"


def broadcast_from_main(module: nn.Module) -> None:
    """Give every process the main one's parameters and buffers."""
    if world_size() > 1:
        for tensor in module.state_dict().values():
            dist.broadcast(tensor, src=0)


def broadcast_object(find: Callable[[], Any]) -> Any:
    """What the main process finds, on every process; its UserError, too."""
    told: list[Any] = [None, None]  # result, failure
    if is_main():
        try:
            told[0] = find()
        except UserError as error:
            told[1] = str(error)
    if world_size() > 1:
        dist.broadcast_object_list(told, src=0)
    if told[1] is not None:
        raise UserError(told[1])
    return told[0]


def gather_to_main(value: Any) -> list[Any]:
    """Every process's value, rank by rank, on the main process; an empty list elsewhere."""
    if world_size() == 1:
        return [value]
    values: list[Any] | None = [None] * world_size() if is_main() else None
    dist.gather_object(value, values, dst=0)
    return values or []


class Vote:
    """What all processes think of a question, found out without waiting for the end of their devices' queues.

    Each process asks with its own numbers; the answer is the smallest of any process, for each number. The device
    reduces them while it is busy anyway, and `answer` waits for that result alone. All processes must ask the same
    number of times.
    """

    def __init__(self) -> None:
        self._answer: Tensor | None = None
        self._ready: torch.cuda.Event | None = None

    def ask(self, numbers: Tensor) -> None:
        """Start to find out the smallest; `numbers` [n] is overwritten."""
        smallest = all_reduce(numbers, dist.ReduceOp.MIN)
        self._answer = smallest.to("cpu", non_blocking=smallest.device.type == "cuda")
        if smallest.device.type == "cuda":
            self._ready = torch.cuda.Event()
            self._ready.record()

    def answer(self) -> list[float]:
        """The answer to the last question, once; an empty list if there is none."""
        if self._answer is None:
            return []
        if self._ready is not None:
            self._ready.synchronize()
        smallest, self._answer = self._answer.tolist(), None
        return smallest


class Signals:
    """Remembers SIGTERM and SIGUSR1, which ask a run to save and stop, while it is entered."""

    NAMES = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.received = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Signals:
        self._before = {name: signal.signal(name, self._remember) for name in self.NAMES}
        return self

    def __exit__(self, *exception: object) -> None:
        for name, handler in self._before.items():
            signal.signal(name, handler)

    def _remember(self, number: int, frame: object) -> None:
        self.received = True


def lost_process(error: RuntimeError) -> str | None:
    """What to tell the user if the error is a failed exchange with another process; None if it is another error."""
    reason = str(error).strip().partition("\n")[0]
    if not isinstance(error, dist.DistError) and "/gloo/" not in reason:
        return None
    reason = re.sub(r"^\[.*?\] ", "", reason).partition(". ")[0]  # without the place in gloo's source
    return (
        f"process {rank()} of {world_size()} has lost another one ({reason}): it died, or did not answer for "
        "--dist-timeout seconds, and says why in its own messages; continue with --resume auto"
    )


def is_first_on_machine(env: Mapping[str, str] = os.environ) -> bool:
    """Whether this is the first process of its machine; known before any process group is."""
    return env.get("LOCAL_RANK", env.get("SLURM_LOCALID", "0")) == "0"


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    return rank() == 0


def all_reduce(values: Tensor, operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """Reduce `values` over all processes, in place (a single process returns them unchanged)."""
    if world_size() > 1:
        dist.all_reduce(values, operation)
    return values


def print_main(*text: object) -> None:
    """Print on the main process only."""
    if is_main():
        print(*text, flush=True)


# ------------------------------------------------------------------------------------------------------------
# Devices and seeds


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """'auto' takes cuda, then mps, then cpu; a CUDA device is the process's own.

    Raises:
        UserError: the named device does not exist here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name}: not a device name; use auto, cpu, cuda or mps") from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"--device {name}: no CUDA device is visible; use --device auto or cpu")
        index = local_rank if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise LocalError(
                f"process with local rank {local_rank} has no GPU of its own: {torch.cuda.device_count()} "
                "visible; start fewer processes per machine"
            )
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"--device {name}: no MPS device is available; use --device auto or cpu")
    elif device.type not in ("cpu", "mps"):
        raise UserError(f"--device {name} is not supported; use auto, cpu, cuda or mps")
    return device


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch (all devices). The reference calls this with seed + rank."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


# ------------------------------------------------------------------------------------------------------------
# Meters and progress


class Meters:
    """Running means that stay on the device until somebody reads them.

    `update` only enqueues device work; `means` and `global_means` wait for the device. Every update gives the same
    names in the same order.
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        self._sums: Tensor | None = None  # [names]
        self._count = 0

    def update(self, values: Mapping[str, Tensor]) -> None:
        """Add one value of each meter."""
        row = torch.stack([value.detach() for value in values.values()])  # [names]
        row = row if row.device.type == "mps" else row.double()  # float64 keeps long sums exact; MPS has none
        if self._sums is None:
            self._names = list(values)
            self._sums = torch.zeros_like(row)
        self._sums = self._sums.to(row.device) + row
        self._count += 1

    def means(self) -> dict[str, float]:
        """Mean of every meter on this process."""
        if self._sums is None:
            return {}
        return {name: total / self._count for name, total in zip(self._names, self._sums.tolist(), strict=True)}

    def global_means(self) -> dict[str, float]:
        """Mean of every meter over all processes."""
        if self._sums is None:
            return {}
        count = torch.full_like(self._sums[:1], self._count)
        *sums, updates = all_reduce(torch.cat([self._sums, count])).tolist()
        return {name: total / updates for name, total in zip(self._names, sums, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        """The sums as plain data."""
        sums = self._sums.cpu() if self._sums is not None else None
        return {"names": self._names, "sums": sums, "count": self._count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from such sums."""
        self._names, self._sums, self._count = list(state["names"]), state["sums"], int(state["count"])


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


class Progress:
    """Count steps and show where the work stands: a bar on a terminal, a line per interval elsewhere.

    Args:
        header: what the line starts with, e.g. 'Epoch 3/300'.
        interval: steps between updates of the shown numbers; reading numbers waits for the device, so nothing
            is read in between.
        units_after: units of the same length still to come after this one, for the run's ETA.
    """

    BAR = 24

    def __init__(self, header: str, interval: int = 10, units_after: int = 0) -> None:
        self.header = header
        self.interval = interval
        self.units_after = units_after
        self._terminal = sys.stdout.isatty()
        self._shown_width = 0

    def over(self, first: int, total: int, meters: Meters) -> Iterator[int]:
        """Yield the steps from `first` to `total`; show progress every `interval` steps and after the last."""
        start = time.perf_counter()
        for step in range(first, total + 1):
            yield step
            if is_main() and (step % self.interval == 0 or step == total):
                each = (time.perf_counter() - start) / (step - first + 1)
                self._show(step, total, meters.means(), each)
        if is_main() and self._terminal:
            print(flush=True)

    def _show(self, step: int, total: int, means: Mapping[str, float], each: float) -> None:
        eta = f"eta {clock(each * (total - step))}"
        if self.units_after:
            eta += f", run {clock(each * (total - step + total * self.units_after))}"
        entries = [f"[{step}/{total}]", eta, f"{1 / each:.2f} it/s"]
        entries += [f"{name} {value:.4g}" for name, value in means.items()]
        if not self._terminal:
            print("  ".join([self.header, *entries]), flush=True)
            return
        done = round(self.BAR * step / max(total, 1))
        line, room = (
            f"{self.header} |{'█' * done}{'·' * (self.BAR - done)}|",
            shutil.get_terminal_size().columns - 1,
        )
        for entry in entries:
            if len(line) + 2 + len(entry) > room:
                break
            line += "  " + entry
        print("\r" + line.ljust(self._shown_width), end="", flush=True)
        self._shown_width = len(line)
