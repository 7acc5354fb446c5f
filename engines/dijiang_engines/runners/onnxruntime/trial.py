"""Does ONNX Runtime compute on this machine? A model of one node, run in a process of its own.

`doctor` starts it through `fresh_interpreter`, so that a runtime which hangs or crashes is a finding and not
the end: `python -m dijiang_engines.runners.onnxruntime.trial onnxruntime-cpu`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

from dijiang_engines.errors import RunnerError
from dijiang_engines.formats.onnx_write import field
from dijiang_engines.runners.onnxruntime.providers import PROVIDERS, RTX
from dijiang_engines.runners.onnxruntime.rtx import rtx_device


def report(run: Callable[[str], tuple[bool, str]]) -> None:
    """Try the runner that the first argument names; print the outcome as one line of JSON.

    Args:
        run: runner -> whether the numbers were right, and a line about it.
    """
    try:
        works, detail = run(sys.argv[1])
    except Exception as error:  # noqa: BLE001 - whatever a broken runtime throws is the finding
        words = error.what if isinstance(error, RunnerError) else f"{type(error).__name__}: {error}"
        if isinstance(error, RunnerError) and error.got is not None:
            words += f": {error.got}"
        works, detail = False, " ".join(words.split())[:300]
    print(json.dumps({"works": works, "detail": detail}))


def main() -> None:
    """What `fresh_interpreter` runs."""
    report(run_one_node)


def run_one_node(runner: str) -> tuple[bool, str]:
    """Run `doubling_model` in this process; whether the numbers were right, and a line about it.

    Args:
        runner: a name in `providers.PROVIDERS`, as for `--runner`.
    """
    import numpy as np
    import onnxruntime as ort

    provider = PROVIDERS[runner]
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if runner == RTX:
        options.add_provider_for_devices([rtx_device(ort)], {})
        session = ort.InferenceSession(doubling_model(), options)
    elif provider not in ort.get_available_providers():
        return False, f"this build of ONNX Runtime has no {provider}"
    else:
        session = ort.InferenceSession(doubling_model(), options, providers=[provider])
    if session.get_providers()[0] != provider:
        return False, f"{provider} could not be started; its libraries do not load"
    x = np.arange(4, dtype=np.float32)
    (y,) = session.run(None, {"x": x})
    if not np.array_equal(y, x + x):
        return False, f"0 1 2 3 doubled gave {y.tolist()}"
    return True, f"ran a one-node model on {provider}"


def doubling_model() -> bytes:
    """An ONNX model y = x + x, float32 [4] (opset 17, IR 8), written field by field: `onnx` is not needed."""

    def value_info(name: str) -> bytes:
        shape = field(2, field(1, field(1, 4)))  # TensorShapeProto.dim.dim_value
        tensor = field(1, field(1, 1) + shape)  # TypeProto.tensor_type: elem_type FLOAT
        return field(1, name) + field(2, tensor)

    node = field(1, "x") + field(1, "x") + field(2, "y") + field(4, "Add")
    graph = field(1, node) + field(2, "double") + field(11, value_info("x")) + field(12, value_info("y"))
    return field(1, 8) + field(7, graph) + field(8, field(1, "") + field(2, 17))


if __name__ == "__main__":
    main()
