"""A deep model whose rounding costs more than the table's rows allow: right runtimes pass, mistakes do not.

The model is a GPT-NeoX of 32 layers with a large offset in all channels of the hidden state; trained models
have one in some. LayerNorm takes it away again, but every sum before it is rounded at the offset's size.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from support.makers.checkpoints import neox
from support.makers.weight_files import load_tensors, save_tensors
from support.oracles.numpy_runner import NumpyRunner

from dijiang_engines.formats.reference_cases import Reference
from dijiang_engines.spec import ModelSpec
from dijiang_engines.validation.validate import Report, validate
from dijiang_export.checkpoint.checkpoint import open_checkpoint
from dijiang_export.export.record import record_cases

LAYERS, OFFSET = 32, 300.0
Weights = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelSpec, Weights, Path]:
    """The spec, the weights and the recorded cases."""
    model = neox(layers=LAYERS, hidden=48, heads=3, vocab=64)
    folder = model.save(tmp_path_factory.mktemp("deep") / "model")
    tensors = load_tensors(folder)
    tensors["gpt_neox.embed_in.weight"] += OFFSET
    save_tensors(folder, tensors)
    path = folder / "reference.safetensors"
    with open_checkpoint(folder) as checkpoint:
        record_cases(checkpoint, torch.float32, path, "short")
        return checkpoint.spec, {k: v.numpy() for k, v in checkpoint.load_state_dict().items()}, path


def check(deep: tuple[ModelSpec, Weights, Path], runner: NumpyRunner, *replays: str) -> Report:
    return validate(runner, Reference(deep[2], deep[0]), cases=["far"], replays=replays or None)


def test_a_right_runtime_passes_though_it_exceeds_the_tables_rows(
    deep: tuple[ModelSpec, Weights, Path], tmp_path: Path
) -> None:
    spec, weights, path = deep
    runner = NumpyRunner(spec, weights, np.float32)
    report = check(deep, runner)
    assert report.passed, report.first_failure
    old = tmp_path / "reference.safetensors"
    metadata = {"format": "dijiang-reference", "version": "1", "compute_dtype": "float64"}
    save_file(load_file(path), old, metadata | {"cases": '["short", "far"]'})
    fixed = validate(runner, Reference(old, spec), cases=["far"])
    assert not fixed.passed  # as all records did before they kept what rounding costs
    assert fixed.rounding_cost is None
    errors = [e for r in report.results for e in (r.logits_error, r.state_error) if e is not None]
    assert max(errors) > 1e-4


def test_bounds_follow_the_measurement_layer_by_layer(deep: tuple[ModelSpec, Weights, Path]) -> None:
    report = check(deep, NumpyRunner(deep[0], deep[1]), "prefill")
    cost, bounds = report.rounding_cost, report.bounds
    assert cost is not None and len(cost.layers) == LAYERS
    assert 1e-5 < cost.logits.error < 5e-4
    states = [bounds.state(layer).max_error for layer in range(LAYERS)]
    assert states == sorted(states)
    assert 1e-4 <= states[0] < states[-1] <= 5e-3
    assert not bounds.at_ceiling


def swap(weights: Weights, a: str, b: str) -> None:
    for name in [n for n in weights if n.startswith(a)]:
        other = b + name.removeprefix(a)
        weights[name], weights[other] = weights[other], weights[name]


def flip(name: str, which: Callable[[np.ndarray], int]) -> Callable[[Weights], None]:
    """Another sign of one weight."""

    def mutate(weights: Weights) -> None:
        value = weights[name] = weights[name].copy()
        value.reshape(-1)[which(np.abs(value).reshape(-1))] *= -1

    return mutate


def typical(values: np.ndarray) -> int:
    return int(np.argsort(values)[len(values) // 2])


def swap_layers(weights: Weights) -> None:
    swap(weights, "layers.15.", "layers.16.")


def swap_heads(weights: Weights) -> None:
    """Of one layer, the queries of two heads."""
    qkv = weights["layers.20.attention.qkv.weight"] = weights["layers.20.attention.qkv.weight"].copy()
    qkv[:16], qkv[16:32] = qkv[16:32].copy(), qkv[:16].copy()


def wrong_decay(weights: Weights) -> None:
    """In one layer, each head has another's."""
    name = "layers.25.attention.log_decay"
    weights[name] = np.roll(weights[name], 1)


def wrong_norm(weights: Weights) -> None:
    weights["layers.10.attention_norm.weight"] = np.roll(weights["layers.10.attention_norm.weight"], 1)


@pytest.mark.parametrize(
    "mutate",
    [
        *(
            flip(f"layers.{layer}.{name}.weight", which)
            for layer in (0, 15, 31)
            for name in ("attention.qkv", "attention.dense", "mlp.down")
            for which in (np.argmax, typical)
        ),
        flip("lm_head.weight", typical),
        swap_layers, swap_heads, wrong_decay, wrong_norm,
    ],
)  # fmt: skip
def test_a_mistake_in_the_weights_fails(
    mutate: Callable[[Weights], None], deep: tuple[ModelSpec, Weights, Path]
) -> None:
    weights = dict(deep[1])
    mutate(weights)
    report = check(deep, NumpyRunner(deep[0], weights), "prefill", "steps")
    assert not report.passed


def test_a_wrong_position_fails(deep: tuple[ModelSpec, Weights, Path]) -> None:
    class Late(NumpyRunner):
        def _run(self, input_ids, positions, seq_lens, state):  # type: ignore[no-untyped-def]
            return super()._run(input_ids, positions + 1, seq_lens, state)

    assert not check(deep, Late(deep[0], deep[1]), "prefill").passed
