"""Options of ONNX Runtime's runners: what may be given, and what is in force for a bundle on this machine."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from dijiang_engines.errors import RunnerError, UsageError
from dijiang_engines.formats.bundle import Bundle
from dijiang_engines.formats.manifest import WEIGHTS
from dijiang_engines.machine import Spinning, available_memory, container_threads, spinning_choice
from dijiang_engines.runners.onnxruntime.providers import CPU, CUDA

Prepack = Literal["auto", "none", "step", "all", "wide"]
Optimization = Literal["all", "extended", "basic", "none"]
Lowering = Literal["auto", "standard", "ort", "ort-step", "capture"]
GraphName = Literal["prefill", "step"]
"""Which of a runner's two graphs; its file depends on the lowering."""

LOWERINGS = {
    "standard": ("prefill", "step"),
    "ort": ("prefill_ort", "step_ort"),
    "ort-step": ("prefill", "step_ort"),
    "capture": ("prefill", "step_capture"),
}
"""The prefill and the step graph that each lowering takes."""
_CUDA_ORDER = ("ort-step", "capture", "standard")
"""What "auto" takes on CUDA: the first that the bundle and ONNX Runtime have."""
OPTIMIZATIONS = {
    "all": "ORT_ENABLE_ALL", "extended": "ORT_ENABLE_EXTENDED", "basic": "ORT_ENABLE_BASIC",
    "none": "ORT_DISABLE_ALL",
}  # fmt: skip
"""ONNX Runtime's GraphOptimizationLevel for each level."""


@dataclass(frozen=True)
class OrtOptions:
    """How a bundle shall run on ONNX Runtime; `OrtRunner` says what each means.

    Raises:
        UsageError: an unknown value.
    """

    threads: int | None = None
    spinning: Spinning | None = None
    prepack: Prepack = "auto"
    optimization: Optimization = "all"
    device: int = 0
    lowering: Lowering = "auto"
    cuda_graph: bool | None = None

    def __post_init__(self) -> None:
        if self.threads is not None and (isinstance(self.threads, bool) or self.threads < 1):
            raise UsageError("the number of threads must be at least 1", got=self.threads)
        spinning_choice(self.spinning)
        if (
            self.optimization not in OPTIMIZATIONS
            or self.prepack not in get_args(Prepack)
            or self.lowering not in ("auto", *LOWERINGS)
        ):
            raise UsageError(
                "unknown value of an ONNX Runtime option",
                got=f"{self.optimization}, {self.prepack}, {self.lowering}",
            )


@dataclass(frozen=True)
class OrtConfig:
    """What is in force: every default resolved for one bundle on this machine."""

    name: str
    """CPU, CUDA or RTX."""
    threads: int
    """Of one operator; 0: ONNX Runtime chooses."""
    spinning: Spinning
    prepack: Prepack
    optimization: Optimization
    device: int
    """Index of the GPU; 0 on the CPU."""
    lowering: str
    float32: bool
    """The graphs compute in float32 and nothing less."""

    @property
    def on_cpu(self) -> bool:
        """There is no GPU in it."""
        return self.name == CPU

    @property
    def tensors_on(self) -> str:
        """ONNX Runtime's word for where tensors lie. With RTX's provider on the host: the package onnxruntime
        makes none on a GPU, and the provider takes a call's over and back."""
        return "cuda" if self.name == CUDA else "cpu"

    def graph(self, name: GraphName) -> str:
        """The bundle's graph that is run as `name`."""
        return LOWERINGS[self.lowering][0 if name == "prefill" else 1]

    def prepacks(self, name: GraphName) -> bool:
        """Whether that session makes a copy of the weights for itself."""
        return self.prepack in ("all", "wide", name)

    def widens(self, name: GraphName) -> bool:
        """Whether that session's quantised weights become float32 when it is loaded."""
        return self.prepack == "wide" and name == "prefill"


def resolve(options: OrtOptions, bundle: Bundle, name: str, version: str) -> OrtConfig:
    """Put what suits bundle and machine where an option was left open.

    Args:
        options: what was given.
        bundle: an opened bundle.
        name: CPU, CUDA or RTX.
        version: of ONNX Runtime, for messages.

    Raises:
        RunnerError: the bundle or this ONNX Runtime cannot do what was asked for.
    """
    if name == CPU and bundle.dtype == "bfloat16":
        raise RunnerError(
            "ONNX Runtime has no bfloat16 matrix product on the CPU",
            got="a bfloat16 bundle",
            hint="use --runner openvino-cpu (pip install 'dijiang-export[openvino]') or onnxruntime-cuda, or "
            "export the checkpoint with `--dtype float32`",
        )
    prepack = options.prepack
    if prepack == "auto":
        prepack = _prepack(bundle)
    elif prepack == "wide":
        _check_wide(bundle, name)
    return OrtConfig(
        name=name,
        threads=container_threads() if options.threads is None else options.threads,
        spinning=spinning_choice(options.spinning),
        prepack=prepack,
        optimization=options.optimization,
        device=0 if name == CPU else options.device,
        lowering=_lowering(options.lowering, bundle, name, version),
        float32=bundle.dtype == "float32",
    )


def _prepack(bundle: Bundle) -> Prepack:
    """A step gains most by it; of quantised weights, whose copy is small, a prefill too: int4 products, and
    that of its last token with the head."""
    if bundle.files[WEIGHTS].bytes >= 0.6 * available_memory():
        return "none"
    return "step" if bundle.weight_format == "float" else "all"


def _check_wide(bundle: Bundle, name: str) -> None:
    """Is there something to widen, and does that change no result?"""
    if name != CPU:
        raise RunnerError(
            "--prepack wide is for CPUs: others widen quantised weights as they multiply",
            got=name,
            hint="leave --prepack out",
        )
    if bundle.weight_format == "float" or bundle.dtype != "float32":
        raise RunnerError(
            "--prepack wide makes float32 of quantised weights, where activations are float32",
            got=f"{bundle.weight_format} weights, {bundle.dtype} activations",
            hint="--prepack all gives both graphs their own faster copy of the weights",
        )


def _lowering(wanted: Lowering, bundle: Bundle, name: str, version: str) -> str:
    known = "step_ort" in bundle.graphs and has_linear_attention()

    def usable(lowering: str) -> bool:
        return not _missing(lowering, bundle.graphs) and (known or not lowering.startswith("ort"))

    if wanted == "auto":
        return next(filter(usable, _CUDA_ORDER if name == CUDA else ("standard",)))
    if missing := _missing(wanted, bundle.graphs):
        raise RunnerError(
            f"the bundle {bundle.path} has no graph {missing[0]!r}",
            got=", ".join(bundle.graphs),
            hint=f"export it with `to-onnx --variant {missing[0].partition('_')[2]}`",
        )
    if not usable(wanted):
        raise RunnerError(
            f"the installed ONNX Runtime {version} has no LinearAttention",
            hint="install a newer one, or take the standard graphs",
        )
    return wanted


def _missing(lowering: str, graphs: Iterable[str]) -> list[str]:
    return [graph for graph in LOWERINGS[lowering] if graph not in graphs]


def has_linear_attention() -> bool:
    """Whether the installed ONNX Runtime has the operator that the "ort" graphs are lowered to."""
    state = importlib.import_module("onnxruntime.capi.onnxruntime_pybind11_state")
    return any(
        (schema.domain, schema.name) == ("com.microsoft", "LinearAttention")
        for schema in state.get_all_operator_schema()
    )
