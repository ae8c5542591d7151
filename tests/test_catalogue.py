"""The catalogue says what the code does, and docs/regularizers.md what the catalogue says."""

from __future__ import annotations

import inspect
import re
import runpy
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from errors import UserError
from models.adapters import MATRICES
from options import config, flags
from regularizers import MEASURES, catalogue, measures, parse_spec, patch
from regularizers.measures import OPTIONS, Measure
from regularizers.specs import LEVELS, all_names

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "regularizers.md"
REGENERATE = "run python script/make_docs.py"


def documented(x: Tensor) -> Tensor:
    """A summary that
    takes two lines.

        R = x
          + 0
        y = 1

    A remark with `code`:
    over two lines.

    Args: x [..., n, d].
    Returns: scalar.
    Range: [0, 1];
        continued.
    Rewards: nothing.
    Cost: O(n d); keeps it.
    Source: [C22], after [G21].
    Use: here.
    """
    return x


# ------------------------------------------------------------------------------------------------------------
# Docstrings


def test_a_docstring_is_taken_apart() -> None:
    text = catalogue.read_docstring(documented)
    assert text.summary == "A summary that takes two lines."
    assert text.equation == "R = x\n  + 0\ny = 1"
    assert text.remarks == ("A remark with `code`: over two lines.",)
    assert text.sections["Range"] == "[0, 1]; continued."
    assert text.sections["Args"] == "x [..., n, d]." and text.sections["Returns"] == "scalar."
    assert list(text.sections) == ["Args", "Returns", *catalogue.SECTIONS]


@pytest.mark.parametrize("section", catalogue.SECTIONS)
def test_a_missing_or_empty_section_is_an_error(section: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = documented.__doc__ or ""
    for changed in (re.sub(rf"{section}: .*", "", whole), re.sub(rf"{section}: (.|\n    )*?\n", "", whole)):
        monkeypatch.setattr(documented, "__doc__", changed)
        with pytest.raises(ValueError, match=f"documented: the docstring lacks {section}"):
            catalogue.read_docstring(documented)


def test_a_missing_equation_or_docstring_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    without = re.sub(r"\n {8}[Ry ].*", "", (documented.__doc__ or "").replace("        continued.", ""))
    monkeypatch.setattr(documented, "__doc__", without)
    with pytest.raises(ValueError, match="no equation"):
        catalogue.read_docstring(documented)
    monkeypatch.setattr(documented, "__doc__", None)
    with pytest.raises(ValueError, match="no docstring"):
        catalogue.read_docstring(documented)


@pytest.mark.parametrize("function", [*(m.function for m in MEASURES.values()), patch.mixing])
def test_every_measure_has_all_sections_in_one_order(function: Any) -> None:
    text = catalogue.read_docstring(function)
    assert list(text.sections) == ["Args", "Returns", *catalogue.SECTIONS]
    assert text.equation.startswith("R = ")
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY and parameter.name != "labels":
            assert re.search(rf"\b{parameter.name}\b", text.sections["Args"]), parameter.name


def test_sources_cited_are_listed_and_have_a_number() -> None:
    sources = catalogue.sources()
    cited = {key for e in catalogue.entries() for key in re.findall(r"\[(\w+)\]", e.text.sections["Source"])}
    assert cited == set(sources)
    assert all(re.search(r"arXiv \d{4}\.\d{5}$", paper) for paper in sources.values())


# ------------------------------------------------------------------------------------------------------------
# Entries


def test_entries_are_all_that_can_be_written_in_a_spec() -> None:
    listed = catalogue.entries()
    assert sorted(name for e in listed for name in e.names) == sorted(all_names())
    assert set(catalogue.ITEMS) == set(LEVELS) and set(catalogue.MATRIX_MEANINGS) == set(MATRICES)
    assert set(measures.OPTION_MEANINGS) == set(OPTIONS)


@pytest.mark.parametrize("name", all_names())
def test_default_layers_and_arguments_are_the_specs(name: str) -> None:
    """What the entry says a spec without options and layers means, against what parsing makes of it."""
    level, _, measure = name.partition(".")
    (entry,) = (e for e in catalogue.entries() if e.name == measure)
    assert parse_spec(f"{name}=1").layers == entry.default_layers[level]
    for option in entry.options:
        argument, value = OPTIONS[option]
        assert (parse_spec(f"{name}:{option}=1").options == ()) == (
            entry.default_arguments[level][argument] == value
        )


@pytest.mark.parametrize(
    ("name", "arguments", "low", "high"),
    [
        ("cosine", {}, 0, 1),
        ("cosine", {"absolute": True}, 1 / 6, 1),
        ("cosine_cross", {}, -1, 1),
        ("pairwise_cosine", {}, 0, 1),
        ("contrastive", {}, 0.12, 2.13),
        ("mhs", {}, -4, 0),
        ("mgd", {}, -6e-6, 13.8 * 6),
        ("so", {}, 2, torch.inf),
        ("cno", {}, 0, torch.inf),
        ("gradient_diversity", {}, -torch.inf, -1 / 6),
    ],
)
def test_ranges_hold(name: str, arguments: Mapping[str, Any], low: float, high: float) -> None:
    """The ranges in the docstrings, at 6 items of width 4; two sets where a measure takes a pair."""
    function = partial(MEASURES[name].function, **arguments)
    generator = torch.Generator().manual_seed(0)
    for kind in range(3):
        x, y = torch.randn(2, 5, 6, 4, generator=generator, dtype=torch.float64).unbind()
        if kind:
            x, y = x + 5 * kind, y - 5 * kind  # items alike, and layers opposed
        value = float(function(x, y) if MEASURES[name].takes == "pair" else function(x))
        assert low - 1e-9 <= value <= high + 1e-9


@pytest.mark.parametrize("name", MEASURES)
def test_a_step_down_the_gradient_lowers_the_measure(name: str) -> None:
    """All are minimised, as the catalogue says."""
    torch.manual_seed(0)
    x, y = torch.randn(2, 4, 6, 8, dtype=torch.float64).unbind()

    def value(x: Tensor) -> Tensor:
        torch.manual_seed(1)
        return MEASURES[name].function(*((x, y) if MEASURES[name].takes == "pair" else (x,)))

    x.requires_grad_()
    before = value(x)
    (gradient,) = torch.autograd.grad(before, x)
    assert value(x - 1e-4 * gradient / gradient.norm()) < before


# ------------------------------------------------------------------------------------------------------------
# A measure of one's own


def test_a_new_measure_appears_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "MEASURES", {**MEASURES, "documented": Measure(documented, levels=("attn",))})
    assert "attn.documented" in catalogue.as_text() and "patch.documented" not in catalogue.as_text()
    assert "### documented\n\nA summary that takes two lines.\n\n```\nR = x\n" in catalogue.as_markdown()


def test_an_option_without_a_meaning_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    odd = Measure(documented)
    object.__setattr__(odd, "options", ("odd",))
    monkeypatch.setattr(catalogue, "MEASURES", {"documented": odd})
    with pytest.raises(ValueError, match="OPTION_MEANINGS for odd"):
        catalogue.entry("documented")


def test_a_source_without_a_number_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "sources", lambda: {"C22": "Somewhere"})
    with pytest.raises(ValueError, match="Somewhere"):
        catalogue.as_markdown()


# ------------------------------------------------------------------------------------------------------------
# --list-regularizers


@pytest.mark.parametrize("flag", ["--list-regularizers", "--list_regularizers"])
def test_the_flag_prints_the_table_and_exits_with_0(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ending:
        config.resolve([flag])
    assert ending.value.code == 0
    assert capsys.readouterr().out == catalogue.as_text() + "\n"


def test_the_table_has_one_line_a_regularizer_and_fits_a_terminal() -> None:
    text = catalogue.as_text()
    first_words = [line.split()[0] for line in text.splitlines() if re.match(r"(patch|attn|weight)\.", line)]
    assert sorted(first_words) == sorted(all_names())
    assert max(map(len, text.splitlines())) <= 120
    assert re.search(
        r"^patch\.cosine {2,}R = 1/n\^2 sum_ij <u_i, u_j>.* {2,}@last {2,}O\(n d\) {2,}\[C22\]$", text, re.M
    )
    assert catalogue.GRAMMAR in text and catalogue.DOCS in text


def test_the_flag_stands_in_the_diversity_group_and_is_no_key_of_a_config_file(tmp_path: Path) -> None:
    parser = flags.get_args_parser()
    (group,) = (g for g in parser._action_groups if any("--reg" in a.option_strings for a in g._group_actions))
    assert any("--list-regularizers" in action.option_strings for action in group._group_actions)
    assert not hasattr(parser.parse_args([]), "list_regularizers")
    file = tmp_path / "run.yaml"
    file.write_text("list_regularizers: true\n")
    with pytest.raises(UserError, match="unknown key"):
        config.resolve(["--config", str(file), "--data-set", "DIGITS"])


# ------------------------------------------------------------------------------------------------------------
# docs/regularizers.md


def make_docs() -> Any:
    return runpy.run_path(str(ROOT / "script" / "make_docs.py"), run_name="make_docs")["main"]


def test_the_page_is_current() -> None:
    assert PAGE.is_file() and PAGE.read_text(encoding="utf-8") == catalogue.as_markdown(), REGENERATE
    assert make_docs()(["--check"]) == 0


def test_check_finds_a_stale_or_missing_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = make_docs()
    main.__globals__["PAGE"] = tmp_path / "docs" / "page.md"
    assert main(["--check"]) == 1 and REGENERATE in capsys.readouterr().err
    assert main([]) == 0 and main(["--check"]) == 0
    assert main.__globals__["PAGE"].read_text(encoding="utf-8") == PAGE.read_text(encoding="utf-8")
    main.__globals__["PAGE"].write_text("old")
    assert main(["--check"]) == 1


def test_links_and_specs_of_the_page_work() -> None:
    page = PAGE.read_text(encoding="utf-8")
    headings = re.findall(r"^### (\w+)$", page, flags=re.M)
    assert headings == [e.name for e in catalogue.entries()]
    for target in re.findall(r"\]\(([^)]+)\)", page):
        assert target.removeprefix("#") in headings or (PAGE.parent / target).exists(), target
    assert set(re.findall(r"^\[(\w+)\]: https://arxiv.org/abs/\d{4}\.\d{5}$", page, flags=re.M)) == set(
        catalogue.sources()
    )
    trained = re.findall(r"--reg +((?:patch|attn|weight)\.\S+)", page)
    watched = re.findall(r"--measure +((?:patch|attn|weight)\.\S+)", page)
    assert len(trained) >= 5 and watched
    for spec in trained:
        parse_spec(spec)
    for spec in watched:
        parse_spec(spec, with_coef=False)


def test_tables_of_the_page_are_whole() -> None:
    """Every row of a table has as many cells as its head, once escaped bars are set aside."""
    columns = 0
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = line.replace(r"\|", "").count("|")
        if line.startswith("|"):
            columns = columns or cells
            assert cells == columns, line
        else:
            columns = 0
