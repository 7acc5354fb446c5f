"""Our kernels as a contestant: the whole op, in place, as a runtime binds it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dijiang_engines.kernels.attention import Geometry, Kernels, load_kernels
from dijiang_engines.plugin.cache import library_hash
from dijiang_export.bench.kernels.cells import Cell
from dijiang_export.bench.kernels.inputs import Call, Layer, exact_op
from dijiang_export.bench.kernels.peers import Prepared


class Ours:
    """The CUDA library.

    Args:
        library: of the kernels; None for the default one.

    Raises:
        PluginError: none was built.
        KernelError: it cannot be loaded.
    """

    name = "ours"

    def __init__(self, library: Path | None = None) -> None:
        self._kernels: Kernels = load_kernels(library)

    def describe(self) -> dict[str, Any]:
        """Which library this is."""
        path = self._kernels.path
        return {
            "path": path.name,
            "sha256": library_hash(path),
            "version": self._kernels.version,
            "architectures": self._kernels.architectures,
        }

    def prepare(self, cell: Cell, layer: Layer, calls: Sequence[Call]) -> Prepared:
        """Allocate outputs, workspace and sync memory for `cell`."""
        qkv = calls[0].qkv
        dtype: Any = str(qkv.dtype).removeprefix("torch.")
        geometry = Geometry(**asdict(layer.attributes), dtype=dtype)

        def scratch(size: int) -> Tensor | None:
            return torch.zeros(size, dtype=torch.uint8, device=qkv.device) if size else None

        workspace = scratch(self._kernels.workspace_size(geometry, cell.batch, cell.length))
        sync = scratch(self._kernels.sync_size(geometry, cell.batch, cell.length))
        outputs = [torch.empty_like(call.gate) for call in calls]
        states = [call.state.clone() for call in calls]  # the others' stay as they are

        def attend(call: Call, state: Tensor, output: Tensor) -> None:
            stream = torch.cuda.current_stream().cuda_stream if qkv.is_cuda else 0
            self._kernels.attention_tensors(
                geometry, qkv=call.qkv, gate=call.gate, past_state=state, positions=call.positions,
                seq_lens=call.seq_lens, proj=layer.proj, norm_weight=layer.norm_weight,
                norm_bias=layer.norm_bias, inv_freq=layer.inv_freq, log_decay=layer.log_decay,
                output=output, present_state=state, workspace=workspace, sync=sync, stream=stream,
            )  # fmt: skip

        def check() -> dict[str, float]:
            if workspace is not None:
                workspace.fill_(255)  # NaN in every type
            outputs[0].fill_(float("nan"))
            state = calls[0].state.clone()
            attend(calls[0], state, outputs[0])
            return exact_op(layer, calls[0]).errors(outputs[0], state)

        return Prepared(
            lambda i: attend(calls[i], states[i], outputs[i]),
            check,
            note=self._kernels.plan(geometry, cell.batch, cell.length),
        )
