"""A trained model leaves the project: as a folder for timm, an ONNX file, or a PyTorch program.

Whatever is written is the plain timm model in evaluation mode, images [B, C, H, W] -> logits [B, K] with any B; no
hook and nothing of this repository goes with it. Every file is read back and compared with the model before it
takes its name, so a file that exists is one that works. Networks for segmentation go the same way, by
segmentation/export.py.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from timm.layers import use_fused_attn
from timm.models import save_for_hf
from torch import Tensor, nn

from errors import BAD_ARGUMENT, UserError, did_you_mean, reason, shown
from images.transforms import Preprocessing
from images.transforms import preprocessing as preprocessing_of
from models import DiverseViT
from models.heads import PATCH_HEAD
from models.remedies import fold_away, needs_map
from options.flags import FORMATS, Args
from state.trained import Trained
from utils import put_in_place

EXTRAS = ("onnx", "onnxscript", "onnxruntime")
OPSETS = range(18, 24)  # ONNX operator sets that torch's exporter writes by itself
ATTENTION_OPSET = 23  # the first one with an operator for fused attention
ONE_FILE = 2**31 - 2**24  # bytes of weights that fit, with the graph, into one ONNX file

LABELS = "label_names"  # timm's key for the classes' names, in every format; a JSON list beside what is no JSON

# Where timm leaves fused attention off unless the environment says TIMM_FUSED_ATTN=2.
EXPERIMENTAL = frozenset(f"timm.models.{name}" for name in ("swin_transformer", "visformer", "xcit"))
HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)

# Largest difference of logits, relative to the largest logit (if beyond 1), with which a file still counts as the
# model: the same kernels give the same bits in timm; other kernels round otherwise; wrong weights are far off.
SAME, ROUNDING = 0.0, 1e-3

Size = tuple[int, int]  # height, width


# ------------------------------------------------------------------------------------------------------------
# What is exported


def plain_backbone(model: nn.Module) -> Any:
    """A copy of a timm model, or of the one in a DiverseViT, as it is by itself: for the CPU, in evaluation mode,
    without a head for patches or hooks but those of its remedies, and with fused attention where a hook had it off.

    The model itself is left as it is.
    """
    backbone: Any = copy.deepcopy(model.backbone if isinstance(model, DiverseViT) else model)
    if hasattr(backbone, PATCH_HEAD):
        delattr(backbone, PATCH_HEAD)
    for module in backbone.modules():
        hooked = any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
        if hooked and getattr(module, "fused_attn", True) is False and not needs_map(module):
            module.fused_attn = use_fused_attn(experimental=type(module).__module__ in EXPERIMENTAL)
    own = set(backbone.modules())
    for module in own:
        for hooks in HOOKS:
            found = getattr(module, hooks)
            for key in [key for key, hook in found.items() if getattr(hook, "__self__", None) not in own]:
                del found[key]
    return backbone.cpu().eval()


def preprocessing(images: Preprocessing) -> dict[str, Any]:
    """The evaluation transform of transforms.build_transform in timm's words (`timm.data.create_transform`)."""
    names = ("interpolation", "crop_pct", "crop_mode", "mean", "std")
    return {name: getattr(images, name) for name in names}


# ------------------------------------------------------------------------------------------------------------
# Formats


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        files: their paths.
        difference: the largest absolute difference between its logits and the model's, on random images.
        load: a line of Python that loads it.
    """

    files: tuple[Path, ...]
    difference: float
    load: str


def to_timm(
    model: nn.Module,
    folder: Path,
    image_shape: tuple[int, int, int],
    model_args: Mapping[str, Any] | None = None,
    class_names: Sequence[str] = (),
    images: Preprocessing | None = None,
    remedies: Sequence[str] = (),
) -> Exported:
    """Write model.safetensors and config.json, for `timm.create_model("local-dir:FOLDER", pretrained=True)`.

    The configuration names the stock architecture and how it was changed, the number of classes and the evaluation
    transform, and says nothing of the weights that timm itself has for the architecture.

    Args:
        model: a timm model, or the DiverseViT around it.
        image_shape: channels, height and width.
        model_args: what the constructor was given (current versions of timm remember that by themselves).
        class_names: in the order of the logits, for the configuration's `label_names`; none leaves it out.
        images: what they are to go through, by default DeiT's preprocessing.
        remedies: what is built into the model: it is folded into the weights, or timm is told of it.
    Raises:
        UserError: the folder cannot be written to, timm does not rebuild the same model from it, or a remedy that
            timm does not have.
    """
    backbone = plain_backbone(model)
    with_remedies = copy.deepcopy(backbone)
    told, beyond = fold_away(backbone, remedies)
    if beyond:
        raise UserError(
            f"timm has no {beyond[0]}, and its parameters cannot be folded into the weights: export this model "
            "with --formats torch or onnx"
        )
    model_args = {**(model_args or {}), **told}
    stock = backbone.pretrained_cfg
    kept = ("architecture", "first_conv", "classifier", "fixed_input_size", "min_input_size")
    backbone.pretrained_cfg = {
        **{key: stock[key] for key in kept if key in stock},
        **preprocessing(
            images or preprocessing_of(Args(input_size=list(image_shape[1:]), in_chans=image_shape[0]))
        ),
        "input_size": image_shape,
        "num_classes": backbone.num_classes,
    }
    backbone.default_cfg = backbone.pretrained_cfg
    with _staged(folder) as staging, _explained(backbone, "timm", (SafetensorError,)):
        config = {LABELS: list(class_names)} if class_names else {}
        save_for_hf(backbone, str(staging), config, model_args=model_args, safe_serialization=True)
        _keep_one_count(staging / "config.json")
        again = timm.create_model(f"local-dir:{staging}", pretrained=True).eval()
        difference = _compare(again, backbone, image_shape, SAME, "timm's model")
        if remedies:
            difference = _compare(again, with_remedies, image_shape, ROUNDING, "the model without its remedies")
    load = f'model = timm.create_model("local-dir:{folder}", pretrained=True).eval()'
    return Exported((folder / "model.safetensors", folder / "config.json"), difference, load)


def to_torch(
    model: nn.Module,
    folder: Path,
    image_shape: tuple[int, int, int],
    class_names: Sequence[str] = (),
    sizes: Sequence[Size] = (),
) -> Exported:
    """Write model.pt2, a program for `torch.export.load(FILE).module()`, which needs torch alone, on the CPU.

    Args:
        model: a timm model, or the DiverseViT around it.
        image_shape: channels, height and width.
        class_names: in the order of the logits, as the extra file `label_names`, a JSON list.
        sizes: of a model for images of any size, see `to_onnx`.
    Raises:
        UserError: the folder cannot be written to, or torch.export cannot follow this model.
    """
    # torch remembers what is true of the traced image alone, e.g. that it is not of whole patches, as guards
    unguarded = "check_guards=False" if sizes else ""
    backbone = plain_backbone(model)
    with _staged(folder) as staging, _explained(backbone, "torch"):
        extra = {LABELS: json.dumps(list(class_names))} if class_names else {}
        torch.export.save(_trace(backbone, image_shape, sizes), staging / "model.pt2", extra_files=extra)
        again = torch.export.load(staging / "model.pt2").module(check_guards=not sizes)
        difference = _compare(again, backbone, image_shape, ROUNDING, "model.pt2", sizes)
    path = folder / "model.pt2"
    return Exported((path,), difference, f'model = torch.export.load("{path}").module({unguarded})')


def to_onnx(
    model: nn.Module,
    folder: Path,
    image_shape: tuple[int, int, int],
    opset: int | None = None,
    class_names: Sequence[str] = (),
    sizes: Sequence[Size] = (),
) -> Exported:
    """Write model.onnx, with input `images` and output `logits`.

    Weights of two gigabytes and more, which no ONNX file can hold, stand beside it in model.onnx.data.

    Args:
        model: a timm model, or the DiverseViT around it.
        image_shape: channels, height and width.
        opset: ONNX's operator set, torch's choice by default; from 23 on fused attention stays one node.
        class_names: in the order of the logits, as the file's metadata `label_names`, a JSON list.
        sizes: of a model for images of any size: heights and widths at which the file is compared with it. The
            first one is traced.
    Raises:
        UserError: the folder cannot be written to, the optional packages are missing, or torch's exporter or ONNX
            Runtime does not support this model.
    """
    check_formats(["onnx"], opset)
    backbone = plain_backbone(model)
    onnx, runtime = import_module("onnx"), import_module("onnxruntime")
    errors = (onnx.checker.ValidationError, *_exceptions(runtime.capi.onnxruntime_pybind11_state))
    size = sum(tensor.nbytes for tensor in backbone.state_dict().values())
    fused = opset is not None and opset >= ATTENTION_OPSET
    with _staged(folder) as staging, _explained(backbone, "onnx", errors):
        torch.onnx.export(
            _trace(backbone if fused else _unfused(backbone), image_shape, sizes),
            f=staging / "model.onnx",
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: "batch", 2: "height", 3: "width"} if sizes else {0: "batch"},),
            opset_version=opset,
            external_data=size > ONE_FILE,
            verbose=False,
        )
        if class_names:
            _add_metadata(onnx, staging / "model.onnx", LABELS, json.dumps(list(class_names)))
        onnx.checker.check_model(str(staging / "model.onnx"), full_check=True)
        session = runtime.InferenceSession(str(staging / "model.onnx"), providers=["CPUExecutionProvider"])

        def again(images: Tensor) -> Tensor:
            return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])

        difference = _compare(again, backbone, image_shape, ROUNDING, "model.onnx", sizes)
        names = sorted(file.name for file in staging.iterdir())
    load = f'session = onnxruntime.InferenceSession("{folder / "model.onnx"}")'
    return Exported(tuple(folder / name for name in names), difference, load)


def export(trained: Trained, folder: Path, form: str, opset: int | None = None) -> Exported:
    """Write one of FORMATS; `check_formats` refuses others.

    Raises:
        UserError: as to_timm, to_torch and to_onnx do.
    """
    if form == "timm":
        return to_timm(
            trained.backbone,
            folder,
            trained.image_shape,
            trained.model_args,
            trained.class_names,
            trained.preprocessing,
            trained.remedies,
        )
    if form == "torch":
        return to_torch(trained.backbone, folder, trained.image_shape, trained.class_names)
    return to_onnx(trained.backbone, folder, trained.image_shape, opset, trained.class_names)


# ------------------------------------------------------------------------------------------------------------
# Checks that need no model


def check_formats(formats: Iterable[str], opset: int | None = None) -> None:
    """Raise a UserError for an unknown format, an operator set that cannot be written, or missing packages."""
    for form in formats:
        if form not in FORMATS:
            raise UserError(
                f"unknown format {form!r}, choose from {', '.join(FORMATS)}.{did_you_mean(form, FORMATS)}"
            )
    if opset is not None and opset not in OPSETS:
        raise UserError(f"--opset {opset} cannot be written: choose {OPSETS[0]} to {OPSETS[-1]}")
    missing = [name for name in EXTRAS if importlib.util.find_spec(name) is None]
    if "onnx" in formats and missing:
        raise UserError(f"the format onnx needs {', '.join(missing)}: pip install -r requirements-export.txt")


def check_folder(folder: Path) -> None:
    """Raise a UserError if `folder` is a file, or can be neither written to nor made."""
    existing = next((path for path in (folder, *folder.absolute().parents) if path.exists()), Path("/"))
    if not existing.is_dir():
        raise UserError(f"cannot write to {shown(str(folder))}: {shown(str(existing))} is a file, not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to {folder}: no permission to write in {existing}")


# ------------------------------------------------------------------------------------------------------------
# Parts


def _keep_one_count(path: Path) -> None:
    """Say the number of classes once, where timm reads it: transformers builds no model that is told it twice."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config.get("model_args", {}).pop("num_classes", None)
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _trace(
    backbone: nn.Module, image_shape: Sequence[int], sizes: Sequence[Size] = ()
) -> torch.export.ExportedProgram:
    """The forward pass as a graph, for any number of images from 1 on; with `sizes` also for images of any size."""
    channels, *size = image_shape
    images = torch.zeros(2, channels, *(sizes[0] if sizes else size))  # torch takes a batch of 1 for a constant
    free = torch.export.Dim.DYNAMIC
    dynamic = {0: free, 2: free, 3: free} if sizes else {0: torch.export.Dim("batch", min=1)}
    program = torch.export.export(backbone, (images,), dynamic_shapes=(dynamic,))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths on this machine, which files would otherwise carry along
    return program


def _unfused(backbone: nn.Module) -> nn.Module:
    """A copy whose attention is written out: torch's own way to do so fails where attention has a bias."""
    unfused: Any = copy.deepcopy(backbone)
    for module in unfused.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return unfused


def _add_metadata(onnx: Any, path: Path, key: str, value: str) -> None:
    """Add an entry to an ONNX file's metadata; weights beside it stay where they are."""
    model = onnx.load(str(path), load_external_data=False)
    onnx.helper.set_model_props(model, {**{each.key: each.value for each in model.metadata_props}, key: value})
    path.write_bytes(model.SerializeToString())


@torch.no_grad()
def _compare(
    again: Callable[[Tensor], Tensor],
    backbone: nn.Module,
    image_shape: Sequence[int],
    tolerance: float,
    what: str,
    sizes: Sequence[Size] = (),
) -> float:
    """The largest difference of logits on one and on three random images, or on one of each further size.

    Raises:
        UserError: it is beyond the tolerance, or not a number.
    """
    largest = 0.0
    channels, *size = image_shape
    first, *others = [*sizes] or [(size[0], size[1])]
    for batch, (height, width) in [(1, first), (3, first), *((1, other) for other in others)]:
        images = torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(batch))
        expected = backbone(images)  # [B, K], or [B, K, H, W]
        found = again(images)
        same = found.shape == expected.shape
        difference = float((found - expected).abs().max()) if same else float("inf")
        if not difference <= tolerance * max(1.0, float(expected.abs().max())):
            pixels = f" of {height} x {width} pixels" if sizes else ""
            raise UserError(
                f"nothing is written: the logits of {what} are off by {difference:.2g} for {batch} random image(s)"
                f"{pixels}"
            )
        largest = max(largest, difference)
    return largest


def _exceptions(module: Any) -> tuple[type[Exception], ...]:
    """The exceptions that a module defines; those of ONNX Runtime have no common base."""
    return tuple(kind for kind in vars(module).values() if isinstance(kind, type) and issubclass(kind, Exception))


@contextmanager
def _explained(backbone: nn.Module, form: str, besides: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Turn what a library raises for a model that it cannot export into a UserError of one line.

    Args:
        besides: what that library raises besides BAD_ARGUMENT.
    """
    expected: tuple[type[Exception], ...] = BAD_ARGUMENT + besides
    try:
        yield
    except expected as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # exporters wrap what went wrong in advice to report it
            cause = cause.__cause__
        said = reason(cause)
        shown = said if len(said) <= 300 else f"{said[:300]} ..."
        raise UserError(f"{type(backbone).__name__} cannot be exported to the format {form}: {shown}") from error


def _umask() -> int:
    """The permissions that new files are denied; they can only be read by setting them."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


@contextmanager
def _staged(folder: Path) -> Iterator[Path]:
    """A folder to write into, inside `folder`; its files move up, each whole, once the block has succeeded.

    Raises:
        UserError: the disk is full, or `folder` cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".export-", dir=folder) as staging:
            yield Path(staging)
            for path in sorted(Path(staging).iterdir()):
                path.chmod(0o666 & ~_umask())  # safetensors' file would be its owner's alone
                put_in_place(path, folder / path.name)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}") from error
