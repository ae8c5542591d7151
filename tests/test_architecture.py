"""Arrows run one way: which module may import which, read from the code of all of them."""

from __future__ import annotations

import ast
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = (
    "options",
    "images",
    "loggers",
    "mixing",
    "models",
    "models/remedies",
    "redundancy",
    "redundancy/metrics",
    "redundancy/presentation",
    "regularizers",
    "segmentation",
    "state",
    "tables",
)
# From the ground up. A module may import what stands on lower floors, and its neighbours on its own.
FLOORS = (
    ("errors",),
    ("program", "utils", "layers", "options.parser", "options.paths", "options.yaml_file", "options"),
    ("regularizers", "loggers", "mixing"),
    ("options.flags",),
    ("images", "models", "samplers", "workers", "exchange"),
    ("options.config", "losses", "datasets", "schedules"),
    ("loaders", "engine", "elsewhere"),
    ("state",),
    ("ending", "build", "runs", "warmup", "export", "check_data", "redundancy"),
    ("trainer",),
    ("main", "segmentation", "tables"),
    ("hubconf",),
)
# What each may know of the project, where that is less than what stands below it.
KNOWS = {
    "errors": (),
    "options.parser": ("errors",),
    "options.yaml_file": ("errors", "options.parser", "options.paths"),
    "options.flags": (
        "errors",
        "options.parser",
        "options.yaml_file",
        "mixing",
        "loggers.backends",
        "regularizers.catalogue",
    ),
    "program": ("errors",),
    "utils": ("errors",),
    "layers": ("errors",),
    "regularizers": ("errors", "utils", "layers", "regularizers"),  # tensors, not models
    "images": ("errors", "utils", "options.flags", "images"),  # no batches
    "loggers": ("errors", "utils", "loggers"),
    "mixing": ("errors", "mixing"),
    "models": ("errors", "utils", "layers", "models"),  # timm, not losses
    "elsewhere": ("errors", "models", "regularizers"),  # a model and its terms, no loop
}
# For a type alone, regularizers name what a model shows and how labels are mixed; without an import at run time.
NAMES_TYPES_OF = {"regularizers": ("models.captured", "models.heads", "mixing")}


def modules(root: Path) -> dict[str, Path]:
    """Every module of the project by its dotted name."""
    found = [*root.glob("*.py"), *(path for package in PACKAGES for path in (root / package).glob("*.py"))]
    return {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path for path in found
    }


@cache
def imported(code: str) -> tuple[frozenset[tuple[str, str]], frozenset[tuple[str, str]]]:
    """(module, name from it) of all imports in a module, anywhere in it: at run time, and for types alone."""
    tree = ast.parse(code)
    guarded = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for statement in node.body
        for inner in ast.walk(statement)
    }
    found: tuple[set[tuple[str, str]], set[tuple[str, str]]] = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found[id(node) in guarded].update((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found[id(node) in guarded].update((node.module, alias.name) for alias in node.names)
    return frozenset(found[0]), frozenset(found[1])


def imports(path: Path, known: dict[str, Path], types: bool) -> set[str]:
    """The project's modules that one imports: at run time, or for types alone."""
    pairs = imported(path.read_text(encoding="utf-8"))[types]
    submodules = {f"{module}.{name}" for module, name in pairs} & known.keys()
    whole = {module for module, name in pairs if f"{module}.{name}" not in submodules}
    return submodules | (whole & known.keys())


def longest(name: str, entries: dict[str, object]) -> str | None:
    """The most exact entry for a module: its own, or that of its package."""
    return next((entry for entry in (name, name.partition(".")[0]) if entry in entries), None)


def is_inside(name: str, places: tuple[str, ...]) -> bool:
    return any(name == place or name.startswith(place + ".") for place in places)


def broken_arrows(root: Path) -> list[str]:
    """Everything about the imports of a tree that is not as it should be."""
    known, wrong = modules(root), []
    floors = {entry: number for number, floor in enumerate(FLOORS) for entry in floor}
    graph: dict[str, set[str]] = {}
    for name, path in known.items():
        own = longest(name, floors)
        if own is None:
            wrong.append(f"{name} stands on no floor: add it to FLOORS")
            continue
        graph[name] = imports(path, known, types=False) - {name}
        for types in (False, True):
            exceptions = NAMES_TYPES_OF.get(own, ()) if types else ()
            allowed = KNOWS.get(longest(name, dict(KNOWS)) or "")
            for target in sorted(imports(path, known, types) - {name}):
                if is_inside(target, exceptions):
                    continue
                if floors[longest(target, floors) or "main"] > floors[own]:
                    wrong.append(f"{name} imports {target}, which stands above it")
                elif allowed is not None and not is_inside(target, allowed):
                    wrong.append(f"{name} imports {target}, of which it should know nothing")
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        wrong.append(f"a circle: {' -> '.join(error.args[1])}")
    return wrong


def test_arrows_run_one_way() -> None:
    assert broken_arrows(ROOT) == []


@pytest.mark.parametrize(
    ("module", "line", "message"),
    [
        (
            "regularizers/measures.py",
            "from models.capture import Needs",
            "regularizers.measures imports models.capture",
        ),
        ("regularizers/diversity.py", "import losses", "regularizers.diversity imports losses, which stands above"),
        ("models/capture.py", "from regularizers import Term", "models.capture imports regularizers, of which"),
        ("models/sharding.py", "from engine import Loader", "models.sharding imports engine, which stands above"),
        ("images/decode.py", "from loaders import Batch", "images.decode imports loaders, which stands above"),
        ("images/decode.py", "from samplers import Draw", "images.decode imports samplers, of which"),
        ("loggers/text.py", "from state import checkpoint", "loggers.text imports state.checkpoint, which stands"),
        ("utils.py", "def late():\n    import engine", "utils imports engine, which stands above it"),
        ("errors.py", "import utils", "a circle: "),
        ("mixing/mixup.py", "from models import Layout", "mixing.mixup imports models"),
        ("extra.py", "import errors", "extra stands on no floor"),
        (
            "engine.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from state.run_state import RunState",
            "engine imports state.run_state, which stands above it",
        ),
    ],
)
def test_a_broken_arrow_is_seen(tmp_path: Path, module: str, line: str, message: str) -> None:
    for path in modules(ROOT).values():
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(exist_ok=True)
        copy.write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    with open(tmp_path / module, "a", encoding="utf-8") as file:
        file.write(f"\n{line}\n")
    assert any(message in wrong for wrong in broken_arrows(tmp_path)), broken_arrows(tmp_path)
