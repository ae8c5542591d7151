"""Whether a run can go on from what a checkpoint holds: looked at as a whole, before anything is created.

Who calls what, in this order, when a run is resumed:

    state = checkpoint.load(path)             # any file: plain data within bounds, dense tensors
    check_contents(state, path)               # before its flags are compared, and before output_dir is made
    check_optimizer(state["optimizer"], ...)  # before optimizer.load_state_dict
    check_scheduler(state["lr_scheduler"], ...)

Where a file is only to say which model it holds, `check_description` is enough. Keys that are not named here may
hold any plain data. The first thing that is wrong becomes one UserError.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from errors import BAD_ARGUMENT, UserError, reason, shown
from options.flags import Args
from options.parser import declared
from state.saved_flags import flags_of
from utils import keep_random_state, set_streams

LARGEST = 2**40  # of what counts epochs, steps or updates
NEW_RUN = "start from its weights with --finetune (segmentation: --backbone)"
ADVICE = f"take another checkpoint, or {NEW_RUN}"
DESCRIBED = ("model", "model_kwargs", "remedy", "input_size", "in_chans")
NUMPY_WORDS = 624  # of a generator's state
STREAMS = ("python", "numpy", "mixup", "torch")


def check_contents(state: Any, path: str) -> None:
    """Refuse a loaded checkpoint that a run cannot be resumed from, for what can be told without a model.

    A key that is missing is no fault here; `RunState.load_state_dict` says which ones it needs.

    Raises:
        UserError: the first of its parts that is not what a run writes, and what it is.
    """
    if not isinstance(state, dict):
        raise UserError(f"{path} cannot be resumed, it holds {_what(state)}, not a run: {ADVICE}")
    if "checksum" in state:
        _refuse(path, "checksum", state["checksum"], "of a known kind")
    if "epoch" in state:
        _check_count(state["epoch"], "epoch", path, least=-1)
    if "step" in state:
        _check_count(state["step"], "step", path)
    if "updates" in state:
        _check_count(state["updates"], "updates", path)
    for key in ("images", "precision"):
        if not isinstance(state.get(key, ""), str):
            _refuse(path, key, state[key], "a text")
    if "max_acc" in state and not _is_finite(state["max_acc"]):
        _refuse(path, "max_acc", state["max_acc"], "a number")
    _check_best(state.get("best", {}), path)
    check_description(state, path, get_type_hints(Args))
    _check_log(state.get("log", []), path)
    if not _fits(state.get("changes", []), list[str]):
        _refuse(path, "changes", state["changes"], "a list of lines")
    for key in ("model", "model_ema"):
        if key in state:
            _check_weights(state[key], key, path)
    if "optimizer" in state:
        _check_optimizer_form(state["optimizer"], path)
    if "lr_scheduler" in state:
        _check_names(state["lr_scheduler"], "lr_scheduler", path)
    _check_scaler(state.get("scaler") or {}, path)
    _check_processes(state.get("processes"), path)


# ------------------------------------------------------------------------------------------------------------
# Words


def _refuse(path: str, where: str, value: Any, wanted: str) -> NoReturn:
    raise UserError(f"{path} is malformed, its {shown(where)} is {_what(value)}, not {wanted}: {ADVICE}")


def _what(value: Any) -> str:
    """A value in a few words, whatever it is."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {shown(str(list(value.shape)))} and type {value.dtype}"
    if value is None or isinstance(value, (bool, float, str)) or (isinstance(value, int) and abs(value) <= LARGEST):
        return shown(repr(value), 60)
    return f"a {type(value).__name__}" + (f" of {len(value)}" if isinstance(value, (list, tuple, dict)) else "")


def _is_finite(value: Any) -> bool:
    """Whether a value is a number that arithmetic can go on with."""
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _check_count(value: Any, where: str, path: str, least: int = 0) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= LARGEST:
        _refuse(path, where, value, f"a whole number from {least} on")


def _check_names(value: Any, where: str, path: str) -> None:
    """It must be a dict whose keys are names."""
    if not isinstance(value, dict):
        _refuse(path, where, value, "a dict")
    odd = [key for key in value if not isinstance(key, str)]
    if odd:
        _refuse(path, f"{where}'s key", odd[0], "a name")


# ------------------------------------------------------------------------------------------------------------
# Flags and log


def _check_best(best: Any, path: str) -> None:
    """Which epoch was the best, by which weights, and with which accuracies."""
    _check_names(best, "best", path)
    if unknown := best.keys() - {"epoch", "weights", "acc1", "ema_acc1"}:
        _refuse(path, "best's key", min(unknown), "one that a run writes")
    _check_count(best.get("epoch", -1), "best's epoch", path, least=-1)
    if best.get("weights", "model") not in ("model", "model_ema"):
        _refuse(path, "best's weights", best["weights"], "'model' or 'model_ema'")
    for key in ("acc1", "ema_acc1"):
        if not _fits(best.get(key, 0), float | None if key == "ema_acc1" else float):
            _refuse(path, f"best's {key}", best[key], "a number")


def _check_log(log: Any, path: str) -> None:
    """Lines of log.txt: a JSON object each."""
    if not isinstance(log, list):
        _refuse(path, "log", log, "a list of lines")
    for number, line in enumerate(log):
        if not isinstance(line, str) or not _is_json_object(line):
            _refuse(path, f"log[{number}]", line, "a line of JSON")


def _is_json_object(line: str) -> bool:
    try:
        return line.isprintable() and isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def check_description(
    state: Any, path: str, names: Collection[str] = DESCRIBED, flags_table: type[Args] = Args
) -> None:
    """Refuse flags in a checkpoint with values that they cannot have today.

    Args:
        state: what a file holds.
        path: of the file.
        names: of the flags; those that say which model it is are enough where only that is taken from the file.
        flags_table: where the flags are declared.
    Raises:
        UserError: the first of them.
    """
    args = state.get("args") if isinstance(state, dict) else None
    if args is None:
        return
    _check_names(vars(args) if isinstance(args, argparse.Namespace) else args, "args", path)
    flags = flags_of(state)
    types, table = get_type_hints(flags_table), declared(flags_table)
    for name in flags.keys() & table.keys() & set(names):
        value, limits = flags[name], table[name].limits
        low, high = limits or (-math.inf, math.inf)
        numbers = [each for each in (value if isinstance(value, list) else [value]) if _is_finite(each)]
        if not _fits(value, types[name]) or not all(low <= number <= high for number in numbers):
            _refuse(path, f"args' {name}", value, f"what --{name.replace('_', '-')} takes")
    names = flags.get("class_names") or []
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        _refuse(path, "args' class_names", names, "a list of names")


def _fits(value: Any, annotation: Any) -> bool:
    """Whether a saved flag can be of this type: whole numbers and others are one kind."""
    parts = get_args(annotation)
    if get_origin(annotation) is list:
        return isinstance(value, (list, tuple)) and all(_fits(item, parts[0]) for item in value)
    if get_origin(annotation) is dict:
        return isinstance(value, dict) and all(_fits(key, parts[0]) for key in value) and _is_plain(value)
    if parts:
        return any(_fits(value, part) for part in parts)
    if annotation in (int, float):
        return _is_finite(value)
    return isinstance(value, annotation)


def _is_plain(value: Any) -> bool:
    """Whether it holds nothing but numbers, texts, lists and dicts, which can be compared and written as text."""
    if isinstance(value, dict):
        return all(_is_plain(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))


# ------------------------------------------------------------------------------------------------------------
# Tensors


def _check_weights(weights: Any, key: str, path: str) -> None:
    """Tensors by name, of real numbers."""
    _check_names(weights, key, path)
    for name, value in weights.items():
        if not isinstance(value, Tensor) or value.is_complex():
            _refuse(path, f"{key}[{name!r}]", value, "a tensor of real numbers")


def _check_optimizer_form(saved: Any, path: str) -> None:
    """{"state": {0: {name: value}, ...}, "param_groups": [{"params": [0, ...], name: value}, ...]}."""
    _check_names(saved, "optimizer", path)
    groups, moments = saved.get("param_groups"), saved.get("state")
    if not isinstance(groups, list) or not groups:
        _refuse(path, "optimizer's param_groups", groups, "a list of groups")
    known: list[int] = []
    for number, group in enumerate(groups):
        where = f"optimizer's param_groups[{number}]"
        _check_names(group, where, path)
        indices = group.get("params")
        if not isinstance(indices, list) or not all(type(index) is int for index in indices):
            _refuse(path, f"{where}['params']", indices, "a list of whole numbers")
        known += indices
    if len(set(known)) < len(known):
        raise UserError(f"{path} is malformed, its optimizer has one parameter in two groups: {ADVICE}")
    if not isinstance(moments, dict):
        _refuse(path, "optimizer's state", moments, "a dict")
    for index, values in moments.items():
        if type(index) is not int or index not in set(known):
            _refuse(path, "optimizer's state's key", index, "one of the parameters of its groups")
        _check_names(values, f"optimizer's state[{index}]", path)


def _check_scaler(saved: Any, path: str) -> None:
    _check_names(saved, "scaler", path)
    for name, value in saved.items():
        if not _is_finite(value) or value < 0:
            _refuse(path, f"scaler's {name}", value, "a number from 0 on")


# ------------------------------------------------------------------------------------------------------------
# What each process had of its own


def _check_processes(processes: Any, path: str) -> None:
    if processes is None:
        return
    if not isinstance(processes, list) or not processes:
        _refuse(path, "processes", processes, "a list with a dict of each process")
    for number, own in enumerate(processes):
        where = f"processes[{number}]"
        _check_names(own, where, path)
        for key in ("streams", "meters", "finite"):
            _check_names(own.get(key), f"{where}'s {key}", path)
        _check_streams(own["streams"], f"{where}'s streams", path)
        _check_meters(own["meters"], f"{where}'s meters", path)
        for key in ("in_a_row", "dropped"):
            _check_count(own["finite"].get(key), f"{where}'s finite's {key}", path)
        replaced = own.get("replaced", torch.zeros(0, dtype=torch.int64))
        if not isinstance(replaced, Tensor) or replaced.dtype != torch.int64 or replaced.ndim != 1:
            _refuse(path, f"{where}'s replaced", replaced, "a list of positions, as a tensor")
        if len(replaced) and not 0 <= int(replaced.min()) <= int(replaced.max()) <= LARGEST:
            _refuse(path, f"{where}'s replaced", replaced, "positions of samples")


def _check_streams(streams: dict[str, Any], where: str, path: str) -> None:
    """They are put in force once, and what was before is put back."""
    python = streams.get("python")
    gaussian = python[2] if isinstance(python, (list, tuple)) and len(python) > 2 else None
    if gaussian is not None and not _is_finite(gaussian):
        _refuse(path, f"{where}' python", gaussian, "a number")
    device = streams.get("device", torch.zeros(0, dtype=torch.uint8))
    if not isinstance(device, Tensor) or device.dtype != torch.uint8 or device.ndim != 1:
        _refuse(path, f"{where}' device", device, "bytes, as a tensor")
    try:
        for key in ("numpy", "mixup"):
            if not 0 <= streams[key]["state"]["pos"] <= NUMPY_WORDS:
                raise ValueError(f"{key} is at {_what(streams[key]['state']['pos'])}")  # numpy would read beyond
        if "device" in streams and torch.cuda.is_available():
            torch.Generator("cuda").set_state(device)
        with keep_random_state():
            set_streams({key: streams[key] for key in STREAMS}, torch.device("cpu"), np.random.RandomState())
    except BAD_ARGUMENT as error:
        raise UserError(
            f"{path} is malformed, its {where} are no states of random streams "
            f"({type(error).__name__}: {shown(reason(error), 80)}): {ADVICE}"
        ) from error


def _check_meters(meters: dict[str, Any], where: str, path: str) -> None:
    names, sums = meters.get("names"), meters.get("sums")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        _refuse(path, f"{where}' names", names, "a list of names")
    _check_count(meters.get("count"), f"{where}' count", path)
    if sums is None and not names and not meters["count"]:
        return
    if not isinstance(sums, Tensor) or not sums.is_floating_point() or list(sums.shape) != [len(names)]:
        _refuse(path, f"{where}' sums", sums, f"a number for each of {len(names)} names")
    if not meters["count"]:
        _refuse(path, f"{where}' count", 0, "how many values their sums are of")


# ------------------------------------------------------------------------------------------------------------
# Against what was built


def check_optimizer(saved: Mapping[str, Any], optimizer: Optimizer, path: str) -> None:
    """Refuse moments that are not those of these parameters, and settings that are not those of this optimizer.

    Args:
        saved: the checkpoint's, whose form `check_contents` has seen.
        optimizer: the run's, before it has taken a step.
    Raises:
        UserError: the first that differs.
    """
    advice = f"repeat the flags of its args.yaml, or {NEW_RUN}"
    groups = optimizer.param_groups
    there = [len(group["params"]) for group in saved["param_groups"]]
    here = [len(group["params"]) for group in groups]
    if there != here:
        raise UserError(
            f"{path} has an optimizer for {sum(there)} parameters in {len(there)} groups, but the model has "
            f"{sum(here)} in {len(here)}: {advice}"
        )
    for number, (old, own) in enumerate(zip(saved["param_groups"], groups, strict=True)):
        for name, value in own.items():
            if name != "params" and not _is_alike(old.get(name), value, missing=name not in old):
                has = "missing" if name not in old else _what(old[name])
                raise UserError(
                    f"{path}: {name} of the optimizer's group {number} is {has}, not like {_what(value)}: {advice}"
                )
    parameters = [parameter for group in groups for parameter in group["params"]]
    indices = [index for group in saved["param_groups"] for index in group["params"]]
    for index, parameter, expected in zip(indices, parameters, _moments(optimizer), strict=True):
        found = saved["state"].get(index) or {}
        for name in {**expected, **found} if found else ():
            fits = _is_moment(found.get(name), expected.get(name, parameter), name in found, name in expected)
            if not fits or (name == "step" and float(found[name]) < 0):
                has = _what(found[name]) if name in found else "missing"
                like = _what(expected.get(name, parameter))
                raise UserError(
                    f"{path}: {shown(name)} of the optimizer's parameter {index} is {has}, not {like}: {advice}"
                )


def _is_alike(old: Any, own: Any, missing: bool) -> bool:
    """Whether a saved setting can take the place of one; switches that came with a later version may be missing."""
    if isinstance(own, (tuple, list)):
        return isinstance(old, (tuple, list)) and len(old) == len(own) and all(map(_is_finite, old))
    if isinstance(own, (int, float)) and not isinstance(own, bool):
        return isinstance(old, (int, float)) and _is_finite(old)
    if isinstance(own, bool):
        return missing or isinstance(old, (bool, type(None)))
    if own is None:
        return missing or old is None or isinstance(old, bool) or _is_finite(old)
    return missing or type(old) is type(own)


def _is_moment(found: Any, expected: Any, is_there: bool, is_known: bool) -> bool:
    """Whether a saved moment can be gone on with.

    Args:
        expected: what the optimizer keeps after a step; for a name that is not known, the parameter.
    """
    if isinstance(found, Tensor) and found.ndim == 0:  # a count of steps, mostly
        single = not isinstance(expected, Tensor) or expected.ndim == 0 or not is_known
        return single and not found.is_complex() and bool(found.isfinite())
    if isinstance(expected, Tensor) and isinstance(found, Tensor):
        return found.shape == expected.shape and not found.is_complex()
    if not is_known:
        return True
    if isinstance(expected, (Tensor, int, float)) and not isinstance(expected, bool):
        return _is_finite(found) and (isinstance(expected, (int, float)) or expected.ndim == 0)
    return is_there


def _moments(optimizer: Optimizer) -> list[Mapping[str, Any]]:
    """What an optimizer keeps of each parameter once it has taken a step; nothing if it takes none by itself.

    A twin of it takes the step: with tensors without content or, where it looks into them, with small numbers.
    """
    own: Optimizer = vars(optimizer).get("_base_optimizer", optimizer)  # Lookahead wraps another one
    for device, value in (("meta", None), ("cpu", 1e-3)):
        with keep_random_state():
            twin: Any = object.__new__(type(own))
            parts = {key: part for key, part in vars(own).items() if key not in ("param_groups", "state")}
            vars(twin).update(copy.deepcopy(parts))
            twin.state = defaultdict(dict)
            twin.param_groups = [
                {**group, "params": [_with_gradient(p, device, value) for p in group["params"]]}
                for group in own.param_groups
            ]
            try:
                type(own).step(twin)
            except BAD_ARGUMENT:
                continue
        return [twin.state[parameter] for group in twin.param_groups for parameter in group["params"]]
    return [{} for group in own.param_groups for _ in group["params"]]


def _with_gradient(parameter: Tensor, device: str, value: float | None) -> Tensor:
    twin = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
    if value is not None:
        twin.fill_(value)
    twin.grad = twin.clone()
    return twin


def check_scheduler(saved: Mapping[str, Any], scheduler: Any, path: str) -> None:
    """Refuse a schedule's state that does not fit this schedule: timm takes whatever there is as its attributes.

    Args:
        saved: the checkpoint's.
        scheduler: the run's, timm's.
    Raises:
        UserError: the first that differs.
    """
    own = scheduler.state_dict()
    for name, value in saved.items():
        if name not in own:
            raise UserError(
                f"{path} has a schedule with {shown(repr(name))}, which that of this run has not: repeat the flags "
                f"of its args.yaml, or {NEW_RUN}"
            )
        lengths = {
            "base_values": len(own.get("base_values", ())),
            "noise_range_t": 2,
        }  # one for each group; from and to
        wrong = name in lengths and isinstance(value, (list, tuple)) and len(value) != lengths[name]
        if wrong or not _is_same_kind(value, own[name]):
            _refuse(path, f"lr_scheduler's {name}", value, f"like {_what(own[name])}")


def _is_same_kind(saved: Any, own: Any) -> bool:
    """Whether a schedule can go on with this: what is no number is a choice of its kind, and stays."""
    if isinstance(own, (list, tuple)):
        return isinstance(saved, (list, tuple)) and all(map(_is_finite, saved))
    if isinstance(own, (int, float)) and not isinstance(own, bool):
        return isinstance(saved, float) or _is_finite(saved)
    if own is None:
        return saved is None or _is_finite(saved) or _is_same_kind(saved, [])
    return type(saved) is type(own) and (isinstance(own, dict) or bool(saved == own))
