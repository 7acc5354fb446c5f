"""Runs what this project does with TensorRT against the real bindings: `tensorrt_probe.py REQUEST.json`.

A process of its own, so that the stub libraries are on its path (tests/tensorrt_strict.py) and two versions
do not meet. The request names a file and what stands in for the plugin. Writes one JSON object: the version,
what was used of which class, what the builder was asked for, and what failed.
"""

from __future__ import annotations

import ast
import importlib
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
from tensorrt_strict import Calls, Strict

trt: Any = importlib.import_module("tensorrt_bindings")
sys.modules["tensorrt"] = trt  # the package tensorrt is this under another name

from dijiang_engines import build_worker, io_names, tensorrt_library, typed_network  # noqa: E402
from dijiang_engines import tensorrt_versions as versions  # noqa: E402
from dijiang_engines.manifest import graph_io  # noqa: E402
from dijiang_engines.runners import tensorrt as runner_module  # noqa: E402
from dijiang_engines.runners import tensorrt_checks  # noqa: E402

SPEC: Any = SimpleNamespace(num_layers=2, state_shape=(2, 16, 16), vocab_size=100)
PROFILES = [
    {
        io_names.INPUT_IDS: [[1, 1], [2, n // 2], [4, n]],
        io_names.POSITIONS: [[1], [2], [4]],
        io_names.SEQ_LENS: [[1], [2], [4]],
        **{io_names.past_state(i): [[b, 2, 16, 16] for b in (1, 2, 4)] for i in range(2)},
    }
    for n in (64, 2)
]
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
    return strict("IPluginRegistry", **{name: [creator()] if name == newest else [] for name in lists})


class HostMemory(bytes):
    """IHostMemory: bytes that can be entered."""

    def __enter__(self) -> HostMemory:
        return self

    def __exit__(self, *error: object) -> None:
        pass


# -- what is run ---------------------------------------------------------------------------------------


def names_in_the_source(engines: Path) -> None:
    """Every `trt.A.B` that the code names is there, unless it asks first or is for another version."""
    files = ["build_worker", "tensorrt_library", "tensorrt_versions", "build", "runners/tensorrt"]
    files += ["runners/tensorrt_checks", "runners/tensorrt_decoder"]
    if not DIALECT.strongly_typed:
        files.append("typed_network")
    missing = []
    for file in files:
        tree = ast.parse((engines / f"{file}.py").read_text(encoding="utf-8"))
        asked = {
            node.args[1].value
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
            and node.func.id in ("hasattr", "getattr") and isinstance(node.args[1], ast.Constant)
        }  # fmt: skip
        bases = {
            ast.unparse(base): {f.name for f in node.body if isinstance(f, ast.FunctionDef)}
            for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for base in node.bases
        }  # fmt: skip
        for chain in sorted({ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Attribute)}):
            parts = chain.removeprefix("self.tensorrt.").removeprefix("self.").split(".")
            if parts[0] != "trt" or not all(part.isidentifier() for part in parts):
                continue
            found: Any = trt
            for part in parts[1:]:
                found = getattr(found, part, None)
                if found is None:
                    break
            if found is None and parts[1] in asked:
                continue  # the code asks first
            if found is None:
                missing.append(f"{file}: {'.'.join(parts)}")
                continue
            if len(parts) > 1:
                CALLS.used.add(".".join(parts[1:]))
            for method in bases.get(chain, ()):
                if not method.startswith("_") and not hasattr(found, method):
                    missing.append(f"{file}: {chain} calls no {method}")
    assert not missing, f"TensorRT {trt.__version__} lacks {missing}"


def library(request: dict[str, Any]) -> None:
    """Logger, plugin registry, and reading a plan."""
    messages: list[str] = []
    logger = tensorrt_library._make_logger(trt, messages)
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
        spec=SPEC, all_logits=False, layout="one",
        prefill=SimpleNamespace(file="model.plan", profile=0),
        step=SimpleNamespace(file="model.plan", profile=1),
    )  # fmt: skip
    for place in (folder.prefill, folder.step):
        tensorrt_checks.check_tensors(folder, place, plan)
    made = runner_module.TensorRTRunner.__new__(runner_module.TensorRTRunner)
    made.engine, made.spec, made.max_batch, made.max_length = folder, SPEC, 4, 64
    made.all_logits, made.uses_graphs = False, True
    made.tensorrt = mock.Mock(trt=trt)
    made.cuda, made.stream = mock.MagicMock(), mock.MagicMock(handle=77)
    made._engines = {"model.plan": plan}
    made._activations = SimpleNamespace(address=4096, size=versions.activation_bytes(plan))  # type: ignore[assignment]
    assert made._activations.size == 1 << 20
    made._prefill_context, made._step_contexts, made._scratch, made._staging = None, {}, {}, {}
    made.integers = np.dtype(trt.nptype(plan.get_tensor_dtype(io_names.INPUT_IDS)))
    assert made.integers == (np.int64 if DIALECT.strongly_typed else np.int32)
    state: Any = mock.Mock(batch=2, owner=made, graph=None)
    state.addresses.return_value = {io_names.INPUT_IDS: 4096, io_names.LOGITS: 8192}
    made._step_runner(state)()
    made._set_shapes(made._context_for_prefill(), 2, 5)
    asked = CALLS.arguments("IExecutionContext.set_optimization_profile_async")
    assert asked == [["1", "77"], ["0", "77"]], asked
    assert ["input_ids", "(2, 5)"] in CALLS.arguments("IExecutionContext.set_input_shape")


def network() -> Any:
    """What the parser made: inputs, an output, and layers of several kinds."""
    kind = trt.DataType.FLOAT

    def tensor(name: str, shape: tuple[int, ...] = (-1,)) -> Any:
        return strict("ITensor", name=name, dtype=kind, shape=shape, is_shape_tensor=False)

    def layer(name: str, type_name: str) -> Any:
        output = tensor(name + "_out")
        values = {"precision": kind, "precision_is_set": False, "get_output_type": kind}
        kept = {n: v for n, v in values.items() if hasattr(trt.ILayer, n)}
        return strict(
            "ILayer", name=name, type=getattr(trt.LayerType, type_name), num_outputs=1, num_inputs=0,
            get_output=lambda index: output, **kept,
        )  # fmt: skip

    shapes = {name: tuple(-1 for _ in best) for name, (_, best, _) in PROFILES[0].items()}
    shapes[io_names.past_state(0)] = shapes[io_names.past_state(1)] = (-1, 2, 16, 16)
    inputs = [tensor(name, shape) for name, shape in shapes.items()]
    kinds = {"/a/MatMul": "MATRIX_MULTIPLY", "/norm/Sub": "ELEMENTWISE", "/dijiang": "PLUGIN_V2"}
    layers = [layer(name, kind) for name, kind in kinds.items()]
    layers.append(layer("logits", "MATRIX_MULTIPLY"))
    out = layers[-1].get_output(0)
    return strict(
        "INetworkDefinition", num_inputs=len(inputs), num_outputs=1, num_layers=len(layers), name="graph",
        get_input=lambda index: inputs[index], get_output=lambda index: out,
        get_layer=lambda index: layers[index],
    )  # fmt: skip


def builder(request: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The whole worker with the real Polygraphy; what it asked the builder for."""
    CALLS.made.clear()
    cache = Path(request["folder"]) / f"{dtype}.cache"
    cache.write_bytes(b"old")  # so that it is loaded too
    plan = Path(request["folder"]) / f"{dtype}.plan"
    parsed = network()
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
    ):
        build_worker.build(
            {
                "onnx": request["onnx"], "plan": str(plan), "plugin": request["plugin"], "dtype": dtype,
                "profiles": PROFILES, "workspace": 256 << 20, "optimization_level": 3,
                "timing_cache": str(cache), "device": 0,
            },
            events,
        )  # fmt: skip
    assert plan.read_bytes() == b"a plan" and cache.read_bytes() == b"new"
    done = said[-1]
    assert done["event"] == "done" and done["layers"] == 4
    if DIALECT.progress_monitor:
        monitor = build_worker._monitor(trt, events)
        monitor.phase_start("Build", None, 3)
        assert monitor.step_complete("Build", 1) is True
        monitor.phase_finish("Build")
        assert {"event": "step", "name": "Build", "step": 1} in said
    return {
        "flags": sorted(flags),
        "constraints": done["constraints"],
        "contexts": len(CALLS.arguments("ICudaEngine.create_execution_context_without_device_memory")),
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
    }


def typed(request: dict[str, Any]) -> None:
    """8.6: layers are held to types."""
    if not DIALECT.strongly_typed:
        for held in typed_network.HELD:
            assert typed_network.type_network(trt, network(), held) == {"float16": 1, "float32": 2}


def main() -> int:
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    found: dict[str, Any] = {"tensorrt": trt.__version__, "version": VERSION, "dialect": DIALECT.name}
    failures: dict[str, str] = {}

    def attempt(name: str, check: Callable[[], Any]) -> None:
        try:
            found[name] = check()
        except BaseException as error:  # noqa: BLE001 - Polygraphy's failures too
            failures[name] = f"{type(error).__name__}: {error}"
            traceback.print_exc()

    attempt("names", lambda: names_in_the_source(Path(build_worker.__file__).parent))
    attempt("library", lambda: library(request))
    attempt("runner", lambda: runner(request))
    attempt("typed", lambda: typed(request))
    if request["polygraphy"]:
        import polygraphy

        found["polygraphy"] = polygraphy.__version__
        for dtype in DIALECT.dtypes:
            attempt(f"builder {dtype}", lambda dtype=dtype: builder(request, dtype))  # type: ignore[misc]
    used = sorted(CALLS.used)
    Path(request["result"]).write_text(json.dumps(found | {"used": used, "failures": failures}))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
