"""The benchmarks run, and write what their README says. Their figures are nobody's business here."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import forks
import pytest

ROOT = Path(__file__).parents[1]


def benchmark(script: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return forks.run(1, f"benchmarks/{script}", "--quick", "--device", "cpu", *flags, env=os.environ)


STEP = ["--rounds", "1", "--profile", "--variants", "plain", "five_terms", "textbook", "attn.mhs@all=0.1"]
SEGMENTING = {"ours_over_transformers", "heads_over_transformers_memory", "sliding_over_whole_memory"}
REMEDIES = ["--only", "explicit_map", "layerscale", "gfsa:order=3"]


@pytest.mark.parametrize(
    ("script", "flags", "ratios"),
    [
        ("step.py", STEP, {"five_terms_over_plain", "naive_over_ours", "attn.mhs@all=0.1_over_plain"}),
        ("memory.py", [], {"five_terms_over_plain_memory", "naive_over_ours_memory"}),
        ("measures.py", ["--rounds", "1", "--only", "_contrastive"], {"naive_over_ours_time_patch_contrastive"}),
        ("loader.py", ["--rounds", "1"], {"default_loader_over_reference", "fast_resize_over_reference"}),
        (
            "report.py",
            ["--images", "16"],
            {"all_metrics_over_evaluation", "monitor_over_step_image", "without_maps_over_with_maps_memory"},
        ),
        ("remedies.py", REMEDIES, {"gfsa:order=3_over_plain", "explicit_map_over_plain_memory"}),
        ("rows.py", [str(ROOT / "configs/tables/digits.yaml"), "--only", "five"], {"five_over_plain"}),
        ("segmenting.py", [], SEGMENTING),
        ("scaling.py", ["--rounds", "1", "--steps", "1"], {"weak_efficiency_five_terms_2"}),
    ],
)
def test_a_benchmark(tmp_path, script, flags, ratios):
    done = benchmark(script, *flags, "--json", str(tmp_path / "results.json"))
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "results.json").read_text())
    assert ratios <= set(results["ratios"]) and all(ratio > 0 for ratio in results["ratios"].values())
    assert {"machine", "threads", "provenance"} <= set(results)
    assert f"{script} --quick" in results["provenance"]["command"]


def test_a_mistake_is_one_line():
    done = benchmark("step.py", "--variants", "plain", "patch.mixin=1")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("step.py: error: unknown regularizer 'patch.mixin'. Did you mean patch.mixing")


def test_a_remedy_that_is_not_there_is_said_before_anything_is_measured():
    done = benchmark("remedies.py", "--only", "attnscale", "featscle")
    assert done.returncode == 2 and "attnscale" not in done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("remedies.py: error: unknown remedy 'featscle'. Did you mean featscale")
