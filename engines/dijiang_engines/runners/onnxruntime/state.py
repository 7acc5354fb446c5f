"""A state's device buffers, the step's bindings on them, and their reuse."""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np

from dijiang_engines.errors import RunnerError
from dijiang_engines.runners.base import FloatArray, IntArray
from dijiang_engines.runners.onnxruntime.cuda import GRAPH_ID, NO_GRAPH, capture

if TYPE_CHECKING:
    from dijiang_engines.runners.onnxruntime.runner import OrtRunner

MAX_IDLE = 4
"""Slots that wait for a new state of their size."""


class IntInput:
    """An integer input that is refilled for each call; its address stays."""

    def __init__(self, ort: Any, shape: tuple[int, ...], device: str, index: int) -> None:
        self._array = np.zeros(shape, np.int64)
        self._on_host = device == "cpu"
        # On the CPU the OrtValue is the array itself; it keeps a reference to it.
        self.value = ort.OrtValue.ortvalue_from_numpy(self._array, device, index)

    def fill(self, values: IntArray) -> None:
        """Put `values` there; what is there already is not copied again."""
        if self._on_host:
            self._array[...] = values
        elif not np.array_equal(self._array, values):
            self._array[...] = values
            self.value.update_inplace(self._array)


class Slot:
    """Two sets of state tensors for `batch` sequences, and the step bound to them once there is one."""

    def __init__(self, runner: OrtRunner, batch: int) -> None:
        self.batch = batch
        self.sets = [[runner._zeros(batch) for _ in range(runner.spec.num_layers)] for _ in range(2)]
        self.step: Step | None = None


class Step:
    """A step's inputs, logits and its two bindings (reading set 0, reading set 1)."""

    def __init__(self, runner: OrtRunner, slot: Slot) -> None:
        self.batch = slot.batch
        self.vocab_size = runner.spec.vocab_size
        self.session = runner._session("step")
        self._inputs = [runner._int_input(shape) for shape in ((self.batch, 1), (self.batch,), (self.batch,))]
        self.logits = runner._from_numpy(np.zeros((self.batch, 1, self.vocab_size), np.float32))
        """On the device: a CUDA graph cannot end on the host."""
        self._bindings = [
            runner._bind(self.session, [i.value for i in self._inputs], self.logits, slot.sets, front)
            for front in range(2)
        ]
        self._runner = runner
        self._options: list[Any] = [None, None]  # of runs that have a graph, or that must not make one

    def fill(self, arrays: list[IntArray]) -> None:
        """Put token ids [B, 1], positions [B] and seq_lens [B] into the inputs."""
        for target, array in zip(self._inputs, arrays, strict=True):
            target.fill(array)

    def prepare(self, slot: Slot, front: int) -> str | None:
        """Before the first run that reads set `front`: make a CUDA graph of it, if the runner has graphs.

        Returns:
            Why that failed, or None. The current state is as before in any case.
        """
        if self._options[front] is not None or not self._runner.cuda_graphs.enabled:
            return None
        graph_id = self._runner.cuda_graphs.take_id()
        if graph_id is None:
            self._options[front] = self._run_options(NO_GRAPH)
            return None

        def run(name: str) -> None:
            self._runner._call(self.session, self._bindings[front], self._run_options(name))

        try:
            capture(self, slot, front, graph_id, run, self._runner.spec.max_positions)
        except RunnerError as error:
            return f"{error.what}: {error.got}"
        except RuntimeError as error:  # a copy that a capture by someone else in this process forbade
            return f"ONNX Runtime could not copy: {' '.join(str(error).split())[:300]}"
        self._options[front] = self._run_options(str(graph_id))
        return None

    def run(self, front: int) -> FloatArray:
        """One step that reads set `front` and writes the other; returns a copy of the logits [B, 1, V]."""
        self._runner._call(self.session, self._bindings[front], self._options[front])
        return np.array(self.logits.numpy())  # on the CPU the next step writes into the same place

    def _run_options(self, graph_id: str) -> Any:
        options = self._runner._ort.RunOptions()
        options.add_run_config_entry(GRAPH_ID, graph_id)
        return options


class Slots:
    """Lends slots to states and takes them back: a captured graph is bound to its slot's addresses."""

    def __init__(self, runner: OrtRunner) -> None:
        self._runner = weakref.ref(runner)
        self._idle: list[Slot] = []
        self._lock = threading.Lock()

    def take(self, batch: int) -> Slot:
        """A slot whose first set is zero."""
        runner = self._runner()
        assert runner is not None
        with self._lock:
            found = next((slot for slot in self._idle if slot.batch == batch), None)
            if found is not None:
                self._idle.remove(found)
        if found is None:
            return Slot(runner, batch)
        runner._zero_rows(found.sets[0], range(batch))
        return found

    def give(self, slot: Slot) -> None:
        """Take a slot back; the one that has waited longest goes if there are too many."""
        runner = self._runner()
        if runner is None or not runner.cuda_graphs.enabled or slot.step is None:
            return
        with self._lock:
            self._idle.append(slot)
            del self._idle[:-MAX_IDLE]


class OrtState:
    """The state of `batch` sequences: two sets of device tensors and the bindings that swap them."""

    def __init__(self, owner: OrtRunner, batch: int) -> None:
        self.owner = owner
        self.batch = batch
        self.front = 0
        """Which set holds the current state."""
        self.slot = owner._slots.take(batch)
        weakref.finalize(self, owner._slots.give, self.slot).atexit = False

    @property
    def sets(self) -> list[list[Any]]:
        """Two sets of one OrtValue [B, H, d, d] per layer."""
        return self.slot.sets

    @property
    def step(self) -> Step | None:
        """The bound step, once there was one."""
        return self.slot.step
