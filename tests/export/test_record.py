"""Recorded cases: the streamed float64 oracle is the whole reference model, and peak memory stays put."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from support.makers.checkpoints import llama, neox, opt_350m
from support.oracles.numpy_runner import NumpyRunner

from dijiang_engines.formats.reference_cases import Reference
from dijiang_engines.progress import silent
from dijiang_export.checkpoint.checkpoint import open_checkpoint
from dijiang_export.export import cases as export_cases
from dijiang_export.export import streamed_model
from dijiang_export.export.case_recorder import CaseRecorder
from dijiang_export.export.cases import choose_cases
from dijiang_export.export.record import record_cases
from dijiang_export.reference.model import ReferenceModel

CHECKPOINTS = {
    "gpt_neox": neox(),
    "llama-gqa-tied": llama(positions=200, kv_heads=2).with_config(tie_word_embeddings=True),
    "opt-350m": opt_350m(positions=100, embedding=32),
    "trained-tables": neox(positions=50).with_trained_decay(),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_recorded_cases_are_the_reference_models(
    name: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = CHECKPOINTS[name].save(tmp_path / "model")
    path = tmp_path / "reference.safetensors"
    with open_checkpoint(folder) as checkpoint:
        spec = checkpoint.spec
        monkeypatch.setattr(export_cases, "DRIFT_TOKENS", 300)
        names = record_cases(checkpoint, dtype, path, "full")
        assert names == ["short", "far", "long", "drift"]
        rounded = ReferenceModel(spec, dtype=dtype)
        rounded.load_state_dict(checkpoint.load_state_dict(torch.float32))  # copying rounds
        state = rounded.state_dict()
        for key in state:
            if key.endswith(".proj"):  # the op rounds P to T
                state[key] = state[key].to(dtype)
        model = ReferenceModel(spec, dtype=torch.float64)
        model.load_state_dict(state)
    with safe_open(path, framework="numpy") as file:
        cases = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    for case in names:
        ids = torch.from_numpy(cases[f"{case}.input_ids"])
        positions = torch.from_numpy(cases[f"{case}.positions"])
        marks = cases[f"{case}.marks"]
        assert np.array_equal(marks[:, -1], cases[f"{case}.seq_lens"])
        assert (np.diff(marks, axis=1) >= 0).all()
        logits, _ = model(ids, positions, form="recurrent")
        for row in range(ids.shape[0]):
            expected = logits[row, marks[row] - 1].numpy()
            got = cases[f"{case}.logits"][row]
            assert np.abs(got - expected).max() <= 1e-6 * expected.std()
        for column, mark in enumerate(cases[f"{case}.state_marks"]):
            lens = torch.from_numpy(marks[:, mark])
            _, states = model(ids, positions, lens, form="recurrent")
            for layer, exact in enumerate(states):
                kept = cases[f"{case}.state.{layer}"][:, column]
                assert np.abs(kept - exact.numpy()).max() <= 1e-6 * exact.abs().max()


@pytest.mark.parametrize("segment", [16, 67])
def test_segments_do_not_change_what_is_recorded(
    segment: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut inside rows, at their ends and at marks: the state goes on, and nothing is computed twice."""
    folder = llama(kv_heads=2).save(tmp_path / "model")
    monkeypatch.setattr(export_cases, "DRIFT_TOKENS", 150)
    results = []
    with open_checkpoint(folder) as checkpoint:
        cases = choose_cases(checkpoint.spec, "full")
        for least in (10_000, segment):
            monkeypatch.setattr(streamed_model, "LEAST_SEGMENT", least)
            monkeypatch.setattr(streamed_model, "SEGMENT_BYTES", 0)
            recorder = CaseRecorder(checkpoint, torch.float32, cases)
            assert (len(recorder._segments) > 1) == (least == segment)
            with torch.inference_mode():
                results.append(recorder.run(silent))
    whole, cut = results
    assert whole.keys() == cut.keys()
    for key, expected in whole.items():
        assert np.abs(cut[key] - expected).max() <= 2e-7 * np.abs(expected).max(), key


@pytest.mark.slow
def test_drift_is_ten_thousand_tokens_of_the_recurrence(tmp_path: Path) -> None:
    folder = neox(layers=1, hidden=32, heads=2).save(tmp_path / "model")
    path = tmp_path / "reference.safetensors"
    with open_checkpoint(folder) as checkpoint:
        record_cases(checkpoint, torch.float32, path, "full")
        weights = {k: v.numpy() for k, v in checkpoint.load_state_dict().items()}
        oracle = NumpyRunner(checkpoint.spec, weights, all_logits=True)
        case = Reference(path, checkpoint.spec).cases["drift"]
        assert case.input_ids.shape == (1, 10_000)
        assert case.marks[0, -1] == 10_000
        assert len(case.state_marks) == 4
        state, done = oracle.new_state(1), 0
        recorded = {int(case.marks[0, m]): i for i, m in enumerate(case.state_marks)}
        for mark, expected in zip(case.marks[0], case.logits()[0], strict=True):
            ids, start, count = case.input_ids[:, done:mark], np.array([done]), np.array([mark - done])
            logits = oracle.prefill(ids, start, count, state)
            done = int(mark)
            assert np.abs(logits[0, -1] - expected).max() <= 1e-6 * expected.std()
            if done in recorded:
                kept = case.state(0)[0, recorded[done]]
                assert np.abs(state[0][0] - kept).max() <= 1e-6 * np.abs(kept).max()


def test_cases_stay_inside_tables_and_none_means_none(tmp_path: Path) -> None:
    folder = neox(positions=12).with_trained_decay().save(tmp_path / "model")
    with open_checkpoint(folder) as checkpoint:
        for case in choose_cases(checkpoint.spec, "full"):
            for row, ids in enumerate(case.input_ids):
                assert len(ids) >= 1
                assert case.positions[row] + len(ids) <= 12
        assert record_cases(checkpoint, torch.float32, tmp_path / "none", "none") == []
    assert not (tmp_path / "none").exists()


def test_cases_differ_between_rows_and_are_the_same_every_time(tmp_path: Path) -> None:
    folder = neox().save(tmp_path / "model")
    with open_checkpoint(folder) as checkpoint:
        first, second = (choose_cases(checkpoint.spec, "short") for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(a.input_ids, b.input_ids, strict=True))
    assert not np.array_equal(first[0].input_ids[0][:10], first[0].input_ids[1][:10])


# VmHWM and not ru_maxrss: a process inherits the latter from the one that started it, which is larger here.
MEASURE = """
import sys, torch
from dijiang_export.bench.process_memory import memory
from dijiang_export.checkpoint.checkpoint import open_checkpoint
from dijiang_export.export import to_onnx
before = memory("self")["VmHWM"]
to_onnx.export_bundle(sys.argv[1], sys.argv[2], dtype="float16", cases=sys.argv[3])
print(memory("self")["VmHWM"] - before)
"""


@pytest.mark.slow
def test_export_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """Seven times the layers cost a fraction of the weights that they add."""
    peaks = {}
    for layers in (2, 14):
        model = neox(hidden=512, heads=8, intermediate=2048, layers=layers)
        folder = model.stored_in("float16").save(tmp_path / f"model{layers}")
        command = [sys.executable, "-c", MEASURE, str(folder), str(tmp_path / f"out{layers}.bundle"), "none"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[layers] = int(done.stdout) / 2**20
    weights = sum(p.stat().st_size for p in (tmp_path / "model14").iterdir()) / 2**20
    assert weights > 80
    # Not zero: allocators keep some, and graphs grow. Far less than the weights. Recorded states would add.
    assert min(peaks.values()) > 20, peaks  # something was measured
    assert peaks[14] - peaks[2] < 0.4 * weights, peaks


MEASURE_DRIFT = """
import sys, torch
from pathlib import Path
from dijiang_export.bench.process_memory import memory
from dijiang_export.checkpoint.checkpoint import open_checkpoint
from dijiang_export.export import cases, record, streamed_model
cases.DRIFT_TOKENS = int(sys.argv[2])
streamed_model.SEGMENT_BYTES = 8 << 20
with open_checkpoint(sys.argv[1]) as checkpoint:
    record.record_cases(checkpoint, torch.float32, Path(sys.argv[3]), "full")
print(memory("self")["VmHWM"])
"""


@pytest.mark.slow
def test_memory_grows_with_the_hidden_vectors_of_drift_only(tmp_path: Path) -> None:
    folder = neox(hidden=256, heads=4, intermediate=4096, layers=1).save(tmp_path / "model")
    peaks = []
    for tokens in (2000, 10_000):
        command = [sys.executable, "-c", MEASURE_DRIFT, str(folder), str(tokens), str(tmp_path / "r")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout) / 2**20)
    hidden = 8000 * 256 * 8 / 2**20
    # Of the MLP's activations alone, 8000 tokens in one segment would take 16 times the hidden vectors.
    assert peaks[1] - peaks[0] < 4 * hidden, peaks
