"""A small bundle for tests of everything between the bundle format and the command line.

The toy model is not DiJiang: its state is a weighted sum of token vectors, so that a few standard
operators make both graphs, and NumPy says exactly what they must return. It has what matters to a runner:
a state carried through `past`/`present`, positions that count (token n weighs 1 + 0.01·n), padding that
must not, and weights in weights.data.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from dijiang_engines.formats.manifest import graph_io
from dijiang_engines.spec import ModelSpec

SPEC = ModelSpec(
    family="gpt_neox", vocab_size=260, hidden_size=8, intermediate_size=8, num_layers=2, num_heads=2,
    num_kv_heads=2, head_dim=4, rotary_dim=0, rope_theta=10000.0, rope_scaling=None, norm="layer_norm",
    norm_epsilon=1e-5, activation="gelu", gated_mlp=False, parallel_residual=True, post_norm=False,
    final_norm=True, attention_bias=True, dense_bias=True, mlp_bias=True, position_embeddings=0,
    position_offset=0, embedding_size=8, tied_embeddings=False, max_position_embeddings=64,
    decay="geometric", decay_rows=0, decay_extended=False, group_norm_epsilon=1e-5, bos_token_id=0,
    eos_token_ids=(0,),
)  # fmt: skip

DTYPE = {"int64": TensorProto.INT64, "float32": TensorProto.FLOAT}


@dataclass
class ToyModel:
    """What the graphs compute, in NumPy."""

    spec: ModelSpec
    table: np.ndarray
    """[V, H·d·d]"""
    head: np.ndarray
    """[H·d·d, V]"""

    @classmethod
    def random(cls, spec: ModelSpec, seed: int = 0) -> ToyModel:
        rng = np.random.default_rng(seed)
        size = spec.num_heads * spec.head_dim**2
        table = rng.standard_normal((spec.vocab_size, size)).astype(np.float32)
        return cls(spec, table, rng.standard_normal((size, spec.vocab_size)).astype(np.float32))

    def states(self, ids: Sequence[int], position: int = 0) -> list[np.ndarray]:
        """Every layer's state [H, d, d] after `ids`, the first of which is token `position`."""
        weights = 1 + 0.01 * np.arange(position, position + len(ids))
        total = (self.table[np.asarray(ids, dtype=np.int64)] * weights[:, None]).sum(0)
        return [((i + 1) * total).reshape(self.spec.state_shape) for i in range(self.spec.num_layers)]

    def logits(self, ids: Sequence[int], position: int = 0) -> np.ndarray:
        """[V] after `ids`."""
        total = np.sum([state.reshape(-1) for state in self.states(ids, position)], axis=0)
        return np.tanh(total) @ self.head


def make_bundle(
    folder: Path,
    spec: ModelSpec = SPEC,
    *,
    tokenizer: bool = True,
    dtype: str = "float32",
    logits: str = "last",
    seed: int = 0,
    **spec_changes: Any,
) -> ToyModel:
    """Write a bundle into `folder` (created) and return the model that it holds."""
    spec = replace(spec, **spec_changes)
    folder.mkdir(parents=True, exist_ok=True)
    model = ToyModel.random(spec, seed)
    data, places = b"", {}
    for name, array in (("table", model.table), ("head", model.head)):
        data += b"\0" * (-len(data) % 4096)
        places[name] = (len(data), array)
        data += array.tobytes()
    (folder / "weights.data").write_bytes(data)
    for name, step in (("prefill", False), ("step", True)):
        graph = toy_graph(spec, places, step=step, all_logits=logits == "all")
        (folder / f"{name}.onnx").write_bytes(graph.SerializeToString())
    if tokenizer:
        write_byte_tokenizer(folder / "tokenizer.json")
    (folder / "config.json").write_text("{}")
    write_manifest(folder, spec, dtype=dtype, logits=logits)
    return model


def toy_graph(
    spec: ModelSpec, places: dict[str, tuple[int, np.ndarray]], *, step: bool, all_logits: bool
) -> onnx.ModelProto:
    inputs, outputs = graph_io(spec, step=step, all_logits=all_logits)
    node, size = helper.make_node, spec.num_heads * spec.head_dim**2
    constants = {
        "zero": np.int64(0), "one": np.int64(1), "hundredth": np.float32(0.01), "unit": np.float32(1),
        "axis1": np.array([1]), "last": np.array([-1]), "end": np.array([2**62]),
        "axis2": np.array([2]), "flat": np.array([0, 1, size]),
        "state_shape": np.array([0, *spec.state_shape]),
    }  # fmt: skip
    nodes = [
        node("Shape", ["input_ids"], ["length"], start=1, end=2),
        node("Squeeze", ["length"], ["length0"]),
        node("Range", ["zero", "length0", "one"], ["index"]),
        node("Unsqueeze", ["seq_lens", "axis1"], ["lens1"]),
        node("Unsqueeze", ["positions", "axis1"], ["positions1"]),
        node("Less", ["index", "lens1"], ["valid"]),
        node("Cast", ["valid"], ["valid_f"], to=TensorProto.FLOAT),
        node("Add", ["index", "positions1"], ["where"]),
        node("Cast", ["where"], ["where_f"], to=TensorProto.FLOAT),
        node("Mul", ["where_f", "hundredth"], ["rise"]),
        node("Add", ["rise", "unit"], ["weight"]),
        node("Mul", ["weight", "valid_f"], ["masked"]),
        node("Unsqueeze", ["masked", "axis2"], ["masked1"]),
        node("Gather", ["table", "input_ids"], ["vectors"]),
        node("Mul", ["vectors", "masked1"], ["terms"]),
        node("CumSum", ["terms", "one"], ["sums"]),
        node("Slice", ["sums", "last", "end", "axis1"], ["total"]),
    ]
    parts = []
    for i in range(spec.num_layers):
        constants[f"factor{i}"] = np.float32(i + 1)
        nodes += [
            node("Mul", ["total", f"factor{i}"], [f"update{i}"]),
            node("Reshape", [f"update{i}", "state_shape"], [f"shaped{i}"]),
            node("Add", [inputs[3 + i].name, f"shaped{i}"], [outputs[1 + i].name]),
            node("Reshape", [inputs[3 + i].name, "flat"], [f"past_flat{i}"]),
            node("Mul", ["sums" if all_logits else "total", f"factor{i}"], [f"rising{i}"]),
            node("Add", [f"past_flat{i}", f"rising{i}"], [f"part{i}"]),
        ]
        parts.append(f"part{i}")
    summed = parts[0]
    for i, part in enumerate(parts[1:], 1):
        nodes.append(node("Add", [summed, part], [f"summed{i}"]))
        summed = f"summed{i}"
    nodes += [
        node("Tanh", [summed], ["squashed"]),
        node("MatMul", ["squashed", "head"], ["logits"]),
    ]
    initializers = [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()]
    initializers += [external_tensor(k, array, offset) for k, (offset, array) in places.items()]
    graph = helper.make_graph(
        nodes,
        "toy",
        [helper.make_tensor_value_info(t.name, DTYPE[t.dtype], list(t.shape)) for t in inputs],
        [helper.make_tensor_value_info(t.name, DTYPE[t.dtype], list(t.shape)) for t in outputs],
        initializers,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def external_tensor(name: str, array: np.ndarray, offset: int, location: str = "weights.data") -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=array.shape)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", array.nbytes)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def write_manifest(
    folder: Path, spec: ModelSpec, *, dtype: str = "float32", logits: str = "last", **changes: Any
) -> dict[str, Any]:
    """Describe what lies in `folder`; `changes` replace or add top-level keys."""
    cases = (folder / "reference.safetensors").exists()
    manifest: dict[str, Any] = {
        "format": "dijiang-bundle",
        "format_version": 1,
        "created_by": {"dijiang-export": "0.1.0"},
        "source": {"name": "toy", "files": {}},
        "spec": spec.to_json(),
        "dtype": dtype,
        "logits": logits,
        "op": {"domain": "dijiang", "name": "DijiangAttention", "version": 1},
        "opset": 17,
        "ir_version": 8,
        "graphs": {},
        "weights": {"file": "weights.data"},
        "reference": {"file": "reference.safetensors", "cases": ["short"]} if cases else None,
        "files": {},
    }
    for name in ("prefill", "step"):
        inputs, outputs = graph_io(spec, step=name == "step", all_logits=logits == "all")
        manifest["graphs"][name] = {
            "file": f"{name}.onnx",
            "inputs": [t.to_json() for t in inputs],
            "outputs": [t.to_json() for t in outputs],
        }
    for file in sorted(folder.iterdir()):
        if file.name != "manifest.json":
            data = file.read_bytes()
            digest = hashlib.sha256(data).hexdigest()
            manifest["files"][file.name] = {"sha256": digest, "bytes": len(data)}
    manifest |= changes
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return manifest


def write_byte_tokenizer(path: Path) -> None:
    """Id 0 is <|endoftext|>, 1 to 256 the bytes, 257 the two bytes of "é"; 258 and 259 are no tokens."""
    from tokenizers import Tokenizer
    from tokenizers.decoders import ByteLevel as ByteLevelDecoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel

    names = ["<|endoftext|>", *sorted(ByteLevel.alphabet())]
    vocab = {name: i for i, name in enumerate(names)}
    vocab["\u00c3\u00a9"] = len(vocab)
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[("\u00c3", "\u00a9")]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(path))
