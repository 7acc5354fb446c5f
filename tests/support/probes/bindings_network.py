"""A network for bindings.py, as a parser might have made it, of objects like the real ones."""

from __future__ import annotations

from typing import Any

import numpy as np
from support.fakes.strict_tensorrt import Calls, Strict

from dijiang_engines import io_names

INNER, WIDTH = 64, 32


def profiles(layers: int = 2) -> list[dict[str, list[list[int]]]]:
    """Two: of a prompt and of short steps."""
    return [
        {
            io_names.INPUT_IDS: [[1, 1], [2, n // 2], [4, n]],
            io_names.POSITIONS: [[1], [2], [4]],
            io_names.SEQ_LENS: [[1], [2], [4]],
            **{io_names.past_state(i): [[b, 2, 16, 16] for b in (1, 2, 4)] for i in range(layers)},
        }
        for n in (64, 2)
    ]


class Parsed:
    """norm -> product, bias, ReLU -> product, sum with the norm's input -> layer of an RMSNorm -> logits."""

    def __init__(self, trt: Any, calls: Calls) -> None:
        self.trt, self.calls = trt, calls
        self.layers: list[Any] = []
        shapes = {name: tuple(-1 for _ in best) for name, (_, best, _) in profiles()[0].items()}
        shapes[io_names.past_state(0)] = shapes[io_names.past_state(1)] = (-1, 2, 16, 16)
        self.inputs = [self.tensor(name, shape) for name, shape in shapes.items()]
        x = self.layer("/x", "GATHER", "IGatherLayer", [], (-1, 1, INNER))
        ones = self.constant("norm.weight", np.ones(INNER, np.float16), (1, 1, INNER))
        zeros = self.constant("norm.bias", np.zeros(INNER, np.float16), (1, 1, INNER))
        norm = self.layer(
            "/n/LayerNormalization", "NORMALIZATION", "INormalizationLayer", [x, ones, zeros],
            (-1, 1, INNER), axes=1 << 2, epsilon=1e-5,
        )  # fmt: skip
        up = self.product("/up/MatMul", norm, INNER, WIDTH)
        bias = self.constant("up.bias", np.ones(WIDTH, np.float16), (1, 1, WIDTH))
        up = self.elementwise("/up/Add", "SUM", up, bias)
        active = self.layer(
            "/act/Relu", "ACTIVATION", "IActivationLayer", [up], (-1, 1, WIDTH),
            {"IActivationLayer.type": trt.ActivationType.RELU},
        )  # fmt: skip
        down = self.product("/down/MatMul", active, WIDTH, INNER)
        total = self.elementwise("/Add", "SUM", down, x)
        root = self.layer(
            "/norm/Sqrt", "UNARY", "IUnaryLayer", [total], (-1, 1, INNER), op=trt.UnaryOperation.SQRT
        )
        self.logits = self.layer("logits", "CAST", "ILayer", [root], (-1, 1, INNER))
        self.parsed = len(self.layers)

    def network(self) -> Any:
        """INetworkDefinition."""
        adds = {n: self._plugin for n in ("add_plugin_v2", "add_plugin_v3") if self._has(n)}
        return Strict(
            self.trt, self.trt.INetworkDefinition, self.calls, name="graph", num_layers=self.parsed,
            num_inputs=len(self.inputs), num_outputs=1, get_input=lambda index: self.inputs[index],
            get_output=lambda index: self.logits, get_layer=self._layer, **adds,
        )  # fmt: skip

    def _has(self, name: str) -> bool:
        return hasattr(self.trt.INetworkDefinition, name)

    def _layer(self, index: int) -> Any:
        self.layers[index].__class__ = self.trt.ILayer  # as the bindings show it
        return self.layers[index]

    def _plugin(self, inputs: list[Any], *rest: Any) -> Any:
        kind = "IPluginV3Layer" if self._has("add_plugin_v3") else "IPluginV2Layer"
        output = self.tensor(f"plugin of {len(inputs)}", (-1, 1, INNER))
        return Strict(self.trt, getattr(self.trt, kind), self.calls, get_output=lambda index: output)

    def tensor(self, name: str, shape: tuple[int, ...]) -> Any:
        kind = self.trt.DataType.FLOAT
        return Strict(
            self.trt, self.trt.ITensor, self.calls, name=name, dtype=kind, shape=shape, is_shape_tensor=False
        )

    def layer(
        self, name: str, kind: str, class_name: str, inputs: list[Any], shape: tuple[int, ...],
        special: dict[str, Any] | None = None, **own: Any,
    ) -> Any:  # fmt: skip
        """Add one; its output."""
        output = self.tensor(name + "_output", shape)
        number = self.trt.DataType.FLOAT
        values = {"precision": number, "precision_is_set": False, "get_output_type": number}
        kept = {n: v for n, v in values.items() if hasattr(self.trt.ILayer, n)}
        self.layers.append(
            Strict(
                self.trt,
                getattr(self.trt, class_name),
                self.calls,
                name=name,
                type=getattr(self.trt.LayerType, kind),
                num_inputs=len(inputs),
                num_outputs=1,
                get_input=lambda index: inputs[index],
                get_output=lambda index: output,
                **kept,
                **own,
                **(special or {}),
            )
        )
        return output

    def constant(self, name: str, array: Any, shape: tuple[int, ...]) -> Any:
        """Its numbers in a row, as the bindings give them, and shuffled to the rank that is needed."""
        made = self.layer(name, "CONSTANT", "IConstantLayer", [], array.shape, weights=array.reshape(-1))
        return self.layer(f"{name} shuffled", "SHUFFLE", "IShuffleLayer", [made], shape)

    def product(self, name: str, x: Any, inner: int, width: int) -> Any:
        weight = self.constant(f"{name}.weight", np.ones((inner, width), np.float16), (1, inner, width))
        none = self.trt.MatrixOperation.NONE
        return self.layer(
            name, "MATRIX_MULTIPLY", "IMatrixMultiplyLayer", [x, weight], (-1, 1, width), op0=none, op1=none
        )

    def elementwise(self, name: str, op: str, x: Any, y: Any) -> Any:
        operation = getattr(self.trt.ElementWiseOperation, op)
        return self.layer(name, "ELEMENTWISE", "IElementWiseLayer", [x, y], x.shape, op=operation)
