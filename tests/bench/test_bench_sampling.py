"""bench sampling: who chooses tokens, what is compared, its command. Times need a GPU; here they are set."""

from __future__ import annotations

import ctypes
import json
import logging
import warnings
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from support.fakes.bench_gpu import FakeGpu
from support.linear_emulator import compiled

from dijiang_engines import sampling
from dijiang_engines.bench.timing import Timing
from dijiang_engines.kernels import abi
from dijiang_engines.sampling import SamplingOptions
from dijiang_export.bench.cells.device import result_of
from dijiang_export.bench.sampling import cells
from dijiang_export.bench.sampling import gpu as sampling_gpu
from dijiang_export.bench.sampling.cells import CHOICES, Cell
from dijiang_export.bench.sampling.choosers import SEED, Ours, make_logits, torch_chooser
from dijiang_export.bench.sampling.gpu import ALLOWED
from dijiang_export.cli import main
from dijiang_export.commands.bench import sampling as bench_sampling

CPU = torch.device("cpu")


class Emulated:
    """`dijiang_sample` on emulated threads; `fault` is added to every token."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._emulate, self.fault = library.emulate_sample, 0

    def sample(self, options: SamplingOptions, *, logits: Any, tokens: Any, row_status: Any, seed: int,
               draws: Any, stream: int) -> None:  # fmt: skip
        given = abi.SamplingOptionsStruct(
            options.temperature, options.top_p, options.min_p, options.repetition_penalty, seed, options.top_k
        )
        batch, vocabulary = logits.shape
        buffers = abi.SampleBuffersStruct(
            logits=logits.data_ptr(), logits_row_stride=vocabulary, draws=draws.data_ptr(),
            tokens=tokens.data_ptr(), row_status=row_status.data_ptr(), batch=batch, vocabulary=vocabulary,
            integers=1,
        )  # fmt: skip
        assert not stream
        self._emulate(ctypes.byref(given), ctypes.byref(buffers), 512, 1, 1, 0)
        tokens += self.fault

    def sample_plan(self, batch: int, vocabulary: int) -> str:
        return f"{batch} rows of {vocabulary}"


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    library = compiled(tmp_path_factory.mktemp("sampling") / "sampling.so", ("tests/emulator/sampling.cpp",))
    return Emulated(ctypes.CDLL(str(library)))


@pytest.mark.parametrize("choice", CHOICES)
def test_ours_are_compared_with_the_host_s(
    emulated: Any, choice: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel itself; and one that chooses the next token."""
    monkeypatch.setattr("dijiang_export.bench.sampling.choosers.COMPARED", 4)
    ours = Ours(emulated, CHOICES[choice], make_logits(2, 1500, CPU))
    assert ours.different() <= ALLOWED
    monkeypatch.setattr(emulated, "fault", 1)
    assert ours.different() == 1


@pytest.mark.parametrize("choice", CHOICES)
def test_torch_chooses_among_the_same_tokens_as_often(choice: Any) -> None:
    """Beside `sampling.sample`, with random numbers of its own: 4,000 choices of 40 tokens."""
    options, rows, vocabulary = CHOICES[choice], 4000, 40
    logits = make_logits(1, vocabulary, CPU).expand(rows, vocabulary).contiguous()
    tokens = torch.full((rows,), -1)
    torch.manual_seed(0)
    torch_chooser(_smaller(options))(logits, tokens)
    uniforms = np.array([sampling.uniform(SEED, 0, index) for index in range(rows)])
    expected = sampling.sample(logits.numpy(), _smaller(options), uniforms)
    counts = [np.bincount(found, minlength=vocabulary) for found in (tokens.numpy(), expected)]
    assert abs(counts[0] - counts[1]).sum() < 0.1 * rows
    if choice in ("greedy", "top-k", "top-k-top-p"):
        assert set(counts[0].nonzero()[0]) == set(counts[1].nonzero()[0])


def _smaller(options: SamplingOptions) -> SamplingOptions:
    """Top-k of a tenth, for a small vocabulary."""
    kept = {"top_p": options.top_p, "min_p": options.min_p}
    return SamplingOptions(options.temperature, top_k=options.top_k // 10, **kept)


def test_the_floor_is_the_logits() -> None:
    assert Cell(50304, 8, "top-p").nbytes == 4 * 8 * 50304


def test_what_fails_at_another_s_is_a_reason_and_at_ours_an_error(
    caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    """Without what it logs, warns of and advises."""

    def fail() -> dict[str, Any]:
        logging.getLogger("torch._inductor").critical("code that could not be made")
        warnings.warn("slow", stacklevel=1)
        raise TypeError("broken\n  badly\n\nSet VERBOSE=1")

    assert result_of(fail, ours=False) == {"skipped": "failed: TypeError: broken badly"}
    assert not caplog.records and not recwarn.list
    with pytest.raises(TypeError):
        result_of(fail)
    assert len(caplog.records) == len(recwarn.list) == 1


def test_everybody_runs(emulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def took(run: Any, seconds: float, calls: int) -> Timing:
        run()
        return FakeGpu.took(seconds)

    monkeypatch.setattr(sampling_gpu, "timed", took)
    monkeypatch.setattr("dijiang_export.bench.sampling.choosers.COMPARED", 4)
    monkeypatch.setattr(sampling_gpu, "compiled", lambda function: function)
    monkeypatch.setattr(emulated, "fault", 0)
    gpu: Any = object.__new__(sampling_gpu.SamplingGpu)
    gpu.device, gpu._kernels = CPU, emulated
    found = gpu.measure(Cell(1500, 2, "all"), 0.5)
    assert found["ours"]["right"] is True and found["ours"]["plan"] == "2 rows of 1500"
    assert all(found[name]["timing"] == FakeGpu.took(0.5) for name in ("ours", "torch", "torch-compile"))


class Gpu(FakeGpu):
    """On which ours take 10 µs, and PyTorch 100."""

    def __init__(self, error: float = 0.0) -> None:
        super().__init__(ALLOWED, error)

    def measure(self, cell: Cell, seconds: float) -> dict[str, Any]:
        return {
            "ours": self.ours(1e-5),
            "torch": {"timing": self.took(1e-4)},
            "torch-compile": {"skipped": "failed: no compiler"},
        }


def run(monkeypatch: pytest.MonkeyPatch, gpu: Gpu, *arguments: str) -> int:
    monkeypatch.setattr(sampling_gpu, "SamplingGpu", lambda library: gpu)
    return main(["bench", "sampling", *arguments])


def test_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    saved = tmp_path / "sampling.json"
    assert run(monkeypatch, Gpu(), "--rows", "2", "--save", str(saved)) == 0
    out = capsys.readouterr().out
    assert "Fake GPU, a copy moves 3.00 TB/s" in out and "100.0" in out
    assert "note: V = 50,304, 2 rows, top-p, torch-compile: failed: no compiler" in out
    record = json.loads(saved.read_text())
    assert [cell["choice"] for cell in record["cells"]] == list(CHOICES)
    assert record["cells"][0]["bytes"] == 4 * 2 * 50304


def test_its_choices_are_all_there_is() -> None:
    """The command says them again, so that `--help` loads nothing."""
    assert get_args(bench_sampling.Choice) == get_args(cells.Choice) == tuple(CHOICES)


def test_other_tokens_fail_the_command(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert run(monkeypatch, Gpu(0.5), "--choice", "top-p", "--rows", "1") == 1
    captured = capsys.readouterr()
    assert "wrong" in captured.out
    assert "V = 50,304, 1 row, top-p, ours: 5.0e-01" in captured.err


def test_it_needs_a_gpu(capsys: Any) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    assert main(["bench", "sampling"]) == 1
    assert "bench sampling needs an NVIDIA GPU" in capsys.readouterr().err
