"""The --config file: flags by name, and regularizers. Like flags.py, it imports nothing that takes time."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import yaml

from errors import UserError, did_you_mean, reason
from options.parser import KeyValues, Parser, underscored


def read_config(path: str, parser: Parser) -> dict[str, Any]:
    """Read a YAML file of flags (either spelling, without dashes in front) and `regularizers:`.

    `regularizers` maps specs to coefficients, or lists "spec=coef".

    Raises:
        UserError: no such file, not YAML, an unknown key (with the nearest), or a value of the wrong type.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read --config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path} is not YAML: {reason(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"--config {path} must hold 'flag: value' lines")
    actions = {
        underscored(name.lstrip("-")): action
        for name, action in parser.long_names().items()
        if action.dest not in ("help", "config")
    }
    values: dict[str, Any] = {}
    for key, value in content.items():
        name = underscored(str(key))
        if name == "regularizers":
            values["reg"] = [*values.get("reg", []), *_regularizer_list(value, path)]
        elif name in actions and actions[name].dest in values and name != "reg":
            raise UserError(f"{path}: {key} says again what another key says: keep one")
        elif name in actions:
            values[actions[name].dest] = _cast(actions[name], name, value, path)
        else:
            raise UserError(f"{path}: unknown key {key!r}.{did_you_mean(name, [*actions, 'regularizers'])}")
    return values


def _regularizer_list(value: Any, path: str) -> list[str]:
    if isinstance(value, dict):
        return [f"{spec}={coef}" for spec, coef in value.items()]
    if isinstance(value, list):
        return [str(spec) for spec in value]
    raise UserError(f"{path}: regularizers must map specs to coefficients, e.g. 'patch.cosine@last: 0.5'")


def _cast(action: argparse.Action, name: str, value: Any, path: str) -> Any:
    """A YAML value as the flag's type: YAML reads 5e-4 as a string, and 1 as an int where a float is meant."""
    if value is None and action.default is None:
        return None
    if isinstance(action.const, bool):  # a switch
        if not isinstance(value, bool):
            raise UserError(f"{path}: {name} must be true or false, not {value!r}")
        return value if name == action.dest else (action.const if value else not action.const)
    if isinstance(action, KeyValues):
        if not isinstance(value, dict):
            raise UserError(f"{path}: {name} must map names to values, not {value!r}")
        return value
    many = action.nargs == "+" or isinstance(action.default, list)
    if many != isinstance(value, list):
        raise UserError(f"{path}: {name} must be {'a list' if many else 'one value'}, not {value!r}")
    convert: Any = action.type or str
    try:
        result = [convert(str(one)) for one in value] if many else convert(str(value))
    except ValueError as error:
        raise UserError(f"{path}: {name} must be of type {convert.__name__}, not {value!r}") from error
    if action.choices is not None and result not in action.choices:
        raise UserError(f"{path}: {name} must be one of {', '.join(action.choices)}, not {value!r}")
    return result
