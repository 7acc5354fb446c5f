"""Make a traced graph readable and its weights mappable: names, and Linear weights stored transposed."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Mapping

import onnx_ir as ir

from dijiang_engines import io_names
from dijiang_engines.formats.manifest import graph_io
from dijiang_engines.spec import ModelSpec

SCOPES_KEY = "pkg.torch.onnx.name_scopes"
TRANSPOSED_KEY = "dijiang.transposed"
"""Metadata of a weight input: stored [in, out], the transpose of its canonical [out, in]."""


def name_inputs_and_outputs(graph: ir.Graph, spec: ModelSpec, all_logits: bool) -> None:
    """Give a traced prefill graph the contract's names and symbolic dimensions; check the rest."""
    inputs, outputs = graph_io(spec, step=False, all_logits=all_logits)
    symbols: dict[str, str] = {}
    values = list(graph.inputs)[: len(inputs)] + list(graph.outputs)
    for value, info in zip(values, inputs + outputs, strict=True):
        _learn_symbols(value, info.shape, symbols)
        value.name = info.name
    _map_dimensions(graph, symbols)
    graph.name = "prefill"


def _learn_symbols(value: ir.Value, dims: tuple[int | str, ...], symbols: dict[str, str]) -> None:
    """Match a traced shape such as [s3, 5] with the contract's; a mismatch is a tracing error."""
    shape = value.shape
    if shape is None or len(shape) != len(dims):
        raise AssertionError(f"traced {value.name} has shape {shape}, the contract says {dims}")
    for found, wanted in zip(shape, dims, strict=True):
        if isinstance(found, int) or isinstance(wanted, int):
            good = found == wanted
        else:
            good = symbols.setdefault(str(found.value), wanted) == wanted
        if not good:
            raise AssertionError(f"traced {value.name} has shape {shape}, the contract says {dims}")


def fix_dimension(graph: ir.Graph, name: str, size: int) -> None:
    """Replace a symbolic dimension by a size everywhere."""
    _map_dimensions(graph, {io_names.BATCH_DIM: io_names.BATCH_DIM, name: size})


def _map_dimensions(graph: ir.Graph, sizes: Mapping[str, int | str]) -> None:
    """Rename or fix symbolic dimensions; those without an entry become unknown."""

    def mapped(dim: int | ir.SymbolicDim) -> int | ir.SymbolicDim:
        if isinstance(dim, int):
            return dim
        new = sizes.get(str(dim.value))
        return new if isinstance(new, int) else ir.SymbolicDim(new)

    for value in (*graph.inputs, *(output for node in graph for output in node.outputs)):
        if value.shape is not None:
            value.shape = ir.Shape([mapped(dim) for dim in value.shape])


def store_linear_weights_transposed(graph: ir.Graph) -> None:
    """Remove the Transpose of each Linear weight: the file holds [in, out], which MatMul reads as it is.

    A weight with another use (a tied embedding, which Gather needs as [V, E]) stays as it is, and its
    MatMul becomes a Gemm with transB, so that the weight is stored once.
    """
    weights = set(graph.inputs)
    for node in list(graph):
        if node.op_type != "Transpose" or node.inputs[0] not in weights:
            continue
        weight, transposed = node.inputs[0], node.outputs[0]
        assert weight is not None
        if weight.shape is None or len(weight.shape) != 2:
            continue
        if len(weight.uses()) > 1:
            for matmul, _ in list(transposed.uses()):
                _gemm_with_transposed_weight(graph, matmul, weight)
        else:
            weight.shape = ir.Shape([weight.shape[1], weight.shape[0]])
            weight.metadata_props[TRANSPOSED_KEY] = "1"
            ir.convenience.replace_all_uses_with(transposed, weight)
        graph.remove(node, safe=True)


def _gemm_with_transposed_weight(graph: ir.Graph, matmul: ir.Node, weight: ir.Value) -> None:
    """MatMul(x [B, L, E], wᵀ) -> Reshape, Gemm(transB), Reshape."""
    x, old = matmul.inputs[0], matmul.outputs[0]
    assert x is not None and weight.shape is not None
    scopes = dict(matmul.metadata_props)
    vocab, width = weight.shape[0], weight.shape[1]
    tape = ir.tape.Tape()
    flat = tape.op("Reshape", [x, tape.initializer(ir.tensor([-1, width]), name="const.tied_rows")])
    product = tape.op("Gemm", [flat, weight], {"transB": 1})
    # 0 keeps the batch dimension of x's shape: [B, L, E] -> [B, L, V].
    shape = tape.op("Shape", [x], {"start": 0, "end": 2})
    vocab_dim = tape.initializer(ir.tensor([vocab]), name="const.tied_vocab")
    target = tape.op("Concat", [shape, vocab_dim], {"axis": 0})
    result = tape.op("Reshape", [product, target])
    result.shape, result.type = old.shape, old.type
    for node in tape.nodes:
        node.metadata_props.update(scopes)
    for value in tape.initializers:
        graph.register_initializer(value)
    graph.insert_before(matmul, list(tape.nodes))
    result.name = old.name
    ir.convenience.replace_all_uses_with(old, result, replace_graph_outputs=True)
    graph.remove(matmul, safe=True)


def name_nodes_and_values(graph: ir.Graph) -> None:
    """Name nodes after the module they come from, `/layers.0/mlp/up/MatMul`, and values after nodes.

    Graph inputs, outputs and initializers keep their names; PyTorch's metadata is cleared.
    """
    for index, constant in enumerate(list(graph.initializers.values())):
        constant.name = f"constant.{index}"
    fixed = {id(v) for v in (*graph.inputs, *graph.outputs)}
    counts: Counter[str] = Counter()
    for node in graph:
        scope = _module_path(node.metadata_props.get(SCOPES_KEY, "[]"))
        name = f"{scope}/{node.op_type}"
        counts[name] += 1
        if counts[name] > 1:
            name = f"{name}_{counts[name] - 1}"
        node.name = name
        for index, value in enumerate(node.outputs):
            if id(value) not in fixed:
                value.name = f"{name}_output_{index}"
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()


def _module_path(scopes: str) -> str:
    """["", "model", "model.layers.0", "model.layers.0.mlp", "gelu"] -> "/layers.0/mlp"."""
    names = [s for s in ast.literal_eval(scopes)[:-1] if s.startswith("model.")]
    if not names:
        return ""
    parts = names[-1].removeprefix("model.").split(".")
    path = ""
    for part in parts:
        path += f".{part}" if part.isdigit() else f"/{part}"
    return path
