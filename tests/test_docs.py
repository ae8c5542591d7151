"""What the README and the figure say is what the code does."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch
from conftest import TINY

from options import flags
from regularizers import MEASURES, REFERENCE_FLAGS, parse_spec
from regularizers.specs import LEVELS, MIXING

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_links_lead_somewhere():
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    assert len(targets) > 15
    for target in targets:
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_nothing_is_left_to_fill_in():
    assert not re.findall(r"^\W*[A-Z]+_[A-Z]+\W*$", README, flags=re.M)


def test_flags_and_scripts_exist():
    known = set(flags.get_args_parser()._option_string_actions)
    for script in ("export_model.py", "run_with_submitit.py"):
        parser = runpy.run_path(str(ROOT / "script" / script), run_name="other")["get_args_parser"]()
        known |= set(parser._option_string_actions)
    for line in README.splitlines():
        foreign = any(word in line for word in ("torchrun", "srun", "sbatch", "benchmarks/"))
        for flag in re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", line):
            assert flag in known or foreign, f"{flag} in: {line}"
    for script in re.findall(r"(?:script|configs|benchmarks)/[\w]+\.(?:sh|yaml|py)", README):
        assert (ROOT / script).is_file(), script


def test_specs_parse():
    specs = re.findall(r"--reg ((?:patch|attn|weight)\.[^\s`]+)", README)
    assert len(specs) >= 6
    for spec in specs:
        parse_spec(spec)
    for spec in re.findall(r"--measure ((?:patch|attn|weight)\.[^\s`]+)", README):
        parse_spec(spec, with_coef=False)
    for flag, term in REFERENCE_FLAGS.items():
        assert f"`--{flag}` is\n`{term}`" in README or f"`--{flag}` is `{term}`" in README, flag


def test_the_table_of_measures_is_complete():
    rows = re.findall(r"^\| `(\w+)` \|.*\| ([\w, ]+) \| *(.*?) *\|$", README, flags=re.M)
    assert {name for name, _, _ in rows} == {*MEASURES, "mixing"}
    for name, levels, options in rows:
        if name != "mixing":
            assert tuple(levels.split(", ")) == MEASURES[name].levels, name
            shown = set(re.findall(r"`(\w+)`", options)) | ({"signed"} if "`abs`" in options else set())
            assert shown == set(MEASURES[name].options), name


def test_the_figure_shows_the_measures_that_exist():
    figure = runpy.run_path(str(ROOT / "Figs" / "overview.py"), run_name="overview")
    drawn = {name: set(levels) for name, (_, levels) in figure["MEASURES"].items()}
    expected = {name: set(measure.levels) for name, measure in MEASURES.items() if name != "pairwise_cosine"}
    assert drawn == {**expected, "mixing": {"patch"}}
    assert set(LEVELS) == {"patch", "attn", "weight"} and MIXING == "patch.mixing"


def test_the_python_example_runs():
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    arguments = ", ".join(f"{key}={value}" for key, value in (TINY | {"depth": 12}).items())
    code = code.replace(
        'build_model("vit_small_patch16_224")', f'build_model("vit_small_patch16_224", {arguments})'
    )
    names: dict = {"images": torch.randn(2, 3, 32, 32)}
    exec(code, names)
    assert names["terms"]["patch.cosine@last"].weight == 0.5
    assert names["terms"]["patch.cosine@last"].value.item() == pytest.approx(
        torch.nn.functional.normalize(names["captured"].tokens[11][:, 1:], dim=-1)
        .mean(1)
        .square()
        .sum(1)
        .mean()
        .item()
    )
