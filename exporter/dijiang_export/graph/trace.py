"""Trace the reference model, without its weights, into an ONNX graph with one DijiangAttention per layer.

Model and inputs live on PyTorch's meta device, so tracing costs the same memory for 70M parameters as
for 7B. Weights come out as graph inputs with canonical names; `weights.py` turns them into external
initializers later.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import warnings
from collections.abc import Iterator
from typing import Any, Literal

import onnx_ir as ir
import onnxscript
import torch
from onnx_ir.passes import common as passes
from onnxscript import optimizer
from torch import Tensor, nn

from dijiang_engines import io_names
from dijiang_engines.op_contract import ATTRIBUTES, DOMAIN, INPUTS, OP_NAME, OP_VERSION
from dijiang_engines.spec import ModelSpec
from dijiang_export.graph import custom_op, opset, tidy
from dijiang_export.reference.model import ReferenceModel

GraphName = Literal["prefill", "step"]
TRACE_OPSET = 18
"""What torch.onnx writes natively; `opset.py` takes it down to 17."""

# Example sizes: torch.export specialises a dimension of size 1, so none of the dynamic ones is.
EXAMPLE_BATCH, EXAMPLE_LENGTH = 2, 5


class _Traceable(nn.Module):
    """The model's forward with the graph's positional inputs and outputs."""

    def __init__(self, model: ReferenceModel, all_logits: bool) -> None:
        super().__init__()
        self.model = model
        self.all_logits = all_logits

    def forward(
        self, input_ids: Tensor, positions: Tensor, seq_lens: Tensor, *states: Tensor
    ) -> tuple[Tensor, ...]:
        logits, presents = self.model(
            input_ids, positions, seq_lens, list(states),
            all_logits=self.all_logits, op=custom_op.traced_op,
        )  # fmt: skip
        return logits, *presents


def trace(spec: ModelSpec, dtype: torch.dtype, *, all_logits: bool) -> ir.Model:
    """The prefill graph (any L) at opset 17, the op as custom nodes, the weights as trailing inputs.

    Args:
        spec: geometry of the model.
        dtype: float32, float16 or bfloat16: the type of weights and activations.
        all_logits: logits of every token instead of each row's last valid one.

    Returns:
        A model whose first inputs are the contract's (3 + layers), followed by one input per weight.
    """
    model = ReferenceModel(spec, dtype=dtype, device="meta").eval()
    ids = torch.zeros(EXAMPLE_BATCH, EXAMPLE_LENGTH, dtype=torch.int64, device="meta")
    # Two tensors: torch.export takes one object passed twice for one input.
    positions, seq_lens = (torch.zeros(EXAMPLE_BATCH, dtype=torch.int64, device="meta") for _ in range(2))
    batch = torch.export.Dim(io_names.BATCH_DIM)
    rows = {0: batch}
    shapes = {
        "input_ids": {0: batch, 1: torch.export.Dim(io_names.SEQUENCE_DIM)},
        "positions": rows,
        "seq_lens": rows,
        "states": tuple(rows for _ in range(spec.num_layers)),
    }
    with _quiet():
        program = torch.export.export(
            _Traceable(model, all_logits),
            (ids, positions, seq_lens, *model.new_states(EXAMPLE_BATCH)),
            dynamic_shapes=shapes,
            strict=False,
        )
        exported = torch.onnx.export(
            program,
            opset_version=TRACE_OPSET,
            optimize=False,
            verbose=False,
            custom_translation_table={
                torch.ops.dijiang.attention.default: _translate_op(),
                torch.ops.aten.gelu.default: _translate_gelu,
            },
        )
    assert exported is not None
    onnx_model: ir.Model = exported.model
    _weights_to_inputs(onnx_model.graph, tied=spec.tied_embeddings)
    with _quiet():
        optimizer.optimize_ir(onnx_model)
    tidy.name_inputs_and_outputs(onnx_model.graph, spec, all_logits)
    tidy.store_linear_weights_transposed(onnx_model.graph)
    tidy.name_nodes_and_values(onnx_model.graph)
    opset.downgrade_to_17(onnx_model)
    return onnx_model


def step_of(prefill: ir.Model) -> ir.Model:
    """The step graph (L = 1): the prefill graph with its sequence dimension fixed.

    The last valid token is then the only one, so looking it up is left out.
    """
    model = prefill.clone()
    graph = model.graph
    tidy.fix_dimension(graph, io_names.SEQUENCE_DIM, 1)
    for node in graph:
        if node.op_type == "GatherElements":
            data, chosen = node.inputs[0], node.outputs[0]
            assert data is not None
            chosen.replace_all_uses_with(data)
    passes.RemoveUnusedNodesPass()(model)
    graph.name = "step"
    return model


def weight_inputs(graph: ir.Graph, spec: ModelSpec) -> list[ir.Value]:
    """The weights among a traced graph's inputs."""
    return list(graph.inputs)[3 + spec.num_layers :]


def _translate_op() -> Any:
    """What stands in the ONNX graph for torch.ops.dijiang.attention."""
    opset_values = onnxscript.values.Opset(DOMAIN, OP_VERSION)
    op = onnxscript.values.Op(opset_values, OP_NAME, custom_op.onnx_schema())

    def translate(*args: Any) -> Any:
        count = len(INPUTS)
        tensors, attributes = list(args[:count]), args[count:]
        while tensors[-1] is None:  # absent trailing inputs are left out, never empty names
            tensors.pop()
        return op(*tensors, **dict(zip(ATTRIBUTES, attributes, strict=True)))

    return translate


def _translate_gelu(x: Any, approximate: str = "none") -> Any:
    """GELU in the order of operations that runtimes recognise and fuse; PyTorch's own order is not."""
    op = onnxscript.opset18

    def number(value: float) -> Any:
        return op.CastLike(op.Constant(value_float=value), x)

    if approximate == "tanh":
        cubic = op.Mul(op.Pow(x, op.Constant(value_float=3.0)), number(0.044715))
        inner = op.Mul(op.Add(x, cubic), number(math.sqrt(2 / math.pi)))
        return op.Mul(op.Mul(x, number(0.5)), op.Add(number(1.0), op.Tanh(inner)))
    erf = op.Erf(op.Div(x, number(math.sqrt(2))))
    return op.Mul(op.Mul(x, op.Add(erf, number(1.0))), number(0.5))


def _weights_to_inputs(graph: ir.Graph, *, tied: bool) -> None:
    """Meta tensors have no values to fold; as inputs they pass through the optimizer untouched."""
    for value in list(graph.initializers.values()):
        assert value.name is not None
        del graph.initializers[value.name]
        # A tied head is one parameter with two names; the canonical one is the embedding's.
        name = value.name.removeprefix("model.")
        value.name = "embed_tokens.weight" if tied and name == "lm_head.weight" else name
        value.const_value = None
        graph.inputs.append(value)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch.onnx prints progress and warns about packages that the model does not need."""
    names = ("torch.onnx", "torch.onnx._internal.exporter", "onnxscript", "torch.export")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
