"""Calibration: the layers' matrices rounded with error compensation, for what a text makes of their inputs.

Layer by layer: the text's hidden vectors go through the layer with its float weights, and for each matrix
the products of its inputs are summed; its matrices are rounded with these and written to weights.data; and
the hidden vectors that the next layer sees are those that the stored matrices make. Memory does not grow
with the model but for the widest matrix: hidden vectors, one layer's sums, blocks of rows.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dijiang_engines.errors import CheckpointError, TextError
from dijiang_engines.formats.file_table import TOKENIZER
from dijiang_engines.progress import ProgressFactory
from dijiang_engines.scoring.texts import read_text
from dijiang_engines.tokenizer.tokenizer import Tokenizer
from dijiang_engines.weight_formats import Matrix
from dijiang_export.checkpoint.checkpoint import Checkpoint
from dijiang_export.export.dequantised import DequantisedCheckpoint
from dijiang_export.export.quantisation_cost import MeasuredText
from dijiang_export.export.windows import IntArray, WindowModel
from dijiang_export.graph.weights import round_to, write_quantised_rows
from dijiang_export.quantise.compensate import compensate, factor, pieces

WINDOW = 512
"""Tokens that are read from an empty state."""
MOST_TOKENS = 16384
"""That calibrate; more gained nothing (docs/quantisation.md)."""
HIDDEN_BYTES = 96 << 20
"""Of the hidden vectors of all of them."""
MEASURED_WINDOWS = 8
"""At most, from the end of the text, for measuring what quantisation costs."""
LEAST_TOKENS = 1024
MOST_CHARACTERS = 2 << 20
"""Of a text; more of it is not looked at."""
ROWS_BYTES = 32 << 20
"""Of the rows of a matrix that are rounded at a time, in float32."""


@dataclass(frozen=True)
class CalibrationText:
    """A text cut into windows."""

    file: str
    """Its name."""
    windows: IntArray
    """[W, T]: what calibrates."""
    measured: MeasuredText
    """What does not."""
    note: str | None
    """What there is to say about how it was cut."""

    def to_json(self) -> dict[str, object]:
        """As the manifest has it."""
        return {"file": self.file, "tokens": int(self.windows.size)}


def read_calibration_text(path: Path, checkpoint: Checkpoint) -> CalibrationText:
    """Read a text file and cut it: windows spread over it for calibrating, those at its end for measuring.

    Raises:
        TextError: it is missing, empty, binary, not UTF-8, larger than texts may be, or too short.
        CheckpointError: the checkpoint has no tokenizer.json, or its tokens are not the model's.
    """
    spec = checkpoint.spec
    text = read_text(path).text
    if not (checkpoint.path / TOKENIZER).exists():
        raise CheckpointError(
            f"{checkpoint.path} has no {TOKENIZER}",
            hint="without it a text cannot calibrate: leave --calibrate out",
        )
    ids = np.array(Tokenizer(checkpoint.path / TOKENIZER).encode(text[:MOST_CHARACTERS]), np.int64)
    if len(ids) < LEAST_TOKENS:
        raise TextError(
            f"{path} is too short to calibrate with", got=f"{len(ids)} tokens",
            expected=f"at least {LEAST_TOKENS}, better {MOST_TOKENS}",
        )  # fmt: skip
    if int(ids.max()) >= spec.vocab_size:
        raise CheckpointError(
            f"{checkpoint.path / TOKENIZER} has tokens that the model does not have",
            got=f"token {int(ids.max())}", expected=f"below {spec.vocab_size}",
        )  # fmt: skip
    length = min(WINDOW, spec.max_positions or WINDOW)
    windows = ids[: len(ids) // length * length].reshape(-1, length)
    held = max(1, min(MEASURED_WINDOWS, len(windows) // 8))
    usable = windows[:-held]
    most = max(1, min(MOST_TOKENS, HIDDEN_BYTES // (4 * spec.hidden_size)) // length)
    spread = np.linspace(0, len(usable) - 1, min(most, len(usable))).round().astype(np.int64)
    note = None
    if len(text) > MOST_CHARACTERS:
        note = f"{path}: of {len(text):,} characters the first {MOST_CHARACTERS:,} are used"
    words = f"the end of {path.name}, which did not calibrate"
    return CalibrationText(path.name[:200], usable[spread], MeasuredText(windows[-held:], words), note)


def calibrate(
    checkpoint: Checkpoint,
    stored: DequantisedCheckpoint,
    dtype: torch.dtype,
    text: CalibrationText,
    progress: ProgressFactory,
) -> None:
    """Round the layers' matrices anew, in weights.data.

    Args:
        checkpoint: with the float weights.
        stored: of weights.data, which is complete: rounded without a text.
        dtype: of the weights that are not quantised.
        text: what calibrates.
        progress: of the layers.
    """
    plain, other = _Listening(checkpoint, dtype), WindowModel(stored, dtype)
    descriptor = os.open(stored.path, os.O_RDWR | os.O_CLOEXEC)
    layers = checkpoint.spec.num_layers
    try:
        with torch.inference_mode(), progress("Calibrating", layers, "items") as bar:
            hidden = other.embedded(text.windows)
            for index in range(layers):
                plain.listen(hidden.clone(), index)
                for source in [name for name in stored.parts if name.startswith(f"layers.{index}.")]:
                    factors = [factor(sums) for sums in plain.sums_of(source)]
                    for part in stored.parts[source]:
                        for start, rows in _rows(checkpoint, part, dtype):
                            q, scale = _round(rows, factors, part)
                            write_quantised_rows(descriptor, stored.layout, part, start, q, scale)
                other.run_windows(other.layer(index), hidden)
                bar.advance()
    finally:
        os.close(descriptor)


def _rows(checkpoint: Checkpoint, part: Matrix, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """Blocks of a part's rows in float32, and where each begins."""
    step = max(1, ROWS_BYTES // (4 * part.columns))
    for start in range(0, part.rows, step):
        first = part.first_row + start
        rows = checkpoint.rows(part.source, first, first + min(step, part.rows - start))
        yield start, round_to(rows, dtype, part.source).float()


def _round(rows: Tensor, factors: list[Tensor], part: Matrix) -> tuple[Tensor, Tensor]:
    found = [
        compensate(rows[:, columns].clone(), upper, part.format, part.name)
        for columns, upper in zip(pieces(part.columns), factors, strict=True)
    ]
    return torch.cat([q for q, _ in found], 1), torch.cat([scale for _, scale in found], 1)


class _Listening(WindowModel):
    """Sums x xᵀ over the inputs of each matrix of a layer. Matrices of one input share the sums."""

    def listen(self, hidden: Tensor, index: int) -> None:
        """Run layer `index` over hidden [W, T, h], which is overwritten."""
        self._sums: dict[str, list[Tensor]] = {}
        self._last: tuple[Tensor, str] | None = None
        self._owner: dict[str, str] = {}
        self.run_windows(self.layer(index), hidden)
        self._last = None

    def sums_of(self, name: str) -> list[Tensor]:
        """For each piece of columns: [k, k]."""
        return self._sums[self._owner[name]]

    def product_input(self, name: str, x: Tensor) -> Tensor:
        """As it is, after it was heard."""
        if self._last is not None and self._last[0] is x:
            self._owner[name] = self._last[1]
            return x
        self._owner[name], self._last = name, (x, name)
        flat = x.reshape(-1, x.shape[-1])
        parts = [flat[:, columns] for columns in pieces(flat.shape[1])]
        if name not in self._sums:
            self._sums[name] = [torch.zeros(p.shape[1], p.shape[1]) for p in parts]
        for total, part in zip(self._sums[name], parts, strict=True):
            total.addmm_(part.T, part)
        return x
