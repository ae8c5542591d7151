"""The catalogue of regularizers: what `--list-regularizers` prints, and what docs/regularizers.md is made from.

It reads measures.py as text, since importing it would import torch, which takes seconds. A measure's docstring is a
summary line, the equation as an indented block, free text, and named sections: Args, Returns, and those in
`SECTIONS`, without which it is refused. Defaults and the arguments of `@measure` and `Option` have to be literals.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regularizers.levels import LEVELS
from regularizers.registry import Option, levels_of, options_of

MEASURES = Path(__file__).with_name("measures.py")
SECTIONS = ("Range", "Rewards", "Cost", "Source", "Use")
DOCS = "docs/regularizers.md"
GRAMMAR = "LEVEL.MEASURE[:OPTIONS][@LAYERS]=COEF"
LAYERS = "first, last, all, a block's number, a range a-b, of patches also embed and norm, or several with commas"
COLUMNS = 120  # of a terminal


# ------------------------------------------------------------------------------------------------------------
# Docstrings


@dataclass(frozen=True)
class Text:
    """A docstring's parts; sections are one line each."""

    summary: str
    equation: str
    remarks: tuple[str, ...]
    sections: Mapping[str, str]


def read_docstring(name: str, docstring: str | None) -> Text:
    """Take a measure's docstring apart.

    Raises:
        ValueError: it has no docstring, or lacks the equation or a section.
    """
    if docstring is None:
        raise ValueError(f"{name} has no docstring")
    before, marker, after = _split_sections(inspect.cleandoc(docstring))
    summary, *paragraphs = re.split(r"\n\s*\n", before.strip())
    indented = [p for p in paragraphs if p.startswith("    ")]
    if not indented:
        raise ValueError(f"{name}: the docstring has no equation (an indented block after the summary line)")
    remarks = [" ".join(p.split()) for p in paragraphs if not p.startswith("    ")]
    parts = re.split(r"^(\w+): ", marker + after, flags=re.M)[1:]
    sections = {key: " ".join(text.split()) for key, text in zip(parts[::2], parts[1::2], strict=True)}
    missing = [section for section in SECTIONS if not sections.get(section)]
    if missing:
        raise ValueError(
            f"{name}: the docstring lacks {', '.join(missing)}; every measure has {', '.join(SECTIONS)}"
        )
    return Text(" ".join(summary.split()), textwrap.dedent(indented[0]), tuple(remarks), sections)


def _split_sections(text: str) -> tuple[str, str, str]:
    """What stands before the first section, that section's 'Name: ', and the rest."""
    match = re.search(rf"^(?:Args|Returns|{'|'.join(SECTIONS)}): ", text, flags=re.M)
    return (text[: match.start()], match[0], text[match.end() :]) if match else (text, "", "")


# ------------------------------------------------------------------------------------------------------------
# Entries


@dataclass(frozen=True)
class Entry:
    """A measure, with all there is to say about it.

    Attributes:
        name: of the measure, e.g. 'cosine'.
        takes: 'set', 'pair', 'gradient' or 'labels'.
        options: those that it has, by name.
        default_layers: level -> the layers of a spec that names none.
        default_arguments: level -> the function's keyword arguments there, as they are without options.
    """

    name: str
    takes: str
    levels: tuple[str, ...]
    options: Mapping[str, Option]
    default_layers: Mapping[str, str]
    default_arguments: Mapping[str, Mapping[str, Any]]
    text: Text

    @property
    def names(self) -> list[str]:
        """Its spec names, e.g. 'patch.cosine', 'attn.cosine'."""
        return [f"{level}.{self.name}" for level in self.levels]

    @property
    def short_equation(self) -> str:
        """The equation's first line."""
        return self.text.equation.partition("\n")[0]

    @property
    def flops(self) -> str:
        """The section Cost up to its semicolon."""
        return self.text.sections["Cost"].partition(";")[0]

    @property
    def cited(self) -> str:
        """The keys in the section Source: '[C22] [G21]'."""
        return " ".join(re.findall(r"\[\w+\]", self.text.sections["Source"]))


@dataclass(frozen=True)
class Catalogue:
    """All that measures.py says.

    Attributes:
        entries: every measure, in the registry's order.
        options: every option, by name.
        sources: citation key -> paper.
    """

    entries: Sequence[Entry]
    options: Mapping[str, Option]
    sources: Mapping[str, str]


def read(text: str | None = None) -> Catalogue:
    """Read the text of measures.py, or another like it.

    Raises:
        ValueError: a docstring lacks something (see `read_docstring`), or an argument is no literal.
    """
    tree = ast.parse(MEASURES.read_text(encoding="utf-8") if text is None else text)
    options = _read_options(tree)
    entries = [_read_entry(node, decorator, options) for node, decorator in _declarations(tree)]
    return Catalogue(entries, options, _read_sources(ast.get_docstring(tree) or ""))


def _read_options(tree: ast.Module) -> dict[str, Option]:
    """The table OPTIONS."""
    (table,) = (
        node.value
        for node in tree.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == "OPTIONS"
    )
    assert isinstance(table, ast.Dict)
    pairs = zip(table.keys, table.values, strict=True)
    return {_literal(key, "a key"): Option(**_arguments(call, Option._fields, "OPTIONS")) for key, call in pairs}


def _declarations(tree: ast.Module) -> Iterator[tuple[ast.FunctionDef, ast.Call]]:
    """The functions under `@measure(...)`, and these calls."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            for decorator in node.decorator_list:
                if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "measure":
                    yield node, decorator


def _read_entry(node: ast.FunctionDef, decorator: ast.Call, options: Mapping[str, Option]) -> Entry:
    name = node.name
    declared = _arguments(decorator, (), name)
    takes = declared.get("takes", "set")
    levels = levels_of(takes, declared.get("levels"))
    keywords = zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
    defaults = {each.arg: _literal(default, f"{name}: the default of {each.arg}") for each, default in keywords}
    return Entry(
        name=name,
        takes=takes,
        levels=levels,
        options={option: options[option] for option in options_of(defaults, options)},
        default_layers={level: LEVELS[level].layers_without_choice(name, takes) for level in levels},
        default_arguments={
            level: {**defaults, **LEVELS[level].default_arguments.get(name, {})} for level in levels
        },
        text=read_docstring(name, ast.get_docstring(node)),
    )


def _arguments(call: ast.expr, positional: Sequence[str], where: str) -> dict[str, Any]:
    """The arguments of a call by their names."""
    assert isinstance(call, ast.Call)
    given = [*zip(positional, call.args, strict=False), *((str(each.arg), each.value) for each in call.keywords)]
    return {name: _literal(node, f"{where}: {ast.unparse(node)}") for name, node in given}


def _literal(node: ast.expr | None, what: str) -> Any:
    try:
        return ast.literal_eval(node or "")
    except (ValueError, SyntaxError) as error:
        raise ValueError(f"{what} has to be a literal") from error


def _read_sources(head: str) -> dict[str, str]:
    """Citation key -> paper, from the head of measures.py."""
    listed = head.partition("Sources:")[2]
    pairs = re.findall(r"\[(\w+)\]\s+(.*?)[;.]?\s*(?=\[\w+\]|\Z)", listed, flags=re.S)
    return {key: " ".join(text.split()) for key, text in pairs}


# ------------------------------------------------------------------------------------------------------------
# For the terminal


def as_text(catalogue: Catalogue | None = None) -> str:
    """The table that `python main.py --list-regularizers` prints, one line a regularizer, and how to read it."""
    catalogue = catalogue or read()
    header = ("regularizer", "R, to be minimised", "layers", "cost", "source")
    groups = [
        [
            (f"{level}.{e.name}", e.short_equation, "@" + e.default_layers[level], e.flops, e.cited)
            for e in catalogue.entries
            if level in e.levels
        ]
        for level in LEVELS
    ]
    rows = [header, *(row for group in groups for row in group)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    widths[1] = min(widths[1], COLUMNS - (sum(widths) - widths[1] + 2 * (len(widths) - 1)))

    def line(cells: Sequence[str]) -> str:
        fitting = (_shortened(cell, width).ljust(width) for cell, width in zip(cells, widths, strict=True))
        return "  ".join(fitting).rstrip()

    head = "\n".join([line(header), line(["-" * width for width in widths])])
    blocks = ["\n".join(map(line, group)) for group in groups]
    return "\n\n".join([head + "\n" + blocks[0], *blocks[1:], _legend(catalogue)])


def _shortened(text: str, width: int) -> str:
    return text if len(text) <= width else textwrap.shorten(text, width, placeholder=" ...")


def _legend(catalogue: Catalogue) -> str:
    """The grammar of specs, the options, the papers, and where there is more."""
    notes = {
        "spec": f"{GRAMMAR} after --reg, without =COEF after --measure; e.g. patch.cosine:abs@0,6-11=0.1",
        "layers": f"{LAYERS}; the table shows those taken where a spec names none",
        "notation": "n items x_i of width d, u_i = x_i / |x_i|; X and U have them as rows",
    }
    for name, option in catalogue.options.items():
        where = ", ".join(e.name for e in catalogue.entries if name in e.options)
        notes[f":{option.written(name)}"] = f"{option.meaning} ({where})"
    notes["matrices"] = "; ".join(
        f"{level.name} terms take {', '.join(level.matrices)} among their options; "
        f"{', '.join(level.default_matrices)} without"
        for level in LEVELS.values()
        if level.matrices
    )
    notes |= {f"[{key}]": paper for key, paper in catalogue.sources.items()}
    notes["more"] = DOCS
    indent = max(map(len, notes)) + 2
    return "\n".join(
        textwrap.fill(label.ljust(indent) + note, COLUMNS - 4, subsequent_indent=" " * indent)
        for label, note in notes.items()
    )
