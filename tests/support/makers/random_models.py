"""Random models of any geometry: specs, reference models with sensible weights, graphs in memory."""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch

from dijiang_engines import io_names
from dijiang_engines.spec import ModelSpec
from dijiang_export.graph import lower, trace
from dijiang_export.graph.tidy import TRANSPOSED_KEY
from dijiang_export.reference.model import ReferenceModel, is_op_constant

torch.set_num_threads(1)  # tiny matrices: more threads only wait for each other

NEOX = ModelSpec(
    family="gpt_neox", vocab_size=97, hidden_size=48, intermediate_size=64, num_layers=2, num_heads=3,
    num_kv_heads=3, head_dim=16, rotary_dim=4, rope_theta=10000.0, rope_scaling=None, norm="layer_norm",
    norm_epsilon=1e-5, activation="gelu", gated_mlp=False, parallel_residual=True, post_norm=False,
    final_norm=True, attention_bias=True, dense_bias=True, mlp_bias=True, position_embeddings=0,
    position_offset=0, embedding_size=48, tied_embeddings=False, max_position_embeddings=256,
    decay="geometric", decay_rows=0, decay_extended=False, group_norm_epsilon=1e-5, bos_token_id=0,
    eos_token_ids=(0,),
)  # fmt: skip

LLAMA = dataclasses.replace(
    NEOX, family="llama", norm="rms_norm", activation="silu", gated_mlp=True, parallel_residual=False,
    num_heads=4, num_kv_heads=2, hidden_size=64, embedding_size=64, rotary_dim=16, attention_bias=False,
    dense_bias=False, mlp_bias=False, tied_embeddings=True,
)  # fmt: skip

OPT_350M = dataclasses.replace(
    NEOX, family="opt", rotary_dim=0, position_embeddings=512, position_offset=2, parallel_residual=False,
    post_norm=True, final_norm=False, embedding_size=32, tied_embeddings=True, activation="relu",
)  # fmt: skip


def with_tables(spec: ModelSpec, rows: int) -> ModelSpec:
    """The same model with trained decay tables."""
    return dataclasses.replace(spec, decay="tables", decay_rows=rows)


def with_heads(spec: ModelSpec, heads: int, kv_heads: int, d: int, rotary: int) -> ModelSpec:
    """The same model with another attention geometry."""
    hidden = heads * d
    return dataclasses.replace(
        spec, num_heads=heads, num_kv_heads=kv_heads, head_dim=d, rotary_dim=rotary, hidden_size=hidden,
        embedding_size=hidden,
    )  # fmt: skip


def random_model(spec: ModelSpec, seed: int = 0, dtype: torch.dtype = torch.float64) -> ReferenceModel:
    """Weights such that activations stay near one and every parameter matters."""
    rng = torch.Generator().manual_seed(seed)
    model = ReferenceModel(spec, dtype=torch.float64)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=rng, dtype=torch.float64)
        leaf = name.rsplit(".", 1)[-1]
        if leaf == "log_decay":
            some = torch.rand(parameter.shape, generator=rng) < (1.0 if noise.dim() == 1 else 0.3)
            value = -noise.abs() * 0.1 * some
        elif leaf == "gain":
            value = torch.tanh(noise)
        elif leaf == "read_scale":
            value = 10 * noise
        elif leaf in ("proj", "embed"):
            value = noise
        elif "norm" in name and leaf.endswith("weight"):
            value = 1 + 0.1 * noise
        elif noise.dim() > 1:
            value = noise * (1.0 if name.startswith("embed") else 0.5 / np.sqrt(noise.shape[-1]))
        else:
            value = 0.1 * noise
        # Representable in the type under test, so that an oracle in float64 has the same weights.
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        parameter.data = value.to(wide if is_op_constant(name) else dtype).double()
    return model


def traced(
    spec: ModelSpec, dtype: torch.dtype, kind: Literal["prefill", "step"], *, all_logits: bool = False
) -> ir.Model:
    """A traced graph of either kind, not lowered."""
    prefill = _traced_prefill(json.dumps(spec.to_json()), dtype, all_logits)
    return prefill.clone() if kind == "prefill" else trace.step_of(prefill)


@functools.lru_cache(maxsize=32)
def _traced_prefill(spec: str, dtype: torch.dtype, all_logits: bool) -> ir.Model:
    return trace.trace(ModelSpec.from_json(json.loads(spec)), dtype, all_logits=all_logits)


def graph_model(
    spec: ModelSpec,
    model: ReferenceModel,
    kind: Literal["prefill", "step"],
    *,
    dtype: torch.dtype = torch.float32,
    all_logits: bool = False,
) -> ir.Model:
    """The standard graph with the model's weights inside it."""
    graph = traced(spec, dtype, kind, all_logits=all_logits)
    lower.lower_to_standard(graph, kind)
    give_weights(graph, spec, model)
    return graph


def give_weights(graph: ir.Model, spec: ModelSpec, model: ReferenceModel) -> None:
    """Put a model's weights into a lowered graph, in the graph's types."""
    state = model.state_dict() | {"inv_freq": model.get_buffer("inv_freq")}
    for value in trace.weight_inputs(graph.graph, spec):
        assert value.name is not None and value.dtype is not None
        tensor = state[value.name].T if TRANSPOSED_KEY in value.metadata_props else state[value.name]
        graph.graph.inputs.remove(value)
        array = tensor.contiguous().float().numpy().astype(value.dtype.numpy())
        value.const_value = ir.tensor(array, name=value.name)
        graph.graph.register_initializer(value)


def session(model: ir.Model) -> ort.InferenceSession:
    """On the CPU, with ONNX Runtime's default optimizations."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    data = ir.to_proto(model).SerializeToString()
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def random_call(
    spec: ModelSpec, batch: int, length: int, seed: int, *, far: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[np.ndarray]]:
    """(input_ids, positions, seq_lens, states): unequal rows, one of them empty if there are several."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, spec.vocab_size, (batch, length))
    lens = rng.integers(1, length + 1, batch)
    lens[0] = length
    if batch > 1:
        lens[1] = 0
    positions = rng.integers(0, 9, batch) + far
    states = [
        rng.standard_normal((batch, *spec.state_shape)).astype(np.float32) for _ in range(spec.num_layers)
    ]
    return ids, positions, lens, states


def feed(ids: Any, positions: Any, lens: Any, states: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Named inputs of a graph."""
    named = {io_names.INPUT_IDS: ids, io_names.POSITIONS: positions, io_names.SEQ_LENS: lens}
    return named | {io_names.past_state(i): state for i, state in enumerate(states)}
