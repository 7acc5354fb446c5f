"""What is compared before an engine runs: what it was made for, and what its plans read and write."""

from __future__ import annotations

from typing import Any

from dijiang_engines.errors import BundleError, RunnerError
from dijiang_engines.formats.engine import REBUILD, EngineFolder, MadeFor, PlanPlace
from dijiang_engines.formats.file_table import ENGINE_MANIFEST
from dijiang_engines.formats.manifest import graph_io
from dijiang_engines.nvidia.cuda import DeviceFacts
from dijiang_engines.nvidia.tensorrt_library import TensorRT, installed_runtimes, tensorrt_module
from dijiang_engines.nvidia.tensorrt_versions import (
    RUNTIMES,
    TENSORRT_RTX,
    capabilities_of,
    capabilities_text,
    capability_text,
)


def open_runtime(engine: EngineFolder, gpu: DeviceFacts) -> TensorRT:
    """Load the runtime that an engine was made for, once GPU and driver are known to be right.

    Args:
        engine: the folder.
        gpu: the one that is to run it.

    Raises:
        RunnerError: runtime, GPU or plugin is another than the engine was made for, or the driver too old:
            one sentence that names both sides, instead of a crash in the runtime.
        PluginError: the plugin is missing, or has no code for this GPU.
    """
    made = engine.made_for
    if made.gpu is None and gpu.compute_capability not in made.compute_capabilities:
        raise RunnerError(
            f"the engine {engine.path} was made for other GPUs",
            got=f"{gpu.name}, compute capability {capability_text(gpu.compute_capability)}",
            expected=_about(made),
            hint=_other_gpu(gpu),
        )
    try:
        tensorrt_module(made.runtime)
    except RunnerError as error:
        here = [RUNTIMES[name].title for name in installed_runtimes() if name != made.runtime]
        raise RunnerError(
            f"the engine {engine.path} was made for {_runtime(made)}: {error.what}",
            got=error.got or (f"{' and '.join(here)} alone" if here else None),
            expected=_about(made),
            hint=error.hint,
        ) from error
    tensorrt = TensorRT(gpu.compute_capability, made.runtime, with_plugin=made.graphs == "plugin")
    check_driver(tensorrt, gpu)
    check_made_for(engine, tensorrt, gpu.name, gpu.compute_capability)
    return tensorrt


def _runtime(made: MadeFor) -> str:
    return f"{RUNTIMES[made.runtime].title} {made.tensorrt}"


def _about(made: MadeFor) -> str:
    where = made.gpu or "compute capability"
    numbers = capabilities_text(made.compute_capabilities)
    return f"{_runtime(made)}, {where}{',' if made.gpu else ''} {numbers}"


def _other_gpu(gpu: DeviceFacts) -> str:
    number = capability_text(gpu.compute_capability)
    if gpu.compute_capability not in capabilities_of(TENSORRT_RTX):
        return "TensorRT for RTX does not run on this GPU: build with --runtime tensorrt on this machine"
    return f"build the engine again with --compute-capability {number}"


def check_driver(tensorrt: TensorRT, gpu: DeviceFacts) -> None:
    """The driver knows the CUDA that the runtime was made with.

    Raises:
        RunnerError: it is too old.
    """
    needed = tensorrt.dialect.cuda
    if not gpu.knows_cuda(needed):
        raise RunnerError(
            f"NVIDIA's driver is too old for {tensorrt.title}",
            got=f"a driver for CUDA {gpu.driver}",
            expected=f"CUDA {needed}.0 or newer",
            hint="update the driver; `nvidia-smi` shows the newest CUDA that it knows",
        )


def check_made_for(engine: EngineFolder, tensorrt: TensorRT, gpu: str, capability: int) -> None:
    """Compare what an engine was made for with what is here.

    Raises:
        RunnerError: runtime, GPU or plugin is another: one sentence instead of a crash in the runtime.
    """
    made = engine.made_for
    sources = None if tensorrt.plugin is None else tensorrt.plugin.sources[:12]
    then = made.plugin_sources and made.plugin_sources[:12]
    differences = [
        (tensorrt.product.title, made.tensorrt, tensorrt.version),
        ("plugin", then, sources),
    ]
    if made.gpu is not None:
        there = f"{made.gpu}, sm_{made.compute_capabilities[0]}"
        differences.insert(1, ("GPU", there, f"{gpu}, sm_{capability}"))
    for what, then, now in differences:
        if then != now:
            raise RunnerError(
                f"the engine {engine.path} was made for another {what}", got=now, expected=then, hint=REBUILD
            )


def check_tensors(engine: EngineFolder, place: PlanPlace, plan: Any) -> None:
    """Compare a plan's inputs and outputs with what engine.json says of the model.

    The buffers get engine.json's sizes and TensorRT writes the plan's: if these differed, it would write
    beside them.

    Args:
        engine: the folder.
        place: where the job is that `plan` shall do.
        plan: TensorRT's ICudaEngine.

    Raises:
        BundleError: a tensor is missing, unknown or of another size.
    """
    inputs, outputs = graph_io(engine.spec, step=place is engine.step, all_logits=engine.all_logits)
    names = {plan.get_tensor_name(index) for index in range(plan.num_io_tensors)}
    expected = {tensor.name: tensor.shape for tensor in (*inputs, *outputs)}
    for name in sorted(names ^ set(expected)):
        raise BundleError(
            f"{place.file} and {ENGINE_MANIFEST} do not describe the same model",
            got=f"{name} in {place.file if name in names else ENGINE_MANIFEST} only", hint=REBUILD,
        )  # fmt: skip
    for name, shape in expected.items():
        found = tuple(int(size) for size in plan.get_tensor_shape(name))
        fits = len(found) == len(shape) and all(
            isinstance(size, str) or got in (size, -1) for got, size in zip(found, shape, strict=True)
        )
        if not fits:
            raise BundleError(
                f"{place.file} and {ENGINE_MANIFEST} do not describe the same model",
                got=f"{name} {list(found)}", expected=list(shape), hint=REBUILD,
            )  # fmt: skip
