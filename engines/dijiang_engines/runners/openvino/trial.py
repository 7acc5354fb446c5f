"""Does OpenVINO compute on this machine? A model of one node, run in a process of its own.

As `onnxruntime.trial`: `python -m dijiang_engines.runners.openvino.trial openvino-cpu`.
"""

from __future__ import annotations

from dijiang_engines.runners.onnxruntime.trial import doubling_model, report
from dijiang_engines.runners.openvino.config import DEVICES
from dijiang_engines.runners.openvino.library import check_device, openvino_module


def main() -> None:
    """What `fresh_interpreter` runs."""
    report(run_one_node)


def run_one_node(runner: str) -> tuple[bool, str]:
    """Run `doubling_model` in this process; whether the numbers were right, and a line about it.

    Args:
        runner: a name in `config.DEVICES`, as for `--runner`.

    Raises:
        RunnerError: OpenVINO is absent, or does not find the device.
    """
    import numpy as np

    ov = openvino_module()
    core = ov.Core()
    check_device(core, runner)
    device = DEVICES[runner]
    compiled = core.compile_model(core.read_model(doubling_model()), device)
    x = np.arange(4, dtype=np.float32)
    y = compiled({"x": x})[0]
    if not np.array_equal(y, x + x):
        return False, f"0 1 2 3 doubled gave {y.tolist()}"
    return True, f"ran a one-node model on {core.get_property(device, 'FULL_DEVICE_NAME')}"


if __name__ == "__main__":
    main()
