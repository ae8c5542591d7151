"""script/, configs/ and .ci/: launchers equal their recipes, and the shell scripts do what they say."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import forks
import pytest
import yaml
from processes import PATIENCE, ends, executable

from options import config
from redundancy.options import read_options

ROOT = Path(__file__).parents[1]
SLURM = ROOT / "script" / "slurm_train.sbatch"
SCRIPTS = [*sorted((ROOT / "script").glob("*.sh")), SLURM]
TWO_STAGES = ROOT / "script" / "run_patch_diversification.sh"
LAUNCHERS = [path for path in sorted((ROOT / "script").glob("run_*.sh")) if path != TWO_STAGES]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def name_of(path: Path) -> str:
    return path.stem


def bash(command: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a line of bash outside any environment, but for what `env` says."""
    outside = ("VIRTUAL_ENV", "CONDA_", "NPROC", "SLURM_", "MASTER_")
    clean = {key: value for key, value in os.environ.items() if not key.startswith(outside)}
    return subprocess.run(
        ["bash", "-c", command], cwd=cwd, env=clean | env, capture_output=True, text=True, check=False
    )


@pytest.fixture
def fake_torchrun(tmp_path: Path) -> dict[str, str]:
    """Environment variables under which `torchrun` prints its arguments, one a line."""
    folder = tmp_path / "environment" / "bin"
    folder.mkdir(parents=True)
    program = folder / "torchrun"
    program.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    program.chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}", "VIRTUAL_ENV": str(folder.parent)}


def launched(launcher: Path, arguments: str, cwd: Path, env: dict[str, str]) -> tuple[list[str], list[str]]:
    """torchrun's own arguments, and main.py's, of a launcher."""
    run = bash(f"{launcher} {arguments}", cwd, **env)
    assert run.returncode == 0, run.stderr
    words = run.stdout.splitlines()
    main = words.index(str(ROOT / "main.py"))
    return words[:main], words[main + 1 :]


# ------------------------------------------------------------------------------------------------------------
# Launchers


def test_the_reference_launchers_exist() -> None:
    """The two names that the reference's users type."""
    names = {path.name for path in LAUNCHERS}
    assert {"run_deit_small_diverse.sh", "run_deit_small_24layer_diverse.sh"} <= names
    assert len(names) == 12


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=name_of)
def test_launcher_equals_its_recipe(launcher: Path, tmp_path: Path, fake_torchrun: dict[str, str]) -> None:
    """Flags and YAML resolve to the same run; the output lies in the project's root."""
    own, flags = launched(launcher, "images", tmp_path, fake_torchrun)
    assert own == ["--standalone", "--nproc_per_node", "8"]
    recipe = ROOT / "configs" / f"{launcher.stem.removeprefix('run_')}.yaml"
    by_flags = config.plain(config.resolve(flags))
    by_file = config.plain(config.resolve(["--config", str(recipe), "--data-path", "images"]))
    assert Path(by_flags.pop("output_dir")) == ROOT / by_file.pop("output_dir")
    assert (by_flags.pop("config"), by_file.pop("config")) == ("", str(recipe))
    assert by_flags == by_file


def test_launcher_passes_on_processes_folder_and_flags(tmp_path: Path, fake_torchrun: dict[str, str]) -> None:
    """NPROC, a folder with a space relative to the caller, and flags that win over the recipe's."""
    launcher = ROOT / "script" / "run_deit_small_diverse.sh"
    arguments = "'my images' --epochs 7 --batch-size 64 --mixing_coef 0 --output_dir here"
    own, flags = launched(launcher, arguments, tmp_path, fake_torchrun | {"NPROC": "3"})
    args = config.resolve(flags)
    assert own[-1] == "3"
    assert (args.data_path, args.epochs, args.batch_size, args.output_dir) == ("my images", 7, 64, "here")
    assert [spec.name for spec in args.terms] == [
        "patch.cosine@last",
        "patch.contrastive@first:last",
        "attn.cosine@0",
        "weight.cno@all",
    ]


def stages(output: str) -> list[list[str]]:
    """The flags of each of torchrun's calls."""
    words = output.splitlines()
    starts = [place for place, word in enumerate(words) if word == str(ROOT / "main.py")]
    ends = [*(start - 3 for start in starts[1:]), len(words)]
    return [words[start + 1 : end] for start, end in zip(starts, ends, strict=True)]


def test_both_stages_of_patch_diversification(tmp_path: Path, fake_torchrun: dict[str, str]) -> None:
    """The second starts from the first's last checkpoint without its optimizer, and then goes on from its own."""
    where = {"RECIPE": "patch_diversification_deit_base", "OUTPUT": str(tmp_path / "out")}
    env = fake_torchrun | where
    run = bash(f"{TWO_STAGES} 'my images' --batch-size 64", tmp_path, **env)
    assert run.returncode == 0, run.stderr
    for stage in ("stage1", "stage2"):
        (tmp_path / "out" / stage).mkdir(parents=True)
    (tmp_path / "out" / "stage1" / "checkpoint.pth").touch()
    first, second = (config.resolve(flags) for flags in stages(run.stdout))
    assert (first.model, first.epochs, first.drop_path, first.batch_size) == ("deit_base_patch16_224", 300, 0.5, 64)
    assert (first.resume, first.resume_opt, first.output_dir) == ("auto", True, str(tmp_path / "out" / "stage1"))
    assert (second.epochs, second.drop_path, second.batch_size, second.data_path) == (400, 0.75, 64, "my images")
    assert (second.resume, second.resume_opt) == (str(tmp_path / "out" / "stage1" / "checkpoint.pth"), False)
    assert second.output_dir == str(tmp_path / "out" / "stage2")
    (tmp_path / "out" / "stage2" / "checkpoint.1.pth").touch()
    again = bash(f"{TWO_STAGES} images", tmp_path, **env, EPOCHS="2 3")
    first, second = (config.resolve(flags) for flags in stages(again.stdout))
    assert (first.epochs, second.epochs, second.resume, second.resume_opt) == (2, 3, "auto", True)
    for wrong in ("1", "3 2", "a b", "0 2"):
        refused = bash(f"{TWO_STAGES} images", tmp_path, **env, EPOCHS=wrong)
        assert refused.returncode == 2 and "EPOCHS is where the two stages end" in refused.stderr
    for single in ("patch_diversification_vit_large_in22k_384", "patch_diversification_deit_small_paper"):
        refused = bash(f"{TWO_STAGES} images", tmp_path, **{**env, "RECIPE": single})
        assert refused.returncode == 2 and f"{single} has one stage" in refused.stderr
    usage = bash(str(TWO_STAGES), tmp_path, **env)
    assert usage.returncode == 2 and usage.stderr.startswith("usage: ")


def test_a_first_stage_that_fails_is_the_end(tmp_path: Path, fake_torchrun: dict[str, str]) -> None:
    program = Path(fake_torchrun["PATH"].partition(":")[0]) / "torchrun"
    program.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\nexit 75\n")
    run = bash(f"{TWO_STAGES} images", tmp_path, **fake_torchrun, OUTPUT=str(tmp_path))
    assert run.returncode == 75 and len(stages(run.stdout)) == 1


@pytest.mark.parametrize("recipe", [path for path in CONFIGS if path.stem.startswith("patch_div")], ids=name_of)
def test_patch_diversifications_recipes(recipe: Path) -> None:
    """The released ones have its terms and mixing; that of the paper is plain terms on DeiT's recipe."""
    args = config.resolve(["--config", str(recipe)])
    terms = {spec.name: spec.coef for spec in args.terms}
    if recipe.stem.endswith("paper"):
        names = ["patch.pairwise_cosine@last", "patch.contrastive@first:last", "patch.mixing"]
        assert terms == dict.fromkeys(names, 1) and (args.mixup, args.cutmix) == (0.8, 1.0)
        return
    names = ["patch.region_mixing", *([] if "swin" in recipe.stem else ["patch.context@embed:norm"])]
    assert terms == dict.fromkeys(names, 1) and args.model_kwargs == {"drop_rate": 0.2}
    assert (args.mixup, args.cutmix, args.mixup_switch_prob, args.repeated_aug) == (0, 1, 0, False)
    assert args.min_lr == 1e-7 and args.model_ema_decay == 0.99996
    plain = args.pretrained or "swin" in recipe.stem
    assert args.remedy == ([] if plain else ["talking_heads:random"])
    if args.pretrained:
        assert (args.drop_path, args.epochs, args.lr, args.weight_decay) == (0, 40, 5e-5, 1e-8)
        assert (args.smoothing, args.reprob, args.aa) == (1e-6, 1e-6, "rand-n1-m1-mstd0.5-inc1")
    else:
        assert (args.drop_path, args.epochs, args.lr, args.weight_decay) == (0.5, 300, 5e-4, 0.05)


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=name_of)
@pytest.mark.parametrize("arguments", ["", "--epochs 3"])
def test_launcher_without_data_shows_its_usage(launcher: Path, arguments: str, tmp_path: Path) -> None:
    run = bash(f"{launcher} {arguments}", tmp_path)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith("usage: ")
    assert launcher.name in run.stderr


def test_launcher_without_torchrun_says_what_to_do(tmp_path: Path) -> None:
    """Nothing but the tools the script itself needs is on PATH."""
    for tool in ("bash", "dirname"):
        (tmp_path / tool).symlink_to(f"/usr/bin/{tool}")
    run = bash(f"bash {LAUNCHERS[0]} images", tmp_path, PATH=str(tmp_path), VIRTUAL_ENV=str(tmp_path))
    assert run.returncode == 2
    assert "no torchrun on PATH" in run.stderr
    assert "script/env.sh requirements.txt" in run.stderr


CONDA_BASE = {"CONDA_DEFAULT_ENV": "base", "CONDA_PREFIX": "/opt/conda"}
CONDA_OWN = {"CONDA_DEFAULT_ENV": "vit", "CONDA_PREFIX": "/opt/conda/envs/vit"}


@pytest.mark.parametrize(
    ("env", "expected"),
    [({}, ".venv"), (CONDA_BASE, ".venv"), (CONDA_OWN, "active"), ({"VIRTUAL_ENV": "/venv"}, "active")],
    ids=["no environment", "conda base", "conda", "virtual environment"],
)
def test_launcher_takes_the_environment_that_env_takes(env: dict[str, str], expected: str, tmp_path: Path) -> None:
    """.venv in the project's root, unless an environment other than conda's base is active."""
    launcher = tmp_path / "script" / LAUNCHERS[0].name
    launcher.parent.mkdir()
    for name in (launcher.name, "launch.sh", "env.sh"):
        (tmp_path / "script" / name).write_text((ROOT / "script" / name).read_text())
    for environment in (".venv", "active"):
        program = tmp_path / environment / "bin" / "torchrun"
        program.parent.mkdir(parents=True)
        program.write_text('#!/bin/sh\necho "$0" "$@"\n')
        program.chmod(0o755)
    path = f"{tmp_path / 'active' / 'bin'}:{os.environ['PATH']}"
    run = bash(f"bash {launcher} images --epochs 3", tmp_path, PATH=path, **env)
    assert run.returncode == 0, run.stderr
    words = run.stdout.split()
    assert words[0] == str(tmp_path / expected / "bin" / "torchrun")
    assert words[-2:] == ["--epochs", "3"]


# ------------------------------------------------------------------------------------------------------------
# Recipes


@pytest.mark.parametrize("recipe", CONFIGS, ids=name_of)
def test_recipe_resolves_and_opens_with_its_command(recipe: Path) -> None:
    config.resolve(["--config", str(recipe)])
    head = recipe.read_text().split("\n\n")[0]
    assert all(line.startswith("#") for line in head.splitlines())
    assert f"main.py --config configs/{recipe.name}" in head
    assert "Result" in head


@pytest.mark.parametrize("recipe", CONFIGS, ids=name_of)
def test_numbers_for_the_model_are_no_text(recipe: Path) -> None:
    """YAML takes 1e-4 for a text, which timm's constructors refuse."""
    for value in config.resolve(["--config", str(recipe)]).model_kwargs.values():
        if isinstance(value, str):
            with pytest.raises(ValueError):
                float(value)


FIVE_TERMS = {
    "patch.mixing": 1,
    "patch.cosine@last": 0.5,
    "patch.contrastive@first:last": 0.5,
    "attn.cosine@0": 1e-4,
    "weight.cno@all": 5e-4,
}


def read_recipe(path: Path) -> tuple[dict[str, Any], dict[str, float]]:
    """A recipe's keys without its terms, and its terms."""
    recipe = yaml.safe_load(path.read_text())
    return recipe, {spec: float(coef) for spec, coef in recipe.pop("regularizers", {}).items()}


@pytest.mark.parametrize("recipe", [path for path in CONFIGS if path.stem.endswith("_diverse")], ids=name_of)
def test_diverse_recipe_is_its_baseline_and_regularizers(recipe: Path) -> None:
    """Between the two of a pair nothing else may differ but names, and the coefficients are the reference's."""
    diverse, terms = read_recipe(recipe)
    plain, none = read_recipe(recipe.with_name(f"{recipe.stem.removesuffix('_diverse')}.yaml"))
    left_out = {"patch.contrastive@first:last"} if "swin" in recipe.stem else set()  # layers of different width
    assert terms == {spec: coef for spec, coef in FIVE_TERMS.items() if spec not in left_out}
    assert none == {}
    diverse["model"] = diverse["model"].removesuffix("_diverse")
    if "output_dir" in diverse:
        diverse["output_dir"] = diverse["output_dir"].removesuffix("_diverse")
    assert diverse == plain


PAPERS_FORM = {"patch.cosine@last": "patch.pairwise_cosine@last", "attn.cosine@0": "attn.pairwise_cosine@0"}


@pytest.mark.parametrize("recipe", [path for path in CONFIGS if path.stem.endswith("_diverse_paper")], ids=name_of)
def test_the_papers_form_differs_in_two_terms(recipe: Path) -> None:
    """From the recipe of the code's form; their coefficients, places and order are the same."""
    paper, terms = read_recipe(recipe)
    code, theirs = read_recipe(recipe.with_name(f"{recipe.stem.removesuffix('_paper')}.yaml"))
    assert [*terms.items()] == [(PAPERS_FORM.get(spec, spec), coef) for spec, coef in theirs.items()]
    if "output_dir" in paper:
        code["output_dir"] += "_paper"
    assert paper == code


# ------------------------------------------------------------------------------------------------------------
# Shell scripts


@pytest.mark.parametrize("script", [*SCRIPTS, ROOT / ".ci" / "run"], ids=name_of)
def test_script_parses_and_is_executable_unless_sourced(script: Path, tmp_path: Path) -> None:
    run = bash(f"bash -n {script}", tmp_path)
    assert (run.returncode, run.stderr) == (0, "")
    assert os.access(script, os.X_OK) == (script.name not in ("env.sh", "launch.sh"))


@pytest.mark.parametrize("script", [SLURM], ids=name_of)
def test_script_passes_shellcheck(script: Path, tmp_path: Path) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    run = bash(f"shellcheck -x {script}", ROOT)
    assert (run.returncode, run.stdout) == (0, "")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of env.sh with requirements of its own."""
    (tmp_path / "script").mkdir()
    (tmp_path / "script" / "env.sh").write_text((ROOT / "script" / "env.sh").read_text())
    (tmp_path / "requirements.txt").write_text("first\n")
    (tmp_path / "requirements-more.txt").write_text("-r requirements.txt\nsecond\n")
    return tmp_path


def fake_environment(folder: Path, fails: bool = False) -> Path:
    """An environment whose python is recent and notes each call of pip in pip.log."""
    (folder / "bin").mkdir(parents=True)
    python = folder / "bin" / "python"
    python.write_text(f'#!/bin/sh\n[ "$1" = -c ] || {{ echo "$@" >> {folder}/pip.log; exit {int(fails)}; }}\n')
    python.chmod(0o755)
    return folder


def calls(environment: Path) -> int:
    log = environment / "pip.log"
    return len(log.read_text().splitlines()) if log.exists() else 0


SOURCE = "set -euo pipefail; source {}/script/env.sh requirements-more.txt; command -v python"


def test_env_installs_once_into_the_active_environment(project: Path) -> None:
    """Again only if a requirements file changes, an included one too."""
    environment = fake_environment(project / "active")
    for expected in (1, 1):
        run = bash(SOURCE.format(project), Path("/"), VIRTUAL_ENV=str(environment))
        assert run.returncode == 0, run.stderr
        assert run.stdout.splitlines()[-1] == str(environment / "bin" / "python")
        assert calls(environment) == expected
    (project / "requirements.txt").write_text("first>=2\n")
    bash(SOURCE.format(project), Path("/"), VIRTUAL_ENV=str(environment))
    assert calls(environment) == 2
    assert not (project / ".venv").exists()


def test_env_takes_a_conda_environment_but_not_base(project: Path) -> None:
    conda = fake_environment(project / "conda")
    own = fake_environment(project / ".venv")
    bash(SOURCE.format(project), project, CONDA_PREFIX=str(conda), CONDA_DEFAULT_ENV="vit")
    assert (calls(conda), calls(own)) == (1, 0)
    bash(SOURCE.format(project), project, CONDA_PREFIX=str(conda), CONDA_DEFAULT_ENV="base")
    assert (calls(conda), calls(own)) == (1, 1)


def test_env_repeats_a_failed_installation(project: Path) -> None:
    environment = fake_environment(project / "active", fails=True)
    for expected in (1, 2):
        run = bash(SOURCE.format(project), project, VIRTUAL_ENV=str(environment))
        assert run.returncode == 2
        assert "run this again" in run.stderr
        assert calls(environment) == expected


def test_env_makes_an_unfinished_environment_anew(project: Path) -> None:
    """Here the base Python is a fake that only makes the folder; a finished .venv is left alone."""
    template = fake_environment(project / "template")
    base = project / "base"
    base.mkdir()
    (base / "python3").write_text(f'#!/bin/sh\n[ "$1" = -c ] || cp -R {template}/bin "$3"\n')
    (base / "python3").chmod(0o755)
    env = {"PATH": f"{base}:{os.environ['PATH']}"}
    (project / ".venv").mkdir()
    (project / ".venv" / ".unfinished").touch()
    (project / ".venv" / "leftover").touch()
    first = bash(SOURCE.format(project), project, **env)
    assert first.returncode == 0, first.stderr
    assert "making" in first.stdout
    assert not (project / ".venv" / "leftover").exists()
    assert not (project / ".venv" / ".unfinished").exists()
    second = bash(SOURCE.format(project), project, **env)
    assert second.stdout == f"{project}/.venv/bin/python\n"


def test_env_without_a_recent_python(project: Path) -> None:
    """One line, exit code 2, and nothing is made."""
    tools = project / "tools"
    tools.mkdir()
    for tool in ("bash", "dirname", "sed", "cat", "cksum", "tr"):
        (tools / tool).symlink_to(f"/usr/bin/{tool}")
    run = bash(SOURCE.format(project), project, PATH=str(tools))
    assert run.returncode == 2
    assert run.stderr.count("\n") == 1
    assert "Python 3.10 or newer" in run.stderr
    assert not (project / ".venv").exists()


def test_ci_calls_the_test_script() -> None:
    assert (ROOT / ".ci" / "run").read_text().splitlines() == ["#!/usr/bin/env bash", "./script/test.sh"]
    assert (ROOT / "script" / "test.sh").read_text().splitlines()[
        -1
    ] == 'python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"'


# ------------------------------------------------------------------------------------------------------------
# SLURM. Its programs are fakes that note their arguments.

SCONTROL = """#!/bin/sh
echo "$@" >> "$NOTES/scontrol"
case "$1 $2" in
"show hostnames") [ "$3" = bad ] || printf '%s\\n' "$HOSTS" localhost ;;
"show job") echo "JobId=$3 JobName=x"; echo "   JobState=$STATE Reason=None" ;;
requeue*) exit "$REQUEUE_CODE" ;;
esac
"""
SRUN = """#!/bin/sh
printf '%s\\n' "$@" > "$NOTES/srun"
env > "$NOTES/env"
exit "$SRUN_CODE"
"""


class Cluster:
    """One job of slurm_train.sbatch, run from a copy as SLURM does."""

    def __init__(self, folder: Path, srun: str = SRUN) -> None:
        self.folder = folder
        (folder / "spool").mkdir()
        (folder / "bin").mkdir()
        (folder / "my data").mkdir()
        shutil.copy(SLURM, folder / "spool" / "slurm_script")
        for name, text in (("scontrol", SCONTROL), ("srun", srun)):
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)
        self.env = {
            "PATH": f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "VIRTUAL_ENV": sys.prefix,
            "NOTES": str(folder),
            "HOSTS": "gpu07",
            "STATE": "RUNNING",
            "SRUN_CODE": "0",
            "REQUEUE_CODE": "0",
            "SLURM_JOB_ID": "1234567",
            "SLURM_SUBMIT_DIR": str(ROOT),
            "SLURM_JOB_NODELIST": "gpu[07-08]",
            "SLURM_NTASKS_PER_NODE": "8",
            "SLURM_GPUS_ON_NODE": "8",
            "SLURM_CPUS_PER_TASK": "10",
        }

    def job(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        return bash(f"bash spool/slurm_script {shlex.join(arguments)}", self.folder, **(self.env | env))

    def notes(self, name: str) -> list[str]:
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []

    def requeued(self) -> list[str]:
        return [line for line in self.notes("scontrol") if line.startswith("requeue")]


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


def test_slurm_starts_main_once_per_gpu(cluster: Cluster) -> None:
    """Arguments with spaces survive; srun's tasks find where to meet, and no rank of the submitting shell."""
    flags = ["--output_dir", "my runs/x y", "--reg", "patch.cosine@last=0.5"]
    run = cluster.job("my data", *flags, RANK="3", WORLD_SIZE="4", LOCAL_RANK="3", MASTER_ADDR="login1")
    assert (run.returncode, run.stderr) == (0, "")
    own, program = cluster.notes("srun")[:2], cluster.notes("srun")[2:4]
    assert own == ["--kill-on-bad-exit=0", "--wait=120"]
    assert program == ["python", str(ROOT / "main.py")]
    assert cluster.notes("srun")[4:] == ["--data-path", "my data", *flags, "--resume", "auto"]
    env = dict(line.partition("=")[::2] for line in cluster.notes("env"))
    assert (env["MASTER_ADDR"], env["MASTER_PORT"]) == ("gpu07", "24567")
    assert (env["SRUN_CPUS_PER_TASK"], env["OMP_NUM_THREADS"]) == ("10", os.environ.get("OMP_NUM_THREADS", "1"))
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & set(env)
    assert cluster.requeued() == []


def test_slurm_starts_segmentation(cluster: Cluster) -> None:
    """By PROGRAM, from the project, wherever srun's tasks begin."""
    run = cluster.job("my data", "--backbone", "x.pth", PROGRAM="segmentation", PYTHONPATH="/own")
    assert (run.returncode, run.stderr) == (0, "")
    assert cluster.notes("srun")[2:5] == ["python", "-m", "segmentation"]
    assert cluster.notes("srun")[5:] == ["--data-path", "my data", "--backbone", "x.pth", "--resume", "auto"]
    assert f"PYTHONPATH={ROOT}:/own" in cluster.notes("env")


@pytest.mark.parametrize("given", [["--resume", "auto"], ["--resume=auto"], ["--output_dir", "a --resume=b.pth c"]])
def test_slurm_adds_resume_auto(cluster: Cluster, given: list[str]) -> None:
    """To whatever is given, be it the same, or a value that looks like the flag."""
    run = cluster.job("my data", *given)
    assert run.returncode == 0, run.stderr
    assert cluster.notes("srun")[6:] == [*given, "--resume", "auto"]


@pytest.mark.parametrize("code", [0, 1, 2, 75, 130, 137])
def test_slurm_requeues_an_interrupted_run_alone(cluster: Cluster, code: int) -> None:
    """Once, and every exit code is passed on."""
    run = cluster.job("my data", SRUN_CODE=str(code))
    assert run.returncode == code
    assert cluster.requeued() == (["requeue 1234567"] if code == 75 else [])


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED", "PREEMPTED"])
def test_slurm_does_not_bring_a_cancelled_job_back(cluster: Cluster, state: str) -> None:
    run = cluster.job("my data", SRUN_CODE="75", STATE=state)
    assert run.returncode == 75
    assert cluster.requeued() == []
    assert "the same sbatch command continues the run" in run.stdout


def test_slurm_says_that_requeueing_failed(cluster: Cluster) -> None:
    run = cluster.job("my data", SRUN_CODE="75", REQUEUE_CODE="1")
    assert run.returncode == 75
    assert run.stderr == "saved, but job 1234567 cannot be requeued: the same sbatch command continues the run\n"


def test_slurm_shell_outlives_a_sigterm(cluster: Cluster) -> None:
    """Where SLURM ends a job, the processes save, and srun's code still counts."""
    srun = cluster.folder / "bin" / "srun"
    srun.write_text("#!/bin/sh\nkill -TERM $PPID\nsleep 0.3\ntouch $NOTES/saved\nexit 75\n")
    run = cluster.job("my data", STATE="COMPLETING")
    assert (run.returncode, (cluster.folder / "saved").exists()) == (75, True)


MISTAKES = {
    "no arguments": ([], {}, "first argument must be the data's folder"),
    "no data": (["--output_dir", "x"], {}, "first argument must be the data's folder"),
    "no such folder": (["no/such"], {}, "no folder 'no/such'"),
    "resume a file": (["my data", "--resume", "old.pth"], {}, "copy the file to OUTPUT_DIR/checkpoint.pth"),
    "resume=a file": (["my data", "--resume=old.pth"], {}, "copy the file to OUTPUT_DIR/checkpoint.pth"),
    "not submitted": (["my data"], {"SLURM_JOB_ID": ""}, "submit this: sbatch"),
    "submitted elsewhere": (["my data"], {"SLURM_SUBMIT_DIR": "/"}, "project's root"),
    "fewer GPUs": (["my data"], {"SLURM_GPUS_ON_NODE": "4"}, "8 tasks but 4 GPUs"),
    "another program": (["my data"], {"PROGRAM": "segment"}, "PROGRAM=segment: it is main (the default) or"),
    "bad node list": (["my data"], {"SLURM_JOB_NODELIST": "bad"}, "does not expand SLURM_JOB_NODELIST=bad"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_slurm_refuses_in_one_line(cluster: Cluster, mistake: str) -> None:
    arguments, env, message = MISTAKES[mistake]
    run = cluster.job(*arguments, **env)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.count("\n") == 1
    assert run.stderr.startswith("slurm_train.sbatch: error: ")
    assert message in run.stderr
    assert not cluster.notes("srun")


def test_slurm_without_pytorch_says_what_to_do(cluster: Cluster) -> None:
    python = cluster.folder / "bin" / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    run = cluster.job("my data")
    assert run.returncode == 2
    assert "script/env.sh requirements.txt" in run.stderr


def test_slurm_options() -> None:
    """What makes the job come back; nothing may stand before the options, or SLURM does not read them."""
    lines = SLURM.read_text().splitlines()
    options = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]
    assert {"--signal=USR1@120", "--requeue", "--open-mode=append"} <= set(options)
    assert {"--ntasks-per-node=8", "--gpus-per-node=8"} <= set(options)
    last = max(index for index, line in enumerate(lines) if line.startswith("#SBATCH "))
    assert all(line.startswith("#") for line in lines[:last])


# Starts two tasks by forking, so that PyTorch is imported once, and interrupts them where there is no log yet.
SRUN_OF_TWO = """#!{python}
import multiprocessing, os, signal, sys, time

python, program, *flags = sys.argv[3:]
sys.path.insert(0, os.path.dirname(program))
import main

def run(rank):
    os.environ.update(SLURM_STEP_NUM_TASKS="2", SLURM_PROCID=rank, SLURM_LOCALID=rank)
    sys.exit(main.main(flags))

first = not os.path.exists("run/log.txt")
tasks = [multiprocessing.get_context("fork").Process(target=run, args=rank) for rank in "01"]
for task in tasks:
    task.start()
while first and not os.path.exists("run/log.txt") and tasks[0].is_alive():
    time.sleep(0.02)
for task in tasks:
    if first:
        os.kill(task.pid, signal.SIGUSR1)
for task in tasks:
    task.join()
sys.exit(max(task.exitcode for task in tasks))
"""


def test_slurm_continues_an_interrupted_run(tmp_path: Path) -> None:
    """Two real processes get USR1 after the first epoch; the job that comes back trains the rest."""
    cluster = Cluster(tmp_path, SRUN_OF_TWO.format(python=sys.executable))
    flags = "--data-set DIGITS --model deit_tiny_patch16_224 --input-size 32 --batch-size 64 --num_workers 0"
    flags += " --model-kwargs patch_size=8 embed_dim=16 depth=1 num_heads=2 --no-repeated-aug --no-model-ema"
    flags += " --epochs 6 --print-freq 99 --device cpu --output_dir run"
    env = {"HOSTS": "127.0.0.1", "SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "gpu07"}
    first = cluster.job("my data", *flags.split(), **env)
    assert first.returncode == 75, first.stderr[-3000:]
    assert len(cluster.requeued()) == 1
    done = len(cluster.notes("run/log.txt"))
    assert 1 <= done < 6
    second = cluster.job("my data", *flags.split(), **env)
    assert second.returncode == 0, second.stderr[-3000:]
    assert [json.loads(line)["epoch"] for line in cluster.notes("run/log.txt")] == list(range(6))
    assert len(cluster.requeued()) == 1


# ------------------------------------------------------------------------------------------------------------
# Segmentation of digits: two trainings side by side

TRAINING = """#!/bin/sh
case "$*" in
    *segmentation/plain*) echo $$ > plain; while [ ! -e fail ]; do sleep 0.02; done; echo "no disk" >&2; exit 1;;
    *segmentation/diverse*) echo $$ > diverse; exec sleep 1000;;
esac
"""


@pytest.mark.parametrize(("number", "code"), [(0, 1), (signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_no_training_goes_on_in_the_background(project: Path, number: int, code: int) -> None:
    """After a failure of another one, or a signal to the script."""
    shutil.copy(ROOT / "script" / "segment_digits.sh", project / "script")
    (project / "requirements-segmentation.txt").touch()
    for name in ("plain", "diverse"):
        (project / "experiment" / "quickstart" / name).mkdir(parents=True)
        (project / "experiment" / "quickstart" / name / "checkpoint.pth").touch()
    executable(project / "environment" / "bin" / "python", TRAINING)
    env = {**os.environ, "VIRTUAL_ENV": str(project / "environment")}
    command = ["bash", str(project / "script" / "segment_digits.sh")]
    with (
        open(project / "errors", "w+") as errors,
        subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=errors) as run,
    ):
        started = [project / name for name in ("plain", "diverse")]
        while not all(path.exists() and path.read_text().endswith("\n") for path in started):
            assert run.poll() is None
            time.sleep(0.02)
        if number:
            run.send_signal(number)
        else:
            (project / "fail").touch()
        run.wait(timeout=PATIENCE)
        errors.seek(0)
        assert run.returncode == code and ("no disk" in errors.read()) == (code == 1)
    assert all(ends(int(path.read_text())) for path in started)


# ------------------------------------------------------------------------------------------------------------
# Output that nobody reads

PROGRAMS = ["main.py", "script/compare_masks.py", "script/match_coefficients.py", "script/fashion_mnist.py"]
PROGRAMS += [
    "script/export_model.py",
    "script/reproduce_table.py",
    "script/run_with_submitit.py",
    "benchmarks/step.py",
]


@pytest.mark.parametrize("script", PROGRAMS)
def test_help_that_nobody_reads(script: str, tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with open(tmp_path / "errors", "w+") as errors:
        code = forks.Fork(ROOT / script, ["--help"], os.environ, writing, errors.fileno()).wait()
        os.close(writing)
        errors.seek(0)
        assert (code, errors.read()) == (0, "")


# ------------------------------------------------------------------------------------------------------------
# The quickstart's report


@pytest.fixture
def report() -> ModuleType:
    spec = importlib.util.spec_from_file_location("quickstart_report", ROOT / "script" / "quickstart_report.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_run(folder: Path, recipe: str, accuracies: list[float], patches: float) -> None:
    """An output folder as main.py leaves it, as far as the report reads it."""
    folder.mkdir(parents=True)
    config.write_args(config.resolve(["--config", str(ROOT / "configs" / recipe)]), folder / "args.yaml")
    lines: list[dict[str, Any]] = [
        {
            "epoch": epoch,
            "test_loss": 2.0 / (epoch + 1),
            "test_acc1": accuracy,
            "test_patch.pairwise_cosine@last": patches,
            "test_patch.cosine@last": 0.125,
            "test_attn.pairwise_cosine@0": 0.25,
        }
        for epoch, accuracy in enumerate(accuracies)
    ]
    (folder / "log.txt").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_report(report: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The table shows last and best accuracy, similarities and seconds; the figure is a PNG."""
    write_run(tmp_path / "plain", "digits.yaml", [50.0, 91.25, 90.5], 0.75)
    write_run(tmp_path / "diverse", "digits_diverse.yaml", [40.0, 80.0, 92.5], 0.5)
    write_run(tmp_path / "paper", "digits_diverse_paper.yaml", [30.0, 95.0, 94.0], 0.25)
    report.main([str(tmp_path), "--seconds", "61", "75", "78"])
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines if line}
    assert any("12 blocks" in line for line in lines)
    assert ["plain", "90.50", "91.25", "0.750", "0.125", "0.250", "61"] in [line.split() for line in lines]
    assert ["diverse", "92.50", "92.50", "0.500", "0.125", "0.250", "75"] in [line.split() for line in lines]
    assert ["paper", "94.00", "95.00", "0.250", "0.125", "0.250", "78"] in [line.split() for line in lines]
    assert rows["figure:"] == [str(tmp_path / "quickstart.png")]
    assert (tmp_path / "quickstart.png").read_bytes().startswith(b"\x89PNG")


def test_quickstart_uses_the_recipes() -> None:
    """Its runs are main.py's with the three recipes of digits; the report on all of them comes last."""
    text = (ROOT / "script" / "quickstart.sh").read_text()
    assert "for run in plain:digits diverse:digits_diverse paper:digits_diverse_paper; do" in text
    assert 'show python main.py --config "configs/${run#*:}.yaml" --output_dir "$folder/${run%:*}"' in text
    words = text[text.rindex("show python") :].replace("\\\n", " ").replace('"', "").split()[4:]
    options = read_options([word.replace("$folder", "folder") for word in words])
    assert options.words == [f"{run}=folder/{run}/checkpoint.pth" for run in ("plain", "diverse", "paper")]
    assert (options.images, options.args.data_set, str(options.output)) == (360, "DIGITS", "folder/redundancy")
