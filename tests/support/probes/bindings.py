"""Runs what this project does with TensorRT against the real bindings: `bindings.py REQUEST.json`.

A process of its own, so that the stub libraries are on its path (tests/support/fakes/strict_tensorrt.py)
and two versions do not meet. The request names a file and what stands in for the plugin, and says whether
the first failure is enough. Writes one JSON object: the version, what was used of which class, what the
builder was asked for, and what failed.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
from support.fakes.strict_tensorrt import Calls, Strict
from support.makers.toy_bundle import SPEC as TOY
from support.probes.bindings_network import Parsed, profiles
from support.probes.tensorrt_uses import check_names

trt: Any = importlib.import_module("tensorrt_bindings")
sys.modules["tensorrt"] = trt  # the package tensorrt is this under another name

from dijiang_engines import io_names  # noqa: E402
from dijiang_engines.building import typed_network  # noqa: E402
from dijiang_engines.building import worker as build_worker  # noqa: E402
from dijiang_engines.building.request import BuildRequest, read_request  # noqa: E402
from dijiang_engines.building.step import one_launch  # noqa: E402
from dijiang_engines.building.step.packing import StepConstants  # noqa: E402
from dijiang_engines.formats.manifest import graph_io  # noqa: E402
from dijiang_engines.kernels.step import StepSize  # noqa: E402
from dijiang_engines.nvidia import tensorrt_library  # noqa: E402
from dijiang_engines.nvidia import tensorrt_versions as versions  # noqa: E402
from dijiang_engines.runners.tensorrt import checks as tensorrt_checks  # noqa: E402
from dijiang_engines.runners.tensorrt.contexts import Contexts, Gpu, integers_of  # noqa: E402
from dijiang_engines.weight_formats import matrix_shapes  # noqa: E402

SPEC: Any = SimpleNamespace(num_layers=2, state_shape=(2, 16, 16), vocab_size=100)
PROFILES = profiles()
ONE = dataclasses.replace(
    TOY, hidden_size=64, embedding_size=64, intermediate_size=64, num_heads=4, num_kv_heads=4, head_dim=16
)
"""Of the step in one launch, whose weights are quantised."""
PACKED = StepConstants(
    StepSize(256, 128, 7, 288, 4096, 1024),
    np.zeros((2, 32), np.int32),
    np.zeros((ONE.vocab_size, 16), np.int32),
    np.zeros((9, 32), np.int32),
    None,
)
CALLS = Calls()
VERSION = tensorrt_library.tensorrt_version(trt)
DIALECT = versions.dialect_of(VERSION)


def strict(kind: str, **values: Any) -> Any:
    return Strict(trt, getattr(trt, kind), CALLS, **values)


def creator() -> Any:
    kind = "IPluginCreator" if DIALECT.plugin_interface == "IPluginV2DynamicExt" else "IPluginCreatorV3One"
    return strict(kind, name="DijiangAttention")


def registry() -> Any:
    lists = [n for n in ("plugin_creator_list", "all_creators") if hasattr(trt.IPluginRegistry, n)]
    newest = lists[-1]
    values: dict[str, Any] = {name: [creator()] if name == newest else [] for name in lists}
    finders = [n for n in ("get_creator", "get_plugin_creator") if hasattr(trt.IPluginRegistry, n)]
    return strict("IPluginRegistry", **values, **{name: lambda *_: creator() for name in finders})


class HostMemory(bytes):
    """IHostMemory: bytes that can be entered."""

    def __enter__(self) -> HostMemory:
        return self

    def __exit__(self, *error: object) -> None:
        pass


# -- what is run ---------------------------------------------------------------------------------------


def names_in_the_source(engines: Path) -> None:
    """Every name of TensorRT's that a module has is there."""
    found = check_names(trt, engines, DIALECT.name)
    CALLS.used |= found.used
    assert not found.missing, f"TensorRT {trt.__version__} lacks {found.missing}"


def library(request: dict[str, Any]) -> None:
    """Logger, plugin registry, and reading a plan."""
    messages: list[str] = []
    logger = tensorrt_library.make_logger(trt, messages)
    logger.log(trt.ILogger.ERROR, "an error")
    logger.log(trt.ILogger.VERBOSE, "more")
    assert messages == ["error: an error"]
    made = tensorrt_library.TensorRT.__new__(tensorrt_library.TensorRT)
    made.trt, made.version, made.dialect = trt, VERSION, DIALECT
    made.messages, made.logger = messages, logger
    read: list[int] = []

    def deserialize(plan: Any) -> Any:
        reader: Any = plan if isinstance(plan, getattr(trt, "IStreamReader", ())) else None
        if reader is not None:
            read.append(0)
            while block := bytes(reader.read(100)):  # as TensorRT does
                read[0] += len(block)
        else:
            read.append(len(memoryview(plan)))
        return strict("ICudaEngine")

    runtime = strict("Runtime", deserialize_cuda_engine=deserialize)
    with (
        mock.patch.object(trt, "Runtime", return_value=runtime),
        mock.patch.object(trt, "get_plugin_registry", registry),
    ):
        assert made.load_plan(Path(request["onnx"])) is not None
        assert read == [Path(request["onnx"]).stat().st_size]
        tensorrt_library.load_plugin(trt, Path(request["plugin"]))


def runner(request: dict[str, Any]) -> None:
    """Contexts, shapes, addresses, running."""
    integer = trt.DataType.INT32 if not DIALECT.strongly_typed else trt.DataType.INT64
    inputs, outputs = graph_io(SPEC, step=False, all_logits=False)
    tensors = [*inputs, *outputs]

    def shape(name: str) -> list[int]:
        found = next(t for t in tensors if t.name == name).shape
        return [-1 if isinstance(size, str) else size for size in found]

    values = {
        "num_io_tensors": len(tensors),
        "get_tensor_name": lambda index: tensors[index].name,
        "get_tensor_shape": shape,
        "get_tensor_dtype": lambda name: integer,
    }
    for name in ("device_memory_size", "device_memory_size_v2"):
        if hasattr(trt.ICudaEngine, name):
            values[name] = 1 << 20
    plan = strict("ICudaEngine", **values)
    folder: Any = SimpleNamespace(
        spec=SPEC, all_logits=False, layout="one", profiles=SimpleNamespace(max_batch=4, max_length=64),
        prefill=SimpleNamespace(file="model.plan", profile=0),
        step=SimpleNamespace(file="model.plan", profile=1), made_for=SimpleNamespace(graphs="plugin"),
    )  # fmt: skip
    for place in (folder.prefill, folder.step):
        tensorrt_checks.check_tensors(folder, place, plan)
    tensorrt = mock.Mock(trt=trt)
    integers = integers_of(tensorrt, plan)
    assert integers == (np.int64 if DIALECT.strongly_typed else np.int32)
    cuda: Any = mock.MagicMock(buffer=lambda size: SimpleNamespace(address=4096, size=size))
    gpu = Gpu(cuda, mock.MagicMock(handle=77), integers)
    made = Contexts(folder, {"model.plan": plan}, tensorrt, gpu)
    assert made.activation_bytes == versions.activation_bytes(plan) == 1 << 20
    state: Any = mock.Mock(batch=2, graph=None)
    state.addresses.return_value = {io_names.INPUT_IDS: 4096, io_names.LOGITS: 8192}
    made.step_of(state, recorded=True)()
    made.set_shapes(made.for_prefill(), 2, 5)
    asked = CALLS.arguments("IExecutionContext.set_optimization_profile_async")
    assert asked == [["1", "77"], ["0", "77"]], asked
    assert ["input_ids", "(2, 5)"] in CALLS.arguments("IExecutionContext.set_input_shape")


def builder(request: dict[str, Any], dtype: str, products: bool, one: bool = False) -> dict[str, Any]:
    """The whole worker with the real Polygraphy; what it asked the builder for. one: launch alone."""
    CALLS.made.clear()
    cache = Path(request["folder"]) / f"{dtype}.cache"
    cache.write_bytes(b"old")  # so that it is loaded too
    plan = Path(request["folder"]) / f"{dtype} {products} {one}.plan"
    network = Parsed(trt, CALLS)
    parsed = network.network()
    flags: set[str] = {"TF32"}

    def set_flag(flag: Any) -> None:
        flags.add(flag.name)

    def clear_flag(flag: Any) -> None:
        flags.discard(flag.name)

    network_flags: list[str] = []

    def create_network(flags: int) -> Any:
        members = trt.NetworkDefinitionCreationFlag.__members__
        network_flags.extend(name for name, flag in members.items() if flags >> int(flag) & 1)
        return parsed

    config = strict(
        "IBuilderConfig", num_optimization_profiles=2, set_flag=set_flag, clear_flag=clear_flag,
        get_flag=lambda flag: flag.name in flags, engine_capability=trt.EngineCapability.STANDARD,
        profiling_verbosity=trt.ProfilingVerbosity.DETAILED, default_device_type=trt.DeviceType.GPU,
        get_timing_cache=lambda: strict("ITimingCache", serialize=lambda: HostMemory(b"new")), DLA_core=-1,
    )  # fmt: skip
    made = strict(
        "Builder", create_network=create_network, create_builder_config=lambda: config,
        build_serialized_network=lambda network, config: HostMemory(b"a plan"),
        create_optimization_profile=lambda: strict("IOptimizationProfile", get_shape=lambda n: [1, 1, 1]),
    )  # fmt: skip
    said: list[dict[str, Any]] = []
    events: Any = SimpleNamespace(send=lambda event, **values: said.append({"event": event} | values))
    parser = strict("OnnxParser", num_errors=0)
    runtime = strict("Runtime", deserialize_cuda_engine=lambda plan: strict("ICudaEngine"))
    with (
        mock.patch.object(trt, "Runtime", return_value=runtime),
        mock.patch.object(trt, "Builder", return_value=made),
        mock.patch.object(trt, "OnnxParser", return_value=parser),
        mock.patch.object(trt, "get_plugin_registry", registry),
        mock.patch.object(trt, "init_libnvinfer_plugins", return_value=True),
        mock.patch.object(build_worker, "Cuda", mock.MagicMock()),
        mock.patch.object(build_worker, "PeakMemory", return_value=mock.Mock(finish=lambda: 5)),
        mock.patch.object(build_worker, "StepKernels"),
        mock.patch.object(one_launch, "StepTensors"),
        mock.patch.object(one_launch, "pack_step", return_value=PACKED),
    ):
        asked = BuildRequest(
            onnx=Path(request["onnx"]), plan=plan, plugin=Path(request["plugin"]), dtype=dtype,
            profiles=PROFILES, workspace=256 << 20, optimization_level=3, timing_cache=cache, device=0,
            plugin_products=products, step="one-launch" if one else "products", spec=ONE if one else None,
            matrices=dict.fromkeys(matrix_shapes(ONE), "int8") if one else None,
        )  # fmt: skip
        asked.write(Path(request["folder"]) / "request.json")
        build_worker.build(read_request(Path(request["folder"]) / "request.json"), events)
    assert plan.read_bytes() == b"a plan" and cache.read_bytes() == b"new"
    done = said[-1]
    assert done["event"] == "done" and done["layers"] == network.parsed
    if DIALECT.progress_monitor:
        monitor = build_worker.progress_monitor(trt, events)
        monitor.phase_start("Build", None, 3)
        assert monitor.step_complete("Build", 1) is True
        monitor.phase_finish("Build")
        assert {"event": "step", "name": "Build", "step": 1} in said
    return {
        "flags": sorted(flags),
        "constraints": done["constraints"],
        "contexts": sum(
            len(CALLS.arguments(f"ICudaEngine.create_execution_context{how}"))
            for how in ("", "_without_device_memory")
        ),
        "network": network_flags,
        "profiles": len(CALLS.arguments("IBuilderConfig.add_optimization_profile")),
        "shapes": CALLS.arguments("IOptimizationProfile.set_shape"),
        "workspace": CALLS.arguments("IBuilderConfig.set_memory_pool_limit"),
        "level": CALLS.arguments("IBuilderConfig.builder_optimization_level"),
        "tactics": CALLS.arguments("IBuilderConfig.set_tactic_sources"),
        "preview": CALLS.arguments("IBuilderConfig.set_preview_feature"),
        "monitors": len(CALLS.arguments("IBuilderConfig.progress_monitor")),
        "caches": CALLS.arguments("IBuilderConfig.create_timing_cache"),
        "precisions": CALLS.arguments("ILayer.precision"),
        "static": CALLS.arguments("ITensor.shape"),
        "products": done["plugin_products"],
        "step": done["plugin_step"],
        "inputs": CALLS.arguments("INetworkDefinition.add_input"),
        "names": [texts[0] for texts in CALLS.arguments("ITensor.name")],
        "outputs": len(CALLS.arguments("INetworkDefinition.mark_output")),
        "plugins": [len(CALLS.arguments(f"INetworkDefinition.add_plugin_v{n}")) for n in (2, 3)],
        "moved": [arguments[0] for name, arguments in CALLS.made if name.endswith(".set_input")],
    }


def typed(request: dict[str, Any]) -> None:
    """8.6: layers are held to types."""
    if not DIALECT.strongly_typed:
        for held in typed_network.HELD:
            half = {"embeddings": 2, "products": 2, "arithmetic": 5}[held]
            parsed = Parsed(trt, CALLS).network()
            assert typed_network.type_network(trt, parsed, held) == {"float16": half, "float32": 2}


def main() -> int:
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    found: dict[str, Any] = {"tensorrt": trt.__version__, "version": VERSION, "dialect": DIALECT.name}
    failures: dict[str, str] = {}

    def attempt(name: str, check: Callable[[], Any]) -> None:
        if failures and request["first"]:
            return
        try:
            found[name] = check()
        except BaseException as error:  # noqa: BLE001 - Polygraphy's failures too
            failures[name] = f"{type(error).__name__}: {error}"
            traceback.print_exc()

    attempt("names", lambda: names_in_the_source(Path(build_worker.__file__).parents[2]))
    attempt("library", lambda: library(request))
    attempt("runner", lambda: runner(request))
    attempt("typed", lambda: typed(request))
    found["polygraphy"] = importlib.import_module("polygraphy").__version__
    for dtype in DIALECT.dtypes:
        attempt(f"builder {dtype}", partial(builder, request, dtype, False))
    attempt("builder float16 products", partial(builder, request, "float16", True))
    attempt("one launch", partial(builder, request, "float16", False, True))
    used = sorted(CALLS.used)
    Path(request["result"]).write_text(json.dumps(found | {"used": used, "failures": failures}))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
