"""The catalogue of regularizers, read from the measures' docstrings: for the terminal and for docs/regularizers.md.

A measure's docstring is a summary line, the equation as an indented block, free text, and named sections: Args,
Returns, and those in `SECTIONS`, without which a measure is refused. Everything else that is shown (levels,
options, layers, defaults) is read from the registry and the levels themselves, so nothing is written twice.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from models.adapters import MATRICES
from regularizers import measures, patch, weight
from regularizers.measures import MEASURES, OPTION_MEANINGS, OPTIONS
from regularizers.specs import LEVELS, MIXING

SECTIONS = ("Range", "Rewards", "Cost", "Source", "Use")
ITEMS = {
    "patch": "the patch embeddings of a block",
    "attn": "the heads of a block, each its flattened attention map",
    "weight": "the neurons (rows) of a block's weight matrices",
}
MATRIX_MEANINGS = {
    "q": "queries",
    "k": "keys",
    "v": "values",
    "proj": "the attention's output projection",
    "fc1": "the MLP's first layer",
    "fc2": "the MLP's second layer",
}
DOCS = "docs/regularizers.md"
GRAMMAR = "LEVEL.MEASURE[:OPTIONS][@LAYERS]=COEF"
LAYERS = "first, last, all, a block's number, a range a-b, or several of these with commas"


# ------------------------------------------------------------------------------------------------------------
# Docstrings


@dataclass(frozen=True)
class Text:
    """A docstring's parts; sections are one line each."""

    summary: str
    equation: str
    remarks: tuple[str, ...]
    sections: Mapping[str, str]


def read_docstring(function: Callable[..., Any]) -> Text:
    """Take a measure's docstring apart.

    Raises:
        ValueError: it has no docstring, or lacks the equation or a section.
    """
    name = function.__name__
    if function.__doc__ is None:
        raise ValueError(f"{name} has no docstring")
    before, marker, after = _split_sections(inspect.cleandoc(function.__doc__))
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


def sources() -> dict[str, str]:
    """Citation key -> paper, from the head of measures.py."""
    head = inspect.cleandoc(measures.__doc__ or "")
    listed = head.partition("Sources:")[2]
    pairs = re.findall(r"\[(\w+)\]\s+(.*?)[;.]?\s*(?=\[\w+\]|\Z)", listed, flags=re.S)
    return {key: " ".join(text.split()) for key, text in pairs}


# ------------------------------------------------------------------------------------------------------------
# Entries


@dataclass(frozen=True)
class Entry:
    """A measure, with all there is to say about it.

    Attributes:
        name: of the measure, e.g. 'cosine'.
        takes: 'set', 'pair' or 'gradient', or 'labels' for the mixing loss.
        options: option -> what it means.
        default_layers: level -> the layers of a spec that names none.
        default_arguments: level -> the function's keyword arguments there, as they are without options.
    """

    name: str
    takes: str
    levels: tuple[str, ...]
    options: Mapping[str, str]
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


def entry(name: str) -> Entry:
    """The entry of a measure in MEASURES.

    Raises:
        ValueError: see `read_docstring`; or an option without a meaning.
    """
    measure = MEASURES[name]
    unexplained = [option for option in measure.options if option not in OPTION_MEANINGS]
    if unexplained:
        raise ValueError(f"{name}: no meaning in OPTION_MEANINGS for {', '.join(unexplained)}")
    return Entry(
        name=name,
        takes=measure.takes,
        levels=measure.levels,
        options={option: OPTION_MEANINGS[option] for option in measure.options},
        default_layers={level: LEVELS[level].DEFAULT_LAYERS[measure.takes] for level in measure.levels},
        default_arguments={
            level: {**measure.defaults, **LEVELS[level].DEFAULT_ARGUMENTS.get(name, {})} for level in measure.levels
        },
        text=read_docstring(measure.function),
    )


def entries() -> list[Entry]:
    """Every measure, in the registry's order, then the mixing loss."""
    level, _, name = MIXING.partition(".")
    mixing = Entry(name, "labels", (level,), {}, {level: "last"}, {level: {}}, read_docstring(patch.mixing))
    return [*(entry(name) for name in MEASURES), mixing]


# ------------------------------------------------------------------------------------------------------------
# For the terminal


def as_text() -> str:
    """The table that `python main.py --list-regularizers` prints, one line a regularizer, and how to read it."""
    header = ("regularizer", "R, to be minimised", "layers", "cost", "source")
    listed = entries()
    groups = [
        [
            (f"{level}.{e.name}", e.short_equation, "@" + e.default_layers[level], e.flops, e.cited)
            for e in listed
            if level in e.levels
        ]
        for level in LEVELS
    ]
    rows = [header, *(row for group in groups for row in group)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()

    head = "\n".join([line(header), line(["-" * width for width in widths])])
    blocks = ["\n".join(map(line, group)) for group in groups]
    return "\n\n".join([head + "\n" + blocks[0], *blocks[1:], _legend(listed)])


def _legend(listed: Sequence[Entry]) -> str:
    """The grammar of specs, the options, the papers, and where there is more."""
    notes = {
        "spec": f"{GRAMMAR} after --reg, without =COEF after --measure; e.g. patch.cosine:abs@0,6-11=0.1",
        "layers": f"{LAYERS}; the table shows those taken where a spec names none",
        "notation": "n items x_i of width d, u_i = x_i / |x_i|; X and U have them as rows",
    }
    for option, meaning in OPTION_MEANINGS.items():
        notes[f":{option}"] = f"{meaning} ({', '.join(e.name for e in listed if option in e.options)})"
    notes["matrices"] = f"weight terms take {', '.join(MATRICES)} among their options; {_defaults()} without"
    notes |= {f"[{key}]": paper for key, paper in sources().items()}
    notes["more"] = DOCS
    return "\n".join(
        textwrap.fill(f"{label:12}{note}", 116, subsequent_indent=" " * 12) for label, note in notes.items()
    )


def _defaults() -> str:
    return ", ".join(weight.DEFAULT_MATRICES)


# ------------------------------------------------------------------------------------------------------------
# For docs/regularizers.md

INTRODUCTION = """\
# Regularizers

<!-- Written by script/make_docs.py from the docstrings: change those, and run it again. -->

Redundancy in a vision transformer shows at three levels: patches of a block become alike, heads attend to the same
places, and neurons compute the same thing. A regularizer here is a **measure** of redundancy, a function of a set
of n vectors, applied at one **level**, which says what the vectors are. All are to be *minimised*, and all of them
can be trained on (`--reg`); those that need no labels can be watched without training on them (`--measure`).

Start with the recipe's five (`patch.mixing`, `patch.cosine`, `patch.contrastive`, `attn.cosine`, `weight.cno`),
watch `pairwise_cosine` beside them, and read below what each of the others rewards before you swap one in.
`python main.py --list-regularizers` prints the short form of this page.
"""

EXAMPLES = """\
## Writing a term

```
--reg     LEVEL.MEASURE[:OPTIONS][@LAYERS]=COEF     train on it (repeatable)
--measure LEVEL.MEASURE[:OPTIONS][@LAYERS]          report it after each epoch (repeatable)
```

```bash
--reg patch.cosine@last=0.5                  # the patches of the last block
--reg patch.cosine:abs@0,6-11=0.1            # an option; seven blocks
--reg patch.contrastive@first:last=0.5       # a measure across layers: two of them, with a colon
--reg attn.mhs@all=0.01                      # the heads of every block
--reg weight.cno:q,k@all=5e-4                # only W_q and W_k
--measure attn.pairwise_cosine@0             # no coefficient: watched, not trained on
```
"""

LAYERS_AND_VALUES = """\
Without layers, a term takes the default of its level in the table below. For patches `first` is the input of block
0. A measure across layers takes two sides with a colon: one layer against one, one against several, or equally many
on both sides, which are then paired in order. A term's value is the mean over images and the sum over its layers,
and for weights the sum over all matrices. `patch.mixing=c` enters the label loss as
(CE_cls + c Σ_p CE_p) / (1 + c P); all other terms are added with their coefficient.
"""

READING = """\
## Reading the equations

n items x_i of width d are the rows of X; u_i = x_i / max(|x_i|, 1e-8) are the rows of U, and v_j those of the
second layer; G = X X^T. A value is the mean over all leading dimensions. Half-precision input is computed in
float32.

*Cost* is that of one set of items (for patches and heads there is one an image, for weights one a matrix), and what
is kept for the backward pass. Measures that say "again in the backward pass" work on a bounded number of sets at a
time (`MAX_ELEMENTS` in [regularizers/measures.py](../regularizers/measures.py)) and compute them again when the
gradient is asked for: they keep no n x n matrix and no copy of their input, so that any of them can be used with
`@all`.
"""


def as_markdown() -> str:
    """The page docs/regularizers.md."""
    listed = entries()
    papers = [f"- [{key}] {paper}." for key, paper in sources().items()]
    links = [f"[{key}]: https://arxiv.org/abs/{_arxiv(paper)}" for key, paper in sources().items()]
    parts = [INTRODUCTION, _writing(), "## Overview\n\n" + _overview(listed) + "\n", READING, "## The measures\n"]
    parts += [_section(e) for e in listed]
    parts += ["## Sources\n\n" + "\n".join(papers) + "\n", "\n".join(links) + "\n"]
    return "\n".join(parts)


def _writing() -> str:
    matrices = ", ".join(f"`{name}` ({MATRIX_MEANINGS[name]})" for name in MATRICES)
    paragraphs = {
        "Levels": [f"`{level}`: {items}" for level, items in ITEMS.items()],
        "Layers": [LAYERS],
        "Options": [f"`{option}`: {meaning}" for option, meaning in OPTION_MEANINGS.items()],
        "Matrices": [f"of a weight term, among its options: {matrices}; without any, {_defaults()}"],
    }
    lines = [f"**{title}**: {'; '.join(items)}." for title, items in paragraphs.items()]
    return "\n".join([EXAMPLES, *(_wrapped(f"- {line}", "  ") for line in lines), "", LAYERS_AND_VALUES])


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(text, 116, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _overview(listed: Sequence[Entry]) -> str:
    rows = [
        [
            f"[`{e.name}`](#{e.name})",
            f"`{e.short_equation}`",
            ", ".join(f"{level} @{layers}" for level, layers in e.default_layers.items()),
            ", ".join(f"`{option}`" for option in e.options),
            e.flops,
            e.cited,
        ]
        for e in listed
    ]
    return _table(["measure", "R", "levels, with their default layers", "options", "cost", "source"], rows)


def _section(e: Entry) -> str:
    sections = e.text.sections
    rows = [[name.lower(), sections[name]] for name in SECTIONS if name != "Use"]
    rows.insert(2, ["use", sections["Use"]])
    if e.options:
        rows.append(["options", "; ".join(map(_option, e.options))])
    rows.append(["defaults", "; ".join(_default(e, level) for level in e.levels)])
    equation = f"```\n{e.text.equation}\n```"
    remarks = map(_wrapped, e.text.remarks)
    return "\n\n".join([f"### {e.name}", e.text.summary, equation, *remarks, _table(["", ""], rows)]) + "\n"


def _option(option: str) -> str:
    """'`abs` (absolute = True): what it means'"""
    argument, value = OPTIONS[option]
    return f"`{option}` ({argument} = {value!r}): {OPTION_MEANINGS[option]}"


def _default(e: Entry, level: str) -> str:
    """'`weight.cno@all` (eps = 0.0, ...)'"""
    arguments = ", ".join(f"{name} = {value!r}" for name, value in e.default_arguments[level].items())
    return f"`{level}.{e.name}@{e.default_layers[level]}`" + (f" ({arguments})" if arguments else "")


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = [header, ["---"] * len(header), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _arxiv(paper: str) -> str:
    match = re.search(r"arXiv (\d+\.\d+)", paper)
    if match is None:
        raise ValueError(f"no arXiv number in the source {paper!r}")
    return match[1]
