"""What needs a GPU: the reference model as an oracle on it, and ONNX Runtime's CUDA provider.

Skipped, with the reason, where there is no GPU. docs/evidence/ keeps the records of runs on one.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from support.makers import random_models as rm
from support.makers.checkpoints import llama, neox, opt_350m

from dijiang_engines.formats.bundle import open_bundle
from dijiang_engines.runners.registry import open_runner
from dijiang_engines.validation.validate import validate
from dijiang_export.export.to_onnx import export_bundle

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
needs_ort_cuda = pytest.mark.skipif(
    "CUDAExecutionProvider" not in ort.get_available_providers() or not torch.cuda.is_available(),
    reason="no ONNX Runtime with CUDA, or no CUDA device",
)

SPECS = {
    "neox": rm.with_heads(rm.NEOX, 4, 4, 64, 16),
    "straddling-tables": rm.with_tables(rm.with_heads(rm.NEOX, 6, 6, 16, 4), 300),
    "llama-gqa": rm.LLAMA,
}
CHECKPOINTS = {
    "gpt_neox": neox(hidden=256, heads=4),
    "trained-tables-straddling": neox(hidden=96, heads=6, positions=300).with_trained_decay(),
    "llama-gqa-tied": llama(kv_heads=2).with_config(tie_word_embeddings=True),
    "opt-350m": opt_350m(positions=300, embedding=32),
}  # fmt: skip


@needs_gpu
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("form", ["recurrent", "parallel", "chunked"])
def test_reference_model_on_the_gpu(name: str, form: str) -> None:
    spec = SPECS[name]
    model = rm.random_model(spec)
    ids, positions, lens, states = rm.random_call(spec, 3, 100, seed=1)

    def run(device: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
        tensors = [torch.from_numpy(x).to(device) for x in (ids, positions, lens)]
        carried = [torch.from_numpy(s).double().to(device) for s in states]
        logits, presents = model.to(device)(*tensors, carried, form=form, all_logits=False)
        return logits.cpu(), [p.cpu() for p in presents]

    (expected, end), (logits, presents) = run("cpu"), run("cuda")
    valid = lens > 0
    torch.testing.assert_close(logits[valid], expected[valid], rtol=1e-9, atol=1e-9)
    for got, exact in zip(presents, end, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-9, atol=1e-9)


@needs_ort_cuda
@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_onnxruntime_cuda_reproduces_the_reference(name: str, dtype: str, tmp_path: Path) -> None:
    source = CHECKPOINTS[name].save(tmp_path / "model")
    export_bundle(source, tmp_path / "x.bundle", dtype=dtype, cases="full")
    bundle = open_bundle(tmp_path / "x.bundle")
    report = validate(open_runner(bundle, "onnxruntime-cuda"), bundle.reference())
    print(name, dtype, *(dataclasses.astuple(r)[:6] for r in report.results), sep="\n")
    assert report.passed, report.failures[:3]


@needs_ort_cuda
def test_onnxruntime_cuda_state_survives_export_and_import(tmp_path: Path) -> None:
    source = neox().save(tmp_path / "model")
    export_bundle(source, tmp_path / "x.bundle", cases="none")
    runner = open_runner(open_bundle(tmp_path / "x.bundle"), "onnxruntime-cuda")
    ids, zero, lens = np.arange(12).reshape(2, 6), np.zeros(2, np.int64), np.full(2, 6)
    state = runner.new_state(2)
    runner.prefill(ids, zero, lens, state)
    copy = runner.import_state(runner.export_state(state))
    steps = [runner.step(ids[:, :1], lens, np.ones(2, np.int64), s) for s in (state, copy)]
    assert np.array_equal(*steps)
    for a, b in zip(runner.export_state(state), runner.export_state(copy), strict=True):
        assert np.array_equal(a, b)
