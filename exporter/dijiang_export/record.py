"""Record reference cases: what PyTorch computes in float64, for validation anywhere without PyTorch.

The oracle works layer by layer over the tokens of all cases at once, and within a layer matrix by matrix
in blocks of rows that are read, rounded to the bundle's type, widened to float64 and dropped. Many tokens
(`drift`) go through a layer in segments, with the state carried from one to the next. So peak memory grows
with neither the model nor the length, but for the hidden vectors, one a token; every weight is read once a
segment; and what is compared is the arithmetic of an engine, not the rounding of weights that it cannot
avoid. The file is described in `dijiang_engines.reference_cases` and docs/bundle-format.md.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import save_file
from torch import Tensor, nn

from dijiang_engines import reference_cases
from dijiang_engines.progress import ProgressFactory, silent
from dijiang_engines.spec import ModelSpec
from dijiang_export.checkpoint import Checkpoint
from dijiang_export.graph.body_prefill import chunk_size
from dijiang_export.graph.weights import round_to
from dijiang_export.reference.attention import Decay, Geometry, dijiang_attention
from dijiang_export.reference.model import AttentionOp, Block, ReferenceModel, is_op_constant
from dijiang_export.reference.rope import inverse_frequencies

Cases = Literal["none", "short", "full"]
DRIFT = "drift"
BLOCK_BYTES = 16 << 20
"""Of the stored weight; float64 blocks are up to four times as large."""
SEGMENT_BYTES = 64 << 20
"""Of the widest activation of a segment, in float64; a few of them are alive at a time."""
LEAST_SEGMENT = 512
"""Tokens, however wide the model: each segment reads all weights again."""
DRIFT_TOKENS = 10_000
"""Length of `drift`, or as many as the model has positions."""


@dataclass(frozen=True)
class CasePlan:
    """One case before it is computed: rows of random tokens and where to look at them."""

    name: str
    input_ids: list[npt.NDArray[np.int64]]
    """Per row, the valid tokens."""
    positions: list[int]
    """Per row, where it starts (the state is zero there all the same)."""
    marks: npt.NDArray[np.int64]
    """[B, M] token counts, not decreasing; the last is the row's length."""
    state_marks: list[int]
    """Columns of `marks` at which states are kept."""


def plan_cases(spec: ModelSpec, cases: Cases, seed: int = 0) -> list[CasePlan]:
    """The cases of `--cases`: lengths around the chunk size, unequal rows, far positions."""
    if cases == "none":
        return []
    chunk = chunk_size(spec.head_dim)
    wanted: list[tuple[str, list[int], list[int]]] = [("short", [chunk + 6, chunk // 2 + 1, 1], [0, 0, 0])]
    limit = spec.max_positions
    if limit is None:
        wanted.append(("far", [9, 5], [100_000, 1_000_000]))
    else:
        wanted.append(("far", [9, 5], [max(limit - 9, 0), max(limit - 6, 0)]))
    if cases == "full":
        wanted.append(("long", [4 * chunk + 44, 2 * chunk + 1], [0, 3]))
        wanted.append((DRIFT, [DRIFT_TOKENS], [0]))
    rng = np.random.default_rng(seed)
    plans = []
    for name, lengths, positions in wanted:
        if limit is not None:  # short tables
            lengths = [max(1, min(n, limit - start)) for n, start in zip(lengths, positions, strict=True)]
        rows = [rng.integers(0, spec.vocab_size, n) for n in lengths]
        if name == DRIFT:
            marks, state_marks = _drift_marks(lengths[0])
        else:
            marks = np.stack([_marks(n, rng) for n in lengths])
            state_marks = [1, marks.shape[1] - 1]
        plans.append(CasePlan(name, rows, positions, marks, state_marks))
    return plans


def _marks(length: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Five token counts: the first token, two odd places, the last but one, and all."""
    inner = np.sort(rng.integers(1, length + 1, 2))
    return np.array([1, *inner, max(length - 1, inner[1]), length]).astype(np.int64)


def _drift_marks(length: int) -> tuple[npt.NDArray[np.int64], list[int]]:
    """Powers of ten, then every thousandth token: marks [1, M], and at which of them states are kept."""
    wanted = [n for n in (1, 10, 100, 250, 500, *range(1000, length, 1000)) if n < length]
    marks = [*wanted, length]
    kept = [i for i, mark in enumerate(marks) if mark in (100, 1000, 5000, length)]
    return np.array([marks], np.int64), kept


def record_cases(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    path: Path,
    cases: Cases,
    progress: ProgressFactory = silent,
) -> list[str]:
    """Compute and write the cases; returns their names (none, and no file, for "none").

    Args:
        checkpoint: where weights come from.
        dtype: the bundle's type, to which weights are rounded.
        path: the safetensors file to write.
        cases: how much.
        progress: for the layers.
    """
    plans = plan_cases(checkpoint.spec, cases)
    if not plans:
        return []
    with torch.inference_mode():
        tensors = Recorder(checkpoint, dtype, plans).run(progress)
    metadata = {
        "format": reference_cases.FORMAT,
        "version": reference_cases.VERSION,
        "cases": json.dumps([plan.name for plan in plans]),
        "compute_dtype": "float64",
    }
    save_file(tensors, path, metadata=metadata)
    path.chmod(0o644)  # safetensors makes private files; a bundle is readable as a whole
    return [plan.name for plan in plans]


class _StreamedLinear(nn.Module):
    """x @ Wᵀ + b in float64 with W read in blocks of rows."""

    def __init__(self, recorder: Recorder, name: str, bias: Tensor | None) -> None:
        super().__init__()
        self.recorder, self.name, self.bias = recorder, name, bias

    def forward(self, x: Tensor) -> Tensor:
        parts = [x @ block.T for block in self.recorder.blocks(self.name)]
        y: Tensor = torch.cat(parts, dim=-1)
        return y if self.bias is None else y + self.bias


@dataclass(frozen=True)
class _Row:
    """One sequence's place in the flat list of all cases' tokens."""

    case: int
    row: int
    tokens: slice
    position: int
    marks: list[int]


class Recorder:
    """Computes the cases of one checkpoint. Call `run` in inference mode.

    Args:
        checkpoint: where weights come from.
        dtype: to which they are rounded.
        plans: the cases.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, plans: list[CasePlan]) -> None:
        self.checkpoint, self.dtype, self.plans = checkpoint, dtype, plans
        self.spec = checkpoint.spec
        self.names = set(checkpoint.names())
        self.rows: list[_Row] = []
        start = 0
        for case, plan in enumerate(plans):
            for row, ids in enumerate(plan.input_ids):
                span = slice(start, start + len(ids))
                self.rows.append(_Row(case, row, span, plan.positions[row], plan.marks[row].tolist()))
                start += len(ids)
        self._segments = self._cut(start)
        self._segment = self._segments[0]
        self._carried = torch.empty(0)
        """State of the one row that goes on in the next segment."""
        state = self.spec.state_shape
        self.states = [
            [np.zeros((len(p.input_ids), len(p.state_marks), *state), np.float32) for p in plans]
            for _ in range(self.spec.num_layers)
        ]

    def _cut(self, tokens: int) -> list[slice]:
        """Slices of the flat list of tokens, each with bounded activations."""
        spec = self.spec
        widest = max(spec.qkv_size, spec.intermediate_size, spec.hidden_size)
        size = max(LEAST_SEGMENT, SEGMENT_BYTES // (8 * widest))
        return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]

    def blocks(self, name: str) -> Iterator[Tensor]:
        """Float64 blocks of rows of a weight, rounded to the bundle's type first."""
        for _, block in self.checkpoint.row_blocks(name, BLOCK_BYTES):
            yield round_to(block, self.dtype, name).double()

    def tensor(self, name: str) -> Tensor:
        """A whole small parameter in float64; op constants are not rounded, except P."""
        value = self.checkpoint.tensor(name)
        if name.endswith(".proj"):
            return value.float().to(self.dtype).double()  # the op casts float32 P to T
        return value.double() if is_op_constant(name) else round_to(value, self.dtype, name).double()

    def run(self, progress: ProgressFactory = silent) -> dict[str, npt.NDArray[np.generic]]:
        """All tensors of the file."""
        hidden = self._embed()
        total = self.spec.num_layers * len(self._segments) + 1
        with progress("Recording reference cases", total, "items") as bar:
            for index in range(self.spec.num_layers):
                with torch.device("meta"):
                    block = Block(self.spec)
                self._load(block, f"layers.{index}.")
                for segment in self._segments:
                    self._segment = segment
                    part = hidden[:, segment]
                    part.copy_(self._block(block, part, functools.partial(self._attention, index)))
                    bar.advance()
            logits = self._logits(hidden)
            bar.advance()
        return self._collect(logits)

    def _block(self, block: Block, hidden: Tensor, op: AttentionOp) -> Tensor:
        """One layer over one segment, [1, n, h] -> [1, n, h]."""
        unused = torch.zeros(1)  # rows have states, positions and lengths of their own
        result: Tensor
        result, _ = block(hidden, unused, unused, unused, inverse_frequencies(self.spec), op)
        return result

    def _load(self, module: nn.Module, prefix: str) -> None:
        """Give a module on the meta device its small parameters, and let its matrices be streamed."""
        for path, child in list(module.named_modules()):
            if isinstance(child, nn.Linear):
                bias = self.tensor(f"{prefix}{path}.bias") if child.bias is not None else None
                name = f"{prefix}{path}.weight"
                if name == "lm_head.weight" and name not in self.names:
                    name = "embed_tokens.weight"
                parent, _, leaf = path.rpartition(".")
                setattr(module.get_submodule(parent), leaf, _StreamedLinear(self, name, bias))
        state = {name: self.tensor(prefix + name) for name, _ in module.named_parameters()}
        module.load_state_dict(state, assign=True)
        module.requires_grad_(False)

    def _embed(self) -> Tensor:
        """[1, N, h] for the N tokens of all rows."""
        parts = []
        with torch.device("meta"):
            embedder = ReferenceModel(self.spec)
        position_table = None
        if embedder.embed_positions is not None:
            position_table = self.tensor("embed_positions.weight")
        project = None
        if embedder.project_in is not None:
            project = _StreamedLinear(self, "project_in.weight", None)
        for row in self.rows:
            ids = self.plans[row.case].input_ids[row.row]
            rows = [self.checkpoint.rows("embed_tokens.weight", int(i), int(i) + 1) for i in ids]
            vectors = torch.cat(rows)
            x = round_to(vectors, self.dtype, "embed_tokens.weight").double()
            if project is not None:
                x = project(x)
            if position_table is not None:
                first = row.position + self.spec.position_offset
                x = x + position_table[first : first + len(ids)]
            parts.append(x)
        return torch.cat(parts).unsqueeze(0)

    def _attention(
        self, layer: int, *tensors: Tensor, decay: Decay, geometry: Geometry
    ) -> tuple[Tensor, Tensor]:
        """The op over each row's part of the segment, cut at its marks, with the state carried and kept."""
        qkv, gate, state, _, _, *constants = tensors
        outputs = []
        for row in self.rows:
            offset = row.tokens.start - self._segment.start
            done = max(-offset, 0)
            stop = min(row.tokens.stop, self._segment.stop) - row.tokens.start
            if done >= stop:
                continue
            wanted = self.plans[row.case].state_marks
            state = self._carried
            if done == 0:
                state = torch.zeros(1, *self.spec.state_shape, dtype=torch.float64)
            for mark, end in enumerate(row.marks):
                here = min(end, stop)
                if here > done:
                    part = slice(offset + done, offset + here)
                    output, state = dijiang_attention(
                        qkv[:, part], gate[:, part], state,
                        torch.tensor([row.position + done]), torch.tensor([here - done]),
                        *constants, decay=decay, geometry=geometry, form="chunked",
                    )  # fmt: skip
                    outputs.append(output)
                    done = here
                if done == end and mark in wanted:
                    kept = self.states[layer][row.case]
                    kept[row.row, wanted.index(mark)] = state[0].float().numpy()
            self._carried = state
        return torch.cat(outputs, dim=1), state

    def _logits(self, hidden: Tensor) -> Tensor:
        """[K, V]: all rows' marks, row by row."""
        index = torch.tensor([row.tokens.start + mark - 1 for row in self.rows for mark in row.marks])
        model = ReferenceModel(self.spec, device="meta")
        model.layers = nn.ModuleList()
        for name in ("embed_tokens", "embed_positions", "project_in"):
            setattr(model, name, None)
        self._load(model, "")  # what is left is the head
        return self._head(model, hidden[0][index])

    def _head(self, model: ReferenceModel, hidden: Tensor) -> Tensor:
        """[K, h] -> [K, V]."""
        return model.head(hidden)

    def _collect(self, logits: Tensor) -> dict[str, npt.NDArray[np.generic]]:
        tensors: dict[str, npt.NDArray[np.generic]] = {}
        sizes = [plan.marks.size for plan in self.plans]
        of_case = torch.split(logits.float(), sizes)
        for case, plan in enumerate(self.plans):
            lengths = [len(ids) for ids in plan.input_ids]
            padded = np.zeros((len(lengths), max(lengths)), np.int64)
            for row, ids in enumerate(plan.input_ids):
                padded[row, : len(ids)] = ids
            tensors |= {
                f"{plan.name}.input_ids": padded,
                f"{plan.name}.seq_lens": np.array(lengths, np.int64),
                f"{plan.name}.positions": np.array(plan.positions, np.int64),
                f"{plan.name}.marks": plan.marks,
                f"{plan.name}.logits": of_case[case].reshape(*plan.marks.shape, -1).numpy().copy(),
                f"{plan.name}.state_marks": np.array(plan.state_marks, np.int64),
            }
            for layer, states in enumerate(self.states):
                tensors[f"{plan.name}.state.{layer}"] = states[case]
        return tensors
