"""Draw the overview figure of the README: where the hooks tap the transformer, which measure applies there.

    python Figs/overview.py [--output Figs/overview.png]

Writes the PNG and, beside it, an SVG. Needs matplotlib, no data; with the same library versions the bytes of
both are the same.

Top: the forward pass with its five taps. Middle: the three levels and their items. Bottom: which measure
applies at which level, as the registry has it, and the five terms of the recipe.

Coordinates are pixels of the figure at its reading width, 900, with y pointing down; the PNG has twice as
many.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Patch, Polygon, Rectangle

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from regularizers import catalogue

Point = tuple[float, float]

MEASURES = catalogue.read().entries
ROW = 24.0  # height of a measure's row
WIDTH, HEIGHT = 900, 478 + len(MEASURES) * ROW  # of the canvas, in its own pixels
MARGIN = 16
PIXELS_PER_INCH = 100  # at the reading width
POINTS_PER_INCH = 72
PNG_DPI = 200

SMALL, BODY, HEADING = 9.0, 9.6, 11.5  # font sizes, in points
LINE = 17  # distance of two lines of text
CAP_MIDDLE = 0.35  # height of the middle of a capital above the baseline, in font sizes
STROKE, STROKE_TAP, STROKE_FRAME = 0.9, 1.1, 1.3  # widths of boxes and arrows, of taps, of frames, in points
BOX_RADIUS, PANEL_RADIUS = 4, 6  # of rounded corners
PADDING = 14.0  # inside a panel
BADGE_RADIUS, BADGE_GAP = 8.5, 3.0
BADGE_TEXT = 14.0  # from a badge's middle to the text beside it
MONO = "DejaVu Sans Mono"

INK, MUTED, RULE, PALE, WHITE = "#1f2933", "#5f6b7a", "#b4bcc6", "#f4f6f8", "#ffffff"

STYLE = {
    "font.family": "DejaVu Sans",
    "mathtext.fontset": "dejavusans",
    "svg.fonttype": "path",
    "svg.hashsalt": "diverse-vit-overview",
    "path.simplify": False,
}

# ------------------------------------------------------------------------------------------------------------
# What the figure says


@dataclass(frozen=True)
class Level:
    """A level of diversity: its colour, and its panel."""

    name: str
    title: str
    color: str
    taps: tuple[int, ...]
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Tap:
    """A place where tensors leave the model, and the two lines of its label."""

    number: int
    level: str
    name: str
    how: str


@dataclass(frozen=True)
class Term:
    """One term of the recipe: coefficient, spec (level.measure@where) and the taps it reads."""

    coefficient: str
    level: str
    measure: str
    where: str
    taps: tuple[int, ...]


LEVELS = {
    level.name: level
    for level in (
        Level(
            "patch",
            "Patch level",
            "#2a67b1",
            (1, 2, 5),
            (r"$P$ patch embeddings", r"$x_p \in \mathbb{R}^{D}$", "no prefix tokens"),
        ),
        Level(
            "attn",
            "Attention level",
            "#c96514",
            (3,),
            (r"$H$ heads, each a", r"flattened $N \times N$ map", r"$a_h \in \mathbb{R}^{N^2}$"),
        ),
        Level(
            "weight",
            "Weight level",
            "#1d8a6a",
            (4,),
            ("rows (neurons) of", r"$W_q,\ W_k,\ W_v$", r"$w_i \in \mathbb{R}^{D}$"),
        ),
    )
}

TAPS = {
    tap.number: tap
    for tap in (
        Tap(1, "patch", r"$h_\mathrm{first}$  [B, N, D]", "pre-hook on block 0"),
        Tap(2, "patch", r"$h_\mathrm{last}$  [B, N, D]", r"hook on block $L{-}1$"),
        Tap(3, "attn", "attention  [B, H, N, N]", "pre-hook on attn_drop"),
        Tap(4, "weight", r"$W_q,\ W_k,\ W_v$ of every block", "read as parameters, no hook"),
        Tap(5, "patch", "patch logits  [B, P, K]", r"head(norm($h_\mathrm{last}$))"),
    )
}

NOTES = {  # what a measure is, where that is not left blank
    "cosine": "similarity, signed or absolute",
    "pairwise_cosine": "different items, to report",
    "cosine_cross": "similarity across layers",
    "contrastive": "own first-layer item vs. rest",
    "context": "own embedding vs. others",
    "mhs": "hyperspherical separation",
    "mgd": "Gram determinant",
    "so": "soft orthogonality",
    "cno": "equal extreme eigenvalues",
    "gradient_diversity": "of the label loss, per patch",
    "mixing": "label loss of every patch",
    "region_mixing": "label loss of mixed regions",
}

MIXING = Term("", "patch", "mixing", "", (5,))
REGULARISERS = (
    Term(r"$0.5$", "patch", "cosine", "last", (2,)),
    Term(r"$0.5$", "patch", "contrastive", "first:last", (1, 2)),
    Term(r"$10^{-4}$", "attn", "cosine", "0", (3,)),
    Term(r"$5 \cdot 10^{-4}$", "weight", "cno", "all", (4,)),
)
RECIPE = {(term.level, term.measure) for term in (MIXING, *REGULARISERS)}

LABEL_LOSS = r"$\mathcal{L} \;=\; \dfrac{\mathrm{CE}_\mathrm{cls} + c\,\sum_{p}\,\mathrm{CE}_p}{1 + c\,P}$"


# ------------------------------------------------------------------------------------------------------------
# Drawing


def tint(color: str, strength: float) -> tuple[float, float, float]:
    """`color` mixed with white: 0 is white, 1 the colour itself."""
    red, green, blue = (1 - strength * (1 - channel) for channel in to_rgb(color))
    return red, green, blue


@dataclass(frozen=True)
class Box:
    """A rectangle of the layout."""

    x: float
    y: float
    width: float
    height: float

    @property
    def right(self) -> float:
        return self.x + self.width

    @property
    def bottom(self) -> float:
        return self.y + self.height

    @property
    def middle(self) -> Point:
        return self.x + self.width / 2, self.y + self.height / 2


class Canvas:
    """Axes in pixels, with the few shapes that the figure is made of."""

    def __init__(self, axes: Axes) -> None:
        self.axes = axes
        axes.set(xlim=(0, WIDTH), ylim=(HEIGHT, 0))
        axes.axis("off")

    def add(self, patch: Patch) -> None:
        self.axes.add_patch(patch)

    def text(self, x: float, y: float, text: str, *, size: float = SMALL, ha: str = "left", **kwargs) -> None:
        """Text whose capitals are centred on `y`; several lines are centred as a whole."""
        if "\n" in text:
            place = {"va": "center", "linespacing": 1.35}
        else:
            place = {"va": "baseline"}
            y += CAP_MIDDLE * size * PIXELS_PER_INCH / POINTS_PER_INCH
        self.axes.text(x, y, text, fontsize=size, ha=ha, **{"color": INK, "zorder": 5} | place | kwargs)

    def box(self, box: Box, label: str = "", *, fill=WHITE, edge=INK, radius=BOX_RADIUS, **kwargs) -> None:
        """A rounded box, with its label in the middle."""
        style = f"round,pad=0,rounding_size={radius}"
        corner = (box.x, box.y)
        self.add(FancyBboxPatch(corner, box.width, box.height, boxstyle=style, fc=fill, ec=edge, lw=STROKE))
        if label:
            self.text(*box.middle, label, ha="center", **kwargs)

    def cells(self, corner: Point, size: float, values: Sequence[Sequence[float]], color: str) -> None:
        """A grid of squares in tints of `color`, one for each value."""
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                x, y = corner[0] + j * size, corner[1] + i * size
                self.add(Rectangle((x, y), size, size, fc=tint(color, value), ec=WHITE, lw=0.6))

    def frame(self, box: Box, color: str) -> None:
        self.add(Rectangle((box.x, box.y), box.width, box.height, fc="none", ec=color, lw=STROKE_FRAME))

    def line(self, points: Sequence[Point], color=INK, width: float = STROKE, **kwargs) -> None:
        kwargs = {"solid_capstyle": "butt", "solid_joinstyle": "miter", "zorder": 2} | kwargs
        self.axes.plot(*zip(*points, strict=True), color=color, lw=width, **kwargs)

    def arrow(self, *points: Point) -> None:
        """A thin arrow along `points`."""
        self.line(points[:-1])
        head = {"arrowstyle": "-|>,head_length=3.2,head_width=1.5", "shrinkA": 0, "shrinkB": 0}
        self.add(FancyArrowPatch(*points[-2:], color=INK, lw=STROKE, zorder=2, **head))

    def badge(self, x: float, y: float, tap: Tap) -> None:
        """The tap's number in a disc of its level's colour."""
        self.add(Circle((x, y), BADGE_RADIUS, fc=LEVELS[tap.level].color, ec=WHITE, lw=0.8, zorder=6))
        self.text(x, y, str(tap.number), ha="center", color=WHITE, weight="bold", zorder=7)

    def badges(self, right: float, y: float, numbers: Sequence[int]) -> None:
        """A row of badges that ends at `right`."""
        step = 2 * BADGE_RADIUS + BADGE_GAP
        for k, number in enumerate(reversed(numbers)):
            self.badge(right - BADGE_RADIUS - k * step, y, TAPS[number])


# ------------------------------------------------------------------------------------------------------------
# Top: the forward pass

AXIS = 140.0  # the y of the stream of tokens
BLOCK_TOP, BLOCK_HEIGHT = 76.0, 134.0
TOKEN = 14.0  # side of a token's square
WEIGHTS_WIDTH = 32.0  # of the boxes of W_q, W_k, W_v
PATCH_STRENGTHS = (0.75, 0.45, 0.6, 0.3, 0.5)  # of the drawn patches' colour


def centred(x: float, width: float, height: float, *, below: float = 0.0) -> Box:
    """The box that starts at `x` and is centred on the stream, or `below` it."""
    return Box(x, AXIS + below - height / 2, width, height)


def token_column(x: float) -> Box:
    """One prefix token above the patches."""
    return centred(x, TOKEN, (1 + len(PATCH_STRENGTHS)) * TOKEN)


IMAGE = centred(MARGIN, 72, 72)
EMBED = centred(104, 80, 58)
FIRST = token_column(200)
BLOCK_0 = Box(230, BLOCK_TOP, 284, BLOCK_HEIGHT)
BLOCK_LAST = Box(556, BLOCK_TOP, 88, BLOCK_HEIGHT)
LAST = token_column(662)
NORM = centred(694, 44, 48)
HEAD = centred(756, 44, 48)
PATCH_LOGITS = Box(824, 92, 3 * TOKEN, 3 * TOKEN)
CLASS_LOGITS = Box(824, 166, 3 * TOKEN, TOKEN)
ATTENTION_X = 383.0  # the wire between softmax and dropout


def draw_image(canvas: Canvas, box: Box, patches: int = 4) -> None:
    """A landscape in greys, cut into patches."""

    def at(u: float, v: float) -> Point:
        return box.x + u * box.width, box.y + v * box.height

    canvas.add(Rectangle((box.x, box.y), box.width, box.height, fc="#dfe4ea", ec="none"))
    canvas.add(Circle(at(0.7, 0.28), 0.12 * box.width, fc="#f7f8fa", ec="none"))
    hills = (
        ("#a9b4c0", [(0, 0.7), (0.3, 0.34), (0.55, 0.66), (0.74, 0.5), (1, 0.76), (1, 1), (0, 1)]),
        ("#7c8997", [(0, 0.88), (0.4, 0.7), (1, 0.92), (1, 1), (0, 1)]),
    )
    for color, outline in hills:
        canvas.add(Polygon([at(u, v) for u, v in outline], fc=color, ec="none"))
    for k in range(patches + 1):
        canvas.line([at(k / patches, 0), at(k / patches, 1)], WHITE, STROKE_FRAME)
        canvas.line([at(0, k / patches), at(1, k / patches)], WHITE, STROKE_FRAME)


def draw_tokens(canvas: Canvas, box: Box) -> None:
    """A column of tokens: the prefix in grey, the patches in their level's colour."""
    patches = [[strength] for strength in PATCH_STRENGTHS]
    canvas.cells((box.x, box.y), TOKEN, [[1.0]], MUTED)
    canvas.cells((box.x, box.y + TOKEN), TOKEN, patches, LEVELS["patch"].color)


def draw_weights(canvas: Canvas, x: float) -> list[Box]:
    """W_q, W_k, W_v, one below the other."""
    color = LEVELS["weight"].color
    boxes = [centred(x, WEIGHTS_WIDTH, 22, below=below) for below in (-14, 14, 42)]
    for box, name in zip(boxes, "qkv", strict=True):
        canvas.box(box, f"$W_{name}$", fill=tint(color, 0.16), edge=color, color=color, size=BODY)
    return boxes


def draw_first_block(canvas: Canvas) -> None:
    """Block 0, opened up to show where the attention map is read."""
    box = BLOCK_0
    canvas.box(box, fill=PALE, edge=RULE, radius=PANEL_RADIUS)
    canvas.text(box.x + 10, box.y + 14, "block 0", size=BODY, weight="bold")
    canvas.text(box.right - 10, box.bottom - 9, "norms, residuals not drawn", color=MUTED, ha="right")
    query, key, value = draw_weights(canvas, box.x + 26)
    softmax = centred(308, 62, 26)
    drop = centred(396, 38, 26)
    product = (452.0, AXIS)
    mlp = centred(470, 34, 26)

    split = box.x + 13
    for weights in (query, key, value):
        canvas.arrow((box.x, AXIS), (split, AXIS), (split, weights.middle[1]), (weights.x, weights.middle[1]))
    for weights, dy in ((query, -6), (key, 6)):
        turn = weights.right + 12
        y = weights.middle[1]
        canvas.arrow((weights.right, y), (turn, y), (turn, AXIS + dy), (softmax.x, AXIS + dy))
    canvas.arrow((softmax.right, AXIS), (drop.x, AXIS))
    canvas.arrow((drop.right, AXIS), (product[0] - 7, AXIS))
    canvas.arrow((value.right, value.middle[1]), (product[0], value.middle[1]), (product[0], AXIS + 7))
    canvas.arrow((product[0] + 7, AXIS), (mlp.x, AXIS))
    canvas.line([(mlp.right, AXIS), (box.right + 8, AXIS)])
    canvas.box(softmax, "softmax")
    canvas.box(drop, "drop")
    canvas.box(mlp, "MLP")
    canvas.add(Circle(product, 7, fc=WHITE, ec=INK, lw=STROKE, zorder=3))
    canvas.text(*product, r"$\times$", ha="center")


def draw_last_block(canvas: Canvas) -> None:
    box = BLOCK_LAST
    canvas.box(box, fill=PALE, edge=RULE, radius=PANEL_RADIUS)
    canvas.text(box.middle[0], box.y + 14, "block L\N{MINUS SIGN}1", size=BODY, ha="center", weight="bold")
    draw_weights(canvas, box.middle[0] - WEIGHTS_WIDTH / 2)


def draw_outputs(canvas: Canvas) -> None:
    """The head's two outputs: logits of the class token, and of every patch."""
    color = LEVELS["patch"].color
    split = (HEAD.right + CLASS_LOGITS.x) / 2
    for box in (PATCH_LOGITS, CLASS_LOGITS):
        y = box.middle[1]
        canvas.arrow((HEAD.right, AXIS), (split, AXIS), (split, y), (box.x - 2, y))
    strengths = ((0.7, 0.2, 0.35), (0.25, 0.6, 0.3), (0.3, 0.25, 0.75))
    canvas.cells((PATCH_LOGITS.x, PATCH_LOGITS.y), TOKEN, strengths, color)
    canvas.cells((CLASS_LOGITS.x, CLASS_LOGITS.y), TOKEN, [(0.9, 0.3, 0.5)], MUTED)
    canvas.text(CLASS_LOGITS.middle[0], CLASS_LOGITS.bottom + 12, "class logits", color=MUTED, ha="center")


def draw_pipeline(canvas: Canvas) -> None:
    draw_image(canvas, IMAGE)
    canvas.text(IMAGE.middle[0], IMAGE.bottom + 12, "image", color=MUTED, ha="center")
    canvas.box(EMBED, "patch\nembedding\n+ position")
    draw_tokens(canvas, FIRST)
    draw_first_block(canvas)
    draw_last_block(canvas)
    draw_tokens(canvas, LAST)
    canvas.box(NORM, "norm")
    canvas.box(HEAD, "head")
    draw_outputs(canvas)

    for stages in ((IMAGE, EMBED, FIRST, BLOCK_0), (BLOCK_LAST, LAST, NORM, HEAD)):
        for left, right in pairwise(stages):
            canvas.arrow((left.right + 2, AXIS), (right.x - 1, AXIS))
    gap = (BLOCK_0.right + BLOCK_LAST.x) / 2
    canvas.arrow((BLOCK_LAST.x - 14, AXIS), (BLOCK_LAST.x - 1, AXIS))
    canvas.text(gap - 2, AXIS, r"$\cdots$", size=HEADING, ha="center")


def draw_hook(canvas: Canvas, tap: Tap, at: Point, label_x: float) -> None:
    """A line from the tapped tensor up to the tap's label, whose badge sits at `label_x`."""
    top = MARGIN + 8
    color = LEVELS[tap.level].color
    canvas.line([at, (at[0], top + 2 * LINE - 6)], color, STROKE_TAP)
    canvas.add(Circle(at, 2.4, fc=color, ec="none", zorder=3))
    canvas.badge(label_x, top, tap)
    canvas.text(label_x + BADGE_TEXT, top, tap.name, size=BODY, color=color)
    canvas.text(label_x + BADGE_TEXT, top + LINE, tap.how, color=MUTED)


def draw_taps(canvas: Canvas) -> None:
    draw_hook(canvas, TAPS[1], (FIRST.middle[0], FIRST.y), 132)
    draw_hook(canvas, TAPS[3], (ATTENTION_X, AXIS), 330)
    draw_hook(canvas, TAPS[2], (LAST.middle[0], LAST.y), 574)
    draw_hook(canvas, TAPS[5], (PATCH_LOGITS.middle[0], PATCH_LOGITS.y), 722)

    tap, color = TAPS[4], LEVELS["weight"].color
    bracket = BLOCK_0.bottom + 12
    left, right = BLOCK_0.x, BLOCK_LAST.right
    canvas.line([(left, bracket - 6), (left, bracket), (right, bracket), (right, bracket - 6)], color, STROKE_TAP)
    y = bracket + LINE
    canvas.badge(left + BADGE_RADIUS, y, tap)
    canvas.text(left + BADGE_RADIUS + BADGE_TEXT, y, tap.name, size=BODY, color=color)
    canvas.text(left + 208, y, tap.how, color=MUTED)


def draw_symbols(canvas: Canvas) -> None:
    """What the letters stand for, in the corners below the pipeline."""
    rows = (BLOCK_0.bottom + 10, BLOCK_0.bottom + 10 + LINE)
    canvas.text(MARGIN, rows[0], "$N = T + P$ tokens", color=MUTED)
    key = ((MARGIN, "$T$ prefix", MUTED, 1.0), (MARGIN + 86, "$P$ patches", LEVELS["patch"].color, 0.6))
    for x, label, color, strength in key:
        canvas.cells((x, rows[1] - 5), 10, [[strength]], color)
        canvas.text(x + 15, rows[1], label, color=MUTED)
    for y, label in zip(rows, ("$B$ images, $D$ channels", "$H$ heads, $K$ classes"), strict=True):
        canvas.text(WIDTH - MARGIN, y, label, color=MUTED, ha="right")


# ------------------------------------------------------------------------------------------------------------
# Middle: the three levels

PANELS_TOP, PANEL_HEIGHT, PANEL_GAP = 262.0, 124.0, 14.0
PANEL_WIDTH = (WIDTH - 2 * MARGIN - 2 * PANEL_GAP) / 3
ITEMS_HEIGHT = 66.0  # of a panel's picture


def pattern(rows: int, columns: int, seed: int = 0) -> list[list[float]]:
    """Random strengths of a colour, the same in every run."""
    generator = random.Random(seed)
    return [[0.08 + 0.6 * generator.random() for _ in range(columns)] for _ in range(rows)]


def draw_patch_items(canvas: Canvas, x: float, y: float, color: str) -> None:
    """P rows of length D, one of them framed."""
    rows, columns = 5, 7
    size = ITEMS_HEIGHT / rows
    canvas.cells((x, y), size, pattern(rows, columns), color)
    canvas.frame(Box(x, y + size, columns * size, size), color)


def draw_attention_items(canvas: Canvas, x: float, y: float, color: str) -> None:
    """H maps, one behind the other."""
    heads, tokens, shift = 3, 5, (20.0, 8.0)
    size = (ITEMS_HEIGHT - (heads - 1) * shift[1]) / tokens
    for head in range(heads):
        corner = (x + head * shift[0], y + head * shift[1])
        canvas.cells(corner, size, pattern(tokens, tokens, head), color)
        canvas.frame(Box(*corner, tokens * size, tokens * size), color)


def draw_weight_items(canvas: Canvas, x: float, y: float, color: str) -> None:
    """Three matrices, a row of each framed."""
    rows, columns, gap = 5, 2, 6.0
    size = ITEMS_HEIGHT / rows
    for k in range(3):
        left = x + k * (columns * size + gap)
        canvas.cells((left, y), size, pattern(rows, columns, 3 * k + 1), color)
        canvas.frame(Box(left, y + size, columns * size, size), color)


ITEMS = {"patch": draw_patch_items, "attn": draw_attention_items, "weight": draw_weight_items}


def draw_levels(canvas: Canvas) -> None:
    for k, level in enumerate(LEVELS.values()):
        panel = Box(MARGIN + k * (PANEL_WIDTH + PANEL_GAP), PANELS_TOP, PANEL_WIDTH, PANEL_HEIGHT)
        canvas.box(panel, fill=tint(level.color, 0.05), edge=tint(level.color, 0.6), radius=PANEL_RADIUS)
        y = panel.y + 20
        canvas.text(panel.x + PADDING, y, level.title, size=HEADING, color=level.color, weight="bold")
        canvas.badges(panel.right - PADDING, y, level.taps)
        top = panel.y + 42
        ITEMS[level.name](canvas, panel.x + PADDING, top, level.color)
        for i, line in enumerate(level.lines):
            canvas.text(panel.x + 124, top + ITEMS_HEIGHT / 2 + (i - 1) * 1.25 * LINE, line, size=BODY)


# ------------------------------------------------------------------------------------------------------------
# Bottom: which measure applies where, and the recipe

BOTTOM = 414.0
MATRIX_TOP = BOTTOM + 52
MATRIX = Box(MARGIN, MATRIX_TOP - ROW / 2, 502, len(MEASURES) * ROW)
COLUMNS = {"patch": 378.0, "attn": 434.0, "weight": 490.0}  # the x of each level's dots
NOTE_X = MARGIN + 152
RECIPE_LEFT, RECIPE_TOP = MATRIX.right + PADDING - 2, BOTTOM - 14
RECIPE_BOX = Box(RECIPE_LEFT, RECIPE_TOP, WIDTH - MARGIN - RECIPE_LEFT, MATRIX.bottom - RECIPE_TOP)


def draw_dot(canvas: Canvas, x: float, y: float, color: str, *, recipe: bool) -> None:
    """A measure that applies: a small pale dot, or in the recipe a full one with a ring."""
    if recipe:
        canvas.add(Circle((x, y), 8, fc="none", ec=color, lw=STROKE_TAP, zorder=4))
    canvas.add(Circle((x, y), 5, fc=color if recipe else tint(color, 0.4), ec="none", zorder=4))


def draw_matrix(canvas: Canvas) -> None:
    canvas.text(MARGIN, BOTTOM, "Measures", size=HEADING, weight="bold")
    for name, x in COLUMNS.items():
        label = LEVELS[name].title.split()[0].lower()
        canvas.text(x, MATRIX_TOP - ROW, label, color=LEVELS[name].color, ha="center")
    draw_legend(canvas)
    for i, measure in enumerate(MEASURES):
        y = MATRIX_TOP + i * ROW
        if i % 2 == 0:
            canvas.add(Rectangle((MATRIX.x, y - ROW / 2), MATRIX.width, ROW, fc=PALE, ec="none", zorder=0))
        canvas.text(MARGIN + 6, y, measure.name, family=MONO)
        canvas.text(NOTE_X, y, NOTES.get(measure.name, ""), color=MUTED)
        for level in (name for name in LEVELS if name in measure.levels):
            draw_dot(canvas, COLUMNS[level], y, LEVELS[level].color, recipe=(level, measure.name) in RECIPE)


def draw_legend(canvas: Canvas) -> None:
    y = MATRIX_TOP - ROW
    for x, label, recipe in ((MARGIN + 14, "in the recipe", True), (NOTE_X + 8, "applicable", False)):
        draw_dot(canvas, x, y, MUTED, recipe=recipe)
        canvas.text(x + BADGE_TEXT, y, label, color=MUTED)


def draw_term(canvas: Canvas, y: float, term: Term, spec_x: float) -> None:
    """Coefficient, spec and taps of one term."""
    spec = f"{term.level}.{term.measure}" + (f"@{term.where}" if term.where else "")
    canvas.text(spec_x - 8, y, term.coefficient, size=BODY, ha="right")
    canvas.text(spec_x, y, spec, family=MONO, color=LEVELS[term.level].color)
    canvas.badges(RECIPE_BOX.right - PADDING + BADGE_GAP, y, term.taps)


def draw_recipe(canvas: Canvas) -> None:
    left = RECIPE_BOX.x + PADDING
    canvas.box(RECIPE_BOX, edge=RULE, radius=PANEL_RADIUS)
    canvas.text(left, BOTTOM + 8, "Recipe: five terms", size=HEADING, weight="bold")
    y = BOTTOM + 68
    canvas.text(left, y, LABEL_LOSS, size=HEADING)
    draw_term(canvas, y, MIXING, left + 180)
    canvas.text(left + 180, y + LINE, "$c = 1$", color=MUTED)
    for k, term in enumerate(REGULARISERS):
        row = y + 62 + k * 32
        canvas.text(left, row, "$+$", size=BODY)
        draw_term(canvas, row, term, left + 72)


# ------------------------------------------------------------------------------------------------------------


def draw(canvas: Canvas) -> None:
    draw_pipeline(canvas)
    draw_taps(canvas)
    draw_symbols(canvas)
    draw_levels(canvas)
    draw_matrix(canvas)
    draw_recipe(canvas)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the overview figure, as PNG and SVG.")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("overview.png"), help="the PNG")
    output = parser.parse_args().output
    with mpl.rc_context(STYLE):
        figure = plt.figure(figsize=(WIDTH / PIXELS_PER_INCH, HEIGHT / PIXELS_PER_INCH), facecolor=WHITE)
        draw(Canvas(figure.add_axes((0, 0, 1, 1))))
        figure.savefig(
            output.with_suffix(".png"),
            dpi=PNG_DPI,
            metadata={"Software": None},
            pil_kwargs={"optimize": True},
        )
        figure.savefig(output.with_suffix(".svg"), metadata={"Date": None, "Creator": None})
        plt.close(figure)


if __name__ == "__main__":
    main()
