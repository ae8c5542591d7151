"""A report as JSON, and back. JSON knows no NaN: a gap is null. Images, and numbers of single ones, stay behind."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from errors import UserError, reason
from redundancy.finding import Assessed, Axis, Finding

FORMAT = 1  # raised when an older file can no longer be read


def pack(models: list[Assessed], about: dict[str, str]) -> dict[str, Any]:
    """What a report holds, in words of JSON."""
    return {"format": FORMAT, "about": _pack_about(about), "models": [_pack_model(model) for model in models]}


def unpack(data: Any) -> tuple[list[Assessed], dict[str, str]]:
    """The models and `about` of what `pack` returned.

    Raises:
        UserError: it is none of ours.
    """
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise UserError(f"this is no report.json of format {FORMAT}; measure again")
    try:
        return [_unpack_model(model) for model in data["models"]], data["about"]
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"this is no whole report.json: {reason(error)}; measure again") from error


def _pack_about(about: dict[str, Any]) -> dict[str, Any]:
    return {str(key): _plain(value) for key, value in about.items()}


def _plain(value: Any) -> Any:
    """Text and numbers as they are, anything else as text."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int)) else str(value)


def _pack_model(model: Assessed) -> dict[str, Any]:
    findings = {name: _pack_finding(finding) for name, finding in model.findings.items()}
    return {"label": model.label, "about": _pack_about(model.about), "findings": findings, "gaps": model.gaps}


def _unpack_model(data: dict[str, Any]) -> Assessed:
    findings = {name: _unpack_finding(finding) for name, finding in data["findings"].items()}
    return Assessed(data["label"], data["about"], findings, data["gaps"])


def _pack_finding(finding: Finding) -> dict[str, Any]:
    data = {
        "axes": [{"name": axis.name, "labels": list(axis.labels)} for axis in finding.axes],
        "summary": _plain(finding.summary),
        "summary_error": _plain(finding.summary_error),
        "count": finding.count,
        "note": finding.note,
        "mean": _pack_array(finding.mean),
    }
    return data if finding.error is None else data | {"error": _pack_array(finding.error)}


def _unpack_finding(data: dict[str, Any]) -> Finding:
    axes = tuple(Axis(axis["name"], tuple(axis["labels"])) for axis in data["axes"])
    return Finding(
        axes,
        _unpack_array(data["mean"], axes),
        _unpack_array(data["error"], axes) if "error" in data else None,
        data["count"],
        _unpack_number(data["summary"]),
        _unpack_number(data["summary_error"]),
        note=data["note"],
    )


def _pack_array(array: np.ndarray) -> Any:
    """Nested lists, null for what is not finite."""
    values = np.asarray(array, dtype=np.float64).astype(object)
    values[~np.isfinite(array)] = None
    return values.tolist()


def _unpack_array(data: Any, axes: tuple[Axis, ...]) -> np.ndarray:
    return np.array(data, dtype=np.float64).reshape([len(axis.labels) for axis in axes])  # None becomes NaN


def _unpack_number(value: float | None) -> float:
    return float("nan") if value is None else value
