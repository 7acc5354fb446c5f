"""What the process that builds a plan is asked for: written by `run_worker`, read by `worker`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from dijiang_engines.building.recipes import PRODUCTS, STEPS
from dijiang_engines.errors import BundleError, RunnerError
from dijiang_engines.formats.safe_files import parse_json, read_bounded
from dijiang_engines.io_names import INPUT_IDS
from dijiang_engines.nvidia.tensorrt_versions import RUNTIMES, TENSORRT
from dijiang_engines.op_contract import T_TYPES
from dijiang_engines.spec import ModelSpec
from dijiang_engines.weight_formats import Matrix, matrices

Profile = dict[str, list[list[int]]]
"""Input -> its least, best and most shape."""

_PATHS = ("onnx", "plan", "plugin", "timing_cache")
_OPTIONAL = ("plugin", "timing_cache")
_MOST_BYTES = 16 << 20  # a thousand layers take 0.2 MB
_MOST_LEVEL = 5  # NvInfer.h, setBuilderOptimizationLevel


@dataclass(frozen=True)
class BuildRequest:
    """One plan to build.

    Raises:
        RunnerError: a field has a value that no build can have.
    """

    onnx: Path
    """The graph, its weights beside it."""
    plan: Path
    """Is written; must not exist."""
    plugin: Path | None
    """Library of the plugin for this TensorRT; None: the graph is of standard operators."""
    dtype: str
    """Of the graph's activations: one of `op_contract.T_TYPES`."""
    profiles: list[Profile]
    """One or more, all with the same inputs."""
    workspace: int
    """Bytes of device memory that kernels may use while they run."""
    optimization_level: int
    """0 to 5."""
    timing_cache: Path | None
    """Read if it is there, and written; None: every kernel is measured anew."""
    device: int
    """Index of the GPU; of no interest if `capabilities` are named."""
    plugin_products: bool
    """Are matrix products to be the plugin's?"""
    step: str = PRODUCTS
    """One of `recipes.STEPS`: is the plan to be one launch of the plugin's?"""
    spec: ModelSpec | None = None
    """The model, if it may be."""
    matrices: Mapping[str, str] | None = None
    """Stored matrix -> int8 or int4 (`weight_formats`), if the weights of that model are quantised."""
    runtime: str = TENSORRT
    """Who builds: a key of `tensorrt_versions.RUNTIMES`."""
    capabilities: tuple[int, ...] = ()
    """Compute capabilities that the plan is for, as 10 * major + minor, where the builder needs no GPU."""

    @property
    def quantised(self) -> Mapping[str, Sequence[Matrix]] | None:
        """Canonical name -> stored matrices, as of a bundle's manifest."""
        if self.matrices is None or self.spec is None:
            return None
        return matrices(self.spec, self.matrices)

    @property
    def most_rows(self) -> int:
        """Rows of the widest call: sequences times tokens."""
        return max(self._rows)

    @property
    def step_rows(self) -> int:
        """Of the profile with the fewest: of a step's widest call, where the plan has steps."""
        return min(self._rows)

    @property
    def _rows(self) -> list[int]:
        return [math.prod(profile[INPUT_IDS][-1]) for profile in self.profiles]

    def __post_init__(self) -> None:
        for name in _PATHS:
            value = getattr(self, name)
            if not isinstance(value, Path) and not (value is None and name in _OPTIONAL):
                raise _wrong(name, value, "a path")
        if self.dtype not in T_TYPES:
            raise _wrong("dtype", self.dtype, " or ".join(T_TYPES))
        for name, least in (("workspace", 1), ("optimization_level", 0), ("device", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise _wrong(name, value, f"a whole number, {least} or more")
        if self.optimization_level > _MOST_LEVEL:
            raise _wrong("optimization_level", self.optimization_level, f"at most {_MOST_LEVEL}")
        if not isinstance(self.runtime, str) or self.runtime not in RUNTIMES:
            raise _wrong("runtime", self.runtime, " or ".join(RUNTIMES))
        numbers = self.capabilities
        if not isinstance(numbers, tuple) or any(type(n) is not int or not 0 < n < 1000 for n in numbers):
            raise _wrong("capabilities", numbers, "numbers such as 86")
        if type(self.plugin_products) is not bool:
            raise _wrong("plugin_products", self.plugin_products, "true or false")
        if not isinstance(self.step, str) or self.step not in STEPS:
            raise _wrong("step", self.step, " or ".join(STEPS))
        if (self.spec is None) != (self.step == PRODUCTS) or not isinstance(self.spec, ModelSpec | None):
            raise _wrong("spec", self.spec, "the model of a step in one launch, and of no other")
        if self.matrices is not None:
            self._check_matrices()
        if not isinstance(self.profiles, list) or not self.profiles:
            raise _wrong("profiles", self.profiles, "one or more")
        for profile in self.profiles:
            _check_profile(profile)
        if any(profile.keys() != self.profiles[0].keys() for profile in self.profiles):
            raise _wrong("profiles", [sorted(p) for p in self.profiles], "the same inputs in each")

    def _check_matrices(self) -> None:
        expected = "the formats of all matrices of the model of a step in one launch"
        named = self.matrices
        if (
            self.spec is None
            or not isinstance(named, Mapping)
            or not all(map(_is_text, (*named, *named.values())))
        ):
            raise _wrong("matrices", named, expected)
        assert named is not None
        try:
            matrices(self.spec, named)
        except ValueError as error:
            raise _wrong("matrices", error, expected) from error

    def to_json(self) -> dict[str, Any]:
        """For the request file."""
        values = asdict(self) | {"spec": None if self.spec is None else self.spec.to_json()}
        return values | {name: None if values[name] is None else str(values[name]) for name in _PATHS}

    @classmethod
    def from_json(cls, data: object) -> BuildRequest:
        """What `to_json` gave.

        Raises:
            RunnerError: it is something else.
        """
        names = {field.name for field in fields(cls)}
        if not isinstance(data, Mapping) or data.keys() != names:
            got = sorted(data) if isinstance(data, Mapping) else type(data).__name__
            raise _wrong("the request", got, ", ".join(sorted(names)))
        paths = {name: Path(data[name]) if isinstance(data[name], str) else data[name] for name in _PATHS}
        numbers = data["capabilities"]
        capabilities = tuple(numbers) if isinstance(numbers, list) else numbers
        try:
            spec = None if data["spec"] is None else ModelSpec.from_json(data["spec"])
        except BundleError as error:
            raise _wrong("spec", error.got, error.what) from error
        return cls(**(dict(data) | paths | {"capabilities": capabilities, "spec": spec}))

    def write(self, path: Path) -> None:
        """Into a file for the worker."""
        path.write_text(json.dumps(self.to_json()), encoding="utf-8")


def read_request(path: Path) -> BuildRequest:
    """What `BuildRequest.write` wrote.

    Raises:
        RunnerError: the file is missing, or is something else.
    """
    data = read_bounded(path, _MOST_BYTES, error=RunnerError)
    return BuildRequest.from_json(parse_json(data, str(path), error=RunnerError))


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _check_profile(profile: object) -> None:
    if not isinstance(profile, dict) or not profile:
        raise _wrong("profiles", profile, "the shapes of every input")
    for name, shapes in profile.items():
        expected = "three shapes of one rank, each size at least 1 and none smaller than before"
        if not isinstance(name, str) or not isinstance(shapes, list) or len(shapes) != 3:
            raise _wrong(f"profile of {name}", shapes, expected)
        sizes = [size for shape in shapes for size in (shape if isinstance(shape, list) else [None])]
        whole = all(type(size) is int and size >= 1 for size in sizes)
        if not whole or len({len(shape) for shape in shapes}) != 1:
            raise _wrong(f"profile of {name}", shapes, expected)
        if any(not least <= best <= most for least, best, most in zip(*shapes, strict=True)):
            raise _wrong(f"profile of {name}", shapes, expected)


def _wrong(what: str, got: object, expected: str) -> RunnerError:
    return RunnerError(
        f"the builder was asked for something odd: {what}", got=str(got)[:200], expected=expected
    )
