"""What is done differently for each TensorRT: the table, the library that is loaded, the network's types."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from support.fakes import cuda as fake_cuda
from support.fakes.tensorrt import FakeMachine

from dijiang_engines.building.typed_network import fix_sizes, type_network
from dijiang_engines.errors import PluginError, RunnerError
from dijiang_engines.nvidia import tensorrt_library
from dijiang_engines.nvidia.cuda import Cuda
from dijiang_engines.nvidia.tensorrt_library import TensorRT, failure, tensorrt_module
from dijiang_engines.nvidia.tensorrt_versions import (
    activation_bytes,
    context_without_memory,
    dialect_of,
    give_memory,
    library_version,
)  # fmt: skip

# The table


@pytest.mark.parametrize(
    ("version", "name"),
    [("8.6.0", "8.6"), ("8.6.1.6", "8.6"), ("10.3.0", "10 and 11"), ("10.13.3.9", "10 and 11"),
     ("10.16.0", "10 and 11"), ("11.1.0", "10 and 11"), ("8.6", "8.6")],
)  # fmt: skip
def test_supported_versions(version: str, name: str) -> None:
    assert dialect_of(version).name == name


@pytest.mark.parametrize("version", ["7.2.3", "8.5.3", "8.0", "9.0.0", "9.3", "10.0.1", "10.2.0", "", "x"])
def test_other_versions_are_refused_with_what_is_supported(version: str) -> None:
    with pytest.raises(RunnerError, match="not supported") as info:
        dialect_of(version)
    assert info.value.expected == "8.6, or 10.3 and newer"
    assert info.value.got == version


def test_8_6_is_built_in_its_own_way() -> None:
    old, new = dialect_of("8.6.0"), dialect_of("10.3.0")
    assert (old.strongly_typed, new.strongly_typed) == (False, True)
    assert (old.plugin_interface, new.plugin_interface) == ("IPluginV2DynamicExt", "IPluginV3")
    assert "bfloat16" not in old.dtypes and "bfloat16" in new.dtypes
    assert old.tactic_sources == ("CUBLAS", "CUBLAS_LT") and new.tactic_sources is None
    assert old.preview_features is not None and "FASTER_DYNAMIC_SHAPES_0805" in old.preview_features
    assert new.preview_features is None, "11 has none of 8.6's"


@pytest.mark.parametrize(
    ("number", "text"),
    [(8600, "8.6.0"), (8601, "8.6.1"), (100300, "10.3.0"), (101303, "10.13.3"), (110100, "11.1.0")],
)
def test_the_library_s_number(number: int, text: str) -> None:
    assert library_version(number) == text


# The module


def test_tensorrt_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(RunnerError, match="tensorrt is not installed") as info:
        tensorrt_module()
    assert "python3-libnvinfer" in str(info.value) and "pip install tensorrt" in str(info.value)
    assert info.value.got is None and info.value.exit_code == 1


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import nothing_of_this_name", "No module named 'nothing_of_this_name'"),
        ("raise ImportError('libnvinfer.so.10: cannot open shared object file')", "libnvinfer.so.10"),
        ("raise OSError('libcudart.so.12: cannot open shared object file')", "libcudart.so.12"),
    ],
)
def test_tensorrt_does_not_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, words: str
) -> None:
    (tmp_path / "tensorrt.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    with pytest.raises(RunnerError, match="tensorrt does not load") as info:
        tensorrt_module()
    assert words in str(info.value.got)


def test_a_folder_named_tensorrt_is_not_tensorrt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = ModuleType("tensorrt")
    module.__path__ = [str(tmp_path)]
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    with pytest.raises(RunnerError, match="is not TensorRT") as info:
        tensorrt_module()
    assert info.value.got == str(tmp_path)


def test_cuda_bindings_are_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cuda", "cuda.bindings", "cuda.bindings.runtime"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(RunnerError, match="cuda-bindings is not installed") as info:
        Cuda()
    assert "dijiang-export[tensorrt]" in str(info.value.hint)


@pytest.mark.parametrize(("gpus", "device", "words"), [(0, 0, "no NVIDIA GPU"), (2, 2, "no such GPU")])
def test_there_is_no_such_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: int, device: int, words: str
) -> None:
    FakeMachine(tmp_path, gpus=gpus).enter(monkeypatch)
    with pytest.raises(RunnerError, match=words) as info:
        Cuda(device)
    assert info.value.got == (f"GPU {device} of {gpus}" if gpus else None)
    assert "doctor" in str(info.value.hint)


def test_an_unsupported_tensorrt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeMachine(tmp_path).enter(monkeypatch, tensorrt="10.0.1")
    with pytest.raises(RunnerError, match="not supported"):
        TensorRT(90)


# The plugin


def test_the_plugin_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = FakeMachine(tmp_path).enter(monkeypatch)
    found = TensorRT(90)
    assert found.version == "8.6.0" and found.plugin_library == machine.plugin / "libdijiang_tensorrt_8.so"
    assert found.kernels_library == machine.plugin / "libdijiang_kernels.so"


def test_there_is_no_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeMachine(tmp_path).enter(monkeypatch)
    monkeypatch.delenv("DIJIANG_PLUGIN")
    with pytest.raises(PluginError, match="the plugin for TensorRT 8 is not built") as info:
        TensorRT(90)
    assert info.value.hint == "dijiang-export build-plugin"


@pytest.mark.parametrize(
    "changes", [{"version": "0.0.1"}, {"sources": "0" * 64}, {"architectures": ["sm_87"]}]
)
def test_a_plugin_that_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    machine = FakeMachine(tmp_path).enter(monkeypatch)
    machine.build_plugin(**changes)
    with pytest.raises(PluginError, match="does not fit this program and this GPU") as info:
        TensorRT(90)
    assert "sm_90" in str(info.value.expected) and "build-plugin --output" in str(info.value.hint)


def test_a_plugin_for_another_tensorrt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = FakeMachine(tmp_path, tensorrt="8.6.0").enter(monkeypatch)
    monkeypatch.setattr(sys.modules.get("tensorrt") or tensorrt_module(), "__version__", "10.13.3")
    with pytest.raises(PluginError, match=r"holds no libdijiang_tensorrt_10\.so"):
        TensorRT(90)
    assert machine.calls == []


def test_a_damaged_plugin_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = FakeMachine(tmp_path).enter(monkeypatch)
    with (machine.plugin / "libdijiang_tensorrt_8.so").open("ab") as file:
        file.write(b"\0")
    opened: list[Any] = []
    monkeypatch.setattr(tensorrt_library, "load_plugin", lambda *arguments: opened.append(arguments))
    with pytest.raises(PluginError, match="not the library that was built"):
        TensorRT(90)
    assert opened == []


def test_a_plugin_that_does_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeMachine(tmp_path).enter(monkeypatch)
    broken = tmp_path / "libdijiang_tensorrt_8.so"
    broken.write_bytes(b"\x7fELF")
    with pytest.raises(PluginError, match="cannot load the plugin") as info:
        tensorrt_library.load_plugin(tensorrt_module(), broken)
    assert "--force" in str(info.value.hint)


@pytest.mark.parametrize("version", ["8.6.0", "10.13.3"])
def test_a_plugin_that_does_not_register(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    FakeMachine(tmp_path, tensorrt=version, registers=False).enter(monkeypatch)
    with pytest.raises(PluginError, match="did not register itself") as info:
        TensorRT(90)
    assert version in str(info.value.got) and "headers" in str(info.value.hint)


# Words of TensorRT


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ("2: [defaultAllocator.cpp::allocate::20] Error Code 2: OutOfMemory", "--max-batch"),
        ("1: [convolution.cpp] Error Code 1: Cuda Runtime (out of memory)", "--max-batch"),
        (
            "1: [runtime.cpp::parsePlan::314] Error Code 1: Serialization (magicTagRead)",
            "build the engine again",
        ),
        ("1: Version tag does not match. Note: Current Version: 213", "build the engine again"),
        ("4: Plugin not found, are the plugin name, version correct?", "build-plugin"),
        ("10: Could not find any implementation for node", "DIJIANG_TENSORRT_LOG"),
        ("", "DIJIANG_TENSORRT_LOG"),
    ],
)
def test_known_words_have_a_hint(words: str, hint: str) -> None:
    messages = ["warning: nothing"] + ([f"error: {words}"] if words else [])
    found = failure("it failed", messages)
    assert hint in str(found.hint) and words in str(found.got) and found.what == "it failed"


def test_long_words_are_cut() -> None:
    assert len(str(failure("it failed", ["error: " + "x\n" * 5000] * 50).got)) <= 500


# Contexts and memory


@pytest.mark.parametrize("version", ["8.6.0", "10.3.0", "10.13.3", "11.1.0"])
def test_a_context_gets_our_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    from support.fakes.tensorrt import _Engine

    FakeMachine(tmp_path, tensorrt=version).enter(monkeypatch)
    trt = tensorrt_module()
    engine = _Engine(trt, None, {"tensorrt": version})
    assert activation_bytes(engine) == engine.device_memory_size
    context = context_without_memory(trt, engine)
    assert context.memory is None
    give_memory(context, 0x1000, 4096)
    assert context.memory == (0x1000, 4096)


def test_out_of_gpu_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeMachine(tmp_path).enter(monkeypatch)
    cuda = Cuda()
    monkeypatch.setattr(fake_cuda.DEVICE, "limit", 1000)
    with pytest.raises(RunnerError, match="out of memory") as info:
        cuda.buffer(2000)
    assert "--max-batch" in str(info.value.hint)


# The network's types (8.6)


class Layer(SimpleNamespace):
    """A layer as TensorRT shows it."""

    def get_output(self, index: int) -> Any:
        return self.outputs[index]

    def set_output_type(self, index: int, kind: Any) -> None:
        self.typed[index] = kind

    @property
    def num_outputs(self) -> int:
        return len(self.outputs)


def layer(trt: Any, name: str, kind: str, output: str | None = "x", dtype: str = "FLOAT") -> Layer:
    outputs = [] if output is None else [SimpleNamespace(name=output, dtype=getattr(trt.DataType, dtype))]
    return Layer(name=name, type=getattr(trt.LayerType, kind), outputs=outputs, precision=None, typed={})


class Network:
    def __init__(self, layers: list[Layer], outputs: list[str]) -> None:
        self.layers, self.outputs = layers, outputs
        self.num_layers, self.num_outputs = len(layers), len(outputs)

    def get_layer(self, index: int) -> Layer:
        return self.layers[index]

    def get_output(self, index: int) -> Any:
        return SimpleNamespace(name=self.outputs[index])


def test_types_are_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeMachine(tmp_path).enter(monkeypatch)
    trt = tensorrt_module()
    matmul = layer(trt, "/layers.0/attention/qkv/MatMul", "MATRIX_MULTIPLY")
    norm = layer(trt, "/layers.0/attention_norm/Sqrt", "UNARY")
    weight = layer(trt, "layers.0.attention_norm/weight", "CONSTANT")
    ids = layer(trt, "/Add", "ELEMENTWISE", dtype="INT32")
    plugin = layer(trt, "/layers.0/attention/DijiangAttention", "PLUGIN_V2", "present.0.recurrent_state")
    cast = layer(trt, "/Cast_9", "CAST", "logits")
    empty = layer(trt, "/nothing", "ELEMENTWISE", None)
    network = Network(
        [matmul, norm, weight, ids, plugin, cast, empty], ["logits", "present.0.recurrent_state"]
    )
    assert type_network(trt, network) == {"float16": 1, "float32": 2}
    assert matmul.precision is trt.DataType.HALF and matmul.typed == {0: trt.DataType.HALF}
    assert norm.precision is trt.DataType.FLOAT, "sums of squares overflow in float16"
    assert cast.typed == {0: trt.DataType.FLOAT}, "the logits are float32"
    for untouched in (weight, ids, plugin, empty):
        assert untouched.precision is None and untouched.typed == {}


def test_embeddings_may_be_held_and_tables_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeMachine(tmp_path).enter(monkeypatch)
    trt = tensorrt_module()
    tokens = layer(trt, "/embed_tokens/Gather", "GATHER")
    table = layer(trt, "/layers.0/attention/decay/Gather", "GATHER")
    network = Network([tokens, table], [])
    assert type_network(trt, network) == {"float16": 0, "float32": 0}
    assert type_network(trt, network, "embeddings") == {"float16": 1, "float32": 0}
    assert tokens.precision is trt.DataType.HALF and tokens.typed == {0: trt.DataType.HALF}
    assert table.precision is None and table.typed == {}


def test_sizes_that_never_change_become_static() -> None:
    tensors = [
        SimpleNamespace(name="input_ids", shape=(-1, -1)),
        SimpleNamespace(name="positions", shape=(-1,)),
        SimpleNamespace(name="state", shape=(-1, 4, 8, 8)),
    ]
    network = SimpleNamespace(num_inputs=3, get_input=lambda index: tensors[index])
    one = {
        "input_ids": [[1, 1], [1, 16], [1, 64]],
        "positions": [[1]] * 3,
        "state": [[1, 4, 8, 8]] * 3,
    }
    step = one | {"input_ids": [[1, 1]] * 3}
    assert fix_sizes(network, [one, step]) == 2
    assert [tensor.shape for tensor in tensors] == [(1, -1), (1,), (1, 4, 8, 8)]
    assert fix_sizes(network, [step]) == 3
    assert tensors[0].shape == (1, 1)
