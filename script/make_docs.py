"""Write docs/regularizers.md and docs/metrics.md from the docstrings of the measures and of the metrics.

python script/make_docs.py          write them
python script/make_docs.py --check  only compare; exit code 1 where they are not what the docstrings say
"""

from __future__ import annotations

import argparse
import math
import re
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from redundancy.metrics import Metric, choose
from redundancy.metrics.registry import SECTIONS as OF_METRICS
from redundancy.metrics.registry import SUMMARIES
from regularizers import catalogue
from regularizers.catalogue import SECTIONS, Catalogue, Entry
from regularizers.level import Level
from regularizers.levels import LEVELS
from regularizers.registry import Option

ROOT = Path(__file__).resolve().parents[1]
METRICS = "docs/metrics.md"

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
--reg patch.contrastive:tau=0.1=0.5          # an option with a number; the coefficient stands last
--reg attn.mhs@all=0.01                      # the heads of every block
--reg weight.cno:q,k@all=5e-4                # only W_q and W_k
--measure attn.pairwise_cosine@0             # no coefficient: watched, not trained on
```
"""

LAYERS_AND_VALUES = """\
Without layers, a term takes the default of its level in the table below. For patches `first` is the input of block
0, `embed` the patch embeddings before positions are added, and `norm` the final features. A measure across layers
takes two sides with a colon: one layer against one, one against several, or equally many on both sides, which are
then paired in order. A term's value is the mean over images and the sum over its layers, and for weights the sum
over all matrices. `patch.mixing=c` enters the label loss as (CE_cls + c Σ_p CE_p) / (1 + c P); all other terms are
added with their coefficient.
"""

READING = """\
## Reading the equations

n items x_i of width d are the rows of X; u_i = x_i / max(|x_i|, 1e-8) are the rows of U, and v_j those of the
second layer; G = X X^T. A value is the mean over all leading dimensions. Half-precision input is computed in
float32.

*Cost* is that of one set of items (for patches and heads there is one an image, for weights one a matrix), and what
is kept for the backward pass. Measures that say "again in the backward pass" work on a bounded number of sets at a
time (`MAX_ELEMENTS` in [regularizers/primitives.py](../regularizers/primitives.py)) and compute them again when the
gradient is asked for: they keep no n x n matrix and no copy of their input, so that any of them can be used with
`@all`.
"""


MEASURED = """\
# Metrics of redundancy

<!-- Written by script/make_docs.py from the docstrings: change those, and run it again. -->

What `python -m redundancy` measures ([how to use it](redundancy.md)). `--metrics NAME ...` chooses some of them, or
whole levels (`patch`, `attn`, `weight`, `output`). A number of patches or of attention is that of one image. The
report gives the mean over images and its standard error, for each layer. *One number* says which one stands for all
of them in the summary table.
"""


def metrics_as_markdown() -> str:
    """The page docs/metrics.md."""
    every = choose(())
    rows = [[f"[`{each.name}`](#{_anchor(each.name)})", each.text.title, each.redundant or "-"] for each in every]
    overview = "## Overview\n\n" + _table(["metric", "what it is", "redundant is"], rows) + "\n"
    return "\n".join([MEASURED, overview, "## The metrics\n", *map(_metric_section, every)])


def _anchor(heading: str) -> str:
    """GitHub's name of a heading."""
    return heading.replace(".", "")


def _metric_section(metric: Metric) -> str:
    rows = [[name.lower(), metric.text.sections[name]] for name in OF_METRICS]
    rows.append(["one number", SUMMARIES[metric.summary]])
    remarks = [_wrapped(metric.text.remarks)] if metric.text.remarks else []
    equation = f"```\n{metric.text.equation}\n```"
    return "\n\n".join([f"### {metric.name}", metric.text.title, equation, *remarks, _table(["", ""], rows)]) + "\n"


def as_markdown(listed: Catalogue | None = None) -> str:
    """The page docs/regularizers.md."""
    listed = listed or catalogue.read()
    papers = [f"- [{key}] {paper}." for key, paper in listed.sources.items()]
    links = [f"[{key}]: {link}" for key, paper in listed.sources.items() if (link := _link(paper))]
    overview = "## Overview\n\n" + _overview(listed.entries) + "\n"
    parts = [INTRODUCTION, _writing(listed), overview, READING, "## The measures\n"]
    parts += [_section(e) for e in listed.entries]
    parts += ["## Sources\n\n" + "\n".join(papers) + "\n", "\n".join(links) + "\n"]
    return "\n".join(parts)


def _writing(listed: Catalogue) -> str:
    options = [f"`{option.written(name)}`: {option.meaning}" for name, option in listed.options.items()]
    paragraphs = {
        "Levels": [f"`{level.name}`: {level.meaning}" for level in LEVELS.values()],
        "Layers": [catalogue.LAYERS],
        "Options": options,
        "Matrices": [_matrices(level) for level in LEVELS.values() if level.matrices],
    }
    lines = [f"**{title}**: {'; '.join(items)}." for title, items in paragraphs.items()]
    return "\n".join([EXAMPLES, *(_wrapped(f"- {line}", "  ") for line in lines), "", LAYERS_AND_VALUES])


def _matrices(level: Level) -> str:
    """'of a weight term, among its options: `q` (queries), ...'"""
    known = ", ".join(f"`{name}` ({meaning})" for name, meaning in level.matrices.items())
    return f"of a {level.name} term, among its options: {known}; without any, {', '.join(level.default_matrices)}"


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(text, 116, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _overview(listed: Sequence[Entry]) -> str:
    rows = [
        [
            f"[`{e.name}`](#{e.name})",
            f"`{e.short_equation}`",
            ", ".join(f"{level} @{layers}" for level, layers in e.default_layers.items()),
            ", ".join(f"`{option.written(name)}`" for name, option in e.options.items()),
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
        rows.append(["options", "; ".join(_option(*option) for option in e.options.items())])
    rows.append(["defaults", "; ".join(_default(e, level) for level in e.levels)])
    equation = f"```\n{e.text.equation}\n```"
    remarks = map(_wrapped, e.text.remarks)
    return "\n\n".join([f"### {e.name}", e.text.summary, equation, *remarks, _table(["", ""], rows)]) + "\n"


def _option(name: str, option: Option) -> str:
    """'`abs` (absolute = True): what it means'"""
    above = f" > {option.above:g}" if math.isfinite(option.above) else ""
    value = f"X{above}" if option.value is None else option.value
    return f"`{option.written(name)}` ({option.argument} = {value}): {option.meaning}"


def _default(e: Entry, level: str) -> str:
    """'`weight.cno@all` (eps = 0.0, ...)'"""
    arguments = ", ".join(f"{name} = {value!r}" for name, value in e.default_arguments[level].items())
    return f"`{level}.{e.name}@{e.default_layers[level]}`" + (f" ({arguments})" if arguments else "")


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = [header, ["---"] * len(header), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _link(paper: str) -> str | None:
    """The paper on arXiv, if it says its number there."""
    match = re.search(r"arXiv (\d+\.\d+)", paper)
    return f"https://arxiv.org/abs/{match[1]}" if match else None


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare and write nothing")
    parser.add_argument("--root", type=Path, default=ROOT, help="of the project")
    args = parser.parse_args(argv)
    pages = {args.root / catalogue.DOCS: as_markdown(), args.root / METRICS: metrics_as_markdown()}
    stale = [page for page, text in pages.items() if not page.is_file() or page.read_text(encoding="utf-8") != text]
    if args.check:
        for page in stale:
            print(f"{page} is not what the docstrings say: run python script/make_docs.py", file=sys.stderr)
        return 1 if stale else 0
    for page in stale:
        page.parent.mkdir(exist_ok=True)
        page.write_text(pages[page], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
