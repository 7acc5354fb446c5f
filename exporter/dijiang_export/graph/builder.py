"""A small builder of ONNX nodes over onnx-ir: named, with constants and subexpressions shared per graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir


class Builder:
    """Collects nodes that will be inserted into `graph`; names are `{scope}/{label or op type}`."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.nodes: list[ir.Node] = []
        self.scope = ""
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
        self._shared: dict[str, Any] = {}
        self._names: dict[str, int] = {}

    def op(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        label: str | None = None,
        outputs: int = 1,
        domain: str = "",
        **attributes: Any,
    ) -> Any:
        """Append a node; returns its output, or a list of outputs if `outputs` > 1."""
        name = self._unique(f"{self.scope}/{label or op_type}")
        node = ir.node(op_type, inputs, attributes, domain=domain, num_outputs=outputs, name=name)
        for index, value in enumerate(node.outputs):
            value.name = f"{name}_output_{index}"
        self.nodes.append(node)
        return node.outputs[0] if outputs == 1 else list(node.outputs)

    def constant(self, value: npt.ArrayLike, dtype: Any) -> ir.Value:
        """An initializer stored inside the graph; equal constants are one."""
        array = np.asarray(value, dtype=dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            name = self._unique(f"constant.{array.dtype.name}")
            while name in self.graph.initializers:  # of another builder
                name = self._unique(f"constant.{array.dtype.name}")
            tensor = ir.tensor(array, name=name)
            result = ir.Value(
                name=name, const_value=tensor, shape=tensor.shape, type=ir.TensorType(tensor.dtype)
            )
            self.graph.register_initializer(result)
            self._constants[key] = result
        return self._constants[key]

    def ints(self, *values: int) -> ir.Value:
        """An int64 vector."""
        return self.constant(values, np.int64)

    def scalar(self, value: int) -> ir.Value:
        """An int64 scalar."""
        return self.constant(value, np.int64)

    def real(self, value: float) -> ir.Value:
        """A float32 scalar."""
        return self.constant(value, np.float32)

    def shared(self, key: str, build: Callable[[], Any]) -> Any:
        """What `build` makes, made once per graph and named without a layer's scope."""
        if key not in self._shared:
            outer, self.scope = self.scope, "/shared"
            self._shared[key] = build()
            self.scope = outer
        return self._shared[key]

    def reshape(self, x: ir.Value, *dims: int | ir.Value, label: str | None = None) -> ir.Value:
        """Reshape to `dims`: ints (0 keeps, -1 infers) and int64 [1] values.

        Where only values and sizes stand, a 0 among them is a size too: else a runtime has to be ready for a
        value that happens to be 0 and then means another.
        """
        placeholder = any(isinstance(dim, int) and dim < 1 for dim in dims)
        sizes: dict[str, Any] = {} if placeholder else {"allowzero": 1}
        if all(isinstance(dim, int) for dim in dims):
            target = self.ints(*(dim for dim in dims if isinstance(dim, int)))
            sizes = {}
        else:
            parts = [self.ints(dim) if isinstance(dim, int) else dim for dim in dims]
            key = "shape:" + ",".join(str(part.name) for part in parts)
            # Dynamic sizes are made once per graph, so their shape vectors are too.
            target = self.shared(key, lambda: self.op("Concat", *parts, axis=0))
        return self.op("Reshape", x, target, label=label, **sizes)

    def split(self, x: ir.Value, sizes: Sequence[int], axis: int, label: str | None = None) -> list[ir.Value]:
        """Split along `axis`; empty parts are left out by the caller."""
        if len(sizes) == 1:
            return [x]
        parts: list[ir.Value] = self.op(
            "Split", x, self.ints(*sizes), outputs=len(sizes), axis=axis, label=label
        )
        return parts

    def _unique(self, name: str) -> str:
        count = self._names.get(name, 0)
        self._names[name] = count + 1
        return f"{name}_{count}" if count else name
