"""TensorRT's real Python bindings without TensorRT.

The bindings need libnvinfer only to make objects. Classes, enumerations, properties and the signatures in
their docstrings are there without it. So empty libraries let them be imported, and a `Strict` object stands
for one that TensorRT would make: what its class does not have is an AttributeError, and a call that fits none
of the method's signatures a TypeError. It proves orchestration only: nothing is built and nothing runs.
"""

from __future__ import annotations

import ctypes
import inspect
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

_SIGNATURE = r"^(?:\d+\. )?{name}\((.*)\) -> (.+?)\s*$"
_NUMBER = ("int", "typing.SupportsInt", "typing.SupportsIndex")
_PLAIN = {"str": str, "bool": bool, "tuple": tuple, "list": list, "bytes": bytes}
_BUFFER = ("buffer", "typing_extensions.Buffer", "collections.abc.Buffer")


# -- the libraries -------------------------------------------------------------------------------------


def write_stubs(bindings: Path, number: int, folder: Path) -> None:
    """Write empty libraries under the names that `bindings`, a tensorrt.so, asks for.

    Args:
        bindings: the extension module.
        number: what getInferLibVersion() of the empty libnvinfer says.
        folder: goes into LD_LIBRARY_PATH.

    Raises:
        subprocess.CalledProcessError, FileNotFoundError: no C compiler, or no binutils.
    """
    dynamic = _output("readelf", "--dynamic", "--wide", str(bindings))
    libraries = [n for n in re.findall(r"NEEDED.*\[(.+)\]", dynamic) if n.startswith("libnv")]
    symbols = _output("nm", "--dynamic", "--undefined-only", str(bindings))
    here = ctypes.CDLL(None)  # what Python and libc have must not be shadowed
    wanted = [n for n in re.findall(r"^\s+U (\w+)$", symbols, re.MULTILINE) if not hasattr(here, n)]
    folder.mkdir(parents=True)
    source = folder / "stub.c"
    for library in libraries:
        lines = [f"void *{name}(void) {{ return 0; }}" for name in wanted]
        if library.startswith("libnvinfer.so"):
            lines.append(f"int getInferLibVersion(void) {{ return {number}; }}")
        source.write_text("\n".join(lines) + "\n")
        options = ["-shared", "-fPIC", "-w", f"-Wl,-soname,{library}", "-o", str(folder / library)]
        _output("cc", *options, str(source))


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


# -- signatures ----------------------------------------------------------------------------------------


class Signature:
    """One line of a docstring, such as "set_input_shape(self: I, name: str, shape: Dims) -> bool"."""

    def __init__(self, arguments: str, returns: str) -> None:
        self.returns = returns
        self.text = f"({arguments}) -> {returns}"
        self.parameters: list[tuple[str, str, bool]] = []
        """Name, annotation and whether there is a default."""
        for part in _split(arguments):
            name, _, rest = part.partition(":")
            kind, equals, _ = rest.partition(" = ")
            self.parameters.append((name.strip(), kind.strip(), bool(equals)))
        if self.parameters and self.parameters[0][0] in ("self", "arg0"):  # every function here is a method
            del self.parameters[0]

    def refuses(self, module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> str | None:
        """Why a call does not fit, or None."""
        if len(arguments) > len(self.parameters):
            return f"{len(arguments)} arguments"
        names = [name for name, _, _ in self.parameters]
        given = dict(zip(names, arguments, strict=False))
        for name, value in keywords.items():
            if name not in names or name in given:
                return f"argument {name}"
            given[name] = value
        for name, kind, default in self.parameters:
            if name in given:
                if not _is_a(module, given[name], kind):
                    return f"{name}: {kind} is given {type(given[name]).__name__}"
            elif not default:
                return f"no {name}"
        return None


def signatures(function: Any) -> list[Signature]:
    """All overloads of a bound function; none for what is written in Python."""
    pattern = _SIGNATURE.format(name=re.escape(getattr(function, "__name__", "")))
    found = re.findall(pattern, function.__doc__ or "", re.MULTILINE)
    return [Signature(a, r) for a, r in found if a != "*args, **kwargs"]


def _split(text: str) -> Iterator[str]:
    """At the commas outside of brackets."""
    depth, start = 0, 0
    for index, letter in enumerate(text):
        depth += letter in "[(<{"
        depth -= letter in "])>}"
        if letter == "," and depth == 0:
            yield text[start:index]
            start = index + 1
    if text[start:].strip():
        yield text[start:]


def _class(module: Any, annotation: str) -> Any:
    """The bindings' class of that name, or None."""
    if not re.fullmatch(r"tensorrt\w*\.tensorrt\.[\w.]+", annotation):
        return None
    found = module
    for part in annotation.split(".")[2:]:
        found = getattr(found, part, None)
    return found if inspect.isclass(found) else None


def _is_a(module: Any, value: Any, annotation: str) -> bool:
    if " | " in annotation:
        return any(_is_a(module, value, one) for one in annotation.split(" | "))
    if annotation in _NUMBER:
        return isinstance(value, (int, np.integer))
    if annotation in _PLAIN:
        return isinstance(value, _PLAIN[annotation])
    if annotation == "None":
        return value is None
    if annotation in _BUFFER:
        try:
            return memoryview(value) is not None
        except TypeError:
            return False
    kind = _class(module, annotation)
    if kind is None:
        return True  # an annotation that says too little
    if kind.__name__ in ("Dims", "Permutation"):  # made from any sequence of numbers
        return all(isinstance(size, (int, np.integer)) for size in value)
    if kind.__name__ == "PluginFieldCollection_":  # made from the vector that is called without the line
        return isinstance(value, module.PluginFieldCollection)
    return isinstance(value, kind)


# -- objects -------------------------------------------------------------------------------------------


class Calls:
    """What was used, of all objects together.

    Attributes:
        used: "Class.attribute" of everything that was read, called or set.
        made: (what, arguments) in order.
    """

    def __init__(self) -> None:
        self.used: set[str] = set()
        self.made: list[tuple[str, list[str]]] = []

    def arguments(self, what: str) -> list[list[str]]:
        """Of every call, or of every value that was set, as text."""
        return [arguments for name, arguments in self.made if name == what]


class Strict:
    """An object that has what the class `kind` of the bindings has, and nothing else.

    Args:
        module: the bindings.
        kind: one of its classes.
        calls: told of every use.
        values: attribute -> its value, or for a method what it gives (a function is called). "Class.name" is
            the name's value once the object is of that class. Other properties are None, other methods give
            True, 0, None or another Strict, as their signature says.

    Setting __class__ to a class above or below shows it as that, as the bindings' layers allow.
    """

    def __init__(self, module: Any, kind: Any, calls: Calls, **values: Any) -> None:
        for name in values:
            known = "." in name or hasattr(kind, name)
            assert known, f"{kind.__name__} has no {name}: the test is wrong"
        self.__dict__["_strict"] = (module, kind, calls, values)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return self.__dict__["_strict"][1]

    def __getattr__(self, name: str) -> Any:
        module, kind, calls, values = self.__dict__["_strict"]
        real = inspect.getattr_static(kind, name, None)
        if real is None or (name.startswith("__") and name not in values):
            raise AttributeError(f"{kind.__name__} of TensorRT {module.__version__} has no {name}")
        calls.used.add(f"{kind.__name__}.{name}")
        if isinstance(real, property) or not callable(getattr(kind, name)):
            return values.get(f"{kind.__name__}.{name}", values.get(name))
        return self._method(name)

    def __setattr__(self, name: str, value: Any) -> None:
        module, kind, calls, values = self.__dict__["_strict"]
        if name == "__class__":
            if not issubclass(value, kind) and not issubclass(kind, value):
                raise TypeError(f"a {kind.__name__} cannot be shown as a {value.__name__}")
            calls.used.add(value.__name__)
            self.__dict__["_strict"] = (module, value, calls, values)
            return
        real = inspect.getattr_static(kind, name, None)
        if not isinstance(real, property) or real.fset is None:
            raise AttributeError(f"{kind.__name__} of TensorRT {module.__version__} has no {name} to set")
        setter = signatures(real.fset)
        if setter and all(s.refuses(module, (value,), {}) for s in setter):
            raise TypeError(f"{kind.__name__}.{name} is {setter[0].text}, not {value!r}")
        calls.used.add(f"{kind.__name__}.{name}")
        calls.made.append((f"{kind.__name__}.{name}", [str(value)]))
        values[name] = value

    def _method(self, name: str) -> Callable[..., Any]:
        module, kind, calls, values = self.__dict__["_strict"]

        def call(*arguments: Any, **keywords: Any) -> Any:
            overloads = signatures(getattr(kind, name))
            reasons = [s.refuses(module, arguments, keywords) for s in overloads]
            if overloads and all(reasons):
                known = "; ".join(f"{s.text}: {r}" for s, r in zip(overloads, reasons, strict=True))
                raise TypeError(f"{kind.__name__}.{name} of TensorRT {module.__version__} takes {known}")
            texts = [str(a) for a in arguments] + [f"{k}={v}" for k, v in keywords.items()]
            calls.made.append((f"{kind.__name__}.{name}", texts))
            if name in values:
                value = values[name]
                return value(*arguments, **keywords) if inspect.isroutine(value) else value
            if not overloads:
                return None
            returns = overloads[reasons.index(None)].returns
            made = _class(module, returns)
            if made is not None and not hasattr(made, "__members__"):
                return Strict(module, made, calls)
            return {"bool": True, "int": 0, "typing.SupportsInt": 0}.get(returns)

        return call

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def __iter__(self) -> Iterator[Any]:
        kind, values = self.__dict__["_strict"][1], self.__dict__["_strict"][3]
        assert hasattr(kind, "__getitem__") and "num_layers" in values, f"{kind.__name__} is not iterable"
        return (self.get_layer(index) for index in range(values["num_layers"]))

    def __deepcopy__(self, memo: Any) -> Any:
        return self
