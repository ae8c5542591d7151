"""Process group, devices, files and random streams: what every other module may lean on.

Nothing here knows about models, measures or data.
"""

from __future__ import annotations

import errno
import os
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import get_worker_info

from errors import LocalError, UserError, escaped

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
    """Print on the main process only, without characters that a terminal would obey."""
    if is_main():
        print(*(escaped(str(part)) for part in text), flush=True)


# ------------------------------------------------------------------------------------------------------------
# Devices


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


# ------------------------------------------------------------------------------------------------------------
# Files


def write_atomically(
    path: Path, write: Callable[[IO[bytes]], object], just_before: Callable[[], object] | None = None
) -> None:
    """Write a file so that `path` holds either the old content or the new, whole, at any moment.

    Args:
        path: the file.
        write: writes the content into an open file.
        just_before: done when the new content is safe on the disk, and has not yet replaced the old.
    Raises:
        OSError: the disk is full or failing, or the folder cannot be written to. The old file is still there.
        UserError: the new file is there, but may not survive a power cut.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
        put_in_place(temporary, path, just_before)
    finally:
        temporary.unlink(missing_ok=True)


def put_in_place(temporary: Path, path: Path, just_before: Callable[[], object] | None = None) -> None:
    """Let a finished file take its name; see `write_atomically`."""
    flush(temporary)
    if just_before is not None:
        just_before()
    os.replace(temporary, path)
    try:
        flush(path.parent)
    except OSError as error:
        raise UserError(f"{path} may not survive a power cut: its folder cannot be flushed, {error}") from error


def flush(path: Path) -> None:
    """Make a file's content, or the names in a folder, survive a power cut, where the file system can."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # it flushes no folders
            raise
    finally:
        os.close(descriptor)


# ------------------------------------------------------------------------------------------------------------
# Random streams


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch (all devices). The reference calls this with seed + rank."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def seed_generators(entropy: Sequence[int]) -> None:
    """Seed python's, numpy's and torch's (CPU) global generators, for one sample.

    numpy's SeedSequence makes 128 well mixed bits of `entropy`. python and numpy take all of them, torch's
    generator can take 32: of a million samples some share torch's stream, but none share python's or numpy's.
    """
    words = np.random.SeedSequence(entropy).generate_state(4)  # uint32
    random.seed(words.tobytes())
    np.random.seed(words)
    torch.default_generator.manual_seed(int(words[0]))  # torch.manual_seed would seed the accelerators as well


@contextmanager
def keep_random_state() -> Iterator[None]:
    """Put the states of python's, numpy's and torch's (CPU) global generators back afterwards.

    A loader's worker draws random numbers for nothing but its samples, so there the states are left as they are.
    """
    if get_worker_info() is not None:
        yield
        return
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])


def streams(device: torch.device, mixing: np.random.RandomState) -> dict[str, Any]:
    """Where this process's random streams stand, as plain data: python's, numpy's, torch's, the mixing's."""
    version, words, gauss = random.getstate()
    found: dict[str, Any] = {
        "python": [version, torch.tensor(words), gauss],
        "numpy": _plain(np.random.get_state(legacy=False)),
        "mixup": _plain(mixing.get_state(legacy=False)),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        found["device"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        found["device"] = torch.mps.get_rng_state()
    return found


def set_streams(state: Mapping[str, Any], device: torch.device, mixing: np.random.RandomState) -> None:
    """Put them back."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    np.random.set_state(_as_numpy(state["numpy"]))
    mixing.set_state(_as_numpy(state["mixup"]))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "device" in state:
        torch.cuda.set_rng_state(state["device"], device)
    elif device.type == "mps" and "device" in state:
        torch.mps.set_rng_state(state["device"])


def _plain(state: Any) -> dict[str, Any]:
    """numpy's state of a generator with its words as a tensor, which checkpoints can hold."""
    words = torch.from_numpy(state["state"]["key"].astype(np.int64))
    return {**state, "state": {"key": words, "pos": int(state["state"]["pos"])}}


def _as_numpy(state: Mapping[str, Any]) -> dict[str, Any]:
    words = state["state"]["key"].numpy().astype(np.uint32)
    return {**state, "state": {"key": words, "pos": state["state"]["pos"]}}
