"""One size of chunks: what pads, cuts and estimates follows it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from support.fakes.runner import ToyRunner, toy_case, write_reference
from support.makers.toy_bundle import SPEC, ToyModel

from dijiang_engines import inspection
from dijiang_engines.formats.reference_cases import Reference
from dijiang_engines.op_contract import chunk_size
from dijiang_engines.validation.replay import extra_padding
from dijiang_engines.validation.validate import validate
from dijiang_export.graph import body_prefill


@pytest.mark.parametrize("head_dim", [16, 64, 80, 128, 256])
def test_padding_adds_a_chunk_whatever_the_length(head_dim: int) -> None:
    chunk, extra = chunk_size(head_dim), extra_padding(head_dim)
    for length in range(1, 3 * chunk):
        assert -(-(length + extra) // chunk) > -(-length // chunk)


def test_the_graph_and_the_estimate_have_the_same_chunks() -> None:
    assert body_prefill.chunk_size is inspection.chunk_size is chunk_size
    assert (chunk_size(128), chunk_size(256)) == (64, 128)


def test_a_fault_in_a_second_chunk_of_padding_is_found_at_head_size_256(tmp_path) -> None:  # type: ignore[no-untyped-def]
    spec = dataclasses.replace(SPEC, head_dim=256, num_heads=1, num_kv_heads=1, num_layers=1, rotary_dim=0)
    model = ToyModel.random(spec)
    path = write_reference(tmp_path / "r.safetensors", {"short": toy_case(model, [9, 4], [0, 0])})
    runner = ToyRunner(model)

    def fault(_name: str, a: dict) -> None:
        if a["ids"].shape[1] > chunk_size(256):
            a[0][...] *= np.float32(1.01)

    runner.tamper = fault
    report = validate(runner, Reference(path, spec), replays=["prefill", "padding"])
    assert [r.passed for r in report.results] == [True, False]
