"""Exported bundles on OpenVINO: against the recurrence in float64, and against their recorded cases."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.makers.checkpoints import RandomCheckpoint, llama, neox

from dijiang_engines.errors import PositionError
from dijiang_engines.formats.bundle import open_bundle
from dijiang_engines.runners import Runner, open_runner
from dijiang_engines.runners.base import MAX_POSITIONS
from dijiang_engines.validation.validate import validate
from dijiang_export.cli import main

if importlib.util.find_spec("openvino") is None:
    pytest.skip("openvino is not installed", allow_module_level=True)
A = np.array


def runner_of(folder: Path, **options: Any) -> Runner:
    return open_runner(open_bundle(folder), "openvino-cpu", **({"threads": 1} | options))


@pytest.mark.parametrize(
    "model",
    [
        neox(vocab=300).with_tokenizer(),
        neox(vocab=260, heads=6, hidden=96).with_trained_decay(),
        llama(heads=4, kv_heads=2, vocab=260),
    ],
    ids=["neox", "tables", "llama"],
)
def test_exported_bundles_compute_dijiang(exported: Any, model: RandomCheckpoint) -> None:
    """Prefill in uneven pieces, steps and padding, against the recurrence in float64."""
    folder, oracle = exported(model)
    runner = runner_of(folder)
    rng = np.random.default_rng(3)
    lens = A([90, 37])
    ids = rng.integers(0, runner.spec.vocab_size, (2, 90))
    states = runner.new_state(2), oracle.new_state(2)
    done = A([0, 0])
    for size in (1, 64, 7, 1, 1, 16):
        chunk = np.take_along_axis(ids, np.minimum(done[:, None] + np.arange(size), 89), axis=1)
        take = np.minimum(size, lens - done)
        call = "step" if size == 1 else "prefill"
        got = getattr(runner, call)(chunk, done, take, states[0])
        expected = getattr(oracle, call)(chunk, done, take, states[1])
        assert np.isfinite(got).all()
        for row in np.flatnonzero(take):
            error = np.abs(got[row] - expected[row]).max() / expected[row].std()
            assert error < 1e-4, (size, row, error)
        done = done + take
    assert done.tolist() == lens.tolist()
    for got, expected in zip(runner.export_state(states[0]), oracle.export_state(states[1]), strict=True):
        assert np.abs(got - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (neox(vocab=260), {}),
        (neox(vocab=260, heads=6, hidden=96).with_trained_decay(), {"extend_decay": True}),
    ],
    ids=["neox", "tables"],
)
def test_positions_are_right_to_the_end(exported: Any, model: RandomCheckpoint, options: Any) -> None:
    """Where float32 has no angles any more: OpenVINO has no float64."""
    folder, oracle = exported(model, **options)
    runner = runner_of(folder)
    assert runner.spec.rotary_dim > 0
    rng = np.random.default_rng(5)
    for end in (2**24 + 30, MAX_POSITIONS):
        lens = A([20, 7])
        ids, done = rng.integers(0, 260, (2, 20)), end - 4 - lens
        states = runner.new_state(2), oracle.new_state(2)
        calls = [("prefill", ids, done, lens)]
        calls += [("step", rng.integers(0, 260, (2, 1)), done + lens + n, A([1, 1])) for n in range(4)]
        for name, *arrays in calls:
            got, expected = (
                getattr(one, name)(*arrays, state)
                for one, state in zip((runner, oracle), states, strict=True)
            )
            assert np.abs(got - expected).max() / expected.std() < 1e-4, (name, end)
    with pytest.raises(PositionError, match="computes right"):
        runner.step(A([[1], [1]]), A([end, end]), A([1, 0]), states[0])


TYPES: dict[str, dict[str, Any]] = {
    "bfloat16": {"dtype": "bfloat16"},
    "int4, int8, float16": {"weight_format": "int4", "dtype": "float16"},  # head and embedding are int8 then
}


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_is_computed_in_float32(exported: Any, kind: str) -> None:
    """So the distance from the record is float32's, whatever the bundle's type may have."""
    folder, _ = exported(neox(vocab=97, hidden=64, heads=4, intermediate=96), **TYPES[kind])
    bundle = open_bundle(folder)
    runner = runner_of(folder, fixed_batches=1)
    report = validate(runner, bundle.reference(), dtype=bundle.dtype, activations=bundle.activations)
    report.raise_on_mismatch()
    for result in report.results:
        assert (result.logits_error or 0) < 1e-4 and (result.state_error or 0) < 1e-4, result


def test_the_sample_passes(sample_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["validate", str(sample_bundle), "--runner", "openvino-cpu", "--threads", "1"]
    assert main(command) == 0
    assert "openvino-cpu, float32" in capsys.readouterr().out
