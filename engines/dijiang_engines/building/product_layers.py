"""Layers of the plugin DijiangLinear: what they compute, and how they come into a TensorRT network."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dijiang_engines.building.plugin_layers import add_constant, add_plugin
from dijiang_engines.building.step_graph import Graph
from dijiang_engines.kernels import abi
from dijiang_engines.kernels.packing import CHUNK, pack
from dijiang_engines.weight_formats import BLOCK

_NAME = "DijiangLinear"


@dataclass(eq=False)
class Product:
    """x W + b; `result` is the tensor that holds it, or its activation."""

    input: Any
    """Before the norm."""
    weight: Any
    """[K, N]; quantised, [N, K/32, bytes], uint8."""
    result: Any
    bias: Any = None
    norm: tuple[Any, Any, float] | None = None
    """weight, bias, epsilon."""
    activation: str = "identity"
    weight_format: str = "same"
    scales: Any = None
    """Of quantised weights: float16 [N, K/32]."""

    @property
    def quantised(self) -> bool:
        """A launch has quantised weights alone, or none."""
        return self.weight_format != "same"

    @property
    def width(self) -> int:
        """N."""
        return int(self.weight.shape[0 if self.quantised else 1])

    @property
    def inner(self) -> int:
        """K."""
        return int(self.weight.shape[1]) * BLOCK if self.quantised else int(self.weight.shape[0])


@dataclass
class Output:
    """One output of a launch."""

    terms: list[Product]
    result: Any
    activation: str = "identity"
    residual: Any = None

    @property
    def norm(self) -> tuple[Any, Any, float] | None:
        """Of the terms' input."""
        return self.terms[0].norm


@dataclass
class Rewritten:
    """What became of the products."""

    launches: int = 0
    products: int = 0
    left: int = 0
    """To TensorRT."""
    kept: list[Any] = field(default_factory=list)
    """Arrays that must live until the engine is built."""

    def to_json(self) -> dict[str, int]:
        """For the engine's manifest."""
        return {"launches": self.launches, "products": self.products, "left": self.left}


def replace(
    trt: Any,
    network: Any,
    graph: Graph,
    launch: list[Output],
    now: dict[str, Any],
    done: Rewritten,
    dtype: str,
) -> None:
    """Add one plugin layer.

    Args:
        trt, network, graph: as in `plugin_products.rewrite`.
        launch: what it computes.
        now: the tensors that came in the place of others, by the others' names; gets those of this layer.
        done: gets the arrays that must live on.
        dtype: T.

    Raises:
        RunnerError: the plugin is not registered, or refuses the layer.
    """

    def constant(array: Any) -> Any:
        return add_constant(trt, network, array, done.kept)

    inputs: list[Any] = []
    terms = [(index, term) for index, output in enumerate(launch) for term in output.terms]
    for _, term in terms:
        inputs += [now.get(term.input.name, term.input), constant(_words(term))]
        if term.bias is not None:
            inputs.append(constant(term.bias))
    for output in launch:
        if output.norm is not None:
            inputs += [constant(output.norm[0]), constant(output.norm[1])]
        if output.residual is not None:
            inputs.append(now.get(output.residual.name, output.residual))

    def number(values: list[int]) -> Any:
        return np.array(values, np.int32)

    norms = [output.norm for output in launch]
    values = {
        "term_output": number([index for index, _ in terms]),
        "term_bias": number([_bias_kind(term.bias, dtype) for _, term in terms]),
        "output_activation": number([abi.ACTIVATIONS[output.activation] for output in launch]),
        "output_norm": number([abi.NORMS["layer_norm" if norm else "norm_none"] for norm in norms]),
        "output_norm_bias": number([int(norm is not None) for norm in norms]),
        "output_epsilon": np.array([norm[2] if norm else 0.0 for norm in norms], np.float32),
        "output_residual": number([int(output.residual is not None) for output in launch]),
        "dtype": number([abi.DTYPES[dtype]]),
    }
    if any(term.quantised for _, term in terms):
        values["term_weight_format"] = number([abi.WEIGHT_FORMATS[term.weight_format] for _, term in terms])
        values["output_width"] = number([output.terms[0].width for output in launch])
    layer = add_plugin(trt, network, _NAME, inputs, values, done.kept)
    layer.name = f"{_NAME} {launch[0].result.name}"
    for index, output in enumerate(launch):
        now[output.result.name] = layer.get_output(index)
        for node, place in graph.read_by(output.result):
            node.layer.set_input(place, layer.get_output(index))


def _bias_kind(bias: Any, dtype: str) -> int:
    """0: there is none; 2: all its numbers are T's; 1: they are others."""
    if bias is None:
        return 0
    if dtype == "bfloat16":
        rounded = not (bias.view(np.uint32) & 0xFFFF).any()
    else:
        rounded = np.array_equal(bias.astype(np.float16).astype(np.float32), bias)
    return 2 if rounded else 1


def _words(term: Product) -> Any:
    """A term's weight as int32, which TensorRT neither converts nor copies: two 16-bit numbers each, a row
    per output element, or the bytes of a packed weight, [tiles, chunks, words of a chunk]."""
    if not term.quantised:
        return np.ascontiguousarray(term.weight.T).view(np.int32)
    packed = pack(term.weight_format, term.weight, term.scales).view(np.int32)
    return packed.reshape(-(-term.width // 8), -(-term.inner // CHUNK[term.weight_format]), -1)
