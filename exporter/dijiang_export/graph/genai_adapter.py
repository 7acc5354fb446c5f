"""adapter.onnx: from what ONNX Runtime GenAI gives to what the graphs take.

GenAI gives each token's position where the graphs take each row's first position and length. It sees a
recurrent state only beside a convolution's, so the adapter has inputs for those. A key-value cache of fixed
length is what it refuses beam search for: recurrent states it would leave with other beams.

GenAI pads the rows of a batch on the right, and gives padding position 0 there. It takes a token for padding
by its id, so it cannot know a row that ends in that token from a padded one. Of a token that it has chosen
and not read it gives nothing but a gap in the positions. What would come out wrong without a word is refused:
an index is out of bounds in a node whose name, which ONNX Runtime's error says, tells why.

What GenAI gives and looks for: onnxruntime-genai@a0c04eb, src/models/decoder_only_pipeline.cpp,
position_inputs.cpp, recurrent_state.cpp and kv_cache.cpp; tried with version 0.18.0.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from dijiang_engines import io_names
from dijiang_engines.formats.file_table import GENAI_ADAPTER
from dijiang_engines.formats.manifest import TensorInfo
from dijiang_engines.spec import ModelSpec
from dijiang_engines.version import __version__
from dijiang_export.graph import opset
from dijiang_export.graph.builder import Builder

UNREAD = "call get_logits before append_tokens: the last token has been chosen and not yet read"
PADDED = "a prompt of a batch begins with padding: pad on the right"
NEGATIVE = "a token id is negative"
"""Names of the nodes that refuse."""
POSITION_IDS = "position_ids"
"""int64 [B, L]: of each token, or 0 where a row of a batch is padding."""
CACHE = ("past_key_values.0.key", "past_key_values.0.value")
"""float32 [B, 1, 1, 1]: GenAI's key-value cache of one token, which nothing uses."""
PRESENT = "present.0.conv_state"
_TYPES = {"int64": ir.DataType.INT64, "float32": ir.DataType.FLOAT}


def past_conv_state(layer: int) -> str:
    """Name of the input int64 [B, 1, 1] without which GenAI sees no recurrent state in a layer.

    It starts with zeros. In that of layer 0 the adapter keeps how many tokens of each row were read; GenAI
    binds PRESENT to the same memory.
    """
    return f"past_key_values.{layer}.conv_state"


def adapter_io(spec: ModelSpec) -> tuple[tuple[TensorInfo, ...], tuple[TensorInfo, ...]]:
    """The adapter's inputs and outputs, in order."""
    batch, tokens = io_names.BATCH_DIM, (io_names.BATCH_DIM, io_names.SEQUENCE_DIM)
    kept = (batch, 1, 1)
    inputs = (
        TensorInfo(io_names.INPUT_IDS, "int64", tokens),
        TensorInfo(POSITION_IDS, "int64", tokens),
        *(TensorInfo(name, "float32", (batch, 1, 1, 1)) for name in CACHE),
        *(TensorInfo(past_conv_state(i), "int64", kept) for i in range(spec.num_layers)),
    )
    outputs = (
        TensorInfo(io_names.POSITIONS, "int64", (batch,)),
        TensorInfo(io_names.SEQ_LENS, "int64", (batch,)),
        TensorInfo(PRESENT, "int64", kept),
    )
    return inputs, outputs


def write_adapter(spec: ModelSpec, pad_token_id: int, folder: Path) -> None:
    """Write the adapter of a model into its bundle.

    Args:
        spec: the model.
        pad_token_id: what genai_config.json says that padding is.
        folder: the bundle's.
    """
    inputs, outputs = adapter_io(spec)
    values = {info.name: _value(info) for info in inputs}
    graph = ir.Graph(tuple(values.values()), [], nodes=[], name="adapter", opset_imports={"": opset.OPSET})
    b = Builder(graph)
    ids, position_ids = values[io_names.INPUT_IDS], values[POSITION_IDS]
    first = b.op("Gather", position_ids, b.scalar(0), axis=1, label="first")
    last = b.op("ReduceMax", position_ids, axes=[1], keepdims=0, label="last")
    seq_lens = b.op("Add", b.op("Sub", last, first), b.scalar(1), label="seq_lens")
    read = b.reshape(values[past_conv_state(0)], -1, label="read")
    gap = b.op("ReduceMax", b.op("Abs", b.op("Sub", first, read)), keepdims=0, label="gap")
    negative = b.op("ReduceMax", b.op("Sub", b.scalar(0), ids), keepdims=0, label="negative")
    nothing = b.op("Add", _refuse(b, gap, UNREAD), _refuse(b, b.op("Max", negative, b.scalar(0)), NEGATIVE))
    nothing = b.op("Add", nothing, _refuse(b, _padding_first(b, spec, pad_token_id, ids), PADDED))
    positions = b.op("Add", first, nothing, label="positions")
    # GenAI binds both sides of this state to one buffer: whatever reads it must be done before it is written.
    present = b.reshape(b.op("Add", read, b.op("Add", seq_lens, nothing)), -1, 1, 1, label="present")
    for value, info in zip((positions, seq_lens, present), outputs, strict=True):
        value.name, value.shape = info.name, ir.Shape(info.shape)
        value.type = ir.TensorType(_TYPES[info.dtype])
        graph.outputs.append(value)
    graph.extend(b.nodes)
    model = ir.Model(graph, ir_version=opset.IR_VERSION)
    model.producer_name, model.producer_version = "dijiang-export", __version__
    ir.save(model, folder / GENAI_ADAPTER)


def _refuse(b: Builder, index: ir.Value, why: str) -> ir.Value:
    """0; above index 0 the node fails."""
    found: ir.Value = b.op("Gather", b.ints(0), index, label=why)
    return found


def _padding_first(b: Builder, spec: ModelSpec, pad_token_id: int, ids: ir.Value) -> ir.Value:
    """1 if the first call of a batch has a row that begins with padding, else 0.

    Where padding is a token that begins or ends texts too, one of them may well begin a prompt, two do not.
    """
    one = b.scalar(1)
    width = 2 if pad_token_id in (spec.bos_token_id, *spec.eos_token_ids) else 1
    begin = b.op("Slice", ids, b.ints(0), b.ints(width), b.ints(1), label="begin")
    distance = b.op("Abs", b.op("Sub", begin, b.scalar(pad_token_id)))
    other = b.op("Min", b.op("ReduceMax", distance, axes=[1], keepdims=0), one, label="other")
    padded = b.op("ReduceMax", b.op("Sub", one, other), keepdims=0, label="padded")
    rows, tokens = (b.op("Gather", b.op("Shape", ids), b.scalar(axis)) for axis in (0, 1))
    several = b.op("Min", b.op("Sub", b.op("Min", rows, tokens), one), one)  # 0 with one row, and in steps
    found: ir.Value = b.op("Mul", padded, several, label="padding_first")
    return found


def _value(info: TensorInfo) -> ir.Value:
    return ir.Value(name=info.name, shape=ir.Shape(info.shape), type=ir.TensorType(_TYPES[info.dtype]))
