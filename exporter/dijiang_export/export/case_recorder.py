"""The oracle of recorded cases: a checkpoint's forward in float64, layer by layer over all cases at once.

Many tokens (`drift`) go through a layer in segments, with the state carried from one to the next. So peak
memory grows with neither the model nor the length, but for the hidden vectors, one a token; every weight is
read once a segment.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from dijiang_engines.op_contract import Attributes
from dijiang_engines.progress import ProgressFactory, silent
from dijiang_export.export.cases import CaseInputs
from dijiang_export.export.dequantised import ModelWeights
from dijiang_export.export.streamed_model import StreamedModel
from dijiang_export.reference.attention import Decay, dijiang_attention
from dijiang_export.reference.model import ReferenceModel


@dataclass(frozen=True)
class _Row:
    """One sequence's place in the flat list of all cases' tokens."""

    case: int
    row: int
    tokens: slice
    position: int
    marks: list[int]


class CaseRecorder(StreamedModel):
    """Computes the cases of one checkpoint. Call `run` in inference mode.

    Args:
        checkpoint: where weights come from.
        dtype: to which they are rounded.
        cases: which to compute.
        work: in which everything is computed.
    """

    def __init__(
        self,
        checkpoint: ModelWeights,
        dtype: torch.dtype,
        cases: list[CaseInputs],
        work: torch.dtype = torch.float64,
    ) -> None:
        super().__init__(checkpoint, dtype, work)
        self.cases = cases
        self.rows: list[_Row] = []
        start = 0
        for number, case in enumerate(cases):
            for row, ids in enumerate(case.input_ids):
                span = slice(start, start + len(ids))
                self.rows.append(_Row(number, row, span, case.positions[row], case.marks[row].tolist()))
                start += len(ids)
        self._segments = self._cut(start)
        self._segment = self._segments[0]
        self._carried = torch.empty(0)
        """State of the one row that goes on in the next segment."""
        state = self.spec.state_shape
        self.states = [
            [np.zeros((len(c.input_ids), len(c.state_marks), *state), np.float32) for c in cases]
            for _ in range(self.spec.num_layers)
        ]

    def _cut(self, tokens: int) -> list[slice]:
        """Slices of the flat list of tokens, each with bounded activations."""
        size = self.segment_tokens()
        return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]

    def run(
        self, progress: ProgressFactory = silent, title: str = "Recording reference cases"
    ) -> dict[str, npt.NDArray[np.generic]]:
        """All tensors of the file."""
        rows = [self.embed(self.cases[r.case].input_ids[r.row], r.position) for r in self.rows]
        hidden = torch.cat(rows).unsqueeze(0)
        total = self.spec.num_layers * len(self._segments) + 1
        with progress(title, total, "items") as bar:
            for index in range(self.spec.num_layers):
                block = self.layer(index)
                for segment in self._segments:
                    self._segment = segment
                    part = hidden[:, segment]
                    part.copy_(self.run_layer(block, part, functools.partial(self._attention, index)))
                    bar.advance()
            logits = self._logits(hidden)
            bar.advance()
        return self._collect(logits)

    def _attention(
        self, layer: int, *tensors: Tensor, decay: Decay, attributes: Attributes
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
            wanted = self.cases[row.case].state_marks
            state = self._carried
            if done == 0:
                state = torch.zeros(1, *self.spec.state_shape, dtype=self.work)
            for mark, end in enumerate(row.marks):
                here = min(end, stop)
                if here > done:
                    part = slice(offset + done, offset + here)
                    output, state = dijiang_attention(
                        qkv[:, part], gate[:, part], state,
                        torch.tensor([row.position + done]), torch.tensor([here - done]),
                        *constants, decay=decay, attributes=attributes, form="chunked",
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
        self.load(model, "")  # what is left is the head
        return self.head(model, hidden[0][index])

    def _collect(self, logits: Tensor) -> dict[str, npt.NDArray[np.generic]]:
        tensors: dict[str, npt.NDArray[np.generic]] = {}
        sizes = [case.marks.size for case in self.cases]
        of_case = torch.split(logits.float(), sizes)
        for number, case in enumerate(self.cases):
            lengths = [len(ids) for ids in case.input_ids]
            padded = np.zeros((len(lengths), max(lengths)), np.int64)
            for row, ids in enumerate(case.input_ids):
                padded[row, : len(ids)] = ids
            tensors |= {
                f"{case.name}.input_ids": padded,
                f"{case.name}.seq_lens": np.array(lengths, np.int64),
                f"{case.name}.positions": np.array(case.positions, np.int64),
                f"{case.name}.marks": case.marks,
                f"{case.name}.logits": of_case[number].reshape(*case.marks.shape, -1).numpy().copy(),
                f"{case.name}.state_marks": np.array(case.state_marks, np.int64),
            }
            for layer, states in enumerate(self.states):
                tensors[f"{case.name}.state.{layer}"] = states[number]
        return tensors
