"""The parts of Polygraphy that the builder's process uses, over tensorrt.py.

It parses, notes what it was asked for, and writes a plan that names the bundle's standard graph.

Parameters are those of Polygraphy 0.49 to 0.53 that are used; one that is not there is a TypeError. Proves
orchestration only: what the real one takes is tests/nvidia/test_tensorrt_bindings.py's to show, and what a
parser makes of a graph tests/building/test_rtx_network.py's.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from support.fakes import cuda as fake_cuda
from support.fakes.tensorrt import MAGIC, numbers

_LAYERS = {
    "MatMul": "MATRIX_MULTIPLY", "Add": "ELEMENTWISE", "Mul": "ELEMENTWISE", "Sub": "ELEMENTWISE",
    "Cast": "CAST", "Gather": "GATHER", "LayerNormalization": "NORMALIZATION", "Reshape": "SHUFFLE",
    "Sqrt": "UNARY", "Erf": "UNARY", "Sigmoid": "ACTIVATION", "Tanh": "ACTIVATION",
    "Relu": "ACTIVATION", "Softmax": "SOFTMAX",
}  # fmt: skip


def logger_module() -> ModuleType:
    """What `import polygraphy.logger` gives."""
    module: Any = ModuleType("polygraphy.logger")
    module.G_LOGGER = SimpleNamespace(error=print, warning=print)
    return module  # type: ignore[no-any-return]


class _Layer:
    """A layer of a parsed network, with what was asked of it."""

    def __init__(self, trt: Any, name: str, kind: str, outputs: list[str]) -> None:
        self.name, self.type = name, getattr(trt.LayerType, kind)
        if numbers(trt.__version__)[0] < 11:  # 11 knows strongly typed networks only
            self.precision = None
        self.outputs = [SimpleNamespace(name=text, dtype=trt.DataType.FLOAT) for text in outputs]
        self.types: dict[int, str] = {}
        self.num_inputs = 0  # what a layer reads is of no interest here: no product shows a constant weight
        self.op0 = self.op1 = "MatrixOperation.TRANSPOSE"
        self.op = "NONE"

    @property
    def num_outputs(self) -> int:
        return len(self.outputs)

    def get_output(self, index: int) -> Any:
        return self.outputs[index]

    def set_output_type(self, index: int, kind: Any) -> None:
        self.types[index] = kind.text


class _Network:
    def __init__(self, trt: Any, path: str, strongly_typed: bool) -> None:
        import onnx

        self.path, self.strongly_typed = path, strongly_typed
        graph = onnx.load(path, load_external_data=False).graph
        self.inputs, self.outputs = (
            [SimpleNamespace(name=value.name, shape=_shape(value)) for value in values]
            for values in (graph.input, graph.output)
        )
        plugin = "PLUGIN_V2" if not hasattr(trt.LayerType, "PLUGIN_V3") else "PLUGIN_V3"
        self.layers = [_Layer(trt, tensor.name, "CONSTANT", [tensor.name]) for tensor in graph.initializer]
        for node in graph.node:
            kind = plugin if node.domain == "dijiang" else _LAYERS.get(node.op_type, "SHUFFLE")
            name = f"(Unnamed Layer* {len(self.layers)}) [{kind}]" if kind == "NORMALIZATION" else node.name
            self.layers.append(_Layer(trt, name, kind, list(node.output)))

    num_layers = property(lambda self: len(self.layers))
    num_inputs = property(lambda self: len(self.inputs))
    num_outputs = property(lambda self: len(self.outputs))

    def get_layer(self, index: int) -> _Layer:
        return self.layers[index]

    def get_input(self, index: int) -> Any:
        return self.inputs[index]

    def get_output(self, index: int) -> Any:
        return self.outputs[index]


def _shape(value: Any) -> tuple[int, ...]:
    dims = value.type.tensor_type.shape.dim
    return tuple(d.dim_value if d.HasField("dim_value") else -1 for d in dims)


class _Profile(dict[str, Any]):
    def add(self, name: str, min: Any, opt: Any, max: Any) -> _Profile:
        self[name] = [list(min), list(opt), list(max)]
        return self


def backend_module() -> ModuleType:
    """What `import polygraphy.backend.trt` gives."""
    trt: Any = importlib.import_module("tensorrt")
    module: Any = ModuleType("polygraphy.backend.trt")
    module.Profile = _Profile
    module.get_trt_logger = lambda: None

    def network_from_onnx_path(path: str, strongly_typed: bool | None = None) -> tuple[Any, Any, None]:
        assert not strongly_typed or numbers(trt.__version__)[0] >= 10
        if not Path(path).is_file():
            raise RuntimeError(f"Could not open file {path}")
        return None, _Network(trt, path, bool(strongly_typed)), None

    def create_config(
        tf32: bool = False, fp16: bool = False, profiles: Any = None,
        precision_constraints: str | None = None, load_timing_cache: str | None = None,
        tactic_sources: Any = None, memory_pool_limits: Any = None,
        preview_features: Any = None, builder_optimization_level: int | None = None,
        progress_monitor: Any = None,
    ) -> dict[str, Any]:  # fmt: skip
        flags = [name for name, given in (("TF32", tf32), ("FP16", fp16)) if given]
        flags += [f"{precision_constraints.upper()}_PRECISION_CONSTRAINTS"] if precision_constraints else []
        return {
            "flags": flags,
            "profiles": profiles,
            "loaded_cache": load_timing_cache,
            "tactics": None if tactic_sources is None else [one.text for one in tactic_sources],
            "pools": {kind.text: size for kind, size in memory_pool_limits.items()},
            "preview": [one.text for one in preview_features or ()],
            "level": builder_optimization_level,
            "monitor": progress_monitor,
        }

    def engine_bytes_from_network(network: Any, config: Any, save_timing_cache: str | None) -> bytes:
        parsed: _Network = network[1]
        monitor = config.pop("monitor")
        assert not (parsed.strongly_typed and "FP16" in config["flags"])
        call = config | {
            "onnx": parsed.path,
            "strongly_typed": parsed.strongly_typed,
            "inputs": {tensor.name: list(tensor.shape) for tensor in parsed.inputs},
            "layers": {
                layer.name: [
                    str(layer.type),
                    getattr(getattr(layer, "precision", None), "text", None),
                    layer.types,
                ]
                for layer in parsed.layers
            },
            "monitor": monitor is not None,
        }
        _misbehave(fake_cuda.settings()["builder"], config)
        with open(fake_cuda.settings()["calls"], "a", encoding="utf-8") as file:
            file.write(json.dumps(call) + "\n")
        if monitor is not None:
            monitor.phase_start("Building", None, 2)
            assert monitor.step_complete("Building", 0)
            monitor.phase_finish("Building")
        if save_timing_cache:
            Path(save_timing_cache).write_bytes(b"timings")
        facts = {
            "tensorrt": trt.__version__,
            "graph": parsed.path.replace(".trt.onnx", ".onnx"),
            "profiles": config["profiles"],
            "preview": config["preview"],
            "broken": _broken(fake_cuda.settings()),
            "tensors": {tensor.name: list(tensor.shape) for tensor in parsed.inputs + parsed.outputs},
        }
        return MAGIC + json.dumps(facts).encode()

    module.network_from_onnx_path = network_from_onnx_path
    module.CreateConfig = create_config
    module.engine_bytes_from_network = engine_bytes_from_network
    return module  # type: ignore[no-any-return]


def _broken(settings: dict[str, Any]) -> bool:
    """Whether no context can be made of the plan that was just recorded: one of the first PLANS."""
    kind, _, plans = settings["builder"].partition(":")
    return kind == "broken" and len(Path(settings["calls"]).read_text().splitlines()) <= int(plans)


def _misbehave(way: str, config: dict[str, Any]) -> None:
    """FAKE_GPU's "builder": hangs:FILE, killed, aborts, memory, obey, broken:PLANS or fails:WORDS."""
    kind, _, rest = way.partition(":")
    if kind == "hangs":
        Path(rest).write_text(str(os.getpid()))
        time.sleep(60)
    elif kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "aborts":
        print("terminate called after throwing an 'InternalError'", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGABRT)
    elif kind == "memory":
        raise MemoryError
    elif kind == "obey" and "OBEY_PRECISION_CONSTRAINTS" in config["flags"]:
        raise RuntimeError("no implementation obeys the constraints")
    elif kind == "fails":
        from polygraphy.logger import G_LOGGER

        G_LOGGER.error(rest)
        raise RuntimeError("Invalid Engine. Please ensure the engine was built correctly.")
