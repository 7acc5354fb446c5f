"""Gives the matrix products of a network to the plugin DijiangLinear, before TensorRT builds it.

TensorRT's own products of one row read weights far below the memory's speed (docs/performance.md), and of
quantised weights it has none. The network that its parser made is searched for products with constant
weights, or with quantised ones, which the parser has as nodes of the plugin; each takes along its bias, the
LayerNorm of its input, its activation, and the sum with a residual and a second product. Products of one
input that do not depend on each other become one launch. Floats that are not recognised stay TensorRT's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from dijiang_engines.building.product_layers import Output, Product, Rewritten, replace
from dijiang_engines.building.step_graph import POINTWISE, Floats, Graph, Node, read_graph
from dijiang_engines.errors import RunnerError
from dijiang_engines.kernels import abi
from dijiang_engines.kernels.packing import as_int8

MAX_BATCH = 8
"""Rows of a step above which TensorRT's products are used: more do not share one reading of the weights."""

MAX_NORM_ROWS = 16
"""Rows of a step above which norms stay TensorRT's: of more rows, only products without one have a kernel,
and cuBLASLt needs the norm's rows in memory."""

MAX_INPUT_BYTES = 96 << 10
"""Of all rows of the widest product's input: more does not fit shared memory beside the weights."""

_PLUGINS = ("PLUGIN_V2", "PLUGIN_V3")
_WORDS = {4: "int4", 8: "int8"}
"""int32 words of a block of 32 weights as a bundle stores them: what they are."""
_SAMPLES = np.linspace(-6, 6, 61)
_ACTIVATIONS: dict[str, Callable[[Floats], Floats]] = {
    "relu": POINTWISE["RELU"], "gelu": POINTWISE["GELU_ERF"], "gelu_tanh": POINTWISE["GELU_TANH"],
    "silu": lambda x: x * POINTWISE["SIGMOID"](x),
}  # fmt: skip


def has_quantised(trt: Any, network: Any) -> bool:
    """Does a parsed network have products with quantised weights?"""
    kinds = [getattr(trt.LayerType, kind) for kind in _PLUGINS if hasattr(trt.LayerType, kind)]
    layers = (network.get_layer(index) for index in range(network.num_layers))
    return any(layer.type in kinds and (layer.num_inputs, layer.num_outputs) == (3, 1) for layer in layers)


def rewrite(
    trt: Any,
    network: Any,
    *,
    dtype: str = "float16",
    floats: bool = True,
    norms: bool = True,
    whole: bool = False,
) -> Rewritten:
    """Replace products by plugin layers.

    Args:
        trt: the tensorrt module, with the plugin registered.
        network: TensorRT's INetworkDefinition, parsed and not yet typed.
        dtype: of its activations, float16 or bfloat16.
        floats: take products with float16 weights too.
        norms: take norms along, which saves a step launches; many rows are normalised in the workspace.
        whole: make one matrix of those that are stored in parts, of int8 where the parts have several
            formats: the same numbers, of more bytes, which many rows do not notice.

    Returns:
        Counts, and what must be kept alive.

    Raises:
        RunnerError: the plugin is not registered or refuses a layer, or a quantised product is not one that
            the plugin can have.
    """
    graph = read_graph(trt, network)
    done = Rewritten()
    found: list[Product] = []
    for node in graph.nodes:
        product = None
        if node.kind == "MATRIX_MULTIPLY" and floats:
            product = _product(graph, node)
        elif node.kind in _PLUGINS:
            product = _quantised_product(graph, node)
        if product is not None:
            _take_along(graph, product, norms)
            found.append(product)
        elif node.kind == "MATRIX_MULTIPLY":
            done.left += 1
    if whole:
        found = _whole_matrices(graph, found)
    _biases_behind_parts(graph, found)
    order = graph.order()  # a launch reads the results of those before it
    launches = list(_launches(list(_outputs(graph, found))))
    launches.sort(key=lambda launch: max(order.get(t.name, -1) for o in launch for t in _reads(o)))
    now: dict[str, Any] = {}
    for launch in launches:
        replace(trt, network, graph, launch, now, done, dtype)
        done.launches += 1
        done.products += sum(len(output.terms) for output in launch)
    return done


# -- finding --------------------------------------------------------------------------------------------


def _product(graph: Graph, node: Node) -> Product | None:
    plain = [str(op).rpartition(".")[2] == "NONE" for op in (node.layer.op0, node.layer.op1)]
    weight = graph.constant(node.inputs[1]) if all(plain) else None
    if weight is None or weight.size == 0 or weight.ndim < 2 or weight.itemsize not in (2, 4):
        return None
    weight = weight.reshape(weight.shape[-2:]) if weight.size == weight.shape[-2] * weight.shape[-1] else None
    if weight is None or weight.shape[0] % abi.LINEAR_INNER_STEP or node.outputs[0].name in graph.outputs:
        return None
    half = weight if weight.dtype == np.float16 else _as_half(weight)
    return None if half is None else Product(node.inputs[0], half, node.outputs[0])


def _quantised_product(graph: Graph, node: Node) -> Product | None:
    """A node DijiangLinear of an ONNX file: x, weights as a bundle stores them, scales."""
    if len(node.inputs) != 3 or len(node.outputs) != 1:
        return None
    words, scales = (graph.constant(tensor) for tensor in node.inputs[1:])
    if words is None or scales is None or words.ndim != 3 or words.dtype != np.int32:
        return None
    if words.shape[2] not in _WORDS or scales.shape != words.shape[:2]:
        return None
    name, half = node.outputs[0].name, _as_half(scales)
    if name in graph.outputs or half is None:
        raise RunnerError(
            f"the quantised product {name} cannot be the plugin's",
            got="an output of the graph" if name in graph.outputs else f"scales in {scales.dtype}",
            expected="a product inside the graph, scales in float16",
        )
    stored = np.ascontiguousarray(words).view(np.uint8)
    return Product(node.inputs[0], stored, node.outputs[0], weight_format=_WORDS[words.shape[2]], scales=half)


def _take_along(graph: Graph, product: Product, norms: bool) -> None:
    if norms:
        _take_norm(graph, product)
    _take_bias(graph, product)
    _take_activation(graph, product)


def _take_norm(graph: Graph, product: Product) -> None:
    node = graph.maker(product.input)
    if node is None or node.kind != "NORMALIZATION" or node.layer.axes != 1 << 2:
        return
    weight, bias = (graph.constant(tensor) for tensor in node.inputs[1:3])
    inner = product.inner
    if weight is None or bias is None or weight.size != inner or bias.size != inner:
        return
    product.norm = (_floats(weight), _floats(bias), float(node.layer.epsilon))
    product.input = node.inputs[0]


def _take_bias(graph: Graph, product: Product) -> None:
    bias, made = _added(graph, product.result, product.width)
    if bias is not None:
        product.bias, product.result = bias, made


def _added(graph: Graph, tensor: Any, width: int) -> tuple[Any, Any]:
    """The constant of `width` numbers that all that reads a tensor adds to it, and the sum; None, None."""
    following = _only_reader(graph, tensor)
    if following is None or (following.kind, following.operation) != ("ELEMENTWISE", "SUM"):
        return None, None
    others = [other for other in following.inputs if other.name != tensor.name]
    bias = graph.constant(others[0]) if len(others) == 1 else None
    made = following.outputs[0]
    if bias is None or bias.size != width or made.name in graph.outputs:
        return None, None
    return _floats(bias), made


def _whole_matrices(graph: Graph, products: list[Product]) -> list[Product]:
    """Parts of a matrix whose results are put side by side, and read by nothing else, become one product."""
    by_result = {product.result.name: product for product in products}
    for node in graph.nodes:
        if node.kind != "CONCATENATION":
            continue
        parts = [by_result[tensor.name] for tensor in node.inputs if tensor.name in by_result]
        made = node.outputs[0]
        if len(parts) < len(node.inputs) or made.name in graph.outputs:
            continue
        of_one = len({(part.input.name, part.inner) for part in parts}) == 1
        bare = all(
            part.quantised and (part.bias, part.norm, part.activation) == (None, None, "identity")
            and _only_reader(graph, part.result) is node
            for part in parts
        )  # fmt: skip
        if not (of_one and bare) or made.shape[-1] != sum(part.width for part in parts):
            continue
        formats = {part.weight_format for part in parts}
        form = parts[0].weight_format if len(formats) == 1 else "int8"
        same = [part.weight if part.weight_format == form else as_int8(part.weight) for part in parts]
        one = Product(
            parts[0].input, np.concatenate(same), made,
            weight_format=form, scales=np.concatenate([part.scales for part in parts]),
        )  # fmt: skip
        _take_along(graph, one, norms=False)
        products = [one, *(product for product in products if product not in parts)]
        by_result = {product.result.name: product for product in products}
    return products


def _biases_behind_parts(graph: Graph, products: list[Product]) -> None:
    """A matrix that is stored in parts has its bias behind their results side by side: each gets its own."""
    by_result = {product.result.name: product for product in products}
    for node in graph.nodes:
        parts = [by_result.get(tensor.name) for tensor in node.inputs if tensor is not None]
        if node.kind != "CONCATENATION" or any(
            part is None or part.bias is not None or part.activation != "identity" for part in parts
        ):
            continue
        whole = node.outputs[0]
        widths = [part.width for part in parts if part is not None]
        alone = all(_only_reader(graph, part.result) is node for part in parts if part is not None)
        beside = whole.shape[-1] == sum(widths)  # along the last axis
        bias, made = _added(graph, whole, sum(widths))
        if bias is None or not (alone and beside):
            continue
        ends = np.cumsum(widths)[:-1]
        for part, piece in zip(parts, np.split(bias, ends), strict=True):
            assert part is not None
            part.bias = np.ascontiguousarray(piece)
        for reader, place in graph.read_by(made):
            reader.layer.set_input(place, whole)


def _take_activation(graph: Graph, product: Product) -> None:
    """Pointwise layers that follow, if they end in one tensor and compute something that the plugin has."""
    inside = {product.result.name}
    last = None
    grew = True
    while grew:
        grew = False
        for name in list(inside):
            for node, _ in graph.readers.get(name, []):
                made = node.outputs[0]
                if made.name in inside or node.kind not in ("ELEMENTWISE", "UNARY", "ACTIVATION"):
                    continue
                if all(t.name in inside or graph.constant(t) is not None for t in node.inputs):
                    inside.add(made.name)
                    last, grew = made, True
    if last is None:
        return
    leaving = [
        name for name in inside
        if name in graph.outputs
        or any(node.outputs[0].name not in inside for node, _ in graph.readers.get(name, []))
    ]  # fmt: skip
    if len(leaving) != 1 or leaving[0] in graph.outputs:
        return
    end = graph.makers[leaving[0]].outputs[0]
    values = graph.compute(end, {product.result.name: _SAMPLES})
    if values is None or values.shape != _SAMPLES.shape:
        return
    for name, function in _ACTIVATIONS.items():
        if np.allclose(values, function(_SAMPLES), rtol=0, atol=1e-3):  # constants are of 16 bits
            product.activation, product.result = name, end
            return


def _outputs(graph: Graph, products: list[Product]) -> Iterator[Output]:
    by_result = {product.result.name: product for product in products}
    taken: set[str] = set()
    for product in products:
        if product.result.name in taken:
            continue
        output = _gated(graph, product, by_result) or _summed(graph, product, by_result)
        output = output or Output([product], product.result, product.activation)
        taken |= {term.result.name for term in output.terms}
        yield output


def _gated(graph: Graph, product: Product, by_result: dict[str, Product]) -> Output | None:
    """silu(first) * second, of one input."""
    following = _only_reader(graph, product.result)
    if following is None or following.operation != "PROD" or following.kind != "ELEMENTWISE":
        return None
    pair = [by_result.get(tensor.name) for tensor in following.inputs]
    pair.sort(key=lambda term: term is None or term.activation != "silu")
    first, second = pair
    if first is None or second is None or (first.activation, second.activation) != ("silu", "identity"):
        return None
    same = first.input.name == second.input.name and first.quantised == second.quantised
    same = same and (first.inner, first.width) == (second.inner, second.width)
    same = same and (first.norm is None) == (second.norm is None)
    if first.norm is not None and second.norm is not None:
        same = same and all(np.array_equal(a, b) for a, b in zip(first.norm, second.norm, strict=True))
    alone = all(_only_reader(graph, term.result) is following for term in (first, second))
    if not same or not alone or following.outputs[0].name in graph.outputs:
        return None
    return Output([first, second], following.outputs[0], "swiglu")


def _summed(graph: Graph, product: Product, by_result: dict[str, Product]) -> Output | None:
    """The largest sum of one or two products and at most one other tensor."""
    best = None
    if product.activation != "identity":
        return None
    tensor = product.result
    while (following := _only_reader(graph, tensor)) is not None:
        if following.kind != "ELEMENTWISE" or following.operation != "SUM":
            break
        tensor = following.outputs[0]
        if tensor.name in graph.outputs:
            break
        leaves = list(_leaves(graph, following, by_result))
        terms = [by_result[leaf.name] for leaf in leaves if _is_term(graph, leaf, by_result)]
        others = [leaf for leaf in leaves if not _is_term(graph, leaf, by_result)]
        wide = all(term.width == product.width and term.quantised == product.quantised for term in terms)
        if (
            len(terms) > 2
            or len(others) > 1
            or not wide
            or any(graph.constant(t) is not None for t in others)
        ):
            continue
        if any(t.shape[-1] != product.width for t in others):
            continue  # broadcast
        if len(terms) == 2 and any(term.norm is not None for term in terms):
            continue
        best = Output(terms, tensor, "identity", others[0] if others else None)
    return best


def _is_term(graph: Graph, tensor: Any, by_result: dict[str, Product]) -> bool:
    product = by_result.get(tensor.name)
    return (
        product is not None and product.activation == "identity" and _only_reader(graph, tensor) is not None
    )


def _leaves(graph: Graph, node: Node, by_result: dict[str, Product]) -> Iterator[Any]:
    for tensor in node.inputs:
        maker = graph.maker(tensor)
        inner = maker is not None and maker.kind == "ELEMENTWISE" and maker.operation == "SUM"
        if inner and tensor.name not in by_result and _only_reader(graph, tensor) is not None:
            assert maker is not None
            yield from _leaves(graph, maker, by_result)
        else:
            yield tensor


def _launches(outputs: list[Output]) -> Iterator[list[Output]]:
    """Outputs of one input together: they depend on it and on constants alone."""
    groups: dict[str, list[Output]] = {}
    for output in outputs:
        alike = output.residual is None and len({term.input.name for term in output.terms}) == 1
        first = output.terms[0]
        key = f"{first.quantised} {first.input.name}" if alike else f"alone {output.result.name}"
        group = groups.setdefault(key, [])
        group.append(output)
        terms = sum(len(member.terms) for member in group)
        if terms == abi.LINEAR_MAX_TERMS or len(group) == abi.LINEAR_MAX_OUTPUTS:
            yield groups.pop(key)
        elif terms > abi.LINEAR_MAX_TERMS:
            yield group[:-1]
            groups[key] = [output]
    yield from groups.values()


def _reads(output: Output) -> list[Any]:
    """Its tensors that are not constant."""
    return [term.input for term in output.terms] + ([] if output.residual is None else [output.residual])


def _only_reader(graph: Graph, tensor: Any) -> Node | None:
    readers = graph.read_by(tensor)
    return readers[0][0] if len(readers) == 1 and tensor.name not in graph.outputs else None


def _floats(array: Any) -> Any:
    return np.ascontiguousarray(np.asarray(array, np.float32).reshape(-1))


def _as_half(array: Any) -> Any:
    """The same numbers in float16, which the parser may have widened; None: they are others."""
    half = array.astype(np.float16)
    return half if np.array_equal(half.astype(array.dtype), array) else None
