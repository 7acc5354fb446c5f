"""Options of OpenVINO's runners: what may be given, and what is in force for a bundle on this machine."""

from __future__ import annotations

from dataclasses import dataclass

from dijiang_engines.errors import UsageError
from dijiang_engines.formats.bundle import Bundle
from dijiang_engines.formats.manifest import WEIGHTS
from dijiang_engines.machine import available_memory, container_threads

CPU, GPU = "openvino-cpu", "openvino-gpu"
DEVICES = {CPU: "CPU", GPU: "GPU"}
"""OpenVINO's own name for what each runner runs on."""

MOST_FIXED = 4
"""Batch sizes that get a step of their own, unless something else is asked for."""
_SHARE = 0.25
"""Of the memory that is free, for the weights of those steps."""


@dataclass(frozen=True)
class OvOptions:
    """How a bundle shall run on OpenVINO; `OvRunner` says what each means.

    Raises:
        UsageError: an unknown value.
    """

    threads: int | None = None
    fixed_batches: int | None = None

    def __post_init__(self) -> None:
        for what, value, least in (
            ("the number of threads", self.threads, 1),
            ("the number of fixed batches", self.fixed_batches, 0),
        ):
            if value is not None and (isinstance(value, bool) or value < least):
                raise UsageError(f"{what} must be at least {least}", got=value)


@dataclass(frozen=True)
class OvConfig:
    """What is in force: every default resolved for one bundle on this machine."""

    name: str
    """CPU or GPU."""
    threads: int
    """0: OpenVINO chooses."""
    fixed_batches: int

    @property
    def device(self) -> str:
        """OpenVINO's name of it."""
        return DEVICES[self.name]

    @property
    def properties(self) -> dict[str, str | int | bool]:
        """What OpenVINO is told when it compiles a graph.

        Everything is computed in float32, whatever the bundle's type: left to itself OpenVINO takes bfloat16
        on CPUs that have it, and float16 on a GPU, and what it takes goes for state and decay too, which are
        float32 in every bundle (docs/mathematics.md). Nor are activations rounded to int8 before products of
        quantised matrices (DYNAMIC_QUANTIZATION_GROUP_SIZE).
        """
        found: dict[str, str | int | bool] = {
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": "1",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
        }
        if self.name == CPU:
            # Pinned threads of two processes sit on the same cores, however many are free.
            found |= {"ENABLE_CPU_PINNING": False, "INFERENCE_NUM_THREADS": self.threads}
        return found


def resolve(options: OvOptions, bundle: Bundle, name: str) -> OvConfig:
    """Put what suits bundle and machine where an option was left open.

    Args:
        options: what was given.
        bundle: an opened bundle.
        name: CPU or GPU.
    """
    fixed = options.fixed_batches
    if fixed is None:
        fixed = min(MOST_FIXED, int(_SHARE * min(available_memory(), 2.0**60) / weight_bytes(bundle)))
    return OvConfig(name, container_threads() if options.threads is None else options.threads, fixed)


def widens(bundle: Bundle) -> bool:
    """Whether OpenVINO holds float32 of weights that are float16 or bfloat16 in the file."""
    return bundle.weight_format == "float" and bundle.dtype != "float32"


def weight_bytes(bundle: Bundle) -> int:
    """What the weights of one compiled graph take in memory, about."""
    return bundle.files[WEIGHTS].bytes * (2 if widens(bundle) else 1)
