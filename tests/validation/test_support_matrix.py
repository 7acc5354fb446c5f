"""README.md's support matrix calls these engine-tested: whole exported models that `validate` passes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.makers.checkpoints import llama, neox, opt, opt_350m
from support.paths import ROOT

from dijiang_export.cli import main

MODELS = {
    "gpt_neox float32": neox(),
    "gpt_neox float16": neox(),
    "llama float32": llama(heads=4, kv_heads=2),
    "opt float32": opt(),
    "opt-350m's shape float32": opt_350m(embedding=32),
}


@pytest.mark.parametrize("name", MODELS)
def test_onnxruntime_on_the_cpu(
    name: str, exported: Callable[..., tuple[Path, Any]], capfd: pytest.CaptureFixture[str]
) -> None:
    dtype = name.split()[-1]
    bundle, _ = exported(MODELS[name], dtype=dtype)
    assert main(["--json", "validate", str(bundle), "--runner", "onnxruntime-cpu"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert report["runner"] == "onnxruntime-cpu"
    assert report["dtype"] == dtype
    assert report["passed"] is True


def by_hand() -> list[tuple[str, str]]:
    """(target, state) of the matrix's rows that were tested by hand."""
    rows = re.findall(
        r"^\| ([^|]+) \| ([^|]*by hand[^|]*) \|$", (ROOT / "README.md").read_text(), re.MULTILINE
    )
    return [row for row in rows if "engine-tested" in row[1]]


@pytest.mark.parametrize(("target", "state"), by_hand(), ids=[target for target, _ in by_hand()])
def test_what_was_tested_by_hand_has_a_record(target: str, state: str) -> None:
    """The record names the GPU and the runtime's version that the row names."""
    (name,) = re.findall(r"\[record\]\((docs/evidence/[^)]+)\)", state)
    record = (ROOT / name).read_text()
    runtime, version = re.findall(r"(TensorRT|ONNX Runtime) ([\d.]+)", target)[0]
    written = rf"{runtime} {version}|{runtime.replace(' ', '').lower()}\W+{version}"
    assert re.search(written.replace(".", r"\."), record, re.IGNORECASE), f"{name}: no {runtime} {version}"
    (gpu,) = re.findall(r"\bH[12]00\b", target)
    assert gpu in record, f"{name}: no {gpu}"


def test_rows_by_hand_are_found() -> None:
    assert len(by_hand()) == 6
