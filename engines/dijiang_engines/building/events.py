"""What a builder's process says: events to its parent, and the rest on standard error, which is the log."""

from __future__ import annotations

import json
import os
import resource
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

PARSING = "Parsing"
"""The phase in which the ONNX parser reads the graph."""
NODE = "Parsing node: "
"""How the parser's log names each node before it reads it (onnx-tensorrt, ModelImporter.cpp)."""


class Events:
    """The way to the parent."""

    def __init__(self, descriptor: int) -> None:
        self._file: TextIO = os.fdopen(descriptor, "w", encoding="utf-8")
        self._lock = threading.Lock()

    def send(self, event: str, **values: Any) -> None:
        """One line."""
        with self._lock, suppress(BrokenPipeError):
            self._file.write(json.dumps({"event": event, **values}) + "\n")
            self._file.flush()


def write_plan(events: Events, path: Path, plan: Any, started: float, **facts: Any) -> None:
    """The end of a build: the plan in its file, and "done" with `facts`.

    Args:
        events: told.
        path: of the plan; must not exist.
        plan: what the builder returned, a buffer.
        started: by `time.perf_counter`.
    """
    events.send("phase", name="Writing", steps=None)
    with open(path, "xb") as file:
        file.write(memoryview(plan))
    host = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    events.send("done", seconds=time.perf_counter() - started, peak_host_bytes=host, **facts)


def progress_monitor(trt: Any, events: Events) -> Any:
    """An IProgressMonitor that tells `events` of the two outermost phases; None if there is no such thing."""
    if not hasattr(trt, "IProgressMonitor"):
        return None

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._outer: list[str] = []

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._outer.append(phase_name)
            if len(self._outer) <= 2:
                events.send("phase", name=phase_name, steps=num_steps)

        def phase_finish(self, phase_name: str) -> None:
            with suppress(ValueError):
                self._outer.remove(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self._outer[:2]:
                events.send("step", name=phase_name, step=step)
            return True

    return Monitor()


def list_layers(network: Any) -> None:
    """Print what was parsed, for the log."""
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        types = [str(layer.get_output(i).dtype) for i in range(layer.num_outputs)]
        precision = getattr(layer, "precision", None)  # 11: layers have none
        print(f"layer {layer.name} {layer.type} {precision} {types}", file=sys.stderr)
