"""Vanilla GPT-NeoX, LLaMA or OPT checkpoint -> DiJiang checkpoint in the official layout.

All weights are kept; each attention layer gets the parameters that the official code adds, initialised as it
does (modeling_gpt_neox_dijiang.py@3459531): the projection P = C·diag(w) (:172-177), W_G (:109-112), the
GroupNorm (:111) and the decay tables D1 and D2 (:154-162). The result has to be fine-tuned to be of use.

C is the orthonormal DCT-II matrix. w is the normal inverse CDF of uniform numbers: plain Monte Carlo in the
official code; the paper (arXiv 2403.19928, section 3) derives the method for quasi-Monte Carlo, which is the
default here: one scrambled one-dimensional Sobol sequence a layer, its d points covering (0, 1) evenly.

Everything streams: a tensor at a time in blocks, so that memory does not grow with the model.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from dijiang_engines.errors import CheckpointError, UsageError
from dijiang_engines.formats.atomic import output_folder
from dijiang_engines.progress import Progress, ProgressFactory, silent
from dijiang_engines.spec import ModelSpec
from dijiang_export.checkpoint.checkpoint import open_checkpoint
from dijiang_export.checkpoint.decay import official_tables
from dijiang_export.checkpoint.files import copy_file
from dijiang_export.checkpoint.safetensors_file import safetensors_header
from dijiang_export.checkpoint.source import Source, check_finite
from dijiang_export.checkpoint.stored import StoredTensor
from dijiang_export.reference.model import DTYPES

ProjectionSampling = Literal["sobol", "monte-carlo"]
"""How the numbers are drawn that a projection's weights are made of; no tokens are sampled here."""
SAMPLINGS: tuple[ProjectionSampling, ...] = ("sobol", "monte-carlo")

SHARD_BYTES = 5 * 10**9
"""Weights beyond this are split into files of at most so many bytes, as transformers does."""

W_G_GAIN = 2**-2.5  # :112
_BLOCK = 16 << 20  # bytes


@dataclass(frozen=True)
class ConvertReport:
    """What `convert_checkpoint` did."""

    source: str
    output: str
    family: str
    num_layers: int
    num_heads: int
    head_dim: int
    dtype: str
    """Storage type of the weights; of most of them, if the source mixes types."""
    sampling: str
    seed: int
    parameters: int
    """Elements in all, decay tables included."""
    added_parameters: int
    """Of these, what DiJiang adds."""
    files: list[str]
    bytes: int
    seconds: float
    notes: list[str]
    """What was done to read the source that its owner may not expect, sentences for people."""


@dataclass(frozen=True)
class _TensorToWrite:
    """One tensor to write: where its rows come from."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    stored: StoredTensor | None = None
    make: Callable[[], torch.Tensor] | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def blocks(self) -> Iterator[torch.Tensor]:
        if self.make is not None:
            yield self.make().to(self.dtype)
            return
        assert self.stored is not None
        step = max(1, _BLOCK * self.shape[0] // max(1, self.nbytes))
        for start in range(0, self.shape[0], step):
            block = torch.empty((min(step, self.shape[0] - start), *self.shape[1:]), dtype=self.dtype)
            self.stored.read_rows(block, start)
            check_finite(block, self.name)
            yield block


def convert_checkpoint(
    source: str | Path,
    output: str | Path,
    *,
    sampling: ProjectionSampling = "sobol",
    seed: int = 0,
    dtype: str | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    force: bool = False,
    progress: ProgressFactory = silent,
) -> ConvertReport:
    """Write a DiJiang checkpoint made from a vanilla one.

    Args:
        source: Hugging Face folder of a vanilla GPT-NeoX, LLaMA or OPT model.
        output: folder to write; appears only when it is complete.
        sampling: "sobol" (scrambled, quasi-Monte Carlo) or "monte-carlo" (as the official code).
        seed: of the projections and of W_G; the same seed gives the same bytes.
        dtype: store weights as float32, float16 or bfloat16 instead of as they are. The decay tables are
            always float32: half precision cannot hold them (D2 overflows from row 350 on).
        max_shard_bytes: split weights into files of at most so many bytes.
        force: replace an existing output.
        progress: draws a bar of the bytes written.

    Raises:
        CheckpointError: the source cannot be read, or is a DiJiang checkpoint already.
        UsageError: an argument makes no sense.
        OutputError: the output cannot be written.
    """
    started = time.monotonic()
    source, output = Path(source), Path(output)
    _check_arguments(source, output, sampling, seed, dtype, max_shard_bytes)
    opened = Source(source)
    try:
        if opened.has_dijiang:
            raise CheckpointError(
                f"{source} is a DiJiang checkpoint already",
                hint=f"export it: dijiang-export to-onnx {source}",
            )
        opened.check(dijiang=False)
        tensors = _tensors_to_write(opened, sampling, seed, DTYPES[dtype] if dtype else None)
        shards = _shards(tensors, max_shard_bytes)
        with output_folder(output, force=force) as folder:
            files = _write_weights(folder, shards, progress)
            stored_as = dtype or opened.storage_dtype()
            config = _config(opened, stored_as, sampling, seed)
            text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
            (folder / "config.json").write_text(text, encoding="utf-8")
            for path in opened.tokenizer_files:
                copy_file(path, folder)
            open_checkpoint(folder).close()  # what we wrote must be what we read
            size = sum(file.stat().st_size for file in folder.iterdir())
            names = sorted(file.name for file in folder.iterdir())
    finally:
        opened.close()
    spec = opened.spec
    return ConvertReport(
        source=str(source),
        output=str(output),
        family=spec.family,
        num_layers=spec.num_layers,
        num_heads=spec.num_heads,
        head_dim=spec.head_dim,
        dtype=stored_as,
        sampling=sampling,
        seed=seed,
        parameters=sum(math.prod(item.shape) for item in tensors),
        added_parameters=sum(math.prod(item.shape) for item in tensors if item.stored is None),
        files=files + [name for name in names if name not in files],
        bytes=size,
        seconds=time.monotonic() - started,
        notes=opened.notes,
    )


def projection(head_dim: int, sampling: ProjectionSampling, seed: int, layer: int) -> torch.Tensor:
    """P float32 [d, d] = DCT-II matrix · diag(w) for one layer (@3459531:172-177).

    w is the normal inverse CDF of d uniform numbers; where that is infinite (a uniform number of exactly
    0), it is 0 as in the official code.
    """
    from scipy.fft import dct

    # torch.distributions.Normal.icdf, written out
    w = torch.erfinv(2 * _uniform(head_dim, sampling, seed, layer) - 1) * math.sqrt(2)
    w = torch.where(torch.isinf(w), torch.zeros_like(w), w)
    cosines = torch.from_numpy(dct(np.eye(head_dim), axis=0, norm="ortho")).float()
    return cosines * w  # times diag(w) on the right: column by column


def gate_matrix(spec: ModelSpec, seed: int, layer: int) -> torch.Tensor:
    """W_G float32 [h, A]: Xavier uniform with gain 2^-2.5 (@3459531:112)."""
    out = torch.empty(spec.hidden_size, spec.attention_size)
    return torch.nn.init.xavier_uniform_(out, gain=W_G_GAIN, generator=_generator(seed, layer, "W_G"))


def _uniform(count: int, sampling: ProjectionSampling, seed: int, layer: int) -> torch.Tensor:
    """Float32 [count] in [0, 1)."""
    if sampling == "monte-carlo":
        return torch.rand(count, generator=_generator(seed, layer, "monte-carlo"))
    # A power of two of them is drawn, as Sobol sequences want it, and the first `count` taken.
    engine = torch.quasirandom.SobolEngine(  # type: ignore[no-untyped-call]
        1, scramble=True, seed=_seed(seed, layer, "sobol")
    )
    return engine.draw(1 << (count - 1).bit_length()).flatten()[:count]


def _generator(seed: int, layer: int, purpose: str) -> torch.Generator:
    return torch.Generator().manual_seed(_seed(seed, layer, purpose))


def _seed(seed: int, layer: int, purpose: str) -> int:
    """63 bits that differ for every (seed, layer, purpose)."""
    digest = hashlib.sha256(f"{seed} {layer} {purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _check_arguments(
    source: Path, output: Path, sampling: str, seed: int, dtype: str | None, max_shard_bytes: int
) -> None:
    if sampling not in SAMPLINGS:
        raise UsageError("unknown sampling", got=sampling, expected=" or ".join(SAMPLINGS))
    if dtype is not None and dtype not in DTYPES:
        raise UsageError("unknown dtype", got=dtype, expected=" or ".join(DTYPES))
    if seed < 0 or max_shard_bytes < 1:
        raise UsageError("the seed and the shard size must not be negative")
    target, origin = os.path.realpath(output), os.path.realpath(source)
    if origin == target or origin.startswith(target + os.sep):
        raise UsageError(
            "the output would replace the checkpoint that it is made from",
            got=str(output),
            hint="choose another output",
        )


def _tensors_to_write(
    opened: Source, sampling: ProjectionSampling, seed: int, dtype: torch.dtype | None
) -> list[_TensorToWrite]:
    """Every tensor of the result, in canonical order."""
    spec, family = opened.spec, opened.family
    tables = official_tables(spec.num_heads, spec.max_position_embeddings)
    made: dict[str, Callable[[], torch.Tensor]] = {}
    for layer in range(spec.num_layers):
        at = family.attention.format(i=layer)
        made |= {
            f"{at}.proj_matrix": partial(projection, spec.head_dim, sampling, seed, layer),
            f"{at}.W_G": partial(gate_matrix, spec, seed, layer),
            f"{at}.group_norm.weight": partial(torch.ones, spec.attention_size),
            f"{at}.group_norm.bias": partial(torch.zeros, spec.attention_size),
            f"{at}.D1": lambda: tables[0],
            f"{at}.D2": lambda: tables[1],
        }
    added_dtype = dtype or DTYPES[opened.storage_dtype()]
    out = []
    for name, shape in opened.expected(dijiang=True).items():
        if name in made:
            kind = torch.float32 if name.endswith((".D1", ".D2")) else added_dtype
            out.append(_TensorToWrite(name, kind, shape, make=made[name]))
        else:
            stored = opened.tensors[name]
            out.append(_TensorToWrite(name, dtype or stored.delivered_dtype, shape, stored=stored))
    return out


def _shards(tensors: list[_TensorToWrite], max_bytes: int) -> list[list[_TensorToWrite]]:
    """Consecutive tensors in groups of at most `max_bytes` (or one tensor); wider types first in each."""
    shards: list[list[_TensorToWrite]] = [[]]
    size = 0
    for item in tensors:
        if shards[-1] and size + item.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(item)
        size += item.nbytes
    return [sorted(shard, key=lambda item: -item.dtype.itemsize) for shard in shards]


def _write_weights(folder: Path, shards: list[list[_TensorToWrite]], progress: ProgressFactory) -> list[str]:
    """Write the shards, and an index if there are several; returns the files' names."""
    total = sum(item.nbytes for shard in shards for item in shard)
    files: list[str] = []
    weight_map: dict[str, str] = {}
    with progress("converting", total, "bytes") as bar:
        for number, shard in enumerate(shards, start=1):
            of = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
            files.append(f"model{of}.safetensors")
            weight_map |= {item.name: files[-1] for item in shard}
            _write_shard(folder / files[-1], shard, bar)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        files.append("model.safetensors.index.json")
        (folder / files[-1]).write_text(json.dumps(index, indent=2) + "\n")
    return files


def _write_shard(path: Path, shard: list[_TensorToWrite], bar: Progress) -> None:
    with open(path, "wb") as file:
        file.write(safetensors_header((item.name, item.dtype, item.shape) for item in shard))
        for item in shard:
            for block in item.blocks():
                data = block.contiguous().view(-1).view(torch.uint8).numpy().data
                file.write(data)
                bar.advance(data.nbytes)


def _config(opened: Source, dtype: str, sampling: str, seed: int) -> dict[str, Any]:
    """The source's config.json with the storage type and a note of what was done.

    `auto_map` goes: it names code that is not copied. A base model's class becomes the one that the official
    names belong to.
    """
    out = {key: value for key, value in opened.config.items() if key != "auto_map"}
    out["architectures"] = [opened.family.architectures[0]]
    out["dtype" if "dtype" in out else "torch_dtype"] = dtype
    out["dijiang"] = {"version": 1, "sampling": sampling, "seed": seed}
    return out
