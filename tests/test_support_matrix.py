"""README.md's support matrix calls these engine-tested: whole exported models that `validate` passes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dijiang_export.cli import main

MODELS: dict[str, dict[str, Any]] = {
    "gpt_neox float32": {"family": "gpt_neox"},
    "gpt_neox float16": {"family": "gpt_neox", "dtype": "float16"},
    "llama float32": {"family": "llama", "heads": 4, "kv_heads": 2},
    "opt float32": {"family": "opt"},
    "opt-350m's shape float32": {"family": "opt", "pre_norm": False, "embedding_size": 32},
}


@pytest.mark.parametrize("name", MODELS)
def test_onnxruntime_on_the_cpu(
    name: str, exported: Callable[..., tuple[Path, Any]], capfd: pytest.CaptureFixture[str]
) -> None:
    bundle, _ = exported(**MODELS[name])
    assert main(["--json", "validate", str(bundle), "--runner", "onnxruntime-cpu"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert report["runner"] == "onnxruntime-cpu"
    assert report["dtype"] == MODELS[name].get("dtype", "float32")
    assert report["passed"] is True
