"""Random DiJiang checkpoints of Pythia's shapes, streamed to disk: for measurements, not for text.

The layout is the official one (modeling_gpt_neox_dijiang.py@3459531), in one safetensors file. Values come
from a pool of normal numbers that is read at changing offsets, so that writing is as fast as the disk and
takes as little memory for 7 billion parameters as for 70 million.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt

from dijiang_engines.progress import ProgressFactory, silent

POOL_SIZE = 4 << 20
HEADER_ALIGNMENT = 8


@dataclass(frozen=True)
class Shape:
    """The sizes of a GPT-NeoX model."""

    layers: int
    hidden: int
    heads: int
    intermediate: int
    vocab: int = 50304
    positions: int = 2048
    rotary_pct: float = 0.25


# config.json of EleutherAI/pythia-*.
SHAPES = {
    "pythia-70m": Shape(6, 512, 8, 2048),
    "pythia-160m": Shape(12, 768, 12, 3072),
    "pythia-410m": Shape(24, 1024, 16, 4096),
    "pythia-1b": Shape(16, 2048, 8, 8192),
    "pythia-1.4b": Shape(24, 2048, 16, 8192),
    "pythia-2.8b": Shape(32, 2560, 32, 10240),
    "pythia-6.9b": Shape(32, 4096, 32, 16384, vocab=50432),
}

_DTYPES: dict[str, tuple[str, type[np.floating[Any]]]] = {
    "float16": ("F16", np.float16),
    "float32": ("F32", np.float32),
}


@dataclass(frozen=True)
class _Tensor:
    name: str
    shape: tuple[int, ...]
    scale: float
    """Standard deviation of the values."""
    mean: float = 0.0
    values: npt.NDArray[np.float32] | None = None
    """Given values instead of random ones."""


def write_random_checkpoint(
    folder: Path,
    shape: Shape,
    *,
    dtype: Literal["float16", "float32"] = "float16",
    seed: int = 0,
    progress: ProgressFactory = silent,
) -> Path:
    """Write config.json and model.safetensors into `folder` (created); returns the weights' path.

    Args:
        folder: where to.
        shape: the sizes.
        dtype: of all weights; in float16 the decay tables overflow as in any float16 official checkpoint.
        seed: of the values.
        progress: counts bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    code, numpy_type = _DTYPES[dtype]
    tensors = list(_tensors(shape, np.random.default_rng(seed)))
    item = np.dtype(numpy_type).itemsize
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + item * math.prod(tensor.shape)
        header[tensor.name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [start, end]}
    path = folder / "model.safetensors"
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    pool = np.random.default_rng(seed).standard_normal(POOL_SIZE, dtype=np.float32)
    with path.open("wb") as file, progress("Writing a random checkpoint", end, "bytes") as bar:
        file.write(len(text).to_bytes(8, "little") + text)
        for index, tensor in enumerate(tensors):
            for block in _blocks(tensor, pool, offset=index * 7919):
                with np.errstate(over="ignore"):
                    _write(file, block.astype(numpy_type))
                bar.advance(block.size * item)
    (folder / "config.json").write_text(json.dumps(_config(shape, dtype), indent=2) + "\n")
    return path


def _write(file: BinaryIO, block: npt.NDArray[Any]) -> None:
    file.write(np.ascontiguousarray(block).data)


def _blocks(tensor: _Tensor, pool: npt.NDArray[np.float32], offset: int) -> Iterator[npt.NDArray[np.float32]]:
    """The tensor's values in flat blocks no larger than the pool."""
    if tensor.values is not None:
        yield tensor.values.reshape(-1)
        return
    left = math.prod(tensor.shape)
    start = offset % pool.size
    while left:
        block = pool[start : start + left]
        yield block * np.float32(tensor.scale) + np.float32(tensor.mean)
        left -= block.size
        start = 0


def _tensors(shape: Shape, rng: np.random.Generator) -> Iterator[_Tensor]:
    """Every tensor in the order of the file; scales keep activations near one."""
    h, inner, d = shape.hidden, shape.intermediate, shape.hidden // shape.heads

    def linear(name: str, rows: int, columns: int) -> Iterator[_Tensor]:
        yield _Tensor(f"{name}.weight", (rows, columns), 1 / math.sqrt(columns))
        yield _Tensor(f"{name}.bias", (rows,), 0.02)

    def norm(name: str) -> Iterator[_Tensor]:
        yield _Tensor(f"{name}.weight", (h,), 0.05, mean=1.0)
        yield _Tensor(f"{name}.bias", (h,), 0.02)

    gamma = 1 - np.exp(np.linspace(math.log(1 / 32), math.log(1 / 512), shape.heads))
    powers = gamma[:, None] ** np.arange(shape.positions)
    d1 = powers.astype(np.float32).reshape(1, shape.heads, shape.positions, 1)
    d2 = (1 / powers).astype(np.float32).reshape(d1.shape)
    # Orthonormal DCT-II basis times diag(w), as the official code builds proj_matrix.
    rows, columns = np.mgrid[0:d, 0:d]
    basis = np.cos(np.pi * (2 * columns + 1) * rows / (2 * d)) * np.sqrt(2 / d)
    basis[0] /= np.sqrt(2)
    yield _Tensor("gpt_neox.embed_in.weight", (shape.vocab, h), 1.0)
    for i in range(shape.layers):
        at = f"gpt_neox.layers.{i}"
        yield from norm(f"{at}.input_layernorm")
        yield from norm(f"{at}.post_attention_layernorm")
        yield from linear(f"{at}.attention.query_key_value", 3 * h, h)
        yield from linear(f"{at}.attention.dense", h, h)
        yield _Tensor(f"{at}.attention.W_G", (h, h), 1 / math.sqrt(h))
        yield from norm(f"{at}.attention.group_norm")
        proj = (basis * rng.standard_normal(d)).astype(np.float32)
        yield _Tensor(f"{at}.attention.proj_matrix", (d, d), 0, values=proj)
        yield _Tensor(f"{at}.attention.D1", d1.shape, 0, values=d1)
        yield _Tensor(f"{at}.attention.D2", d2.shape, 0, values=d2)
        yield from linear(f"{at}.mlp.dense_h_to_4h", inner, h)
        yield from linear(f"{at}.mlp.dense_4h_to_h", h, inner)
    yield from norm("gpt_neox.final_layer_norm")
    yield _Tensor("embed_out.weight", (shape.vocab, h), 1 / math.sqrt(h))


def _config(shape: Shape, dtype: str) -> dict[str, Any]:
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "max_position_embeddings": shape.positions,
        "hidden_act": "gelu",
        "rotary_pct": shape.rotary_pct,
        "rotary_emb_base": 10000,
        "layer_norm_eps": 1e-5,
        "use_parallel_residual": True,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
