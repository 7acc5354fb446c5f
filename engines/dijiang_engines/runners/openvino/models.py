"""A bundle's graphs as OpenVINO runs them: read, rewritten, compiled when they are first needed.

The state of each graph becomes OpenVINO's own variables (MakeStateful). Steps are faster with them than with
inputs and outputs that are bound to two sets of buffers which take turns, the more so the more rows there are
(docs/evidence/openvino-cpu.txt).

A step is compiled for the batch that asks for it, with all shapes fixed, for the first
`config.fixed_batches` sizes; others share one step of any size, in which OpenVINO infers shapes in each run.
Each compiled graph has packed weights of its own.
"""

from __future__ import annotations

import importlib
import threading
from typing import Any

from dijiang_engines import io_names
from dijiang_engines.errors import DijiangError
from dijiang_engines.formats.bundle import Bundle
from dijiang_engines.formats.manifest import WEIGHTS
from dijiang_engines.runners.openvino.config import OvConfig
from dijiang_engines.runners.openvino.library import check_device, failed, openvino_module
from dijiang_engines.runners.openvino.rewrite import rewrite

ANY = 0
"""In place of a batch: a graph of any."""
Key = tuple[str, int]
"""A graph of the bundle, and the batch that it was compiled for."""


class Models:
    """The compiled graphs of one bundle.

    Args:
        bundle: an opened bundle.
        config: how it runs.

    Raises:
        RunnerError: OpenVINO is absent, or does not find the device.
    """

    def __init__(self, bundle: Bundle, config: OvConfig) -> None:
        self.bundle, self.config = bundle, config
        self.ov = openvino_module()
        self._core = self.ov.Core()
        check_device(self._core, config.name)
        self._compiled: dict[Key, Any] = {}
        self._loading = threading.RLock()  # or two threads would compile the same graph twice

    @property
    def loaded(self) -> tuple[Key, ...]:
        """What was compiled so far."""
        return tuple(self._compiled)

    def prefill(self) -> Any:
        """The prefill of any batch and length; raises as `_get`."""
        return self._get(("prefill", ANY))

    def step(self, batch: int) -> Any:
        """The step for `batch` rows; raises as `_get`."""
        with self._loading:
            fixed = [key for key in self._compiled if key[0] == "step" and key[1] != ANY]
            own = ("step", batch) in fixed or len(fixed) < self.config.fixed_batches
            return self._get(("step", batch if own else ANY))

    def check_weights(self) -> None:
        """OpenVINO maps the weights: writing to their file would change what runs, at any time.

        Raises:
            BundleError: somebody wrote to it.
        """
        self.bundle.opened.check_kept(WEIGHTS)

    def _get(self, key: Key) -> Any:
        """A compiled graph, made from the bundle that was opened.

        Raises:
            BundleError: the bundle was replaced meanwhile; nothing was loaded.
            RunnerError: OpenVINO refuses the graph.
        """
        with self._loading:
            if key not in self._compiled:
                file = self.bundle.graph_path(key[0]).name
                with self.bundle.opened.unchanged(file, WEIGHTS) as root:
                    made = self._compile(str(root / file), key[1])
                    self.bundle.opened.keep_open(WEIGHTS)
                self._compiled[key] = made
            return self._compiled[key]

    def _compile(self, path: str, batch: int) -> Any:
        try:
            model = self._core.read_model(path)
            rewrite(model)
            if batch != ANY:
                self._fix(model, batch)
            self._keep_state(model)
            return self._core.compile_model(model, self.config.device, self.config.properties)
        except DijiangError:
            raise
        except Exception as error:
            raise failed(f"OpenVINO cannot load {path}", error) from error

    def _fix(self, model: Any, batch: int) -> None:
        """Give every input of a step the shape that it has with `batch` rows."""
        shapes = {}
        for given in model.inputs:
            shape = given.get_partial_shape()
            shape[0] = batch
            shapes[given] = shape
        model.reshape(shapes)

    def _keep_state(self, model: Any) -> None:
        passes = importlib.import_module("openvino.passes")
        layers = range(self.bundle.spec.num_layers)
        manager = passes.Manager()
        manager.register_pass(
            passes.MakeStateful({io_names.past_state(n): io_names.present_state(n) for n in layers})
        )
        manager.run_passes(model)
