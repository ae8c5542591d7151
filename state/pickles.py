"""Files of others, before they are believed: what their pickle asks for, and how much comes of it.

torch reads a pickle without running code. A small file can still make it fill the memory, or compute hashes without
end; and what it refuses may be an intact file of something else. Numpy's numbers are read as Python's.
"""

from __future__ import annotations

import argparse
import pickletools
import re
import warnings
from collections import OrderedDict
from collections.abc import Collection
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

MOST_NODES = 10**6  # of what is read, beside one for each byte of the pickle; shared ones count each time
MOST_SHARED = 10**5  # of one tuple, which may be the key of a dict
DEEPEST = 100
SMALL = 2**20  # bytes that a tensor may have beyond those of its storage
LEGACY_PICKLES = 5  # at the start of a file of torch's older format: magic number, protocol, system, content, keys

DTYPES = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz),
    *(torch.complex128, torch.complex64),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.bool),
    *(torch.uint64, torch.uint32, torch.uint16, torch.uint8),
}
NUMBERS = re.compile(r"[<>=|]?(b1|f[248]|[iu][1248]|[SU]\d{1,4})")  # numpy's codes of what is read
# Functions that a pickle may name of which torch makes what is of no use here, or fills the memory
REFUSED = {
    "bytearray": "a bytearray",
    "_rebuild_sparse_tensor": "a sparse tensor",
    "_rebuild_meta_tensor_no_storage": "a meta tensor",
    "_rebuild_qtensor": "a quantized tensor",
    "_rebuild_nested_tensor": "a nested tensor",
    "_rebuild_wrapper_subclass": "a tensor of another class",
}
# What stands in a pickle for a type that people know by another name
KNOWN_AS = {"_reconstruct": "numpy.ndarray", "_reconstructor": "object"}


class NotPlain(Exception):
    """An intact file holds more than plain data. The message names what."""


class Unbounded(Exception):
    """A file asks for more than there is in it. The message says of what."""


# ------------------------------------------------------------------------------------------------------------
# Before it is read


def survey(file: IO[bytes], pickles: int = 1) -> int:
    """Look through the pickle that a file begins with, or several, and execute nothing.

    Returns: its bytes.
    Raises:
        NotPlain: it is of a newer protocol than torch reads, or holds tensors that are not dense, or bytearrays.
        Unbounded: it makes tuples that contain one another again and again.
        ValueError: it is damaged.
    """
    start = file.tell()
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)  # of a text with an escape that is none
        try:
            for _ in range(pickles):
                _survey_one(file)
        except DeprecationWarning as error:
            raise ValueError(f"damaged text: {error}") from error
    return file.tell() - start


def _survey_one(file: IO[bytes]) -> None:
    stack: list[Any] = []  # of each value how many it is made of, and how deep; the name, if it is a global
    memo: dict[int, Any] = {}
    argument: Any
    for opcode, argument, _ in pickletools.genops(file):
        name = opcode.name
        if name == "PROTO" and argument > 3:
            raise NotPlain(f"a pickle of protocol {argument}, of which torch reads 2")
        if name == "GLOBAL":
            kind = str(argument).partition(" ")[2]
            if kind in REFUSED:
                raise NotPlain(REFUSED[kind])
            stack.append(kind)
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "MARK":
            stack.append(None)
        elif name not in ("PROTO", "STOP"):
            _apply(opcode, stack)


def _apply(opcode: pickletools.OpcodeInfo, stack: list[Any]) -> None:
    """Take from the stack what an operation takes, and put there how much it makes of it.

    Tuples alone are watched: they can be keys, whose hashes are computed while the file is read.
    """
    taken = [each for each in opcode.stack_before if each not in (pickletools.markobject, pickletools.stackslice)]
    values: list[Any] = []
    if pickletools.markobject in opcode.stack_before:
        while (value := stack.pop()) is not None:
            values.append(value)
    values += [stack.pop() for _ in taken]
    if opcode.name in ("REDUCE", "NEWOBJ") and not isinstance(values[-1], str):
        raise ValueError("a call of what is no function")
    size, depth = 1, 1
    if opcode.name.startswith("TUPLE"):
        sizes = [value for value in values if isinstance(value, tuple)]
        size += sum(each[0] for each in sizes)
        depth += max((each[1] for each in sizes), default=0)
    if size > MOST_SHARED or depth > DEEPEST:
        raise Unbounded("tuples that contain one another again and again")
    stack += [(size, depth)] * len(opcode.stack_after)


def in_the_way(error: BaseException) -> str:
    """What torch did not read, by its error; '' for an error of another kind."""
    text = str(error)
    if found := re.search(r"GLOBAL (\S+)", text):
        return KNOWN_AS.get(found[1].rpartition(".")[2], found[1])
    if found := re.search(r"to load (nested jagged tensors|DTensors)", text):
        return found[1]
    return "a pickle of another form than torch's" if "Unsupported operand" in text else ""


# ------------------------------------------------------------------------------------------------------------
# Numpy's numbers


class NumpyType:
    """Stands for numpy.dtype while a file is read; knows numbers and texts alone."""

    def __init__(self, code: Any, *_: Any) -> None:
        if not isinstance(code, str) or not NUMBERS.fullmatch(code):
            raise NotPlain(f"numpy's {code if isinstance(code, str) else 'type'}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


def numpy_number(kind: Any, content: Any = b"") -> Any:
    """Stands for numpy's function that makes a number of bytes: makes one of Python's."""
    if not isinstance(kind, NumpyType) or not isinstance(content, bytes):
        raise NotPlain("a numpy object")
    if len(content) != kind.dtype.itemsize:
        raise ValueError("a number with too many bytes, or too few")
    return np.frombuffer(content, kind.dtype)[0].item()


# What a checkpoint may name beside what torch allows; the reference's has its flags in a Namespace.
GLOBALS: list[Any] = [
    argparse.Namespace,
    (NumpyType, "numpy.dtype"),
    (numpy_number, "numpy.core.multiarray.scalar"),
    (numpy_number, "numpy._core.multiarray.scalar"),
]


# ------------------------------------------------------------------------------------------------------------
# Once it is read


def check_bounds(state: Any, pickle_bytes: int, file_bytes: int | None) -> None:
    """Refuse what has more parts than its file can hold, or tensors that are not dense and in host memory.

    Attributes that a file hangs on tensors and dicts are dropped: they could stand in place of their methods.

    Args:
        state: what was read.
        pickle_bytes: of which its parts were made.
        file_bytes: all of it; None if tensors were read without their values.
    Raises:
        NotPlain, Unbounded: as `survey`.
    """
    room = MOST_NODES + pickle_bytes
    storages: dict[int, int] = {}
    waiting: list[tuple[Any, Any]] = [(state, None)]  # a value, and where it is: (key, where that is, how deep)
    while waiting:
        value, where = waiting.pop()
        depth = where[2] + 1 if where is not None else 0
        items = _items(value)
        room -= 1 + len(items)
        if room < 0:
            raise Unbounded("lists that contain one another again and again")
        if depth > DEEPEST:
            raise Unbounded(f"lists in lists, deeper than {DEEPEST}")
        waiting += [(item, (key, where, depth)) for key, item in items]
        if isinstance(value, Tensor) and file_bytes is not None:
            storage = _check_tensor(value, where)
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, NumpyType):
            raise NotPlain("numpy.dtype")
    if file_bytes is not None and sum(storages.values()) > file_bytes:
        raise Unbounded("tensors of more values than it has")


def _items(value: Any) -> Collection[tuple[Any, Any]]:
    """Keys and values of what contains others, without any other attributes that it has."""
    if isinstance(value, OrderedDict):
        vars(value).clear()
    if isinstance(value, argparse.Namespace):
        return vars(value).items()
    if isinstance(value, dict):
        return value.items()
    return tuple(enumerate(value)) if isinstance(value, (list, tuple, set)) else ()


def _check_tensor(tensor: Tensor, where: Any) -> torch.UntypedStorage:
    """The storage of a tensor that is dense, in host memory, and not much larger than that."""
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        raise NotPlain(f"a {type(tensor).__name__} {_place(where)}")
    vars(tensor).clear()
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        raise NotPlain(f"a {'sparse' if tensor.is_sparse else tensor.device.type} tensor {_place(where)}")
    if tensor.dtype not in DTYPES or tensor.is_conj() or tensor.is_neg():
        raise NotPlain(f"a tensor of type {tensor.dtype} {_place(where)}")
    storage = tensor.untyped_storage()
    if tensor.nbytes > storage.nbytes() + SMALL:
        raise Unbounded(f"a tensor of more values than it has {_place(where)}")
    return storage


def _place(where: Any) -> str:
    """'at model, head.weight', from the links that lead there."""
    keys: list[str] = []
    while where is not None:
        keys.append(str(where[0]) if isinstance(where[0], (str, int)) else "a key")
        where = where[1]
    return f"at {', '.join(reversed(keys))}" if keys else "alone"
