"""bench kernels: our library as a contestant. On a CPU a stand-in computes what the kernels would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dijiang_engines.errors import DijiangError
from dijiang_engines.kernels.attention import Geometry
from dijiang_export.bench.kernels import ours as bench_kernels_ours
from dijiang_export.bench.kernels.cells import Cell, Shape
from dijiang_export.bench.kernels.inputs import make_calls, make_layer, within
from dijiang_export.bench.kernels.ours import Ours
from dijiang_export.reference import attention

CPU = torch.device("cpu")
CELLS = [Cell("decode", Shape(3, 16), 2, 1), Cell("prefill", Shape(2, 32), 2, 70)]


class StandIn:
    """The methods of `dijiang_engines.kernels.attention.Kernels` that are used, over the reference."""

    version, architectures = "0.1.0", "sm_00"

    def __init__(self, path: Path, fault: str = "") -> None:
        self.path, self.fault, self.calls = path, fault, 0

    def workspace_size(self, geometry: Geometry, max_batch: int, max_length: int) -> int:
        return 64 * max_batch * max_length

    def sync_size(self, geometry: Geometry, max_batch: int, max_length: int) -> int:
        return 0

    def plan(self, geometry: Geometry, batch: int, length: int) -> str:
        return f"stand-in {geometry.dtype}"

    def attention_tensors(self, g: Geometry, *, workspace: Any, sync: Any, stream: int, **t: Any) -> None:
        assert g.packed_width == t["qkv"].shape[-1]
        assert sync is None
        assert workspace.numel() >= 64 * t["qkv"].shape[0] * t["qkv"].shape[1]
        assert t["past_state"].data_ptr() == t["present_state"].data_ptr()
        self.calls += 1
        output, state = attention.dijiang_attention(
            t["qkv"], t["gate"], t["past_state"], t["positions"], t["seq_lens"], t["proj"],
            t["norm_weight"], t["norm_bias"], t["inv_freq"], decay=attention.Decay(t["log_decay"]),
            attributes=g,
        )  # fmt: skip
        last = -1 if self.fault == "unwritten" else None
        t["output"].view(-1)[:last] = output.view(-1)[:last]
        if self.fault != "state":
            t["present_state"].copy_(state)


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    path = tmp_path / "libdijiang_kernels.so"
    path.write_bytes(b"abc")
    made = StandIn(path)
    monkeypatch.setattr(bench_kernels_ours, "load_kernels", lambda path: made)
    return made


@pytest.mark.parametrize("cell", CELLS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_whole_op_is_asked_for(library: StandIn, cell: Cell, dtype: torch.dtype) -> None:
    layer, calls = make_layer(cell.shape, CPU), make_calls(cell, dtype, CPU, 2)
    before = [call.state.clone() for call in calls]
    prepared = Ours().prepare(cell, layer, calls)
    name = str(dtype).removeprefix("torch.")
    assert within(prepared.check(), name)
    prepared.run(0)
    assert within(prepared.check(), name)
    assert library.calls == 3
    assert prepared.note == f"stand-in {name}"
    assert all(torch.equal(call.state, state) for call, state in zip(calls, before, strict=True))


@pytest.mark.parametrize("fault", ["unwritten", "state"])
def test_a_wrong_kernel_is_noticed(library: StandIn, fault: str) -> None:
    library.fault = fault
    cell = CELLS[0]
    prepared = Ours().prepare(cell, make_layer(cell.shape, CPU), make_calls(cell, torch.float16, CPU))
    assert not within(prepared.check(), "float16")


@pytest.mark.usefixtures("library")
def test_the_library_is_described() -> None:
    found = Ours().describe()
    assert (found["path"], found["version"]) == ("libdijiang_kernels.so", "0.1.0")
    assert found["sha256"].startswith("ba7816bf")


def test_a_library_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(DijiangError, match=r"libdijiang_kernels\.so") as info:
        Ours(tmp_path / "libdijiang_kernels.so")
    assert info.value.hint is not None
