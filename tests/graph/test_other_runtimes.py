"""The standard graphs on runtimes stricter than ONNX Runtime, and that what those ask for changed no bit.

ONNX's reference evaluator runs them here; TensorRT for RTX's builder in tests/building/test_rtx_builds.py.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from support.makers import random_models as rm

from dijiang_export.graph import body_prefill, lower
from dijiang_export.graph.builder import Builder

GEOMETRIES = {
    name: dataclasses.replace(spec, num_layers=1)
    for name, spec in {
        "neox": rm.NEOX, "tables": rm.with_tables(rm.NEOX, 400), "llama": rm.LLAMA, "opt-350m": rm.OPT_350M,
        "d80": rm.with_heads(rm.NEOX, 2, 2, 80, 20),
    }.items()
}  # fmt: skip
LENGTHS = [1, 2, 63, 64, 65, 100, 130, 257]


def call(spec: Any, length: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Three rows: full, shorter, and without a token."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, spec.vocab_size, (3, length))
    states = [rng.standard_normal((3, *spec.state_shape)).astype(np.float32) for _ in range(spec.num_layers)]
    return rm.feed(ids, np.array([0, 7, 40]), np.array([length, max(length - 3, 0), 0]), states)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_the_reference_evaluator_runs_them(name: str) -> None:
    """Also prompts of more tokens than NumPy's `choose` takes arrays: GatherElements there is made of it."""
    spec = GEOMETRIES[name]
    model = rm.random_model(spec)
    for kind, lengths in (("prefill", (3, 100)), ("step", (1,))):
        graph = rm.graph_model(spec, model, kind)
        session, evaluator = rm.session(graph), ReferenceEvaluator(ir.to_proto(graph))
        for length in lengths:
            feed = call(spec, length)
            got, expected = evaluator.run(None, feed), session.run(None, feed)
            rows = feed["seq_lens"] > 0
            for one, other in zip(got, expected, strict=True):
                assert one.shape == other.shape and one.dtype == other.dtype
                scale = np.abs(other[rows]).max()
                assert np.abs(one - other)[rows].max() <= 1e-4 * scale


@pytest.mark.parametrize("name", GEOMETRIES)
def test_they_have_nothing_that_stricter_runtimes_stumble_over(name: str) -> None:
    spec = GEOMETRIES[name]
    graph = rm.graph_model(spec, rm.random_model(spec), "prefill").graph
    assert "GatherElements" not in {node.op_type for node in graph}
    for node in graph:
        if node.op_type == "Div" and str(node.name).startswith("/shared/nc"):
            divisor = node.inputs[1]
            assert divisor is not None and divisor.const_value is not None, "a size of the call divides"
        if node.op_type == "Reshape" and str(node.name).endswith("/k_t"):
            assert node.attributes.get_int("allowzero", 0) == 1
    names = {str(node.name) for node in graph}
    assert "/shared/nc" in names and sum(name.endswith("/k_t") for name in names) == spec.num_layers


def as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lower as version 0.1.0 did: the count of chunks by the chunk, placeholders, GatherElements."""
    reshape, chunks = Builder.reshape, body_prefill._chunks

    def with_placeholders(self: Builder, x: ir.Value, *dims: Any, label: str | None = None) -> ir.Value:
        found = reshape(self, x, *dims, label=label)
        producer = found.producer()
        assert producer is not None
        producer.attributes.pop("allowzero", None)
        return found

    def by_the_chunk(b: Builder, op: Any) -> Any:
        made = chunks(b, op)
        node = made.count.producer()
        assert node is not None and node.op_type == "Div"
        one = b.ints(1)
        at = b.nodes.index(node)
        rest = b.nodes[at:]
        del b.nodes[at:]
        total = b.op("Sub", b.op("Add", made.length, made.size), one)
        b.nodes += rest
        node.replace_input_with(0, total)
        node.replace_input_with(1, made.size)
        return made

    monkeypatch.setattr(Builder, "reshape", with_placeholders)
    monkeypatch.setattr(body_prefill, "_chunks", by_the_chunk)
    monkeypatch.setattr(lower, "_gather_last_rows", lambda model, builder: None)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_no_bit_changed_in_onnxruntime(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = GEOMETRIES[name]
    model = rm.random_model(spec, dtype=torch.float32)
    now = rm.graph_model(spec, model, "prefill")
    as_before(monkeypatch)
    before = rm.graph_model(spec, model, "prefill")
    assert "GatherElements" in {node.op_type for node in before.graph}
    for length in LENGTHS:
        feed = call(spec, length, seed=length)
        for got, expected in zip(
            rm.session(now).run(None, feed), rm.session(before).run(None, feed), strict=True
        ):
            np.testing.assert_array_equal(got, expected)
