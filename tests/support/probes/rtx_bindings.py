"""Runs what the runner does with TensorRT for RTX against its real bindings: `rtx_bindings.py SITE OUT.json`.

SITE holds the unpacked wheels. Builder, parser and logger are real here and in rtx_build.py; a plan needs a
GPU to be loaded, so plans, contexts and caches are Strict objects (support/fakes/strict_tensorrt.py): what
their class does not have is an error, and so is a call that fits none of its signatures.
"""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

sys.path.insert(0, sys.argv[1])
trt: Any = importlib.import_module("tensorrt_rtx_bindings")

from support.fakes.strict_tensorrt import Calls, Strict  # noqa: E402
from support.probes.tensorrt_uses import check_names  # noqa: E402

from dijiang_engines import io_names  # noqa: E402
from dijiang_engines.building import ahead  # noqa: E402
from dijiang_engines.formats.manifest import graph_io  # noqa: E402
from dijiang_engines.nvidia import tensorrt_library as library  # noqa: E402
from dijiang_engines.nvidia.tensorrt_versions import TENSORRT_RTX, activation_bytes, dialect_of  # noqa: E402
from dijiang_engines.runners.tensorrt.checks import check_tensors  # noqa: E402
from dijiang_engines.runners.tensorrt.contexts import Contexts, Gpu, integers_of  # noqa: E402
from dijiang_engines.runners.tensorrt.kernel_cache import KernelCache  # noqa: E402
from dijiang_engines.runners.tensorrt.rtx import RtxContexts  # noqa: E402

SPEC: Any = SimpleNamespace(num_layers=2, state_shape=(2, 16, 16), vocab_size=100)
CALLS = Calls()


def strict(kind: str, **values: Any) -> Any:
    return Strict(trt, getattr(trt, kind), CALLS, **values)


def names() -> None:
    found = check_names(trt, Path(ahead.__file__).parents[2], "RTX")
    CALLS.used |= found.used
    assert not found.missing, found.missing


def loading(folder: Path) -> None:
    """The module, its version and log, the plugin registry, and reading a plan."""
    assert library.tensorrt_version(trt, TENSORRT_RTX) == trt.__version__.rpartition(".")[0]
    messages: list[str] = []
    logger = library.make_logger(trt, messages)
    logger.log(trt.ILogger.ERROR, "an error")
    assert messages == ["error: an error"]
    assert trt.Runtime(logger) is not None, "the real one"
    found = library.TensorRT.__new__(library.TensorRT)
    found.trt, found.messages, found.logger = trt, messages, logger
    found.dialect = dialect_of("1.7.1", TENSORRT_RTX)
    found.product, found.version = library.RUNTIMES[TENSORRT_RTX], "1.7.1"
    (folder / "a.plan").write_bytes(b"x" * 100)
    runtime = strict("Runtime", deserialize_cuda_engine=lambda plan: len(memoryview(plan)))
    with mock.patch.object(trt, "Runtime", return_value=runtime):
        assert found.load_plan(folder / "a.plan") == 100
    assert list(trt.get_plugin_registry().all_creators) is not None


def plan_of(contexts: list[Any]) -> Any:
    inputs, outputs = graph_io(SPEC, step=False, all_logits=False)
    tensors = [*inputs, *outputs]
    context = strict("IExecutionContext", is_stream_capturable=lambda stream: True)

    def create(config: Any) -> Any:
        contexts.append(config)
        return context

    return strict(
        "ICudaEngine", num_io_tensors=len(tensors), device_memory_size_v2=1 << 20,
        get_tensor_name=lambda index: tensors[index].name,
        get_tensor_shape=lambda name: [
            -1 if isinstance(size, str) else size for size in next(t for t in tensors if t.name == name).shape
        ],
        get_tensor_dtype=lambda name: trt.DataType.INT64,
        create_runtime_config=lambda: strict("IRuntimeConfig", create_runtime_cache=cache),
        create_execution_context=create,
    )  # fmt: skip


def cache() -> Any:
    return strict("IRuntimeCache", serialize=lambda: b"kernels", deserialize=lambda blob: True)


def running(folder: Path) -> None:
    """Contexts with their settings, a cache that is kept, a step that is recorded."""
    given: Any = SimpleNamespace(
        spec=SPEC, all_logits=False, layout="one", profiles=SimpleNamespace(max_batch=4, max_length=64),
        prefill=SimpleNamespace(file="model.plan", profile=0), made_for=SimpleNamespace(graphs="standard"),
        step=SimpleNamespace(file="model.plan", profile=1), path=folder, plans=("model.plan",),
        files={"model.plan": SimpleNamespace(sha256="0" * 64)},
    )  # fmt: skip
    gpu_facts: Any = SimpleNamespace(name="GPU", compute_capability=89, driver="13.0")
    made: list[Any] = []
    plan = plan_of(made)
    assert activation_bytes(plan) == 1 << 20
    check_tensors(given, given.prefill, plan)
    integers = integers_of(mock.Mock(trt=trt), plan)
    cuda: Any = mock.MagicMock(buffer=lambda size: SimpleNamespace(address=4096, size=size))
    gpu = Gpu(cuda, mock.MagicMock(handle=77), integers)
    for loaded in (False, True):
        kept = KernelCache(given, "1.7.1", gpu_facts)
        rtx = RtxContexts(mock.Mock(trt=trt), kept)
        contexts = Contexts(given, {"model.plan": plan}, mock.Mock(trt=trt), gpu, rtx)
        state: Any = mock.Mock(batch=2, graph=None, memory=SimpleNamespace(address=1, size=2))
        state.addresses.return_value = {io_names.INPUT_IDS: 4096, io_names.LOGITS: 8192}
        contexts.step_of(state, recorded=True)()
        contexts.set_shapes(contexts.for_prefill(), 2, 5)
        kept.save()
        assert kept.loaded is loaded and kept.path.is_file() and kept.note is None
    strategies = [c.dynamic_shapes_kernel_specialization_strategy for c in made]
    kinds = trt.DynamicShapesKernelSpecializationStrategy
    assert strategies == [kinds.EAGER, kinds.LAZY] * 2
    assert {c.cuda_graph_strategy for c in made} == {trt.CudaGraphStrategy.DISABLED}
    asked = CALLS.arguments("IRuntimeConfig.set_execution_context_allocation_strategy")
    assert asked == [["ExecutionContextAllocationStrategy.USER_MANAGED"]] * 4
    assert len(CALLS.arguments("IRuntimeConfig.set_runtime_cache")) == 4
    assert CALLS.arguments("IExecutionContext.is_stream_capturable") == [["77"]] * 2
    assert ["input_ids", "(2, 5)"] in CALLS.arguments("IExecutionContext.set_input_shape")


def main() -> int:
    failures: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as name:
        checks = {
            "names": names,
            "loading": lambda: loading(Path(name)),
            "running": lambda: running(Path(name)),
        }
        for what, check in checks.items():
            try:
                check()
            except BaseException as error:  # noqa: BLE001
                failures[what] = f"{type(error).__name__}: {error}"
    found = {"version": trt.__version__, "used": sorted(CALLS.used), "failures": failures}
    Path(sys.argv[2]).write_text(json.dumps(found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
