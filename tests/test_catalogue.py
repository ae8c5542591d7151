"""The catalogue says what the code does, and docs/regularizers.md what the catalogue says."""

from __future__ import annotations

import dataclasses
import inspect
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import regularizers
from build import SCHEMES
from errors import UserError
from models.adapters import MATRICES
from options import config, flags
from regularizers import MEASURES, catalogue, measures, parse_spec
from regularizers.levels import LEVELS
from regularizers.measures import OPTIONS
from regularizers.registry import Option, Registry, levels_of
from regularizers.specs import all_names

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "regularizers.md"
METRICS = ROOT / "docs" / "metrics.md"
REGENERATE = "run python script/make_docs.py"


DOCSTRING = """A summary that
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


def source(decorator: str = "@measure()", signature: str = "x: Tensor", docstring: str = DOCSTRING) -> str:
    """The text of measures.py with one more measure, called 'documented'."""
    added = f'{decorator}\ndef documented({signature}) -> Tensor:\n    r"""{docstring}"""\n    return x.sum()\n'
    return catalogue.MEASURES.read_text(encoding="utf-8") + "\n\n" + added


# ------------------------------------------------------------------------------------------------------------
# Docstrings


def test_a_docstring_is_taken_apart() -> None:
    text = catalogue.read_docstring("documented", DOCSTRING)
    assert text.summary == "A summary that takes two lines."
    assert text.equation == "R = x\n  + 0\ny = 1"
    assert text.remarks == ("A remark with `code`: over two lines.",)
    assert text.sections["Range"] == "[0, 1]; continued."
    assert text.sections["Args"] == "x [..., n, d]." and text.sections["Returns"] == "scalar."
    assert list(text.sections) == ["Args", "Returns", *catalogue.SECTIONS]


@pytest.mark.parametrize("section", catalogue.SECTIONS)
def test_a_missing_or_empty_section_is_an_error(section: str) -> None:
    for changed in (re.sub(rf"{section}: .*", "", DOCSTRING), re.sub(rf"{section}: (.|\n    )*?\n", "", DOCSTRING)):
        with pytest.raises(ValueError, match=f"documented: the docstring lacks {section}"):
            catalogue.read(source(docstring=changed))


def test_a_missing_equation_or_docstring_is_an_error() -> None:
    without = re.sub(r"\n {8}[Ry ].*", "", DOCSTRING.replace("        continued.", ""))
    with pytest.raises(ValueError, match="no equation"):
        catalogue.read_docstring("documented", without)
    with pytest.raises(ValueError, match="documented has no docstring"):
        catalogue.read(source().replace(f'    r"""{DOCSTRING}"""\n', ""))


@pytest.mark.parametrize("name", MEASURES)
def test_every_measure_has_all_sections_in_one_order(name: str) -> None:
    function = MEASURES[name].function
    text = catalogue.read_docstring(name, function.__doc__)
    assert list(text.sections) == ["Args", "Returns", *catalogue.SECTIONS]
    assert text.equation.startswith("R = ")
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY and parameter.name != "labels":
            assert re.search(rf"\b{parameter.name}\b", text.sections["Args"]), parameter.name


def test_sources_cited_are_listed() -> None:
    listed = catalogue.read()
    cited = {key for e in listed.entries for key in re.findall(r"\[(\w+)\]", e.text.sections["Source"])}
    assert cited == set(listed.sources)


# ------------------------------------------------------------------------------------------------------------
# Without torch


def test_the_catalogue_is_read_without_torch() -> None:
    """Nor does the package import it before something is asked for that needs it."""
    code = (
        "import sys, regularizers, regularizers.catalogue as c; text = c.as_text(); "
        "assert 'torch' not in sys.modules; from regularizers import MEASURES; assert 'torch' in sys.modules; "
        "print(text)"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout == catalogue.as_text() + "\n"


def test_all_that_the_package_names_is_there() -> None:
    for name in regularizers.__all__:
        assert getattr(regularizers, name).__class__ is not None
    assert regularizers.MEASURES is measures.MEASURES and regularizers.parse_spec is parse_spec
    with pytest.raises(AttributeError, match="module 'regularizers' has no attribute 'Diversty'"):
        regularizers.__getattr__("Diversty")


@pytest.mark.parametrize("name", MEASURES)
def test_an_entry_is_what_the_registry_says(name: str) -> None:
    """What is read from the text, against what is registered when it runs."""
    (entry,) = (e for e in catalogue.read().entries if e.name == name)
    measure = MEASURES[name]
    assert (entry.takes, entry.levels) == (measure.takes, measure.levels)
    assert entry.options == {option: OPTIONS[option] for option in measure.options}
    for level in measure.levels:
        assert entry.default_arguments[level] == {
            **measure.defaults,
            **LEVELS[level].default_arguments.get(name, {}),
        }
    assert entry.text == catalogue.read_docstring(name, measure.function.__doc__)


def test_the_whole_catalogue_is_what_the_registry_says() -> None:
    listed = catalogue.read()
    assert [e.name for e in listed.entries] == list(MEASURES)
    assert listed.options == OPTIONS and list(listed.options) == list(OPTIONS)


# ------------------------------------------------------------------------------------------------------------
# Entries


def test_entries_are_all_that_can_be_written_in_a_spec() -> None:
    assert sorted(name for e in catalogue.read().entries for name in e.names) == sorted(all_names())


def test_measures_apply_where_a_level_has_what_they_take() -> None:
    levels = {name: set(measure.levels) for name, measure in MEASURES.items()}
    assert levels["cosine"] >= {"patch", "attn", "weight"} and levels["cno"] == levels["cosine"]
    assert levels["contrastive"] >= {"patch", "attn"} and "weight" not in levels["contrastive"]
    assert "patch" in levels["gradient_diversity"] and not levels["gradient_diversity"] & {"attn", "weight"}
    assert "patch" in levels["mixing"] and not levels["mixing"] & {"attn", "weight"}
    assert levels["context"] == {"patch"} and levels["region_mixing"] == {"patch"}
    assert MEASURES["mixing"].averaged and not MEASURES["cosine"].averaged
    assert MEASURES["context"].detached and not MEASURES["contrastive"].detached
    assert not MEASURES["region_mixing"].averaged


def test_matrices_are_those_that_models_have() -> None:
    """regularizers/ imports nothing of models/, so the names stand twice."""
    chosen = {matrix for level in LEVELS.values() for matrix in level.matrices}
    assert chosen <= set(MATRICES) and tuple(LEVELS["weight"].matrices) == MATRICES
    for level in LEVELS.values():
        assert level.of_weights == bool(level.matrices) == bool(level.default_matrices)
        assert set(level.default_matrices) <= set(level.matrices)


def test_a_level_of_weights_has_sets_alone() -> None:
    with pytest.raises(ValueError, match="the level weight: of weights a measure takes sets, and nothing else"):
        dataclasses.replace(LEVELS["weight"], default_layers={"set": "all", "pair": "first:last"})


@pytest.mark.parametrize("level", LEVELS)
def test_default_arguments_are_the_functions(level: str) -> None:
    for name, arguments in LEVELS[level].default_arguments.items():
        assert level in MEASURES[name].levels and set(arguments) <= set(MEASURES[name].defaults)


@pytest.mark.parametrize("name", all_names())
def test_default_layers_and_arguments_are_the_specs(name: str) -> None:
    """What the entry says a spec without options and layers means, against what parsing makes of it."""
    level, _, measure = name.partition(".")
    (entry,) = (e for e in catalogue.read().entries if e.name == measure)
    assert parse_spec(f"{name}=1").layers == entry.default_layers[level]
    for key, option in entry.options.items():
        default = entry.default_arguments[level][option.argument]
        for value in (default, default + 1.0) if option.value is None else (option.value,):
            spec = parse_spec(f"{name}:{option.written(key, value)}=1")
            assert (spec.options == ()) == (value == default)
            assert spec.arguments.get(option.argument, default) == value


@pytest.mark.parametrize(
    ("name", "arguments", "low", "high"),
    [
        ("cosine", {}, 0, 1),
        ("cosine", {"absolute": True}, 1 / 6, 1),
        ("cosine_cross", {}, -1, 1),
        ("pairwise_cosine", {}, 0, 1),
        ("contrastive", {}, 0.12, 2.13),
        ("contrastive", {"tau": 0.25}, 3.3e-4, 8.01),
        ("context", {}, 0, 18.5),
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


def arguments(name: str) -> list[Any]:
    """Something that a measure may be called with: the first is what a gradient is taken at."""
    takes = MEASURES[name].takes
    torch.manual_seed(0)
    x, y = torch.randn(2, 4, 6, 8, dtype=torch.float64).unbind()
    if takes == "labels":
        mixing = SCHEMES[f"patch.{name}"].mixing(patch_size=(8, 8))
        _, labels = mixing(torch.zeros(4, 3, 16, 24, dtype=torch.float64), torch.arange(4))
        regions = len(getattr(labels, "regions", x[0]))
        return [x[:, :regions].requires_grad_(), labels]
    return [x.requires_grad_(), y] if takes == "pair" else [x.requires_grad_()]


@pytest.mark.parametrize("name", MEASURES)
def test_a_step_down_the_gradient_lowers_the_measure(name: str) -> None:
    """All are minimised, as the catalogue says."""
    x, *others = arguments(name)

    def value(x: Tensor) -> Tensor:
        torch.manual_seed(1)
        return MEASURES[name].function(x, *others)

    before = value(x)
    (gradient,) = torch.autograd.grad(before, x)
    assert value(x - 1e-4 * gradient / gradient.norm()) < before


# ------------------------------------------------------------------------------------------------------------
# A measure of one's own


def test_a_new_measure_appears_by_itself() -> None:
    listed = catalogue.read(source('@measure(takes="set", levels=("attn",))'))
    text, page = catalogue.as_text(listed), docs()["as_markdown"](listed)
    assert "attn.documented" in text and "patch.documented" not in text and "weight.documented" not in text
    assert "### documented\n\nA summary that takes two lines.\n\n```\nR = x\n" in page
    assert [e.name for e in listed.entries][-1] == "documented"


def test_a_new_option_needs_one_line() -> None:
    text = source(signature="x: Tensor, *, tau: float = 2.0, strange: float = 0.5")
    text = text.replace(
        '    "tau": Option(', '    "strange": Option("strange", "of the items", above=0.25),\n    "tau": Option('
    )
    listed = catalogue.read(text)
    assert list(listed.entries[-1].options) == ["strange", "tau"]
    assert listed.entries[-1].default_arguments["patch"] == {"tau": 2.0, "strange": 0.5}
    assert re.search(r"^:strange=X +of the items \(documented\)$", catalogue.as_text(listed), re.M)
    assert re.search(r"^:tau=X .*\(contrastive, documented\)$", catalogue.as_text(listed), re.M)
    assert "`strange=X` (strange = X > 0.25): of the items" in docs()["as_markdown"](listed)


@pytest.mark.parametrize("signature", ["x: Tensor, *, eps: float = EPS", "x: Tensor, *, eps: float"])
def test_a_default_that_is_no_literal_is_an_error(signature: str) -> None:
    with pytest.raises(ValueError, match=r"documented: the default of eps has to be a literal"):
        catalogue.read(source(signature=signature))


def test_an_argument_of_the_decorator_that_is_no_literal_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"documented: ALL has to be a literal"):
        catalogue.read(source("@measure(levels=ALL)"))


@pytest.mark.parametrize(
    ("takes", "levels", "message"),
    [
        ("pair", ("patch", "weight"), r"a measure that takes 'pair' applies at patch, attn\b.*, not at weight$"),
        ("sets", None, "a measure that takes 'sets' applies at no level$"),
        ("set", ("pach",), r"a measure that takes 'set' applies at patch, attn, weight\b.*, not at pach$"),
    ],
)
def test_a_level_that_lacks_what_a_measure_takes_is_an_error(
    takes: Any, levels: tuple[str, ...] | None, message: str
) -> None:
    registry = Registry({})
    with pytest.raises(ValueError, match=message):
        registry.measure(takes=takes, levels=levels)(measures.cosine)
    assert not registry and levels_of("pair")[:2] == ("patch", "attn")


def test_a_registry_holds_what_the_decorator_and_the_signature_say() -> None:
    registry = Registry(
        {"half": Option("scale", "halved", above=0.0), "other": Option("shift", "moved", value=True)}
    )

    @registry.measure(levels=("attn",))
    def one(x: Tensor, *, scale: float = 1.0) -> Tensor:
        return x.sum() * scale

    @registry.measure(takes="labels", averaged=True)
    def two(x: Tensor, labels: Any) -> Tensor:
        return x.sum()

    assert list(registry) == ["one", "two"] and registry["one"].function is one
    assert registry["one"].options == ("half",) and registry["one"].defaults == {"scale": 1.0}
    assert (registry["one"].takes, registry["one"].levels, registry["one"].averaged) == ("set", ("attn",), False)
    assert (registry["two"].takes, registry["two"].averaged) == ("labels", True) and "patch" in registry[
        "two"
    ].levels
    assert registry["two"].options == ()


@pytest.mark.parametrize(
    ("paper", "link"), [("A, 2021, arXiv 2104.12753", "2104.12753"), ("B, a book, 1997", None)]
)
def test_a_paper_is_linked_where_it_is_on_arxiv(paper: str, link: str | None) -> None:
    text = source().replace("Sources: [C22]", f"Sources: [X99] {paper};\n         [C22]")
    listed = catalogue.read(text)
    assert listed.sources["X99"] == paper
    page = docs()["as_markdown"](listed)
    assert f"- [X99] {paper}." in page
    assert (f"[X99]: https://arxiv.org/abs/{link}" in page) == (link is not None) == ("\n[X99]: " in page)


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
    first_words = [line.split()[0] for line in text.splitlines() if re.match(rf"({'|'.join(LEVELS)})\.", line)]
    assert sorted(first_words) == sorted(all_names())
    assert max(map(len, text.splitlines())) <= 120
    assert re.search(
        r"^patch\.cosine {2,}R = 1/n\^2 sum_ij <u_i, u_j>.* {2,}@last {2,}O\(n d\) {2,}\[C22\]$", text, re.M
    )
    assert catalogue.GRAMMAR in text and catalogue.DOCS in text
    assert "weight terms take q, k, v, proj, fc1, fc2 among their options; q, k, v without" in text


def test_a_long_equation_is_shortened_and_a_long_option_makes_room() -> None:
    long = DOCSTRING.replace("R = x", "R = " + " + ".join(f"x_{i}" for i in range(40)))
    text = source(signature="x: Tensor, *, tau: float = 1.0", docstring=long)
    text = text.replace('"tau": Option(', '"temperature_of_all": Option(')
    lines = catalogue.as_text(catalogue.read(text)).splitlines()
    assert max(map(len, lines)) == 120
    (row,) = (line for line in lines if line.startswith("patch.documented "))
    assert re.search(r" R = x_0 \+ x_1 .* \.\.\. {2,}@last +O\(n d\) +\[C22\] \[G21\]$", row)
    assert any(re.match(r":temperature_of_all=X  temperature", line) for line in lines)


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


def docs() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "script" / "make_docs.py"), run_name="make_docs")


def test_the_page_is_current() -> None:
    for page, text in ((PAGE, docs()["as_markdown"]()), (METRICS, docs()["metrics_as_markdown"]())):
        assert page.is_file() and page.read_text(encoding="utf-8") == text, REGENERATE
    assert docs()["main"](["--check"]) == 0


def test_check_finds_a_stale_or_missing_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main: Callable[[list[str]], int] = docs()["main"]
    there = ["--root", str(tmp_path)]
    assert main(["--check", *there]) == 1 and capsys.readouterr().err.count(REGENERATE) == 2
    assert main(there) == 0 and main(["--check", *there]) == 0
    for page in (PAGE, METRICS):
        own = tmp_path / "docs" / page.name
        assert own.read_text(encoding="utf-8") == page.read_text(encoding="utf-8")
        own.write_text("old")
        assert main(["--check", *there]) == 1 and capsys.readouterr().err.count(REGENERATE) == 1
        assert main(there) == 0


def test_links_and_specs_of_the_page_work() -> None:
    page, listed = PAGE.read_text(encoding="utf-8"), catalogue.read()
    headings = re.findall(r"^### (\w+)$", page, flags=re.M)
    assert headings == [e.name for e in listed.entries]
    for target in re.findall(r"\]\(([^)]+)\)", page):
        assert target.removeprefix("#") in headings or (PAGE.parent / target).exists(), target
    linked = set(re.findall(r"^\[(\w+)\]: https://arxiv.org/abs/\d{4}\.\d{5}$", page, flags=re.M))
    assert linked == {key for key, paper in listed.sources.items() if "arXiv" in paper} and len(linked) >= 4
    trained = re.findall(rf"--reg +((?:{'|'.join(LEVELS)})\.\S+)", page)
    watched = re.findall(rf"--measure +((?:{'|'.join(LEVELS)})\.\S+)", page)
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


def test_the_figure_shows_the_measures_and_the_recipe() -> None:
    figure = runpy.run_path(str(ROOT / "Figs" / "overview.py"), run_name="overview")
    assert [e.name for e in figure["MEASURES"]] == list(MEASURES) and set(figure["NOTES"]) <= set(MEASURES)
    assert set(figure["COLUMNS"]) <= set(LEVELS)
    terms = [figure["MIXING"], *figure["REGULARISERS"]]
    drawn = [f"{term.level}.{term.measure}" + (f"@{term.where}" if term.where else "") for term in terms]
    assert sorted(drawn) == sorted(regularizers.REFERENCE_FLAGS.values())
