"""The --config file: flags by name, and regularizers. Like flags.py, it imports nothing that takes time."""

from __future__ import annotations

import argparse
import os
import re
import stat
from collections.abc import Iterator
from typing import Any

import yaml

from errors import UserError, did_you_mean, reason, shown
from options.parser import KeyValues, Parser, Size, underscored
from options.paths import expand, usable

MOST_BYTES = 2**21  # of a file, which may name many classes
MOST_VALUES = 10**4  # beside one for each byte; what an alias repeats counts each time
DEEPEST = 50
EXPONENT = re.compile(r"[-+]?\d+[eE][-+]?\d+")  # a number that YAML takes for a text
LARGEST_INT = 10**300  # which is less than the largest float


def read_config(path: str, parser: Parser) -> dict[str, Any]:
    """Read a YAML file of flags (either spelling, without dashes in front) and `regularizers:`.

    `regularizers` maps specs to coefficients, or lists "spec=coef".

    Raises:
        UserError: no such file, not YAML, an unknown key (with the nearest), or a value of the wrong type.
    """
    content = read_yaml(expand(path), "--config")
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
            raise UserError(f"{path}: {shown(str(key))} says again what another key says: keep one")
        elif name in actions:
            values[actions[name].dest] = _cast(actions[name], name, value, path)
        else:
            raise UserError(f"{path}: unknown key {_said(key)}.{did_you_mean(name, [*actions, 'regularizers'])}")
    return usable(values, f"{path}: ")


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
            raise UserError(f"{path}: {name} must be true or false, not {_said(value)}")
        return value if name == action.dest else (action.const if value else not action.const)
    if isinstance(action, KeyValues):
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise UserError(f"{path}: {name} must map names to values, not {_said(value)}")
        return _with_numbers(value)
    if isinstance(action, Size):
        value = value if isinstance(value, list) else [value]
    many = action.nargs == "+" or isinstance(action.default, list)
    if many != isinstance(value, list):
        raise UserError(f"{path}: {name} must be {'a list' if many else 'one value'}, not {_said(value)}")
    convert: Any = action.type or str
    try:
        result = [convert(str(one)) for one in value] if many else convert(str(value))
        if isinstance(action, Size):
            return action.of(result)
    except ValueError as error:
        raise UserError(f"{path}: {name} must be of type {convert.__name__}, not {_said(value)}") from error
    for one in result if many else [result]:
        if action.choices is not None and one not in action.choices:
            hint = did_you_mean(str(one), action.choices)
            raise UserError(f"{path}: {name} must be one of {', '.join(action.choices)}, not {_said(one)}.{hint}")
    return result


def _with_numbers(value: Any) -> Any:
    """A value with its numbers as such: YAML reads 1e-4, which has no point, as a text."""
    if isinstance(value, dict):
        return {key: _with_numbers(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_with_numbers(each) for each in value]
    return float(value) if isinstance(value, str) and EXPONENT.fullmatch(value) else value


def _said(value: Any) -> str:
    """A value of a file, for a message."""
    return shown(repr(value))


# ------------------------------------------------------------------------------------------------------------
# YAML


class _Loader(yaml.SafeLoader):
    """YAML without keys that are given twice, deep nesting and numbers beyond all measure."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.depth += 1
        if self.depth > DEEPEST:
            raise yaml.constructor.ConstructorError(
                None, None, f"lists in lists, deeper than {DEEPEST}", self.peek_event().start_mark
            )
        node: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """A mapping whose keys differ; merged ones ('<<') may be given anew, that is what they are for."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        keys = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode) and not key_node.tag.endswith(":merge"):
                key = self.construct_object(key_node)
                if key in keys:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"{_said(key)} is given twice: keep one", key_node.start_mark
                    )
                keys.add(key)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
            raise self._refusal(node, reason(error) if isinstance(error, ValueError) else "no such text") from error
        if isinstance(value, int) and abs(value) >= LARGEST_INT:
            raise self._refusal(node, "too large")
        return value

    def _refusal(self, node: yaml.Node, why: str) -> yaml.constructor.ConstructorError:
        text = _said(node.value) if isinstance(node, yaml.ScalarNode) else "this"
        kind = shown(str(node.tag).rpartition(":")[2], 40)
        return yaml.constructor.ConstructorError(
            None, None, f"{text} is no {kind} ({why}); quote a text", node.start_mark
        )


class Located(dict[str, Any]):
    """A mapping that knows where it stands.

    Attributes:
        line: its first, from 1.
        lines: of its keys.
    """

    line = 0
    lines: dict[str, int]


class _LocatingLoader(_Loader):
    """Makes every mapping a `Located` one."""

    def construct_yaml_map(self, node: yaml.MappingNode) -> Iterator[Located]:
        self.flatten_mapping(node)  # what '<<' merges in
        mapping = Located()
        mapping.line = node.start_mark.line + 1
        mapping.lines = {str(self.construct_object(key)): key.start_mark.line + 1 for key, _ in node.value}
        yield mapping
        mapping.update(self.construct_mapping(node))


_LocatingLoader.add_constructor("tag:yaml.org,2002:map", _LocatingLoader.construct_yaml_map)


def read_yaml(path: str, flag: str = "", located: bool = False) -> Any:
    """What a YAML file holds.

    Args:
        flag: that names the file, for messages.
        located: mappings know the lines of their keys, see `Located`.
    Raises:
        UserError: there is none, or it cannot be read, or makes more than is in it.
    """
    called = f"{flag} {path}".strip()
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
            raise UserError(f"{called} is a device, a FIFO or a socket, not a file")
        if status.st_size > MOST_BYTES:
            raise UserError(f"{called} has {status.st_size:,} bytes, more than such a file can need")
        with open(path, encoding="utf-8") as file:
            loader = (_LocatingLoader if located else _Loader)(file.read())
    except OSError as error:
        raise UserError(f"cannot read {called}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{called} is not YAML: {reason(error)}") from error
    loader.name = os.path.basename(path)
    try:
        node = loader.get_single_node()
        _check_size(node, status.st_size, called)
        return loader.construct_document(node) if node is not None else None
    except yaml.YAMLError as error:
        raise UserError(f"{called} is not YAML: {reason(error)}") from error
    finally:
        loader.dispose()


def _check_size(node: yaml.Node | None, size: int, called: str) -> None:
    """Refuse aliases that repeat one another again and again, or what they are in."""
    room = MOST_VALUES + size
    waiting = [node]
    while waiting:
        each = waiting.pop()
        parts = each.value if isinstance(each, (yaml.MappingNode, yaml.SequenceNode)) else []
        room -= 1 + len(parts)
        if room < 0:
            raise UserError(f"{called} repeats its anchors (&) again and again: write out what is meant")
        waiting += [part for pair in parts for part in pair] if isinstance(each, yaml.MappingNode) else parts
