"""What a build of the plugin takes: tools, headers, architectures; or what is missing, and how to get it."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dijiang_engines.errors import PluginError, UsageError
from dijiang_engines.plugin import targets, toolchain
from dijiang_engines.plugin.cache import KERNELS, plugin_sources, source_hash, tensorrt_name
from dijiang_engines.version import __version__

GET_HEADERS = (
    "install TensorRT's development package (JetPack's, or NVIDIA's .deb or .tar: they have the headers), or "
    "take the folder include/ of github.com/NVIDIA/TensorRT at the tag of your version; then "
    "--tensorrt-include FOLDER. For the kernels alone: --kernels-only"
)
GET_CUDA = (
    "install the CUDA toolkit (on a Jetson: apt-get install nvidia-jetpack), or set CUDA_HOME to where it is"
)

STEP_ARCHITECTURE = "DIJIANG_STEP_ARCHITECTURE"
"""Environment variable that plugins/CMakeLists.txt reads: leaves a whole step's kernel out elsewhere."""


@dataclass(frozen=True)
class BuildRequirements:
    """Everything that decides what a build makes."""

    sources: Path
    nvcc: toolchain.Nvcc
    cxx: toolchain.Tool
    cmake: toolchain.Tool
    generator: str
    make: Path
    architectures: tuple[int, ...]
    """As 10 * major + minor, rising; the last one also as PTX."""
    headers: toolchain.Headers | None
    """TensorRT's; None: kernels alone."""
    target: targets.CudaTarget | None = None
    """CUDA for another kind of processor than this machine's."""

    @property
    def machine(self) -> str:
        """The kind of processor that it is for, such as "aarch64"."""
        return self.target.processor.name if self.target else platform.machine()

    @property
    def architecture_names(self) -> tuple[str, ...]:
        """Such as ("sm_80", "sm_90", "compute_90")."""
        return (*(f"sm_{number}" for number in self.architectures), f"compute_{self.architectures[-1]}")

    @property
    def libraries(self) -> list[str]:
        """File names of what is made."""
        return [KERNELS] + ([tensorrt_name(self.headers.version[0])] if self.headers else [])

    @property
    def key(self) -> str:
        """The cache's name for this build, 16 hexadecimal digits."""
        decisive = [
            __version__, source_hash(self.sources), self.nvcc.release, self.cxx.about, self.architectures,
            str(self.headers), self.machine, str(self.target.folder) if self.target else None,
            *([os.environ[STEP_ARCHITECTURE]] if os.environ.get(STEP_ARCHITECTURE) else []),
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:16]


def find_requirements(
    *,
    architectures: Sequence[str] = (),
    kernels_only: bool = False,
    tensorrt_include: Path | None = None,
    target: str | None = None,
    environment: Mapping[str, str] = os.environ,
) -> BuildRequirements:
    """Find what a build needs.

    Args:
        architectures: such as "87", "sm_87", "8.7" or "all" (every tuned one that the compiler knows); empty:
            those of this machine's GPUs.
        kernels_only: build no TensorRT plugin.
        tensorrt_include: TensorRT's headers; default: looked for.
        target: the kind of processor to compile for, or a folder with CUDA for it; default: this machine's.
        environment: variables that name tools and folders.

    Raises:
        UsageError: an argument makes no sense.
        PluginError: something is missing or too old; the message says what was found and how to get it.
    """
    if kernels_only and tensorrt_include is not None:
        raise UsageError("--kernels-only and --tensorrt-include exclude each other")
    nvccs = toolchain.find_nvccs(environment)
    cuda = targets.find_target(target, nvccs) if target else None
    if cuda is not None:
        targets.check_whole(cuda)
        nvccs = targets.choose_nvcc(nvccs, cuda)
    wanted = _wanted_architectures(architectures, here=cuda is None)
    nvcc = _choose_nvcc(nvccs, wanted)
    numbers = wanted or tuple(n for n in toolchain.TUNED_ARCHITECTURES if n in nvcc.architectures)
    if not numbers:
        raise PluginError(
            f"{nvcc.path} knows no GPU that the kernels are for",
            got=_names(nvcc.architectures),
            expected=f"one of {_names(toolchain.TUNED_ARCHITECTURES)}",
            hint=GET_CUDA,
        )
    generator, make = _need_make(environment)
    return BuildRequirements(
        sources=plugin_sources(),
        nvcc=nvcc,
        cxx=targets.find_compiler(cuda.processor, environment) if cuda else _need_cxx(environment),
        cmake=_need_cmake(environment),
        generator=generator,
        make=make,
        architectures=numbers,
        headers=None if kernels_only else _need_headers(tensorrt_include, environment, cuda),
        target=cuda,
    )


def parse_architecture(text: str) -> int:
    """ "87", "sm_87" or "8.7" as 87.

    Raises:
        UsageError: it is none of these, or of a GPU that the kernels do not support.
    """
    match = re.fullmatch(r"(?:sm_)?(\d{2,3})|(\d{1,2})\.(\d)", text.strip().lower())
    if match is None:
        raise UsageError("--architecture is not one", got=text, expected="such as 87, sm_87, 8.7, or all")
    number = int(match[1]) if match[1] else 10 * int(match[2]) + int(match[3])
    if number < toolchain.LEAST_ARCHITECTURE:
        raise UsageError(
            "the kernels do not support this architecture", got=f"sm_{number}",
            expected=f"sm_{toolchain.LEAST_ARCHITECTURE} or newer",
        )  # fmt: skip
    return number


def _wanted_architectures(texts: Sequence[str], *, here: bool) -> tuple[int, ...]:
    """Rising; empty for all that the compiler knows. here: the build is for this machine, and its GPUs."""
    if "all" in texts:
        if len(texts) > 1:
            raise UsageError("--architecture all stands alone", got=", ".join(texts))
        return ()
    if texts:
        return tuple(sorted({parse_architecture(text) for text in texts}))
    if not here:
        raise PluginError(
            "the architecture to compile for is not known",
            got="--target without --architecture",
            expected="that of the other machine's GPU",
            hint="--architecture 87 (Jetson Orin) or 110 (Jetson Thor)",
        )
    found = toolchain.find_architectures()
    supported = tuple(number for number in found if number >= toolchain.LEAST_ARCHITECTURE)
    if not supported:
        raise PluginError(
            "the architecture to compile for is not known",
            got=f"GPUs of {_names(found)}" if found else "no NVIDIA GPU (nvidia-smi, libcuda)",
            expected=f"a GPU of sm_{toolchain.LEAST_ARCHITECTURE} or newer",
            hint="name it: --architecture 87 (Jetson Orin), 89 (RTX 40), 90 (H100); or --architecture all",
        )
    return supported


def _choose_nvcc(nvccs: list[toolchain.Nvcc], wanted: tuple[int, ...]) -> toolchain.Nvcc:
    """The first that is new enough and knows all of `wanted`."""
    least = ".".join(map(str, toolchain.LEAST_CUDA))
    if not nvccs:
        raise PluginError(
            "the CUDA compiler nvcc was not found",
            got="none in $CUDACXX, $CUDA_HOME, $PATH, /usr/local/cuda*",
            expected=f"CUDA {least} or newer",
            hint=GET_CUDA,
        )
    recent = [nvcc for nvcc in nvccs if nvcc.version >= toolchain.LEAST_CUDA]
    if not recent:
        found = ", ".join(f"CUDA {nvcc.release} ({nvcc.path})" for nvcc in nvccs)
        raise PluginError("nvcc is too old", got=found, expected=f"CUDA {least} or newer", hint=GET_CUDA)
    for nvcc in recent:
        if set(wanted) <= set(nvcc.architectures):
            return nvcc
    nvcc = recent[0]
    missing = [number for number in wanted if number not in nvcc.architectures]
    first = toolchain.FIRST_CUDA.get(missing[0])
    hint = f"CUDA {first} or newer knows sm_{missing[0]}" if first else None
    if missing[0] == 101:
        hint = "Jetson Thor is sm_110 in CUDA 13"
    raise PluginError(
        f"nvcc does not know the architecture {_names(missing)}",
        got=f"CUDA {nvcc.release} ({nvcc.path}), which knows {_names(nvcc.architectures)}",
        expected=f"an nvcc that knows {_names(wanted)}",
        hint=hint,
    )


def _need_cxx(environment: Mapping[str, str]) -> toolchain.Tool:
    cxx = toolchain.find_cxx(environment)
    if cxx is None:
        raise PluginError(
            "there is no C++ compiler",
            expected="g++ or clang++",
            hint="apt-get install g++, or set CUDAHOSTCXX",
        )
    return cxx


def _need_cmake(environment: Mapping[str, str]) -> toolchain.Tool:
    cmake, least = toolchain.find_cmake(environment), ".".join(map(str, toolchain.LEAST_CMAKE))
    if cmake is None or cmake.version < toolchain.LEAST_CMAKE:
        raise PluginError(
            "CMake was not found" if cmake is None else "CMake is too old",
            got=None if cmake is None else f"{cmake.about} ({cmake.path})",
            expected=f"{least} or newer",
            hint="pip install cmake, or apt-get install cmake",
        )
    return cmake


def _need_make(environment: Mapping[str, str]) -> tuple[str, Path]:
    found = toolchain.find_make(environment)
    if found is None:
        raise PluginError(
            "neither make nor ninja was found", hint="apt-get install make, or pip install ninja"
        )
    return found


def _need_headers(
    given: Path | None, environment: Mapping[str, str], cuda: targets.CudaTarget | None
) -> toolchain.Headers:
    if given is not None:
        headers = toolchain.read_headers(given)
        if headers is None:
            raise PluginError(
                "--tensorrt-include holds no TensorRT headers",
                got=str(given) if given.is_dir() else f"{given}, which is not a folder",
                expected="a folder with NvInfer.h and NvInferVersion.h",
                hint=GET_HEADERS,
            )
        candidates = [headers]
    else:
        candidates = toolchain.find_headers(environment, cuda.processor.triplet if cuda else None)
    usable = [headers for headers in candidates if headers.usable]
    if usable:
        if usable[0].renumbered:
            raise PluginError(
                "these headers are another TensorRT's than their number says",
                got=f"{usable[0]} in {usable[0].folder}, its plugin registry in another order",
                hint=f"the plugin would end processes that load it; {GET_HEADERS}",
            )
        return usable[0]
    if candidates:
        found = ", ".join(f"TensorRT {headers} in {headers.folder}" for headers in candidates)
        raise PluginError(
            "the plugin is not for this TensorRT",
            got=found,
            expected=toolchain.TENSORRT_RANGES,
            hint=GET_HEADERS,
        )
    package = toolchain.installed_tensorrt()
    raise PluginError(
        "TensorRT's headers were not found",
        got=f"pip's tensorrt {package}, which brings libraries but no headers" if package else None,
        expected=f"NvInfer.h of TensorRT {toolchain.TENSORRT_RANGES}",
        hint=GET_HEADERS,
    )


def _names(architectures: Sequence[int]) -> str:
    return ", ".join(f"sm_{number}" for number in architectures) or "none"
