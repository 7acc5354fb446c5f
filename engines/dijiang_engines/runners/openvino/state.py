"""A batch's state, and the requests that compute with it.

While tokens are generated, a state lives in the variables of an infer request of its own, where each step
finds it. Prefills share one request, and take a state there and back: two copies of some megabytes beside
hundreds of tokens. What is in NumPy and what is in a request are both kept while both are right.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from dijiang_engines import io_names
from dijiang_engines.runners.base import FloatArray, IntArray
from dijiang_engines.runners.openvino.library import failed
from dijiang_engines.runners.openvino.models import Models
from dijiang_engines.spec import ModelSpec

INPUTS = (io_names.INPUT_IDS, io_names.POSITIONS, io_names.SEQ_LENS)


class Request:
    """An infer request of a compiled graph: what goes in and out, and the state in its variables.

    Args:
        models: whose it is.
        compiled: a graph of theirs.
    """

    def __init__(self, models: Models, compiled: Any) -> None:
        self._models, self._tensor = models, models.ov.Tensor
        self.request = compiled.create_infer_request()
        self._given: list[IntArray] = []
        by_name = {state.name: state for state in self.request.query_state()}
        self._variables = [
            next(state for name, state in by_name.items() if name.startswith(io_names.past_state(layer)))
            for layer in range(models.bundle.spec.num_layers)
        ]
        """One a layer: MakeStateful calls a variable by its input's name and its output's."""

    def run(self, arrays: Sequence[IntArray]) -> FloatArray:
        """One run; the weights are what was opened, before it and after.

        Args:
            arrays: token ids [B, L], positions [B] and seq_lens [B], int64.

        Returns:
            A copy of the logits.

        Raises:
            BundleError: the weights were changed.
            RunnerError: OpenVINO failed.
        """
        self._models.check_weights()
        try:
            self._give(arrays)
            self.request.infer()
            logits = np.array(self.request.get_tensor(io_names.LOGITS).data)
        except Exception as error:
            raise failed("OpenVINO failed while running the graph", error) from error
        self._models.check_weights()
        return logits

    def _give(self, arrays: Sequence[IntArray]) -> None:
        """Bound once, and refilled while shapes stay."""
        if [array.shape for array in arrays] != [array.shape for array in self._given]:
            self._given = [np.empty(array.shape, np.int64) for array in arrays]
            for name, array in zip(INPUTS, self._given, strict=True):
                self.request.set_tensor(name, self._tensor(array, shared_memory=True))
        for target, array in zip(self._given, arrays, strict=True):
            target[...] = array

    def read(self) -> list[FloatArray]:
        """Copies of the state, [B, H, d, d] a layer."""
        return [np.array(variable.state.data, np.float32) for variable in self._variables]

    def write(self, layers: Sequence[FloatArray]) -> None:
        """Put a state there; it is copied."""
        for variable, layer in zip(self._variables, layers, strict=True):
            variable.state = self._tensor(layer, shared_memory=True)


class Prefills:
    """The request that prefills of all states share, one at a time."""

    def __init__(self, models: Models) -> None:
        self._models = models
        self._request: Request | None = None
        self._alone = threading.Lock()

    def run(self, arrays: Sequence[IntArray], state: OvState) -> FloatArray:
        """A prefill that takes `state` on; raises as `Models.prefill` and `Request.run`."""
        with self._alone:
            if self._request is None:
                self._request = Request(self._models, self._models.prefill())
            self._request.write(state.layers())
            logits = self._request.run(arrays)
            state.replace(self._request.read())
            return logits


class OvState:
    """The state of `batch` sequences.

    Args:
        owner: the runner that made it.
        models: its.
        layers: float32 [B, H, d, d] each, which become this state's own.
    """

    def __init__(self, owner: object, models: Models, layers: list[FloatArray]) -> None:
        self.owner, self.batch = owner, len(layers[0])
        self._models = models
        self._layers: list[FloatArray] | None = layers
        """In NumPy; None if steps have gone beyond it."""
        self._request: Request | None = None
        self._loaded = False
        """Whether the request's variables hold this state."""

    def layers(self) -> list[FloatArray]:
        """The state in NumPy. Not to be written: that is what `replace` is for."""
        if self._layers is None:
            assert self._request is not None
            self._layers = self._request.read()
        return self._layers

    def replace(self, layers: list[FloatArray]) -> None:
        """Go on from other values."""
        self._layers, self._loaded = layers, False

    def step(self, arrays: Sequence[IntArray]) -> FloatArray:
        """One step from here; raises as `Models.step` and `Request.run`."""
        if self._request is None:
            self._request = Request(self._models, self._models.step(self.batch))
        if not self._loaded:
            self._request.write(self.layers())
            self._loaded = True
        logits = self._request.run(arrays)
        self._layers = None
        return logits


def zeros(spec: ModelSpec, batch: int) -> list[FloatArray]:
    """A new state's layers."""
    return [np.zeros((batch, *spec.state_shape), np.float32) for _ in range(spec.num_layers)]
