"""hubconf.py, used as torch.hub does: from another folder and in another process."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
from processes import PATIENCE
from small_runs import assert_same
from torch import nn

import hubconf
from models.backbones import REFERENCE_NAMES

ROOT = Path(hubconf.__file__).parent

# A program with modules of its own by the names of ours, which it imports before or after its call of torch.hub.
PROGRAM = """
import ast, importlib, json, sys
from pathlib import Path
import torch
root, when, *names = sys.argv[1:]

def check():
    for name in names:
        assert importlib.import_module(name).OWNER == "the program", name
    assert importlib.import_module("models.capture").OWNER == "the program"

if when == "before":
    check()
path, modules = list(sys.path), dict(sys.modules)
tiny = torch.hub.load(root, "deit_tiny_patch16_224", source="local", img_size=32, patch_size=8)
name = "deit_small_layer24_patch16_224_diverse"
model = torch.hub.load(root, name, source="local", num_classes=7, embed_dim=48)
diverse = torch.hub.load(root, "diversity", tiny, "patch.cosine@last=0.5", "weight.cno@all=1e-3", source="local")
assert diverse is tiny
remedied = torch.hub.load(root, "remedy", tiny, "attnscale", "contranorm:scale=0.2@last", source="local")
assert remedied is tiny and "blocks.0.attn.remedies.attnscale.lamb" in tiny.state_dict()
output, diversity, terms = tiny(torch.ones(2, 3, 32, 32))
try:
    torch.hub.load(root, "diversity", model, "patch.cosin@last=0.5", source="local")
except Exception as error:
    mistake = f"{type(error).__name__}: {error}"
assert sys.path[:len(path)] == path and root not in sys.path  # torch 2.6 appends a folder of its own
assert all(sys.modules[name] is module for name, module in modules.items())
ours = {name for name in sys.modules if name.partition(".")[0] in names}
assert ours == (ours & set(modules)), ours
check()

imported = set()  # by hubconf.py and what it loads, besides the standard library and each other
ours = [module.__file__ for name, module in sys.modules.items() if "_diverse_vit_" in name]
for path in [f"{root}/hubconf.py", *ours]:
    for node in ast.walk(ast.parse(Path(path).read_text())):
        found = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        found += [node.module] if isinstance(node, ast.ImportFrom) else []
        imported |= {name.partition(".")[0] for name in found}
print(json.dumps({
    "depth": len(model.blocks),
    "classes": list(model(torch.zeros(1, 3, 224, 224)).shape),
    "patches": tiny.patch_embed.num_patches,
    "terms": list(terms),
    "trains": [output.requires_grad, diversity.requires_grad],
    "mistake": mistake,
    "imported": sorted(imported - sys.stdlib_module_names - set(names)),
}))
"""


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_program_keeps_modules_of_its_own_with_our_names(tmp_path: Path, when: str) -> None:
    """They lie first on its path; ours are not seen by it, and its are not seen by us.

    Constructor arguments are passed on. torch.hub checks the dependencies before it imports hubconf.py, so that a
    missing one is named.
    """
    files = {path.stem for path in ROOT.glob("*.py")} - {"hubconf"}
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert {"utils", "errors", "datasets", "main"} <= files and {"models", "options", "state"} <= folders
    for name in files | {f"{folder}/{file}" for folder in folders for file in ("__init__", "capture")}:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.py").write_text("OWNER = 'the program'\n")
    (tmp_path / "config.py").write_text("OWNER = 'the program'\n")
    command = [sys.executable, "-c", PROGRAM, str(ROOT), when, "config", *files, *folders]
    # -c puts the working directory first; the other way is a path of the environment
    place = tmp_path if when == "before" else tmp_path / "models"
    env = {**os.environ, "PYTHONPATH": "" if when == "before" else str(tmp_path)}
    run = subprocess.run(command, cwd=place, env=env, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert run.returncode == 0, run.stderr
    loaded = json.loads(run.stdout.splitlines()[-1])
    assert (loaded["depth"], loaded["classes"], loaded["patches"]) == (24, [1, 7], 16)
    assert loaded["imported"] == sorted(hubconf.dependencies)
    assert loaded["terms"] == ["patch.cosine@last", "weight.cno@all"] and loaded["trains"] == [True, True]
    assert loaded["mistake"].startswith("UserError: unknown regularizer 'patch.cosin'. Did you mean patch.cosine")


def test_every_module_works_under_its_private_name() -> None:
    """Also what an entry point does not load yet; and objects of ours can be copied to other processes."""
    for name in ("Diversity", "parse_spec"):  # found when they are asked for
        assert getattr(hubconf._load("regularizers"), name).__module__.startswith(hubconf._PREFIX)
    capture = hubconf._load("models.capture")
    assert hubconf._load("models").capture is capture and capture is not sys.modules.get("models.capture")
    for name in ("main", "export", "state.trained", "regularizers", "warmup"):
        assert hubconf._load(name).__name__ == hubconf._PREFIX + name
    model = capture.DiverseViT(hubconf.deit_tiny_patch16_224(img_size=32, patch_size=8))
    copy = pickle.loads(pickle.dumps(model))
    assert type(copy) is capture.DiverseViT
    with pytest.raises(ModuleNotFoundError, match=r"no module models.of_another in "):
        hubconf._load("models.of_another")


def test_a_module_that_fails_is_not_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A second call meets the error again, and not half a module."""
    monkeypatch.setattr(hubconf, "_ROOT", tmp_path)
    monkeypatch.setattr(hubconf, "_PREFIX", "_of_this_test_")
    (tmp_path / "first.py").write_text(
        "import second as again\nimport package.part\nVALUE = package.part.VALUE + again.VALUE"
    )
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("")
    (tmp_path / "package" / "part.py").write_text("VALUE = 1")
    (tmp_path / "second.py").write_text("from package import part\nfrom package import missing")
    for _ in range(2):
        with pytest.raises(ImportError, match="cannot import name 'missing' from '_of_this_test_package'"):
            hubconf._load("first")
    assert not {"_of_this_test_first", "_of_this_test_second"} & set(sys.modules)
    (tmp_path / "second.py").write_text("from package import part\nVALUE = part.VALUE + 1")
    assert hubconf._load("first").VALUE == 3
    for name in [name for name in sys.modules if name.startswith("_of_this_test_")]:
        del sys.modules[name]


def test_entry_points_are_the_reference_names_diversity_and_remedy() -> None:
    """torch.hub lists every public callable, so there must be no other; each has its own name and docstring."""
    public = {name for name, value in vars(hubconf).items() if callable(value) and not name.startswith("_")}
    assert public == REFERENCE_NAMES | {"diversity", "remedy"}
    for name in REFERENCE_NAMES:
        entry = getattr(hubconf, name)
        assert entry.__name__ == name
        assert "pretrained" in entry.__doc__
    assert "--reg" in str(hubconf.diversity.__doc__)


@pytest.mark.parametrize("name", sorted(REFERENCE_NAMES))
def test_published_weights_are_those_of_the_base(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """As with --pretrained: the suffix changes nothing but the name. There are none of another depth."""
    small = {"num_classes": 3, "depth": 1}
    asked = []

    def load(model: nn.Module, pretrained_cfg: dict[str, Any], **rest: Any) -> None:
        asked.append(pretrained_cfg["architecture"])
        model.load_state_dict(published.state_dict())

    monkeypatch.setattr(timm.models._builder, "load_pretrained", load)
    build = getattr(hubconf, name)
    if "layer24" in name:
        with pytest.raises(hubconf._errors.UserError, match=f"no weights of {name} are published: load a check"):
            build(pretrained=True)
        assert not asked
        return
    published = timm.create_model(name.removesuffix("_diverse"), **small)
    model = build(pretrained=True, **small)
    assert asked == [name.removesuffix("_diverse")]
    assert_same(model.state_dict(), published.state_dict())
