"""What the pages say is what the code does: links, files, flags, specs, and the README's Python example."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from conftest import TINY
from torch.distributed.run import get_args_parser as torchrun_parser

from options import flags
from options.flags import Args
from options.parser import Resume, dashed, declared
from redundancy.options import get_args_parser as redundancy_parser
from regularizers import REFERENCE_FLAGS, parse_spec
from segmentation.options import Flags
from segmentation.options import get_args_parser as segmentation_parser
from tables.options import get_args_parser as tables_parser

ROOT = Path(__file__).parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")])
}
README = PAGES["README.md"]
SLURM = {"--nodes", "--ntasks-per-node", "--gpus-per-node"}
TRACKERS = {"--logdir", "--backend-store-uri"}  # of tensorboard and mlflow
OF_OTHERS = {  # programs and flags of timm, which one page calls
    *("train.py", "validate.py", "inference.py", "onnx_validate.py", "avg_checkpoints.py", "clean_checkpoint.py"),
    *("--num-classes", "--split", "--checkpoint", "--use-ema", "--initial-checkpoint", "--output", "--input"),
    *("--filter", "--no-use-ema", "--include-index", "--results-file", "--onnx-input", "--amp"),
}
OF_DATA = {"train/", "val/", "wds/", "tfds/", "hfids/", "figures/"}  # folders that are not the project's
each_page = pytest.mark.parametrize("page", PAGES)


def prose(page: str) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", PAGES[page], flags=re.M | re.S)


def anchors(page: str) -> set[str]:
    """The names that GitHub gives to a page's headings."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", prose(page), flags=re.M):
        name = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        number = 0
        while (anchor := f"{name}-{number}" if number else name) in found:
            number += 1
        found.add(anchor)
    return found


def lost(page: str) -> list[str]:
    """The links of a page that lead nowhere in the project."""
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        file, _, anchor = target.partition("#")
        path = ((ROOT / page).parent / file).resolve() if file else ROOT / page
        if target.startswith("https://"):
            continue
        inside = path.is_relative_to(ROOT) and (path.exists() or not file)
        if not inside or (anchor and anchor not in anchors(str(path.relative_to(ROOT)))):
            found.append(target)
    return found


@each_page
def test_links_lead_somewhere(page):
    assert not lost(page)


def test_a_link_that_leads_nowhere_is_found(monkeypatch):
    text = "# One\n[a](README.md) [b](#one) [c](docs/data.md#data)\n[d](no.md) [e](#two) [f](docs/data.md#no)"
    monkeypatch.setitem(PAGES, "page.md", text)
    assert lost("page.md") == ["no.md", "#two", "docs/data.md#no"]


def test_every_page_is_linked_from_the_readme():
    for page in PAGES:
        assert page == "README.md" or f"]({page})" in README, page


@each_page
def test_nothing_is_left_to_fill_in(page):
    assert not re.findall(r"^\W*[A-Z]+_[A-Z]+\W*$", PAGES[page], flags=re.M)


def project_files(page: str) -> list[str]:
    """What a page names that looks like a file or a folder of the project."""
    own = (path.name for path in ROOT.iterdir() if path.is_dir() and path.name[0].isalpha())
    folders = "|".join(name for name in own if name != "experiment")  # which holds runs
    text = PAGES[page]
    named = re.findall(rf"(?<![\w./-])(?:{folders})/[\w/.-]*\.(?:py|sh|sbatch|yaml|md|png)\b", text)
    named += re.findall(r"`((?:\w+/)*\w+\.(?:py|sh|sbatch|md)|\w+/)`", text)
    return named + re.findall(r"(?<![\w./-])requirements[\w-]*\.txt", text)


def of_others(page: str) -> set[str]:
    return OF_OTHERS if page == "docs/using-elsewhere.md" else set()


@each_page
def test_files_exist(page):
    for name in project_files(page):
        beside = (ROOT / page).parent / name
        assert (ROOT / name).exists() or beside.exists() or name in OF_DATA | of_others(page), name


def known_flags() -> set[str]:
    """Every flag of a program that the pages call."""
    known = set(flags.get_args_parser()._option_string_actions) | SLURM | TRACKERS
    for parser in (torchrun_parser(), redundancy_parser(), segmentation_parser(), tables_parser()):
        known |= set(parser._option_string_actions)
    for script in [*ROOT.glob("script/*.py"), *ROOT.glob("benchmarks/*.py")]:
        known |= set(re.findall(r'add_argument\(\s*"(--[\w-]+)"', script.read_text(encoding="utf-8")))
    return known


@each_page
def test_flags_exist(page):
    named = re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", PAGES[page])
    assert not set(named) - known_flags() - of_others(page)


def test_specs_parse():
    everything = "\n".join(PAGES.values())
    terms = re.findall(r"--reg +((?:patch|attn|weight)\.[^\s`]+)", everything)
    measured = re.findall(r"--measure +((?:patch|attn|weight)\.[^\s`]+)", everything)
    named = re.findall(r"`((?:patch|attn|weight)\.\w+[:@=][^\s`]+(?<!=c))`", everything)  # `=c`: of an equation
    assert len(terms) >= 6 and len(measured) >= 2 and len(named) >= 8
    for spec in [*terms, *named]:
        parse_spec(spec if "=" in spec.rpartition("@")[2] else f"{spec}=1")
    for spec in measured:
        parse_spec(spec, with_coef=False)


@pytest.mark.parametrize("page", ["README.md", "docs/differences.md"])
def test_the_reference_s_flags_are_translated(page):
    for flag, term in REFERENCE_FLAGS.items():
        (row,) = re.findall(rf"^\|.*`--{flag}` \|.*$", PAGES[page], flags=re.M)
        assert re.search(rf"`{term}[=`]", row), row


def test_the_python_example_runs():
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    arguments = ", ".join(f"{key}={value}" for key, value in (TINY | {"depth": 12}).items())
    code = code.replace(
        'build_model("vit_small_patch16_224")', f'build_model("vit_small_patch16_224", {arguments})'
    )
    names: dict = {"images": torch.randn(2, 3, 32, 32)}
    exec(code, names)
    (term,) = names["terms"].values()
    unit = torch.nn.functional.normalize(names["captured"].tokens[11][:, 1:], dim=-1)  # [B, P, D]
    assert list(names["terms"]) == ["patch.cosine@last"] and term.coef == 0.5
    assert term.value.item() == pytest.approx(unit.mean(1).square().sum(1).mean().item())


def test_the_rules_of_resumption_are_those_of_the_flags():
    """Each flag stands in the row of its rule, and nowhere else: main.py's, then those that segmentation adds."""
    lines = (ROOT / "docs" / "resuming.md").read_text(encoding="utf-8").splitlines()
    tables = [place + 2 for place, line in enumerate(lines) if line == "| rule | flags |"]
    added = {name: flag for name, flag in declared(Flags).items() if name not in declared(Args)}
    for first, known in zip(tables, (declared(Args), added), strict=True):
        rows = [re.findall(r"`([\w-]+)`", line.split("|")[2]) for line in lines[first : first + len(Resume)]]
        for rule, names in zip(Resume, rows, strict=True):
            assert sorted(names) == sorted(dashed(name) for name, flag in known.items() if flag.resume is rule)
