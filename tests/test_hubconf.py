"""hubconf.py, used as torch.hub does: from another folder and in another process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import hubconf
from errors import UserError
from models.backbones import REFERENCE_NAMES

ROOT = Path(hubconf.__file__).parent

LOAD = """
import json, sys
import torch
folder = sys.argv[1]
name = "deit_small_layer24_patch16_224_diverse"
model = torch.hub.load(folder, name, source="local", num_classes=7, embed_dim=48)
tiny = torch.hub.load(folder, "deit_tiny_patch16_224", source="local", img_size=32, patch_size=8)
print(json.dumps({
    "depth": len(model.blocks),
    "classes": list(model(torch.zeros(1, 3, 224, 224)).shape),
    "patches": tiny.patch_embed.num_patches,
}))
"""

# Prints the top-level packages besides the standard library that hubconf.py and what it loads import.
IMPORTS = """
import ast, sys
from pathlib import Path
import hubconf
root = Path(hubconf.__file__).parent
own = {path.stem for path in root.iterdir()}
for module in list(sys.modules.values()):
    path = Path(getattr(module, "__file__", None) or "/")
    if path.suffix != ".py" or module.__name__.partition(".")[0] not in own or root not in path.parents:
        continue
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        print(*({name.partition(".")[0] for name in names} - own - sys.stdlib_module_names), sep="\\n")
"""


def test_hub_loads_from_another_process(tmp_path: Path) -> None:
    """The project's folder need not be the working directory; constructor arguments are passed on."""
    command = [sys.executable, "-c", LOAD, str(ROOT)]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    loaded = json.loads(run.stdout.splitlines()[-1])
    assert (loaded["depth"], loaded["classes"], loaded["patches"]) == (24, [1, 7], 16)


def test_dependencies_are_what_the_entry_points_import() -> None:
    """torch.hub checks them before it imports hubconf.py, so that a missing one is named."""
    run = subprocess.run([sys.executable, "-c", IMPORTS], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert set(run.stdout.split()) == set(hubconf.dependencies)


def test_entry_points_are_the_reference_names() -> None:
    """torch.hub lists every public callable, so there must be no other; each has its own name and docstring."""
    public = {name for name, value in vars(hubconf).items() if callable(value) and not name.startswith("_")}
    assert public == REFERENCE_NAMES
    for name in REFERENCE_NAMES:
        entry = getattr(hubconf, name)
        assert entry.__name__ == name
        assert "pretrained" in entry.__doc__


def test_unpublished_weights_are_refused() -> None:
    """A diversified model must not silently hold plain DeiT's weights."""
    with pytest.raises(UserError, match="no weights of deit_small_patch16_224_diverse"):
        hubconf.deit_small_patch16_224_diverse(pretrained=True)
