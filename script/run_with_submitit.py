"""Submit a training run to SLURM with submitit, one process per GPU; it goes on by itself after its time limit.

    python script/run_with_submitit.py --nodes 2 --ngpus 8 --timeout 1440 --partition gpu -- \\
        --config configs/deit_small_diverse.yaml --data-path /data/imagenet --output_dir runs/x

Flags after -- are main.py's, and so are unknown ones before it. They are checked before anything is submitted. With
--program segmentation they are those of python -m segmentation, and what is said of main.py holds for it.
The logs lie in --job-dir, which every machine must see; by default it is OUTPUT_DIR/submitit/JOB.

How a signal becomes a checkpoint: in each task submitit installs a handler that puts the job back into the queue,
and then calls `Training`, which runs main.py in a process of its own. submitit's handler would requeue at once,
before anything is saved, so `Training` puts its own in front of it. That one passes a signal on to main.py as
SIGTERM, and main.py finishes its step, saves and exits with code 75. Only then is submitit's handler called, in the
first of all tasks: it asks `Training.checkpoint` what to run next (the same, with --resume auto) and requeues the
job. SLURM sends USR2 ahead of the time limit; SIGTERM means preemption or scancel. A cancelled job saves as well,
but does not come back: `Training` asks SLURM whether the job is still running.

Exit codes: 0 submitted, or done; 1 the training failed (--cluster local); 2 something given cannot work; 75 stopped
by SIGTERM and saved (--cluster local); 130 interrupted. --cluster debug ends with main.py's own.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from errors import UserError
from options import config
from options.config import Resolved
from options.parser import KeyValues, Parser
from program import outlive_readers

ROOT = str(Path(__file__).resolve().parents[1])
MAIN = str(Path(ROOT) / "main.py")
PROGRAMS = ("main", "segmentation")
INTERRUPTED = 75  # main.py has saved a checkpoint and wants to be run again
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
SAVING_TIME = 120  # seconds between SLURM's signal and the time limit


# ------------------------------------------------------------------------------------------------------------
# In the job. submitit pickles this class by value, with the constants above; what it imports, the job imports.


@dataclass(frozen=True)
class Training:
    """A program with its flags, as one task of a job."""

    flags: tuple[str, ...]
    program: str = "main"

    def __call__(self) -> int:
        """Run main.py; where it was interrupted, put the job back into the queue, which does not return."""
        import submitit

        job = submitit.JobEnvironment()
        number = signal.Signals[f"SIG{job.USR_SIG}"]
        requeue: Any = signal.getsignal(number)  # submitit's
        code, received = self.run(environment(job))
        if code not in (0, INTERRUPTED):
            raise RuntimeError(f"{self.program} ended with exit code {code}")
        if code == INTERRUPTED and job.global_rank == 0:
            if comes_back(job, received):
                requeue(number, None)
            print("saved; the job is being ended: the same command continues the run", flush=True)
        return code

    def checkpoint(self) -> Any:
        """What submitit runs after the requeue. The flags end with --resume auto from the start."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)

    def run(self, env: dict[str, str]) -> tuple[int, list[int]]:
        """main.py's exit code, and the signals that came for it."""
        received: list[int] = []
        process: subprocess.Popen[bytes] | None = None

        def pass_on(number: int, frame: object) -> None:
            received.append(number)
            if process is not None:
                process.terminate()

        for number in SIGNALS:
            signal.signal(number, pass_on)
        # Some clusters signal a task's children too. main.py does not know USR2; blocked here, it is blocked there.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
        process = subprocess.Popen(call(self.program, self.flags), env={**env, **to_find(self.program)})
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR2])
        try:
            if received:
                process.terminate()  # a signal came before there was a process
            return process.wait(), received
        finally:
            process.terminate()  # it must not outlive this task, which the keyboard can end


def call(program: str, flags: Sequence[str]) -> list[str]:
    """The command that starts a program."""
    return [sys.executable, *([MAIN] if program == "main" else ["-m", program]), *flags]


def environment(job: Any) -> dict[str, str]:
    """This process's variables, with torchrun's, which main.py reads."""
    return {
        **os.environ,
        "RANK": str(job.global_rank),
        "WORLD_SIZE": str(job.num_tasks),
        "LOCAL_RANK": str(job.local_rank),
        "MASTER_ADDR": job.hostnames[0] if job.cluster == "slurm" else "127.0.0.1",
        "MASTER_PORT": str(20000 + int(job.job_id) % 10000),  # below what Linux hands out by itself
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),  # as torchrun has it
    }


def to_find(program: str) -> dict[str, str]:
    """What Python needs to find it from any folder: PYTHONPATH with the project in front, of a package."""
    if program == "main":
        return {}
    return {"PYTHONPATH": os.pathsep.join(filter(None, [ROOT, os.environ.get("PYTHONPATH")]))}


def comes_back(job: Any, received: Sequence[int]) -> bool:
    """Whether an interrupted job is to be requeued: not if it was cancelled."""
    if job.cluster != "slurm":
        return signal.SIGTERM not in received
    command = ["scontrol", "show", "job", job.job_id]
    shown = subprocess.run(command, capture_output=True, text=True, check=False)
    return shown.returncode != 0 or "JobState=RUNNING" in shown.stdout


# ------------------------------------------------------------------------------------------------------------
# On the machine that submits


def get_args_parser() -> argparse.ArgumentParser:
    """The command line, without main.py's flags."""
    parser = Parser(
        prog="run_with_submitit.py",
        usage="run_with_submitit.py [FLAGS] -- [FLAGS of the program]",
        description=(__doc__ or "").partition("\n")[0],
        allow_abbrev=False,
    )
    parser.add_argument("--program", choices=PROGRAMS, default="main", help="what is run: main.py, or segmentation")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="machines (1)")
    gpus = "processes and GPUs per machine (8); 0 is one process without a GPU"
    parser.add_argument("--ngpus", type=int, default=8, metavar="N", help=gpus)
    parser.add_argument("--cpus-per-task", type=int, default=10, metavar="N", help="CPU cores per process (10)")
    parser.add_argument("--timeout", type=int, default=1440, metavar="MINUTES", help="time limit (1440)")
    retries = "times that the job may reach its time limit and be requeued (100); preemptions do not count"
    parser.add_argument("--max-timeouts", type=int, default=100, metavar="N", help=retries)
    parser.add_argument("--partition", metavar="NAME", help="SLURM's partition; the site's default if not given")
    parser.add_argument("--job-name", default="vit-diversity", metavar="NAME", help="the job's name")
    parser.add_argument("--job-dir", metavar="DIR", help="for logs, %%j is the job; OUTPUT_DIR/submitit/%%j")
    other = "other options of sbatch, e.g. account=vision constraint=h100"
    parser.add_argument("--slurm", nargs="*", action=KeyValues, default={}, metavar="KEY=VALUE", help=other)
    where = "slurm; local: processes of this machine; debug: main.py itself, in this terminal"
    parser.add_argument("--cluster", choices=["slurm", "local", "debug"], default="slurm", help=where)
    return parser


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, tuple[str, ...]]:
    """Own flags, and main.py's, which end with --resume auto.

    Raises:
        UserError: they cannot work.
    """
    words = list(argv)
    end = words.index("--") if "--" in words else len(words)
    args, unknown = get_args_parser().parse_known_args(words[:end])
    flags = [*unknown, *words[end + 1 :]]
    for name, least in (("nodes", 1), ("ngpus", 0), ("cpus_per_task", 1), ("timeout", 1), ("max_timeouts", 0)):
        if getattr(args, name) < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}, not {getattr(args, name)}")
    if args.cluster != "slurm" and args.nodes > 1:
        raise UserError(f"--cluster {args.cluster} is this machine alone: drop --nodes {args.nodes}")
    if args.cluster == "slurm" and not (shutil.which("sbatch") and shutil.which("srun")):
        raise UserError("no sbatch and srun on PATH: submit where SLURM is, or try --cluster local")
    resume = resolve(args.program, flags).resume
    if resume not in ("", "auto"):  # every requeued job would read it again
        advice = "copy the file to OUTPUT_DIR/checkpoint.pth"
        raise UserError(f"--resume {resume}: a job continues with --resume auto; {advice}")
    flags += ["--resume", "auto"]
    output_dir = resolve(args.program, flags).output_dir
    args.job_dir = args.job_dir or str(Path(output_dir) / "submitit" / "%j")
    return args, tuple(flags)


def resolve(program: str, flags: Sequence[str]) -> Resolved:
    """A program's flags, checked."""
    if program == "main":
        return config.resolve(flags)
    from segmentation import settings

    return settings.resolve(flags)


def make_executor(args: argparse.Namespace) -> Any:
    """submitit's executor with the job's resources."""
    import submitit

    executor = submitit.AutoExecutor(
        folder=args.job_dir,
        cluster=args.cluster,
        slurm_max_num_timeout=args.max_timeouts,
        local_max_num_timeout=args.max_timeouts,
    )
    executor.update_parameters(
        name=args.job_name,
        nodes=args.nodes,
        tasks_per_node=max(args.ngpus, 1),
        gpus_per_node=args.ngpus or None,
        cpus_per_task=args.cpus_per_task,
        timeout_min=args.timeout,
        slurm_partition=args.partition,
        slurm_signal_delay_s=SAVING_TIME,
        # submitit ends the first task of a requeued job with an error, which must not end the others; one that
        # crashed does, after a while. Recent versions of srun do not take the cores from sbatch.
        slurm_srun_args=["--kill-on-bad-exit=0", f"--wait={SAVING_TIME}", f"--cpus-per-task={args.cpus_per_task}"],
        slurm_additional_parameters={"requeue": True, **args.slurm},
    )
    return executor


def submit(args: argparse.Namespace, flags: tuple[str, ...]) -> int:
    """Submit the job; on this machine also wait for it."""
    from submitit.core.utils import FailedJobError, FailedSubmissionError, UncompletedJobError

    try:
        job = make_executor(args).submit(Training(flags, args.program))
    except (FailedJobError, FailedSubmissionError) as error:
        raise UserError(f"sbatch refuses the job: {' '.join(str(error).split())}") from error
    except OSError as error:
        raise UserError(f"cannot write to --job-dir {args.job_dir}: {error.strerror}") from error
    print(f"submitted job {job.job_id}; logs in {job.paths.folder}", flush=True)
    if args.cluster == "slurm":
        return 0
    try:
        return max(job.results())
    except UncompletedJobError:
        print(f"run_with_submitit.py: the training failed: see {job.paths.stderr}", file=sys.stderr, flush=True)
        return 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; a user's mistake becomes one line and exit code 2."""
    try:
        args, flags = parse(sys.argv[1:] if argv is None else argv)
        if args.cluster == "debug":
            os.environ.update(to_find(args.program))
            os.execv(sys.executable, call(args.program, flags))
        if importlib.util.find_spec("submitit") is None:
            raise UserError("submitit is missing: pip install -r requirements-submitit.txt")
        return submit(args, flags)
    except UserError as error:
        print(f"run_with_submitit.py: error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("\nrun_with_submitit.py: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    outlive_readers()
    sys.exit(main())
