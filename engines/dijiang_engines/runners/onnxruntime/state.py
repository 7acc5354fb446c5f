"""A state's device buffers, the step bound to them, its CUDA graphs, and the reuse of all three.

ONNX Runtime captures a graph per `gpu_graph_id`: the first run with an id runs the step two or three times
(to allocate, then to capture) and once more as a graph; later runs only launch the graph, on the addresses
that it saw. So whatever a step reads or writes has one address for good, and past and present are two
buffers: a first run that updated one in place would advance the state several times.

A captured copy from host memory reads that memory again at each launch, and ONNX Runtime gives it to
others meanwhile (microsoft/onnxruntime#32121), so only graphs that are lowered without such copies are
captured (`cuda.CAPTURABLE`). And no graph is trusted unseen: before a binding is used, the graph must do on
two different inputs and pasts what a plain run did, or steps go on without graphs.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dijiang_engines.errors import RunnerError
from dijiang_engines.runners.base import FloatArray, IntArray
from dijiang_engines.runners.onnxruntime.sessions import Sessions, Tensors, bind

MAX_IDLE = 4
"""Slots that wait for a new state of their size."""
GRAPH_ID = "gpu_graph_id"
NO_GRAPH = "-1"

_SMALL_STATE = 64 << 20
"""Bytes up to which every layer's state is compared; of larger ones the first, middle and last layer's."""
_SAME = 0.01
"""Largest difference between a graph and a plain run, in units of the largest value: kernels that are
chosen anew may round differently; a graph with a stale address is off by the size of the values."""

Sets = list[list[Any]]
"""Two sets of one OrtValue [B, H, d, d] float32 per layer: a step reads one and writes the other."""


class Step:
    """A step's inputs, logits and its two bindings (reading set 0, reading set 1).

    Args:
        sessions: whose step runs.
        tensors: makes what it reads and writes besides the state.
        batch: rows, B.
        sets: the state's.
    """

    def __init__(self, sessions: Sessions, tensors: Tensors, batch: int, sets: Sets) -> None:
        self.batch, self.vocab_size = batch, tensors.spec.vocab_size
        self.session = sessions.get("step")
        self._sessions, self._sets = sessions, sets
        self._limit = tensors.spec.max_positions
        self._inputs = tensors.int_inputs(batch, 1)
        self.logits = tensors.from_numpy(np.zeros((batch, 1, self.vocab_size), np.float32))
        """On the device: a CUDA graph cannot end on the host."""
        inputs = [given.value for given in self._inputs]
        self.bindings = [bind(self.session, inputs, self.logits, *pair) for pair in (sets, sets[::-1])]
        """One for each set that is read."""
        self._options: list[Any] = [None, None]  # of runs that have a graph, or that must not make one

    def fill(self, arrays: Sequence[IntArray]) -> None:
        """Put token ids [B, 1], positions [B] and seq_lens [B] into the inputs."""
        for target, array in zip(self._inputs, arrays, strict=True):
            target.fill(array)

    def prepare(self, front: int) -> str | None:
        """Before the first run that reads set `front`: make a CUDA graph of it, if the runner has graphs.

        Returns:
            Why that failed, or None. The current state is as before in any case.
        """
        graphs = self._sessions.graphs
        if self._options[front] is not None or not graphs.enabled:
            return None
        graph_id = graphs.take_id()
        if graph_id is None:
            self._options[front] = self._run_options(NO_GRAPH)
            return None

        def run(name: str) -> None:
            self._sessions.run(self.session, self.bindings[front], self._run_options(name))

        try:
            capture(self, self._sets[front], self._sets[1 - front], graph_id, run, self._limit)
        except RunnerError as error:
            return f"{error.what}: {error.got}"
        except RuntimeError as error:  # a copy that a capture by someone else in this process forbade
            return f"ONNX Runtime could not copy: {' '.join(str(error).split())[:300]}"
        self._options[front] = self._run_options(str(graph_id))
        return None

    def run(self, front: int) -> FloatArray:
        """One step that reads set `front` and writes the other; returns a copy of the logits [B, 1, V]."""
        self._sessions.run(self.session, self.bindings[front], self._options[front])
        return np.array(self.logits.numpy())  # on the CPU the next step writes into the same place

    def graph_id(self, front: int) -> str:
        """Under which id the binding that reads set `front` runs."""
        options = self._options[front]
        return NO_GRAPH if options is None else str(options.get_run_config_entry(GRAPH_ID))

    def _run_options(self, graph_id: str) -> Any:
        return self._sessions.run_options(GRAPH_ID, graph_id)


class Slot:
    """Two sets of state tensors for `batch` sequences, and the step bound to them once there is one."""

    def __init__(self, tensors: Tensors, batch: int) -> None:
        self.batch = batch
        self.sets: Sets = [tensors.state(batch) for _ in range(2)]
        self.step: Step | None = None
        self._tensors = tensors

    def ready_step(self, sessions: Sessions, front: int) -> Step:
        """The step, ready to run from set `front`, as a CUDA graph if steps are.

        Raises:
            BundleError, RunnerError: as `Sessions.get`.
        """
        if self.step is None or not sessions.holds("step", self.step.session):
            self._bind(sessions)
        assert self.step is not None
        why = self.step.prepare(front)
        if why is not None:  # go on without graphs, in a session that was never told of them
            sessions.graphs.turn_off(why)
            sessions.give_up("step")
            self._bind(sessions)
        return self.step

    def _bind(self, sessions: Sessions) -> None:
        self.step = None  # of a session that was given up: let it go before the next one is loaded
        self.step = Step(sessions, self._tensors, self.batch, self.sets)


class Slots:
    """Lends slots to states and takes them back: a captured graph is bound to its slot's addresses."""

    def __init__(self, sessions: Sessions, tensors: Tensors) -> None:
        self.sessions, self._tensors = sessions, tensors
        self.idle: list[Slot] = []
        """Those that wait, the one that has waited longest first."""
        self._lock = threading.Lock()

    def take(self, batch: int) -> Slot:
        """A slot whose first set is zero."""
        with self._lock:
            found = next((slot for slot in self.idle if slot.batch == batch), None)
            if found is not None:
                self.idle.remove(found)
        if found is None:
            return Slot(self._tensors, batch)
        self._tensors.zero_rows(found.sets[0], range(batch))
        return found

    def give(self, slot: Slot) -> None:
        """Take a slot back; the one that has waited longest goes if there are too many."""
        if not self.sessions.graphs.enabled or slot.step is None:
            return
        with self._lock:
            self.idle.append(slot)
            del self.idle[:-MAX_IDLE]


class OrtState:
    """The state of `batch` sequences: two sets of device tensors and the bindings that swap them.

    Args:
        owner: the runner that made it.
        slots: lends the tensors, and gets them back when the state is gone.
        batch: rows, B.
    """

    def __init__(self, owner: object, slots: Slots, batch: int) -> None:
        self.owner, self.batch = owner, batch
        self.front = 0
        """Which set holds the current state."""
        self.slot = slots.take(batch)
        self._sessions = slots.sessions
        weakref.finalize(self, slots.give, self.slot).atexit = False

    @property
    def past(self) -> list[Any]:
        """The current state: one OrtValue [B, H, d, d] per layer."""
        return self.slot.sets[self.front]

    @property
    def present(self) -> list[Any]:
        """What the next call writes."""
        return self.slot.sets[1 - self.front]

    def swap(self) -> None:
        """After a call: what it wrote is the current state."""
        self.front = 1 - self.front

    def ready_step(self) -> Step:
        """The step that reads the current set, ready to run; see `Slot.ready_step`."""
        return self.slot.ready_step(self._sessions, self.front)


def capture(
    step: Step,
    past: list[Any],
    present: list[Any],
    graph_id: int,
    run: Callable[[str], None],
    limit: int | None,
) -> None:
    """Capture the binding that reads `past`, and check the graph against plain runs.

    Args:
        step: of a session made for graphs.
        past: the set that holds the current state; as before afterwards.
        present: the other set; scratch.
        graph_id: a new one.
        run: runs the binding under a graph id, NO_GRAPH for none.
        limit: positions that the model knows, None for any.

    Raises:
        RunnerError: ONNX Runtime cannot capture, or graph and plain runs differ.
    """
    layers = list(range(len(past)))
    if sum(value.tensor_size_in_bytes() for value in past) > _SMALL_STATE:
        layers = sorted({0, len(past) // 2, len(past) - 1})
    saved = {layer: np.array(past[layer].numpy()) for layer in layers}
    probes = _probes(step, 2 if limit is None else min(2, limit - 1))

    def set_up(probe: int) -> None:
        step.fill(probes[probe])
        for layer in layers:
            past[layer].update_inplace(np.full(saved[layer].shape, (0.5, -1.25)[probe], np.float32))

    def results() -> list[npt.NDArray[np.float32]]:
        return [np.array(value.numpy()) for value in (step.logits, *(present[layer] for layer in layers))]

    try:
        expected = []
        for probe in range(2):
            set_up(probe)
            run(NO_GRAPH)
            expected.append(results())
        for probe in range(2):
            set_up(probe)
            run(str(graph_id))
            _compare(results(), expected[probe])
    finally:
        for layer, array in saved.items():
            past[layer].update_inplace(array)


def _probes(step: Step, position: int) -> list[list[npt.NDArray[np.int64]]]:
    """Two inputs that differ in tokens, positions and, with several rows, in who has a token."""
    rows = np.arange(step.batch)
    some = np.ones(step.batch, np.int64)
    fewer = some.copy()
    fewer[1:2] = 0
    tokens = (rows % step.vocab_size, (rows + 1 + step.vocab_size // 2) % step.vocab_size)
    return [
        [tokens[0][:, None], np.zeros(step.batch, np.int64), some],
        [tokens[1][:, None], np.full(step.batch, position), fewer],
    ]


def _compare(got: list[npt.NDArray[np.float32]], expected: list[npt.NDArray[np.float32]]) -> None:
    for index, (one, other) in enumerate(zip(got, expected, strict=True)):
        scale = float(np.abs(other).max())
        difference = float(np.abs(one - other).max())
        if not difference <= _SAME * scale:  # also if either is not a number
            what = "logits" if index == 0 else "state"
            raise RunnerError(
                f"the captured step's {what} differ from a plain run's",
                got=f"{difference:.2g} of {scale:.2g}",
            )
