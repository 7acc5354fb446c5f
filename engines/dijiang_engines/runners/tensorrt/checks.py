"""What is compared before an engine runs: what it was made for, and what its plans read and write."""

from __future__ import annotations

from typing import Any

from dijiang_engines.errors import BundleError, RunnerError
from dijiang_engines.formats.engine import REBUILD, EngineFolder, PlanPlace
from dijiang_engines.formats.file_table import ENGINE_MANIFEST
from dijiang_engines.formats.manifest import graph_io
from dijiang_engines.nvidia.tensorrt_library import TensorRT


def check_made_for(engine: EngineFolder, tensorrt: TensorRT, gpu: str, capability: int) -> None:
    """Compare what an engine was made for with what is here.

    Raises:
        RunnerError: TensorRT, GPU or plugin is another: one sentence instead of a crash in TensorRT.
    """
    made = engine.made_for
    differences = (
        ("TensorRT", made.tensorrt, tensorrt.version),
        ("GPU", f"{made.gpu}, sm_{made.compute_capability}", f"{gpu}, sm_{capability}"),
        ("plugin", made.plugin_sources[:12], tensorrt.plugin.sources[:12]),
    )
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
