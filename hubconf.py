"""torch.hub entry points: the reference's model names; diversity terms and remedies for training loops of others.

    torch.hub.load("path/to/this/folder", "deit_small_patch16_224_diverse", source="local", num_classes=100)
    torch.hub.load("path/to/this/folder", "diversity", model, "patch.cosine@last=0.5", source="local")
    torch.hub.load("path/to/this/folder", "remedy", model, "attnscale", source="local")

A program that uses torch.hub may have a utils.py or a package models of its own. So the modules of this project are
loaded under private names here, and import each other by these; the program's modules and its sys.path stay as
they are.
"""

from __future__ import annotations

import builtins as _builtins
import hashlib as _hashlib
import sys as _sys
from collections.abc import Callable as _Callable
from collections.abc import Mapping as _Mapping
from collections.abc import Sequence as _Sequence
from contextlib import ExitStack as _ExitStack
from importlib.util import module_from_spec as _module_from_spec
from importlib.util import spec_from_file_location as _spec_from_file_location
from pathlib import Path as _Path
from types import ModuleType as _ModuleType
from typing import Any as _Any

import timm as _timm
from torch import nn as _nn

dependencies = ["torch", "timm"]

# ------------------------------------------------------------------------------------------------------------
# This project's modules under private names

_ROOT = _Path(__file__).resolve().parent
_PREFIX = (
    f"_diverse_vit_{_hashlib.sha256(bytes(_ROOT)).hexdigest()[:8]}_"  # other copies of the project have others
)


def _file_of(name: str) -> _Path | None:
    """The file of a module or package of this project; None if there is none."""
    place = _ROOT.joinpath(*name.split("."))
    files = (place / "__init__.py", place.with_name(f"{place.name}.py"))
    return next((file for file in files if file.is_file()), None)


def _load(name: str) -> _ModuleType:
    """A module of this project, e.g. 'models.backbones', loaded once for all calls of torch.hub."""
    private = _PREFIX + name
    if private in _sys.modules:
        return _sys.modules[private]
    package, _, own = name.rpartition(".")
    file = _file_of(name)
    if file is None:
        raise ModuleNotFoundError(f"no module {name} in {_ROOT}")
    folder = [str(file.parent)] if file.name == "__init__.py" else None
    spec = _spec_from_file_location(private, file, submodule_search_locations=folder)
    assert spec is not None and spec.loader is not None
    parent = _load(package) if package else None
    module = _module_from_spec(spec)
    vars(module)["__builtins__"] = {**vars(_builtins), "__import__": _import}  # what its import statements call
    _sys.modules[private] = module
    with _ExitStack() as undo:
        undo.callback(_sys.modules.pop, private)
        spec.loader.exec_module(module)
        undo.pop_all()
    if parent is not None:
        setattr(parent, own, module)
    return module


def _import(
    name: str,
    globals: _Mapping[str, _Any] | None = None,
    locals: _Mapping[str, _Any] | None = None,
    fromlist: _Sequence[str] | None = (),
    level: int = 0,
) -> _ModuleType:
    """What `import` does inside these modules: it finds them by their private names, and all others as ever."""
    if level or _file_of(name) is None:
        return _builtins.__import__(name, globals, locals, fromlist or (), level)
    module = _load(name)
    for item in fromlist or ():
        if not hasattr(module, item) and _file_of(f"{name}.{item}") is not None:
            _load(f"{name}.{item}")
    return module if fromlist else _load(name.partition(".")[0])


# ------------------------------------------------------------------------------------------------------------
# Entry points

_errors, _models, _backbones = _load("errors"), _load("models"), _load("models.backbones")
_elsewhere, _remedies = _load("elsewhere"), _load("models.remedies")


def diversity(model: _nn.Module, *terms: str, img_size: int | _Sequence[int] | None = None) -> _nn.Module:
    """Let a timm model return diversity terms beside its output, for a training loop of your own.

        model = torch.hub.load(REPOSITORY, "diversity", model, "patch.cosine@last=0.5", "attn.cosine@0=1e-4")
        output, diversity, terms = model(images)
        loss = criterion(output, labels) + diversity

    `output` is what the model itself returns. `diversity` is the sum of coefficient * term, 0 while gradients are
    off. `terms` has the value of each term by name, for the log. The model is changed in place, but its class, its
    parameters and its state dict stay its own. `model.diversity.remove()` undoes it.

    Args:
        model: any timm model that diversity terms know, or a model with one inside, such as transformers'
            TimmWrapperForImageClassification. Give it before DDP or torch.compile wraps it.
        terms: as for --reg, "LEVEL.MEASURE[:OPTIONS][@LAYERS]=COEF"; but none that takes labels.
        img_size: of your images, in pixels, or their height and width, if the model was built for others.
    """
    attached: _nn.Module = _elsewhere.attach(model, terms, img_size)
    return attached


def remedy(model: _nn.Module, *remedies: str) -> _nn.Module:
    """Build remedies for redundancy into a timm model, for a training loop of your own.

        model = torch.hub.load(REPOSITORY, "remedy", model, "attnscale", "contranorm:scale=0.2")

    The model is changed in place. Its own parameters keep their names and values, so load stock weights before; the
    remedies' parameters are new.

    Args:
        model: any timm model that has the place. Give it before DDP, torch.compile, an optimizer or `diversity`.
        remedies: as for --remedy, "NAME[:OPTIONS][@LAYERS]" (docs/methods.md).
    """
    _remedies.install_remedies(model, remedies)
    return model


def _entry_point(name: str) -> _Callable[..., _nn.Module]:
    base, overrides = _backbones.VARIANTS.get(name, (name, {}))

    def build(pretrained: bool = False, **kwargs: _Any) -> _nn.Module:
        if not pretrained:
            model: _nn.Module = _models.build_model(name, **kwargs)
            return model
        if overrides:
            raise _errors.UserError(f"no weights of {name} are published: load a checkpoint of your own into it")
        return _timm.create_model(base, pretrained=True, **kwargs)

    changes = "".join(f", {key} {value}" for key, value in overrides.items())
    build.__name__ = name
    build.__doc__ = f"""{base}{changes}.

    Args:
        pretrained: load DeiT's published ImageNet-1k weights of {base} through timm; not where the depth differs.
        kwargs: arguments of the model's constructor, e.g. num_classes, img_size, drop_path_rate.
    """
    return build


globals().update({_name: _entry_point(_name) for _name in sorted(_backbones.REFERENCE_NAMES)})
