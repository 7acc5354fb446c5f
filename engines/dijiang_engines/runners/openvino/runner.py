"""OpenVINO behind the Runner protocol."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dijiang_engines.formats.bundle import Bundle
from dijiang_engines.runners.base import FloatArray, IntArray
from dijiang_engines.runners.checks import (
    check_batch,
    check_call,
    check_copy,
    check_layers,
    check_owner,
    check_row_layers,
    check_rows,
)
from dijiang_engines.runners.openvino.config import CPU, OvOptions, resolve, weight_bytes, widens
from dijiang_engines.runners.openvino.models import Models
from dijiang_engines.runners.openvino.state import OvState, Prefills, zeros


class OvRunner:
    """A bundle on OpenVINO. Everything is computed in float32, whatever the bundle's type.

    Args:
        bundle: an opened bundle.
        name: "openvino-cpu" or "openvino-gpu".
        threads: None leaves it to OpenVINO, within the container's CPU quota.
        fixed_batches: how many batch sizes get a step of their own, compiled when the first step with so many
            rows comes: faster than the step of any size that others share, and with weights of its own.
            None: up to 4, as far as their weights fit into a quarter of the memory that is free now.

    Attributes:
        config: the options in force.
        models: what is compiled.

    Raises:
        UsageError: an unknown value of an option.
        RunnerError: OpenVINO is absent, or does not find the device.
    """

    def __init__(
        self, bundle: Bundle, name: str = CPU, *, threads: int | None = None, fixed_batches: int | None = None
    ) -> None:
        options = OvOptions(threads, fixed_batches)
        self.name = name
        self.bundle = bundle
        self.spec = bundle.spec
        self.all_logits = bundle.all_logits
        self.config = resolve(options, bundle, name)
        self.models = Models(bundle, self.config)
        self._prefills = Prefills(self.models)
        self._rows = 1

    # -- Runner ----------------------------------------------------------------------------------------

    def new_state(self, batch: int) -> OvState:
        """A zeroed state for `batch` sequences."""
        check_batch(self, batch)
        self._rows = int(batch)
        return OvState(self, self.models, zeros(self.spec, self._rows))

    def prefill(
        self, input_ids: IntArray, positions: IntArray, seq_lens: IntArray, state: OvState
    ) -> FloatArray:
        """Consume up to L tokens a row; see `Runner.prefill`."""
        check_owner(self, state, OvState)
        return self._prefills.run(check_call(self, input_ids, positions, seq_lens, state.batch), state)

    def step(
        self, input_ids: IntArray, positions: IntArray, seq_lens: IntArray, state: OvState
    ) -> FloatArray:
        """Consume at most one token a row; see `Runner.step`."""
        check_owner(self, state, OvState)
        return state.step(check_call(self, input_ids, positions, seq_lens, state.batch, step=True))

    def export_state(self, state: OvState) -> list[FloatArray]:
        """Copies of the state, one [B, H, d, d] array per layer."""
        check_owner(self, state, OvState)
        return [layer.copy() for layer in state.layers()]

    def import_state(self, layers: list[FloatArray]) -> OvState:
        """A state that holds copies of `layers`."""
        copies = [np.array(layer) for layer in check_layers(self.spec, layers)]
        self._rows = len(copies[0])
        return OvState(self, self.models, copies)

    def reset_rows(self, state: OvState, rows: Sequence[int]) -> None:
        """Zero these rows of the state in place; see `Runner.reset_rows`."""
        check_owner(self, state, OvState)
        found = check_rows(rows, state.batch)
        if not found:
            return
        layers = self.export_state(state)
        for layer in layers:
            layer[found] = 0
        state.replace(layers)

    def get_rows(self, state: OvState, rows: Sequence[int]) -> list[FloatArray]:
        """Copies of these rows; see `Runner.get_rows`."""
        check_owner(self, state, OvState)
        found = check_rows(rows, state.batch)
        return [layer[found] for layer in state.layers()]

    def put_rows(self, state: OvState, rows: Sequence[int], layers: list[FloatArray]) -> None:
        """Copy `layers` into these rows; see `Runner.put_rows`."""
        check_owner(self, state, OvState)
        self._put(state, *check_row_layers(self.spec, rows, state.batch, layers))

    def copy_rows(self, source: OvState, rows: Sequence[int], target: OvState, places: Sequence[int]) -> None:
        """Copy rows into rows of another state; see `Runner.copy_rows`."""
        pairs = check_copy(self, OvState, source, rows, target, places)
        if pairs:
            found, ends = (list(each) for each in zip(*pairs, strict=True))
            self._put(target, ends, [layer[found] for layer in source.layers()])

    def _put(self, state: OvState, rows: list[int], arrays: list[FloatArray]) -> None:
        layers = self.export_state(state)
        for layer, array in zip(layers, arrays, strict=True):
            layer[rows] = array
        state.replace(layers)

    # -- beside the protocol -----------------------------------------------------------------------------

    def warm_up(self, prefill: bool = True, step: bool = True) -> None:
        """Compile the graphs now rather than on first use; the step for the newest state's rows."""
        if prefill:
            self.models.prefill()
        if step:
            self.models.step(self._rows)

    def settings(self) -> dict[str, str | int | bool]:
        """How the runner was set up; 0 threads: OpenVINO chooses."""
        return {
            "threads": self.config.threads, "fixed_batches": self.config.fixed_batches,
            "precision": "float32",
        }  # fmt: skip

    def notes(self) -> list[str]:
        """What becomes of weights in half precision."""
        if not widens(self.bundle):
            return []
        taken = f"{weight_bytes(self.bundle) / 1e6:,.0f} MB"
        return [
            f"OpenVINO computes in float32: the {self.bundle.dtype} weights take {taken} in each compiled "
            "graph, and steps are as fast as float32's"
        ]
