"""docs/methods.md says of every remedy what the code says: options, equation, source, parameters, families."""

from __future__ import annotations

import inspect
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from families import FAMILIES
from test_remedies import REFUSED

from models.remedies import REMEDIES, install_remedies, options_of, parse_remedy

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
ARXIV = r"\b(\d{4}\.\d{5})\b"
# The rows of the table of families -> their families in tests/families.py.
ROWS = {
    "vit, deit, siglip": "vit vit_avg vit_gap vit_max vit_map deit siglip siglip_gap",
    "deit distilled": "deit_distilled",
    "deit3, dinov2": "deit3 dinov2",
    "dinov2 with registers": "dinov2_reg",
    "vit with QK-norm": "vit_qk_norm",
    "vit with parallel scaling": "vit_parallel",
    "vit with parallel branches": "vit_parallel_things",
    "vit with differential attention": "vit_diff",
    "vit with parallel scaling and differential attention": "vit_parallel_diff",
    "beit, beitv2": "beit beit_shared beitv2",
    "eva, eva02": "eva eva02 eva02_base",
    "eva with QK-norm": "eva_grouped",
    "dinov3": "dinov3",
    "relpos": "relpos relpos_cls relpos_shared relpos_bias",
    "naflexvit": "naflex naflex_cls naflex_map",
    "naflexvit with rotary positions": "naflex_rope",
    "deepseek": "deepseek",
    "cait": "cait",
    "convit": "convit",
    "tnt": "tnt",
    "xcit": "xcit xcit_tokens_norm",
    "swin, swinv2": "swin swinv2 swinv2_cr",
    "pvt_v2, twins": "pvt_v2 pvt_v2_linear twins_svt twins_pcpvt",
    "volo": "volo",
    "levit": "levit",
    "levit with convolutions": "levit_conv",
    "hiera": "hiera",
    "mvitv2": "mvitv2 mvitv2_cls",
}
each_remedy = pytest.mark.parametrize("name", REMEDIES)


def part(heading: str) -> str:
    """What stands under a heading, up to the next one."""
    (found,) = re.findall(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", PAGE, flags=re.M | re.S)
    return found


def rows(text: str) -> list[list[str]]:
    """The cells of the rows of tables, without heads."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    marks = [number for number, row in enumerate(cells) if set("".join(row)) == {"-"}]
    return [row for number, row in enumerate(cells) if number not in marks and number + 1 not in marks]


def described(name: str) -> dict[str, str]:
    """The lines of a remedy's table."""
    return {row[0]: row[1] for row in rows(part(name))}


def overview(name: str) -> list[str]:
    """A remedy's row in the table of all methods."""
    (row,) = [row for row in rows(part("Overview")) if row[1] == f"`--remedy {name}`"]
    assert f"(#{name})" in row[0]
    return row


def sources(name: str) -> set[str]:
    return set(re.findall(ARXIV, inspect.getdoc(REMEDIES[name]) or ""))


@cache
def stock() -> Any:
    with torch.device("meta"):
        return timm.create_model("deit_small_patch16_224")


def added(spec: str) -> int:
    """The parameters that DeiT-S gets."""
    with torch.device("meta"):
        backbone = timm.create_model("deit_small_patch16_224")
        install_remedies(backbone, [spec])
    count, before = (sum(each.numel() for each in model.parameters()) for model in (backbone, stock()))
    return count - before


def test_the_page_has_the_remedies_in_their_order() -> None:
    sections = re.findall(r"^### (\w+)$", PAGE, flags=re.M)
    assert [name for name in sections if name in REMEDIES] == list(REMEDIES)


@each_remedy
def test_source(name: str) -> None:
    assert sources(name)
    assert set(re.findall(ARXIV, overview(name)[-1])) == sources(name)
    assert sources(name) <= set(re.findall(ARXIV, described(name)["the original"]))


@each_remedy
def test_options(name: str) -> None:
    """The options named are those that there are, with their defaults."""
    text = described(name)["options"]
    defaults = options_of(name)
    written = {key if value is False else f"{key}={value!r}" for key, value in defaults.items()}
    named = {item.partition("`")[2].partition("`")[0] for item in text.split("; ")} - {""}
    assert named == written and (written or text == "none")


@each_remedy
def test_equation(name: str) -> None:
    """The lines that the docstring sets off are those of the page."""
    about = (inspect.getdoc(REMEDIES[name]) or "").partition("\nArgs:")[0].partition("\nSource:")[0]
    equations = re.findall(r"^    (\S.*)$", about, flags=re.M)
    set_off = "\n".join(re.findall(r"^```\n(.*?)^```", part(name), flags=re.M | re.S))
    assert set_off.splitlines() == equations


@each_remedy
def test_parameters(name: str) -> None:
    assert overview(name)[6] == f"{added(name):,}"


def test_parameters_of_options() -> None:
    assert f"{added('contranorm:learnable'):,} parameters with `learnable`" in part("contranorm")
    head = 384 * 1000 + 1000  # the second head of Patch Diversification
    (row,) = [row for row in rows(part("Overview")) if "released" in row[0]]
    assert row[6] == f"{head + added('talking_heads:random'):,}"


def test_commands_parse() -> None:
    specs = re.findall(r"--remedy (?!NAME)([^\s`]+)", PAGE)
    assert {parse_remedy(spec).name for spec in specs} == set(REMEDIES)


def test_families() -> None:
    """The table of families says what tests/test_remedies.py found out."""
    found = {}
    for models, text, *_ in rows(part("Where each is defined")):
        named = set(re.findall(r"\w+", text.partition("all but")[2] or text)) & set(REMEDIES)
        refused = set(REMEDIES) - named if text.startswith("all") else named
        assert refused or text == "none"
        found |= {family: refused for family in ROWS[models].split()}
    assert set(found) == set(FAMILIES)
    for family, refused in found.items():
        assert refused == {name for name in REMEDIES if family in REFUSED[name]}, family


def test_the_costs_are_those_of_the_benchmarks() -> None:
    benchmarks = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    costs = rows(part("What each costs"))
    assert costs == rows(benchmarks.partition("\n## Remedies\n")[2].partition("\n## ")[0])
    assert {row[0].strip("`") for row in costs} >= set(REMEDIES)
    for row in costs:
        name = row[0].strip("`")
        assert name not in REMEDIES or row[3] == overview(name)[6]
