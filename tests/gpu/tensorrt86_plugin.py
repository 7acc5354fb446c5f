"""The plugin in a real TensorRT 8.6: `python tensorrt86_plugin.py LIBRARY CASES [NAME ...]`.

Built, saved, loaded and run.

LIBRARY is libdijiang_tensorrt_8.so, CASES a file of tests/support/makers/tensorrt_cases.py, of which NAMEs
choose some. Each case becomes a graph of one node with dynamic batch and length. It goes through the real
parser, builder, plan and runtime, and results are compared in place and out of place, in two execution
contexts on two streams, and
from a CUDA graph. Needs a GPU, tensorrt 8.6, numpy and cuda-bindings; neither onnx nor PyTorch. Exits with 1
on any failure.
"""

from __future__ import annotations

import ctypes
import importlib
import struct
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

NAMES = (
    "qkv", "gate", "past_state", "positions", "seq_lens", "proj", "norm_weight", "norm_bias", "inv_freq",
    "log_decay", "gain", "read_scale",
)  # fmt: skip
GRAPH_INPUTS = 5
"""The first five tensors change from call to call; the others are weights."""
NUMPY = (np.float32, np.float16, np.uint16, np.int32)
ONNX_TYPES = {np.dtype(np.float32): 1, np.dtype(np.float16): 10, np.dtype(np.int32): 6}
BFLOAT16 = 2
ATTRIBUTES = ("num_heads", "num_kv_heads", "head_dim", "rotary_dim")


@dataclass
class Recorded:
    """One case of the file (tests/support/makers/tensorrt_cases.py says what it holds)."""

    name: str
    attributes: tuple[int, ...]
    epsilon: float
    inputs: list[np.ndarray]
    expected: list[np.ndarray]
    bounds: list[np.ndarray]
    is_bfloat16: bool


def read_cases(path: Path) -> list[Recorded]:
    """All cases of a file."""
    data = path.read_bytes()
    at = 8

    def take(layout: str) -> tuple[Any, ...]:
        nonlocal at
        values = struct.unpack_from("<" + layout, data, at)
        at += struct.calcsize("<" + layout)
        return values

    def tensor() -> tuple[int, np.ndarray]:
        nonlocal at
        kind, rank = take("2i")
        shape = take(f"{rank}q")
        count = int(np.prod(shape))
        array = np.frombuffer(data, NUMPY[kind], count, at).reshape(shape)
        at += array.nbytes
        return kind, array

    if data[:8] != b"DJCASES1":
        raise SystemExit(f"{path} holds no recorded cases")
    cases = []
    for _ in range(take("i")[0]):
        name = take(f"{take('i')[0]}s")[0].decode("ascii")
        *attributes, epsilon = take("4if")
        inputs = [tensor() for _ in range(take("i")[0])]
        output, output_bound, state, state_bound = (tensor()[1] for _ in range(4))
        cases.append(
            Recorded(
                name, tuple(attributes), epsilon, [x for _, x in inputs], [output, state],
                [output_bound, state_bound], inputs[0][0] == BFLOAT16,
            )
        )  # fmt: skip
    return cases


# ONNX by hand: a protobuf message is a row of (field number, wire type) keys with values.


def varint(value: int) -> bytes:
    """Base 128, low digits first."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def integer(field: int, value: int) -> bytes:
    """A field of integer type."""
    return varint(field << 3) + varint(value)


def message(field: int, content: bytes | str) -> bytes:
    """A field of bytes, a string or a nested message."""
    raw = content.encode() if isinstance(content, str) else content
    return varint(field << 3 | 2) + varint(len(raw)) + raw


def value_info(name: str, dtype: np.dtype[Any], shape: list[int | str]) -> bytes:
    """ValueInfoProto: a name and its tensor type."""
    dims = b"".join(message(1, message(2, s) if isinstance(s, str) else integer(1, s)) for s in shape)
    return message(1, name) + message(
        2, message(1, integer(1, ONNX_TYPES[np.dtype(dtype)]) + message(2, dims))
    )


def attribute(name: str, value: int | float | str) -> bytes:
    """AttributeProto."""
    if isinstance(value, int):
        return message(1, name) + integer(3, value) + integer(20, 2)
    if isinstance(value, float):
        return message(1, name) + varint(2 << 3 | 5) + struct.pack("<f", value) + integer(20, 1)
    return message(1, name) + message(4, value) + integer(20, 3)


def onnx_model(case: Recorded) -> bytes:
    """ModelProto of one DijiangAttention node, weights inside, batch and length dynamic."""
    names = NAMES[: len(case.inputs)]
    node = b"".join(message(1, name) for name in names)
    node += message(2, "output") + message(2, "present_state") + message(3, "layer0")
    node += message(4, "DijiangAttention") + message(7, "dijiang")
    values: dict[str, int | float | str] = dict(zip(ATTRIBUTES, case.attributes, strict=True))
    values |= {"epsilon": case.epsilon, "plugin_namespace": "dijiang", "plugin_version": "1"}
    node += b"".join(message(5, attribute(k, v)) for k, v in values.items())

    def dynamic(array: np.ndarray) -> list[int | str]:
        token = ["length"] if array.ndim == 3 else []
        return ["batch", *token, *array.shape[1 + len(token) :]]

    graph = message(1, node) + message(2, "one_layer")
    for name, array in zip(names[GRAPH_INPUTS:], case.inputs[GRAPH_INPUTS:], strict=True):
        dims = b"".join(integer(1, size) for size in array.shape)
        kind = integer(2, ONNX_TYPES[array.dtype])
        graph += message(5, dims + kind + message(8, name) + message(9, array.tobytes()))
    for name, array in zip(NAMES[:GRAPH_INPUTS], case.inputs, strict=False):
        graph += message(11, value_info(name, array.dtype, dynamic(array)))
    graph += message(12, value_info("output", case.inputs[0].dtype, dynamic(case.inputs[1])))
    graph += message(12, value_info("present_state", np.dtype(np.float32), dynamic(case.inputs[2])))
    opsets = message(8, message(1, "") + integer(2, 17)) + message(8, message(1, "dijiang") + integer(2, 1))
    return integer(1, 8) + message(7, graph) + opsets


def cuda(result: tuple[Any, ...]) -> Any:
    """The value of a cuda-bindings call; raises its error."""
    error, *values = result
    if int(error) != 0:
        raise RuntimeError(f"CUDA: {error}")
    return values[0] if len(values) == 1 else values


class Session:
    """One execution context with a stream and buffers of its own."""

    def __init__(self, engine: Any, case: Recorded, cudart: Any) -> None:
        self.case, self.cudart = case, cudart
        self.context = engine.create_execution_context()
        self.stream = cuda(cudart.cudaStreamCreateWithFlags(cudart.cudaStreamNonBlocking))
        results = [np.empty(case.expected[0].shape, case.inputs[0].dtype), np.empty_like(case.expected[1])]
        self.arrays = dict(zip(NAMES[:GRAPH_INPUTS], case.inputs, strict=False))
        self.arrays |= {"output": results[0], "present_state": results[1]}
        self.buffers = {k: cuda(cudart.cudaMalloc(max(v.nbytes, 16))) for k, v in self.arrays.items()}
        for name in NAMES[:GRAPH_INPUTS]:
            self.context.set_input_shape(name, self.arrays[name].shape)

    def prepare(self, in_place: bool) -> None:
        """Inputs in, outputs poisoned with NaN, addresses bound."""
        for name, array in self.arrays.items():
            pointer = self.buffers[name]
            if name in NAMES:
                self.upload(pointer, array)
            else:
                cuda(self.cudart.cudaMemset(pointer, 0xFF, array.nbytes))
            self.context.set_tensor_address(name, pointer)
        if in_place:
            self.context.set_tensor_address("past_state", self.buffers["present_state"])
            self.upload(self.buffers["present_state"], self.arrays["past_state"])
        cuda(self.cudart.cudaDeviceSynchronize())

    def upload(self, pointer: int, array: np.ndarray) -> None:
        contiguous = np.ascontiguousarray(array)
        kind = self.cudart.cudaMemcpyKind.cudaMemcpyHostToDevice
        cuda(self.cudart.cudaMemcpy(pointer, contiguous.ctypes.data, contiguous.nbytes, kind))

    def enqueue(self) -> None:
        if not self.context.execute_async_v3(int(self.stream)):
            raise RuntimeError("execute_async_v3 failed; TensorRT's log says why")

    def check(self, how: str) -> bool:
        """Compare with the recorded results and print a line."""
        cuda(self.cudart.cudaStreamSynchronize(self.stream))
        ratios = []
        for name, expected, bound in zip(
            ("output", "present_state"), self.case.expected, self.case.bounds, strict=True
        ):
            got = np.empty_like(self.arrays[name])
            kind = self.cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost
            cuda(self.cudart.cudaMemcpy(got.ctypes.data, self.buffers[name], got.nbytes, kind))
            error = np.abs(got.astype(np.float64) - expected)
            with np.errstate(divide="ignore", invalid="ignore"):
                ratio = np.where(error == 0, 0.0, error / bound)
            ratios.append(float(np.nan_to_num(ratio, nan=np.inf).max(initial=0.0)))
        right = all(ratio <= 1 for ratio in ratios)
        print(
            f"{'ok  ' if right else 'FAIL'} {self.case.name}, {how}: "
            f"output {ratios[0]:.3f}, state {ratios[1]:.3f} of the bound",
            flush=True,
        )
        return right


def build(trt: Any, logger: Any, case: Recorded) -> bytes:
    """Parse and build; profiles from one row of one token to twice the case's batch and length."""
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(onnx_model(case)):
        raise RuntimeError("\n".join(str(parser.get_error(i)) for i in range(parser.num_errors)))
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, 256 << 20)
    config.set_tactic_sources(1 << int(trt.TacticSource.CUBLAS) | 1 << int(trt.TacticSource.CUBLAS_LT))
    config.clear_flag(trt.BuilderFlag.TF32)
    for feature in trt.PreviewFeature.__members__.values():  # two contexts shall share the profile
        wanted = feature.name in ("FASTER_DYNAMIC_SHAPES_0805", "PROFILE_SHARING_0806")
        config.set_preview_feature(feature, wanted)
    if case.inputs[0].dtype == np.float16:
        config.set_flag(trt.BuilderFlag.FP16)
    profile = builder.create_optimization_profile()
    for name, array in zip(NAMES[:GRAPH_INPUTS], case.inputs, strict=False):
        head = 2 if array.ndim == 3 else 1
        rest = array.shape[head:]
        largest = tuple(2 * size for size in array.shape[:head])
        profile.set_shape(name, (1,) * head + rest, array.shape, largest + rest)
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RuntimeError("the builder made no plan; TensorRT's log says why")
    return bytes(plan)


def run_case(trt: Any, logger: Any, case: Recorded, cudart: Any) -> bool:
    """Everything for one case; whether it was all right."""
    start = time.perf_counter()
    plan = build(trt, logger, case)
    took = time.perf_counter() - start
    print(f"     {case.name}: plan of {len(plan)} bytes in {took:.1f} s", flush=True)
    engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
    if engine is None:
        raise RuntimeError("the plan cannot be loaded; TensorRT's log says why")
    one, two = Session(engine, case, cudart), Session(engine, case, cudart)
    right = True
    for in_place in (False, True):
        one.prepare(in_place)
        one.enqueue()
        right &= one.check("in place" if in_place else "out of place")
    one.prepare(False)
    two.prepare(False)
    for _ in range(20):
        one.enqueue()
        two.enqueue()
    right &= one.check("two contexts, the first") & two.check("two contexts, the second")
    two.prepare(True)
    cuda(cudart.cudaStreamBeginCapture(two.stream, cudart.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed))
    two.enqueue()
    graph = cuda(cudart.cudaStreamEndCapture(two.stream))
    executable = cuda(cudart.cudaGraphInstantiate(graph, 0))
    two.prepare(True)
    cuda(cudart.cudaGraphLaunch(executable, two.stream))
    return right & two.check("from a graph, in place")


def registered(trt: Any, library: str) -> bool:
    """Both ways to load the library: opened, then through the registry."""

    def found() -> bool:
        creators = trt.get_plugin_registry().plugin_creator_list
        ours = [c for c in creators if c.name == "DijiangAttention"]
        return len(ours) == 1 and ours[0].plugin_namespace == "dijiang" and ours[0].plugin_version == "1"

    ctypes.CDLL(library)
    opened = found()
    version = ctypes.CDLL("libnvinfer.so.8").getInferLibVersion()
    if version == 8600 and trt.__version__ != "8.6.0":
        # Bindings of 8.6.1 call functions of the registry by places that 8.6.0 gave to others.
        print(
            f"{'ok  ' if opened else 'FAIL'} registered when opened: {opened}; not loaded: bindings of 8.6.1"
        )
        return opened
    loaded = trt.get_plugin_registry().load_library(library) is not None and found()
    print(
        f"{'ok  ' if opened and loaded else 'FAIL'} registered when opened: {opened}, when loaded: {loaded}"
    )
    return opened and loaded


def main() -> int:
    """Run every case that TensorRT 8.6 has the type for."""
    if len(sys.argv) < 3:
        print(__doc__, file=sys.stderr)
        return 2
    import tensorrt as trt

    cudart = importlib.import_module("cuda.bindings.runtime")

    logger = trt.Logger(trt.Logger.WARNING)
    print(f"TensorRT {trt.__version__}, numpy {np.__version__}")
    cuda(cudart.cudaSetDevice(0))
    right = registered(trt, str(Path(sys.argv[1]).resolve()))
    names = sys.argv[3:]
    for case in read_cases(Path(sys.argv[2])):
        if case.is_bfloat16 or (names and not any(name in case.name for name in names)):  # not in 8.6
            continue
        try:
            right &= run_case(trt, logger, case, cudart)
        except RuntimeError as error:
            print(f"FAIL {case.name}: {error}", flush=True)
            right = False
    print("all right" if right else "not all right")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
