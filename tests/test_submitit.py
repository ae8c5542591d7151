"""script/run_with_submitit.py: its flags, the job that it submits, and how an interrupted run comes back."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import pytest
from processes import PATIENCE, executable

import main

ROOT = Path(__file__).parents[1]
needs_submitit = pytest.mark.skipif(
    importlib.util.find_spec("submitit") is None, reason="needs submitit: pip install -r requirements-submitit.txt"
)
FLAGS = ["--data-set", "DIGITS", "--output_dir"]
LOCAL = ["--cluster", "local"]

# Stands for main.py: notes its arguments, and in its first run waits for SIGTERM and exits as if it had saved.
PROGRAM = """
import json, os, signal, sys
from pathlib import Path

rank, notes = os.environ["RANK"], Path(os.environ["NOTES"])
runs = len(list(notes.glob(f"{rank}-*.json")))
meeting = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")}
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
note = {"flags": sys.argv[1:], "pids": [os.getpid(), os.getppid()], **meeting}
temporary = notes / f"{rank}-{runs}.writing"
temporary.write_text(json.dumps(note))
temporary.rename(notes / f"{rank}-{runs}.json")
if runs == 0:
    signal.sigwait([signal.SIGTERM])
    sys.exit(75)
sys.exit(int(os.environ.get("CODE", "0")))
"""


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script as a module, whose classes are pickled as those of a script are."""
    path = ROOT / "script" / "run_with_submitit.py"
    spec = importlib.util.spec_from_file_location("run_with_submitit", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "run_with_submitit", module)
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec.loader.exec_module(module)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SUBMITIT_PREEMPT_SIGNAL"):
        monkeypatch.delenv(name, raising=False)
    yield module


@pytest.fixture
def by_value(script: ModuleType) -> Iterator[None]:
    cloudpickle = pytest.importorskip("cloudpickle", reason="needs submitit")
    cloudpickle.register_pickle_by_value(script)
    yield
    cloudpickle.unregister_pickle_by_value(script)


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder where a fake scontrol notes its arguments; sbatch accepts every job as 4242."""
    executable(tmp_path / "bin" / "sbatch", '#!/bin/sh\necho "Submitted batch job 4242"\n')
    executable(tmp_path / "bin" / "srun", "#!/bin/sh\nexit 1\n")
    show = '[ "$1" = show ] && echo "   JobState=$STATE Reason=None"\nexit 0\n'
    executable(tmp_path / "bin" / "scontrol", f'#!/bin/sh\necho "$@" >> {tmp_path}/scontrol\n{show}')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return tmp_path


def wait_for(condition: Callable[[], Any], seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError("waited in vain")


# ------------------------------------------------------------------------------------------------------------
# Flags


def test_flags_of_main_stand_after_the_dashes_or_are_unknown(script: ModuleType, tmp_path: Path) -> None:
    """main.py's come in the order given, and end with what lets the run continue."""
    own = ["--nodes", "1", "--cluster", "local", "--epochs", "3", "--ngpus", "2"]
    args, flags = script.parse([*own, "--", *FLAGS, str(tmp_path / "a b"), "--batch-size", "64"])
    assert (args.nodes, args.ngpus, args.job_dir) == (1, 2, str(tmp_path / "a b" / "submitit" / "%j"))
    rest = ("--epochs", "3", *FLAGS, str(tmp_path / "a b"), "--batch-size", "64", "--resume", "auto")
    assert flags == rest


@pytest.mark.parametrize("given", [["--resume", "auto"], ["--resume=auto"]])
def test_resume_auto_may_be_given(script: ModuleType, tmp_path: Path, given: list[str]) -> None:
    _, flags = script.parse([*LOCAL, "--", *given, *FLAGS, str(tmp_path)])
    assert flags == (*given, *FLAGS, str(tmp_path), "--resume", "auto")


MISTAKES = {
    "no machine": ([*LOCAL, "--nodes", "0"], "--nodes must be at least 1"),
    "negative GPUs": ([*LOCAL, "--ngpus", "-1"], "--ngpus must be at least 0"),
    "no time": ([*LOCAL, "--timeout", "0"], "--timeout must be at least 1"),
    "two machines here": ([*LOCAL, "--nodes", "2"], "--cluster local is this machine alone"),
    "no SLURM": ([], "no sbatch and srun on PATH"),
    "unknown flag": ([*LOCAL, "--", "--batch-sise", "4"], "Did you mean --batch-size"),
    "resume a file": ([*LOCAL, "--", "--resume", __file__], "copy the file to OUTPUT_DIR/checkpoint.pth"),
    "resume=a file": ([*LOCAL, "--", f"--resume={__file__}"], "copy the file to OUTPUT_DIR/checkpoint.pth"),
    "no output": ([*LOCAL, "--", "--output_dir", ""], "--output_dir"),
    "options of sbatch": ([*LOCAL, "--slurm", "account"], "'account' is not KEY=VALUE"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line(
    script: ModuleType,
    mistake: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Before anything is submitted or created."""
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.chdir(tmp_path)
    argv, message = MISTAKES[mistake]
    head, tail = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    assert script.main([*head, "--", *FLAGS, "run", *tail]) == 2
    error = capsys.readouterr().err
    assert error.startswith("run_with_submitit.py: error: ") and error.count("\n") == 1
    assert message in error
    assert list(tmp_path.iterdir()) == []


def test_missing_submitit_is_named(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: None)
    assert script.main([*LOCAL, "--", *FLAGS, "run"]) == 2
    assert "pip install -r requirements-submitit.txt" in capsys.readouterr().err


def test_requirements_name_submitit() -> None:
    """A file of its own, and the tests', so that none of these is skipped where script/test.sh installs them."""
    lines = (ROOT / "requirements-submitit.txt").read_text().splitlines()
    assert lines[0].startswith("#") and lines[1] == "-r requirements.txt"
    assert any(line.startswith("submitit>=") for line in lines)
    assert "-r requirements-submitit.txt" in (ROOT / "requirements-test.txt").read_text().splitlines()


# ------------------------------------------------------------------------------------------------------------
# SLURM


@needs_submitit
def test_checkpoint_runs_the_same_again(script: ModuleType) -> None:
    """What submitit pickles for the requeued job: the training itself."""
    training = script.Training(("--epochs", "3", "--resume", "auto"))
    delayed = training.checkpoint()
    assert (delayed.function, delayed.args, delayed.kwargs) == (training, (), {})


def batch_file(script: ModuleType, slurm: Path, *own: str) -> list[str]:
    """The lines of the file that submitit hands to sbatch."""
    assert script.main([*own, "--", *FLAGS, str(slurm / "run")]) == 0
    return (slurm / "run" / "submitit" / "4242" / "4242_submission.sh").read_text().splitlines()


@needs_submitit
def test_slurm_job_has_what_it_asks_for(
    script: ModuleType, by_value: None, slurm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ["--nodes", "2", "--ngpus", "4", "--timeout", "90", "--partition", "gpu", "--cpus-per-task", "6"]
    lines = batch_file(script, slurm, *own, "--slurm", "account=vision", "constraint=h100")
    assert f"submitted job 4242; logs in {slurm / 'run' / 'submitit' / '4242'}" in capsys.readouterr().out
    options = {line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")}
    wanted = {"nodes=2", "ntasks-per-node=4", "gpus-per-node=4", "time=90", "partition=gpu", "cpus-per-task=6"}
    wanted |= {"signal=USR2@120", "requeue", "open-mode=append", "account=vision", "constraint=h100"}
    assert wanted <= options
    srun = next(line for line in lines if line.startswith("srun"))
    assert "--kill-on-bad-exit=0 --wait=120 --cpus-per-task=6" in srun


@needs_submitit
def test_slurm_job_without_gpus_asks_for_none(script: ModuleType, by_value: None, slurm: Path) -> None:
    lines = batch_file(script, slurm, "--ngpus", "0")
    assert "#SBATCH --ntasks-per-node=1" in lines
    assert not any(line.startswith("#SBATCH --gpu") for line in lines)


@needs_submitit
def test_refused_job_is_a_mistake(
    script: ModuleType, by_value: None, slurm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    executable(slurm / "bin" / "sbatch", "#!/bin/sh\necho 'sbatch: error: invalid partition' >&2\nexit 1\n")
    assert script.main(["--", *FLAGS, str(slurm / "run")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "error: sbatch refuses the job: " in error and "invalid partition" in error


def start_task(folder: Path, rank: int, **env: str) -> subprocess.Popen[bytes]:
    """One task of job 4242 on two machines, started as srun starts it."""
    slurm_env = {"SLURM_JOB_ID": "4242", "SLURM_NTASKS": "2", "SLURM_JOB_NUM_NODES": "2", "SLURM_PROCID": str(rank)}
    slurm_env |= {"SLURM_LOCALID": "0", "SLURM_NODEID": str(rank), "SLURM_JOB_NODELIST": "gpu[07-08]"}
    slurm_env |= {"SUBMITIT_EXECUTOR": "slurm", "NOTES": str(folder)}
    command = [sys.executable, "-m", "submitit.core._submit", str(folder / "run" / "submitit" / "%j")]
    log = subprocess.DEVNULL
    return subprocess.Popen(command, env={**os.environ, **slurm_env, **env}, stdout=log, stderr=log)


@needs_submitit
@pytest.mark.parametrize(
    ("number", "state", "comes_back"),
    [
        (signal.SIGUSR2, "RUNNING", True),
        (signal.SIGTERM, "RUNNING", True),
        (signal.SIGTERM, "COMPLETING", False),
    ],
    ids=["time limit", "preempted", "cancelled"],
)
def test_slurm_task_saves_and_then_requeues(
    script: ModuleType,
    by_value: None,
    slurm: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    state: str,
    comes_back: bool,
) -> None:
    """Only the first task does, after main.py has saved, unless the job was cancelled; then the same runs again."""
    (slurm / "program.py").write_text(PROGRAM)
    monkeypatch.setattr(script, "MAIN", str(slurm / "program.py"))
    assert script.main(["--nodes", "2", "--ngpus", "1", "--", *FLAGS, str(slurm / "run")]) == 0
    tasks = [start_task(slurm, rank, STATE=state) for rank in (0, 1)]
    for rank, task in enumerate(tasks):
        wait_for((slurm / f"{rank}-0.json").exists)
        task.send_signal(number)
    codes = [task.wait(60) for task in tasks]
    assert (codes[0] != 0, codes[1]) == (comes_back, 0)
    told = (slurm / "scontrol").read_text().splitlines()
    assert told == ["show job 4242", *(["requeue 4242"] if comes_back else [])]
    if comes_back:
        assert start_task(slurm, 0, STATE=state).wait(60) == 0
    notes = [json.loads(path.read_text()) for path in sorted(slurm.glob("0-*.json"))]
    assert len(notes) == 1 + comes_back
    assert all(note["flags"] == [*FLAGS, str(slurm / "run"), "--resume", "auto"] for note in notes)
    assert (notes[0]["RANK"], notes[0]["WORLD_SIZE"], notes[0]["LOCAL_RANK"]) == ("0", "2", "0")
    assert (notes[0]["MASTER_ADDR"], notes[0]["MASTER_PORT"]) == ("gpu07", "24242")


@needs_submitit
@pytest.mark.parametrize(("nodes", "names", "first"), [("1", "gpu03", "gpu03"), ("2", "gpu[07-08]", "gpu07")])
def test_one_machine_meets_as_several_do(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, nodes: str, names: str, first: str
) -> None:
    import submitit

    slurm_env = {"SLURM_JOB_ID": "1234567", "SLURM_JOB_NUM_NODES": nodes, "SLURM_JOB_NODELIST": names}
    for name, value in {**slurm_env, "SUBMITIT_EXECUTOR": "slurm"}.items():
        monkeypatch.setenv(name, value)
    env = script.environment(submitit.JobEnvironment())
    assert (env["MASTER_ADDR"], env["MASTER_PORT"]) == (first, "24567")


@needs_submitit
def test_failed_training_fails_the_task(
    script: ModuleType, by_value: None, slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SLURM must not take a job for completed whose main.py found a mistake."""
    (slurm / "program.py").write_text("raise SystemExit(2)")
    monkeypatch.setattr(script, "MAIN", str(slurm / "program.py"))
    script.main(["--", *FLAGS, str(slurm / "run")])
    assert start_task(slurm, 0).wait(60) != 0
    assert not (slurm / "scontrol").exists()


# ------------------------------------------------------------------------------------------------------------
# This machine


@needs_submitit
def test_local_job_comes_back_after_a_signal(
    script: ModuleType, by_value: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """submitit's own requeue, with two tasks; the signal reaches main.py as well, which must survive it."""
    (tmp_path / "program.py").write_text(PROGRAM)
    monkeypatch.setattr(script, "MAIN", str(tmp_path / "program.py"))
    monkeypatch.setenv("NOTES", str(tmp_path))
    args, flags = script.parse([*LOCAL, "--ngpus", "2", "--", *FLAGS, str(tmp_path / "run")])
    job = script.make_executor(args).submit(script.Training(flags))
    for rank in (1, 0):
        note = tmp_path / f"{rank}-0.json"
        wait_for(note.exists)
        for pid in json.loads(note.read_text())["pids"]:
            os.kill(pid, signal.SIGUSR2)
    assert job.results() == [0, 0]
    assert sorted(path.name for path in tmp_path.glob("*.json")) == ["0-0.json", "0-1.json", "1-0.json", "1-1.json"]
    assert json.loads((tmp_path / "1-1.json").read_text())["flags"] == list(flags)


TINY = "--data-set DIGITS --model deit_tiny_patch16_224 --input-size 32 --num_workers 0 --device cpu"
TINY += " --model-kwargs patch_size=8 embed_dim=16 depth=1 num_heads=2 --no-repeated-aug --no-model-ema"


@needs_submitit
def test_run_continues_with_two_processes(tmp_path: Path) -> None:
    """As users start it, on a run that one process began elsewhere."""
    flags = [*TINY.split(), "--output_dir", str(tmp_path)]
    assert main.main([*flags, "--epochs", "1"]) == 0
    outside = ("SLURM_", "SUBMITIT_", "MASTER_", "RANK", "WORLD_SIZE", "LOCAL_RANK")
    env = {key: value for key, value in os.environ.items() if not key.startswith(outside)}
    program = str(ROOT / "script" / "run_with_submitit.py")
    process = subprocess.run(
        [sys.executable, program, *LOCAL, "--ngpus", "2", "--", *flags, "--epochs", "2"],
        cwd=ROOT,
        env={**env, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    assert [json.loads(line)["epoch"] for line in (tmp_path / "log.txt").read_text().splitlines()] == [0, 1]
    (log,) = tmp_path.glob("submitit/*/[0-9]*_0_log.out")
    assert "2 process(es)" in log.read_text()


def test_segmentation_is_checked_by_its_own_flags(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And started as a package, which Python finds from any folder."""
    own = [*LOCAL, "--program", "segmentation", "--", *FLAGS, str(tmp_path / "run")]
    own += ["--model", "deit_tiny_patch16_224"]
    args, flags = script.parse([*own, "--crop-size", "64"])
    assert args.job_dir == str(tmp_path / "run" / "submitit" / "%j")
    assert script.call(args.program, flags)[1:3] == ["-m", "segmentation"] and flags[-2:] == ("--resume", "auto")
    monkeypatch.chdir(tmp_path)
    found = subprocess.run(
        [*script.call("segmentation", ["--crop-sise", "64"])],
        env={**os.environ, **script.to_find("segmentation")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 2 and "segmentation: error: " in found.stderr and "--crop-size" in found.stderr
    assert script.main([*own, "--epochs", "3"]) == 2
    assert "unrecognized arguments: --epochs 3" in capsys.readouterr().err


@needs_submitit
def test_failed_local_training_is_reported(
    script: ModuleType,
    by_value: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One line says where main.py's own is."""
    (tmp_path / "program.py").write_text("import sys\nprint('no such data', file=sys.stderr)\nsys.exit(2)")
    monkeypatch.setattr(script, "MAIN", str(tmp_path / "program.py"))
    assert script.main([*LOCAL, "--ngpus", "1", "--", *FLAGS, str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("run_with_submitit.py: the training failed: see ") and error.count("\n") == 1
    assert "no such data" in Path(error.strip().rpartition("see ")[2]).read_text()


STUB = """
import runpy, sys
from types import SimpleNamespace
import submitit

class Executor:
    def __init__(self, **options):
        pass

    update_parameters = __init__

    def submit(self, training):
        return SimpleNamespace(job_id=1, paths=SimpleNamespace(folder="x"), results=lambda: [0])

submitit.AutoExecutor = Executor
runpy.run_path("script/run_with_submitit.py", run_name="__main__")
"""


@needs_submitit
def test_a_job_is_submitted_though_nobody_reads_that(tmp_path: Path) -> None:
    with open("/dev/full", "wb") as full:
        command = [sys.executable, "-c", STUB, *LOCAL, "--", *FLAGS, str(tmp_path)]
        ended = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, check=False)
    assert (ended.returncode, ended.stderr) == (0, b"")


def test_debug_becomes_main_itself(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose signals, output and exit code are then those of the command; submitit is not needed."""
    started: list[list[str]] = []

    def execv(path: str, argv: list[str]) -> NoReturn:
        started.append([path, *argv])
        raise SystemExit(75)

    monkeypatch.setattr(script.os, "execv", execv)
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(SystemExit, match="75"):
        script.main(["--cluster", "debug", "--", *FLAGS, str(tmp_path)])
    flags = [*FLAGS, str(tmp_path), "--resume", "auto"]
    assert started == [[sys.executable, sys.executable, str(ROOT / "main.py"), *flags]]
    assert list(tmp_path.iterdir()) == []
