"""Descriptions of tensors in PyTorch's pickles, read without unpickling.

A pickle is a program for a stack machine (Lib/pickletools.py describes every operation). This machine knows
the few that torch.save needs to write a state_dict, calls nothing, and makes nothing but numbers, strings,
lists, tuples, dictionaries and records of what a tensor is said to be. Of the functions that a pickle may
name it understands five (_CALLS); whatever else it names is refused by its name. Work and memory are bounded
by the pickle's length and MOST_OPERATIONS; nothing is hashed but short strings and numbers.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from dijiang_export.checkpoint.stored import MOST_DIMENSIONS, MOST_NAME

MOST_OPERATIONS = 2_000_000
"""About 30 make a tensor, so that this is enough for 60,000 of them."""

_MOST_MARKS = 1000  # open at once: containers in containers
_MOST_PAIRS = 200_000

STORAGE_TYPES: Mapping[str, str] = MappingProxyType(
    {
        "Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16",
        "Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool",
        "ComplexDouble": "complex128", "ComplexFloat": "complex64", "Untyped": "uint8",
    }
)  # fmt: skip
"""Names of torch's storage classes without "Storage" -> type of an element (torch/storage.py,
_dtype_to_storage_type_map). Quantised ones come with a function that is refused."""

NEW_TYPES = frozenset(
    {
        "uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz",
        "float8_e8m0fnu", "float4_e2m1fn_x2",
    }
)  # fmt: skip
"""Types without a storage class of their own (torch/storage.py, _new_dtypes): _rebuild_tensor_v3 has them."""


class ForeignPickle(Exception):
    """A pickle that wants something run; the first argument is its name."""


class BrokenPickle(Exception):
    """A pickle that makes no sense, or is none; the first argument says why."""


@dataclass(frozen=True)
class Storage:
    """A run of `count` elements that is kept under `key`."""

    dtype: str
    key: str
    count: int


@dataclass(frozen=True)
class Described:
    """A tensor as a pickle describes it: a view of a storage. Offset and strides count elements."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class _Function:
    """The name of something to call."""

    name: str


def read_pickle(data: bytes, at: int = 0) -> tuple[Any, int]:
    """The value that the pickle at `at` describes, and where it ends.

    Returns:
        Numbers, str, None, list, tuple, dict (for OrderedDict too), `Storage` and `Described`; the offset
        behind the pickle's last byte.

    Raises:
        ForeignPickle: it names something that is not part of weights.
        BrokenPickle: anything else that torch.save does not write.
    """
    return _Machine(data, at).run()


class _Machine:
    def __init__(self, data: bytes, at: int) -> None:
        self.data, self.at = data, at
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # stacks under each mark
        self.memo: dict[int, Any] = {}
        self.copied = 0  # pairs given to OrderedDict: one list can be given to it again and again

    def run(self) -> tuple[Any, int]:
        try:
            for _ in range(MOST_OPERATIONS):
                code = self.data[self.at]
                self.at += 1
                if code == _STOP:
                    return self.stack.pop(), self.at
                operation = _OPERATIONS.get(code)
                if operation is None:
                    raise BrokenPickle(f"operation 0x{code:02x}, which weights do not need")
                operation(self)
        except (IndexError, KeyError, struct.error):
            raise BrokenPickle("a description that ends too early, or uses what is not there") from None
        except UnicodeDecodeError:
            raise BrokenPickle("text that is not UTF-8") from None
        raise BrokenPickle(f"more than {MOST_OPERATIONS} operations")

    # Reading arguments

    def number(self, form: struct.Struct) -> Any:
        (value,) = form.unpack_from(self.data, self.at)
        self.at += form.size
        return value

    def raw(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise IndexError
        self.at += count
        return self.data[self.at - count : self.at]

    def line(self) -> str:
        end = self.data.find(b"\n", self.at, self.at + MOST_NAME)
        if end < 0:
            raise BrokenPickle("a name without an end")
        text = self.data[self.at : end].decode("utf-8")
        self.at = end + 1
        return text

    # Operations

    def protocol(self) -> None:
        version = self.number(_U8)
        if not 2 <= version <= 5:
            raise BrokenPickle(f"protocol {version}")

    def text(self, form: struct.Struct) -> None:
        # As pickle and PyTorch's own reader decode it.
        self.stack.append(self.raw(self.number(form)).decode("utf-8", "surrogatepass"))

    def long(self) -> None:
        self.stack.append(int.from_bytes(self.raw(self.number(_U8)), "little", signed=True))

    def name_function(self, name: str) -> None:
        known = name in _CALLS or _storage_type(name) or name.removeprefix("torch.") in NEW_TYPES
        if not known:
            raise ForeignPickle(name)
        self.stack.append(_Function(name))

    def named_function(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not (type(name) is str and type(module) is str and len(module) + len(name) < MOST_NAME):
            raise BrokenPickle("a function whose name is no text")
        self.name_function(f"{module}.{name}")

    def call(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, _Function) or type(arguments) is not tuple:
            raise BrokenPickle("a call of something that is no function")
        handler = _CALLS.get(function.name)
        if handler is None:
            raise ForeignPickle(function.name)
        if arguments and type(arguments[0]) is list:
            self.copied += len(arguments[0])
            if self.copied > _MOST_PAIRS:
                raise BrokenPickle(f"more than {_MOST_PAIRS} pairs for OrderedDict")
        self.stack.append(handler(arguments))

    def build(self) -> None:
        """The state of an object: a state_dict's _metadata, which is not needed."""
        self.stack.pop()
        if type(self.stack[-1]) is not dict:
            raise BrokenPickle("a state for something that has none")

    def storage(self) -> None:
        self.stack.append(_storage(self.stack.pop()))

    def mark(self) -> None:
        if len(self.below) == _MOST_MARKS:
            raise BrokenPickle(f"more than {_MOST_MARKS} open marks")
        self.below.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return items

    def tuple_since_mark(self) -> None:
        items = self.since_mark()
        self.stack.append(tuple(items))

    def tuple_of(self, count: int) -> None:
        if count > len(self.stack):
            raise IndexError
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def append(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            raise BrokenPickle("an element for something that is no list")
        target.extend(items)

    def set_items(self, items: list[Any]) -> None:
        if len(items) % 2:
            raise BrokenPickle("a key without a value")
        _fill(self.stack[-1], zip(items[::2], items[1::2], strict=True))

    def set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items([key, value])

    def remember(self, index: int) -> None:
        self.memo[index] = self.stack[-1]


def _fill(target: Any, pairs: Any) -> None:
    if type(target) is not dict:
        raise BrokenPickle("an entry for something that is no dictionary")
    for key, value in pairs:
        if type(key) not in (str, int, float, bool, type(None)):
            raise BrokenPickle("a key that is neither text nor a number")
        if type(key) is str and len(key) > MOST_NAME:
            raise BrokenPickle(f"a name of {len(key)} characters")
        target[key] = value


def _ordered_dict(arguments: tuple[Any, ...]) -> dict[Any, Any]:
    """OrderedDict(), or OrderedDict([[key, value], ...]) as Python 2 pickles it."""
    out: dict[Any, Any] = {}
    if arguments:
        (pairs,) = arguments if len(arguments) == 1 else (None,)
        if type(pairs) is not list or not all(type(p) in (list, tuple) and len(p) == 2 for p in pairs):
            raise BrokenPickle("an OrderedDict of something other than pairs")
        _fill(out, pairs)
    return out


def _storage_type(name: str) -> str | None:
    match = re.fullmatch(r"torch\.(?:cuda\.|storage\.)?(\w+)Storage", name)
    return STORAGE_TYPES.get(match[1]) if match else None


def _storage(identity: Any) -> Storage:
    """("storage", type, key, device, count), and None as sixth in the old format (torch/serialization.py)."""
    plain = type(identity) is tuple and len(identity) in (5, 6) and identity[5:] in ((), (None,))
    if not plain or identity[0] != "storage":
        raise BrokenPickle("a reference to something that is no storage")
    _, kind, key, _, count = identity[:5]
    dtype = _storage_type(kind.name) if isinstance(kind, _Function) else None
    if dtype is None or type(key) is not str or len(key) > MOST_NAME or not _is_size(count):
        raise BrokenPickle("a storage without type, key or size")
    return Storage(dtype, key, count)


def _tensor(arguments: tuple[Any, ...]) -> Described:
    """torch._utils._rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks, metadata=None)."""
    if not 6 <= len(arguments) <= 7 or (len(arguments) == 7 and arguments[6]):
        raise BrokenPickle("a tensor with something more: conjugated or negated lazily")
    return _view(arguments, None)


def _typed_tensor(arguments: tuple[Any, ...]) -> Described:
    """torch._utils._rebuild_tensor_v3: the same of an untyped storage, with the type as seventh argument."""
    kind = arguments[6] if len(arguments) == 7 else None
    name = kind.name.removeprefix("torch.") if isinstance(kind, _Function) else ""
    if name not in NEW_TYPES:
        raise BrokenPickle("a tensor of an unknown type")
    return _view(arguments, name)


def _view(arguments: tuple[Any, ...], dtype: str | None) -> Described:
    storage, offset, shape, strides = arguments[:4]
    good = isinstance(storage, Storage) and _is_size(offset) and _are_sizes(shape) and _are_sizes(strides)
    if not good or len(shape) != len(strides):
        raise BrokenPickle("a tensor without storage, shape or strides")
    return Described(storage, dtype or storage.dtype, offset, shape, strides)


def _parameter(arguments: tuple[Any, ...]) -> Described:
    """torch._utils._rebuild_parameter(data, requires_grad, hooks), and state as fourth in ..._with_state."""
    if not 3 <= len(arguments) <= 4 or not isinstance(arguments[0], Described):
        raise BrokenPickle("a parameter that is no tensor")
    return arguments[0]


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _are_sizes(values: Any) -> bool:
    return type(values) is tuple and len(values) <= MOST_DIMENSIONS and all(_is_size(v) for v in values)


_CALLS: Mapping[str, Callable[[tuple[Any, ...]], Any]] = MappingProxyType(
    {
        "collections.OrderedDict": _ordered_dict,
        "torch._utils._rebuild_tensor_v2": _tensor,
        "torch._utils._rebuild_tensor_v3": _typed_tensor,
        "torch._utils._rebuild_parameter": _parameter,
        "torch._utils._rebuild_parameter_with_state": _parameter,
    }
)

_U8, _U16, _U32, _U64 = (struct.Struct(f) for f in ("<B", "<H", "<I", "<Q"))
_I32, _F64 = struct.Struct("<i"), struct.Struct(">d")
_STOP = ord(".")

_OPERATIONS: Mapping[int, Callable[[_Machine], None]] = MappingProxyType(
    {
        0x80: _Machine.protocol,
        0x95: lambda m: m.number(_U64),  # FRAME: a hint for reading from slow files
        ord("("): _Machine.mark,
        ord("N"): lambda m: m.stack.append(None),
        0x88: lambda m: m.stack.append(True),
        0x89: lambda m: m.stack.append(False),
        ord("J"): lambda m: m.stack.append(m.number(_I32)),
        ord("K"): lambda m: m.stack.append(m.number(_U8)),
        ord("M"): lambda m: m.stack.append(m.number(_U16)),
        0x8A: _Machine.long,  # LONG1
        ord("G"): lambda m: m.stack.append(m.number(_F64)),
        ord("X"): lambda m: m.text(_U32),  # BINUNICODE
        0x8C: lambda m: m.text(_U8),  # SHORT_BINUNICODE
        ord("U"): lambda m: m.text(_U8),  # SHORT_BINSTRING: Python 2's str
        ord("T"): lambda m: m.text(_U32),  # BINSTRING
        ord(")"): lambda m: m.stack.append(()),
        ord("t"): _Machine.tuple_since_mark,
        0x85: lambda m: m.tuple_of(1),
        0x86: lambda m: m.tuple_of(2),
        0x87: lambda m: m.tuple_of(3),
        ord("]"): lambda m: m.stack.append([]),
        ord("a"): lambda m: m.append([m.stack.pop()]),
        ord("e"): lambda m: m.append(m.since_mark()),
        ord("}"): lambda m: m.stack.append({}),
        ord("s"): _Machine.set_item,
        ord("u"): lambda m: m.set_items(m.since_mark()),
        ord("q"): lambda m: m.remember(m.number(_U8)),
        ord("r"): lambda m: m.remember(m.number(_U32)),
        0x94: lambda m: m.remember(len(m.memo)),  # MEMOIZE
        ord("h"): lambda m: m.stack.append(m.memo[m.number(_U8)]),
        ord("j"): lambda m: m.stack.append(m.memo[m.number(_U32)]),
        ord("c"): lambda m: m.name_function(f"{m.line()}.{m.line()}"),  # GLOBAL
        0x93: _Machine.named_function,  # STACK_GLOBAL
        ord("R"): _Machine.call,
        ord("Q"): _Machine.storage,  # BINPERSID
        ord("b"): _Machine.build,
    }
)
