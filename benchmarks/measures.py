"""What each measure costs, forward and backward, against its textbook form, at the shapes of DeiT-S.

    python benchmarks/measures.py                          # batch 64, on whatever device is there
    python benchmarks/measures.py --quick --json FILE      # batch 8, under a minute on a CPU core

The textbook forms (textbook.py) are the equations as they stand. Both forms of a measure must agree before they are
timed; then they take turns, round by round, so that a busy machine slows both alike. Printed are the medians, what
a form keeps for the backward pass beside its input, and the ratios.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from common import CLASSES, get_args_parser, machine, main, seconds, take_turns, write
from textbook import TEXTBOOK, Form, dense_mixing
from torch import Tensor

from mixing.mixup import Labels
from regularizers import MEASURES
from regularizers.levels import LEVELS
from utils import pick_device

PATCHES, WIDTH, HEADS, BLOCKS = 196, 384, 6, 12  # DeiT-S at 224
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FORMS = {
    **TEXTBOOK,
    "mixing": dense_mixing,
}  # not patch by patch: by itself that would time the launching of kernels


# ------------------------------------------------------------------------------------------------------------
# Cases


@dataclass(frozen=True)
class Case:
    """A measure at a level, in both forms, and its input."""

    name: str
    forms: dict[str, Form]  # 'ours', 'naive'
    inputs: list[Tensor]


def items(source: str, batch: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random items: patches that share a direction, attention maps, or weights as initialised."""
    if source == "tokens":
        x = torch.randn(batch, PATCHES, WIDTH, device=device) + torch.randn(batch, 1, WIDTH, device=device)
    elif source == "attention":
        n = PATCHES + 1
        x = (2 * torch.randn(batch, HEADS, n, n, device=device)).softmax(dim=-1).flatten(2)
    else:
        x = 0.02 * torch.randn(3 * BLOCKS, WIDTH, WIDTH, device=device)
    return x.to(dtype).requires_grad_()


def cases(batch: int, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """Every measure at each of its levels with the level's defaults, also with absolute values."""
    for level in LEVELS.values():
        for name, measure in MEASURES.items():
            if level.name not in measure.levels:
                continue
            if name not in FORMS:
                print(f"{level.name}_{name}: left out, it has no textbook form")
                continue
            if measure.takes == "labels":
                yield labels_case(f"{level.name}_{name}", measure.function, FORMS[name], batch, dtype, device)
                continue
            sets = 2 if measure.takes == "pair" else 1
            inputs = [items(level.source, batch, dtype, device) for _ in range(sets)]
            defaults = level.default_arguments.get(name, {})
            variants: dict[str, dict[str, Any]] = {"": {}, "_abs": {"absolute": True}}
            for suffix, arguments in variants.items():
                if suffix and "abs" not in measure.options:
                    continue
                ours = partial(measure.function, **{**defaults, **arguments})
                naive = partial(FORMS[name], **{**defaults, **arguments})
                yield Case(f"{level.name}_{name}{suffix}", {"ours": ours, "naive": naive}, inputs)


def labels_case(name: str, ours: Form, naive: Form, batch: int, dtype: torch.dtype, device: torch.device) -> Case:
    """A measure that takes labels, of the logits of all patches."""
    logits = torch.randn(batch, PATCHES, CLASSES, device=device).to(dtype).requires_grad_()
    own, partner = torch.randint(CLASSES, (2, batch), device=device)
    shares = torch.rand(batch, PATCHES, device=device)
    labels = Labels(own, partner, shares.mean(dim=1), shares, smoothing=0.1, mixed=True)
    return Case(name, {"ours": partial(ours, labels=labels), "naive": partial(naive, labels=labels)}, [logits])


# ------------------------------------------------------------------------------------------------------------
# Measuring


def compute(form: Form, inputs: list[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Value and gradients, with the same random draws every time."""
    torch.manual_seed(0)
    value = form(*inputs)
    return value, torch.autograd.grad(value, inputs)


def kept_bytes(form: Form, inputs: list[Tensor]) -> int:
    """What the form keeps for the backward pass beside its input."""
    kept: list[Tensor] = []  # alive until counted, so that no two storages share an address

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        form(*inputs)
    own = {x.untyped_storage().data_ptr() for x in inputs}
    sizes = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}
    return sum(size for address, size in sizes.items() if address not in own)


def check(case: Case) -> None:
    """Refuse to time two forms that do not compute the same thing."""
    (value, gradients), (expected, others) = (compute(case.forms[form], case.inputs) for form in ("ours", "naive"))
    for mine, theirs in zip((value, *gradients), (expected, *others), strict=True):
        difference, size = (x.detach().float().norm().item() for x in (mine - theirs, theirs))
        if difference > 0.02 * size:
            raise SystemExit(f"{case.name}: the two forms differ by {difference:.3g} of {size:.3g}")


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Both forms of a case: median seconds and bytes kept."""
    if case.inputs[0].device.type == "cpu" or case.name != "weight_cno":
        check(case)  # but on a GPU the one draw of all probes of weights differs from drawing them one by one
    device = case.inputs[0].device
    times = take_turns(
        {
            form: partial(seconds, partial(compute, function, case.inputs), device)
            for form, function in case.forms.items()
        },
        rounds,
    )
    return {
        "shape": list(case.inputs[0].shape),
        "seconds": {form: statistics.median(values) for form, values in times.items()},
        "input_bytes": sum(x.numel() * x.element_size() for x in case.inputs),
        "kept_bytes": {form: kept_bytes(function, case.inputs) for form, function in case.forms.items()},
    }


def ratios(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """naive / ours: of the time, and of what is alive for the backward pass, the input included."""
    flat = {}
    for name, result in results.items():
        time_of, kept, own = result["seconds"], result["kept_bytes"], result["input_bytes"]
        flat[f"naive_over_ours_time_{name}"] = time_of["naive"] / time_of["ours"]
        flat[f"naive_over_ours_memory_{name}"] = (own + kept["naive"]) / (own + kept["ours"])
    return flat


def show(name: str, result: dict[str, Any]) -> None:
    ours, naive = (1000 * result["seconds"][form] for form in ("ours", "naive"))
    kept = {form: size / 2**20 for form, size in result["kept_bytes"].items()}
    print(
        f"{name:25}{ours:10.1f} {naive:10.1f} {naive / ours:8.2f} {result['input_bytes'] / 2**20:10.1f} "
        f"{kept['ours']:10.1f} {kept['naive']:10.1f}",
        flush=True,
    )


def run() -> None:
    parser = get_args_parser(__doc__.split("\n")[0])
    parser.add_argument("--batch-size", type=int, help="images; 64, or 8 with --quick")
    parser.add_argument("--rounds", type=int, help="rounds of each form, after one warm-up; 7, or 3 with --quick")
    parser.add_argument("--only", default="", help="measures whose name contains this, e.g. patch_ or mgd")
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES), help="of the items")
    flags = parser.parse_args()
    batch = flags.batch_size or (8 if flags.quick else 64)
    rounds = flags.rounds or (3 if flags.quick else 7)
    device = pick_device(flags.device)
    print(f"DeiT-S at 224, batch {batch}, {flags.dtype}, {machine(device)}, {torch.get_num_threads()} threads")
    print(f"{'':25}{'ours ms':>10} {'naive ms':>10} {'ratio':>8} {'input MiB':>10} {'ours kept':>10} {'naive':>10}")
    results = {}
    torch.manual_seed(0)
    for case in cases(batch, DTYPES[flags.dtype], device):
        if flags.only in case.name:
            results[case.name] = measure(case, rounds)
            show(case.name, results[case.name])
    settings = {"dtype": flags.dtype, "batch_size": batch, "rounds": rounds}
    write(flags.json, device, {**settings, "measures": results, "ratios": ratios(results)})


if __name__ == "__main__":
    main(run)
