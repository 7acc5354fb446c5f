"""Prefills on TensorRT: layer by layer, and those whose size comes again and again as CUDA graphs.

Enqueueing a prefill takes the host longer than the GPU needs for a few hundred tokens. But a graph costs a
context, which takes as long to make as it saves in many calls, so a size is recorded when it has been used
for a while: as a server's pieces of prompts are. A prompt that is read once has its own size, and gains
nothing. Equal calls have equal bits either way, for a graph holds the kernels that the runtime would have
enqueued.

A graph has its addresses for good, so each works on memory of its own, which the state is copied to and from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dijiang_engines import io_names
from dijiang_engines.errors import RunnerError
from dijiang_engines.nvidia.cuda import Buffer, Graph
from dijiang_engines.runners.base import FloatArray, IntArray
from dijiang_engines.runners.tensorrt.contexts import Contexts, TensorRTState
from dijiang_engines.runners.tensorrt.transfers import Transfers

RECORDED_AT = 64
"""The use of a size at which it is recorded. On an H100 a graph saves 0.1 to 1.9 ms a call, and making it
takes 17 to 210 ms (docs/evidence/engines-recorded-prefills-h100.txt)."""
KEPT_GRAPHS = 4
"""Recorded sizes that are kept, those used last."""
REMEMBERED = 64
"""Sizes whose uses are counted, those used last."""

Size = tuple[int, int]
"""Rows and tokens of a call."""


@dataclass(frozen=True)
class _Recorded:
    graph: Graph
    context: Any
    """Must live as long as the graph."""
    state: TensorRTState
    """What the graph works on; graphs of as many rows share it."""
    ids: Buffer


class Prefills:
    """Runs prefills of an engine, of at most its profile's size.

    Args:
        contexts: of the engine's plans.
        transfers: for tokens and logits.
        recorded: may sizes be recorded? Those of an engine that gives logits of all tokens are not, since
            these need more memory than is kept.
    """

    def __init__(self, contexts: Contexts, transfers: Transfers, *, recorded: bool) -> None:
        self._contexts, self._transfers = contexts, transfers
        self._all_logits = contexts.engine.all_logits
        self._records = recorded and not self._all_logits
        self._graphs: dict[Size, _Recorded] = {}
        self._uses: dict[Size, int] = {}

    @property
    def sizes(self) -> tuple[Size, ...]:
        """What is recorded, the size used last standing last."""
        return tuple(self._graphs)

    @property
    def scratch_bytes(self) -> int:
        """Device memory that recorded prefills work on."""
        states = {recorded.state.batch: recorded.state.memory.size for recorded in self._graphs.values()}
        return sum(states.values()) + sum(recorded.ids.size for recorded in self._graphs.values())

    def run(self, ids: IntArray, positions: IntArray, seq_lens: IntArray, state: TensorRTState) -> FloatArray:
        """Consume `seq_lens` of the tokens [B, L] of each row.

        Returns:
            Logits on the host: float32 [B, 1, V], or [B, L, V] of an engine that gives all.

        Raises:
            RunnerError: the runtime refused.
        """
        recorded = self._recorded_of((ids.shape[0], ids.shape[1]))
        if recorded is None:
            return self._enqueue(ids, positions, seq_lens, state)
        stream, work = self._contexts.gpu.stream, recorded.state
        stream.copy(work.memory.address, state.memory.address, work.memory.size)
        work.put(ids[:, :1], positions, seq_lens)
        self._transfers.upload_ids(ids, recorded.ids.address)
        stream.launch(recorded.graph)
        stream.copy(state.memory.address, work.memory.address, work.memory.size)
        return self._transfers.read_logits(work.logits, work.batch, 1)

    def _enqueue(
        self, ids: IntArray, positions: IntArray, seq_lens: IntArray, state: TensorRTState
    ) -> FloatArray:
        batch, length = ids.shape
        context = self._contexts.for_prefill()
        state.put(ids[:, :1], positions, seq_lens)
        rows = length if self._all_logits else 1
        tokens, logits = self._transfers.upload_ids(ids), self._transfers.logits(batch, rows)
        self._contexts.set_shapes(context, batch, length)
        bound = self._contexts.addresses(state) | {io_names.INPUT_IDS: tokens, io_names.LOGITS: logits}
        self._contexts.bind(context, bound)
        self._contexts.execute(context, state)
        return self._transfers.read_logits(logits, batch, rows)

    def _recorded_of(self, size: Size) -> _Recorded | None:
        """The graph of this size, which is made if it pays now; None: there is none."""
        found = self._graphs.pop(size, None)
        if found is None and self._pays(size):
            while len(self._graphs) >= KEPT_GRAPHS:
                oldest = next(iter(self._graphs))
                del self._graphs[oldest], self._uses[oldest]  # which begins anew, lest sizes take turns at it
            try:
                found = self._record(size)
            except RunnerError:  # memory is short, or the runtime cannot: it goes on without
                self._records = False
                self._contexts.gpu.stream.synchronize()  # what was begun needs its memory until then
        if found is not None:
            self._graphs[size] = found  # the one used last stands last
        return found

    def _pays(self, size: Size) -> bool:
        if not self._records:
            return False
        self._uses[size] = self._uses.pop(size, 0) + 1
        forgotten = [other for other in self._uses if other not in self._graphs][:-REMEMBERED]
        for other in forgotten:
            del self._uses[other]
        return self._uses[size] >= RECORDED_AT

    def _record(self, size: Size) -> _Recorded | None:
        batch, length = size
        contexts, gpu = self._contexts, self._contexts.gpu
        known = (recorded.state for recorded in self._graphs.values() if recorded.state.batch == batch)
        state = next(known, None)
        if state is None:
            state = TensorRTState(self, gpu, contexts.engine.spec, batch)
            state.zero()
        ids = gpu.cuda.buffer(batch * length * gpu.integers.itemsize)
        gpu.stream.fill(ids.address, 0, ids.size)
        context = contexts.new_prefill()
        contexts.set_shapes(context, batch, length)
        contexts.bind(context, contexts.addresses(state) | {io_names.INPUT_IDS: ids.address})
        contexts.run_empty(context, state)
        if not contexts.can_record(context):
            self._records = False
            return None
        return _Recorded(contexts.record(context, state), context, state, ids)
