"""What a model is and what it takes to run: arithmetic on its spec, and what a bundle says about itself.

Needs neither a runtime nor PyTorch. Sizes are in bytes, counts in elements, half-lives in tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from dijiang_engines.formats.bundle import Bundle
from dijiang_engines.formats.engine import EngineFolder
from dijiang_engines.formats.folder import Model
from dijiang_engines.formats.manifest import WEIGHTS
from dijiang_engines.formats.onnx_external import external_tensors
from dijiang_engines.formats.quantised.manifest import KEY, Quantisation
from dijiang_engines.formats.safe_files import LIMITS, open_regular
from dijiang_engines.op_contract import chunk_size
from dijiang_engines.printable import printable
from dijiang_engines.sizes import ITEM_BYTES, part_sizes, weight_bytes
from dijiang_engines.spec import ModelSpec
from dijiang_engines.weight_formats import Matrix

CONTEXTS = (2048, 32768)
"""Token counts at which a state is compared with a KV cache."""
PREFILL_TOKENS = 2048
"""Length for which the working memory of a prefill is estimated, if the model allows it."""


def step_bytes(spec: ModelSpec, dtype: str, quantised: Mapping[str, Sequence[Matrix]] | None = None) -> int:
    """Bytes of weights that one decoding step must read: all but the embedding tables, of which it takes a
    row each; a tied embedding is read as the head. `quantised`: what is, as of a `Model`."""
    total, parts = weight_bytes(spec, dtype, quantised), part_sizes(spec)
    if "positions" in parts:
        total -= parts["positions"].nbytes(dtype)
    if spec.tied_embeddings:
        return total
    if quantised is None:
        return total - parts["embedding"].nbytes(dtype)
    return total - sum(part.nbytes for part in quantised["embed_tokens.weight"])


def kv_cache_bytes(spec: ModelSpec, tokens: int, item_bytes: int) -> int:
    """Bytes of keys and values that softmax attention of the same shape keeps for one sequence."""
    return 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * tokens * item_bytes


def break_even_tokens(spec: ModelSpec, item_bytes: int) -> int:
    """Tokens from which on the KV cache is at least as large as the state, at `item_bytes` an element."""
    return -(-spec.state_bytes // kv_cache_bytes(spec, 1, item_bytes))


def working_bytes(spec: ModelSpec, dtype: str, tokens: int) -> int:
    """An estimate of the activations that exist at once when `tokens` tokens of one sequence are run.

    The larger of attention and MLP, beside three residual streams and the logits. Attention: packed
    projection and gate; ten float32 arrays of the heads' width (q, k, v, both turned by RoPE, both feature
    maps, within and across chunks, the output); scores of each chunk against itself, twice; a state for each
    chunk, three times. ONNX Runtime's arena was measured to take 1.1 to 1.7 times this on a CPU.
    """
    item = ITEM_BYTES[dtype]
    chunk = min(chunk_size(spec.head_dim), tokens)
    residual = 3 * tokens * spec.hidden_size * item
    attention = tokens * (spec.qkv_size + spec.attention_size) * item
    attention += 10 * 4 * tokens * spec.attention_size
    if tokens > 1:
        chunks = -(-tokens // chunk) + 1
        attention += 2 * 4 * spec.num_heads * tokens * chunk
        attention += 3 * 4 * chunks * spec.num_heads * spec.head_dim**2
    mlp = tokens * spec.intermediate_size * (3 if spec.gated_mlp else 2) * item
    return residual + max(attention, mlp) + 4 * spec.vocab_size


@dataclass(frozen=True)
class LayerDecay:
    """How fast one layer forgets, over its heads. For tables: of each head's mean over the rows."""

    layer: int
    gamma_min: float
    gamma_max: float
    half_life_min: float | None
    """Tokens after which the fastest head's state has halved; None = never."""
    half_life_max: float | None
    """The same of the slowest head."""
    negative: float | None
    """Tables: share of entries where gain or read_scale is below zero, which no γ can express."""


def layer_decay(
    layer: int,
    log_decay: npt.NDArray[Any],
    gain: npt.NDArray[Any] | None = None,
    read_scale: npt.NDArray[Any] | None = None,
) -> LayerDecay:
    """Summarise log_decay [H] or [N, H] (ln of the factor per token), gain and read_scale [N, H]."""
    values = np.asarray(log_decay, dtype=np.float64)
    per_head = values if values.ndim == 1 else values.mean(axis=0)
    negative = None
    if gain is not None and read_scale is not None:
        negative = float(((np.asarray(gain) < 0) | (np.asarray(read_scale) < 0)).mean())
    fastest, slowest = float(per_head.min()), float(per_head.max())
    return LayerDecay(
        layer=layer,
        gamma_min=math.exp(fastest),
        gamma_max=math.exp(slowest),
        half_life_min=_half_life(fastest),
        half_life_max=_half_life(slowest),
        negative=negative,
    )


def _half_life(log_decay: float) -> float | None:
    return math.log(0.5) / log_decay if log_decay < 0 else None


@dataclass(frozen=True)
class Inspection:
    """Everything that `inspect` prints."""

    kind: str
    """"bundle", "engine" or "checkpoint"."""
    path: str
    name: str
    dtype: str
    """Of the big weights, as stored."""
    spec: ModelSpec
    decay: tuple[LayerDecay, ...]
    """Of every layer; none of an engine, whose plans hold it."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """What only this kind has."""
    quantisation: Quantisation | None = None
    """Of a bundle's or an engine's weights, if they are."""

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        spec = self.spec
        parts = part_sizes(spec)
        prefill = min(PREFILL_TOKENS, spec.max_positions or PREFILL_TOKENS)
        total = sum(part.count + part.wide for part in parts.values())
        return {
            "kind": self.kind,
            "path": self.path,
            "name": self.name,
            "dtype": self.dtype,
            "spec": spec.to_json(),
            "parameters": {name: part.count + part.wide for name, part in parts.items()} | {"total": total},
            "decay": {
                "kind": spec.decay,
                "rows": spec.decay_rows or None,
                "extended": spec.decay_extended,
                "max_positions": spec.max_positions,
                "layers": [asdict(layer) for layer in self.decay],
            },
            "prefill_tokens": prefill,
            "to_run": {name: self._to_run(name, prefill) for name in ITEM_BYTES}
            | (
                {}
                if self.quantisation is None
                else {self.quantisation.weight_format: self._to_run(self.dtype, prefill, as_stored=True)}
            ),
            "state": {
                "bytes_per_sequence": spec.state_bytes,
                "dtype": "float32",
                "shape_per_layer": list(spec.state_shape),
                "kv_cache": [
                    {
                        "dtype": name,
                        "tokens": tokens,
                        "bytes": kv_cache_bytes(spec, tokens, item),
                        "times_state": kv_cache_bytes(spec, tokens, item) / spec.state_bytes,
                    }
                    for name, item in (("float16", 2), ("float32", 4))
                    for tokens in CONTEXTS
                ],
                "break_even_tokens": {
                    "float16": break_even_tokens(spec, 2),
                    "float32": break_even_tokens(spec, 4),
                },
            },
            self.kind: dict(self.details),
        }

    def _to_run(self, dtype: str, prefill: int, *, as_stored: bool = False) -> dict[str, int]:
        """What an export to `dtype` takes, or with its quantised weights this bundle."""
        spec = self.spec
        parts = self.quantisation.parts if as_stored and self.quantisation is not None else None
        return {
            "weight_bytes": weight_bytes(spec, dtype, parts),
            "bytes_read_per_token": step_bytes(spec, dtype, parts) + 2 * spec.state_bytes,
            "step_working_bytes_estimate": working_bytes(spec, dtype, 1),
            "prefill_working_bytes_estimate": working_bytes(spec, dtype, prefill),
        }


def inspect_bundle(bundle: Bundle) -> Inspection:
    """Describe an opened bundle; reads its decay constants from weights.data, nothing else of it.

    Raises:
        BundleError: a layer's decay constants are not where the graphs say.
    """
    details = {
        "graphs": {name: graph.file for name, graph in bundle.graphs.items()},
        "genai": bundle.runs_with_genai,
    }
    return _inspection("bundle", bundle, tuple(_bundle_decay(bundle)), details)


def inspect_engine(engine: EngineFolder) -> Inspection:
    """Describe an opened engine by its manifest; no plan is loaded, so that this works on any machine."""
    details = {
        "layout": engine.layout,
        "plans": {name: engine.files[name].bytes for name in engine.plans},
        "made_for": engine.made_for.to_json(),
        "profiles": engine.profiles.to_json(),
        "validated": engine.manifest.get("validated"),
        "step": _step_of(engine.manifest.get("made_with")),
    }
    return _inspection("engine", engine, (), details)


def _step_of(made_with: Any) -> str | None:
    """How an engine steps, in words, by what its builder said of the plans; None: it said nothing."""
    plans = made_with.get("plans") if isinstance(made_with, Mapping) else None
    for plan in plans if isinstance(plans, list) else ():
        step = plan.get("plugin_step") if isinstance(plan, Mapping) else None
        if isinstance(step, Mapping):
            left = step.get("left")
            return "one launch" if left is None else f"layer by layer: {printable(str(left), 200)}"
    return None


def _inspection(
    kind: str, model: Model, decay: tuple[LayerDecay, ...], details: Mapping[str, Any]
) -> Inspection:
    """`details`, and what every folder's manifest says."""
    common: dict[str, Any] = {
        "logits": model.logits,
        "files": {name: info.bytes for name, info in model.files.items()},
        "total_bytes": sum(info.bytes for info in model.files.values()),
        "cases": model.cases,
        "tokenizer": model.tokenizer_path is not None,
        "created_by": model.manifest.get("created_by"),
    }
    quantised: dict[str, Any] = {} if model.quantisation is None else {KEY: model.manifest[KEY]}
    return Inspection(
        kind, str(model.path), model.name, model.dtype, model.spec, decay, {**common, **details, **quantised},
        model.quantisation,
    )  # fmt: skip


def _bundle_decay(bundle: Bundle) -> list[LayerDecay]:
    graph = external_tensors(bundle.opened.read(bundle.graph_path("step").name, LIMITS["graph"]))
    places = {tensor.name: tensor for tensor in graph}
    layers = []
    with bundle.opened.unchanged(WEIGHTS) as root, open_regular(root / WEIGHTS) as file:

        def constant(name: str) -> npt.NDArray[np.float32] | None:
            place = places.get(name)
            if place is None or place.data_type != 1:
                return None
            file.seek(place.offset)
            values = np.frombuffer(file.read(place.length), dtype="<f4")
            return values.reshape(place.dims)

        for layer in range(bundle.spec.num_layers):
            prefix = f"layers.{layer}.attention."
            log_decay = constant(prefix + "log_decay")
            if log_decay is not None:
                gain, read_scale = constant(prefix + "gain"), constant(prefix + "read_scale")
                layers.append(layer_decay(layer, log_decay, gain, read_scale))
    return layers
