"""adapter.onnx: the graph through which ONNX Runtime GenAI runs a bundle's other two; what it may be.

GenAI runs a bundle as a pipeline of adapter.onnx, prefill.onnx and step.onnx, as genai_config.json says,
which nothing here reads. It gives each token's position where the graphs take each row's first position and
length. It sees a recurrent state only beside a convolution's, so the adapter has inputs for those. A
key-value cache of fixed length is what it refuses beam search for: recurrent states it would leave with other
beams.

What GenAI gives and looks for: onnxruntime-genai@a0c04eb, src/models/decoder_only_pipeline.cpp,
position_inputs.cpp, recurrent_state.cpp and kv_cache.cpp; tried with version 0.18.0.
"""

from __future__ import annotations

from dijiang_engines import io_names
from dijiang_engines.errors import BundleError
from dijiang_engines.formats.file_table import GENAI_ADAPTER
from dijiang_engines.formats.graph_check import PREFILLS, STEPS, most_elements
from dijiang_engines.formats.manifest import TensorInfo
from dijiang_engines.formats.onnx_external import external_tensors
from dijiang_engines.formats.onnx_graph import check_operators, read_graph
from dijiang_engines.formats.onnx_shapes import infer_shapes
from dijiang_engines.spec import ModelSpec

POSITION_IDS = "position_ids"
"""int64 [B, L]: of each token, or 0 where a row of a batch is padding."""
CACHE = ("past_key_values.0.key", "past_key_values.0.value")
"""float32 [B, 1, 1, 1], GenAI's cache of one token, which nothing uses."""
_CACHE_SHAPE = (io_names.BATCH_DIM, 1, 1, 1)


def past_conv_state(layer: int) -> str:
    """Name of the input int64 [B, 1, 1] without which GenAI sees no recurrent state in a layer.

    It starts with zeros. In that of layer 0 the adapter keeps how many tokens of each row were read; GenAI
    binds PRESENT to the same memory.
    """
    return f"past_key_values.{layer}.conv_state"


PRESENT = "present.0.conv_state"


def adapter_io(spec: ModelSpec) -> tuple[tuple[TensorInfo, ...], tuple[TensorInfo, ...]]:
    """The adapter's inputs and outputs, in order."""
    batch, tokens = io_names.BATCH_DIM, (io_names.BATCH_DIM, io_names.SEQUENCE_DIM)
    kept = (batch, 1, 1)
    inputs = (
        TensorInfo(io_names.INPUT_IDS, "int64", tokens),
        TensorInfo(POSITION_IDS, "int64", tokens),
        *(TensorInfo(name, "float32", _CACHE_SHAPE) for name in CACHE),
        *(TensorInfo(past_conv_state(i), "int64", kept) for i in range(spec.num_layers)),
    )
    outputs = (
        TensorInfo(io_names.POSITIONS, "int64", (batch,)),
        TensorInfo(io_names.SEQ_LENS, "int64", (batch,)),
        TensorInfo(PRESENT, "int64", kept),
    )
    return inputs, outputs


def check_adapter(model: bytes, spec: ModelSpec) -> None:
    """Check an adapter as `graph_check` checks a bundle's graphs.

    Args:
        model: a serialised ModelProto.
        spec: of the model.

    Raises:
        BundleError: it is malformed, has weights or operators that it has no use for, makes large values, or
            other outputs than an adapter's.
    """
    if external_tensors(model):
        raise BundleError("an adapter has no weights")
    graph = read_graph(model)
    check_operators(graph, GENAI_ADAPTER, spec.num_layers)
    infos = adapter_io(spec)
    for batch, length in (*PREFILLS, *STEPS):
        sizes = {io_names.BATCH_DIM: batch, io_names.SEQUENCE_DIM: length}
        inputs, outputs = (
            {t.name: tuple(sizes[n] if isinstance(n, str) else n for n in t.shape) for t in side}
            for side in infos
        )
        if set(graph.inputs) != set(inputs) or set(graph.outputs) != set(outputs):
            raise BundleError("an adapter has other inputs or outputs than ONNX Runtime GenAI's")
        if inputs.keys() & graph.constants.keys():
            raise BundleError("an input of an adapter is a constant too")
        shapes = infer_shapes(graph, inputs, most_elements(spec, batch, length))
        if any(shapes.get(name) != shape for name, shape in outputs.items()):
            raise BundleError("an output of an adapter has another shape than the graphs take")
