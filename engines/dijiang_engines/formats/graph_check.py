"""May a bundle's graph be given to a runtime: the operators it uses, and the memory it asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dijiang_engines import io_names
from dijiang_engines.errors import BundleError
from dijiang_engines.formats.manifest import graph_io
from dijiang_engines.formats.onnx_graph import (
    LINEAR_ATTENTION,
    PLUGIN,
    PORTABLE,
    Graph,
    Operator,
    check_operators,
    read_graph,
)
from dijiang_engines.formats.onnx_shapes import infer_shapes
from dijiang_engines.formats.quantised.graph import check_quantised
from dijiang_engines.op_contract import attributes_of, chunk_size
from dijiang_engines.spec import ModelSpec
from dijiang_engines.weight_formats import Matrix

PREFILLS = ((1, 1), (2, 300), (3, 20_000))
STEPS = ((1, 1), (3, 1), (5000, 1))
"""(rows, tokens of each) of the calls that a graph is walked for: 300 tokens are several chunks; of
many, what grows with a power of their number is beyond `most_elements`."""

CAST_TYPES = (1, 6, 7, 9, 10, 11, 16)  # TensorProto.DataType: floats, int32, int64 and bool; no text

_CHUNK = chunk_size(256)  # the longest
_SLACK = 4
_LEAST = 1 << 16


def check_graph(
    model: bytes,
    file: str,
    spec: ModelSpec,
    *,
    step: bool,
    all_logits: bool,
    quantised: Mapping[str, Sequence[Matrix]] | None = None,
) -> None:
    """Check a graph whose external data has been checked.

    Args:
        model: a serialised ModelProto.
        file: its file's name, for the operators that only one runtime has.
        spec: of the model.
        step: a graph for one token of each row.
        all_logits: it returns logits of every token.
        quantised: canonical name -> stored matrices, of a bundle with quantised weights.

    Raises:
        BundleError: it is malformed, uses what bundles' graphs do not, makes larger values than a model of
            this geometry has use for, or returns others than the contract says.
    """
    graph = read_graph(model)
    check_operators(graph, file, spec.num_layers, quantised=quantised is not None)
    _check_attributes(graph, spec)
    largest = 0
    if quantised is not None:
        stored = [matrix for parts in quantised.values() for matrix in parts]
        check_quantised(graph, stored)
        if file.endswith(PORTABLE):  # its products are of matrices that it makes
            largest = max(matrix.rows * matrix.columns for matrix in stored)
    infos = graph_io(spec, step=step, all_logits=all_logits)
    for batch, length in STEPS if step else PREFILLS:
        sizes = {io_names.BATCH_DIM: batch, io_names.SEQUENCE_DIM: length}
        inputs, outputs = (
            {t.name: tuple(sizes[n] if isinstance(n, str) else n for n in t.shape) for t in side}
            for side in infos
        )
        if shadowed := (inputs.keys() | set(graph.inputs)) & graph.constants.keys():
            # The walk would take the constant's shape and values, a runtime those that a call gives.
            raise BundleError("an input of a graph is a constant too", got=repr(min(shadowed)[:80]))
        if set(graph.outputs) != set(outputs):
            raise BundleError("a graph has other outputs than the manifest says")
        shapes = infer_shapes(graph, inputs, max(most_elements(spec, batch, length), largest))
        for name, shape in outputs.items():
            if shapes.get(name) != shape:
                raise BundleError(
                    f"the output {name!r} of a graph has another shape than the manifest says",
                    got=shapes.get(name), expected=shape,
                )  # fmt: skip


def _check_attributes(graph: Graph, spec: ModelSpec) -> None:
    """Sizes and types that attributes say, and no input's shape."""
    heads = spec.num_heads
    sizes: dict[Operator, dict[str, int]] = {
        PLUGIN: {
            name: number for name, number in vars(attributes_of(spec)).items() if isinstance(number, int)
        },
        LINEAR_ATTENTION: {"q_num_heads": heads, "kv_num_heads": heads},
    }
    for node in graph.nodes:
        for name, expected in sizes.get(node.operator, {}).items():
            if node.attributes.get(name) != expected:
                raise BundleError(
                    f"the attribute {name} of {node} is not the model's",
                    got=node.attributes.get(name), expected=expected,
                )  # fmt: skip
        if node.operator == ("", "Cast") and node.attributes.get("to") not in CAST_TYPES:
            raise BundleError(f"{node} makes a type that models have no use for")


def most_elements(spec: ModelSpec, batch: int, length: int) -> int:
    """Elements that the largest value of a call may have: the sum of what an exporter's layer makes, times 4.

    Activations of every token, scores of each chunk against itself, a state for each chunk, and the weights
    of the chunks' states.
    """
    heads, d = spec.num_heads, spec.head_dim
    padded, chunks = length + _CHUNK, length // 64 + 2
    token = spec.vocab_size + spec.hidden_size + spec.embedding_size + spec.intermediate_size
    token += spec.qkv_size + spec.attention_size + heads * _CHUNK
    states = heads * chunks * (d * d + chunks)
    return _SLACK * (batch * (padded * token + states) + d * d) + _LEAST
