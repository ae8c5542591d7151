"""Do the tests notice a wrong character? Change the code in one place at a time, and run its tests (cosmic-ray).

    pip install -r requirements-mutation.txt
    python script/mutation.py                              # every module of TESTS: hours
    python script/mutation.py losses.py --sample 20        # 20 places of one module, drawn with a fixed seed

Each change ("mutant": + becomes -, < becomes <=, 1 becomes 2, `and` becomes `or`, ...) is made in a copy of the
project, and the module's tests run until one fails. Printed is every mutant that survives, as a diff. Some change
nothing that anybody could see (an annotation, a size of chunks); each of the others is a test that is missing.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 600  # that a mutant's tests may take

# Module -> the tests that should notice, the quickest first.
TESTS = {
    "samplers.py": ["test_samplers.py"],
    "losses.py": ["test_losses.py", "test_golden.py"],
    "engine.py": ["test_engine.py", "test_golden.py", "test_run_state.py"],
    "mixing/mixup.py": ["test_mixup.py", "test_losses.py"],
    "regularizers/measures.py": ["test_golden.py", "test_measures.py"],
    "regularizers/primitives.py": ["test_golden.py", "test_measures.py", "test_losses.py"],
    "regularizers/registry.py": ["test_catalogue.py"],
    "regularizers/catalogue.py": ["test_catalogue.py"],
    "regularizers/specs.py": ["test_diversity.py", "test_catalogue.py", "test_config.py"],
    "regularizers/diversity.py": ["test_golden.py", "test_diversity.py"],
    "regularizers/patch.py": ["test_golden.py", "test_diversity.py"],
    "regularizers/attention.py": ["test_golden.py", "test_diversity.py"],
    "regularizers/weight.py": ["test_golden.py", "test_diversity.py"],
    "state/checkpoint.py": ["test_checkpoint.py", "test_run_state.py"],
    "state/run_state.py": ["test_run_state.py", "test_checkpoint.py", "test_resume.py"],
    "state/saver.py": ["test_run_state.py", "test_resume.py"],
    "state/trained.py": ["test_export.py"],
}
# Of the many ways to replace an operator one each: the others die or survive with it.
KEPT = "Add_Sub|Sub_Add|Mul_Div|Div_Mul|Pow_Mul|FloorDiv_Div|Mod_FloorDiv|BitOr_BitAnd|BitAnd_BitOr|MatMul_Mul|"
KEPT += "Lt_LtE|LtE_Lt|Gt_GtE|GtE_Gt|Eq_NotEq|NotEq_Eq|Is_IsNot|IsNot_Is|In_NotIn|NotIn_In"
DROPPED = [rf"core/Replace(Binary|Comparison)Operator_(?!({KEPT})$).*", "core/Variable.*", "core/RemoveDecorator"]


def configuration(module: str, tests: Sequence[str]) -> str:
    """cosmic-ray's settings for one module."""
    files = " ".join(f"tests/{test}" for test in tests)
    dropped = ", ".join(f"'{pattern}'" for pattern in DROPPED)
    return f"""
[cosmic-ray]
module-path = "{module}"
timeout = {SECONDS}
excluded-modules = []
test-command = "{sys.executable} -m pytest -x -q -p no:cacheprovider {files}"

[cosmic-ray.distributor]
name = "local"

[cosmic-ray.filters.operators-filter]
exclude-operators = [{dropped}]
"""


def keep_some(session: Path, sample: int, seed: int) -> int:
    """Leave `sample` of a session's mutants to do, drawn at random (0: all); how many there are then."""
    with sqlite3.connect(session) as database:
        done = {job for (job,) in database.execute("SELECT job_id FROM work_results")}  # those that were dropped
        jobs = sorted(job for (job,) in database.execute("SELECT job_id FROM work_items") if job not in done)
        if sample and sample < len(jobs):
            for job in random.Random(seed).sample(jobs, len(jobs) - sample):
                for table in ("mutation_specs", "work_items"):
                    database.execute(f"DELETE FROM {table} WHERE job_id = ?", (job,))
            return sample
        return len(jobs)


def mutate(module: str, sample: int, seed: int, folder: Path) -> str:
    """Make and test the mutants of one module in a copy of the project; those that survive, as diffs."""
    copy, session = folder / "project", folder / "session.sqlite"
    ignored = shutil.ignore_patterns(".*", "experiment", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=ignored)
    settings = folder / "mutation.toml"
    settings.write_text(configuration(module, TESTS[module]), encoding="utf-8")

    def tool(*words: object) -> str:
        done = subprocess.run([*map(str, words)], cwd=copy, check=True, capture_output=True, text=True)
        return done.stdout

    tool("cosmic-ray", "baseline", settings)
    tool("cosmic-ray", "init", settings, session)
    tool("cr-filter-operators", session, settings)
    print(f"{module}: {keep_some(session, sample, seed)} mutants against {' '.join(TESTS[module])}", flush=True)
    tool("cosmic-ray", "exec", settings, session)
    return tool("cr-report", "--surviving-only", "--show-diff", session)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=f"of {', '.join(TESTS)}; all by default")
    parser.add_argument("--sample", type=int, default=0, help="mutants of each module; 0: all (the default)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    args = parser.parse_args(argv)
    unknown = [module for module in args.modules if module not in TESTS]
    if unknown:
        parser.error(f"no tests are known for {unknown[0]}: choose from {', '.join(TESTS)}, or add a line to TESTS")
    if shutil.which("cosmic-ray") is None:
        parser.error("cosmic-ray is missing: pip install -r requirements-mutation.txt")
    for module in args.modules or TESTS:
        with tempfile.TemporaryDirectory() as folder:
            print(mutate(module, args.sample, args.seed, Path(folder)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
